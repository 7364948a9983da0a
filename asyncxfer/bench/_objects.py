"""asyncxfer between memory and objects, and others beside it: the same cases on the same store, interleaved by rounds.

The store is a null server, so that what is measured is the client, or whatever speaks S3 or Azure at an endpoint.
Beside ours run the SDK by itself, obstore where it is installed, and NIXL's plug-in if asked for, each in a process of
its own. After the rounds each system moves everything once more; what a get has brought is checked, and what a put has
left where the store keeps it. How a system moves bytes is not known, nor how objects are made and looked at.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from ._compare import OURS, Line, Measured
from ._loop import Stall
from ._null_objects import NullServer
from ._object_cases import OBJECT_SHAPES, Link, ObjectCase
from ._object_obstore import INSTALL as INSTALL_OBSTORE
from ._object_store import Cloud, KeptObjects, store_kind
from ._pair import BenchError, Sample, Worker
from ._shapes import Op, Shape
from ._side import Message

__all__ = ["ObjectOptions", "compare_objects", "stall_objects"]

#: How long the loop is watched after the rounds of a case, in seconds.
_WATCH = 0.25
#: What runs beside ours always.
_SDKS: dict[Cloud, str] = {"s3": "aiobotocore", "azure": "azure-storage-blob"}
_OPENSSL = "without the program openssl there is no certificate for https; apt-get install openssl"


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """What a run covers.

    Attributes
    ----------
    cloud : {"s3", "azure"}
    rivals : bool
        Whether others run beside it: whatever is installed, and NIXL if `nixl`.
    nixl : bool
    tls : bool
        The null server speaks https.
    endpoint : str or None
        URL of the store, whose credentials are where its users have them; None: a null server.
    bucket : str
        Or container; made if it is not there.
    """

    cloud: Cloud = "s3"

    shapes: Sequence[Shape] = OBJECT_SHAPES
    ops: Sequence[Op] = ("put", "get")
    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    uvloop: bool = False
    nixl: bool = False
    rivals: bool = True
    tls: bool = False
    endpoint: str | None = None
    bucket: str = "asyncxfer-bench"

    @property
    def link(self) -> Link:
        """What the store speaks."""
        if self.endpoint is not None:
            return cast(Link, urlsplit(self.endpoint).scheme)
        return "https" if self.tls else "http"

    def cases(self) -> Iterator[ObjectCase]:
        """Every shape in every direction."""
        for shape in self.shapes:
            for op in self.ops:
                yield ObjectCase(shape, self.link, op, self.seed, kept=self.endpoint is not None)

    def systems(self, report: Callable[[str], None]) -> Iterator[tuple[str, str, Message]]:
        """Every system: what to call it, what it is, and what its worker has to know."""
        told = {"over": self.cloud, "uvloop": self.uvloop}
        yield OURS, "asyncxfer", told
        if not self.rivals:
            return
        sdk = _SDKS[self.cloud]
        yield sdk, sdk, told
        if importlib.util.find_spec("obstore") is None:
            report(f"without obstore, which is not installed; {INSTALL_OBSTORE}")
        else:
            yield "obstore", "obstore", told
        if self.nixl:
            yield "NIXL", "nixl", told


class _System:
    """One system, in a process of its own."""

    def __init__(self, worker: Worker, objects: KeptObjects | None) -> None:
        self.worker = worker
        self._objects = objects

    async def begin(self, case: ObjectCase, *, warmup: int) -> None:
        """Prepare `case` and run it `warmup` times."""
        await self.worker.ask("begin", case=case.to_message(), warmup=warmup)

    async def sample(self, case: ObjectCase) -> Sample:
        """Run one round of the case that was begun."""
        answer = await self.worker.ask("run", repeats=case.repeats)
        return Sample(answer["seconds"] / case.repeats, answer["cpu_seconds"] / case.repeats, answer["backend"])

    async def finish(self, case: ObjectCase) -> str:
        """Move once more, to what is blank, and check every byte that can be seen."""
        if case.op == "put" and self._objects is not None:
            await self._objects.fill(case)
        problem = (await self.worker.ask("finish", case=case.to_message()))["problem"]
        if case.op == "put" and self._objects is not None:
            return await self._objects.problem(case)
        return str(problem)


async def compare_objects(options: ObjectOptions, report: Callable[[str], None]) -> list[Line]:
    """Run every case of `options`; `report` hears which one is under way, and who cannot take part.

    Raises
    ------
    BenchError
        If a process of the benchmark fails, or the store does.
    """
    lines = []
    async with AsyncExitStack() as stack:
        objects, systems = await _start(stack, options, report)
        for case in options.cases():
            report(str(case))
            if objects is not None:
                await objects.fill(case)
            lines.append(await _line(case, systems, options))
    return lines


async def stall_objects(options: ObjectOptions, report: Callable[[str], None], *, seconds: float) -> list[Stall]:
    """Watch the loop for `seconds` without and `seconds` with transfers of ours, for every case.

    Raises
    ------
    BenchError
        If a process of ours fails, or the store does.
    """
    stalls = []
    async with AsyncExitStack() as stack:
        objects, systems = await _start(stack, options, report)
        ours = systems[OURS]
        for case in options.cases():
            report(f"{case}: {2 * seconds:.0f} s")
            if objects is not None:
                await objects.fill(case)
            await ours.begin(case, warmup=options.warmup)
            idle = await ours.worker.ask("idle", within=seconds + 60, seconds=seconds)
            moving = await ours.worker.ask("watch", within=seconds + 60, seconds=seconds)
            problem = await ours.finish(case)
            late, transfers, took = moving["lateness"], moving["transfers"], moving["seconds"]
            stalls.append(Stall(case, idle["lateness"], late, None, transfers, took, problem))
    return stalls


async def _start(
    stack: AsyncExitStack, options: ObjectOptions, report: Callable[[str], None]
) -> tuple[KeptObjects | None, dict[str, _System]]:
    """Reach the store, and start every system that can take part; `stack` ends them."""
    prefix, objects = f"asyncxfer-bench-{os.getpid()}/", None
    kind = store_kind(options.cloud)
    if options.endpoint is None:
        certificate = _certificate(stack) if options.tls else None
        url = stack.enter_context(NullServer(certificate)).url
        store = kind.of_null_server(url, options.bucket, prefix, None if certificate is None else str(certificate))
    else:
        store = kind.found(options.endpoint, options.bucket, prefix)
        objects = store.objects()
        await objects.reach()
        stack.push_async_callback(objects.close)
    nbytes = max(case.shape.span for case in options.cases())
    systems: dict[str, _System] = {}
    for name, system, told in options.systems(report):
        worker = await Worker.start(system, "initiator", told)
        stack.push_async_callback(worker.close)
        opened = await worker.ask("open", nbytes=nbytes, cloud=options.cloud, store=store.to_message())
        unavailable = opened.get("unavailable")
        if unavailable is None:
            systems[name] = _System(worker, objects)
        else:
            report(f"without {name}: {unavailable}")
    return objects, systems


def _certificate(stack: AsyncExitStack) -> Path:
    """A certificate of 127.0.0.1 that is its own authority, and its key, in one file."""
    if shutil.which("openssl") is None:
        raise BenchError(_OPENSSL)
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncxfer-bench-"))) / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    ran = subprocess.run([*command, "-keyout", path, "-out", path], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise BenchError(f"openssl: {ran.stderr.strip()}")
    return path


async def _line(case: ObjectCase, systems: Mapping[str, _System], options: ObjectOptions) -> Line:
    samples: dict[str, list[Sample]] = {name: [] for name in systems}
    for system in systems.values():
        await system.begin(case, warmup=options.warmup)
    names = list(systems)
    for turn in range(options.rounds):
        first = turn % len(names)  # each comes after each
        for name in names[first:] + names[:first]:
            samples[name].append(await systems[name].sample(case))
    watched = await systems[OURS].worker.ask("watch", seconds=_WATCH)
    measured = {name: Measured(case, samples[name], await system.finish(case)) for name, system in systems.items()}
    return Line(case, measured.pop(OURS), measured, watched["lateness"])
