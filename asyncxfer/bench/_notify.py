"""How soon the receiver knows: from posting a put with a notification until the target's wait for it returns.

Both ends read the same clock, CLOCK_MONOTONIC, which all processes of a machine share. One put of one small row is on
its way at a time, and the next is posted a millisecond after the last ended, so that nothing waits behind another.
Ours awaits `expect`; NIXL's target polls ``get_new_notifs`` without pause. It knows pairs only.
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._pair import Pair
from ._shapes import Case, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._compare import Options, Over
    from ._side import Message

__all__ = ["Notified", "notify"]

SHAPE = Shape(1, 4 << 10)

#: Notifications a round.
_COUNT = 100


@dataclass(frozen=True, slots=True)
class Notified:
    """What one system came to.

    Attributes
    ----------
    seconds : sequence of float
        One entry a notification.
    """

    system: str
    case: Case
    over: Over
    seconds: Sequence[float]
    problem: str

    def percentile(self, percent: float) -> float:
        """How long it took at most, in this share of all, in seconds."""
        return float(np.percentile(self.seconds, percent))


async def notify(options: Options, report: Callable[[str], None], *, overs: Sequence[Over]) -> list[Notified]:
    """Run every system over each of `overs`, interleaved.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    options = dataclasses.replace(options, shapes=[SHAPE], ops=["put"])
    async with AsyncExitStack() as stack:
        pairs: dict[tuple[str, Over], Pair] = {}
        for over in overs:
            here = dataclasses.replace(options, over=over)
            for name, system, told in here.systems():
                starting = Pair.start(system, told, here.place, nbytes=SHAPE.span, memories=here.memories)
                pairs[name, over] = await stack.enter_async_context(starting)
        results: list[Notified] = []
        for case in options.cases():
            report(f"{case.shape} {case.memory}, {_COUNT * options.rounds} notifications a system")
            results += await _case(case, pairs, options)
        return results


async def _case(case: Case, pairs: dict[tuple[str, Over], Pair], options: Options) -> list[Notified]:
    seconds: dict[tuple[str, Over], list[float]] = {key: [] for key in pairs}
    for pair in pairs.values():
        await pair.begin(case, warmup=1)
        await _round(case, pair)
    for _ in range(options.rounds):
        for key, pair in pairs.items():
            seconds[key] += await _round(case, pair)
    return [
        Notified(name, case, over, seconds[name, over], await pair.finish(case)) for (name, over), pair in pairs.items()
    ]


async def _round(case: Case, pair: Pair) -> list[float]:
    message: Message = {"case": case.to_message(), "count": _COUNT}
    pair.wake()
    listening, sending = pair.target.ask("listen", **message), pair.initiator.ask("tell", **message)
    heard, told = await asyncio.gather(listening, sending)
    pair.rest()
    return [end - start for start, end in zip(told["times"], heard["times"], strict=True)]
