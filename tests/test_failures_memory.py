"""Memory goes away under a transfer: its region is closed, its file truncated, or it never was where a row says.

Neither side dies of it, the initiator gets the right error, and once an owner's `aclose` has returned nobody reads or
writes that memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from peers import Kind, make_region, moving, pattern
from stage import (
    LONG,
    ROWS,
    SHAPE,
    Cast,
    Op,
    Pair,
    begin,
    both_kinds,
    both_ops,
    from_far,
    to_far,
    within,
)

from asyncxfer import ClosedError, DescriptorError, PeerLostError, PeerState, RegistrationError, Transfer, TransferError
from asyncxfer._descriptors import Indexable

# ---- the region is taken back -------------------------------------------------------------------------------------


@both_kinds
@both_ops
async def test_the_peer_deregisters_under_a_transfer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfer = pair.post(op, notify=b"never")
    remote = pair.peer["far"]
    await moving(transfer)
    closing = pair.other.post("close", "far")
    async with within():
        with pytest.raises(TransferError, match="deregistered") as caught:
            await transfer
        checksum = await closing
    assert not isinstance(caught.value, PeerLostError)
    assert 0 < caught.value.nbytes < len(LONG) * SHAPE[1]
    assert await pair.other.call("checksum", "far") == checksum
    with pytest.raises(TransferError, match="never"):
        await pair.other.call("expect", b"never", timeout=8)
    with pytest.raises(ClosedError, match="far"):
        cast.here.put(pair.region[ROWS], remote[ROWS])
    assert pair.peer.state is PeerState.JOINED


@both_kinds
@both_ops
async def test_deregistering_waits_until_nobody_is_inside(cast: Cast, kind: Kind, op: Op) -> None:
    other, region, array = await from_far(cast, kind)
    await begin(other, op, wait=True)
    async with within():
        await region.aclose()
    array[:] = 7  # from here on it is ours alone
    with pytest.raises(TransferError, match="deregistered"):
        await other.call("outcome", "t")
    assert (array == 7).all()
    if op == "get":
        assert not await other.call("matches", "far", 7)


@both_ops
async def test_deregistering_the_local_region_waits_for_its_transfers(cast: Cast, op: Op) -> None:
    pair = await to_far(cast, "mapped")
    transfer = pair.post(op)
    await moving(transfer)
    async with within():
        await pair.region.aclose()
    assert transfer.done()
    async with within():
        await transfer
    with pytest.raises(ClosedError, match="near"):
        pair.post(op)


@pytest.mark.parametrize("then", ["ends", "goes on"])
@both_kinds
async def test_deregistering_while_a_user_is_stopped_inside(cast: Cast, kind: Kind, then: str) -> None:
    # One chunk for all of it: between its first and its last byte the other process is inside.
    other, region, array = await from_far(cast, kind, config={"chunk_bytes": 1 << 30, "chunk_rows": 1 << 20})
    alive = weakref.ref(array.base if kind == "mapped" else array)
    for _ in range(20):
        array[:] = 0
        await begin(other, "put", [15, *ROWS * 128, 0])
        while not array[15, 0]:  # noqa: ASYNC110 - nobody tells of bytes that arrive
            await asyncio.sleep(0)
        other.stop()
        async with within():
            try:
                await region.aclose()
            except RegistrationError as error:
                assert "there" in str(error)  # noqa: PT017 - it was not stopped inside every time
                break
        region, array = await make_region(cast.here, "near", kind, SHAPE)
    else:
        raise AssertionError("it was never stopped inside")
    del array
    gc.collect()
    assert alive() is not None
    if then == "ends":
        other.kill()
    else:
        other.resume()
        await other.call("outcome", "t")  # it had all been in one chunk, so it could go on to its end
    async with within():
        while alive() is not None:
            await asyncio.sleep(0)
            gc.collect()


# ---- the file is truncated ----------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[str]:
    """Name a file in memory that is gone after the test."""
    path = f"/dev/shm/asyncxfer-test-{os.getpid()}"
    yield path
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@both_ops
@pytest.mark.parametrize("backend", ["shm:mapped", "shm:attach"])
async def test_the_peer_truncates_its_file_under_a_transfer(cast: Cast, op: Op, backend: str, path: str) -> None:
    pair = await to_far(cast, "file", path=path)
    transfer = pair.post(op, backend=backend, notify=b"never")
    await moving(transfer)
    os.truncate(path, 0)
    async with within():
        with pytest.raises(TransferError, match="went away") as caught:
            await transfer
    assert not isinstance(caught.value, PeerLostError)
    assert 0 < caught.value.nbytes < len(LONG) * SHAPE[1]
    with pytest.raises(TransferError, match="never"):
        await pair.other.call("expect", b"never", timeout=8)
    async with within():
        with pytest.raises(TransferError, match="went away"):
            await pair.post(op, ROWS, backend=backend)
        with pytest.raises(TransferError, match="went away"):
            await small(pair, op, backend)
    assert pair.peer.state is PeerState.JOINED


@both_ops
@both_kinds
async def test_the_local_file_is_truncated_under_a_transfer(cast: Cast, op: Op, kind: Kind, path: str) -> None:
    pair = await to_far(cast, kind)
    region, _ = await make_region(cast.here, "in a file", "file", SHAPE, path=path)
    pair.region = region
    transfer = pair.post(op)
    await moving(transfer)
    os.truncate(path, 0)
    async with within():
        with pytest.raises(TransferError, match="went away"):
            await transfer
        with pytest.raises(TransferError, match="went away"):
            await small(pair, op, None)
    async with within():
        await region.aclose()


def small(pair: Pair, op: Op, backend: str | None) -> Transfer:
    """Post a transfer so small that the caller's own thread does it."""
    call = pair.agent.put if op == "put" else pair.agent.get
    return call(pair.region.bytes[:64], pair.peer["far"].bytes[:64], backend=backend)


BUS = """
    import asyncio, faulthandler, os, sys
    import numpy as np
    when, log = sys.argv[1], open(sys.argv[3], "w")
    if when == "before import":
        faulthandler.enable(log)
    from asyncxfer import Agent, TransferError
    from peers import map_file

    async def fails(transfer):
        try:
            async with asyncio.timeout(8):
                await transfer
        except TransferError as error:
            assert "went away" in str(error)
        else:
            raise AssertionError("no error")

    async def main():
        if when == "after import":
            faulthandler.enable(log)
        mapped = map_file(sys.argv[2], 1 << 24)
        source = np.zeros(1 << 24, np.uint8)
        async with Agent("a") as a, Agent("b") as b, a.register(source) as near, b.register(mapped, name="kv"):
            if when == "after start":
                faulthandler.enable(log)
            far = (await a.connect("b"))["kv"]
            await a.put(near.bytes[:], far.bytes[:])
            if when == "after use":
                faulthandler.enable(log)
            os.truncate(sys.argv[2], 0)
            for backend in ("local", "shm:mapped", "shm:attach"):
                for n in (64, 1 << 24):
                    await fails(a.put(near.bytes[:n], far.bytes[:n], backend=backend))
                    await fails(a.get(near.bytes[:n], far.bytes[:n], backend=backend))
        print("alive", os.path.getsize(sys.argv[3]), flush=True)
        mapped[0]  # and who runs into it without us gets what was always to be had
    asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["never", "before import", "after import", "after start", "after use"])
def test_the_guard_and_faulthandler_leave_each_other_alone(when: str, path: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BUS), when, path, str(log)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert ran.stdout == "alive 0\n", ran.stderr
    assert ran.returncode == -signal.SIGBUS, ran.stderr
    assert log.read_text().count("Fatal Python error: Bus error") == (when != "never")


# ---- rows outside the region --------------------------------------------------------------------------------------


@both_kinds
@both_ops
async def test_rows_outside_the_region_are_refused_by_the_call(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    size = pair.region.nbytes
    wrong: list[Callable[[Indexable], object]] = [
        lambda region: region[16],
        lambda region: region[[0, 3, 99]],
        lambda region: region.bytes[: size + 1],
        lambda region: region.descriptors([0, size - 7], [8, 8]),
        lambda region: region.descriptors([2**64 - 8], [16]),
        lambda region: region.rows(np.array([[size, 1]])),
    ]
    regions: list[Indexable] = [pair.region, pair.peer["far"]]
    for region, call in itertools.product(regions, wrong):
        with pytest.raises(DescriptorError, match=r"\d"):
            call(region)
    with pytest.raises(DescriptorError, match="totals"):
        pair.agent.prepare(op, pair.region[ROWS], pair.peer["far"][[1, 2]])
    await pair.post(op, ROWS)
    await pair.expect(op)


# ---- restarts -----------------------------------------------------------------------------------------------------


async def test_metadata_of_a_process_that_has_restarted(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    first = cast.spawn()
    stale = await first.call("start", "phoenix")
    generation = (await cast.here.connect(stale)).generation
    events = cast.here.events()
    first.kill()
    second = cast.spawn()
    metadata = await second.call("start", "phoenix")
    async with within():
        with pytest.raises(PeerLostError, match=str(generation)):
            await cast.here.connect(stale)
    peer = await cast.here.connect(metadata)
    assert peer.generation > generation
    async with within():
        told = [(await anext(events)).state for _ in range(2)]
    assert told == [PeerState.LOST, PeerState.RESTARTED]
    await second.call("region", "far", "mapped", SHAPE, seed=2)
    async with within():
        await cast.here.get(pair.region[ROWS], (await peer.region("far"))[ROWS])
    assert (pair.array == pattern(2, SHAPE)).all()
    async with within():
        with pytest.raises(PeerLostError, match=str(generation)):
            await cast.here.connect(stale)
    assert peer.state is PeerState.JOINED


async def test_metadata_of_an_agent_that_was_closed_and_started_again(cast: Cast) -> None:
    other = cast.spawn()
    stale = await other.call("start", "phoenix")
    first = await cast.here.connect(stale)
    await other.call("aclose")
    async with within():
        with pytest.raises(PeerLostError, match=str(first.generation)):
            await cast.here.connect(stale)
    second = await cast.here.connect(await other.call("start", "phoenix"))
    assert second.generation > first.generation
    async with within():
        await second.notify(b"hello")
    assert (await other.call("expect", b"hello", timeout=8)).peer == "here"
