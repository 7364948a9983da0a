"""Configuration: defaults, precedence, and errors that name the key, the value and the range."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from asyncxfer._config import Config
from asyncxfer._errors import ConfigError, XferError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASYNCXFER_")]:
        monkeypatch.delenv(name)


def test_defaults_are_valid_and_frozen() -> None:
    config = Config.load()
    assert config == Config()
    assert config.chunk_bytes == 1048576
    assert config.copy_threads is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_rows = 3  # type: ignore[misc]


def test_a_config_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_CHUNK_ROWS", "7")
    config = Config(inline_rows=1)
    assert Config.load(config) is config


def test_explicit_wins_over_environment_wins_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_CHUNK_ROWS", "7")
    monkeypatch.setenv("ASYNCXFER_INLINE_ROWS", "8")
    config = Config.load({"inline_rows": 9})
    assert (config.chunk_rows, config.inline_rows) == (7, 9)
    assert config.inline_bytes == Config().inline_bytes


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("ASYNCXFER_COPY_THREADS", "auto", "copy_threads", None),
        ("ASYNCXFER_COPY_THREADS", " 2 ", "copy_threads", 2),
        ("ASYNCXFER_CHUNK_BYTES", "0x10000", "chunk_bytes", 65536),
        ("ASYNCXFER_CHUNK_BYTES", "1_048_576", "chunk_bytes", 1048576),
        ("ASYNCXFER_CONNECT_TIMEOUT", "2.5", "connect_timeout", 2.5),
        ("ASYNCXFER_PREFAULT", "Yes", "prefault", True),
        ("ASYNCXFER_PREFAULT", "off", "prefault", False),
        ("ASYNCXFER_PREFAULT", "", "prefault", False),
        ("ASYNCXFER_UCX_LIBRARY", " /opt/HPC-X/ucx ", "ucx_library", "/opt/HPC-X/ucx"),
        ("ASYNCXFER_UCX_DEVICES", "auto", "ucx_devices", None),
        ("ASYNCXFER_UCX_PROGRESS", "Thread", "ucx_progress", "thread"),
    ],
)
def test_environment_text(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: object) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(Config.load(), field) == value


def test_build_variables_are_not_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_BUILD_TRACE", "1")
    assert Config.load() == Config()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk_rows": 0}, ["chunk_rows", "0", "1 to 1,048,576 rows"]),
        ({"copy_threads": 257}, ["copy_threads", "257", "256 threads", "None"]),
        ({"inline_bytes": None}, ["inline_bytes", "None", "bytes"]),
        ({"inline_bytes": 1.5}, ["inline_bytes", "1.5", "an integer"]),
        ({"inline_rows": True}, ["inline_rows", "True", "an integer"]),
        ({"prefault": 1}, ["prefault", "1", "true or false"]),
        ({"connect_timeout": float("nan")}, ["connect_timeout", "nan", "seconds"]),
        ({"connect_timeout": float("inf")}, ["connect_timeout", "inf"]),
        ({"connect_timeout": "soon"}, ["connect_timeout", "'soon'", "a number"]),
        ({"connect_timeout": "2.5"}, ["connect_timeout", "'2.5'", "a number"]),
        ({"connect_timeout": 10**400}, ["connect_timeout", "a number"]),
        ({"notification_bytes": 32769}, ["notification_bytes", "32769", "32,768 bytes"]),
        ({"ucx_transports": ["tcp"]}, ["ucx_transports", "['tcp']", "text of 1 to 1,024", "None"]),
        ({"ucx_transports": " "}, ["ucx_transports", "' '", "text of 1 to 1,024 printable characters"]),
        ({"ucx_devices": "x" * 1025}, ["ucx_devices", "1,024 printable characters"]),
        ({"ucx_library": "/opt/ucx\n"}, ["ucx_library", "/opt/ucx\\n", "printable"]),
        ({"ucx_progress": "spin"}, ["ucx_progress", "'spin'", "expected 'loop' or 'thread'"]),
        ({"ucx_progress": None}, ["ucx_progress", "None", "expected 'loop' or 'thread'"]),
        ({"ucx_workers": 17}, ["ucx_workers", "17", "1 to 16 workers"]),
    ],
)
def test_bad_values_name_key_value_and_range(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_range_ends_are_accepted() -> None:
    assert Config(chunk_rows=1, notification_bytes=32768).chunk_rows == 1


def test_numpy_numbers_become_python_numbers() -> None:
    config = Config(chunk_rows=np.int64(5), connect_timeout=3)  # type: ignore[arg-type]
    assert type(config.chunk_rows) is int
    assert type(config.connect_timeout) is float


def test_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'chunk_row'.*did you mean 'chunk_rows'"):
        Config.load({"chunk_row": 3})
    with pytest.raises(ConfigError, match=r"'zzz'.*copy_threads"):
        Config.load({"zzz": 3})


def test_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_CHUNK_ROW", "3")
    with pytest.raises(ConfigError, match=r"ASYNCXFER_CHUNK_ROW.*did you mean 'ASYNCXFER_CHUNK_ROWS'"):
        Config.load()


def test_malformed_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_CHUNK_ROWS", "many")
    with pytest.raises(ConfigError, match=r"ASYNCXFER_CHUNK_ROWS is 'many'; expected an integer from 1"):
        Config.load()


def test_a_variable_that_is_none_of_the_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCXFER_UCX_PROGRESS", "spin")
    with pytest.raises(ConfigError, match=r"'ucx_progress' is 'spin'; expected 'loop' or 'thread'"):
        Config.load()


def test_config_errors_are_xfer_errors_and_value_errors() -> None:
    assert issubclass(ConfigError, XferError)
    assert issubclass(ConfigError, ValueError)
