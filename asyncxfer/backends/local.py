"""Backend ``local``: between regions of one process, its own or those of several agents in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .._fast import engine
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
)
from ._engine import EngineBackend

__all__ = ["LocalBackend"]


class LocalBackend(EngineBackend):
    """Copies within the process, by the copy engine."""

    name: ClassVar[str] = "local"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.PROCESS, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Reach an agent of this process.

        Raises
        ------
        BackendError
            It lives in another process.
        """
        if peer.reach > Reach.PROCESS:
            raise BackendError(f"{peer.name!r} is another process")
        return Endpoint()

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer to copy."""
        return (Offer(cost=Cost(setup=1.0e-6, row=15e-9, byte=1 / 16e9)),)

    def prepare(self, request: Request) -> engine.Work:
        """Resolve addresses and cut into chunks."""
        remote = request.remote
        segments = remote.memory.segments if isinstance(remote, Registration) else remote.segments
        return self.work(request, np.array([s.address for s in segments], dtype=np.uint64), attach=False, keep=None)
