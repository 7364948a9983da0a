"""What plain streams carry on the same link: iperf3.

It moves bytes that nobody looks at from memory to memory, so it stands beside cases of one large row only, and its time
is scaled to the size of the case. It knows cases and places, and nothing of other systems.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._pair import BenchError, Sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._place import Place
    from ._shapes import Case

__all__ = ["INSTALL", "Iperf", "is_installed", "is_stream"]

INSTALL = "apt-get install iperf3"

_LARGE = 16 << 20
#: Bytes of a round: a quarter of a second or more.
_ROUND_BYTES = 1 << 30
_WITHIN = 60.0
_LISTENING = "0A"  # as /proc/net/tcp writes it


def is_installed() -> bool:
    """Whether there is one."""
    return shutil.which("iperf3") is not None


def is_stream(case: Case) -> bool:
    """Whether a stream of bytes does the same work."""
    return case.shape.count == 1 and case.shape.length >= _LARGE


class Iperf:
    """iperf3 with a number of streams, from the initiator to the target or, for gets, back."""

    def __init__(self, place: Place, port: int, streams: int) -> None:
        self._port = port
        self._streams = streams
        self._place = place

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, place: Place, *, streams: int) -> AsyncIterator[Iperf]:
        """Run its server, which sleeps between rounds."""
        port = _free_port()
        seat = place.target
        command = (*seat.prefix, "iperf3", "--server", "--bind", seat.address, "--port", str(port), "--forceflush")
        # It tells of its end by a signal on standard error.
        server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            async with _in_time("iperf3 did not begin to listen"):
                await _until_listening(server, port)
            yield cls(place, port, streams)
        finally:
            server.terminate()
            await server.communicate()

    async def begin(self, case: Case, *, warmup: int) -> None:
        """Run it once, so that both processes are warm."""
        await self.sample(case)

    async def sample(self, case: Case) -> Sample:
        """Run one round."""
        command = [*self._place.initiator.prefix, "iperf3", "--client", self._place.target.address, "--json"]
        command += ["--port", str(self._port), "--bytes", str(_ROUND_BYTES), "--parallel", str(self._streams)]
        command += ["--reverse"] if case.op == "get" else []
        client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        async with _in_time("iperf3 did not end"):
            output, _ = await client.communicate()
        answer: dict[str, Any] = json.loads(output)
        if "error" in answer:
            raise BenchError(f"iperf3: {answer['error']}")
        end = answer["end"]
        seconds = case.shape.nbytes * 8 / end["sum_received"]["bits_per_second"]
        used = end["cpu_utilization_percent"]
        shares = [used["host_total"] / 100, used["remote_total"] / 100]
        return Sample(seconds, sum(shares) * seconds, f"{self._streams} TCP", target_cpu_seconds=shares[1] * seconds)

    async def finish(self, case: Case) -> str:
        """Nobody looks at its bytes."""
        return ""


@contextlib.asynccontextmanager
async def _in_time(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_WITHIN):
            yield
    except TimeoutError as error:
        raise BenchError(f"{what} in {_WITHIN:.0f} s") from error


async def _until_listening(process: asyncio.subprocess.Process, port: int) -> None:
    """Watch the kernel's table of the process's own network, because connecting would count as a client."""
    while process.returncode is None:
        if _listens(process.pid, port):
            return
        await asyncio.sleep(0.005)
    raise BenchError("iperf3 ended before it listened")


def _listens(pid: int, port: int) -> bool:
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return any(row[3] == _LISTENING and row[1].endswith(f":{port:04X}") for row in rows)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
