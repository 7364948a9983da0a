"""Backend ``shm``: between processes of one host, by memory that both have mapped, or by cross-memory attach.

``mapped``: the peer's region lies in a file in memory (a memfd, ``/dev/shm``) whose descriptor came over the control
channel; it is mapped here once and copied to and from like memory of our own. ``attach``: any other memory of the
peer, by process_vm_readv and process_vm_writev, up to 1,024 rows a call, where the kernel permits it. With neither
does the peer run a line of code for data to move.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .._fast import engine
from .._fast.link import peek, permit_attach
from .._fast.memory import Mapping
from ..abc import (
    BackendError,
    Capabilities,
    Cost,
    Endpoint,
    MemoryKind,
    Offer,
    Op,
    PeerInfo,
    Reach,
    Registration,
    RemoteRegistration,
    Request,
    Segment,
)
from ._engine import EngineBackend

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["ShmBackend"]

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


@dataclass(slots=True, eq=False)
class _Remote(RemoteRegistration):
    """A peer's region: mapped here, or why it is not."""

    mappings: tuple[Mapping, ...] = ()
    unmapped: str = ""


class _Endpoint(Endpoint):
    """A process of this host.

    Attributes
    ----------
    refused : str
        Why cross-memory attach does not work with it; empty where it does.
    """

    def __init__(self, refused: str) -> None:
        self.refused = refused

    def attach(
        self, kind: MemoryKind, segments: tuple[Segment, ...], backings: Sequence[tuple[int, int] | None], export: bytes
    ) -> RemoteRegistration:
        """Map the region if all of it can be mapped."""
        if any(backing is None for backing in backings):
            return _Remote(kind, segments, unmapped="ordinary memory of the peer (see Agent.allocate)")
        mappings = []
        try:
            for segment, backing in zip(segments, backings, strict=True):
                assert backing is not None
                mappings.append(_map(backing[0], backing[1], segment.nbytes))
        except (OSError, ValueError) as error:
            return _Remote(kind, segments, unmapped=f"the file that the peer shares cannot be mapped: {error}")
        return _Remote(kind, segments, mappings=tuple(mappings))


def _map(fd: int, offset: int, nbytes: int) -> Mapping:
    size = os.fstat(fd).st_size
    if offset + nbytes > size:
        raise ValueError(f"it has {size} bytes, the region needs {offset + nbytes}")
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    return Mapping(fd, offset, nbytes, writable=writable)


class ShmBackend(EngineBackend):
    """Copies to and from other processes of this host, by the copy engine."""

    name: ClassVar[str] = "shm"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.HOST, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say whether peers can attach, and let them where Yama wants to be told."""
        scope = _YAMA.read_text().strip() if _YAMA.exists() else ""
        if scope == "1":
            permit_attach(True)
            return "ready; Yama's ptrace_scope is 1, so this process has declared that its user's processes may attach"
        if scope in ("2", "3"):
            return f"mapped memory only: Yama's ptrace_scope is {scope}, which denies cross-memory attach"
        return "ready"

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Reach a process of this host, and find out whether cross-memory attach works with it.

        Raises
        ------
        BackendError
            It is on another host.
        """
        if peer.reach > Reach.HOST:
            raise BackendError(f"{peer.name!r} is on another host")
        return _Endpoint(_refusal(peer))

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer mapped memory where there is some, and attach where it works."""
        if not isinstance(remote, _Remote) or not isinstance(endpoint, _Endpoint):
            return (Offer(reason="both sides belong to this agent"),)
        mapped = Offer("mapped", reason=remote.unmapped)
        if remote.mappings:
            if op == "put" and any(m.readonly for m in remote.mappings):
                mapped = Offer("mapped", reason="the peer shares this region for reading only")
            else:
                mapped = Offer("mapped", Cost(setup=1.5e-6, row=20e-9, byte=1 / 15e9))
        attach = Offer("attach", Cost(setup=2.5e-6, row=250e-9, byte=1 / 11e9))
        return mapped, Offer("attach", reason=endpoint.refused) if endpoint.refused else attach

    def prepare(self, request: Request) -> engine.Work:
        """Resolve addresses and cut into chunks."""
        remote = request.remote
        assert isinstance(remote, _Remote)
        if request.via == "mapped":
            bases = np.array([m.address for m in remote.mappings], dtype=np.uint64)
            return self.work(request, bases, attach=False, keep=remote.mappings)
        bases = np.array([s.address for s in remote.segments], dtype=np.uint64)
        return self.work(request, bases, attach=True, keep=None)


def _refusal(peer: PeerInfo) -> str:
    """Why this process may not read the peer's memory; empty where it may."""
    address, value = peer.probe
    if peer.pid <= 0:
        return "the peer lives in another PID namespace (another container)"
    try:
        found = peek(peer.pid, address, len(value))
    except PermissionError:
        scope = _YAMA.read_text().strip() if _YAMA.exists() else "absent"
        return (
            "process_vm_readv is denied (EPERM): a container without CAP_SYS_PTRACE, a seccomp filter, another user, "
            f"or Yama (ptrace_scope is {scope})"
        )
    except OSError as error:
        return f"process_vm_readv fails: {error.strerror}"
    if found != value:
        return f"process {peer.pid} is another process than the peer (PID namespaces differ)"
    return ""
