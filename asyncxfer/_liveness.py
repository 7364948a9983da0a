"""Who is silent: a look now and then at when each peer was heard last, and a question where that was long ago.

Two agents of one host show each other in the page that they share that their loops turn, which costs neither of them
a wake-up; only one that does not is asked.

A process that is stopped, or whose event loop is held up, is not gone: the kernel would tell. It is suspect until it is
heard again, and so is a peer whose connection broke until it has another. This decides no more than that; what follows
is up to the peers and their users.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from ._metadata import Beat, encode_frame

if TYPE_CHECKING:
    from ._stream import AnyChannel

__all__ = ["Liveness", "Who"]

_BEATS = 3  # in the time after which a peer is suspect, so that one late answer is forgiven
_BEAT = encode_frame(Beat())


class Who(NamedTuple):
    """One start of an agent."""

    name: str
    generation: int


class Liveness:
    """Asks, and tells who has been silent for too long.

    Parameters
    ----------
    suspect_after : float, seconds
    channels : callable
        Gives the connections of now; a peer may have two.
    on_change : callable
        Called with a peer and whether it is suspect now, each time that this changes.
    """

    def __init__(
        self,
        suspect_after: float,
        channels: Callable[[], Iterable[tuple[Who, AnyChannel]]],
        on_change: Callable[[Who, bool], None],
    ) -> None:
        self._interval = suspect_after / _BEATS
        self._patience = suspect_after - self._interval
        self._channels = channels
        self._on_change = on_change
        self._suspects: set[Who] = set()
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + self._interval
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        held_up = now - self._due > self._interval  # this loop: what has come in the meantime has not been read
        for _, channel in self._channels():
            channel.feel()
            if now - channel.heard > self._interval / 2:  # otherwise it has shown itself, or said something
                channel.beat(_BEAT)
        if not held_up:
            self.look()
        self._due = now + self._interval
        self._timer = self._loop.call_at(self._due, self._beat)

    def look(self) -> None:
        """Judge every peer by its connections of now."""
        now = self._loop.time()
        heard: dict[Who, float] = {}
        broken: set[Who] = set()
        for who, channel in self._channels():
            heard[who] = max(heard.get(who, 0.0), now if channel.paused else channel.heard)
            if channel.ended:
                broken.add(who)
        self._suspects &= heard.keys()
        for who, when in heard.items():
            self._judge(who, silent=who in broken or now - when > self._patience)

    def _judge(self, who: Who, *, silent: bool) -> None:
        if silent == (who in self._suspects):
            return
        if silent:
            self._suspects.add(who)
        else:
            self._suspects.discard(who)
        self._on_change(who, silent)

    def close(self) -> None:
        """Stop."""
        self._timer.cancel()
