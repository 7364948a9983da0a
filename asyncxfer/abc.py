"""All that the author of a backend imports.

A backend moves bytes between places that it understands, and knows nothing of futures, event loops, notifications,
time-outs or retries: it is handed a completion and ends it, from any thread. It is found through the entry point
group ``asyncxfer.backends`` and made once for each agent.

Five methods are required: `Backend.register`, `Backend.deregister`, `Backend.connect`, `Backend.submit` and
`Backend.aclose`. `Backend.capabilities` says what it could carry at all, `Backend.offers` what it can carry between
two given regions and at what cost; the chooser compares offers of all backends.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ._descriptors import Layout, MemoryKind
from ._errors import BackendError, RegistrationError
from ._fast.completion import Completion
from ._files import File
from ._memory import Memory, Segment
from ._objects import Exists, ObjectInfo, Objects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ._config import Config
    from ._fast.link import GatePage, Link
    from ._fast.tls import Connection

__all__ = [
    "Backend",
    "BackendError",
    "Capabilities",
    "Completion",
    "Cost",
    "Endpoint",
    "Exists",
    "File",
    "Layout",
    "Memory",
    "MemoryKind",
    "ObjectInfo",
    "ObjectRegistration",
    "ObjectUpload",
    "Objects",
    "Offer",
    "Op",
    "PeerInfo",
    "Reach",
    "Registration",
    "RegistrationError",
    "RemoteRegistration",
    "Request",
    "Segment",
    "Service",
    "Stream",
]

Op: TypeAlias = Literal["put", "get"]


class Reach(enum.IntEnum):
    """How far away the other side of a transfer may be."""

    PROCESS = 0
    HOST = 1
    NETWORK = 2


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend could carry, before any region or peer is looked at.

    Attributes
    ----------
    reach : Reach
        The farthest peer.
    kinds : frozenset of (MemoryKind, MemoryKind)
        Pairs of local and remote place.
    """

    reach: Reach
    kinds: frozenset[tuple[MemoryKind, MemoryKind]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a transfer is predicted to take: a constant, a part for each row and a part for each byte.

    Attributes
    ----------
    setup : float, seconds
    row : float, seconds a row
    byte : float, seconds a byte
    """

    setup: float
    row: float
    byte: float

    def predict(self, rows: int, nbytes: int) -> float:
        """Seconds for a transfer of so many rows and bytes."""
        return self.setup + rows * self.row + nbytes * self.byte


@dataclass(frozen=True, slots=True)
class Offer:
    """One way by which a backend would carry a transfer, or why it cannot.

    Attributes
    ----------
    via : str
        Which of the backend's ways: ``"mapped"``, ``"attach"``; empty where it has one.
    cost : Cost or None
        None: it cannot, for `reason`.
    reason : str
    """

    via: str = ""
    cost: Cost | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Stream:
    """A connection between two agents that core has made for a backend; each side has proven who it is.

    Attributes
    ----------
    fd : int
        A connected, non-blocking TCP socket. It belongs to whoever is given the stream.
    index : int
        Which of the backend's connections to this peer; a new one with the same index replaces the old.
    tls : Connection or None
        Encryption, its handshake done; None: plain.
    """

    fd: int
    index: int
    tls: Connection | None = None


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A peer that has been connected, as a backend sees it.

    Attributes
    ----------
    name : str
    generation : int
    reach : Reach
        How far away it is.
    pid : int
        Its process on this host; 0 elsewhere.
    probe : (int, bytes)
        An address in that process and what stands there, to try direct access on.
    link : Link
        The control connection, for native code.
    address : bytes
        What the peer's own backend of this kind returned from `Backend.address`.
    dial : callable or None
        Makes the connection of some index to the peer's backend of this name, or raises PeerLostError or
        BackendError; None for a peer that has no address on a network.
    key : (16,) bytes
        A secret of this session that the peer's backend of this name was given too, by `Backend.serve`, and that no
        third party knows: by which messages over connections of the backend's own making prove whose they are.
    """

    name: str
    generation: int
    reach: Reach
    pid: int
    probe: tuple[int, bytes]
    link: Link
    address: bytes = b""
    dial: Callable[[int], Awaitable[Stream]] | None = None
    key: bytes = field(default=b"", repr=False)


@dataclass(slots=True, eq=False)
class Registration:
    """Memory of this agent that a backend may use; backends subclass it to keep what they need."""

    memory: Memory

    @property
    def bases(self) -> npt.NDArray[np.uint64]:
        """Where each segment begins in this process: (segments,) uint64."""
        return np.array([s.address for s in self.memory.segments], dtype=np.uint64)


class ObjectRegistration(Registration, abc.ABC):
    """Objects of a store, by which a backend is asked for what moves no bytes. Keys are whole keys of the bucket."""

    __slots__ = ()

    @abc.abstractmethod
    async def head(self, key: str) -> ObjectInfo:
        """Tell what the store knows of an object.

        Raises
        ------
        ObjectMissingError, ObjectError
        """

    @abc.abstractmethod
    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Yield objects in the order of their keys, those behind `after`."""

    @abc.abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, whether they are there or not."""

    @abc.abstractmethod
    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""

    async def upload(self, key: str) -> ObjectUpload:
        """Begin to write an object part by part.

        Raises
        ------
        BackendError
            The store has no such way, or the backend does not go it.
        """
        raise BackendError("objects of this store are written whole, not part by part")


class ObjectUpload(abc.ABC):
    """An object that is being written part by part. There is none of it before `complete`, and none after `abort`."""

    __slots__ = ()

    @abc.abstractmethod
    async def part(self, number: int, body: Sequence[memoryview]) -> None:
        """Write a part, numbered from 1; several at a time. When this ends, however it does, memory is let alone."""

    @abc.abstractmethod
    async def complete(self) -> str:
        """Make an object of the parts in the order of their numbers; its etag, or nothing where one was kept."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """Let nothing of it be left in the store."""


@dataclass(slots=True, eq=False)
class RemoteRegistration:
    """A peer's region as one backend reaches it; backends subclass it to keep what they need.

    Attributes
    ----------
    kind : MemoryKind
    segments : tuple of Segment
        Addresses in the peer's process.
    """

    kind: MemoryKind
    segments: tuple[Segment, ...]


class Endpoint:
    """One peer as one backend reaches it. Backends subclass it."""

    def attach(
        self, kind: MemoryKind, segments: tuple[Segment, ...], backings: Sequence[tuple[int, int] | None], export: bytes
    ) -> RemoteRegistration:
        """Take note of a region of this peer.

        Parameters
        ----------
        kind : MemoryKind
        segments : tuple of Segment
            Addresses in the peer's process and lengths, as the peer states them.
        backings : sequence of (int, int) or None
            For each segment the file behind it, where the peer shares one: a descriptor that stays open during
            this call, and the offset in bytes.
        export : bytes
            What the peer's backend of this name returned from `Backend.export`.
        """
        return RemoteRegistration(kind, segments)

    def detach(self, remote: RemoteRegistration) -> None:
        """Forget a region: the peer takes it back, or is gone.

        A peer that takes a region back is waiting for whoever is inside the gate, and this is called as soon as its
        word has come: transfers that use the region may be in flight. They have to start nothing more in it and to
        end as revoked when what they have started has ended. Where each piece passes the gate that comes of itself; a
        backend that passes none, or enters once for many pieces, stops them here.

        For a peer that is gone it is called after `lost`, when all that was in flight has ended or was waited for
        long enough.
        """

    def lost(self) -> None:
        """The peer is gone: end what is in flight to it, as soon as the buffers are quiescent. `close` follows."""

    def close(self) -> None:
        """Forget the peer."""


@dataclass(frozen=True, slots=True)
class Request:
    """A transfer that was checked, matched and routed: what a backend carries out, once or many times.

    Attributes
    ----------
    op : "put" or "get"
    via : str
        The `Offer.via` that was chosen.
    local : Registration
    remote : RemoteRegistration or Registration
        The latter when both sides belong to this agent.
    pairs : (n,) PAIR
        Matched rows in stream order, offsets relative to segments.
    keys : tuple of str
        Where one side is objects: what stands for segments there.
    whole : bool
        Where one side is objects: each of them is to have just the bytes of its rows. Without any bytes, it is about
        all of `keys`, which are to be empty.
    nbytes, rows : int
    endpoint : Endpoint or None
    link, slot, epoch
        The connection and the gate that guards the remote region; native code passes it chunk by chunk.
    checksum : bool
        The bytes are to be verified at their destination.
    keep : tuple
        What has to live while this is in use.
    """

    op: Op
    via: str
    local: Registration
    remote: RemoteRegistration | Registration
    pairs: npt.NDArray[np.void]
    nbytes: int
    rows: int
    endpoint: Endpoint | None = None
    link: Link | None = None
    slot: int = 0
    epoch: int = 0
    checksum: bool = False
    keys: tuple[str, ...] = field(default=(), repr=False)
    whole: bool = False
    keep: tuple[object, ...] = field(default=(), repr=False)


class Service(abc.ABC):
    """What a backend does for one initiator: it serves it this agent's regions.

    Every region that is open to the initiator is shown to it, whatever way the initiator has come.
    """

    @abc.abstractmethod
    def open(self, slot: int, epoch: int, registration: Registration, access: str) -> None:
        """Serve a region from now on.

        Parameters
        ----------
        slot, epoch : int
            How requests name it, and the gate that they pass: see `GatePage`.
        registration : Registration
        access : {"r", "w", "rw"}
            What this initiator may do with it: get from it, put to it.
        """

    @abc.abstractmethod
    def shut(self, slot: int) -> None:
        """Forget a region; its gate has been shut and nobody is inside."""

    def adopt(self, stream: Stream) -> None:
        """Serve requests that come over a connection of this initiator, made by its `PeerInfo.dial`.

        Raises
        ------
        BackendError
            It takes no connections, or not this one; the stream stays the caller's.
        """
        raise BackendError("this backend takes no connections")

    def pause(self) -> None:  # noqa: B027 - not every service tells notifications
        """Accept no further request until `resume`: notifications are not being read."""

    def resume(self) -> None:  # noqa: B027
        """Go on after `pause`."""

    @abc.abstractmethod
    def close(self) -> None:
        """End all its connections; when this returns, nothing of the service touches any region."""


class Backend(abc.ABC):
    """One way of moving bytes.

    Parameters
    ----------
    config : Config
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    carries_notes: ClassVar[bool] = False
    """Whether it delivers notifications behind the data itself, and tells of failures."""
    checksums: ClassVar[bool] = False
    """Whether it can verify the bytes at their destination."""
    joins: ClassVar[bool] = False
    """Whether `serve` is called as soon as an initiator has joined, not only with its first connection."""
    pins: ClassVar[frozenset[MemoryKind]] = frozenset()
    """Kinds of memory for which `register` and `deregister` may take long, as where it is pinned for a device: they are
    called in a thread then, one at a time."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say in a line what this machine lets the backend do; asked before one is made, and by ``asyncxfer doctor``.

        It is called in a thread, and may block.

        Raises
        ------
        BackendError
            It cannot work here; the message says what is missing and how to get it.
        """
        return "ready"

    @classmethod
    def details(cls, config: Config) -> Iterable[tuple[str, bool, str]]:
        """Say more to ``asyncxfer doctor``, whether `examine` raises or not; it may block.

        Returns
        -------
        iterable of (str, bool, str)
            What was looked at, whether it is there, and what it is, or why not and what to do.
        """
        return ()

    @abc.abstractmethod
    def register(self, memory: Memory) -> Registration:
        """Make memory usable.

        Raises
        ------
        RegistrationError
            This backend cannot use it.
        """

    @abc.abstractmethod
    def deregister(self, registration: Registration) -> None:
        """Undo `register`. Nothing in flight uses it any more."""

    @abc.abstractmethod
    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Reach a peer.

        Raises
        ------
        BackendError
            It cannot be reached this way; the message says why.
        """

    @abc.abstractmethod
    def submit(self, prepared: Any, completion: Completion, priority: int = 0) -> None:
        """Start a transfer and return at once; it ends through `completion`, from any thread.

        Parameters
        ----------
        prepared : object
            What `prepare` made of the request.
        completion : Completion
            How the end is told.
        priority : int
            Above 0 before, below 0 after what is in flight with 0.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Give back everything. All transfers have ended, all regions are deregistered."""

    # -- optional

    def address(self) -> bytes:
        """What peers need to know to reach this backend; handed to their `connect`."""
        return b""

    def export(self, registration: Registration) -> bytes:
        """What peers need to know of a region (a remote key, say); handed to their `Endpoint.attach`."""
        return b""

    def serve(
        self, page: GatePage, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool
    ) -> Service | None:  # fmt: skip
        """Serve an initiator; None where the backend has no connections of its own.

        It is asked for once in a session: with the first connection that the initiator makes by `PeerInfo.dial`, or
        where `joins` is set before the initiator is answered, so before its own backend is told to connect.

        Parameters
        ----------
        page : GatePage
            The gates of this agent's regions as they are open to this initiator.
        tell : callable
            Called on the agent's loop with the kind and the tag of each notification that came with data.
        key : (16,) bytes
            What the initiator's backend knows as `PeerInfo.key`.
        remote : bool
            The initiator came over a network. It has no page mapped and passes no gates, so the service does it in its
            place, with `GatePage.enter` or in native code.

        Raises
        ------
        BackendError
            This initiator cannot be served. Where `joins` is set it is then not let in.
        """
        return None

    def prepare(self, request: Request) -> Any:
        """Make a request ready to be submitted many times."""
        return request

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Name the ways to carry transfers between two regions, each with its cost or the reason why not.

        Parameters
        ----------
        op : {"put", "get"}
        local : Registration
        remote : RemoteRegistration or Registration
            The latter when both sides belong to this agent.
        endpoint : Endpoint or None
            The peer, as `connect` returned it.
        """
        return (Offer(reason="makes no offers"),)
