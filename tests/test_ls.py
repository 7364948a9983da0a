"""``asyncxfer ls``: a process of its own, on files and on SeaweedFS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import asyncxfer, options_of
from servers import S3Server, plain_request

NAMES = {"a": 5, "b/one": 3, "b/two": 2048, "b/c/deep": 7, "d": 0}


def names(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, nbytes in NAMES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(nbytes))
    return tmp_path


@pytest.fixture
def options(s3: S3Server, bucket: str) -> list[str]:
    for name, nbytes in NAMES.items():
        plain_request("PUT", f"{s3.url}/{bucket}/{name}", identity=s3.admin, body=bytes(nbytes))
    return options_of(s3)


def test_one_level_of_files_and_all_of_them(folder: Path) -> None:
    level = asyncxfer("ls", folder)
    assert (level.returncode, names(level.stdout)) == (0, ["a", "b/", "d"])
    everything = asyncxfer("ls", "-r", f"file://{folder}")
    assert sorted(names(everything.stdout)) == sorted(NAMES)
    assert names(asyncxfer("ls", folder / "b/two").stdout) == ["two"]


def test_one_level_of_objects_and_all_of_them(bucket: str, options: list[str]) -> None:
    assert names(asyncxfer("ls", *options, f"s3://{bucket}").stdout) == ["a", "b/", "d"]
    assert names(asyncxfer("ls", *options, f"s3://{bucket}/b").stdout) == ["c/", "one", "two"]
    everything = asyncxfer("ls", "-r", "--exclude", "b/c/*", *options, f"s3://{bucket}/")
    assert names(everything.stdout) == ["a", "b/one", "b/two", "d"]


def test_sizes_are_for_people_and_json_for_programs(bucket: str, options: list[str]) -> None:
    long = asyncxfer("ls", "-lH", *options, f"s3://{bucket}/a")
    assert long.stdout.split()[:2] == ["5", "B"]
    row = json.loads(asyncxfer("ls", "--json", *options, f"s3://{bucket}/a").stdout)
    assert (row["name"], row["nbytes"]) == ("a", 5)
    assert row["etag"] in long.stdout
    assert row["modified"] > 1.7e9


def test_what_is_not_there_is_an_error(folder: Path, bucket: str, options: list[str]) -> None:
    missing = asyncxfer("ls", folder / "nothing")
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)
    missing = asyncxfer("ls", *options, f"s3://{bucket}/nothing")
    assert (missing.returncode, f"s3://{bucket}/nothing" in missing.stderr) == (1, True)
    assert asyncxfer("ls", "s3://").returncode == 2


def test_a_name_does_not_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2Jgone\n").write_bytes(b"")
    ran = asyncxfer("ls", tmp_path)
    assert "\x1b" not in ran.stdout
    assert ran.stdout.splitlines()[0].endswith("\\x1b[2Jgone\\n")


def test_help_imports_no_client_of_a_store() -> None:
    probe = (
        "import sys\nfrom asyncxfer.__main__ import main\n"
        "try:\n    main(['cp', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('rich', 'aiobotocore', 'asyncxfer._copy._cp') if m in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
