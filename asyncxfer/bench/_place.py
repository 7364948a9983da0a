"""Where the two processes of every system run: on loopback, or in two network namespaces joined by a veth.

A seat is what a command has to be started with to run there, and the address that others reach it at. The namespaces
live as long as the ``with`` block; what a bench that was killed has left is removed by the next one. Nothing here knows
what is started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._pair import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._side import Role

__all__ = ["LOOPBACK", "Place", "Seat", "veth"]

_NAMESPACES = Path("/run/netns")
_PREFIX = "asyncxfer-bench-"
#: Nobody outside the two namespaces sees these, so every bench has the same.
_ADDRESSES = {"initiator": "10.77.255.1", "target": "10.77.255.2"}


@dataclass(frozen=True, slots=True)
class Seat:
    """One side's host: what goes before its commands, and its address."""

    prefix: tuple[str, ...]
    address: str


@dataclass(frozen=True, slots=True)
class Place:
    """Both sides' hosts, and what to call the way between them."""

    link: str
    initiator: Seat
    target: Seat

    def seat(self, role: Role) -> Seat:
        """Where `role` runs."""
        return self.initiator if role == "initiator" else self.target


LOOPBACK = Place("loopback", Seat((), "127.0.0.1"), Seat((), "127.0.0.1"))


@contextlib.contextmanager
def veth(mtu: int) -> Iterator[Place]:
    """Two namespaces with a veth between them, for as long as the block runs.

    Raises
    ------
    BenchError
        If they cannot be made; with the reason.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise BenchError("--link veth makes network namespaces: it needs root, and ip (apt-get install iproute2)")
    for path in _NAMESPACES.glob(f"{_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            _ip("netns", "delete", path.name)
    names = {role: f"{_PREFIX}{os.getpid()}-{role}" for role in _ADDRESSES}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        first, second = names.values()
        cable = ("link", "add", "eth0", "mtu", str(mtu), "type", "veth", "peer", "name", "eth0", "mtu", str(mtu))
        _ip("-n", first, *cable, "netns", second)
        for role, name in names.items():
            _ip("-n", name, "address", "add", f"{_ADDRESSES[role]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
        seats = {role: Seat(("ip", "netns", "exec", name), _ADDRESSES[role]) for role, name in names.items()}
        yield Place(f"veth, MTU {mtu}", **seats)


def _ip(*arguments: str) -> None:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise BenchError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")
