"""`asyncxfer bench`: what it measures is right, and what it prints can be read by people and programs.

No test looks at a time but to see that there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from asyncxfer.bench import _cli, _compare, _loop, _nixl, _pair, _pattern, _report
from asyncxfer.bench._shapes import DEFAULT_SHAPES, Case, Shape
from asyncxfer.bench._ticker import Ticker, percentiles

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason=f"NIXL is not installed: {_nixl.INSTALL}"
)

SMALL = ["--shapes", "64x4KiB,1x4KiB,3x100B", "--rounds", "2", "--warmup", "1"]


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncxfer", "bench", *options], capture_output=True, text=True, timeout=110, check=False
    )


def results_of(ran: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)["results"]
    return results


# ---- real runs ----------------------------------------------------------------------------------------------------


def test_every_case_is_run_and_verified(loop_name: str) -> None:
    ran = bench(*SMALL, "--json", *(["--uvloop"] if loop_name == "uvloop" else []))
    results = results_of(ran)
    cases = {(result["shape"], result["memory"], result["op"]) for result in results}
    assert len(results) == len(cases) == 3 * 2 * 2
    for result in results:
        assert result["nixl"] is None
        assert result["ratio"] is None
        assert result["ours"]["verified"]
        assert len(result["ours"]["samples"]) == 2
        assert result["ours"]["backend"] == "shm"
        assert min(result["ours"]["samples"]) > 0
        assert set(result["lateness"]) == {"p50", "p99", "p99.9", "max"}
    head = json.loads(ran.stdout)
    assert head["mode"] == "compare"
    assert head["uvloop"] == (loop_name == "uvloop")
    assert head["machine"]["cpus"] >= 1


@needs_nixl
@pytest.mark.parametrize("thread", ["on", "off"])
def test_nixl_runs_beside_it(thread: str) -> None:
    ran = bench(*SMALL, "--peer", "nixl", "--json", "--memory", "ordinary", "--nixl-progress-thread", thread)
    results = results_of(ran)
    assert len(results) == 3 * 2
    for result in results:
        assert result["ours"]["verified"]
        assert result["nixl"]["verified"]
        assert result["nixl"]["backend"] == "UCX"
        assert result["ratio"] > 0
    assert json.loads(ran.stdout)["versions"]["nixl"] == _nixl.installed_version()


def test_table_for_people() -> None:
    ran = bench("--shapes", "8x4KiB", "--rounds", "1", "--op", "put", "--memory", "mapped")
    assert ran.returncode == 0, ran.stderr
    assert "8x4KiB  put  mapped  shm" in ran.stdout
    assert "verified" in ran.stdout
    assert "bench: 8x4KiB put mapped" in ran.stderr


def test_stall_mode() -> None:
    ran = bench("--stall", "0.2", "--shapes", "256x4KiB", "--op", "get", "--memory", "mapped", "--json")
    (result,) = results_of(ran)
    assert result["transfers"] > 0
    assert result["verified"]
    assert set(result["idle"]) == set(result["moving"])


def test_in_flight_mode() -> None:
    results = results_of(bench("--in-flight", "300", "--json"))
    assert len(results) == 2 * 2 * 2 * 2
    assert {result["prepared"] for result in results} == {False, True}
    assert all(result["verified"] for result in results)
    assert all(result["transfers"] == 300 for result in results)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shapes", "4KiB"], "is not COUNTxSIZE"),
        (["--shapes", "0x4KiB"], "has no bytes"),
        (["--memory", "tape"], "is not one of mapped, ordinary"),
        (["--op", "put,move"], "is not one of put, get"),
        (["--rounds", "0"], "less than 1"),
        (["--stall", "1", "--in-flight", "5"], "not allowed with"),
    ],
)
def test_options_that_make_no_sense(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(options)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_missing_nixl_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_nixl, "installed_version", lambda: None)
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(["--peer", "nixl"])) == 2
    assert "pip install --no-deps nixl==1.5.1" in capsys.readouterr().err


# ---- shapes and bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", DEFAULT_SHAPES)
def test_shapes_read_what_they_write(shape: Shape) -> None:
    assert Shape.parse(str(shape)) == shape
    assert 1 <= shape.repeats <= 2000


def test_shape_units() -> None:
    assert Shape.parse("3x100") == Shape.parse("3x100B") == Shape(3, 100)
    assert Shape.parse("1x2gib").nbytes == 2 << 30
    assert str(Shape(3, 100)) == "3x100B"


def move(case: Case, source: _pattern.Bytes, destination: _pattern.Bytes) -> None:
    """Do in numpy what a transfer of `case` does."""
    local, remote = (case.rows(order)[0] for order in (case.local_order(), case.remote_order()))
    sources, destinations = (local, remote) if case.op == "put" else (remote, local)
    for start, end in zip(sources.tolist(), destinations.tolist(), strict=True):
        destination[end : end + case.shape.length] = source[start : start + case.shape.length]


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("length", [8, 100, 4096])
def test_pattern_sees_what_is_wrong(op: Any, length: int) -> None:
    case = Case(Shape(50, length), "mapped", op, seed=5)
    source, destination = (np.zeros(case.shape.span + 10, dtype=np.uint8) for _ in range(2))
    _pattern.fill(source, case)
    _pattern.blank(destination, case)
    assert "50 of 50 rows differ" in _pattern.problem(destination, case)
    move(case, source, destination)
    assert _pattern.problem(destination, case) == ""
    destination[case.shape.stride * 7] ^= 1
    assert "1 of 50 rows differ, and bytes after 0 rows" in _pattern.problem(destination, case)
    destination[case.shape.stride * 7] ^= 1
    destination[case.shape.stride * 7 - 1] ^= 1
    assert "0 of 50 rows differ, and bytes after 1 rows" in _pattern.problem(destination, case)


def test_cases_cross_a_pipe() -> None:
    case = Case(Shape(5, 8), "ordinary", "get", seed=9)
    assert Case.from_message(json.loads(json.dumps(case.to_message()))) == case
    assert sorted(case.remote_order().tolist()) == case.local_order().tolist()


# ---- the ticker ---------------------------------------------------------------------------------------------------


@pytest.mark.blocking("it is what the ticker is for")
async def test_ticker_sees_a_held_loop() -> None:
    with Ticker() as ticker:
        await asyncio.sleep(0.02)
        time.sleep(0.05)  # noqa: ASYNC251 - the point of the test
    assert percentiles(ticker.lateness)["max"] > 0.04
    assert len(ticker.lateness) > 1


def test_percentiles_of_nothing() -> None:
    assert set(percentiles([]).values()) == {0.0}


# ---- processes that fail ------------------------------------------------------------------------------------------


async def fail_a_worker() -> None:
    worker = await _pair.Worker.start("asyncxfer", "initiator", {"uvloop": False, "nixl_progress_thread": True})
    try:
        with pytest.raises(_pair.BenchError, match="'dance' is unknown"):
            await worker.ask("dance")
        case = Case(Shape(1, 8), "mapped", "put", 0).to_message()
        with pytest.raises(_pair.BenchError, match="no answer to 'idle' in 0 s"):
            await worker.ask("idle", within=0.01, case=case, seconds=0.2)
    finally:
        await worker.close()
    with pytest.raises(_pair.BenchError, match="ended before 'open'"):
        await worker.ask("open", nbytes=1, memories=["mapped"])
    worker.stop()  # a process that is gone is no error here
    await worker.close()


def test_a_worker_that_fails_or_ends_is_told() -> None:
    asyncio.run(fail_a_worker())  # the bench itself runs on asyncio only


# ---- reports ------------------------------------------------------------------------------------------------------


def a_line(*, problem: str = "") -> _compare.Line:
    case = Case(Shape(1024, 65536), "mapped", "put", 0)
    ours = [_pair.Sample(seconds, 0.01, "shm") for seconds in (0.01, 0.02, 0.03)]
    theirs = [_pair.Sample(seconds, 0.02, "UCX") for seconds in (0.02, 0.06, 0.12)]
    lateness = percentiles([0.001])
    return _compare.Line(case, _compare.Measured(case, ours, ""), _compare.Measured(case, theirs, problem), lateness)


def test_line_figures() -> None:
    line = a_line()
    assert line.ratio == pytest.approx(3.0)  # the median of 2, 3 and 4
    assert line.ours.gigabytes_per_second == pytest.approx(65536 * 1024 / 0.02 / 1e9)
    assert line.ours.cpu_seconds_per_gib == pytest.approx(0.16)
    assert dataclasses.replace(line, nixl=None).ratio is None


def test_wrong_bytes_are_shown_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    line = a_line(problem="3 of 1024 rows differ")
    _report.show(_report.line_table([line]))
    assert "3 of 1024 rows differ" in capsys.readouterr().out
    assert not _cli._verified(_report.to_plain(line))
    assert _cli._verified(_report.to_plain(a_line()))


def test_other_tables(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(Shape(300, 4096), "mapped", "put", 0)
    late = percentiles([0.001, 0.002])
    _report.show(_report.stall_table([_loop.Stall(case, late, late, 10, 1.0, "")]))
    passes = [
        {"in_flight": 7, "seconds": 0.1, "memory": {"before": 0, "during": 9 << 20, "after": after << 20}}
        for after in (2, 3)
    ]
    flood = _loop.Flood(case, 300, False, passes, "")
    assert flood.kept_bytes == 1 << 20
    _report.show(_report.flood_table([flood]))
    out = capsys.readouterr().out
    assert "moving" in out
    assert "9.0" in out
