"""The initiator's side of the control protocol: what this agent says to a target, and what it is told.

One object is one connection; over a network a peer may have several, one after the other (`_line`). What the target's
regions mean, and what to do when it ends, is not known here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable

from ._control import answer_beat
from ._errors import MetadataError, PeerLostError, TransferTimeout
from ._fast.link import SLOTS
from ._metadata import (
    AgentMetadata,
    Beat,
    Bye,
    Hello,
    LetterAck,
    Ready,
    Refused,
    RegionAdded,
    RegionInfo,
    RegionRemoved,
    Welcome,
    decode_frame,
    encode_frame,
)
from ._stream import AnyChannel, StreamChannel

__all__ = ["Outgoing"]


class Outgoing:
    """A connection that this agent has dialled.

    Regions that the target tells of are kept until `follow` is called, and handed on from then.

    Parameters
    ----------
    channel : AnyChannel
        Connected a moment ago; owned from now on.

    Attributes
    ----------
    remote : bool
        It goes over a network.
    refused : bool
        The target wants no connection.
    """

    def __init__(self, channel: AnyChannel) -> None:
        self.channel = channel
        self.remote = isinstance(channel, StreamChannel)
        self.refused = False
        self._welcome: Welcome | None = None
        self._ready: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._page_fd = -1
        self._early: list[tuple[RegionInfo, list[int]]] = []
        self._regions: set[int] = set()
        self._on_region: Callable[[RegionInfo, list[int]], None] | None = None
        self._on_removed: Callable[[int], None] | None = None
        self._on_ack: Callable[[LetterAck], None] | None = None
        self._on_end: Callable[[str, bool], None] | None = None
        self._leaving: str | None = None
        self._over: str | None = None
        channel.follow(self._frame, self._end)

    async def greet(
        self, me: AgentMetadata, patience: float, *, resume: bytes = b"", attempt: int = 0, proof: bytes = b""
    ) -> Welcome:
        """Say hello; the answer, once all regions of now have been told.

        Parameters
        ----------
        me : AgentMetadata
        patience : float, seconds
        resume, attempt, proof
            As of `Hello`.

        Raises
        ------
        PeerLostError
            It ended or refused.
        TransferTimeout
            It did not answer.
        """
        hello = Hello(
            name=me.name, generation=me.generation, process=me.process, host=me.host, resume=resume, attempt=attempt,
            proof=proof,
        )  # fmt: skip
        self.channel.send(encode_frame(hello))
        try:
            async with asyncio.timeout(patience):
                return await self._ready
        except TimeoutError as error:
            raise TransferTimeout(
                f"{self.channel.where} accepted the connection and did not answer in {patience} s "
                "(stopped, or its event loop is blocked; configuration key handshake_timeout)"
            ) from error

    def take_page(self) -> int:
        """The descriptor of the page with the gates, which is the caller's from now on."""
        fd, self._page_fd = self._page_fd, -1
        return fd

    @property
    def told(self) -> set[int]:
        """Numbers of the regions that the target has told of, and that were not handed on yet."""
        return {info.id for info, _ in self._early}

    def follow(
        self,
        on_region: Callable[[RegionInfo, list[int]], None],
        on_removed: Callable[[int], None],
        on_ack: Callable[[LetterAck], None],
        on_end: Callable[[str, bool], None],
    ) -> None:
        """Hand on what the target tells, beginning with what it has told so far."""
        self._on_region, self._on_removed, self._on_ack, self._on_end = on_region, on_removed, on_ack, on_end
        early, self._early = self._early, []
        for info, fds in early:
            on_region(info, fds)
        if self._over is not None:
            on_end(self._over, self._leaving is not None)

    def _frame(self, frame: bytes, fds: list[int]) -> None:
        try:
            message = decode_frame(frame)
            if isinstance(message, Welcome) and self._welcome is None and len(fds) == (0 if self.remote else 1):
                self._welcome = message
                if fds:
                    self._page_fd = fds.pop()
            elif isinstance(message, RegionAdded) and self._welcome is not None:
                self._added(message.info, fds)
            elif isinstance(message, RegionRemoved) and self._welcome is not None:
                self._removed(message.id)
            elif isinstance(message, Ready) and self._welcome is not None and not self._ready.done():
                self._ready.set_result(self._welcome)
            elif isinstance(message, LetterAck) and self._on_ack is not None:
                self._on_ack(message)
            else:
                self._aside(message)
        finally:
            _close_all(fds)

    def _aside(self, message: object) -> None:
        """What may come at any time."""
        if isinstance(message, Bye):
            self._leaving = message.reason or "it left"
        elif isinstance(message, Beat):
            answer_beat(message, self.channel)
        elif isinstance(message, Refused):
            self.refused = True
            self._leaving = f"it refused the connection: {message.reason}"
        else:
            raise MetadataError(f"a target may not send {type(message).__name__} now")

    def _added(self, info: RegionInfo, fds: list[int]) -> None:
        if any(s.backing >= len(fds) for s in info.segments):
            raise MetadataError(f"region {info.name!r} names a descriptor that did not come with it")
        self._regions.add(info.id)
        if len(self._regions) > SLOTS:
            raise MetadataError(f"it tells of more than {SLOTS:,} regions, the most there are")
        if self._on_region is None:
            self._early.append((info, list(fds)))
            fds.clear()
        else:
            self._on_region(info, fds)

    def _removed(self, id: int) -> None:
        self._regions.discard(id)
        if self._on_removed is not None:
            self._on_removed(id)
            return
        for index, (info, fds) in enumerate(self._early):
            if info.id == id:
                _close_all(fds)
                del self._early[index]
                return

    def _end(self, why: str) -> None:
        self._over = self._leaving or why
        if not self._ready.done():
            self._ready.set_exception(PeerLostError(f"the peer ended while it was connected to: {self._over}"))
            self._ready.exception()  # whoever waits gets it; with nobody waiting it is no news
        if self._on_end is not None:
            self._on_end(self._over, self._leaving is not None)

    def leave(self, reason: str = "") -> None:
        """Say goodbye and close; `channel.release` lets go of the descriptors."""
        self.channel.send(encode_frame(Bye(reason)))
        self.discard()

    def discard(self) -> None:
        """Close without a goodbye, and let go of what was never followed."""
        self.channel.close()
        for _, fds in self._early:
            _close_all(fds)
        self._early.clear()
        if self._page_fd >= 0:
            os.close(self.take_page())

    def abandon(self) -> None:
        """Give up a connection that was never followed."""
        if self._welcome is None:
            self.discard()
        else:
            self.leave("it was not followed")
        self.channel.release()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
