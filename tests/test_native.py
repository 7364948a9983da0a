"""The native core, driven directly: completions and their queue, links and gates, notifications that find no room."""

from __future__ import annotations

import ctypes
import select
import threading
import time

import pytest
from native import Connection, connection, queue, wait

from asyncxfer import BackendError
from asyncxfer._fast import completion as native
from asyncxfer._fast import outbox
from asyncxfer._fast.completion import Completion, CompletionQueue
from asyncxfer._fast.link import PAGE_BYTES, SLOTS, GatePage, Link, peek
from asyncxfer._fast.memory import Mapping


class Noted(Completion):
    """Notes in which order completions are settled."""

    def __init__(self, made: CompletionQueue, order: list[int], number: int, nanoseconds: int = 0) -> None:
        super().__init__(made, 1, True)
        self.order, self.number, self.nanoseconds = order, number, nanoseconds

    def _settled(self) -> None:
        self.order.append(self.number)
        end = time.monotonic_ns() + self.nanoseconds
        while time.monotonic_ns() < end:
            pass


def readable(made: CompletionQueue) -> bool:
    return bool(select.select([made.fileno()], [], [], 0)[0])


# ---- completions and their queue ----------------------------------------------------------------------------------


def test_a_completion_ends_once_and_is_settled_by_its_queue() -> None:
    with queue() as made:
        order: list[int] = []
        transfer = Noted(made, order, 7)
        assert (transfer.done(), transfer.status, transfer.moved) == (False, -1, 0)
        transfer.post()
        transfer.advance(1)
        assert not readable(made)
        transfer.succeed()
        assert (transfer.done(), transfer.status, transfer.moved, transfer.errno) == (True, native.STATUS_OK, 1, 0)
        assert readable(made)
        assert order == []
        assert made.drain() == 1
        assert order == [7]
        assert not readable(made)
        for again in (transfer.succeed, lambda: transfer.fail(OSError())):
            with pytest.raises(BackendError, match="ended twice"):
                again()
        assert made.drain() == 0


def test_a_failure_keeps_its_exception() -> None:
    with queue() as made:
        transfer = Completion(made, 10, False)
        error = OSError("cut")
        transfer.fail(error)
        wait(made, transfer)
        assert (transfer.status, transfer.error, transfer.moved) == (native.STATUS_FAILED, error, 0)


def test_completions_are_settled_in_the_order_in_which_they_ended() -> None:
    with queue() as made:
        order: list[int] = []
        transfers = [Noted(made, order, number) for number in range(1000)]
        ends = list(reversed(range(0, 1000, 2))) + list(range(1, 1000, 2))
        for number in ends:
            transfers[number].succeed()
        wait(made, *transfers)
        assert order == ends


def test_a_dropped_completion_lives_until_it_is_settled() -> None:
    with queue() as made:
        order: list[int] = []
        for number in range(50):
            transfer = Noted(made, order, number)
            transfer.post()
            transfer.succeed()
            del transfer
        while made.drain():
            pass
        assert order == list(range(50))


def test_one_drain_is_bounded_and_asks_for_the_next() -> None:
    with queue() as made:
        order: list[int] = []
        for number in range(20):
            Noted(made, order, number, nanoseconds=1_000_000).succeed()
        turns = 0
        while readable(made):
            settled = made.drain()
            assert 0 < settled <= 8
            turns += 1
            if turns == 1:  # one that ends meanwhile comes after those that wait
                Noted(made, order, 20).succeed()
        assert turns >= 3
        assert order == list(range(21))


def test_an_exception_while_settling_does_not_strand_the_others() -> None:
    class Bad(Noted):
        def _settled(self) -> None:
            super()._settled()
            raise RuntimeError("on purpose")

    with queue() as made:
        order: list[int] = []
        kinds = [Noted, Bad, Noted]
        for number, kind in enumerate(kinds):
            kind(made, order, number).succeed()
        with pytest.raises(RuntimeError, match="on purpose"):
            made.drain()
        assert readable(made)
        assert made.drain() == 1
        assert order == [0, 1, 2]


def test_many_threads_end_completions_into_one_queue() -> None:
    with queue() as made:
        order: list[int] = []
        transfers = [Noted(made, order, number) for number in range(2000)]

        def end(mine: list[Noted]) -> None:
            for transfer in mine:
                transfer.post()
                transfer.succeed()

        threads = [threading.Thread(target=end, args=(transfers[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        wait(made, *transfers)
        for thread in threads:
            thread.join()
        wait(made)
        assert sorted(order) == list(range(2000))


def test_progress_is_reported_only_while_somebody_watches() -> None:
    class Watched(Completion):
        told = 0

        def _progressed(self) -> None:
            self.told += 1

    with queue() as made:
        transfer = Watched(made, 100, True)
        transfer.post()
        transfer.advance(10)
        assert made.drain() == 0
        transfer.watch(True)
        for _ in range(5):
            transfer.advance(10)
        assert made.drain() == 1  # five reports, one turn
        transfer.advance(10)
        assert made.drain() == 1
        assert (transfer.told, transfer.moved) == (2, 70)
        transfer.succeed()
        wait(made, transfer)


def test_stopping_is_asked_once_and_told_to_the_backend() -> None:
    with queue() as made:
        asked: list[int] = []
        transfer = Completion(made, 10, True)
        transfer.post(lambda: asked.append(1))
        before = transfer.stopping
        assert transfer.stop(native.STATUS_CANCELLED)
        assert not transfer.stop(native.STATUS_TIMED_OUT)
        assert (before, transfer.stopping) == (False, True)
        assert asked == [1]
        transfer.succeed()
        wait(made, transfer)
        assert transfer.status == native.STATUS_CANCELLED
        assert not transfer.stop(native.STATUS_CANCELLED)


def test_a_time_limit_shows_as_stopping() -> None:
    with queue() as made:
        late, unlimited = Completion(made, 1, True, timeout=0.0), Completion(made, 1, True)
        patient = Completion(made, 1, True, timeout=1000.0)
        assert (late.stopping, unlimited.stopping, patient.stopping) == (True, False, False)
        assert (late.remaining, unlimited.remaining) == (0.0, None)
        assert patient.remaining is not None
        late.succeed()
        wait(made, late)
        assert late.status == native.STATUS_TIMED_OUT


def test_transfers_that_end_inline_take_turns_with_the_loop() -> None:
    with queue() as made:
        assert [made.overdue(60_000) for _ in range(8)] == [False, False, False, True] * 2


def test_a_note_needs_a_link() -> None:
    with queue() as made, pytest.raises(ValueError, match="a notification needs a link"):
        Completion(made, 0, True, None, b"tag")


# ---- links and gates ----------------------------------------------------------------------------------------------


def test_a_gate_lets_in_who_knows_its_epoch() -> None:
    with connection() as c:
        assert not c.link.enter(3, 1)
        c.page.open(3, 1)
        assert c.link.enter(3, 1)
        assert not c.link.enter(3, 2)
        assert not c.page.shut(3)  # somebody is inside
        assert not c.link.enter(3, 1)
        assert not c.page.wait(3, 0.01)
        c.link.leave(3)
        assert c.page.wait(3, 10)
        assert c.page.shut(3)
        for call in (lambda: c.page.open(SLOTS, 1), lambda: c.link.enter(SLOTS, 1), lambda: c.link.leave(SLOTS)):
            with pytest.raises(IndexError, match=f"slot {SLOTS} of {SLOTS}"):
                call()


@pytest.mark.parametrize("how", ["leave", "wake"])
def test_waiting_at_a_gate_ends(how: str) -> None:
    with connection() as c:
        c.page.open(0, 5)
        assert c.link.enter(0, 5)
        assert not c.page.shut(0)
        empty: list[bool] = []
        waiter = threading.Thread(target=lambda: empty.append(c.page.wait(0, 60)))
        waiter.start()
        while waiter.is_alive():  # again and again: the first may come before the wait
            if how == "wake":
                c.page.wake(0)
            elif not empty and c.link.alive:
                c.link.leave(0)
                c.link.close()
            waiter.join(0.01)
        assert empty == [how == "leave"]


def test_a_link_knows_when_the_other_end_has_gone() -> None:
    with connection() as c:
        assert c.link.alive
        assert not c.link.gone()
        c.far.close()
        assert c.link.gone()
        c.link.close()
        assert not c.link.alive


def test_only_a_link_page_is_taken() -> None:
    page = GatePage()
    other = GatePage()
    with pytest.raises(ValueError, match="not a link page of this version"):
        Link(-1, -1, 1, Mapping(page.fd, 0, 4096, writable=True))
    mapping = Mapping(other.fd, 0, PAGE_BYTES, writable=True)
    mapping.buffer[:8] = bytes(8)
    with pytest.raises(ValueError, match="not a link page of this version"):
        Link(-1, -1, 1, mapping)
    page.close_fd()
    other.close_fd()


def test_each_end_feels_the_pulse_of_the_other() -> None:
    with connection() as c:
        before = c.page.pulse()
        assert c.page.pulse() == before, "nothing but the other end's own advances it"
        felt = c.link.pulse()
        assert c.page.pulse() == before + 1
        assert c.link.pulse() == felt + 1


def test_a_link_without_a_page_has_no_pulse() -> None:
    with pytest.raises(ValueError, match="has no pulse"):
        Link(-1, -1, 0, None).pulse()


def test_peeking_at_a_process() -> None:
    with connection() as c:
        value = bytearray(b"0123456789")
        at = ctypes.addressof((ctypes.c_char * 10).from_buffer(value))
        assert peek(c.link.pid, at, 10) == b"0123456789"
        with pytest.raises(OSError, match="Bad address"):
            peek(c.link.pid, 8, 10)


# ---- notifications ------------------------------------------------------------------------------------------------


def note(made: CompletionQueue, c: Connection, tag: bytes, timeout: float | None = None) -> Completion:
    transfer = Completion(made, 0, True, c.link, tag, timeout)
    transfer.end_now()
    return transfer


def fill(made: CompletionQueue, c: Connection) -> list[Completion]:
    """Send until the socket is full: those that went out, and the one that did not."""
    sent: list[Completion] = []
    while not sent or sent[-1].done():
        sent.append(note(made, c, bytes(1000)))
    return sent


def test_a_notification_goes_out_behind_the_data_and_failure_is_told() -> None:
    with queue() as made, connection() as c:
        assert note(made, c, b"tag").inlined
        cut = Completion(made, 5, True, c.link, b"cut")
        cut.post()
        cut.announce()
        cut.fail(OSError())
        wait(made, cut)
        assert c.frames() == [b"Ntag", b"Icut", b"Fcut"]
        assert c.page.counts() == {"puts": 0, "put_bytes": 0, "gets": 0, "get_bytes": 0, "failed": 1}


def test_a_put_to_a_peer_that_has_gone_did_not_succeed() -> None:
    with queue() as made, connection() as c:
        put, get = Completion(made, 5, True, c.link), Completion(made, 5, False, c.link)
        c.far.close()
        put.succeed()
        get.succeed()
        wait(made, put, get)
        assert (put.status, get.status) == (native.STATUS_PEER_GONE, native.STATUS_OK)
        assert note(made, c, b"tag").status == native.STATUS_PEER_GONE


def test_a_notification_waits_for_room() -> None:
    with queue() as made, connection() as c:
        sent = fill(made, c)
        *_, waiting = sent
        assert not waiting.inlined
        received = 0
        while not waiting.done() or received < len(sent):
            received += len(c.frames())
            made.drain()
        wait(made)
        assert waiting.status == native.STATUS_OK
        outbox.shutdown()


@pytest.mark.parametrize("how", ["stop", "timeout", "forget", "gone"])
def test_a_notification_that_waits_for_room_can_end(how: str) -> None:
    with queue() as made, connection() as c:
        fill(made, c)
        waiting = note(made, c, b"late", timeout=0.02 if how == "timeout" else None)
        assert not waiting.done()
        if how == "stop":
            assert waiting.stop(native.STATUS_CANCELLED)
        elif how == "forget":
            outbox.forget(c.link)
        elif how == "gone":
            c.far.close()
        wait(made, waiting)
        expected = {"stop": native.STATUS_CANCELLED, "timeout": native.STATUS_TIMED_OUT}
        assert waiting.status == expected.get(how, native.STATUS_PEER_GONE)
        frames: list[bytes] = []
        while how in expected and b"Flate" not in frames:  # the receiver hears that it will not come
            frames += c.frames()
        assert b"Nlate" not in frames
        outbox.forget(c.link)
        made.drain()
        outbox.shutdown()
