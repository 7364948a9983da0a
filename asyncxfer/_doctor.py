"""``asyncxfer doctor``: what works on this machine, what does not, and why.

Every line is the outcome of trying, not of guessing: backends are loaded and probed, and cross-memory attach is tried
from a second process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import _plugins
from ._config import Config
from ._errors import BackendError, XferError
from ._fast import tls
from ._fast.link import permit_attach
from ._sharing import allocate

__all__ = ["Finding", "examine", "main"]

_OPTIONAL = {
    "uvloop": "a faster event loop: pip install 'asyncxfer[uvloop]'",
    "rich": "colour in `asyncxfer bench`, a bar in `asyncxfer cp`: pip install 'asyncxfer[bench]'",
    "cryptography": "PreSharedKey and `asyncxfer certs`: pip install 'asyncxfer[tls]'",
    "nixl": "the peer of `asyncxfer bench --peer nixl`: pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1",
}


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes
    ----------
    area : {"system", "memory", "backend", "optional"} or str
        The name of a backend where it is a detail of that.
    name : str
    ok : bool
    detail : str
        What it is, or why it does not work and what to do.
    """

    area: str
    name: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Look at everything."""
    return [*_system(), *_memory(), *_backends(), *_extras()]


def _system() -> Iterator[Finding]:
    from . import __version__

    yield Finding("system", "asyncxfer", True, __version__)
    yield Finding("system", "python", True, f"{platform.python_version()} ({platform.python_implementation()})")
    yield Finding("system", "kernel", sys.platform == "linux", f"{platform.system()} {platform.release()}")
    yield _tls()
    yield Finding("system", "cores", True, f"{len(os.sched_getaffinity(0))} for this process")


def _tls() -> Finding:
    try:
        return Finding("system", "TLS", True, tls.available())
    except BackendError as error:
        return Finding("system", "TLS", False, str(error))


def _memory() -> Iterator[Finding]:
    try:
        allocation = allocate(1 << 16)
    except XferError as error:
        yield Finding("memory", "shareable", False, str(error))
    else:
        sealed = allocation.file.sealed
        allocation.close()
        yield Finding("memory", "shareable", True, f"memfd, {'sealed' if sealed else 'NOT sealed'} against truncation")
    free = _huge_pages()
    yield Finding("memory", "huge pages", free > 0, f"{free} free" if free else "none reserved (vm.nr_hugepages)")
    yield _attach()


def _huge_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


# Run in a second process that is no ancestor of this one, as a peer would: read this process's memory.
_PEEK = """
import sys
from asyncxfer._fast.link import peek
pid, address, expected = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
try:
    sys.exit(0 if peek(pid, address, len(expected)) == expected else "another process's memory was read")
except OSError as error:
    sys.exit(str(error))
"""


def _attach() -> Finding:
    scope_file = Path("/proc/sys/kernel/yama/ptrace_scope")
    scope = scope_file.read_text().strip() if scope_file.exists() else "absent"
    if scope == "1":
        permit_attach(True)
    value = np.frombuffer(os.urandom(16), np.uint8).copy()
    command = [sys.executable, "-c", _PEEK, str(os.getpid()), str(value.ctypes.data), value.tobytes().hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode == 0:
        return Finding("memory", "cross-memory attach", True, f"works between processes (Yama ptrace_scope: {scope})")
    why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    advice = (
        "a container needs --cap-add=SYS_PTRACE and both agents in one PID namespace; Yama's ptrace_scope must be "
        "0 or 1; memory from Agent.allocate works without"
    )
    return Finding("memory", "cross-memory attach", False, f"{why} (Yama ptrace_scope: {scope}); {advice}")


def _backends() -> Iterator[Finding]:
    config = Config.load(None)
    for name, point in _plugins.available().items():
        try:
            backend_class = point.load()
        except (ImportError, AttributeError) as error:
            yield Finding("backend", name, False, str(error))
            continue
        try:
            yield Finding("backend", name, True, backend_class.examine(config))
        except XferError as error:
            yield Finding("backend", name, False, str(error))
        yield from (Finding(name, *detail) for detail in backend_class.details(config))


def _extras() -> Iterator[Finding]:
    for name, why in _OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        yield Finding("optional", name, found, "installed" if found else f"not installed; {why}")


def main(options: argparse.Namespace) -> int:
    """Print the findings; 0 when at least one backend works."""
    findings = examine()
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for area, name, ok, detail in findings:
            print(f"{area:<9} {name:<{width}}  {'ok' if ok else '--'}  {detail}")
    return 0 if any(finding.ok for finding in findings if finding.area == "backend") else 1
