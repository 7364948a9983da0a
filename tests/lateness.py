"""How late an event loop comes to what is due each millisecond; run as a program, one that has nothing else to do.

On a machine that others keep busy that program is late as well, which is no fault of whoever is tested. It says
its figures, a line of JSON, when its input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Self

import numpy as np


class Lateness:
    """Counts, by tenths of a millisecond, while its block lasts."""

    def __init__(self) -> None:
        self._counts = np.zeros(20_000, np.int64)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.ensure_future(self._watch())
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._task is not None
        self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.001
            await asyncio.sleep(0.001)
            self._counts[min(int((loop.time() - due) * 1e4), len(self._counts) - 1)] += 1

    def figures(self, of: str) -> dict[str, float]:
        """Percentiles in milliseconds; names begin with `of`."""
        counts = np.cumsum(self._counts)
        return {
            f"{of}_{name}_ms": int(np.searchsorted(counts, share * counts[-1])) / 10
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1))
        }


class IdleLoop:
    """The program, from construction on."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def end(self) -> dict[str, float]:
        """End it; what was seen."""
        out, _ = self._process.communicate()
        figures: dict[str, float] = json.loads(out)
        return figures


async def main() -> None:
    """Be idle until the input ends."""
    with Lateness() as lateness:
        await asyncio.to_thread(sys.stdin.read)
    sys.stdout.write(json.dumps(lateness.figures("idle")))


if __name__ == "__main__":
    asyncio.run(main())
