"""What plain streams carry on the same link: iperf3.

It moves bytes that nobody looks at from memory to memory, so it stands beside cases of one large row only, and its time
is scaled to the size of the case. It knows cases and places, and nothing of other systems.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from ._pair import BenchError, Sample
from ._ports import free_port, in_time, until_listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._place import Place
    from ._shapes import Case

__all__ = ["INSTALL", "Iperf", "is_installed", "is_stream"]

INSTALL = "apt-get install iperf3"

_LARGE = 16 << 20
#: Bytes of a round: a quarter of a second or more.
_ROUND_BYTES = 1 << 30


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
        port = free_port()
        seat = place.target
        command = (*seat.prefix, "iperf3", "--server", "--bind", seat.address, "--port", str(port), "--forceflush")
        # It tells of its end by a signal on standard error.
        server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            async with in_time("iperf3 did not begin to listen"):
                await until_listening(server, port, "iperf3")
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
        async with in_time("iperf3 did not end"):
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
