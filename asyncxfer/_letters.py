"""Letters: notifications over a connection that may break, and be made anew: none is lost and none comes twice.

Each has a number. The sender keeps it until the receiver has acknowledged that number, and sends it again over the
next connection; the receiver knows the last number that it took. What connects them is not known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ._errors import MetadataError
from ._metadata import Letter, LetterAck, encode_frame

if TYPE_CHECKING:
    from ._stream import AnyChannel

__all__ = ["Letters", "Received"]

# Bytes on their way at a time. A receiver that is slow leaves the rest on this side; and they fit into the kernel's
# buffers, so that one that is stopped does not look to the kernel like a host that is gone.
_WINDOW = 32 * 1024


class _Kept(NamedTuple):
    seq: int
    frame: bytes
    told: Callable[[bool], None]


class Letters:
    """The sender's side, for one session."""

    def __init__(self) -> None:
        self._seq = 0
        self._waiting: deque[_Kept] = deque()
        self._sent: deque[_Kept] = deque()
        self._on_way = 0
        self._channel: AnyChannel | None = None
        self._over = False

    def post(self, kind: bytes, tag: bytes, told: Callable[[bool], None]) -> None:
        """Send a notification; `told` is called once, with whether it was delivered. This is `Link.post`."""
        if self._over:
            told(False)
            return
        self._seq += 1
        self._waiting.append(_Kept(self._seq, encode_frame(Letter(self._seq, kind, tag)), told))
        self._send()

    def attach(self, channel: AnyChannel) -> None:
        """Go on over a new connection, beginning with what was not acknowledged."""
        self._channel = channel
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._on_way = 0
        self._send()

    def _send(self) -> None:
        channel = self._channel
        if channel is None or channel.ended:
            return
        while self._waiting and self._on_way < _WINDOW:
            letter = self._waiting.popleft()
            self._sent.append(letter)
            self._on_way += len(letter.frame)
            channel.send(letter.frame)

    def acknowledged(self, ack: LetterAck) -> None:
        """Note that the receiver has all up to a number."""
        if ack.seq > self._seq or (self._waiting and ack.seq >= self._waiting[0].seq):
            raise MetadataError(f"letter {ack.seq} is acknowledged and was not sent")
        while self._sent and self._sent[0].seq <= ack.seq:
            letter = self._sent.popleft()
            self._on_way -= len(letter.frame)
            letter.told(True)
        self._send()

    def fail(self) -> None:
        """The receiver is gone: what it has not acknowledged never will be."""
        self._over = True
        self._channel = None
        lost = [*self._sent, *self._waiting]
        self._sent.clear()
        self._waiting.clear()
        for letter in lost:
            letter.told(False)


class Received:
    """The receiver's side, for one session."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, letter: Letter) -> bool:
        """Whether a letter is new; either way it is to be acknowledged.

        Raises
        ------
        MetadataError
            One before it never came.
        """
        if letter.seq <= self._last:
            return False
        if letter.seq != self._last + 1:
            raise MetadataError(f"letter {letter.seq} behind letter {self._last}")
        self._last = letter.seq
        return True
