"""What connections cost that nothing goes over: `--idle`.

One target in a process, and many initiators in a few others, each connected and with something put. Then nobody does
anything for a while, and the CPU clocks of the processes are read before and after, from here, so that not even a
command is answered meanwhile. It knows workers only.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._pair import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._compare import Options
    from ._side import Message, Role

__all__ = ["Idle", "idle"]

#: Initiators share this many processes.
_PROCESSES = 5
_NBYTES = 64
_CONNECTED_WITHIN = 300.0
#: Time for what connecting has left to do, in seconds.
_SETTLE = 3.0


@dataclass(frozen=True, slots=True)
class Idle:
    """CPU time while nothing happened, in seconds, of the target's process and of all initiators' together."""

    system: str
    peers: int
    seconds: float
    target: float
    initiators: float

    @property
    def target_share(self) -> float:
        """Of one core."""
        return self.target / self.seconds

    @property
    def initiator_share(self) -> float:
        """Of one core, for each initiator."""
        return self.initiators / self.seconds / max(1, self.peers)


async def idle(options: Options, report: Callable[[str], None], *, seconds: float, peers: int) -> list[Idle]:
    """Watch every system of ours for `seconds`, with none and with `peers` connected.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    results = []
    for name, system, told in options.systems():
        if system != "asyncxfer":
            continue
        for count in (0, peers):
            report(f"{name}: {count} peers, {seconds:.0f} s")
            results.append(await _watch(name, options, told, seconds, count))
    return results


async def _watch(name: str, options: Options, told: Message, seconds: float, peers: int) -> Idle:
    memories = ["ordinary"]
    async with AsyncExitStack() as stack:

        async def start(system: str, role: Role, **more: object) -> Worker:
            address = options.place.seat(role).address
            worker = await Worker.start(system, role, {**told, "address": address, **more})
            stack.push_async_callback(worker.close)
            return worker

        target = await start("asyncxfer", "target")
        address = (await target.ask("open", nbytes=_NBYTES, memories=memories))["address"]
        crowds = []
        for number, agents in enumerate(_shares(peers)):
            crowd = await start("crowd", "initiator", name=f"initiator-{number}", agents=agents)
            await crowd.ask("open", nbytes=_NBYTES, memories=memories)
            await crowd.ask("connect", within=_CONNECTED_WITHIN, address=address)
            crowds.append(crowd)
        await asyncio.sleep(_SETTLE)
        workers = [target, *crowds]
        before = [worker.cpu_seconds() for worker in workers]
        await asyncio.sleep(seconds)
        used = [worker.cpu_seconds() - then for worker, then in zip(workers, before, strict=True)]
        return Idle(name, peers, seconds, used[0], sum(used[1:]))


def _shares(peers: int) -> list[int]:
    """How many initiators each process has."""
    count = min(peers, _PROCESSES)
    return [peers // count + (number < peers % count) for number in range(count)]
