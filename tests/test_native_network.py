"""Data connections over TCP, driven directly: both ends in this process, over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import pairs, queue

from asyncxfer._fast import completion as native
from asyncxfer._fast import initiator, poller
from asyncxfer._fast.completion import Completion, CompletionQueue
from asyncxfer._fast.initiator import Group, NetWork
from asyncxfer._fast.link import GatePage, Link
from asyncxfer._fast.poller import Mailbox
from asyncxfer._fast.target import Session

Bytes = npt.NDArray[np.uint8]
SLOT, EPOCH = 3, 7


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    poller.acquire(2)
    yield
    poller.release()
    assert poller.running() == 0


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


class Stage:
    """A group and a session, joined by connections, and a region at the target."""

    def __init__(self, streams: int = 2, nbytes: int = 1 << 22) -> None:
        self.mail, self.news = Mailbox(), Mailbox()
        self.link = Link(-1, -1, 0, None)
        self.page = GatePage()
        self.page.close_fd()
        self.group = Group(self.news, 1, self.link, streams)
        self.session = Session(self.mail, 2, self.page)
        self.far = np.zeros(nbytes, np.uint8)
        self.near = np.zeros(nbytes, np.uint8)
        self.session.open(SLOT, EPOCH, [self.far.ctypes.data], [nbytes], readable=True, writable=True)
        self.page.open(SLOT, EPOCH)
        self.queue = CompletionQueue()
        for index in range(streams):
            self.join(index)

    def join(self, index: int) -> None:
        near, far = socket_pair()
        self.session.adopt(index, far.detach())
        self.group.attach(index, near.detach())

    def work(self, rows: Any, put: bool, **options: Any) -> NetWork:
        options = {"chunk_bytes": 1 << 18, "slot": SLOT, "epoch": EPOCH, **options}
        return NetWork(self.group, pairs(rows), [self.near.ctypes.data], [0], put=put, link=self.link, **options)

    def post(self, rows: Any, put: bool, *, note: bytes | None = None, timeout: float | None = None, **options: Any) -> Completion:
        work = self.work(rows, put, **options)
        transfer = Completion(self.queue, work.nbytes, put, self.link, note, timeout)
        initiator.submit(work, transfer)
        return transfer

    def wait(self, *transfers: Completion, within: float = 10.0) -> None:
        end = time.monotonic() + within
        while not all(t.done() for t in transfers):
            self.queue.drain()
            assert time.monotonic() < end
            time.sleep(0.0001)
        while self.queue.drain():
            pass

    def notes(self, count: int, within: float = 5.0) -> list[tuple[str, bytes]]:
        end, found = time.monotonic() + within, []
        while len(found) < count and time.monotonic() < end:
            found += [(chr(kind), text) for _, kind, text in self.mail.take()]
        return found

    def close(self) -> None:
        self.group.close()
        self.session.close()
        self.queue.close()
        self.mail.close()
        self.news.close()


@contextlib.contextmanager
def stage(**options: Any) -> Iterator[Stage]:
    made = Stage(**options)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 1 << 22, 0, 0, 1)],
        [(0, 0, 4096, 8192, 8192, 512)],
        [(5, 9, 100, 200, 150, 2000)],
        [(0, 7, 1, 0, 0, 1)],
        [(0, 4096 * 511, 4096, 4096, -4096, 512)],
    ],
)
def test_moves(put: bool, checked: bool, rows: Any) -> None:
    with stage() as s:
        source, target = (s.near, s.far) if put else (s.far, s.near)
        source[:] = np.random.default_rng(1).integers(0, 256, len(source), dtype=np.uint8)
        expected = target.copy()
        for local, remote, length, ls, rs, count in rows:
            for i in range(count):
                a, b = local + ls * i, remote + rs * i
                if put:
                    expected[b : b + length] = source[a : a + length]
                else:
                    expected[a : a + length] = source[b : b + length]
        transfer = s.post(rows, put, checked=checked)
        s.wait(transfer)
        assert transfer.status == native.STATUS_OK
        assert (target == expected).all()
        assert transfer.moved == sum(r[2] * r[5] for r in rows)


def test_note_once_behind_all_chunks() -> None:
    with stage() as s:
        s.near[:] = 9
        for n in range(50):
            t = s.post([(0, 0, 4096, 4096, 4096, 1024)], True, note=b"n%d" % n)
            s.wait(t)
            assert t.status == native.STATUS_OK
            assert s.notes(2) == [("I", b"n%d" % n), ("N", b"n%d" % n)]
        t = s.post([(0, 0, 4096, 4096, 4096, 1)], True, note=b"small")
        s.wait(t)
        assert s.notes(1) == [("N", b"small")]
        t = s.post([(0, 0, 4096, 4096, 4096, 1)], False, note=b"got")
        s.wait(t)
        assert s.notes(1) == [("N", b"got")]


def test_revoked() -> None:
    with stage() as s:
        s.page.shut(SLOT)
        for put in (True, False):
            t = s.post([(0, 0, 4096, 4096, 4096, 1024)], put)
            s.wait(t)
            assert t.status == native.STATUS_REVOKED


def test_many_small() -> None:
    with stage() as s:
        s.near[:] = 3
        ts = [s.post([(64 * i, 64 * i, 64, 0, 0, 1)], True) for i in range(5000)]
        s.wait(*ts)
        assert all(t.status == native.STATUS_OK for t in ts)
        assert (s.far[: 64 * 5000] == 3).all()


def test_lost_connection_goes_on() -> None:
    with stage(streams=1) as s:
        s.near[:] = 5
        s.session.leave(0)
        t = s.post([(0, 0, 4096, 4096, 4096, 1024)], True, note=b"x")
        while not s.news.take():
            time.sleep(0.001)
        assert not t.done()
        s.join(0)
        s.wait(t)
        assert t.status == native.STATUS_OK
        assert s.notes(2)[-1] == ("N", b"x")
        assert (s.far == 5).all()


@pytest.mark.parametrize("put", [True, False])
def test_stop_ends_soon(put: bool) -> None:
    with stage(streams=1) as s:
        s.session.hold()
        t = s.post([(0, 0, 4096, 4096, 4096, 1024)], put, note=b"t", timeout=0.2)
        s.wait(t)
        assert t.status == native.STATUS_TIMED_OUT
        t = s.post([(0, 0, 4096, 4096, 4096, 1024)], put)
        assert t.stop(native.STATUS_CANCELLED)
        s.wait(t)
        assert t.status == native.STATUS_CANCELLED


def test_peer_gone() -> None:
    with stage(streams=1) as s:
        s.session.hold()
        t = s.post([(0, 0, 4096, 4096, 4096, 1024)], True)
        s.link.close()
        s.group.fail()
        s.wait(t)
        assert t.status == native.STATUS_PEER_GONE
