"""The processes that a traffic goes between, as seen from here: how they are started, commanded and ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from asyncxfer.bench._pair import BenchError, Worker
from asyncxfer.bench._worker import MAX_LINE

from ._errors import KvbenchError
from ._pattern import Step, Traffic, Transfer

__all__ = ["Ranks"]

_WITHIN = 120.0  # seconds, besides the gaps, until all steps are done
_SOON = 0.05  # seconds until ranks that are told to begin together do


class Ranks:
    """One process a rank, each connected to those it puts to."""

    def __init__(self, traffic: Traffic, workers: Sequence[Worker]) -> None:
        self._traffic = traffic
        self._workers = workers
        self._runs = 0

    @classmethod
    @asynccontextmanager
    async def start(cls, traffic: Traffic, over: str) -> AsyncIterator[Ranks]:
        """Start them, with memory for all transfers.

        Raises
        ------
        KvbenchError
            One of them fails, now or until they are ended.
        """
        workers: list[Worker] = []
        try:
            for rank in range(traffic.ranks):
                workers.append(await _start(rank, over))  # noqa: PERF401 - those that have started are ended
            opening = [_open(worker, *traffic.memory(rank)) for rank, worker in enumerate(workers)]
            opened = await asyncio.gather(*opening)
            for rank, worker in enumerate(workers):
                targets = {transfer.target for transfer in traffic.transfers if transfer.source == rank}
                await worker.ask("connect", peers={target: opened[target] for target in sorted(targets)})
            yield cls(traffic, workers)
        except BenchError as error:
            raise KvbenchError(str(error)) from error
        finally:
            with contextlib.suppress(BenchError):
                await asyncio.gather(*(worker.close() for worker in workers))

    async def fill(self) -> None:
        """Write what is to be moved, and blank where it goes."""
        for rank, worker in enumerate(self._workers):
            await worker.ask("fill", transfers=_plain(one for one in self._traffic.transfers if one.source == rank))

    async def problems(self) -> list[str]:
        """Look at every byte that was received; what is wrong."""
        found: list[str] = []
        for rank, worker in enumerate(self._workers):
            received = _plain(one for one in self._traffic.transfers if one.target == rank)
            found += (await worker.ask("check", transfers=received))["problems"]
        return found

    async def together(self, steps: Sequence[Step]) -> dict[int, float]:
        """Let all ranks go through `steps` at the same time; seconds of each transfer, by its number."""
        self._runs += 1
        begin, within = time.monotonic() + _SOON, _WITHIN + sum(step.gap for step in steps)
        asking = []
        for rank, worker in enumerate(self._workers):
            told = [
                {
                    "gap": step.gap,
                    "puts": _plain(one for one in step.transfers if one.source == rank),
                    "expects": [one.number for one in step.transfers if one.target == rank],
                }
                for step in steps
            ]
            asking.append(worker.ask("run", within=within, steps=told, tag=f"run-{self._runs}", begin=begin))
        seconds: dict[int, float] = {}
        for answer in await asyncio.gather(*asking):
            seconds |= {int(number): float(value) for number, value in answer["seconds"].items()}
        return seconds


def _plain(transfers: Iterable[Transfer]) -> list[dict[str, int]]:
    return [dataclasses.asdict(transfer) for transfer in transfers]


async def _open(worker: Worker, sent: int, received: int) -> str:
    return str((await worker.ask("open", sent=sent, received=received))["metadata"])


async def _start(rank: int, over: str) -> Worker:
    options = {"rank": rank, "over": over, "address": "127.0.0.1", "certificates": None, "uvloop": False}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{__package__}._rank", json.dumps(options)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_LINE,
    )
    return Worker(f"rank {rank}", process)
