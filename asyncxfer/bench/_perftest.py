"""What UCX itself does without anything around it: ucx_perftest, from the wheel of libucx or from PATH.

Its puts and gets are of one message after the other from and to the same memory, at most 32 of them under way, so it
stands beside cases that are one row as many times, posted as one transfer. It runs with error handling and
`RNDV_THRESH=inf`, as ours does, because UCX picks other protocols without. Each round is a server and a client, which
end with it; nobody looks at their bytes. It knows cases and places, and nothing of other systems.

Both processes spin from beginning to end, so their CPU time is not measured: it is twice the time of a round.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from . import _ucx
from ._pair import BenchError, Sample
from ._ports import free_port, in_time, until_listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ._place import Place, Seat
    from ._shapes import Case

__all__ = ["INSTALL", "Perftest", "is_repeated", "program"]

INSTALL = "pip install libucx-cu12"

_NAME = "ucx_perftest"
_TESTS = {"put": "ucp_put_bw", "get": "ucp_get"}
_WINDOW = 32  # its default for puts; gets would be one at a time
_LARGE = 16 << 20

#: Bytes of a round, and the least and the most messages.
_ROUND_BYTES = 512 << 20
_MESSAGES = (8, 10_000)
_WARMUP = 10

#: Of a line of iterations, latencies (of a percentile, of late, of all; in microseconds), bandwidths and rates.
_FIGURES = re.compile(r"^iterations,.*,overall_lat,.*\n *\d+,[\d.]+,[\d.]+,(?P<microseconds>[\d.]+),", re.MULTILINE)


def program() -> tuple[str, dict[str, str]] | None:
    """Where it is, and what its environment needs for it; the wheel's first, because ours uses its libraries."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, "bin", _NAME)
        if path.exists():
            return str(path), {"LD_LIBRARY_PATH": str(Path(folder, "lib"))}
    found = shutil.which(_NAME)
    return (found, {}) if found else None


def is_repeated(case: Case) -> bool:
    """Whether it does the same work."""
    shape = case.shape
    if shape.contiguous or not case.prepared:
        return False
    return shape.one and (shape.length >= _LARGE or shape.count >= _WINDOW)


class Perftest:
    """ucx_perftest over some transports, from the initiator to the target."""

    def __init__(self, place: Place, transports: str) -> None:
        found = program()
        if found is None:
            raise BenchError(f"{_NAME} is not installed; {INSTALL}")
        self._program, extra = found
        quiet = {"UCX_LOG_LEVEL": "error", "UCX_WARN_UNUSED_ENV_VARS": "n", "UCX_RNDV_THRESH": "inf"}
        self._environment = {**os.environ, **quiet, **extra, **_ucx.environment(transports)}
        self._place = place

    async def begin(self, case: Case, *, warmup: int) -> None:
        """Each round warms itself."""

    async def sample(self, case: Case) -> Sample:
        """Run one round."""
        port = free_port()
        server = await self._start(self._place.target, ["-p", str(port)])
        async with _ended(server), in_time(f"{_NAME} did not end"):
            await until_listening(server, port, _NAME)
            least, most = _MESSAGES
            messages = max(least, min(most, _ROUND_BYTES // case.shape.length))
            order = [self._place.target.address, "-p", str(port), "-t", _TESTS[case.op], "-s", str(case.shape.length)]
            order += ["-n", str(messages), "-w", str(_WARMUP), "-O", str(_WINDOW), "-e", "-f", "-v"]
            client = await self._start(self._place.initiator, order)
            async with _ended(client):
                output, errors = await client.communicate()
                await server.communicate()
        seconds = _seconds(output.decode(), errors.decode()) * case.shape.count
        return Sample(seconds, 2 * seconds, "UCX", target_cpu_seconds=seconds)

    async def finish(self, case: Case) -> str:
        """Nobody looks at its bytes."""
        return ""

    async def _start(self, seat: Seat, arguments: Sequence[str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*seat.prefix, self._program, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
        )


@contextlib.asynccontextmanager
async def _ended(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """Kill a process that is still there when the block ends."""
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def _seconds(output: str, errors: str) -> float:
    """The time of one message: a line of headings, and one of figures."""
    figures = _FIGURES.search(output)
    if figures is None:
        raise BenchError(f"{_NAME} gave no figures: {(errors or output).strip() or 'it said nothing'}")
    return float(figures["microseconds"]) * 1e-6
