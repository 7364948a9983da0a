"""A fork with a live agent, and one agent used from many threads and loops.

A forked child can do nothing with its parent's agent and can do it no harm; threads without a loop post and poll, and
other loops than the agent's await.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LOOPS
from peers import Kind, moving, pattern
from stage import (
    LONG,
    ROWS,
    SHAPE,
    Cast,
    Op,
    begin,
    both_kinds,
    both_ops,
    from_far,
    to_far,
    within,
)

from asyncxfer import ClosedError, Done, PeerLostError, Transfer, TransferError

# From Python 3.12 on a fork with threads warns; that it goes well is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# ---- forks --------------------------------------------------------------------------------------------------------


def in_child(check: Callable[[], None]) -> int:
    """Fork, run a check in the child, and leave it at once; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        check()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


async def reap(pid: int) -> int:
    """Wait for a child; its exit status."""
    async with asyncio.timeout(10):
        return os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, pid, 0))[1])


def step(coroutine: Coroutine[Any, Any, Any] | Any) -> None:
    """Run an awaitable without a loop, as far as it comes; it must end at once."""
    iterator = coroutine.__await__()
    try:
        next(iterator)
    except StopIteration:
        return
    raise AssertionError("it waits for something")


@both_kinds
@both_ops
async def test_a_fork_leaves_the_parent_unharmed_and_the_child_without_an_agent(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    plan = cast.here.prepare(op, pair.region[ROWS], pair.peer["far"][ROWS])
    remote = pair.peer["far"]
    metadata = cast.here.metadata()
    flying = pair.post(op, notify=b"through")
    await moving(flying)

    def check() -> None:
        for call in (
            plan,
            lambda: pair.post(op, ROWS),
            lambda: cast.here.prepare(op, pair.region[ROWS], remote[ROWS]),
            lambda: pair.peer.notify(b"from the child"),
            lambda: step(cast.here.connect(metadata)),
            lambda: step(cast.here.register(np.zeros(8))),
            lambda: step(cast.here.allocate(8, "uint8")),
            lambda: step(cast.here.expect(b"anything")),
            cast.here.events,
            cast.here.notifications,
        ):
            with pytest.raises(ClosedError, match="fork"):
                call()
        step(pair.region.aclose())
        step(pair.peer.aclose())
        step(cast.here.aclose())

    child = in_child(check)
    async with within():
        await flying
    assert await reap(child) == 0
    async with within():
        assert (await pair.post(op, ROWS, notify=b"and on")).backend == "shm"
        await pair.expect(op)
        for tag in (b"through", b"and on"):
            assert (await pair.other.call("expect", tag, timeout=8)).peer == "here"


@both_kinds
@both_ops
async def test_a_fork_of_the_target_leaves_its_regions_open(cast: Cast, kind: Kind, op: Op) -> None:
    other, region, array = await from_far(cast, kind)
    await begin(other, op, wait=True)
    child = in_child(lambda: step(region.aclose()))
    assert await reap(child) == 0
    async with within():
        await other.call("outcome", "t")
        await begin(other, op, ROWS, key="again")
        await other.call("outcome", "again")
    if op == "put":
        assert (array == pattern(2, SHAPE)).all()


async def test_a_loss_is_noticed_although_a_forked_child_lives_on(cast: Cast) -> None:
    """A child holds copies of all descriptors until its first line of Python runs, and of none of them after."""
    pair = await to_far(cast, "mapped")
    gate, theirs = os.pipe()

    def live_on() -> None:
        os.close(theirs)
        os.read(gate, 1)

    child = in_child(live_on)
    os.close(gate)
    expected = pair.other.post("expect", b"never")
    await pair.other.call("checksum", "far")  # by the time that it answers this, it expects
    await cast.here.aclose()
    async with within():
        with pytest.raises(PeerLostError, match="here"):
            await expected
    os.close(theirs)
    assert await reap(child) == 0


FORK = """
    import asyncio, gc, os, sys, threading
    import numpy as np
    import uvloop
    from asyncxfer import Agent, ClosedError

    new_loop = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.new_event_loop
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    async def start():
        a, b = await Agent("a").start(), await Agent("b").start()
        near = await a.register(np.arange(1 << 21, dtype=np.uint8), name="near")
        far = await b.allocate(1 << 21, np.uint8, name="far")
        return a, b, near, far, (await a.connect("b"))["far"]

    async def move():
        for backend in ("local", "shm:mapped", "shm:attach"):
            far.array[:] = 0
            await a.put(near[:], remote[:], backend=backend, notify=b"moved")
            assert (await b.expect(b"moved", timeout=8)).peer == "a"
            assert far.array[1] == 1

    async def close():
        await a.aclose()
        await b.aclose()

    a, b, near, far, remote = run(start())
    run(move())
    if os.fork() == 0:
        try:
            a.put(near[:], remote[:])
        except ClosedError:
            pass
        async def anew():
            async with Agent("a") as a, Agent("b") as b, a.register(bytearray(1 << 20)) as near:
                async with b.allocate(1 << 20, np.uint8, name="far"):
                    far = (await a.connect("b"))["far"]
                    await a.put(near[:], far[:], notify=b"moved")
                    await b.expect(b"moved", timeout=8)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(anew())
        del a, b, near, far, remote
        gc.collect()
        sys.exit(7)  # through every finaliser
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    run(move())
    run(close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    print("done")
"""


def test_a_child_may_have_agents_of_its_own_and_run_to_its_end(loop_name: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORK), loop_name],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")


# ---- threads without a loop ---------------------------------------------------------------------------------------


def poll(transfer: Transfer) -> Done:
    """What a connector without a loop does."""
    end = time.monotonic() + 10
    while not transfer.done():
        assert time.monotonic() < end, "it never ended"
    return transfer.result()


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run `work` in threads, and hold up this one until they are done; raises what they raise."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@both_kinds
@both_ops
@pytest.mark.parametrize("blocked", [True, False], ids=["loop held up", "loop running"])
async def test_threads_post_and_poll(cast: Cast, kind: Kind, op: Op, blocked: bool) -> None:
    pair = await to_far(cast, kind)
    call = cast.here.put if op == "put" else cast.here.get

    def work(number: int) -> None:
        mine = range(number * 4, number * 4 + 4)
        plan = cast.here.prepare(op, pair.region[mine], pair.peer["far"][mine])
        for _ in range(20):
            assert poll(plan()).nbytes == 4 * SHAPE[1]
            start = number * SHAPE[1] * 4
            for _ in range(10):
                poll(call(pair.region.bytes[start : start + 64], pair.peer["far"].bytes[start : start + 64]))
        cancelled = plan()
        if cancelled.cancel():
            with pytest.raises(asyncio.CancelledError):
                poll(cancelled)
        poll(call(pair.region[mine], pair.peer["far"][mine], notify=b"from %d" % number))

    if blocked:
        in_threads(work)
    else:
        await asyncio.to_thread(in_threads, work)
    await pair.expect(op)
    for number in range(4):
        assert (await pair.other.call("expect", b"from %d" % number, timeout=8)).peer == "here"
    async with within():
        while cast.here.stats()["in_flight"]:  # noqa: ASYNC110 - the loop was held up; it settles the rest now
            await asyncio.sleep(0)
    counter = cast.here.stats()["sent"]["there"]["shm"][op]
    assert counter["transfers"] + counter["failed"] == 4 * (20 * 11 + 2)
    assert counter["failed"] <= 4


@both_kinds
@both_ops
async def test_threads_learn_that_the_peer_was_killed(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    plan = cast.here.prepare(op, pair.region[LONG], pair.peer["far"][LONG])
    started = threading.Barrier(3)

    def post_and_poll() -> None:
        for turn in range(1000):
            transfer = plan()
            while not turn and not transfer.progress and not transfer.done():
                pass
            if not turn:
                started.wait(10)
            poll(transfer)

    def work(number: int) -> None:
        with pytest.raises(PeerLostError):
            post_and_poll()

    threads = asyncio.ensure_future(asyncio.to_thread(in_threads, work, 2))
    await asyncio.to_thread(started.wait, 10)
    pair.other.kill()
    async with asyncio.timeout(10):
        await threads


async def test_an_agent_is_closed_under_threads_that_post(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    plan = cast.here.prepare("put", pair.region[ROWS], pair.peer["far"][ROWS])
    small = cast.here.prepare("put", pair.region.bytes[:64], pair.peer["far"].bytes[:64])
    started = threading.Barrier(5)

    def post_and_poll() -> None:
        while True:
            posted: list[Transfer] = []
            try:
                posted.extend(each() for each in [plan] * 10 + [small] * 10)
            finally:  # also behind a refusal: a failure that nobody asks for is logged, and the log keeps it
                for transfer in posted:
                    with contextlib.suppress(asyncio.CancelledError, TransferError):
                        poll(transfer)

    def work(number: int) -> None:
        started.wait(10)
        with pytest.raises((ClosedError, PeerLostError)):
            post_and_poll()

    threads = asyncio.ensure_future(asyncio.to_thread(in_threads, work))
    await asyncio.to_thread(started.wait, 10)
    async with asyncio.timeout(40):  # five threads that never rest, on few cores, under a coverage measurement
        await cast.here.aclose()
        await threads


async def test_a_close_waits_for_what_a_thread_is_posting(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known to be in flight, and then ends within the call that posts it."""
    pair = await to_far(cast, "mapped")
    small = cast.here.prepare("put", pair.region.bytes[:64], pair.peer["far"].bytes[:64])
    live = cast.here._live
    assert live is not None
    flights, backend = live.flights, live.backends["shm"]
    submit, entered, go_on = backend.submit, threading.Event(), threading.Event()

    def linger(prepared: object, transfer: Transfer, priority: int) -> None:
        entered.set()
        go_on.wait(10)
        submit(prepared, transfer, priority)

    monkeypatch.setattr(backend, "submit", linger)
    posting = asyncio.ensure_future(asyncio.to_thread(small, notify=b"small"))
    await asyncio.to_thread(entered.wait, 10)
    closing = asyncio.ensure_future(cast.here.aclose())
    async with within():
        while not flights.all()[0].waiters:  # noqa: ASYNC110 - it is a turn of this loop that is waited for
            await asyncio.sleep(0)
        go_on.set()
        assert (await posting).inlined
        await closing


# ---- other loops --------------------------------------------------------------------------------------------------


@both_kinds
@both_ops
@pytest.mark.parametrize("elsewhere", list(LOOPS))
async def test_other_loops_than_the_agents_await(cast: Cast, kind: Kind, op: Op, elsewhere: str) -> None:
    pair = await to_far(cast, kind)

    async def work() -> None:
        for _ in range(20):
            await asyncio.gather(*(pair.post(op, ROWS) for _ in range(5)))
        rows = [row async for row in pair.post(op, ROWS)]
        assert sorted(rows) == ROWS
        transfer = pair.post(op, LONG * 8)  # it must not end before this loop has had a turn
        await moving(transfer)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await transfer
        assert transfer.done()

    def run(number: int) -> None:
        with asyncio.Runner(loop_factory=LOOPS[elsewhere]) as runner:
            runner.run(work())

    await asyncio.to_thread(in_threads, run, 2)
    async with within():
        await pair.post(op, ROWS)
    await pair.expect(op)


async def test_one_transfer_is_awaited_in_two_loops(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    transfer = pair.post("put", LONG)

    async def wait() -> Done:
        return await transfer

    elsewhere = asyncio.to_thread(asyncio.run, wait())
    async with asyncio.timeout(5):
        one, other = await asyncio.gather(elsewhere, wait())
    assert one == other
