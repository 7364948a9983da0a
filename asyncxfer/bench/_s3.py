"""asyncxfer between memory and objects, and others beside it: the same cases on the same store, interleaved by rounds.

The store is a null server, so that what is measured is the client, or whatever speaks S3 at an endpoint. Beside ours
run aiobotocore by itself, obstore where it is installed, and NIXL's OBJ plug-in if asked for, each in a process of its
own. After the rounds each system moves everything once more; what a get has brought is checked, and what a put has left
where the store keeps it. Objects are looked after here, by the SDK; how a system moves bytes is not known.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from ._compare import OURS, Line, Measured
from ._loop import Stall
from ._null_s3 import NullServer
from ._pair import BenchError, Sample, Worker
from ._s3_cases import OBJECT_SHAPES, Link, ObjectCase
from ._s3_obstore import INSTALL as INSTALL_OBSTORE
from ._s3_side import StoreAt
from ._shapes import Op, Shape
from ._side import Message

__all__ = ["ObjectOptions", "compare_objects", "stall_objects"]

#: How long the loop is watched after the rounds of a case, in seconds.
_WATCH = 0.25
_OPENSSL = "without the program openssl there is no certificate for https; apt-get install openssl"


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """What a run covers.

    Attributes
    ----------
    rivals : bool
        Whether others run beside it: whatever is installed, and NIXL if `nixl`.
    nixl : bool
    tls : bool
        The null server speaks https.
    endpoint : str or None
        URL of the store, whose credentials the SDK finds; None: a null server.
    bucket : str
        Made if it is not there.
    """

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
        told = {"over": "s3", "uvloop": self.uvloop}
        yield OURS, "asyncxfer", told
        if not self.rivals:
            return
        yield "aiobotocore", "aiobotocore", told
        if importlib.util.find_spec("obstore") is None:
            report(f"without obstore, which is not installed; {INSTALL_OBSTORE}")
        else:
            yield "obstore", "obstore", told
        if self.nixl:
            yield "NIXL", "nixl", told


class _Objects:
    """The objects that everybody uses, as the SDK by itself sees them. What it fails at is a BenchError."""

    def __init__(self, store: StoreAt) -> None:
        self._store = store
        self._keys: set[str] = set()
        self._client: Any = None
        failures = importlib.import_module("botocore.exceptions")
        self._failures: tuple[type[Exception], ...] = (failures.BotoCoreError, failures.ClientError)

    async def reach(self) -> None:
        """Make the bucket where there is none."""
        await self._asked(self._reach)

    async def fill(self, case: ObjectCase) -> None:
        """Make what a get is to read, and leave nothing where a put is to write."""
        await self._asked(self._fill, case)

    async def problem(self, case: ObjectCase) -> str:
        """Check what a put has written."""
        wrong: int = await self._asked(self._differing, case)
        return f"{wrong} of {case.shape.count} objects differ" if wrong else ""

    async def close(self) -> None:
        """Remove them."""
        await self._asked(self._remove)

    async def _asked(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await asyncio.to_thread(call, *arguments)
        except self._failures as error:
            raise BenchError(f"{self._store.endpoint} cannot be used: {error}") from error

    def _reach(self) -> None:
        store = self._store
        session: Any = importlib.import_module("botocore.session").get_session()
        self._client = session.create_client(
            "s3",
            endpoint_url=store.endpoint,
            region_name=store.region,
            aws_access_key_id=store.access_key,
            aws_secret_access_key=store.secret_key,
            aws_session_token=store.session_token,
            verify=store.ca,
            config=importlib.import_module("botocore.config").Config(s3={"addressing_style": "path"}),
        )
        try:
            self._client.head_bucket(Bucket=store.bucket)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            self._client.create_bucket(Bucket=store.bucket)

    def _fill(self, case: ObjectCase) -> None:
        for number, key in enumerate(case.keys()):
            whole = self._store.prefix + key
            self._keys.add(whole)
            if case.op == "get":
                self._client.put_object(Bucket=self._store.bucket, Key=whole, Body=case.holds(number).tobytes())
            else:
                self._client.delete_object(Bucket=self._store.bucket, Key=whole)

    def _differing(self, case: ObjectCase) -> int:
        wrong = 0
        for number, key in enumerate(case.keys()):
            answer = self._client.get_object(Bucket=self._store.bucket, Key=self._store.prefix + key)
            content = np.frombuffer(answer["Body"].read(), np.uint8)
            wrong += not np.array_equal(content, case.holds(number))
        return wrong

    def _remove(self) -> None:
        for key in self._keys:
            self._client.delete_object(Bucket=self._store.bucket, Key=key)
        self._client.close()


class _System:
    """One system, in a process of its own."""

    def __init__(self, worker: Worker, objects: _Objects | None) -> None:
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
) -> tuple[_Objects | None, dict[str, _System]]:
    """Reach the store, and start every system that can take part; `stack` ends them."""
    prefix, objects = f"asyncxfer-bench-{os.getpid()}/", None
    if options.endpoint is None:
        certificate = _certificate(stack) if options.tls else None
        url = stack.enter_context(NullServer(certificate)).url
        ca = None if certificate is None else str(certificate)
        store = StoreAt(url, options.bucket, prefix, "us-east-1", "null", "null", ca=ca)
    else:
        store = _store_at(options.endpoint, options.bucket, prefix)
        objects = _Objects(store)
        await objects.reach()
        stack.push_async_callback(objects.close)
    nbytes = max(case.shape.span for case in options.cases())
    systems: dict[str, _System] = {}
    for name, system, told in options.systems(report):
        worker = await Worker.start(system, "initiator", told)
        stack.push_async_callback(worker.close)
        unavailable = (await worker.ask("open", nbytes=nbytes, store=store.to_message())).get("unavailable")
        if unavailable is None:
            systems[name] = _System(worker, objects)
        else:
            report(f"without {name}: {unavailable}")
    return objects, systems


def _store_at(endpoint: str, bucket: str, prefix: str) -> StoreAt:
    """With the credentials, region and authority that the SDK finds."""
    session: Any = importlib.import_module("botocore.session").get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise BenchError(f"nothing says who asks {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    frozen = credentials.get_frozen_credentials()
    region = session.get_config_variable("region") or "us-east-1"
    ca = session.get_config_variable("ca_bundle") if endpoint.startswith("https") else None
    return StoreAt(endpoint, bucket, prefix, region, frozen.access_key, frozen.secret_key, frozen.token, ca)


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
