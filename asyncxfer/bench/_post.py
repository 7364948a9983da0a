"""What it costs to post: how long the call takes that begins a transfer, a row, and until the transfer is done.

The call of a prepared plan, or NIXL's ``transfer``, is timed by itself. What it includes is up to the system and the
transport: a transport that copies within the call, as cma does, has done its work when it returns, and a system that
posts only so many rows a turn has not posted the others. So beside it stand the whole time, the CPU time that the
initiator spent in it, and how often a transfer was done when its call returned. It knows pairs only.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._pair import Pair
from ._shapes import Case, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._compare import Options
    from ._side import Message

__all__ = ["POST_SHAPES", "Posted", "post"]

#: Small rows, and rows so small that next to nothing is copied.
POST_SHAPES = (Shape(16384, 4 << 10), Shape(16384, 8))

#: Transfers a round.
_COUNT = 8


@dataclass(frozen=True, slots=True)
class Posted:
    """What posting one case cost in one system.

    Attributes
    ----------
    called, ended : sequence of float
        From the call until it returned, and until the transfer was done, in seconds; one entry a transfer.
    cpu_seconds : float
        CPU time of the initiator, all transfers together.
    at_once : float
        Share of transfers that were done when their call returned.
    """

    system: str
    case: Case
    called: Sequence[float]
    ended: Sequence[float]
    cpu_seconds: float
    at_once: float
    problem: str

    @property
    def call_seconds_per_row(self) -> float:
        """Median time of the call, for each row."""
        return statistics.median(self.called) / self.case.shape.count

    @property
    def seconds_per_row(self) -> float:
        """Median time until done, for each row."""
        return statistics.median(self.ended) / self.case.shape.count

    @property
    def cpu_seconds_per_row(self) -> float:
        """CPU time of the initiator for each row."""
        return self.cpu_seconds / len(self.called) / self.case.shape.count


async def post(options: Options, report: Callable[[str], None]) -> list[Posted]:
    """Run every case in every system, interleaved.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    nbytes = max(shape.span for shape in options.shapes)
    async with AsyncExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, system, told in options.systems():
            starting = Pair.start(system, told, options.place, nbytes=nbytes, memories=options.memories)
            pairs[name] = await stack.enter_async_context(starting)
        results: list[Posted] = []
        for case in options.cases():
            report(f"{case.shape} {case.op} {case.memory}")
            results += await _case(case, pairs, options)
        return results


async def _case(case: Case, pairs: dict[str, Pair], options: Options) -> list[Posted]:
    answers: dict[str, list[Message]] = {name: [] for name in pairs}
    for pair in pairs.values():
        await pair.begin(case, warmup=options.warmup)
    for _ in range(options.rounds):
        for name, pair in pairs.items():
            pair.wake()
            answers[name].append(await pair.initiator.ask("post", count=_COUNT))
            pair.rest()
    return [_posted(name, case, answers[name], await pair.finish(case)) for name, pair in pairs.items()]


def _posted(system: str, case: Case, answers: Sequence[Message], problem: str) -> Posted:
    called, ended = ([seconds for answer in answers for seconds in answer[key]] for key in ("called", "ended"))
    at_once = sum(answer["at_once"] for answer in answers) / len(called)
    cpu_seconds = sum(answer["cpu_seconds"] for answer in answers)
    return Posted(system, case, called, ended, cpu_seconds, at_once, problem)
