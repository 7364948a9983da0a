"""The program that runs as one rank of a traffic: an agent, the memory that it sends from and receives into, commands.

It knows the transfers it is told of, and its peers by what they said of themselves; not the traffic as a whole. The
clock runs from a put to its awaited result.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncxfer.bench._ours import agent
from asyncxfer.bench._worker import run

from ._pattern import Transfer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncxfer import DescriptorList, Peer, Region

__all__ = ["Rank"]

Message = dict[str, Any]

_WITHIN = 60.0  # seconds, for a notification that is due
_BLANK = 0xA5
_STEP = np.uint64(0x9E3779B97F4A7C15)  # multiples of it never repeat


class Rank:
    """One rank, as `_ranks` commands it."""

    def __init__(self, options: Message) -> None:
        self._agent = agent(f"rank-{options['rank']}", options)
        self._regions: dict[str, Region] = {}
        self._peers: dict[int, Peer] = {}

    async def answer(self, message: Message) -> Message:
        """Do one command and give its answer.

        Raises
        ------
        ValueError
            The command is not known.
        """
        do, transfers = message["do"], [Transfer(**one) for one in message.get("transfers", [])]
        if do == "open":
            return {"metadata": await self._open(message["sent"], message["received"])}
        if do == "connect":
            for rank, metadata in message["peers"].items():
                self._peers[int(rank)] = await self._agent.connect(base64.b64decode(metadata))
        elif do == "fill":
            self._regions["received"].array[:] = _BLANK
            for transfer in transfers:
                place = slice(transfer.source_offset, transfer.source_offset + transfer.span)
                self._regions["sent"].array[place] = _source(transfer)
        elif do == "run":
            return {"seconds": await self._run(message)}
        elif do == "check":
            return {"problems": [problem for transfer in transfers if (problem := self._problem(transfer))]}
        else:
            raise ValueError(f"command {do!r} is unknown")
        return {}

    async def close(self) -> None:
        """Leave nothing behind."""
        self._regions.clear()
        await self._agent.aclose()

    async def _open(self, sent: int, received: int) -> str:
        await self._agent.start()
        for name, nbytes in (("sent", sent), ("received", received)):
            region = await self._agent.allocate((max(nbytes, 8),), np.uint8, name=name)
            region.array[:] = 1  # every page is there before anything is timed
            self._regions[name] = region
        return base64.b64encode(self._agent.metadata()).decode()

    async def _run(self, message: Message) -> dict[int, float]:
        """All steps, one after the other: compute, put at once, wait for what others put here."""
        tag: str = message["tag"]
        seconds: dict[int, float] = {}
        await asyncio.sleep(max(0.0, message["begin"] - time.monotonic()))
        for step in message["steps"]:
            if step["gap"]:
                await asyncio.sleep(step["gap"])
            puts = [Transfer(**one) for one in step["puts"]]
            times = await asyncio.gather(*(self._timed(transfer, _tag(tag, transfer.number)) for transfer in puts))
            seconds |= dict(zip((transfer.number for transfer in puts), times, strict=True))
            for number in step["expects"]:
                await self._agent.expect(_tag(tag, number), timeout=_WITHIN)
        return seconds

    async def _timed(self, transfer: Transfer, tag: bytes) -> float:
        here, there = self._lists(transfer)
        start = time.perf_counter()
        await self._agent.put(here, there, notify=tag)
        return time.perf_counter() - start

    def _lists(self, transfer: Transfer) -> tuple[DescriptorList, DescriptorList]:
        offsets, lengths = _rows(transfer)
        here = self._regions["sent"].descriptors(offsets + np.uint64(transfer.source_offset), lengths)
        there = self._peers[transfer.target]["received"]
        return here, there.descriptors(offsets + np.uint64(transfer.target_offset), lengths)

    def _problem(self, transfer: Transfer) -> str:
        """Compare what was received with what it must be; say what is wrong, or an empty string."""
        place = slice(transfer.target_offset, transfer.target_offset + transfer.span)
        expected = np.full(transfer.span, _BLANK, np.uint8)
        source = _source(transfer)
        for offset, length in zip(*(array.tolist() for array in _rows(transfer)), strict=True):
            expected[offset : offset + length] = source[offset : offset + length]
        wrong = int((self._regions["received"].array[place] != expected).sum())
        return f"{wrong} bytes from rank {transfer.source} to {transfer.target} are wrong" if wrong else ""


def _tag(tag: str, number: int) -> bytes:
    return f"{tag}-{number}".encode()


def _rows(transfer: Transfer) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Offsets and lengths of its rows, from where they begin: (n,) uint64 each, bytes."""
    row = transfer.row or transfer.nbytes
    starts = np.arange(0, transfer.nbytes, row, dtype=np.uint64)
    return starts * np.uint64(2), np.minimum(np.uint64(row), np.uint64(transfer.nbytes) - starts)


def _source(transfer: Transfer) -> NDArray[np.uint8]:
    """What its source holds: every word is unique to its place and to the transfer."""
    words = np.arange(transfer.span // 8, dtype=np.uint64) + np.uint64(transfer.number << 40)
    return (words * _STEP).view(np.uint8)


if __name__ == "__main__":
    run(Rank)
