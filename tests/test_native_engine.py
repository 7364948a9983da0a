"""The copy engine, driven directly: what is copied against a model in numpy, and how work ends and takes turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import Connection, connection, pairs, queue, wait

from asyncxfer._fast import completion as native
from asyncxfer._fast import engine
from asyncxfer._fast.completion import Completion, CompletionQueue
from asyncxfer._fast.descriptors import PAIR
from asyncxfer._fast.engine import Work

Bytes = npt.NDArray[np.uint8]
Row = tuple[int, int, int, int, int, int]  # local, remote, length, local stride, remote stride, count


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Everything is done by one thread, so that what goes before what is decided by the queue alone."""
    engine.acquire(1)
    yield
    engine.release()
    assert engine.threads() == 0


def base(memory: Bytes) -> list[int]:
    return [memory.ctypes.data]


def run(work: Work, put: bool, c: Connection | None = None) -> Completion:
    with queue() as made:
        transfer = Completion(made, work.nbytes, put, c.link if c else None)
        engine.submit(work, transfer)
        wait(made, transfer)
    return transfer


# ---- what is copied -----------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> list[Row]:
    """Pairs of rows that do not overlap at the side that is written, whichever it is."""
    rows: list[Row] = []
    ends = [0, 0]
    for _ in range(draw(st.integers(0, 6))):
        length, count = draw(st.integers(0, 70)), draw(st.integers(1, 9))
        strides = [length + draw(st.integers(0, 5)) for _ in range(2)]
        starts = [end + draw(st.integers(0, 9)) for end in ends]
        spans = [stride * (count - 1) + length for stride in strides]
        ends = [start + span for start, span in zip(starts, spans, strict=True)]
        if count > 1 and draw(st.booleans()):  # the same rows from the far end: a negative stride
            side = draw(st.integers(0, 1))
            starts[side] += strides[side] * (count - 1)
            strides[side] = -strides[side]
        rows.append((starts[0], starts[1], length, strides[0], strides[1], count))
    return rows


def positions(rows: list[Row], side: int) -> npt.NDArray[np.int64]:
    """Where each byte of the stream lies at one side."""
    found = [np.zeros(0, np.int64)]
    for row in rows:
        start, length, stride, count = row[side], row[2], row[3 + side], row[5]
        found.append((start + stride * np.arange(count)[:, None] + np.arange(length)).ravel())
    return np.concatenate(found)


@settings(deadline=None, max_examples=150)
@given(
    rows=layouts(),
    chunk_bytes=st.integers(1, 400),
    chunk_rows=st.integers(1, 12),
    put=st.booleans(),
    small=st.booleans(),
    way=st.sampled_from(["copy", "stream", "attach"]),
)
def test_any_cut_of_any_rows_moves_the_same_bytes(
    rows: list[Row], chunk_bytes: int, chunk_rows: int, put: bool, small: bool, way: str
) -> None:
    size = max((int(positions(rows, side).max(initial=0)) for side in (0, 1)), default=0) + 1
    random = np.random.default_rng(len(rows))
    sides = [random.integers(0, 256, size, np.uint8) for _ in range(2)]
    expected = [side.copy() for side in sides]
    to, source = (1, 0) if put else (0, 1)
    expected[to][positions(rows, to)] = expected[source][positions(rows, source)]
    with connection() as c:
        c.page.open(9, 4)
        work = Work(
            pairs(rows), base(sides[0]), base(sides[1]), put=put, attach=way == "attach", link=c.link, slot=9, epoch=4,
            chunk_bytes=chunk_bytes, chunk_rows=chunk_rows, small_bytes=1 << 40 if small else 0,
            small_rows=1 << 40 if small else 0, stream_bytes=1 if way == "stream" else 0,
        )  # fmt: skip
        transfer = run(work, put, c)
        assert (transfer.status, transfer.moved, transfer.errno) == (native.STATUS_OK, work.nbytes, 0)
        counts = c.page.counts()
        assert counts["put_bytes" if put else "get_bytes"] == work.nbytes
    assert all(np.array_equal(side, wanted) for side, wanted in zip(sides, expected, strict=True))
    nbytes = len(positions(rows, 0))
    ends = work.ends()
    cuts = np.diff(ends, prepend=np.uint64(0))
    assert (work.nbytes, work.rows) == (nbytes, sum(row[5] for row in rows))
    assert int(ends[-1]) == nbytes if len(ends) else nbytes == 0
    assert (cuts > 0).all()
    assert (cuts <= chunk_bytes).all()
    if not small and len(ends):
        assert transfer.marks() == b"\1" * len(ends)


def test_rows_of_several_segments() -> None:
    segments = [[np.full(100, 10 * side + n, np.uint8) for n in range(3)] for side in range(2)]
    given = np.array([(0, 50, 50, 0, 0, 1, 2, 1, 0), (10, 0, 20, 0, 0, 1, 0, 2, 0)], dtype=PAIR)
    bases = [[memory.ctypes.data for memory in side] for side in segments]
    run(Work(given, *bases, put=True), True)
    assert (segments[1][1] == [11] * 50 + [2] * 50).all()
    assert (segments[1][2] == [0] * 20 + [12] * 80).all()
    with pytest.raises(IndexError, match="pair 0 names a segment that its region does not have"):
        Work(given, bases[0][:2], bases[1], put=True)


def test_more_rows_than_one_system_call_takes() -> None:
    source, target = np.arange(5000 * 8, dtype=np.uint64).view(np.uint8), np.zeros(5000 * 64, np.uint8)
    with connection() as c:
        c.page.open(0, 1)
        work = Work(
            pairs([(0, 0, 13, 16, 61, 5000)]), base(source), base(target), put=True, attach=True, link=c.link, epoch=1,
            chunk_rows=3000,
        )  # fmt: skip
        assert run(work, True, c).status == native.STATUS_OK
    rows = np.arange(5000)[:, None]
    assert np.array_equal(target[rows * 61 + np.arange(13)], source[rows * 16 + np.arange(13)])


def test_memory_that_is_not_there_is_an_error_of_the_transfer() -> None:
    memory = np.zeros(4096, np.uint8)
    with connection() as c:
        c.page.open(0, 1)
        work = Work(pairs([(0, 0, 4096, 0, 0, 1)]), base(memory), [8], put=True, attach=True, link=c.link, epoch=1)
        transfer = run(work, True, c)
        assert (transfer.status, transfer.moved) == (native.STATUS_FAULT, 0)
        assert c.page.counts()["failed"] == 1


# ---- how it ends ----------------------------------------------------------------------------------------------------


def work_over(c: Connection | None, *, small: bool = False, put: bool = True, rows: int = 1, **more: Any) -> Work:
    memory = np.zeros(1 << 16, np.uint8)
    target = np.zeros(1 << 16, np.uint8)
    limit = 1 << 40 if small else 0
    return Work(
        pairs([(0, 0, 1 << 16, 0, 0, rows)]), base(memory), base(target), put=put, link=c.link if c else None,
        keep=(memory, target), small_bytes=limit, small_rows=limit, **more,
    )  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
def test_a_gate_that_is_not_open_revokes(small: bool) -> None:
    with connection() as c:
        c.page.open(2, 7)
        assert run(work_over(c, small=small, slot=2, epoch=7), True, c).status == native.STATUS_OK
        assert run(work_over(c, small=small, slot=2, epoch=6), True, c).status == native.STATUS_REVOKED
        assert c.page.shut(2)
        assert run(work_over(c, small=small, slot=2, epoch=7), True, c).status == native.STATUS_REVOKED
        c.far.close()
        assert run(work_over(c, small=small, slot=2, epoch=7), True, c).status == native.STATUS_PEER_GONE


def test_a_link_that_is_closed_is_not_put_over() -> None:
    with connection() as c:
        c.page.open(0, 1)
        put = work_over(c, epoch=1)
        c.link.close()
        assert run(put, True, c).status == native.STATUS_PEER_GONE


def test_attach_needs_a_process() -> None:
    with pytest.raises(ValueError, match="cross-memory attach needs a link to a process"):
        work_over(None, attach=True)


def test_small_work_is_done_when_submit_returns() -> None:
    with queue() as made:
        transfer = Completion(made, 1 << 16, True)
        work = work_over(None, small=True)
        assert work.small
        engine.submit(work, transfer)
        assert transfer.done()
        assert transfer.inlined
        assert made.drain() == 0
        assert engine.threads() == 0


class Named(Completion):
    """Notes when it is settled."""

    def __init__(self, made: CompletionQueue, order: list[str], name: str, timeout: float | None = None) -> None:
        super().__init__(made, 1, True, timeout=timeout)
        self.order, self.name = order, name

    def _settled(self) -> None:
        self.order.append(self.name)


# 256 GiB of the same 64 KiB: what is posted behind it is there long before it could end.
ENDLESS: dict[str, Any] = {"rows": 1 << 22, "chunk_bytes": 1 << 20}


def test_priorities_and_turns() -> None:
    with queue() as made:
        order: list[str] = []
        cork = Completion(made, 1, True)  # one chunk that takes long: nothing begins before all have been posted
        engine.submit(work_over(None, rows=100_000, chunk_bytes=1 << 40, chunk_rows=1 << 20), cork)
        plug = Named(made, order, "plug")
        engine.submit(work_over(None, **ENDLESS), plug)
        posted = [plug]
        for name, priority in (("background", -1), ("normal 1", 0), ("urgent 1", 1), ("normal 2", 0), ("urgent 2", 9)):
            transfer = Named(made, order, name)
            engine.submit(work_over(None), transfer, priority)
            posted.append(transfer)
        # A long transfer gives way to others of its priority after each chunk; those of a lower one wait for it.
        wait(made, *posted[2:])
        assert (plug.done(), posted[1].done()) == (False, False)
        assert plug.stop(native.STATUS_CANCELLED)
        wait(made, *posted, cork)
        assert plug.status == native.STATUS_CANCELLED
        assert set(order[:4]) == {"normal 1", "normal 2", "urgent 1", "urgent 2"}
        for kind in ("normal", "urgent"):
            assert order.index(f"{kind} 1") < order.index(f"{kind} 2")
        assert order.index("urgent 2") < order.index("normal 2")
        assert order[4:] == ["plug", "background"]


@pytest.mark.parametrize("how", ["stop", "deadline"])
def test_long_work_ends_early_between_chunks(how: str) -> None:
    with queue() as made:
        transfer = Named(made, [], "long", timeout=0.02 if how == "deadline" else None)
        work = work_over(None, **ENDLESS)
        engine.submit(work, transfer)
        while not transfer.moved:
            pass
        if how == "stop":
            transfer.stop(native.STATUS_CANCELLED)
        wait(made, transfer)
        assert transfer.status == (native.STATUS_CANCELLED if how == "stop" else native.STATUS_TIMED_OUT)
        assert 0 < transfer.moved < work.nbytes
        assert transfer.moved == transfer.marks().count(1) << 20


def test_work_that_is_out_of_time_before_it_begins_moves_nothing() -> None:
    with queue() as made:
        for small in (False, True):
            transfer = Completion(made, 1, True, timeout=0.0)
            engine.submit(work_over(None, small=small), transfer)
            wait(made, transfer)
            assert (transfer.status, transfer.moved) == (native.STATUS_TIMED_OUT, 0)


def test_a_region_is_taken_back_under_long_work() -> None:
    with connection() as c, queue() as made:
        c.page.open(1, 3)
        transfer = Completion(made, 1, True, c.link)
        engine.submit(work_over(c, slot=1, epoch=3, **ENDLESS), transfer)
        while not transfer.moved:
            pass
        c.page.shut(1)
        assert c.page.wait(1, 30)
        moved = transfer.moved
        wait(made, transfer)
        assert transfer.status == native.STATUS_REVOKED
        assert transfer.moved <= moved + (1 << 20)


def test_threads_submit_to_each_others_queues() -> None:
    work = work_over(None, small=False)
    with queue() as made:
        posted: list[Completion] = []

        def submit() -> None:
            for _ in range(200):
                transfer = Completion(made, work.nbytes, True)
                engine.submit(work, transfer)
                posted.append(transfer)

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait(made, *posted)
        assert [transfer.status for transfer in posted] == [native.STATUS_OK] * 800
