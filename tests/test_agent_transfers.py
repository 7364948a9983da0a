"""Transfers as users meet them: awaiting and composing, dropping, following, planning, explaining, counting."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from lent import Lent, until
from thread_backend import Job, ThreadBackend

from asyncxfer import (
    Agent,
    Candidate,
    ClosedError,
    DescriptorError,
    Done,
    Explanation,
    NoRouteError,
    Peer,
    Region,
    RemoteRegion,
    Transfer,
    TransferError,
)
from asyncxfer.abc import Completion


class Parts(NamedTuple):
    """Two agents of this process, a region of 64 x 1,024 bytes at each, and their memory."""

    agent: Agent
    peer: Peer
    region: Region
    remote: RemoteRegion
    here: npt.NDArray[np.uint8]
    there: npt.NDArray[np.uint8]


Pair: TypeAlias = Lent[Parts]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    here = np.random.default_rng(0).integers(0, 256, (64, 1024), np.uint8)
    there = np.zeros_like(here)
    async with Agent("a") as a, Agent("b") as b, a.register(here, name="here") as region, b.register(there, name="kv"):
        peer = await a.connect("b")
        pair = Lent(Parts(a, peer, region, peer["kv"], here, there))
        yield pair
    del pair.value


# ---- composing ----------------------------------------------------------------------------------------------------


async def test_gather_and_task_groups(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    done = await asyncio.gather(*(a.put(region[n], remote[63 - n]) for n in range(64)))
    assert [d.nbytes for d in done] == [1024] * 64
    assert np.array_equal(there, here[::-1])

    async def put(row: int) -> Done:
        return await a.put(region[row], remote[row])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(put(row)) for row in range(64)]
    assert sum(task.result().nbytes for task in tasks) == 65_536
    assert np.array_equal(there, here)


async def test_wait_and_wait_for(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    futures = [asyncio.ensure_future(a.put(region[n], remote[n])) for n in range(4)]
    finished, pending = await asyncio.wait(futures)
    assert (len(finished), pending) == (4, set())
    assert (await asyncio.wait_for(a.get(region[:4], remote[4:8]), 30)).nbytes == 4096
    assert not here[:4].any()
    assert there[:4].any()


async def test_a_transfer_can_be_awaited_again_and_by_several(pair: Pair) -> None:
    a, _, region, remote, _, _ = pair.value
    transfer = a.put(region[:], remote[:])

    async def wait() -> Done:
        return await transfer

    first = await asyncio.gather(wait(), wait(), wait())
    assert {*first, await transfer, transfer.result()} == {first[0]}
    assert transfer.done()
    assert repr(transfer) == "<Transfer: put of 65,536 bytes to 'kv' by local, done>"
    assert not transfer.cancel()


async def test_nothing_is_known_of_a_transfer_in_flight() -> None:
    memory = [np.zeros(32 << 20, np.uint8) for _ in range(2)]
    async with Agent("a") as agent, agent.register(memory[0]) as here, agent.register(memory[1]) as there:
        transfer = agent.put(here[:], there[:])
        with pytest.raises(asyncio.InvalidStateError, match="still in flight"):
            transfer.result()
        with pytest.raises(asyncio.InvalidStateError, match="still in flight"):
            transfer.exception()
        assert "in flight" in repr(transfer)
        assert 0.0 <= transfer.progress < 1.0
        assert agent.stats()["in_flight"] == 1
        assert transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        assert isinstance(transfer.exception(), asyncio.CancelledError)
        assert "failed" in repr(transfer)


async def test_a_dropped_transfer_goes_on(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    big = np.ones(32 << 20, np.uint8)
    target = np.zeros_like(big)
    async with a.register(big) as source, a.register(target) as sink:
        a.put(source[:], sink[:])
        a.put(region[:], remote[:])
        gc.collect()
        await until(lambda: not a.stats()["in_flight"])
        assert target.all()
        assert np.array_equal(here, there)


async def test_many_in_flight_at_once(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    plans = [a.prepare("put", region[n], remote[n]) for n in range(64)]
    done = await asyncio.gather(*(plans[n % 64]() for n in range(2000)))
    assert len(done) == 2000
    assert np.array_equal(here, there)
    assert a.stats()["in_flight"] == 0


async def test_threads_without_a_loop_post_and_poll(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    posted: list[Transfer] = []

    def work(rows: range) -> None:
        transfers = [a.put(region[row], remote[row], priority=row % 3 - 1) for row in rows]
        for transfer in transfers:
            while not transfer.done():
                pass
        posted.extend(transfers)

    threads = [threading.Thread(target=work, args=(range(n, 64, 4),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert {transfer.result().nbytes for transfer in posted} == {1024}
    assert np.array_equal(here, there)


async def test_another_loop_can_await_a_transfer(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value

    async def elsewhere() -> list[Done]:
        return await asyncio.gather(*(a.put(region[:], remote[:], backend="local") for _ in range(50)))

    done = await asyncio.to_thread(asyncio.run, elsewhere())
    assert len(done) == 50
    assert np.array_equal(here, there)


# ---- failing ------------------------------------------------------------------------------------------------------


class Broken(ThreadBackend):
    """Fails every transfer."""

    name = "broken"
    begun, cut = threading.Event(), threading.Event()

    def _carry_out(self, job: Any, completion: Any) -> None:
        completion.advance(7)
        self.begun.set()
        self.cut.wait(30)
        raise OSError("the cable is cut")


@pytest.mark.parametrize("asked", ["awaited", "followed", "inspected", "dropped", "cancelled"])
async def test_a_failure_that_nobody_asks_for_is_logged_once(asked: str) -> None:
    logged: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    Broken.begun.clear()
    Broken.cut.clear()
    async with (
        Agent("a", backends=[Broken]) as agent,
        agent.register(bytearray(8)) as here,
        agent.register(bytearray(8), name="kv") as there,
    ):
        transfer = agent.put(here[:], there[:])
        await until(Broken.begun.is_set)
        if asked == "cancelled":
            transfer.cancel()
        Broken.cut.set()
        if asked == "awaited":
            with pytest.raises(TransferError, match="put of 8 bytes to 'kv' by broken failed: the cable is cut") as e:
                await transfer
            assert (e.value.nbytes, e.value.backend) == (7, "broken")
            assert isinstance(e.value.__cause__, OSError)
            del e
        elif asked == "followed":
            with pytest.raises(TransferError, match="the cable is cut"):
                _ = [row async for row in transfer]
        await until(lambda: not agent.stats()["in_flight"])
        if asked == "inspected":
            assert isinstance(transfer.exception(), TransferError)
        del transfer
        gc.collect()
        assert agent.stats()["sent"]["a"]["broken"]["put"]["failed"] == 1
    if asked in ("dropped", "cancelled"):
        assert [str(context["exception"]) for context in logged] == [
            "put of 8 bytes to 'kv' by broken failed: the cable is cut"
        ]
        assert "nobody awaited it" in logged[0]["message"]
        logged.clear()
    assert logged == []


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda a, r, p: a.put(r[0], p[:2]), DescriptorError, "1,024 bytes in 1 rows.* 2,048 bytes"),
        (lambda a, r, p: a.put(r, p[:]), DescriptorError, "local is Region; expected descriptors, such as"),
        (lambda a, r, p: a.put(r[:], "kv"), DescriptorError, "remote is str; expected descriptors, such as"),
        (lambda a, r, p: a.put(p[:], r[:]), DescriptorError, "local must be descriptors of a region of agent 'a'"),
        (lambda a, r, p: a.put(r[64], p[0]), DescriptorError, "64"),
        (lambda a, r, p: a.put(r[:], p[:], backend="bus"), NoRouteError, "backend='bus' was asked for"),
        (lambda a, r, p: a.put(r[:], p[:], checksum=True), NoRouteError, "does not compute checksums"),
        (lambda a, r, p: a.put(r[:], p[:], timeout=-1), ValueError, "timeout is -1; expected seconds, 0 or more"),
        (lambda a, r, p: a.put(r[:], p[:], timeout=float("nan")), ValueError, "timeout is nan"),
        (lambda a, r, p: a.get(r[:], p[:], notify="x"), DescriptorError, "a notification is bytes, not str"),
        (lambda a, r, p: a.prepare("copy", r[:], p[:]), DescriptorError, "op is 'copy'; expected 'put' or 'get'"),
    ],
)
async def test_what_the_call_can_know_is_raised_by_the_call(
    pair: Pair, call: Any, kind: type[Exception], message: str
) -> None:
    a, _, region, remote, _, _ = pair.value
    with pytest.raises(kind, match=message):
        call(a, region, remote)
    assert a.stats()["in_flight"] == 0


async def test_regions_of_other_agents_are_refused(pair: Pair) -> None:
    a, _, region, remote, _, _ = pair.value
    async with Agent("c") as c, c.register(bytearray(65_536), name="theirs") as theirs:
        peer = await c.connect("b")
        with pytest.raises(DescriptorError, match="local must be descriptors of a region of agent 'a'"):
            a.put(theirs[:], remote[:])
        with pytest.raises(DescriptorError, match="remote must be descriptors of a region of agent 'a' or of a peer"):
            a.put(region[:], theirs[:])
        with pytest.raises(DescriptorError, match="remote must be descriptors of a region of agent 'a' or of a peer"):
            a.put(region[:], peer["kv"][:])
        del peer


# ---- plans, routes, figures ---------------------------------------------------------------------------------------


async def test_a_plan_says_what_it_is(pair: Pair) -> None:
    a, _, region, remote, here, there = pair.value
    plan = a.prepare("put", region[:, :100], remote[:, 5:105])
    assert (plan.op, plan.nbytes, plan.descriptors, plan.backend) == ("put", 6400, 64, "local")
    assert repr(plan) == "<Plan: put of 6,400 bytes to 'kv' by local>"
    await plan()
    assert np.array_equal(there[:, 5:105], here[:, :100])
    some = plan.select(np.array([1, -1]), [0, 2])
    assert (some.nbytes, some.descriptors) == (200, 2)
    assert len(some.select([0], [1]).local) == 1
    for rows, message in (((64,), (0,)), "64"), (((0, 1), (0,)), "totals must agree"):
        with pytest.raises(DescriptorError, match=message):
            plan.select(*rows)
    await a.aclose()
    with pytest.raises(ClosedError, match="agent 'a' was closed"):
        plan()


async def test_explain_gives_every_candidate_as_data_and_as_text(pair: Pair) -> None:
    a, _, region, remote, _, _ = pair.value
    explanation = a.explain("put", region[::2, :512], remote[1::2, :512])
    assert isinstance(explanation, Explanation)
    assert (explanation.op, explanation.nbytes, explanation.rows) == ("put", 16_384, 32)
    candidates = {candidate.route: candidate for candidate in explanation}
    assert set(candidates) == {
        "local", "shm:mapped", "shm:attach", "tcp", "ucx", "uring", "kvikio", "s3", "azure", "gcs"
    }  # fmt: skip
    assert all(isinstance(candidate, Candidate) for candidate in explanation)
    local, mapped = candidates["local"], candidates["shm:mapped"]
    assert local.taken
    assert local is explanation.route
    assert local.seconds is not None
    assert (mapped.taken, mapped.seconds, mapped.reason) == (
        False, None, "ordinary memory of the peer (see Agent.allocate)",
    )  # fmt: skip
    first, *rest = str(explanation).splitlines()
    assert first == "put of 16,384 bytes in 32 rows"
    assert len(rest) == len(candidates)
    assert rest[0].split()[:2] == ["->", "local"]
    with pytest.raises(NoRouteError) as caught:
        a.put(region[:], remote[:], backend="shm:mapped")
    assert caught.value.reasons["shm:mapped"].startswith("ordinary memory")


async def test_following_gives_every_row_once(pair: Pair) -> None:
    a, _, region, remote, _, _ = pair.value
    for rows in (np.s_[:], np.s_[0:0], np.s_[::3, ::7]):
        transfer = a.put(region[rows], remote[rows])
        assert sorted([index async for index in transfer]) == list(range(len(region[rows])))
        assert transfer.progress == 1.0


async def test_following_can_be_left_and_cancelled() -> None:
    memory = [np.zeros((64, 1 << 20), np.uint8) for _ in range(2)]
    async with Agent("a") as agent, agent.register(memory[0]) as here, agent.register(memory[1]) as there:
        transfer = agent.put(here[:, :-1], there[:, :-1])
        async for _ in transfer:
            break
        assert (await transfer).descriptors == 64

        async def follow(transfer: Transfer) -> None:
            async for _ in transfer:
                pass

        plan = agent.prepare("put", here[:], there[:])
        *others, last = [plan() for _ in range(8)]
        task = asyncio.create_task(follow(last))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert last.done(), "its buffers would be in use behind the back of who cancelled"
        await asyncio.gather(*others)


async def test_figures(pair: Pair) -> None:
    a, peer, region, remote, _, _ = pair.value
    await a.put(region[:], remote[:], notify=b"x")
    await a.get(region[:4], remote[:4])
    await peer.notify(b"y")
    stats = a.stats()
    assert {op: (c["transfers"], c["nbytes"], c["failed"]) for op, c in stats["sent"]["b"]["local"].items()} == {
        "put": (1, 65_536, 0),
        "get": (1, 4096, 0),
    }
    assert (stats["in_flight"], stats["regions"], stats["peers"]) == (0, 1, 1)
    assert stats["backends"][:4] == ["local", "shm", "tcp", "uring"]
    assert set(stats["backends"][4:]) <= {"s3", "azure", "gcs"}  # those whose extras are installed
    assert stats["threads"] >= 0
    assert stats["network_threads"] >= 0


class Refusing(ThreadBackend):
    """A backend that cannot take another transfer."""

    name: ClassVar[str] = "refusing"

    def submit(self, prepared: Job, completion: Completion, priority: int = 0) -> None:
        raise MemoryError("no room")


async def test_who_expects_a_notification_learns_that_its_transfer_was_never_posted() -> None:
    async with (
        Agent("a", backends=[Refusing]) as a,
        Agent("b", backends=[Refusing]) as b,
        a.register(bytearray(8)) as here,
        b.register(bytearray(8), name="kv"),
    ):
        peer = await a.connect("b")
        expected = asyncio.create_task(b.expect(b"tag"))
        await asyncio.sleep(0)
        with pytest.raises(MemoryError, match="no room"):
            a.put(here[:], peer["kv"][:], notify=b"tag")
        with pytest.raises(TransferError, match="failed"):
            await expected
        assert a.stats()["in_flight"] == 0
