"""A stub of the CUDA driver, built from `stubs/libcuda.c`, and processes of their own for what runs over it.

It would mislead whatever else looks for a GPU, so no test loads it into the process of the test run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["build", "run"]

_HERE = Path(__file__).parent


def build(folder: Path) -> str:
    """Compile it; the path of a libcuda.so.1 that knows no GPU but what it is told of."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the stub of the CUDA driver with")
    library = folder / "libcuda.so.1"
    options = ["-O1", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{library.name}"]
    subprocess.run([compiler, *options, "-o", library, _HERE / "stubs" / "libcuda.c"], check=True)
    return str(library)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in which nothing is set but what these variables say."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("ASYNCXFER_", "KVIKIO_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | variables,
        cwd=_HERE.parent,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
