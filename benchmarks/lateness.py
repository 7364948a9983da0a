"""How late the agent's loop is while objects move, beside a loop in another process that has nothing to do.

    python benchmarks/lateness.py [SECONDS]

Objects go to and come from the null server of ``asyncxfer bench --over s3``. Both loops are asyncio's and ask to run
after each millisecond; what the idle one is late by, the machine is to blame for.
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np

from asyncxfer import Agent
from asyncxfer.bench._null_objects import NullServer
from asyncxfer.bench._ticker import Ticker, percentiles

_SHAPES = ((16, 64 << 10), (1, 16 << 10), (8, 4 << 20), (1, 64 << 20))
_IDLE = "idle"


def _told(ticker: Ticker) -> str:
    return ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in percentiles(ticker.lateness).items()) + " ms"


async def _idle() -> None:
    with Ticker() as ticker:
        await asyncio.to_thread(sys.stdin.read)
    print(_told(ticker))


async def _begin_idle() -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, __file__, _IDLE, stdin=pipe, stdout=pipe)


async def _measure(url: str, seconds: float) -> None:
    options = {
        "endpoint_url": url, "aws_access_key_id": "A", "aws_secret_access_key": "S", "region_name": "us-east-1",
        "addressing_style": "path",
    }  # fmt: skip
    async with Agent("lateness") as agent, agent.open("s3://bucket/p", "w", options=options) as objects:
        for count, nbytes in _SHAPES:
            async with agent.allocate((count, nbytes), np.uint8) as region:
                for op in ("get", "put"):
                    plan = agent.prepare(op, region[:], objects[[f"{number}-{nbytes}" for number in range(count)]])
                    await plan()
                    idle = await _begin_idle()
                    await asyncio.sleep(1)  # it has started by then
                    end = time.perf_counter() + seconds
                    with Ticker() as ticker:
                        while time.perf_counter() < end:
                            await plan()
                    other, _ = await idle.communicate(b"")
                    print(
                        f"{count} x {nbytes:,} {op}: {_told(ticker)}; an idle loop: {other.decode()}",
                        end="",
                        flush=True,
                    )


def main() -> None:
    """Measure, or be the idle one."""
    if sys.argv[1:] == [_IDLE]:
        asyncio.run(_idle())
        return
    with NullServer() as server:
        asyncio.run(_measure(server.url, float(sys.argv[1]) if sys.argv[1:] else 3.0))


if __name__ == "__main__":
    main()
