"""asyncxfer, and NIXL beside it: the same cases in one run, interleaved round by round.

A round of ours, a round of theirs, a round of ours: whatever the machine does meanwhile happens to
both, and the ratio is the median over pairs of neighbouring rounds. While one runs, the other uses
no processor. It knows nothing of how a side moves bytes or how the result is shown.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._pair import Pair, Sample
from ._shapes import Case, Memory, Op, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._side import Message

__all__ = ["Line", "Measured", "Options", "compare"]

#: How long the loop is watched after the rounds of a case, in seconds.
_WATCH = 0.25


@dataclass(frozen=True, slots=True)
class Options:
    """What a run covers; ``nixl`` says whether NIXL runs beside it."""

    shapes: Sequence[Shape]
    memories: Sequence[Memory]
    ops: Sequence[Op]
    rounds: int
    warmup: int
    seed: int
    uvloop: bool
    nixl: bool
    nixl_progress_thread: bool

    def cases(self) -> Iterator[Case]:
        """Every shape in every memory and direction."""
        for shape in self.shapes:
            for memory in self.memories:
                for op in self.ops:
                    yield Case(shape, memory, op, self.seed)

    def for_worker(self) -> Message:
        """What a worker has to know of it."""
        return {"uvloop": self.uvloop, "nixl_progress_thread": self.nixl_progress_thread}


@dataclass(frozen=True, slots=True)
class Measured:
    """One system on one case: its rounds, and what was wrong with the bytes, if anything."""

    case: Case
    samples: Sequence[Sample]
    problem: str

    @property
    def seconds(self) -> float:
        """Median time of one transfer."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def gigabytes_per_second(self) -> float:
        """Throughput of the median transfer, in 1e9 bytes a second."""
        return self.case.shape.nbytes / self.seconds / 1e9

    @property
    def cpu_seconds_per_gib(self) -> float:
        """CPU time of both processes for each GiB moved: median over the rounds."""
        median = statistics.median(sample.cpu_seconds for sample in self.samples)
        return median / (self.case.shape.nbytes / (1 << 30))


@dataclass(frozen=True, slots=True)
class Line:
    """One case: ours, theirs if it ran, and how late our loop was (percentiles in seconds)."""

    case: Case
    ours: Measured
    nixl: Measured | None
    lateness: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """How many times NIXL's speed: median over pairs of neighbouring rounds."""
        if self.nixl is None:
            return None
        pairs = zip(self.ours.samples, self.nixl.samples, strict=True)
        return statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs)


async def compare(options: Options, report: Callable[[str], None]) -> list[Line]:
    """Run every case of `options`; `report` hears which one is under way.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    nbytes = max(shape.span for shape in options.shapes)
    async with AsyncExitStack() as stack:
        pairs = {
            system: await stack.enter_async_context(
                Pair.start(system, options.for_worker(), nbytes=nbytes, memories=options.memories)
            )
            for system in (("asyncxfer", "nixl") if options.nixl else ("asyncxfer",))
        }
        lines = []
        for case in options.cases():
            report(f"{case.shape} {case.op} {case.memory}")
            lines.append(await _line(case, pairs, options))
        return lines


async def _line(case: Case, pairs: dict[str, Pair], options: Options) -> Line:
    samples: dict[str, list[Sample]] = {system: [] for system in pairs}
    for pair in pairs.values():
        await pair.begin(case, warmup=options.warmup)
    for _ in range(options.rounds):
        for system, pair in pairs.items():
            samples[system].append(await pair.sample(case))
    initiator = pairs["asyncxfer"].initiator
    watched = await initiator.ask("stall", case=case.to_message(), seconds=_WATCH)
    measured = {system: Measured(case, samples[system], await pair.finish(case)) for system, pair in pairs.items()}
    return Line(case, measured["asyncxfer"], measured.get("nixl"), watched["lateness"])
