"""`asyncxfer bench --over s3` and `--over azure`: what they measure is right, and who cannot take part is named.

No test looks at a time but to see that there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from azure_places import ACCOUNT, KEY, Container
from servers import S3Server

from asyncxfer.bench import _cli, _nixl, _null_objects, _object_cases, _objects, _report
from asyncxfer.bench._object_cases import ObjectCase
from asyncxfer.bench._object_store import Cloud
from asyncxfer.bench._shapes import Shape


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_aiobotocore = pytest.mark.skipif(
    not _is_installed("aiobotocore"), reason="aiobotocore is not installed: pip install 'asyncxfer[s3]'"
)
needs_azure = pytest.mark.skipif(
    not _is_installed("azure.storage.blob"),
    reason="azure-storage-blob is not installed: pip install 'asyncxfer[azure]'",
)
both_clouds = pytest.mark.parametrize(
    "cloud", [pytest.param("s3", marks=needs_aiobotocore), pytest.param("azure", marks=needs_azure)]
)
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason=f"NIXL is not installed: {_nixl.INSTALL}"
)
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="there is no program openssl: apt-get install openssl"
)

SHAPES = "2x4MiB,1x100B"
LARGE = ("--shapes", "2x4MiB")
OBSTORE = ["obstore"] if importlib.util.find_spec("obstore") is not None else []
NIXL = ["--peer", "nixl"] if importlib.util.find_spec("nixl") is not None else []
ROUNDS = ["--rounds", "2", "--warmup", "1"]
SDKS = {"s3": ["aiobotocore"], "azure": ["azure-storage-blob"] if _is_installed("aiohttp") else []}
PLUGINS = {"s3": "OBJ", "azure": "AZURE_BLOB"}
_numbers = itertools.count()
CASE = ObjectCase(Shape(3, 100), "http", "get", 3, kept=True)


def bench(cloud: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncxfer", "bench", "--over", cloud, *ROUNDS, *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env={**os.environ, **environment}
    )


def results_of(ran: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)["results"]
    return results


def check(measured: dict[str, Any]) -> None:
    assert measured["verified"], measured["problem"]
    assert len(measured["samples"]) == 2
    assert min(measured["samples"]) > 0
    assert measured["cpu_seconds_per_row"] > 0


# ---- real runs ------------------------------------------------------------------------------------------------------


@both_clouds
def test_every_case_is_run_and_verified(cloud: str, loop_name: str) -> None:
    results = results_of(bench(cloud, "--shapes", SHAPES, "--json", *(["--uvloop"] if loop_name == "uvloop" else [])))
    assert [(result["shape"], result["op"]) for result in results] == [
        ("2x4MiB", "put"), ("2x4MiB", "get"), ("1x100B", "put"), ("1x100B", "get"),
    ]  # fmt: skip
    for result in results:
        assert result["link"] == "http"
        assert result["looked_at"] == (result["op"] == "get")
        assert result["ours"]["backend"] == f"{cloud}:http"
        check(result["ours"])
        assert set(result["rivals"]) == {*SDKS[cloud], *OBSTORE}
        for rival in result["rivals"].values():
            check(rival)
            assert rival["ratio"] > 0
        assert set(result["lateness"]) == {"p50", "p99", "p99.9", "max"}


@both_clouds
@needs_nixl
def test_nixl_runs_beside_it(cloud: str) -> None:
    (result,) = results_of(bench(cloud, *LARGE, "--op", "get", "--peer", "nixl", "--json"))
    assert result["rivals"]["NIXL"]["backend"] == PLUGINS[cloud]
    check(result["rivals"]["NIXL"])


@both_clouds
@needs_openssl
def test_https(cloud: str) -> None:
    for result in results_of(bench(cloud, *LARGE, "--op", "get", "--tls", "--json", *NIXL)):
        assert result["link"] == "https"
        for measured in (result["ours"], *result["rivals"].values()):
            check(measured)


def check_kept(ran: subprocess.CompletedProcess[str]) -> None:
    for result in results_of(ran):
        assert result["looked_at"]
        for measured in (result["ours"], *result["rivals"].values()):
            check(measured)


@needs_aiobotocore
def test_a_store_that_keeps_what_it_is_given(s3: S3Server) -> None:
    asked = {"AWS_ACCESS_KEY_ID": s3.admin.access_key, "AWS_SECRET_ACCESS_KEY": s3.admin.secret_key}
    with s3.bucket() as bucket:  # which can be removed only where nothing was left in it
        check_kept(bench("s3", "--endpoint", s3.url, "--bucket", bucket, *LARGE, "--json", *NIXL, **asked))


@needs_azure
def test_an_account_of_azure_that_keeps_what_it_is_given(azurite: str) -> None:
    container = f"bench-{os.getpid()}-{next(_numbers)}"
    told = ("--endpoint", f"{azurite}/{ACCOUNT}", "--bucket", container)
    asked = {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName={ACCOUNT};AccountKey={KEY}"}
    check_kept(bench("azure", *told, *LARGE, "--json", *NIXL, **asked))
    assert Container(azurite, container).ask("GET", "?restype=container&comp=list").body.count(b"<Blob>") == 0


@needs_aiobotocore
def test_a_store_that_refuses_is_named(s3: S3Server) -> None:
    ran = bench("s3", "--endpoint", s3.url, AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="nothing")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"asyncxfer bench: {s3.url} cannot be used: " in ran.stderr


@needs_azure
@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("", "nothing says who asks {}; set AZURE_STORAGE_CONNECTION_STRING"),
        (f"AccountName={ACCOUNT};AccountKey=bm9ib2R5", "{} cannot be used: "),
        (f"AccountName={ACCOUNT};AccountKey=no base64", "{} cannot be used: "),
    ],
)
def test_an_account_of_azure_that_refuses_is_named(azurite: str, told: str, says: str) -> None:
    ran = bench("azure", "--endpoint", f"{azurite}/{ACCOUNT}", AZURE_STORAGE_CONNECTION_STRING=told)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"asyncxfer bench: {says.format(f'{azurite}/{ACCOUNT}')}" in ran.stderr


@needs_aiobotocore
def test_stall_mode() -> None:
    asked = ("--stall", "0.2", "--shapes", "3x1MiB")
    results = results_of(bench("s3", *asked, "--json"))
    assert [result["op"] for result in results] == ["put", "get"]
    for result in results:
        assert result["verified"], result["problem"]
        assert result["transfers"] > 0
        for ticker in ("idle", "moving"):
            assert result[ticker]["max"] >= result[ticker]["p99.9"] >= result[ticker]["p50"] >= 0
    ran = bench("s3", *asked, "--op", "put")
    assert "link" in ran.stdout
    assert "  target  " not in ran.stdout


@needs_aiobotocore
def test_table_for_people() -> None:
    ran = bench("s3", *LARGE)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("shape   op   link  system ")
    put, get = [line for line in ran.stdout.splitlines() if "  asyncxfer  " in line]
    assert put.startswith("2x4MiB  put  http ")
    assert " s3:http " in put
    assert put.endswith("not kept")
    assert get.endswith("verified")


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_wrong_is_seen(kept: bool) -> None:
    case = replace(CASE, kept=kept)
    memory = np.zeros(case.shape.span, np.uint8)
    case.fill(memory)
    assert case.problem(memory).startswith("3 of 3 rows")
    for number, at in enumerate(case.rows()[0].tolist()):
        memory[at : at + 100] = case.holds(number)
    assert case.problem(memory) == ""
    memory[99] ^= 1  # the tail of an object that was shorter
    assert case.problem(memory).startswith("1 of 3 rows")
    memory[99] ^= 1
    memory[-1] ^= 1
    assert case.problem(memory).startswith("1 of 3 rows")


def test_what_is_put_is_what_objects_hold() -> None:
    case = replace(CASE, op="put")
    memory = np.zeros(case.shape.span, np.uint8)
    case.fill(memory)
    assert case.problem(memory) == ""
    assert not np.array_equal(case.holds(0), case.holds(1))


def test_the_bytes_of_the_null_server() -> None:
    assert _object_cases.null_bytes(1001).tobytes() == _null_objects.content(0, 1001)
    behind = _object_cases.null_bytes((16 << 20) + 8)[16 << 20 :]
    assert behind.tobytes() == _null_objects.content(16 << 20, 8)


def test_cases_cross_a_pipe() -> None:
    assert ObjectCase.from_message(json.loads(json.dumps(CASE.to_message()))) == CASE


def test_the_shapes_of_a_run_without_options() -> None:
    options = _objects.ObjectOptions()
    assert [str(shape) for shape in options.shapes] == ["1x64MiB", "8x4MiB", "16x64KiB", "1x16KiB"]
    assert len(list(options.cases())) == 4 * 2
    assert replace(options, tls=True).link == "https"
    assert replace(options, endpoint="https://store").link == "https"


@pytest.mark.parametrize("cloud", ["s3", "azure"])
def test_what_is_not_installed_is_named(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    heard: list[str] = []
    systems = [name for name, _, _ in _objects.ObjectOptions(cloud=cloud).systems(heard.append)]
    assert systems == ["asyncxfer", "aiobotocore" if cloud == "s3" else "azure-storage-blob"]
    assert heard == ["without obstore, which is not installed; pip install obstore"]


@pytest.mark.parametrize("cloud", ["s3", "azure"])
def test_a_cloud_whose_library_is_missing_says_what_to_install(
    cloud: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(["--over", cloud])) == 2
    assert f"pip install 'asyncxfer[{cloud}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--endpoint", "http://store"], "--endpoint is for --over s3 and --over azure"),
        (["--over", "file", "--bucket", "x"], "--bucket is for --over s3 and --over azure"),
        (["--over", "s3", "--backend", "s3"], "--backend is for --over file"),
        (["--over", "file", "--tls"], "--tls is for --over tcp, --over s3 and --over azure"),
        (["--over", "s3", "--bucket", "x"], "--bucket is for --endpoint"),
        (["--over", "s3", "--endpoint", "store:80"], "--endpoint is a URL such as http://127.0.0.1:8333"),
        (["--over", "s3", "--endpoint", "http://store", "--tls"], "an --endpoint speaks what its URL says"),
        (["--over", "s3", "--memory", "mapped"], "--memory is not for --over s3"),
        (["--over", "azure", "--memory", "mapped"], "--memory is not for --over azure"),
        (["--over", "azure", "--bucket", "x"], "--bucket is for --endpoint"),
        (["--over", "s3", "--way", "cached"], "--way is for --over file"),
        (["--over", "s3", "--notify"], "--notify is not for --over s3"),
        (["--over", "s3", "--checksum"], "--checksum is not for --over s3"),
        (["--over", "s3", "--lists", "unprepared"], "--lists unprepared is not for --over s3"),
        (["--over", "s3", "--shapes", "3x1KiB/contiguous"], "each row is an object over s3"),
        (["--over", "s3", "--shapes", "3x1KiB/one"], "one row many times is not for --over s3"),
    ],
)
def test_options_that_make_no_sense(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(options)) == 2
    assert says in capsys.readouterr().err


def test_the_table_names_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    from asyncxfer.bench._compare import Line, Measured
    from asyncxfer.bench._pair import Sample

    ours = Measured(CASE, [Sample(0.001, 0.003, "s3:http")], "")
    theirs = Measured(CASE, [Sample(0.002, 0.012, "OBJ")], "1 of 3 rows, with what follows them, differ")
    line = Line(CASE, ours, {"NIXL": theirs}, {"max": 0.001})
    _report.show(_report.object_table([line]))
    out = capsys.readouterr().out
    assert " 2.00 " in out
    assert " 4.000 " in out  # milliseconds of an operation
    assert " 0.25 " in out
    assert "1 of 3 rows, with what follows them, differ" in out
    assert not _cli._verified(_report.to_plain(line))
