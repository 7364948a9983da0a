"""A peer in a real second process, commanded over pipes.

Owns the process: it ends with the ``async with``, however that is left. It does not use the event loop's child
watching, so it serves any loop, or several in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Literal, Self

import asyncxfer

from ._target import Access, Target
from ._wire import receive, send

__all__ = ["PeerProcess"]


class PeerProcess(Target):
    """An agent in a process of its own as the other side; ``async with`` starts and ends it.

    Parameters
    ----------
    name : str
        Of the agent.
    backends : sequence of str or None
        Names, or ``"module:Class"`` of one that is not installed; None for all that load.
    listen : str or None
    config : mapping or None
        As for `Agent`.
    secret : str or None
        Of a `PreSharedKey` to give it as its credentials.
    python : sequence of str
        The command that runs Python, for wrappers such as ``("strace", "python")``.
    """

    def __init__(
        self,
        name: str = "target",
        *,
        backends: Sequence[str] | None = None,
        listen: str | None = None,
        config: Mapping[str, Any] | None = None,
        secret: str | None = None,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        told = {
            "name": name,
            "backends": None if backends is None else list(backends),
            "listen": listen,
            "config": dict(config or {}),
            "secret": secret,
        }
        self._command = [*python, "-m", "asyncxfer.testing._serve", json.dumps(told)]
        self._process: subprocess.Popen[bytes] | None = None
        self._metadata = b""
        self._turn = threading.Lock()

    async def __aenter__(self) -> Self:
        """Start the process and wait for its agent.

        Raises
        ------
        BackendError
            It ended instead; what it wrote stands in this process's standard error.
        """
        pipe = subprocess.PIPE
        self._process = await asyncio.to_thread(subprocess.Popen, self._command, stdin=pipe, stdout=pipe)
        try:
            _, self._metadata = await asyncio.to_thread(receive, self._pipes[1])
        except EOFError as error:
            await self._end()
            raise asyncxfer.BackendError(f"the second process did not start an agent: {self._command}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process: by closing its pipe, or by force when it is stopped or does not answer."""
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # what was not yet sent when it ended
                pipe.close()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        process = self._process
        assert process is not None, "use `async with PeerProcess(...)`"
        assert process.stdin is not None
        assert process.stdout is not None
        return process.stdin, process.stdout

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None, "use `async with PeerProcess(...)`"
        return self._process.pid

    def send_signal(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal."""
        assert self._process is not None, "use `async with PeerProcess(...)`"
        self._process.send_signal(number)

    async def _call(
        self, call: str, *args: object, body: bytes = b"", place: Literal["", "first", "last"] = "", **named: object
    ) -> tuple[Any, bytes]:
        head = {"call": call, "args": args, "named": named, "body": place}
        reply, data = await asyncio.to_thread(self._exchange, head, body)
        if "error" in reply:
            kind = getattr(asyncxfer, reply["error"], RuntimeError)
            raise kind(f"in the second process: {reply['text']}")
        return reply.get("result"), data

    def _exchange(self, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        commands, answers = self._pipes
        with self._turn:
            try:
                send(commands, head, body)
                return receive(answers)
            except (EOFError, BrokenPipeError) as error:
                raise asyncxfer.BackendError(f"the second process ended before it answered {head['call']!r}") from error

    async def renew(self) -> None:
        """Replace its agent by a new one of the same name, which has no regions: cheaper than a new process."""
        self._metadata = (await self._call("renew"))[1]

    # -- what tests ask of it

    def metadata(self) -> bytes:
        """What `Agent.connect` needs to reach it."""
        return self._metadata

    async def open(self, name: str, shape: Sequence[int], *, access: Access = "rw", shared: bool = False) -> None:
        """Make a region of bytes."""
        await self._call("open", name, list(shape), access=access, shared=shared)

    async def close(self, name: str) -> None:
        """Close a region."""
        await self._call("close", name)

    async def write(self, name: str, data: bytes) -> None:
        """Set all bytes of a region."""
        await self._call("write", name, body=data, place="last")

    async def read(self, name: str) -> bytes:
        """Give all bytes of a region."""
        return (await self._call("read", name))[1]

    async def expect(self, tag: bytes, *, then_read: str | None = None, timeout: float | None = None) -> bytes:
        """Wait for a notification, and give the bytes of a region as they are when it has come."""
        return (await self._call("expect", body=tag, place="first", then_read=then_read, timeout=timeout))[1]

    async def stats(self) -> dict[str, Any]:
        """Give `Agent.stats`."""
        stats: dict[str, Any] = (await self._call("stats"))[0]
        return stats

    async def leave(self) -> None:
        """Close the agent; the process stays until the end."""
        await self._call("leave")
