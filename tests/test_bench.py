"""`asyncxfer bench`: what it measures is right, and what it prints can be read by people and programs.

No test looks at a time but to see that there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosts import missing

from asyncxfer.bench import (
    _cli,
    _compare,
    _idle,
    _iperf,
    _loop,
    _nixl,
    _notify,
    _pair,
    _pattern,
    _perftest,
    _place,
    _ports,
    _post,
    _report,
    _ucx,
)
from asyncxfer.bench._shapes import DEFAULT_SHAPES, UCX_SHAPES, Case, Shape
from asyncxfer.bench._ticker import Ticker, percentiles

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason=f"NIXL is not installed: {_nixl.INSTALL}"
)

needs_tcp = pytest.mark.skipif(
    importlib.util.find_spec("asyncxfer.backends.tcp") is None, reason="there is no backend tcp yet"
)

needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("asyncxfer.backends.ucx") is None or not _ucx.is_installed(),
    reason=f"there is no backend ucx, or no ucxx: {_ucx.INSTALL}",
)

needs_perftest = pytest.mark.skipif(
    _perftest.program() is None, reason=f"ucx_perftest is not installed: {_perftest.INSTALL}"
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


@needs_nixl
def test_nixl_in_several_ways() -> None:
    options = ("--peer", "nixl", "--nixl-progress-thread", "on,spin", "--op", "get", "--memory", "mapped")
    for result in results_of(bench(*SMALL, "--json", *options)):
        assert set(result["rivals"]) == {"NIXL, thread on", "NIXL, target spins"}
        fastest = min(result["rivals"].values(), key=lambda rival: float(rival["seconds"]))
        assert result["nixl"]["samples"] == fastest["samples"]
        assert result["ratio"] == fastest["ratio"]


@pytest.mark.parametrize("peer", ["none", pytest.param("nixl", marks=needs_nixl)])
def test_notify_mode(peer: str) -> None:
    options = ["--over", "host", "--rounds", "1", "--peer", peer, "--nixl-progress-thread", "spin"]
    results = results_of(bench("--notify", "--json", *options))
    assert [result["system"] for result in results] == ["asyncxfer", *(["NIXL"] if peer == "nixl" else [])]
    for result in results:
        assert (result["over"], result["memory"], result["verified"]) == ("host", "ordinary", True)
        assert len(result["samples"]) == 100
        assert 0 < min(result["samples"]) <= result["p50"] <= result["p99"]


@needs_tcp
@pytest.mark.parametrize("options", [[], ["--link", "veth"], ["--tls"], ["--checksum", "--uvloop"]], ids="-".join)
def test_over_tcp(options: list[str]) -> None:
    if "veth" in options and (reason := missing()):
        pytest.skip(reason)
    ran = bench(*SMALL, "--over", "tcp", "--json", *options)
    for result in results_of(ran):
        assert (result["memory"], result["ours"]["backend"]) == ("ordinary", "tcp")
        assert set(result["rivals"]) == ({"asyncxfer, plain"} if {"--tls", "--checksum"} & set(options) else set())
    head = json.loads(ran.stdout)
    assert head["link"] == ("veth, MTU 1500" if "veth" in options else "loopback")


@needs_tcp
@needs_nixl
def test_notify_over_tcp_beside_nixl() -> None:
    results = results_of(bench("--notify", "--rounds", "1", "--peer", "nixl", "--json"))
    assert {(result["system"], result["over"]) for result in results} == {
        (system, over) for system in ("asyncxfer", "NIXL") for over in ("host", "tcp")
    }
    assert all(result["verified"] for result in results)


@needs_nixl
def test_lists_are_prepared_or_not() -> None:
    options = ["--shapes", "100x4KiB/contiguous,40x4KiB", "--lists", "prepared,unprepared", "--memory", "ordinary"]
    results = results_of(bench(*options, "--rounds", "1", "--peer", "nixl", "--json"))
    cases = {(result["shape"], result["op"], result["prepared"]) for result in results}
    assert len(results) == len(cases) == 2 * 2 * 2
    assert all(result["ours"]["verified"] and result["nixl"]["verified"] for result in results)


@needs_ucx
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--transports", "tcp", "--ucx-progress", "loop,thread"],
        ["--transports", "tcp,sysv", "--uvloop", "--ucx-workers", "2"],
    ],
    ids=" ".join,
)
def test_over_ucx(options: list[str]) -> None:
    ran = bench("--shapes", "3x1000B,64x4KiB/one", "--rounds", "1", "--over", "ucx", "--json", *options)
    others = {"asyncxfer, thread"} if "--ucx-progress" in options else set()
    for result in results_of(ran):
        assert (result["memory"], result["ours"]["backend"]) == ("ordinary", "ucx")
        measured = others | ({"ucx_perftest"} if _perftest.program() and result["shape"] == "64x4KiB/one" else set())
        assert set(result["rivals"]) == measured
        assert min(rival["seconds"] for rival in [result["ours"], *result["rivals"].values()]) > 0
    head = json.loads(ran.stdout)
    assert head["ucx"]["transports"] == (options[1] if options else "tcp,cma,posix")
    assert head["versions"]["ucxx"]


@needs_ucx
@needs_nixl
def test_over_ucx_beside_nixl() -> None:
    options = ["--shapes", "50x4KiB/contiguous", "--lists", "prepared,unprepared", "--rounds", "1"]
    for result in results_of(bench(*options, "--over", "ucx", "--peer", "nixl", "--json")):
        assert result["ours"]["backend"] == "ucx"
        assert result["nixl"]["verified"]
        assert result["ratio"] > 0


@needs_ucx
@needs_nixl
def test_notify_over_ucx_beside_nixl() -> None:
    options = ["--over", "ucx", "--ucx-progress", "loop,thread", "--rounds", "1", "--peer", "nixl", "--json"]
    results = results_of(bench("--notify", *options))
    assert [result["system"] for result in results] == ["asyncxfer", "asyncxfer, thread", "NIXL"]
    assert all(result["verified"] and result["over"] == "ucx" for result in results)


@pytest.mark.parametrize("over", ["host", pytest.param("tcp", marks=needs_tcp), pytest.param("ucx", marks=needs_ucx)])
def test_idle_mode(over: str) -> None:
    results = results_of(bench("--idle", "0.5", "--peers", "7", "--over", over, "--json"))
    assert [(result["system"], result["peers"]) for result in results] == [("asyncxfer", 0), ("asyncxfer", 7)]
    for result in results:
        assert result["seconds"] == 0.5
        assert result["initiators"] >= 0 if result["peers"] else result["initiators"] == 0
        assert 0 <= result["target_share"] <= 1


@pytest.mark.parametrize(
    ("over", "peer"),
    [
        ("host", "none"),
        pytest.param("host", "nixl", marks=needs_nixl),
        pytest.param("ucx", "nixl", marks=[needs_ucx, needs_nixl]),
    ],
)
def test_post_mode(over: str, peer: str) -> None:
    options = ["--shapes", "40x4KiB,40x8B", "--rounds", "2", "--over", over, "--memory", "ordinary", "--peer", peer]
    results = results_of(bench("--post", *options, "--json"))
    assert len(results) == 2 * 2 * (1 if peer == "none" else 2)
    for result in results:
        assert result["verified"]
        assert 0 < result["call_seconds_per_row"] <= result["seconds_per_row"]
        assert len(result["called"]) == len(result["ended"]) == 16
        assert result["cpu_seconds_per_row"] > 0
        assert 0 <= result["at_once"] <= 1


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
        (["--post", "--idle", "5"], "not allowed with"),
        (["--shapes", "4x4KiB/scattered"], "20000x4KiB/contiguous"),
        (["--ucx-progress", "signal"], "is not one of loop, thread"),
        (["--ucx-workers", "0"], "less than 1"),
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


@pytest.mark.parametrize("shape", UCX_SHAPES)
def test_shapes_read_what_they_write(shape: Shape) -> None:
    assert Shape.parse(str(shape)) == shape
    assert 1 <= shape.repeats <= 2000


def test_shape_units() -> None:
    assert Shape.parse("3x100") == Shape.parse("3x100B") == Shape(3, 100)
    assert Shape.parse("1x2gib").nbytes == 2 << 30
    assert str(Shape(3, 100)) == "3x100B"
    assert Shape.parse("5x4KiB/contiguous") == Shape(5, 4096, contiguous=True)
    assert Shape.parse("5x4KiB/ONE") == Shape(5, 4096, one=True)
    assert set(DEFAULT_SHAPES) < set(UCX_SHAPES)


def move(case: Case, source: _pattern.Bytes, destination: _pattern.Bytes) -> None:
    """Do in numpy what a transfer of `case` does."""
    local, remote = (case.rows(order)[0] for order in (case.local_order(), case.remote_order()))
    sources, destinations = (local, remote) if case.op == "put" else (remote, local)
    for start, end in zip(sources.tolist(), destinations.tolist(), strict=True):
        destination[end : end + case.shape.length] = source[start : start + case.shape.length]


@pytest.mark.parametrize("op", ["put", "get"])
def test_contiguous_rows_leave_no_gap(op: Any) -> None:
    case = Case(Shape(50, 96, contiguous=True), "mapped", op, seed=5)
    for order in (case.local_order(), case.remote_order()):
        offsets, lengths = case.rows(order)
        assert offsets.tolist() == list(range(0, case.shape.nbytes, 96))
        assert set(lengths.tolist()) == {96}
    source, destination = (np.zeros(case.shape.span, dtype=np.uint8) for _ in range(2))
    _pattern.fill(source, case)
    _pattern.blank(destination, case)
    assert "50 of 50 rows differ, and bytes after 0 rows" in _pattern.problem(destination, case)
    move(case, source, destination)
    assert np.array_equal(source, destination)
    assert _pattern.problem(destination, case) == ""


@pytest.mark.parametrize("op", ["put", "get"])
def test_one_row_many_times(op: Any) -> None:
    case = Case(Shape(50, 96, one=True), "mapped", op, seed=5)
    assert (case.shape.nbytes, case.shape.span) == (50 * 96, 2 * 96)
    source, destination = (np.zeros(case.shape.span, dtype=np.uint8) for _ in range(2))
    _pattern.fill(source, case)
    _pattern.blank(destination, case)
    assert "1 of 1 rows differ" in _pattern.problem(destination, case)
    move(case, source, destination)
    assert _pattern.problem(destination, case) == ""
    destination[96] ^= 1
    assert "0 of 1 rows differ, and bytes after 1 rows" in _pattern.problem(destination, case)


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
    case = Case(Shape(5, 8), "ordinary", "get", seed=9, prepared=False)
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


# ---- links, and what they carry -----------------------------------------------------------------------------------


@pytest.fixture(params=["loopback", "veth"])
def place(request: pytest.FixtureRequest) -> Iterator[_place.Place]:
    if request.param == "loopback":
        yield _place.LOOPBACK
        return
    if reason := missing():
        pytest.skip(reason)
    with _place.veth(9000) as made:
        yield made


STREAM = Case(Shape(1, 64 << 20), "ordinary", "put", 0)


def check_stream(sample: _pair.Sample) -> None:
    assert sample.seconds > 0
    assert 0 < sample.target_cpu_seconds < sample.cpu_seconds


@pytest.mark.skipif(not _iperf.is_installed(), reason=f"iperf3 is not installed: {_iperf.INSTALL}")
def test_iperf(place: _place.Place) -> None:
    async def measure() -> None:
        async with _iperf.Iperf.start(place, streams=3) as iperf:
            for op in ("put", "get"):
                sample = await iperf.sample(dataclasses.replace(STREAM, op=op))
                check_stream(sample)
                assert sample.backend == "3 TCP"

    asyncio.run(measure())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_stream(place: _place.Place, tls: bool, tmp_path: Path) -> None:
    told: dict[str, Any] = {"uvloop": False, "over": "tcp", "certificates": None}
    if tls:
        told["certificates"] = str(tmp_path)
        made = ["-newkey", "ed25519", "-keyout", "ca-key.pem", "-out", "ca.pem", "-subj", "/CN=both", "-nodes"]
        subprocess.run(["openssl", "req", "-x509", *made], cwd=tmp_path, check=True, capture_output=True)
        for role in ("initiator", "target"):
            shutil.copy(tmp_path / "ca.pem", tmp_path / f"{role}.pem")
            shutil.copy(tmp_path / "ca-key.pem", tmp_path / f"{role}-key.pem")

    async def measure() -> None:
        async with _pair.Pair.start("stream", told, place, nbytes=STREAM.shape.span, memories=["ordinary"]) as pair:
            for op in ("put", "get"):
                case = dataclasses.replace(STREAM, op=op)
                await pair.begin(case, warmup=1)
                sample = await pair.sample(case)
                check_stream(sample)
                assert sample.backend.startswith("TLS_AES" if tls else "TCP")
                assert await pair.finish(case) == ""
            with pytest.raises(_pair.BenchError, match="one row, not 64x4KiB"):
                await pair.begin(dataclasses.replace(STREAM, shape=Shape(64, 4096)), warmup=1)

    asyncio.run(measure())


def test_streams_stand_beside_large_rows_only() -> None:
    assert _iperf.is_stream(STREAM)
    for shape in (Shape(4, 64 << 20), Shape(1, 4096)):
        assert not _iperf.is_stream(dataclasses.replace(STREAM, shape=shape))


@needs_perftest
@pytest.mark.parametrize("op", ["put", "get"])
def test_perftest(op: Any) -> None:
    case = Case(Shape(40, 4096), "ordinary", op, 0)
    sample = asyncio.run(_perftest.Perftest(_place.LOOPBACK, "tcp,cma,posix").sample(case))
    check_stream(sample)
    assert sample.backend == "UCX"


@needs_perftest
def test_perftest_that_fails_says_why_and_leaves_no_process() -> None:
    with pytest.raises(_pair.BenchError, match=r"(?s)ucx_perftest (gave no figures: .*carrier-pigeon|ended before)"):
        asyncio.run(_perftest.Perftest(_place.LOOPBACK, "carrier-pigeon").sample(STREAM))


def test_perftest_stands_beside_what_it_can_do() -> None:
    for text, repeated in [
        ("256x4KiB/one", True),
        ("32x64KiB/one", True),
        ("8x64MiB/one", True),
        ("1x64MiB", False),
        ("31x64KiB/one", False),
        ("256x4KiB", False),
        ("1x4KiB", False),
        ("16x4KiB", False),
        ("16384x4KiB", False),
        ("256x4KiB/contiguous", False),
    ]:
        case = dataclasses.replace(STREAM, shape=Shape.parse(text))
        assert _perftest.is_repeated(case) == repeated
        assert not _perftest.is_repeated(dataclasses.replace(case, prepared=False))


def test_a_program_that_ends_before_it_listens() -> None:
    async def watch() -> None:
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()
        with pytest.raises(_pair.BenchError, match="a program ended before it listened"):
            await _ports.until_listening(process, _ports.free_port(), "a program")

    asyncio.run(watch())


@needs_nixl
@pytest.mark.parametrize("transports", ["tcp", "tcp,cma,posix", "tcp,sysv"])
def test_nixl_over_ucx(transports: str) -> None:
    shape = Shape(64, 4096, contiguous=True)
    told = {"uvloop": False, "over": "ucx", "nixl_thread": "spin", "transports": transports}

    async def measure() -> None:
        starting = _pair.Pair.start("nixl", told, _place.LOOPBACK, nbytes=shape.span, memories=["ordinary"])
        async with starting as pair:
            for prepared in (True, False):
                case = Case(shape, "ordinary", "put", 0, prepared)
                await pair.begin(case, warmup=1)
                assert (await pair.sample(case)).seconds > 0  # over cma the target has nothing to do
                assert await pair.finish(case) == ""

    asyncio.run(measure())


@needs_nixl
def test_nixl_over_tcp(place: _place.Place) -> None:
    case = Case(Shape(64, 4096), "ordinary", "get", 0)
    told = {"uvloop": False, "over": "tcp", "nixl_thread": "spin"}

    async def measure() -> None:
        async with _pair.Pair.start("nixl", told, place, nbytes=case.shape.span, memories=["ordinary"]) as pair:
            await pair.begin(case, warmup=1)
            check_stream(await pair.sample(case))
            assert await pair.finish(case) == ""

    asyncio.run(measure())


def test_a_link_leaves_nothing_and_removes_what_the_dead_left() -> None:
    if reason := missing():
        pytest.skip(reason)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = f"asyncxfer-bench-{dead.pid}-target"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with _place.veth(1500) as made:
        assert left not in os.listdir("/run/netns")
        shown = [name for name in os.listdir("/run/netns") if name.startswith(f"asyncxfer-bench-{os.getpid()}-")]
        assert sorted(shown) == sorted({made.initiator.prefix[-1], made.target.prefix[-1]})
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"asyncxfer-bench-{os.getpid()}-")]


@pytest.mark.parametrize("options", [["--tls"], ["--link", "veth"]])
def test_options_for_tcp_only(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(options)) == 2
    assert "is for --over tcp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--transports", "tcp"], ["--over", "tcp", "--ucx-workers", "2"], ["--ucx-progress", "thread"]]
)
def test_options_for_ucx_only(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(options)) == 2
    assert "is for --over ucx" in capsys.readouterr().err


def test_no_checksums_over_ucx(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(["--over", "ucx", "--checksum"])) == 2
    assert "--checksum is not for --over ucx" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--post"], ["--notify"], ["--in-flight", "5"]])
def test_modes_of_prepared_lists_only(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args([*mode, "--lists", "unprepared"])) == 2
    assert "--lists unprepared is for" in capsys.readouterr().err


def test_missing_ucxx_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_ucx, "is_installed", lambda: False)
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    assert _cli.main(parser.parse_args(["--over", "ucx"])) == 2
    assert "pip install 'asyncxfer[ucx-cu12]'" in capsys.readouterr().err


# ---- processes that fail ------------------------------------------------------------------------------------------


async def fail_a_worker() -> None:
    options = {"uvloop": False, "over": "host", "certificates": None, "checksum": False}
    worker = await _pair.Worker.start("asyncxfer", "initiator", options)
    try:
        before = worker.cpu_seconds()
        with pytest.raises(_pair.BenchError, match="'dance' is unknown"):
            await worker.ask("dance")
        assert worker.cpu_seconds() > before
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
    nixl = {"NIXL": _compare.Measured(case, theirs, problem)}
    return _compare.Line(case, _compare.Measured(case, ours, ""), nixl, lateness)


def test_line_figures() -> None:
    line = a_line()
    assert line.ratio == pytest.approx(3.0)  # the median of 2, 3 and 4
    assert line.ours.gigabytes_per_second == pytest.approx(65536 * 1024 / 0.02 / 1e9)
    assert line.ours.cpu_seconds_per_gib == pytest.approx(0.16)
    assert dataclasses.replace(line, rivals={}).ratio is None


def test_wrong_bytes_are_shown_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    line = a_line(problem="3 of 1024 rows differ")
    _report.show(_report.line_table([line]))
    assert "3 of 1024 rows differ" in capsys.readouterr().out
    assert not _cli._verified(_report.to_plain(line))
    assert _cli._verified(_report.to_plain(a_line()))


def test_tables_of_many_systems(capsys: pytest.CaptureFixture[str]) -> None:
    line = a_line()
    assert isinstance(line.case, Case)
    _report.show(_report.network_table([line]))
    _report.show(_report.notify_table([_notify.Notified("NIXL", line.case, "tcp", [1e-6, 3e-6], "")]))
    out = capsys.readouterr().out
    assert re.search(r"NIXL +UCX +1\.12 GB/s +3\.00 ", out)
    assert re.search(r"tcp +NIXL +2\.0 us +3\.0 us +verified", out)


def test_tables_of_costs(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(Shape(100, 4096), "ordinary", "put", 0)
    _report.show(
        _report.post_table([_post.Posted("NIXL", case, [1e-5, 2e-5, 3e-5], [1e-3, 2e-3, 3e-3], 0.06, 0.25, "")])
    )
    _report.show(_report.idle_table([_idle.Idle("asyncxfer", peers, 10.0, 0.05, 0.1) for peers in (0, 50)]))
    out = capsys.readouterr().out
    assert re.search(r"NIXL +20\.0 us +200 ns +2000\.0 us +20000 ns +200000 ns +25% +verified", out)
    assert re.search(r"asyncxfer +0 +10 +50\.0 ms +0\.500%\n", out)
    assert re.search(r"asyncxfer +50 +10 +50\.0 ms +0\.500% +2\.0 ms +0\.020%\n", out)
    unprepared = dataclasses.replace(a_line(), case=dataclasses.replace(case, prepared=False))
    _report.show(_report.ucx_table([unprepared]))
    assert "put, unprepared" in capsys.readouterr().out


def test_other_tables(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(Shape(300, 4096), "mapped", "put", 0)
    late = percentiles([0.001, 0.002])
    _report.show(_report.stall_table([_loop.Stall(case, late, late, late, 10, 1.0, "")]))
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
