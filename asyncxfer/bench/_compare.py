"""asyncxfer, and others beside it: the same cases in one run, interleaved round by round.

A round of ours, a round of theirs, a round of ours: whatever the machine does meanwhile happens to all, and a ratio is
the median over pairs of neighbouring rounds. While one runs, the others use no processor. Beside ours run NIXL, ours
again without encryption or checksums where those are asked for, and what a plain stream carries on the same link or
what UCX itself does over the same transports. It knows nothing of how a side moves bytes or how the result is shown.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from ._iperf import Iperf, is_stream
from ._pair import Pair, Sample
from ._perftest import Perftest, is_repeated
from ._place import LOOPBACK, Place
from ._shapes import Case, Memory, Op, Shape
from ._ucx import Ucx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._file_cases import FileCase
    from ._nixl import Thread
    from ._object_cases import ObjectCase
    from ._side import Message
    from ._ucx import Progress

Over = Literal["host", "tcp", "ucx"]

__all__ = ["OURS", "Line", "Measured", "Options", "Over", "Rival", "compare"]

#: How long the loop is watched after the rounds of a case, in seconds.
_WATCH = 0.25

OURS = "asyncxfer"
_THREADS: dict[Thread, str] = {"on": "thread on", "off": "thread off", "spin": "target spins"}


@dataclass(frozen=True, slots=True)
class Options:
    """What a run covers.

    Attributes
    ----------
    nixl : sequence of {"on", "off", "spin"}
        In which ways NIXL runs beside it, if at all: its progress thread, or how its sides are polled without.
    over : {"host", "tcp", "ucx"}
        What both systems may use: whatever is fastest on one host, TCP, or some transports of UCX.
    certificates : str or None
        Folder with those of "initiator" and "target"; ours encrypts data if there is one.
    iperf : bool
        Whether iperf3 runs beside large rows, where a plain socket does.
    ucx : Ucx
        Which transports, over UCX.
    perftest : bool
        Whether ucx_perftest runs beside what it can do, over UCX.
    prepared : sequence of bool
        Whether transfers are prepared before the clock starts; both are separate cases.
    """

    shapes: Sequence[Shape]
    memories: Sequence[Memory]
    ops: Sequence[Op]
    rounds: int
    warmup: int
    seed: int
    uvloop: bool
    nixl: Sequence[Thread]
    over: Over = "host"
    place: Place = LOOPBACK
    certificates: str | None = None
    checksum: bool = False
    iperf: bool = False
    ucx: Ucx = field(default_factory=Ucx)
    perftest: bool = False
    prepared: Sequence[bool] = (True,)

    def cases(self) -> Iterator[Case]:
        """Every shape in every memory and direction."""
        for shape in self.shapes:
            for memory in self.memories:
                for op in self.ops:
                    for prepared in self.prepared:
                        yield Case(shape, memory, op, self.seed, prepared)

    def for_ours(self, *, plain: bool = False, progress: Progress | None = None) -> Message:
        """What a worker of ours has to know of it; with `plain`, without encryption and checksums."""
        told = {"uvloop": self.uvloop, "over": self.over}
        if self.over == "ucx":
            told |= self.ucx.for_ours(progress or self.ucx.progress[0])
        if plain:
            return {**told, "certificates": None, "checksum": False}
        return {**told, "certificates": self.certificates, "checksum": self.checksum}

    def for_nixl(self, thread: Thread) -> Message:
        """What a worker of NIXL has to know of it."""
        told = {"uvloop": self.uvloop, "over": self.over, "nixl_thread": thread}
        return told | self.ucx.for_others() if self.over == "ucx" else told

    def systems(self) -> Iterator[tuple[str, str, Message]]:
        """Every system that takes rows: what to call it, what it is, and what its workers have to know."""
        yield OURS, "asyncxfer", self.for_ours()
        for progress in self.ucx.progress[1:] if self.over == "ucx" else ():
            yield f"{OURS}, {progress}", "asyncxfer", self.for_ours(progress=progress)
        if self.certificates is not None or self.checksum:
            yield f"{OURS}, plain", "asyncxfer", self.for_ours(plain=True)
        for thread in self.nixl:
            yield "NIXL" if len(self.nixl) == 1 else f"NIXL, {_THREADS[thread]}", "nixl", self.for_nixl(thread)


class Rival(Protocol):
    """Whatever can run the rounds of a case."""

    async def begin(self, case: Case, *, warmup: int) -> None:
        """Get ready for `case`."""

    async def sample(self, case: Case) -> Sample:
        """Run one round."""

    async def finish(self, case: Case) -> str:
        """Check the bytes; say what is wrong, or an empty string."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One system on one case: its rounds, and what was wrong with the bytes, if anything."""

    case: Case | FileCase | ObjectCase
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
        return self._per_gib([sample.cpu_seconds for sample in self.samples])

    @property
    def target_cpu_seconds_per_gib(self) -> float:
        """The target's part of it."""
        return self._per_gib([sample.target_cpu_seconds for sample in self.samples])

    @property
    def cpu_seconds_per_row(self) -> float:
        """CPU time of both processes for each row: median over the rounds."""
        return statistics.median(sample.cpu_seconds for sample in self.samples) / self.case.shape.count

    def _per_gib(self, values: Sequence[float]) -> float:
        return statistics.median(values) / (self.case.shape.nbytes / (1 << 30))


@dataclass(frozen=True, slots=True)
class Line:
    """One case: ours, the others that ran, by name, and how late our loop was (percentiles in seconds)."""

    case: Case | FileCase | ObjectCase
    ours: Measured
    rivals: Mapping[str, Measured]
    lateness: dict[str, float]

    @property
    def nixl(self) -> Measured | None:
        """NIXL if it ran; the fastest if it ran in several ways."""
        ran = [measured for name, measured in self.rivals.items() if name.startswith("NIXL")]
        return min(ran, key=lambda measured: measured.seconds, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times NIXL's speed."""
        return None if self.nixl is None else self.ratio_to(self.nixl)

    def ratio_to(self, theirs: Measured) -> float:
        """How many times the speed of `theirs`: median over pairs of neighbouring rounds."""
        pairs = zip(self.ours.samples, theirs.samples, strict=True)
        return statistics.median(their.seconds / our.seconds for our, their in pairs)


async def compare(options: Options, report: Callable[[str], None]) -> list[Line]:
    """Run every case of `options`; `report` hears which one is under way.

    Raises
    ------
    BenchError
        If a process of the benchmark fails.
    """
    nbytes = max(shape.span for shape in options.shapes)
    async with AsyncExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, system, told in options.systems():
            pair = Pair.start(system, told, options.place, nbytes=nbytes, memories=options.memories)
            pairs[name] = await stack.enter_async_context(pair)
        ours = pairs.pop(OURS)
        streams = await _streams(ours, options, stack) if options.over == "tcp" else {}
        bare: dict[str, Rival] = {}
        if options.over == "ucx" and options.perftest:
            bare["ucx_perftest"] = Perftest(options.place, options.ucx.transports)
        lines = []
        for case in options.cases():
            report(f"{case.shape} {case.action} {case.memory}")
            beside: dict[str, Rival] = {**pairs, **(streams if is_stream(case) else {})}
            beside |= bare if is_repeated(case) else {}
            lines.append(await _line(case, ours, beside, options))
        return lines


async def _streams(ours: Pair, options: Options, stack: AsyncExitStack) -> dict[str, Rival]:
    """What runs beside large rows: a plain socket, and iperf3 with one stream and with as many as ours has."""
    largest = max(options.cases(), key=lambda case: case.shape.nbytes)
    await ours.begin(largest, warmup=1)
    counts = {1, (await ours.initiator.ask("streams"))["streams"]}
    await ours.finish(largest)
    streams: dict[str, Rival] = {}
    told, nbytes = options.for_ours(), largest.shape.span
    socket = Pair.start("stream", told, options.place, nbytes=nbytes, memories=options.memories)
    streams["socket, 1"] = await stack.enter_async_context(socket)
    for count in sorted(counts) if options.iperf else []:
        streams[f"iperf3, {count}"] = await stack.enter_async_context(Iperf.start(options.place, streams=count))
    return streams


async def _line(case: Case, ours: Pair, rivals: Mapping[str, Rival], options: Options) -> Line:
    systems: dict[str, Rival] = {OURS: ours, **rivals}
    samples: dict[str, list[Sample]] = {name: [] for name in systems}
    for system in systems.values():
        await system.begin(case, warmup=options.warmup)
    for _ in range(options.rounds):
        for name, system in systems.items():
            samples[name].append(await system.sample(case))
    watched = await ours.initiator.ask("stall", case=case.to_message(), seconds=_WATCH)
    measured = {name: Measured(case, samples[name], await system.finish(case)) for name, system in systems.items()}
    return Line(case, measured.pop(OURS), measured, watched["lateness"])
