"""`asyncxfer bench --over file`: what it measures is right, and who cannot take part is named.

No test looks at a time but to see that there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncxfer.bench import _cli, _file, _file_cases, _fio, _nixl, _report
from asyncxfer.bench._file_cases import FileCase
from asyncxfer.bench._shapes import Shape

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason=f"NIXL is not installed: {_nixl.INSTALL}"
)
needs_fio = pytest.mark.skipif(not _fio.is_installed(), reason=f"fio is not installed: {_fio.INSTALL}")

SHAPES = "64x16KiB/contiguous,64x16KiB"
ROUNDS = ["--rounds", "2", "--warmup", "1"]
CASE = FileCase(Shape(6, 4096), "cached", "put", 3)


def bench(folder: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncxfer", "bench", "--over", "file", "--folder", str(folder), *ROUNDS, *options]
    environment = {**os.environ, "PATH": os.environ["PATH"] if path is None else path}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def results_of(ran: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)["results"]
    return results


# ---- real runs ------------------------------------------------------------------------------------------------------


def test_every_case_is_run_and_verified(tmp_path: Path, loop_name: str) -> None:
    results = results_of(
        bench(tmp_path, "--shapes", SHAPES, "--json", *(["--uvloop"] if loop_name == "uvloop" else []), path="")
    )
    assert len({(result["shape"], result["way"], result["op"]) for result in results}) == len(results) == 2 * 2 * 2
    for result in results:
        ours = result["ours"]
        assert ours["verified"], ours["problem"]
        assert len(ours["samples"]) == 2
        assert min(ours["samples"]) > 0
        assert ours["backend"]
        assert set(result["lateness"]) == {"p50", "p99", "p99.9", "max"}
    assert list(tmp_path.iterdir()) == []  # it has removed its file


@needs_nixl
def test_nixl_runs_beside_it_in_both_modes(tmp_path: Path) -> None:
    results = results_of(bench(tmp_path, "--shapes", "64x16KiB/contiguous", "--peer", "nixl", "--json", path=""))
    assert len(results) == 2 * 2
    for result in results:
        for queue in ("aio", "uring"):
            theirs = result["rivals"][f"NIXL, {queue}"]
            assert theirs["backend"] == f"POSIX, {queue}"
            assert theirs["verified"], theirs["problem"]
            assert theirs["ratio"] > 0


def test_stall_mode(tmp_path: Path) -> None:
    asked = ("--stall", "0.2", "--shapes", "64x16KiB", "--op", "put")
    results = results_of(bench(tmp_path, *asked, "--json", path=""))
    assert [(result["way"], result["op"]) for result in results] == [("cached", "put"), ("direct", "put")]
    for result in results:
        assert result["verified"], result["problem"]
        assert result["transfers"] > 0
        for ticker in ("idle", "moving"):
            assert result[ticker]["max"] >= result[ticker]["p99.9"] >= result[ticker]["p50"] >= 0
    ran = bench(tmp_path, *asked, "--way", "cached", path="")
    assert "way" in ran.stdout
    assert "  target  " not in ran.stdout


def test_table_for_people(tmp_path: Path) -> None:
    ran = bench(tmp_path, "--shapes", "3x100B", "--way", "cached", "--op", "get", "--backend", "uring", path="")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("shape   op   way     system ")
    assert "3x100B  get  cached  asyncxfer " in ran.stdout
    assert " verified\n" in ran.stdout
    assert "bench: without fio, which is not installed; apt-get install fio" in ran.stderr


@needs_fio
@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("way", ["cached", "direct"])
def test_fio(tmp_path: Path, op: Any, way: Any) -> None:
    async def rounds() -> None:
        fio, case = _fio.Fio(tmp_path), FileCase(Shape(8, 64 << 10), way, op, 1)
        await fio.begin(case, warmup=1)
        sample = await fio.sample(case)
        assert sample.seconds > 0
        assert await fio.finish(case) == ""
        await asyncio.to_thread(fio.close)

    asyncio.run(rounds())
    assert list(tmp_path.iterdir()) == []


def test_fio_that_fails_says_why(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "fio"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no such engine >&2\nexit 1\n")
    program.chmod(stat.S_IRWXU)
    ran = bench(tmp_path, "--shapes", "3x64KiB", path=f"{program.parent}:{os.environ['PATH']}")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.endswith("asyncxfer bench: fio: no such engine\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_kvikio_that_does_not_load_is_left_out(tmp_path: Path) -> None:
    modules = tmp_path / "modules" / "kvikio"
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(modules.parent), *sys.path]), "PATH": ""}
    command = [sys.executable, "-m", "asyncxfer", "bench", "--over", "file", "--folder", str(tmp_path), *ROUNDS]
    ran = subprocess.run(
        [*command, "--shapes", "3x4KiB", "--json"],
        capture_output=True, text=True, timeout=110, check=False, env=environment,
    )  # fmt: skip
    assert all(result["rivals"] == {} for result in results_of(ran))
    assert "bench: without KvikIO: libcuda.so.1 is missing\n" in ran.stderr


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ran = bench(tmp_path / "missing", "--shapes", "3x4KiB")
    assert ran.returncode == 1
    assert f"no file can be made in {tmp_path / 'missing'}: " in ran.stderr


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("length", [100, 4096])
def test_what_is_wrong_is_seen(op: Any, contiguous: bool, length: int) -> None:
    case = FileCase(Shape(6, length, contiguous), "cached", op, 3)
    sides = {"memory": (case.memory_span, case.memory_rows()[0]), "file": (case.file_span, case.file_rows()[0])}
    source, target = ("memory", "file") if op == "put" else ("file", "memory")
    content = _file_cases.pattern(sides[source][0], 3)
    result = np.zeros(sides[target][0], np.uint8)
    _file_cases.blank(result)
    assert _file_cases.problem(result, case).startswith("6 of 6 rows")
    for there, here in zip(sides[source][1].tolist(), sides[target][1].tolist(), strict=True):
        result[here : here + length] = content[there : there + length]
    assert _file_cases.problem(result, case) == ""
    result[-1] ^= 1
    assert _file_cases.problem(result, case).startswith("1 of 6 rows")


def test_rows_lie_apart_but_where_they_are_contiguous_in_the_file() -> None:
    for contiguous in (False, True):
        case = FileCase(Shape(100, 16, contiguous), "cached", "put", 0)
        assert sorted(case.memory_rows()[0].tolist()) == list(range(0, 3200, 32))
        assert case.memory_rows()[0].tolist() != sorted(case.memory_rows()[0].tolist())
        there = case.file_rows()[0].tolist()
        assert there == list(range(0, 1600, 16)) if contiguous else sorted(there) == list(range(0, 3200, 32)) != there


def test_cases_cross_a_pipe() -> None:
    assert FileCase.from_message(json.loads(json.dumps(CASE.to_message()))) == CASE


def test_the_shapes_of_a_run_without_options() -> None:
    options = _file.FileOptions()
    assert [str(shape) for shape in options.shapes] == [
        "16384x16KiB/contiguous", "16384x16KiB", "256x1MiB", "1x256MiB", "1x16KiB",
    ]  # fmt: skip
    assert len(list(options.cases())) == 5 * 2 * 2


def test_fio_stands_beside_large_blocks_only() -> None:
    shapes = [shape for shape in _file_cases.FILE_SHAPES if _fio.is_repeated(FileCase(shape, "direct", "get", 0))]
    assert [str(shape) for shape in shapes] == ["256x1MiB"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--way", "direct"], "--way is for --over file"),
        (["--folder", "."], "--folder is for --over file"),
        (["--backend", "uring"], "--backend is for --over file"),
        (["--over", "file", "--notify"], "--notify is not for --over file"),
        (["--over", "file", "--shapes", "32x64KiB/one"], "one row many times is not for --over file"),
        (["--over", "file", "--idle", "1"], "--idle is not for --over file"),
        (["--over", "file", "--in-flight", "5"], "--in-flight is not for --over file"),
        (["--over", "file", "--memory", "mapped,ordinary"], "one kind of --memory at a time over a file"),
        (["--over", "file", "--ucx-workers", "2"], "--ucx-workers is not for --over file"),
        (["--over", "file", "--tls"], "--tls is for --over tcp"),
        (["--over", "file", "--lists", "unprepared"], "--lists unprepared is not for --over file"),
        (["--over", "file", "--shapes", "4x100B"], "direct transfers take rows of whole blocks of 4096 bytes"),
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

    ours = Measured(CASE, [Sample(0.001, 0.002, "uring:ring")], "")
    theirs = Measured(CASE, [Sample(0.003, 0.008, "POSIX, aio")], "1 of 6 rows, with what follows them, differ")
    line = Line(CASE, ours, {"NIXL, aio": theirs}, {"max": 0.001})
    _report.show(_report.file_table([line]))
    assert " 3.00 " in (out := capsys.readouterr().out)
    assert " 0.25 " in out
    assert "1 of 6 rows, with what follows them, differ" in out
    assert not _cli._verified(_report.to_plain(line))


def test_programs_are_looked_for_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "fio" else None)
    assert _fio.is_installed()
