"""What moving data does to its own event loop and memory: `--stall` and `--in-flight`.

Stall: how late a ticker on the loop is while nothing moves, then while one case is moved back to
back. In flight: thousands of small transfers posted before any is awaited, several times over, and
the memory that is not given back. Both check every byte at the end, and know only pairs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._pair import Pair
from ._shapes import Case, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from ._compare import Options
    from ._file_cases import FileCase
    from ._object_cases import ObjectCase
    from ._side import Message

__all__ = ["FLOOD_SHAPES", "Flood", "Stall", "flood", "stall"]

#: One row, which the caller moves at once; and more than that is done for.
FLOOD_SHAPES = (Shape(1, 4 << 10), Shape(16, 4 << 10))

#: Bytes of memory that the transfers of a flood share, taking turns.
_FLOOD_BYTES = 128 << 20

_PASSES = 4


@dataclass(frozen=True, slots=True)
class Stall:
    """How late loops were, percentiles in seconds by name: the initiator's idle and moving, the target's meanwhile.

    Over a file, and with objects, there is no target.
    """

    case: Case | FileCase | ObjectCase
    idle: dict[str, float]
    moving: dict[str, float]
    served: dict[str, float] | None
    transfers: int
    seconds: float
    problem: str

    @property
    def gigabytes_per_second(self) -> float:
        """What was moved meanwhile, in 1e9 bytes a second."""
        return self.case.shape.nbytes * self.transfers / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class Flood:
    """Passes of `transfers` transfers each, all posted before the first is awaited.

    Attributes
    ----------
    prepared : bool
        Whether each was a prepared plan; otherwise it was a call of `put` or `get` with two lists.
    passes : list of dict
        ``in_flight``: how many were not done when the last was posted; ``seconds``; ``memory``:
        private resident bytes of the initiator ``before``, ``during`` and ``after``.
    """

    case: Case
    transfers: int
    prepared: bool
    passes: Sequence[Message]
    problem: str

    @property
    def kept_bytes(self) -> int:
        """Memory after the last pass over memory after the first, which is what warms up."""
        return int(self.passes[-1]["memory"]["after"] - self.passes[0]["memory"]["after"])


async def stall(options: Options, report: Callable[[str], None], *, seconds: float) -> list[Stall]:
    """Watch the loop for `seconds` without and `seconds` with transfers, for every case.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    results = []
    nbytes = max(shape.span for shape in options.shapes)
    async with _pair(options, nbytes) as pair:
        for case in options.cases():
            report(f"{case.shape} {case.op} {case.memory}: {2 * seconds:.0f} s")
            results.append(await _stall_of(case, pair, seconds, options.warmup))
    return results


def _pair(options: Options, nbytes: int) -> AbstractAsyncContextManager[Pair]:
    return Pair.start("asyncxfer", options.for_ours(), options.place, nbytes=nbytes, memories=options.memories)


async def _stall_of(case: Case, pair: Pair, seconds: float, warmup: int) -> Stall:
    message, within = case.to_message(), seconds + 60
    await pair.begin(case, warmup=warmup)
    idle = await pair.initiator.ask("idle", within=within, case=message, seconds=seconds)
    moving, served = await asyncio.gather(
        pair.initiator.ask("stall", within=within, case=message, seconds=seconds),
        pair.target.ask("idle", within=within, case=message, seconds=seconds),
    )
    problem = await pair.finish(case)
    transfers, took = moving["transfers"], moving["seconds"]
    return Stall(case, idle["lateness"], moving["lateness"], served["lateness"], transfers, took, problem)


async def flood(options: Options, report: Callable[[str], None], *, transfers: int) -> list[Flood]:
    """Have `transfers` transfers of every shape in flight at once, several times over.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    results = []
    wholes = {shape: _whole(shape, transfers) for shape in options.shapes}
    nbytes = max(whole.span for whole in wholes.values())
    async with _pair(options, nbytes) as pair:
        for case in options.cases():
            for prepared in (False, True):
                how = "prepared" if prepared else "called"
                report(f"{transfers} x {case.shape} {case.op} {case.memory}, {how}")
                results.append(await _flood_of(case, pair, transfers, wholes[case.shape], prepared=prepared))
    return results


def _whole(shape: Shape, transfers: int) -> Shape:
    """The rows of all transfers of `shape`, or of as many as fit; the others use the same ones again."""
    return replace(shape, count=shape.count * max(1, min(transfers, _FLOOD_BYTES // shape.span)))


async def _flood_of(case: Case, pair: Pair, transfers: int, whole: Shape, *, prepared: bool) -> Flood:
    all_rows = replace(case, shape=whole)
    order: Message = {"case": all_rows.to_message(), "transfers": transfers, "prepared": prepared}
    order["parts"] = whole.count // case.shape.count
    await pair.begin(all_rows, warmup=1)
    passes = [await pair.initiator.ask("flood", **order) for _ in range(_PASSES)]
    return Flood(case, transfers, prepared, passes, await pair.finish(all_rows))
