"""Peers: other agents as this one sees them, their regions, and whether they are still there."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, NamedTuple

from ._errors import PeerLostError, RegistrationError, TransferTimeout
from ._metadata import AgentMetadata

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._fast.link import Link
    from ._region import RemoteRegion
    from ._transfer import Transfer
    from .abc import Endpoint, PeerInfo

__all__ = ["Peer", "PeerEvent", "PeerState"]


class PeerState(enum.StrEnum):
    """Where a peer stands."""

    JOINED = "joined"
    SUSPECT = "suspect"
    LOST = "lost"
    RESTARTED = "restarted"
    LEFT = "left"


class PeerEvent(NamedTuple):
    """A change of a peer's state.

    Attributes
    ----------
    peer : str
    generation : int
        Which start of the agent of that name.
    state : PeerState
    """

    peer: str
    generation: int
    state: PeerState


class Peer:
    """Another agent, reached through `Agent.connect`; ``peer["kv"]`` is its region of that name.

    Attributes
    ----------
    name : str
    generation : int
        Grows with each start of an agent of that name.
    state : PeerState
    """

    def __init__(
        self, metadata: AgentMetadata, info: PeerInfo, *, notify: Callable[[Peer, bytes], Transfer],
        leave: Callable[[Peer], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.name = metadata.name
        self.generation = metadata.generation
        self.metadata = metadata
        self.info = info
        self.state = PeerState.JOINED
        self.lost: str | None = None
        self.endpoints: dict[str, Endpoint] = {}
        self.refusals: dict[str, str] = {}
        self._regions: dict[str, RemoteRegion] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._notify = notify
        self._leave = leave

    @property
    def link(self) -> Link:
        """The connection, for native code."""
        return self.info.link

    @property
    def regions(self) -> dict[str, RemoteRegion]:
        """Its regions by name, as of now."""
        return dict(self._regions)

    def __getitem__(self, name: str) -> RemoteRegion:
        """Return a region by name.

        Raises
        ------
        PeerLostError
            The peer is gone.
        RegistrationError
            It has no region of that name now; see `region` to wait for one.
        """
        self.check_joined()
        try:
            return self._regions[name]
        except KeyError:
            known = ", ".join(map(repr, self._regions)) or "none"
            raise RegistrationError(
                f"peer {self.name!r} has no region {name!r}; its regions are: {known}. "
                f"`await peer.region({name!r}, timeout=...)` waits for it"
            ) from None

    async def region(self, name: str, *, timeout: float | None = None) -> RemoteRegion:
        """Wait until the peer has a region of this name.

        Parameters
        ----------
        name : str
        timeout : float or None, seconds

        Raises
        ------
        PeerLostError
            The peer is gone.
        TransferTimeout
            It did not register one in time.
        """
        try:
            async with asyncio.timeout(timeout):
                while name not in self._regions:
                    self.check_joined()
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiting.append(waiter)
                    await waiter
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"peer {self.name!r} registered no region {name!r} within {timeout} s") from error
        return self[name]

    def notify(self, tag: bytes) -> Transfer:
        """Send a bare notification; like a put it is posted at once, and can be awaited.

        Raises
        ------
        PeerLostError
            The peer is gone.
        """
        self.check_joined()
        return self._notify(self, tag)

    async def aclose(self) -> None:
        """Leave the peer; transfers in flight to it end first."""
        await self._leave(self)

    def check_joined(self) -> None:
        """Raise PeerLostError when it is gone."""
        if self.lost is not None:
            raise PeerLostError(self.lost)

    # -- for the agent

    def add(self, region: RemoteRegion) -> None:
        """Note a region of the peer."""
        region.closed = self.lost
        self._regions[region.name] = region
        self._wake()

    def remove(self, id: int) -> RemoteRegion | None:
        """Forget a region of the peer."""
        for name, region in self._regions.items():
            if region.info.id == id:
                region.closed = f"peer {self.name!r} has deregistered its region {region.name!r}"
                return self._regions.pop(name)
        return None

    def find(self, id: int) -> RemoteRegion | None:
        """Give the region of a number."""
        return next((region for region in self._regions.values() if region.info.id == id), None)

    def end(self, state: PeerState, why: str) -> None:
        """Note that the peer is gone."""
        self.state = state
        self.lost = why
        for region in self._regions.values():
            region.closed = why
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        return f"<Peer {self.name!r}, generation {self.generation}, {self.state}>"
