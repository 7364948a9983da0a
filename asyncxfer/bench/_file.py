"""asyncxfer between memory and a file, and others beside it: the same cases on the same file, interleaved by rounds.

NIXL runs with its POSIX plug-in in both of its modes, KvikIO where it loads, fio beside large blocks. All of them use
one file, except fio, so that the page cache holds for one what it holds for the others; it is filled before each case
and synced before each round that writes, and after the rounds each system moves everything once more and every byte is
checked. It knows nothing of how a system moves bytes or how the result is shown.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from . import _fio
from ._compare import OURS, Line, Measured
from ._file_cases import FILE_SHAPES, Bytes, FileCase, Way, blank, pattern, problem
from ._loop import Stall
from ._pair import BenchError, Sample, Worker
from ._shapes import Memory, Op, Shape
from ._side import Message

__all__ = ["FileOptions", "compare_files", "stall_files"]

#: How long the loop is watched after the rounds of a case, in seconds.
_WATCH = 0.25


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What a run covers.

    Attributes
    ----------
    folder : str or None
        Where the file is made; None: the current folder.
    rivals : bool
        Whether others run beside it: whatever is installed, and NIXL if `nixl`.
    nixl : bool
    backend : str or None
        Which of our backends moves; None: the one that is chosen.
    memory : {"mapped", "ordinary"}
        Ours moves from and to memory of `Agent.allocate`, or the same kind of memory as the others.
    """

    shapes: Sequence[Shape] = FILE_SHAPES
    ways: Sequence[Way] = ("cached", "direct")
    ops: Sequence[Op] = ("put", "get")
    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    uvloop: bool = False
    nixl: bool = False
    rivals: bool = True
    folder: str | None = None
    backend: str | None = None
    memory: Memory = "mapped"

    def cases(self) -> Iterator[FileCase]:
        """Every shape in every direction and way."""
        for shape in self.shapes:
            for op in self.ops:
                for way in self.ways:
                    yield FileCase(shape, way, op, self.seed)

    def systems(self) -> Iterator[tuple[str, str, Message]]:
        """Every system with a process of its own: what to call it, what it is, and what its worker has to know."""
        told = {"over": "file", "uvloop": self.uvloop}
        yield OURS, "asyncxfer", {**told, "backend": self.backend, "memory": self.memory}
        if not self.rivals:
            return
        for queue in ("aio", "uring") if self.nixl else ():
            yield f"NIXL, {queue}", "nixl", {**told, "queue": queue}
        if importlib.util.find_spec("kvikio") is not None:
            yield "KvikIO", "kvikio", told


class FileRival(Protocol):
    """Whatever can run the rounds of a case."""

    async def begin(self, case: FileCase, *, warmup: int) -> None:
        """Get ready for `case`."""

    async def sample(self, case: FileCase) -> Sample:
        """Run one round."""

    async def finish(self, case: FileCase) -> str:
        """Check the bytes; say what is wrong, or an empty string."""


class _File:
    """The file that everybody uses."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path = folder / "asyncxfer-bench"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self._fd, nbytes)

    def fill(self, case: FileCase) -> None:
        """Write what a get is to read, or over what a put is to write, and have the device take it."""
        content = pattern(case.file_span, case.seed)
        if case.op == "put":
            blank(content)
        self._write(content)
        if case.way == "direct":
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write(self, content: Bytes) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(self._fd, content[done:].data, done)
        self.sync()

    def sync(self) -> None:
        """Have the device take what was written."""
        os.fdatasync(self._fd)

    def problem(self, case: FileCase) -> str:
        """Check what a put has written."""
        return problem(np.fromfile(self.path, np.uint8, case.file_span), case)

    def close(self) -> None:
        """Remove it."""
        os.close(self._fd)
        self.path.unlink()


class _System:
    """One system, in a process of its own."""

    def __init__(self, worker: Worker, file: _File) -> None:
        self.worker = worker
        self._file = file

    async def begin(self, case: FileCase, *, warmup: int) -> None:
        """Prepare `case` and run it `warmup` times."""
        await self.worker.ask("begin", case=case.to_message(), warmup=warmup)

    async def sample(self, case: FileCase) -> Sample:
        """Run one round of the case that was begun."""
        repeats = case.shape.repeats
        if case.op == "put":
            await asyncio.to_thread(self._file.sync)
        answer = await self.worker.ask("run", repeats=repeats)
        return Sample(answer["seconds"] / repeats, answer["cpu_seconds"] / repeats, answer["backend"])

    async def finish(self, case: FileCase) -> str:
        """Move once more, to what is blank, and check every byte."""
        if case.op == "put":
            await asyncio.to_thread(self._file.fill, case)
        answer = await self.worker.ask("finish", case=case.to_message())
        return await asyncio.to_thread(self._file.problem, case) if case.op == "put" else str(answer["problem"])


async def compare_files(options: FileOptions, report: Callable[[str], None]) -> list[Line]:
    """Run every case of `options`; `report` hears which one is under way, and who cannot take part.

    Raises
    ------
    BenchError
        If a process of ours or of NIXL fails, or there is no room for the file.
    """
    async with AsyncExitStack() as stack:
        folder, file, systems = await _start(stack, options, report)
        fio = _fio.Fio(folder) if _fio.is_installed() else None
        if fio is None:
            report(f"without fio, which is not installed; {_fio.INSTALL}")
        else:
            stack.callback(fio.close)
        lines = []
        for case in options.cases():
            report(str(case))
            await asyncio.to_thread(file.fill, case)
            rivals: dict[str, FileRival] = {name: system for name, system in systems.items() if name != OURS}
            if fio is not None and _fio.is_repeated(case):
                rivals["fio"] = fio
            lines.append(await _line(case, systems[OURS], rivals, options))
        return lines


async def stall_files(options: FileOptions, report: Callable[[str], None], *, seconds: float) -> list[Stall]:
    """Watch the loop for `seconds` without and `seconds` with transfers of ours, for every case.

    Raises
    ------
    BenchError
        If a process of ours fails, or there is no room for the file.
    """
    stalls = []
    async with AsyncExitStack() as stack:
        _, file, systems = await _start(stack, options, report)
        ours = systems[OURS]
        for case in options.cases():
            report(f"{case}: {2 * seconds:.0f} s")
            await asyncio.to_thread(file.fill, case)
            await ours.begin(case, warmup=options.warmup)
            idle = await ours.worker.ask("idle", within=seconds + 60, seconds=seconds)
            moving = await ours.worker.ask("watch", within=seconds + 60, seconds=seconds)
            problem = await ours.finish(case)
            late, transfers, took = moving["lateness"], moving["transfers"], moving["seconds"]
            stalls.append(Stall(case, idle["lateness"], late, None, transfers, took, problem))
    return stalls


async def _start(
    stack: AsyncExitStack, options: FileOptions, report: Callable[[str], None]
) -> tuple[Path, _File, dict[str, _System]]:
    """Make the file, and start every system that can take part; `stack` ends them."""
    cases = list(options.cases())
    nbytes, file_bytes = max(case.memory_span for case in cases), max(case.file_span for case in cases)
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncxfer-", dir=options.folder or ".")))
        file = _File(folder, file_bytes)
    except OSError as error:
        raise BenchError(f"no file can be made in {options.folder or 'this folder'}: {error}") from error
    stack.callback(file.close)
    opening: Message = {"nbytes": nbytes, "path": str(file.path), "file_bytes": file_bytes, "ways": list(options.ways)}
    systems: dict[str, _System] = {}
    for name, system, told in options.systems():
        worker = await Worker.start(system, "initiator", told)
        stack.push_async_callback(worker.close)
        unavailable = (await worker.ask("open", **opening)).get("unavailable")
        if unavailable is None:
            systems[name] = _System(worker, file)
        else:
            report(f"without {name}: {unavailable}")
    return folder, file, systems


async def _line(case: FileCase, ours: _System, rivals: Mapping[str, FileRival], options: FileOptions) -> Line:
    systems: dict[str, FileRival] = {OURS: ours, **rivals}
    samples: dict[str, list[Sample]] = {name: [] for name in systems}
    for system in systems.values():
        await system.begin(case, warmup=options.warmup)
    names = list(systems)
    for turn in range(options.rounds):
        first = turn % len(names)  # each comes after each: a disk that gives bursts remembers who was before
        for name in names[first:] + names[:first]:
            samples[name].append(await systems[name].sample(case))
    watched = await ours.worker.ask("watch", seconds=_WATCH)
    measured = {name: Measured(case, samples[name], await system.finish(case)) for name, system in systems.items()}
    return Line(case, measured.pop(OURS), measured, watched["lateness"])
