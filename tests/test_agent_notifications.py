"""Notifications: expected by their tag, read as they come, kept until asked for, and never lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple, TypeAlias

import pytest
from lent import Lent, until

from asyncxfer import (
    Agent,
    ClosedError,
    DescriptorError,
    Notification,
    Peer,
    PeerLostError,
    TransferTimeout,
)
from asyncxfer._inbox import Inbox


class Talk(NamedTuple):
    """A sender, a receiver, and the receiver as the sender's peer."""

    sender: Agent
    receiver: Agent
    peer: Peer


Pair: TypeAlias = Lent[Talk]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with Agent("sender") as sender, Agent("receiver") as receiver:
        pair = Lent(Talk(sender, receiver, await sender.connect("receiver")))
        yield pair
    del pair.value


async def test_a_notification_is_kept_until_it_is_asked_for(pair: Pair) -> None:
    _, receiver, peer = pair.value
    for tag in (b"one", b"two", b"three", b"two"):
        await peer.notify(tag)
    assert await receiver.expect(b"three") == Notification("sender", b"three")
    assert (await receiver.expect(b"two")).tag == b"two"
    assert (await receiver.expect(b"two")).tag == b"two"
    assert (await receiver.expect(b"one")).peer == "sender"


async def test_each_waiter_gets_one_in_turn(pair: Pair) -> None:
    _, receiver, peer = pair.value
    order: list[int] = []

    async def wait(number: int) -> None:
        await receiver.expect(b"tag")
        order.append(number)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(wait(number))
        await asyncio.sleep(0)
        for _ in range(4):
            peer.notify(b"tag")
    assert order == [0, 1, 2, 3]


async def test_a_sender_can_be_named(pair: Pair) -> None:
    sender, receiver, peer = pair.value
    async with Agent("other") as other:
        theirs = await other.connect("receiver")
        await peer.notify(b"tag")
        await theirs.notify(b"tag")
        assert await receiver.expect(b"tag", peer="other", timeout=10) == ("other", b"tag")
        back = await receiver.connect("sender")
        assert await receiver.expect(b"tag", peer=back, timeout=10) == (sender.name, b"tag")


async def test_expecting_has_a_time_limit(pair: Pair) -> None:
    _, receiver, peer = pair.value
    with pytest.raises(TransferTimeout, match=r"no notification b'tag' within 0.01 s"):
        await receiver.expect(b"tag", timeout=0.01)
    with pytest.raises(TransferTimeout, match=r"no notification b'tag' from 'sender' within 0.01 s"):
        await receiver.expect(b"tag", peer="sender", timeout=0.01)
    await peer.notify(b"tag")
    assert (await receiver.expect(b"tag", timeout=10)).tag == b"tag"


async def test_a_tag_that_is_not_bytes_is_refused(pair: Pair) -> None:
    _, receiver, peer = pair.value
    with pytest.raises(DescriptorError, match="a notification is bytes, not str"):
        await receiver.expect("tag")  # type: ignore[arg-type]
    with pytest.raises(DescriptorError, match="a notification is bytes, not str"):
        peer.notify("tag")  # type: ignore[arg-type]


async def test_tags_have_a_largest_size(pair: Pair) -> None:
    sender, receiver, peer = pair.value
    largest = bytes(sender.config.notification_bytes)
    await peer.notify(largest)
    assert (await receiver.expect(largest, timeout=10)).tag == largest
    await peer.notify(b"")
    assert (await receiver.expect(b"", timeout=10)).tag == b""
    with pytest.raises(DescriptorError, match="a notification of 32769 bytes; at most 32768 can be sent"):
        peer.notify(largest + b"x")


@pytest.mark.parametrize("waiting", ["expect", "iterate"])
@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_giving_up_loses_nothing(pair: Pair, waiting: str, how: str) -> None:
    """Whether a wait is given up before or in the very turn in which its notification comes."""
    _, receiver, peer = pair.value
    limit = 0.0 if how == "timeout" else None

    async def wait() -> Notification:
        if waiting == "expect":
            return await receiver.expect(b"tag", timeout=limit)
        async with asyncio.timeout(limit):
            return await anext(receiver.notifications())

    for turns in range(6):
        task = asyncio.create_task(wait())
        peer.notify(b"tag")
        for _ in range(turns):
            await asyncio.sleep(0)
        if how == "cancel":
            task.cancel()
        got = await asyncio.gather(task, return_exceptions=True)
        if isinstance(got[0], Notification):
            peer.notify(b"tag")
        assert (await receiver.expect(b"tag", timeout=10)).tag == b"tag"
        with pytest.raises(TransferTimeout):
            await receiver.expect(b"tag", timeout=0.001)


@pytest.mark.parametrize("first", ["expect", "read"])
async def test_a_waiter_that_is_cancelled_too_late_passes_it_on(first: str) -> None:
    inbox = Inbox(1 << 20, lambda: None)
    reading = inbox.expect(b"tag", None, None) if first == "expect" else anext(inbox.read())
    tasks = [asyncio.ensure_future(reading)]
    await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(inbox.expect(b"tag" if first == "expect" else b"other", None, None)))
    await asyncio.sleep(0)
    inbox.arrived("sender", b"tag")  # both in one turn, in this order
    tasks[0].cancel()
    if first == "read":
        await asyncio.gather(tasks[0], return_exceptions=True)
        tasks[1].cancel()
        tasks[1] = asyncio.ensure_future(inbox.expect(b"tag", None, None))
    async with asyncio.timeout(10):
        assert await tasks[1] == ("sender", b"tag")
    assert tasks[0].cancelled()


async def test_the_iterator_gets_what_nobody_expects(pair: Pair) -> None:
    _, receiver, peer = pair.value
    expected = asyncio.create_task(receiver.expect(b"mine"))
    await asyncio.sleep(0)
    for tag in (b"one", b"mine", b"two"):
        await peer.notify(tag)
    notes = receiver.notifications()
    async with asyncio.timeout(10):
        assert [(await anext(notes)).tag for _ in range(2)] == [b"one", b"two"]
    assert (await expected).tag == b"mine"
    reading = asyncio.ensure_future(anext(notes))
    await asyncio.sleep(0)
    await receiver.aclose()
    with pytest.raises(StopAsyncIteration):
        await reading


async def test_two_readers_share(pair: Pair) -> None:
    _, receiver, peer = pair.value
    seen: list[bytes] = []

    async def read() -> None:
        async for note in receiver.notifications():
            seen.append(note.tag)  # noqa: PERF401 - each as it comes

    readers = [asyncio.create_task(read()) for _ in range(2)]
    for number in range(20):
        await peer.notify(b"%d" % number)
    await until(lambda: len(seen) == 20)
    assert sorted(seen) == sorted(b"%d" % number for number in range(20))
    await receiver.aclose()
    await asyncio.gather(*readers)


async def test_waiting_ends_with_the_sender(pair: Pair) -> None:
    sender, receiver, _ = pair.value
    waits = [asyncio.create_task(receiver.expect(b"tag", peer=who)) for who in (None, "sender")]
    await asyncio.sleep(0)
    await sender.aclose()
    for wait in waits:
        with pytest.raises(PeerLostError, match="peer 'sender'"):
            await wait


async def test_waiting_goes_on_while_another_may_send(pair: Pair) -> None:
    sender, receiver, _ = pair.value
    async with Agent("other") as other:
        theirs = await other.connect("receiver")
        wait = asyncio.create_task(receiver.expect(b"tag"))
        await asyncio.sleep(0)
        await sender.aclose()
        await theirs.notify(b"tag")
        assert await wait == ("other", b"tag")


async def test_waiting_ends_with_the_receiver(pair: Pair) -> None:
    _, receiver, _ = pair.value
    wait = asyncio.create_task(receiver.expect(b"tag"))
    await asyncio.sleep(0)
    await receiver.aclose()
    with pytest.raises(ClosedError, match="agent 'receiver' was closed"):
        await wait


async def test_a_receiver_that_does_not_read_holds_up_and_loses_nothing(pair: Pair) -> None:
    """More than the sockets and the backlog take: the rest waits at the sender."""
    async with Agent("slow", config={"backlog_bytes": 1 << 16}) as slow:
        sender, _, _ = pair.value
        peer = await sender.connect("slow")
        tags = [b"%06d" % number + bytes(4000) for number in range(400)]
        posted = [peer.notify(tag) for tag in tags]
        await asyncio.sleep(0.05)
        assert not posted[-1].done()
        notes = slow.notifications()
        async with asyncio.timeout(30):
            assert sorted([(await anext(notes)).tag for _ in tags]) == tags
        await asyncio.gather(*posted)
