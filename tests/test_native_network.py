"""Data connections over TCP, driven directly: both ends in this process, over loopback."""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from frames import DATA, DONE, EPOCH, GET, HEAD, MAGIC, NOTE, PUT, SLOT, crc32c, head, run
from hypothesis import given, settings
from hypothesis import strategies as st
from native import pairs

from asyncxfer import PreSharedKey
from asyncxfer._fast import completion as native
from asyncxfer._fast import engine, initiator, poller
from asyncxfer._fast.completion import Completion, CompletionQueue
from asyncxfer._fast.initiator import Group, NetWork
from asyncxfer._fast.link import GatePage, Link
from asyncxfer._fast.poller import Mailbox
from asyncxfer._fast.target import Session
from asyncxfer._fast.tls import DONE as SHAKEN
from asyncxfer._fast.tls import Connection, Context

Bytes = npt.NDArray[np.uint8]


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


def encrypted(near: socket.socket, far: socket.socket) -> tuple[Connection, Connection]:
    """TLS over both ends."""
    context = Context(*PreSharedKey(b"sixteen bytes at least").pem())
    ends = (
        Connection(context, near.fileno(), server=False),
        Connection(context, far.fileno(), server=True),
    )
    while [end.handshake() for end in ends] != [SHAKEN, SHAKEN]:
        pass
    return ends


class Stage:
    """A group and a session, joined by connections, and a region at the target."""

    def __init__(self, streams: int = 2, nbytes: int = 1 << 22, *, tls: bool = False) -> None:
        self.tls = tls
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
        here, there = encrypted(near, far) if self.tls else (None, None)
        self.session.adopt(index, far.detach(), there)
        self.group.attach(index, near.detach(), here)

    def work(self, rows: Any, put: bool, **options: Any) -> NetWork:
        options = {"chunk_bytes": 1 << 18, "slot": SLOT, "epoch": EPOCH, **options}
        return NetWork(self.group, pairs(rows), [self.near.ctypes.data], [0], put=put, link=self.link, **options)

    def post(
        self, rows: Any, put: bool, *, note: bytes | None = None, timeout: float | None = None, **options: Any
    ) -> Completion:
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
        found: list[tuple[str, bytes]] = []
        end = time.monotonic() + within
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
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_moves(put: bool, checked: bool, rows: Any, tls: bool) -> None:
    with stage(tls=tls) as s:
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


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("seed", range(4))
def test_connections_that_break_at_any_moment(seed: int, tls: bool) -> None:
    """Puts and gets while connections are cut and made again: each ends well, and its notification comes once."""
    random = np.random.default_rng(seed)
    size, count = 4096, 256
    with stage(streams=2, tls=tls) as s:
        for round_ in range(12):
            s.near[:] = random.integers(0, 256, len(s.near), dtype=np.uint8)
            before = s.far.copy()
            half = size * count
            posted = []
            for n in range(2):
                rows = [(half * n, half * n, size, size, size, count)]
                posted.append(s.post(rows, True, note=b"%d/%d" % (round_, n), checked=bool(n)))
            posted.append(s.post([(2 * half, 2 * half, size, size, size, count)], False))
            for _ in range(int(random.integers(0, 4))):
                time.sleep(float(random.uniform(0, 0.002)))
                index = int(random.integers(0, 2))
                s.session.leave(index)
                while index in s.group.up():
                    time.sleep(0.0001)
                s.join(index)
            s.wait(*posted)
            assert [t.status for t in posted] == [native.STATUS_OK] * 3
            assert (s.far[: 2 * half] == s.near[: 2 * half]).all()
            assert (s.near[2 * half : 3 * half] == before[2 * half : 3 * half]).all()
            told = s.notes(4)
            assert sorted(tag for kind, tag in told if kind == "N") == [b"%d/%d" % (round_, n) for n in range(2)]
        assert s.notes(1, within=0.05) == []


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("put", [True, False])
def test_stopped_at_any_moment(put: bool, tls: bool) -> None:
    """Once a transfer has ended, nothing of it reads or writes."""
    random = np.random.default_rng(5)
    with stage(streams=2, tls=tls) as s:
        source, target = (s.near, s.far) if put else (s.far, s.near)
        for _ in range(40):
            source[:] = 1
            transfer = s.post([(0, 0, 4096, 4096, 4096, 1024)], put)
            time.sleep(float(random.uniform(0, 0.003)))
            transfer.stop(native.STATUS_CANCELLED)
            s.wait(transfer)
            assert transfer.status in (native.STATUS_OK, native.STATUS_CANCELLED)
            source[:] = 2
            target[:] = 3
            time.sleep(0.002)
            assert (target == 3).all()


# ---- what a target makes of bytes that no initiator of ours sends ----------------------------------------------------


class Raw:
    """A connection to a session on which a test says what it likes."""

    def __init__(self, s: Stage, index: int = 9) -> None:
        near, far = socket_pair()
        near.setblocking(True)
        near.settimeout(5)
        s.session.adopt(index, far.detach())
        self.sock = near

    def say(self, *parts: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(b"".join(parts))

    def hear(self, n: int = 64) -> bytes:
        got = b""
        with contextlib.suppress(ConnectionError):
            while len(got) < n and (part := self.sock.recv(n - len(got))):
                got += part
        return got

    def status(self) -> int:
        return int(HEAD.unpack(self.hear())[3])


@pytest.fixture
def raw() -> Iterator[tuple[Stage, Raw]]:
    with stage(streams=1, nbytes=1 << 16) as s:
        s.far[:] = 1
        peer = Raw(s)
        with peer.sock:
            yield s, peer
    vars(s).clear()  # pytest holds on to it for longer than the leak check waits


OUTSIDE = [
    run(offset=(1 << 16) - 63),
    run(offset=1 << 63),
    run(offset=2**64 - 32),
    run(offset=0, stride=-1, count=2, length=32),
    run(offset=0, stride=2**62, count=2, length=32),
    run(offset=64, stride=-(2**63), count=2, length=32),
    run(segment=1),
    run(segment=2**32 - 1),
]


@pytest.mark.parametrize("kind", [PUT, GET])
@pytest.mark.parametrize("outside", OUTSIDE, ids=range(len(OUTSIDE)))
def test_rows_outside_the_region_are_denied(raw: tuple[Stage, Raw], kind: int, outside: bytes) -> None:
    s, peer = raw
    payload = b"\xff" * 64 + bytes(8) if kind == PUT else b""
    peer.say(head(kind), outside, payload)
    assert peer.status() == native.STATUS_DENIED
    assert (s.far == 1).all()
    peer.say(head(GET, op=2, settled=2), run())  # and the connection goes on
    assert peer.status() == 0
    assert peer.hear(64) == b"\x01" * 64


@pytest.mark.parametrize(
    "runs",
    [
        [run(count=0)],
        [run(length=0)],
        [run(length=65)],
        [run(length=63)],
        [run(length=2**63, count=2)],
        [run(length=16, count=2**32 - 1)],
        [run(length=32), run(length=33)],
    ],
)
def test_runs_that_do_not_come_to_the_payload_are_denied(raw: tuple[Stage, Raw], runs: list[bytes]) -> None:
    s, peer = raw
    peer.say(head(PUT, runs=len(runs)), *runs, b"\xff" * 64, bytes(8))
    assert peer.status() == native.STATUS_DENIED
    assert (s.far == 1).all()


def test_requests_of_many_rows_are_answered_though_they_wait(raw: tuple[Stage, Raw]) -> None:
    """More of them than a target keeps at a time, sent before any answer is read."""
    _, peer = raw
    count = 400
    request = [run(offset=n, length=1) for n in range(1024)]

    def send() -> None:
        for op in range(1, count + 1):
            peer.say(head(GET, op=op, settled=op, runs=1024, nbytes=1024), *request)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(count):
        assert peer.status() == 0
        assert peer.hear(1024 + 8)[:1024] == b"\x01" * 1024
    sender.join()


def test_a_request_has_no_more_rows_than_one_thread_should_spend_time_on(raw: tuple[Stage, Raw]) -> None:
    _, peer = raw
    peer.say(head(GET, flags=1, nbytes=1024), run(length=1, stride=0, count=1024))
    assert peer.status() == 0
    peer.hear(1024 + 8)
    peer.say(head(GET, op=2, flags=1, nbytes=1025), run(length=1, stride=0, count=1025))
    assert peer.status() == native.STATUS_DENIED
    peer.say(head(GET, op=3, runs=2, nbytes=1025), run(length=1, stride=0, count=1024), run(length=1))
    assert peer.status() == native.STATUS_DENIED


def test_a_direction_that_is_taken_back_ends_what_had_begun(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    peer.say(head(PUT), run(), b"\xff" * 32)
    while s.far[31] != 255:
        time.sleep(0.001)
    s.session.open(SLOT, EPOCH, [s.far.ctypes.data], [s.far.nbytes], readable=True, writable=False)
    peer.say(b"\xff" * 32, bytes(8))
    assert peer.status() == native.STATUS_DENIED
    assert (s.far[32:] == 1).all()


@pytest.mark.parametrize(
    "bad",
    [
        head(PUT, magic=MAGIC + 1), head(0), head(DONE), head(DATA), head(77), head(PUT, op=0),
        head(PUT, runs=0), head(PUT, runs=1025), head(PUT, nbytes=0), head(PUT, nbytes=1 << 40),
        head(GET, flags=1, nbytes=(16 << 20) + 1),
        head(PUT, chunk=1, chunks=1), head(PUT, chunks=2**32 - 1), head(PUT, tag=8), head(PUT, flags=4, tag=40_000),
        head(PUT, settled=2), head(NOTE, runs=1, nbytes=0, flags=4), head(NOTE, runs=0, nbytes=64, flags=4),
        head(NOTE, runs=0, nbytes=0),
    ],
)  # fmt: skip
def test_heads_that_no_initiator_sends_end_the_connection(raw: tuple[Stage, Raw], bad: bytes) -> None:
    s, peer = raw
    peer.say(bad, bytes(4096))
    assert peer.hear() == b""
    assert (s.far == 1).all()


def test_wrong_slots_and_epochs_reach_nothing(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    for op, (slot, epoch) in enumerate(
        [(SLOT, EPOCH + 1), (SLOT + 1, EPOCH), (SLOT, 0), (2**32 - 1, 0), (16384, 1)], 1
    ):
        peer.say(head(PUT, op=op, slot=slot, epoch=epoch), run(), b"\xff" * 64, bytes(8))
        assert peer.status() == native.STATUS_REVOKED
        peer.say(head(GET, op=op, slot=slot, epoch=epoch), run())
        assert peer.status() == native.STATUS_REVOKED
    assert (s.far == 1).all()


def test_directions_that_were_not_granted_are_denied(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    bases, sizes = [s.far.ctypes.data], [s.far.nbytes]
    s.session.open(SLOT, EPOCH, bases, sizes, readable=True, writable=False)
    peer.say(head(PUT), run(), b"\xff" * 64, bytes(8))
    assert peer.status() == native.STATUS_DENIED
    s.session.open(SLOT, EPOCH, bases, sizes, readable=False, writable=True)
    peer.say(head(GET, op=2), run())
    assert peer.status() == native.STATUS_DENIED
    assert (s.far == 1).all()


def test_a_region_that_is_told_again_is_served_on(raw: tuple[Stage, Raw]) -> None:
    """As after a control connection was made again, with a put under way."""
    s, peer = raw
    peer.say(head(PUT), run(), b"\xff" * 32)
    while s.far[31] != 255:
        time.sleep(0.001)
    bases, sizes = [s.far.ctypes.data], [s.far.nbytes]
    elsewhere = np.zeros(1 << 16, np.uint8)
    for _ in range(64):
        s.session.open(SLOT, EPOCH, bases, sizes, readable=True, writable=True)
        for slot in range(SLOT + 1, SLOT + 65):  # whoever gets the memory of a table that was let go
            s.session.open(slot, EPOCH, [elsewhere.ctypes.data], sizes, readable=True, writable=True)
    peer.say(b"\xff" * 32, bytes(8))
    assert peer.status() == 0
    assert (s.far[:64] == 255).all()
    assert not elsewhere.any()


@pytest.mark.parametrize("renew", [True, False], ids=["renewed", "given back"])
def test_memory_that_was_granted_anew_in_mid_request(raw: tuple[Stage, Raw], renew: bool) -> None:
    """What a request had found out about its region before is not used after."""
    s, peer = raw
    other = np.ones(1 << 16, np.uint8)
    peer.say(head(PUT, nbytes=1 << 15), run(length=1 << 15), b"\x02" * (1 << 14))
    while s.far[(1 << 14) - 1] != 2:
        time.sleep(0.001)
    if not renew:
        assert s.page.shut(SLOT)
        s.session.shut(SLOT)
        s.page.open(SLOT, EPOCH)
    s.session.open(SLOT, EPOCH, [s.far.ctypes.data], [s.far.nbytes], readable=True, writable=True)
    for slot in range(SLOT + 1, SLOT + 9):  # these take the room that was freed
        s.session.open(slot, EPOCH, [other.ctypes.data], [other.nbytes], readable=True, writable=True)
    peer.say(b"\x02" * (1 << 14), bytes(8))
    assert peer.status() == 0
    assert (other == 1).all()
    assert (s.far[: 1 << 15] == 2).all()


def test_what_was_narrowed_in_mid_request_is_denied(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    peer.say(head(PUT, nbytes=1 << 15), run(length=1 << 15), b"\x02" * (1 << 14))
    while s.far[(1 << 14) - 1] != 2:
        time.sleep(0.001)
    s.session.open(SLOT, EPOCH, [s.far.ctypes.data], [s.far.nbytes], readable=True, writable=False)
    peer.say(b"\x02" * (1 << 14), bytes(8))
    assert peer.status() == native.STATUS_DENIED
    assert (s.far[1 << 14 :] == 1).all()


def test_a_put_that_comes_twice_notifies_once(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    for _ in range(2):
        for chunk in range(2):
            tag = b"tag" if chunk == 0 else b""
            peer.say(
                head(PUT, chunk=chunk, chunks=2, flags=4, tag=len(tag)), run(offset=64 * chunk), tag, bytes(64 + 8)
            )
            assert peer.status() == 0
    assert s.notes(2) == [("I", b"tag"), ("N", b"tag")]
    assert s.notes(1, within=0.05) == []


def test_a_note_that_comes_twice_is_told_once_and_no_failure_follows(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    for flags in (4, 4, 6):  # as it is, again, and word of a failure under the same number
        peer.say(head(NOTE, runs=0, nbytes=0, chunks=0, flags=flags, tag=3), b"tag")
        assert peer.status() == 0
    assert s.notes(1) == [("N", b"tag")]
    assert s.notes(1, within=0.05) == []


def test_the_receiver_is_told_that_a_tag_will_not_come() -> None:
    with stage(streams=1) as s:
        s.session.hold()
        transfer = s.post([(0, 0, 4096, 4096, 4096, 1024)], True, note=b"t")
        assert transfer.stop(native.STATUS_CANCELLED)
        s.wait(transfer)
        s.session.go_on()
        while 0 not in s.group.up():  # it was cut, since nothing was answered
            if s.news.take():
                s.join(0)
        told = s.notes(1)
        if ("F", b"t") not in told:  # the target had read the beginning of it
            told += s.notes(1)
        assert [note for note in told if note[0] != "I"] == [("F", b"t")]


def test_a_put_that_the_initiator_gave_up_is_not_told(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    peer.say(head(PUT, flags=4, tag=3), run(), b"tag", bytes(64), struct.pack("<II", 1, 0))
    assert peer.status() == native.STATUS_FAULT
    assert s.notes(1, within=0.05) == []


def test_a_wrong_checksum_is_told_and_not_notified(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    payload = bytes(range(64))
    peer.say(head(PUT, flags=5, tag=3), run(), b"tag", payload, struct.pack("<II", 0, crc32c(payload) ^ 1))
    assert peer.status() == native.STATUS_MISMATCH
    assert s.notes(1, within=0.05) == []
    peer.say(head(PUT, flags=5, tag=3), run(), b"tag", payload, struct.pack("<II", 0, crc32c(payload)))
    assert peer.status() == 0
    assert s.notes(1) == [("N", b"tag")]


def test_messages_that_were_too_many_do_not_end_a_pause(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    sent = 258  # just more than 8 MiB
    for op in range(1, sent + 1):
        peer.say(head(NOTE, op=op, settled=op, runs=0, nbytes=0, flags=4, tag=32768), bytes(32768))
    while not s.session.waits:
        time.sleep(0.001)
    s.session.hold()
    held = s.mail.take(5)
    assert len(held) == 5
    peer.say(head(NOTE, op=sent + 1, settled=sent + 1, runs=0, nbytes=0, flags=4))
    s.session.read_on()
    held += s.mail.take()
    time.sleep(0.02)
    held += s.mail.take()
    before = len(held)
    assert before <= sent
    s.session.go_on()
    assert len(s.notes(sent + 1 - before)) == sent + 1 - before


def test_messages_are_taken_in_order_and_in_part(raw: tuple[Stage, Raw]) -> None:
    s, peer = raw
    for op in range(1, 101):
        peer.say(head(NOTE, op=op, settled=op, runs=0, nbytes=0, flags=4, tag=2), b"%02d" % (op - 1))
        peer.status()
    found = []
    while select.select([s.mail.fileno()], [], [], 0)[0]:
        some = s.mail.take(7)
        assert 0 < len(some) <= 7
        found += [text for _, _, text in some]
    assert found == [b"%02d" % n for n in range(100)]


def test_an_initiator_has_sixteen_connections_and_no_more() -> None:
    with stage(streams=1, nbytes=1 << 16) as s:
        near, far = socket_pair()
        with near, far:
            for index in (-1, 16, 65535):
                with pytest.raises(IndexError, match="0 to 15"):
                    s.session.adopt(index, far.fileno())
            assert far.fileno() >= 0
            far.getpeername()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_noise_changes_nothing(data: st.DataObject) -> None:
    """Heads and runs with fields at their edges, whole or cut: nothing is written outside, and the target lives."""
    edges = st.sampled_from([0, 1, 2, 63, 64, 65, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
    wide = st.one_of(edges, st.sampled_from([1 << 32, 1 << 63, (1 << 64) - 1]))
    with stage(streams=1, nbytes=1 << 16) as s:
        s.session.shut(SLOT)
        s.session.open(SLOT, EPOCH, [s.far.ctypes.data + 4096], [8192], readable=True, writable=True)
        peer = Raw(s)
        with peer.sock:
            for _ in range(data.draw(st.integers(1, 6))):
                fields = head(
                    data.draw(st.integers(0, 6)), op=data.draw(st.integers(1, 3)), runs=data.draw(edges),
                    nbytes=data.draw(wide), chunk=data.draw(edges), chunks=data.draw(edges),
                    flags=data.draw(st.integers(0, 7)), slot=data.draw(st.sampled_from([SLOT, 0, 16383, 16384])),
                    tag=data.draw(edges), settled=data.draw(st.integers(0, 3)),
                )  # fmt: skip
                runs = [
                    run(
                        data.draw(wide),
                        data.draw(wide),
                        data.draw(st.integers(-(2**63), 2**63 - 1)),
                        data.draw(edges),
                        data.draw(st.integers(0, 1)),
                    )
                    for _ in range(data.draw(st.integers(0, 3)))
                ]
                peer.say(fields, *runs, data.draw(st.binary(max_size=200)))
            peer.sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError, OSError):
                peer.sock.shutdown(socket.SHUT_WR)
                peer.hear(1 << 16)
        s.session.close()
        assert not s.far[:4096].any()
        assert not s.far[4096 + 8192 :].any()


def test_what_is_posted_behind_the_close_ends() -> None:
    """As by a thread that looked whether the peer was there just before."""
    with stage(streams=1) as s:
        s.group.close()
        transfer = s.post([(0, 0, 64, 0, 0, 1)], True)
        s.wait(transfer)
        assert transfer.status == native.STATUS_PEER_GONE


def test_small_transfers_do_not_wait_for_a_connection_that_is_full() -> None:
    """The first connection's other end reads nothing; the second one serves."""
    with stage(streams=2, nbytes=1 << 25) as s:
        near, deaf = socket_pair()
        with deaf:
            for index in range(2):
                s.session.leave(index)
                while index in s.group.up():
                    time.sleep(0.001)
            number = near.detach()
            s.group.attach(0, number)
            big = s.post([(0, 0, 1 << 25, 0, 0, 1)], True)
            full = 0
            while full < 100:  # a moment without room may be one in which the kernel moves it on
                full = 0 if select.select([], [number], [], 0)[1] else full + 1
                time.sleep(0.001)
            s.join(1)
            small = [s.post([(0, 0, 64, 0, 0, 1)], True) for _ in range(10)]
            s.wait(*small)
            assert [t.status for t in small] == [native.STATUS_OK] * 10
            big.stop(native.STATUS_CANCELLED)
            s.wait(big)


# ---- what an initiator makes of answers that no target of ours gives, and of memory that is not there ----------------


class Liar:
    """The other end of a group's only connection, which answers what a test likes."""

    def __init__(self, s: Stage) -> None:
        near, far = socket_pair()
        far.setblocking(True)
        far.settimeout(5)
        s.group.attach(0, near.detach())
        self.sock = far

    def asked(self) -> tuple[int, int]:
        """The number and the chunk of the next request, whose runs are left unread."""
        fields = HEAD.unpack(self.sock.recv(HEAD.size, socket.MSG_WAITALL))
        return int(fields[4]), int(fields[6])

    def answer(self, kind: int, op: int, chunk: int, status: int, *, nbytes: int = 0, payload: bytes = b"") -> None:
        self.sock.sendall(HEAD.pack(MAGIC, kind, 0, status, op, 0, chunk, 1, 0, 0, 0, 0, nbytes, 0, 0) + payload)


@pytest.mark.parametrize("put", [True, False])
def test_a_mismatch_of_what_was_not_checked_is_a_failure(put: bool) -> None:
    with stage(streams=1, nbytes=1 << 16) as s:
        liar = Liar(s)
        with liar.sock:
            transfer = s.post([(0, 0, 64, 0, 0, 1)], put)
            liar.answer(DONE if put else DATA, *liar.asked(), native.STATUS_MISMATCH)
            s.wait(transfer)
            assert transfer.status == native.STATUS_FAILED


def test_far_memory_that_is_not_there_is_a_fault_of_a_checksum_too() -> None:
    engine.guard()
    with stage(streams=1) as s, tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        with mmap.mmap(file.fileno(), 1 << 20) as short:
            array = np.frombuffer(short, np.uint8)
            s.session.open(SLOT + 1, EPOCH, [array.ctypes.data], [1 << 20], readable=True, writable=True)
            s.page.open(SLOT + 1, EPOCH)
            file.truncate(0)
            for put in (True, False):
                transfer = s.post([(0, 0, 1 << 20, 0, 0, 1)], put, slot=SLOT + 1, checked=True)
                s.wait(transfer)
                assert transfer.status == native.STATUS_FAULT
            s.page.shut(SLOT + 1)
            s.session.shut(SLOT + 1)
            del array


@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_memory_that_is_not_there_is_a_fault(put: bool, tls: bool, checked: bool) -> None:
    engine.guard()
    with stage(streams=1, tls=tls) as s:
        with tempfile.TemporaryFile() as file:
            file.truncate(1 << 20)
            with mmap.mmap(file.fileno(), 1 << 20) as short:
                array = np.frombuffer(short, np.uint8)
                address = array.ctypes.data
                file.truncate(0)
                rows = pairs([(0, 0, 1 << 20, 0, 0, 1)])
                options = {"put": put, "link": s.link, "slot": SLOT, "epoch": EPOCH}
                work = NetWork(s.group, rows, [address], [0], chunk_bytes=1 << 18, checked=checked, **options)
                for _ in range(3):
                    transfer = Completion(s.queue, work.nbytes, put, s.link, None, None)
                    initiator.submit(work, transfer)
                    s.wait(transfer)
                    assert transfer.status == native.STATUS_FAULT
                del array
        after = s.post([(0, 0, 64, 0, 0, 1)], put)
        s.wait(after)
        assert after.status == native.STATUS_OK
