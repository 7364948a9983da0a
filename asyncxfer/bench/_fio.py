"""fio with io_uring: what the device and the page cache give to a program that only moves.

It moves blocks of one size to and from a file of its own that nobody looks at, in the order of the file or in any, so
it stands beside cases with rows of that size. It knows cases, and nothing of other systems.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from ._pair import BenchError, Sample
from ._ports import in_time

if TYPE_CHECKING:
    from pathlib import Path

    from ._file_cases import FileCase

__all__ = ["DEPTH", "INSTALL", "Fio", "is_installed", "is_repeated"]

INSTALL = "apt-get install fio"

DEPTH = 32
_LARGE = 64 << 10
_DIRECTIONS = {"put": "write", "get": "read"}


def is_installed() -> bool:
    """Whether there is one."""
    return shutil.which("fio") is not None


def is_repeated(case: FileCase) -> bool:
    """Whether it does the same work: large blocks, more than one."""
    return case.shape.count > 1 and case.shape.length >= _LARGE


class Fio:
    """fio on a file in a folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "asyncxfer-bench-fio"

    async def begin(self, case: FileCase, *, warmup: int) -> None:
        """Lay its file out."""
        await self.sample(case)

    async def sample(self, case: FileCase) -> Sample:
        """Run one round."""
        shape, direction = case.shape, _DIRECTIONS[case.op]
        command = ["fio", "--name=bench", f"--filename={self._path}", "--ioengine=io_uring", "--output-format=json"]
        command += [f"--rw={direction if shape.contiguous else f'rand{direction}'}", f"--bs={shape.length}"]
        command += [f"--size={shape.nbytes}", f"--iodepth={DEPTH}", f"--direct={int(case.way == 'direct')}"]
        command += ["--invalidate=0", "--overwrite=1", f"--randseed={case.seed}"]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        async with in_time("fio did not end"):
            output, errors = await process.communicate()
        if process.returncode != 0:
            raise BenchError(f"fio: {errors.decode().strip()}")
        job: dict[str, Any] = json.loads(output)["jobs"][0]
        moved, took = job[direction]["io_bytes"], job[direction]["runtime"] / 1e3
        seconds = shape.nbytes / max(job[direction]["bw_bytes"], 1)
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * took * shape.nbytes / max(moved, 1)
        return Sample(seconds, cpu, f"io_uring, {DEPTH}")

    async def finish(self, case: FileCase) -> str:
        """Nobody looks at its bytes."""
        return ""

    def close(self) -> None:
        """Remove its file."""
        self._path.unlink(missing_ok=True)
