"""The two processes of one system, as the bench commands them.

A `Worker` is one process behind two pipes; a `Pair` is an initiator and a target that have met, and knows the order in
which a case is opened, warmed, filled, run and checked. While another system runs, a pair is either asleep on its pipes
by itself or, where it would poll, stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _ucx
from ._worker import MAX_LINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ._place import Place
    from ._shapes import Case, Memory
    from ._side import Message, Role

__all__ = ["BenchError", "Pair", "Sample", "Worker"]

_ANSWER_WITHIN = 120.0
_EXIT_WITHIN = 10.0


class BenchError(Exception):
    """A process of the benchmark failed, hung or ended."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round came to, for each of its transfers."""

    seconds: float
    cpu_seconds: float
    backend: str
    target_cpu_seconds: float = 0.0  # part of `cpu_seconds`


class Worker:
    """One process that runs ``_worker``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        # Linux numbers the CPU clock of any process so; see clock_getcpuclockid(3).
        self._clock = (~process.pid << 3) | 2

    @classmethod
    async def start(cls, system: str, role: Role, options: Message, *, prefix: Sequence[str] = ()) -> Worker:
        """Start a process as `role` of `system`, with `prefix` before its command."""
        argument = json.dumps({"system": system, "role": role, **options})
        quiet = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error"}
        process = await asyncio.create_subprocess_exec(
            *(*prefix, sys.executable, "-m", f"{__package__}._worker", argument),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            env={**quiet, **os.environ, **_transports(system, options)},
        )
        return cls(f"{system} {role}", process)

    async def ask(self, do: str, *, within: float = _ANSWER_WITHIN, **arguments: Any) -> Message:
        """Send one command and wait for its answer.

        Raises
        ------
        BenchError
            If the process reports an error, ends, or does not answer in time.
        """
        if self._process.returncode is not None:
            raise BenchError(f"{self.name} ended before {do!r}; see its error output")
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "it was asked for as a pipe"
        assert stdout is not None, "it was asked for as a pipe"
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            async with asyncio.timeout(within):
                await stdin.drain()
                line = await stdout.readline()
        except TimeoutError as error:
            raise BenchError(f"{self.name}: no answer to {do!r} in {within:.0f} s") from error
        except ConnectionError as error:
            raise BenchError(f"{self.name} ended before {do!r}; see its error output") from error
        if not line:
            raise BenchError(f"{self.name} ended during {do!r}; see its error output")
        answer: Message = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {do!r} failed: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, in seconds."""
        return time.clock_gettime(self._clock)

    def stop(self) -> None:
        """Take it off the processors until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        # A process that has ended is reported by the next `ask`, which can say during what.
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def close(self) -> None:
        """End it: by the end of its input or, if it does not hear that, by a signal."""
        if self._process.returncode is not None:
            return
        self.go_on()
        assert self._process.stdin is not None, "it was asked for as a pipe"
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_EXIT_WITHIN):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _transports(system: str, options: Message) -> dict[str, str]:
    """What keeps a process to the transports that it may use; ours is told by its configuration."""
    if options["over"] == "tcp":
        return {"UCX_TLS": "tcp"}
    return _ucx.environment(options["transports"]) if options["over"] == "ucx" and system == "nixl" else {}


class Pair:
    """An initiator and a target of one system, connected, with memory for every case.

    Parameters
    ----------
    initiator, target : Worker
    polls : bool
        Whether its processes use the processors when they have nothing to do, so that they have to be stopped.
    """

    def __init__(self, initiator: Worker, target: Worker, *, polls: bool) -> None:
        self.initiator = initiator
        self.target = target
        self._stopped_at_rest = (initiator, target) if polls else ()

    @classmethod
    @asynccontextmanager
    async def start(
        cls, system: str, options: Message, place: Place, *, nbytes: int, memories: Sequence[Memory]
    ) -> AsyncIterator[Pair]:
        """Start two processes of `system` in `place` that have each opened `memories` and are connected."""
        workers: list[Worker] = []
        roles: tuple[Role, ...] = ("initiator", "target")
        try:
            for role in roles:
                seat = place.seat(role)
                told = {**options, "address": seat.address}
                workers.append(await Worker.start(system, role, told, prefix=seat.prefix))
            initiator, target = workers
            opening = [worker.ask("open", nbytes=nbytes, memories=memories) for worker in workers]
            _, opened = await asyncio.gather(*opening)
            await initiator.ask("connect", address=opened["address"])
            pair = cls(initiator, target, polls=system == "nixl")
            pair.rest()
            yield pair
        finally:
            await asyncio.gather(*(worker.close() for worker in workers))

    def rest(self) -> None:
        """Use no processor until `wake`."""
        for worker in self._stopped_at_rest:
            worker.stop()

    def wake(self) -> None:
        """Be ready for a command."""
        for worker in self._stopped_at_rest:
            worker.go_on()

    async def begin(self, case: Case, *, warmup: int) -> None:
        """Prepare `case`, run it `warmup` times, then fill its source and blank its destination."""
        source, destination = self.initiator, self.target
        if case.op == "get":
            source, destination = destination, source
        message = case.to_message()
        self.wake()
        await self.initiator.ask("prepare", case=message)
        for _ in range(warmup):
            await self.initiator.ask("run", repeats=case.shape.repeats)
        await source.ask("fill", case=message)
        await destination.ask("blank", case=message)
        self.rest()

    async def sample(self, case: Case) -> Sample:
        """Run one round of the case that was begun."""
        repeats = case.shape.repeats
        self.wake()
        cpu = self.target.cpu_seconds()
        answer = await self.initiator.ask("run", repeats=repeats)
        target_cpu = self.target.cpu_seconds() - cpu
        self.rest()
        each = (answer["cpu_seconds"] + target_cpu) / repeats
        return Sample(answer["seconds"] / repeats, each, answer["backend"], target_cpu_seconds=target_cpu / repeats)

    async def finish(self, case: Case) -> str:
        """Check every byte of the destination; say what is wrong, or an empty string."""
        destination = self.target if case.op == "put" else self.initiator
        self.wake()
        answer = await destination.ask("check", case=case.to_message())
        await self.initiator.ask("release")
        self.rest()
        return str(answer["problem"])
