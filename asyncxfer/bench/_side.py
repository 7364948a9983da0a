"""One process of a pair as the bench commands it: the commands, without any system behind them.

A side is told what to do in plain values and answers in plain values. Filling and checking memory
is the same for every system and lives here; opening memory, connecting and moving bytes is what a
system adds. It knows nothing of pipes or of the process that commands it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from . import _pattern
from ._shapes import Case, Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PACE", "TELL_WITHIN", "Message", "Role", "Side", "tags"]

#: How long after one notification the next is posted, and within which one has to come; in seconds.
PACE = 0.001
TELL_WITHIN = 10.0

Message = dict[str, Any]
Role = Literal["initiator", "target"]


def tags(count: int) -> list[bytes]:
    """The notifications of a round."""
    return [b"note-%d" % number for number in range(count)]


class Side(ABC):
    """An initiator or a target of one system."""

    @abstractmethod
    async def open(self, nbytes: int, memories: Sequence[Memory]) -> str:
        """Start, register `nbytes` of each memory, and give what the other side needs, as text."""

    @abstractmethod
    async def connect(self, address: str) -> None:
        """Reach the side that gave `address`."""

    @abstractmethod
    async def prepare(self, case: Case) -> None:
        """Get everything ready that can be ready before the clock starts."""

    @abstractmethod
    async def run(self, repeats: int) -> Message:
        """Move the prepared case `repeats` times, one after the other.

        Returns
        -------
        dict
            ``seconds`` and ``cpu_seconds`` of all repeats together, and ``backend``.
        """

    @abstractmethod
    async def release(self) -> None:
        """Let go of what `prepare` made."""

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind."""

    @abstractmethod
    def memory(self, memory: Memory) -> _pattern.Bytes:
        """The bytes that `open` registered."""

    async def post(self, count: int) -> Message:
        """Move the prepared case `count` times, one after the other, with a look at the call that posts it.

        Returns
        -------
        dict
            ``called``: how long each call took that posts, in seconds; ``ended``: the same until the transfer was done;
            ``at_once``: how many were done when the call returned; ``cpu_seconds`` of all together.
        """
        raise ValueError(f"{type(self).__name__} posts nothing")

    async def tell(self, count: int) -> list[float]:
        """Move the prepared case `count` times with a notification each, one after the other; when each was posted."""
        raise ValueError(f"{type(self).__name__} has no notifications")

    async def listen(self, count: int) -> list[float]:
        """Wait for the notifications of `tell`; when each had come."""
        raise ValueError(f"{type(self).__name__} has no notifications")

    async def answer(self, message: Message) -> Message:
        """Do one command and give its answer.

        Raises
        ------
        ValueError
            If the command is not known.
        """
        do = message["do"]
        case = Case.from_message(message["case"]) if "case" in message else None
        if do == "open":
            return {"address": await self.open(message["nbytes"], message["memories"])}
        if do == "connect":
            await self.connect(message["address"])
        elif do == "run":
            return await self.run(message["repeats"])
        elif do == "release":
            await self.release()
        elif do in ("post", "tell", "listen"):
            return await self._answer_counted(do, message["count"])
        elif case is None:
            raise ValueError(f"command {do!r} is unknown, or came without its case")
        elif do == "prepare":
            await self.prepare(case)
        elif do == "fill":
            _pattern.fill(self.memory(case.memory), case)
        elif do == "blank":
            _pattern.blank(self.memory(case.memory), case)
        elif do == "check":
            return {"problem": _pattern.problem(self.memory(case.memory), case)}
        else:
            return await self.answer_more(do, case, message)
        return {}

    async def _answer_counted(self, do: str, count: int) -> Message:
        if do == "post":
            return await self.post(count)
        return {"times": await (self.tell(count) if do == "tell" else self.listen(count))}

    async def answer_more(self, do: str, case: Case, message: Message) -> Message:
        """Do a command that only some systems know."""
        raise ValueError(f"{type(self).__name__} does not know the command {do!r}")
