"""The agent: the one object that sees the whole flow, from a call to descriptors, a route, a backend and an end.

It owns lifetimes: its regions, its peers, its backends, the transfers in flight, and the order in which all of them
end. What each of them does is in the module of its name.
"""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from . import _address, _chooser, _identity, _loops, _metadata, _plugins
from ._chooser import Explanation
from ._config import Config
from ._credentials import Credentials
from ._descriptors import DescriptorList
from ._errors import AccessError, ClosedError, ConfigError, DescriptorError, TransferTimeout
from ._fast import engine, fileio, outbox, poller
from ._files import Durability, FileMode
from ._grants import Granted
from ._inbox import Notification
from ._memory import Access
from ._object_rows import ObjectRows, sized
from ._objects import Exists
from ._peer import Peer, PeerEvent
from ._peers import Peers
from ._plan import Plan, match
from ._region import Opening, Region, RemoteRegion
from ._regions import Regions
from ._transfer import Flights, Transfer
from .abc import Backend, Endpoint, Offer, Op, Registration, RemoteRegistration, Request
from .directory import Directory, forget_agents, open_directory

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["Agent"]

_agents: weakref.WeakSet[Agent] = weakref.WeakSet()


class _Live(NamedTuple):
    """What an agent has from its start to its end."""

    flights: Flights
    peers: Peers
    regions: Regions
    backends: dict[str, Backend]
    refused: dict[str, str]


class Agent:
    """A place that moves bytes to and from others: its regions, its peers and its transfers.

    Parameters
    ----------
    name : str
        By which other agents find it; unique in its directory.
    directory : str, Directory or None
        Where agents find each other; None: in this process.
    backends : iterable of str or Backend, or None
        Which ways to use; None for all that load here.
    listen : str, sequence of str, or None
        Where agents of other hosts reach this one: ``"tcp://HOST:PORT"``, port 0 for any free one, with
        ``?advertise=HOST`` or ``?advertise=HOST:PORT`` where they see it under another address. None: agents of this
        host only.
    credentials : Certificates, PreSharedKey or None
        Who this agent is to those it talks to over TCP, and whom it believes. None: they are not asked.
    config : Config, mapping or None
        Tunables; see `Config`.

    Raises
    ------
    ConfigError
        A key of `config`, or a value, that does not exist; or `listen` is malformed.

    Examples
    --------
    >>> async def example():
    ...     async with Agent("a") as a, Agent("b") as b:
    ...         async with a.allocate((4, 8), "uint8") as source, b.allocate((4, 8), "uint8", name="kv") as target:
    ...             peer = await a.connect("b")
    ...             return await a.put(source[[1, 3]], peer["kv"][:2], notify=b"done")
    """

    def __init__(
        self,
        name: str,
        *,
        directory: str | Directory | None = None,
        backends: Iterable[_plugins.BackendSpec] | None = None,
        listen: str | Sequence[str] | None = None,
        credentials: Credentials | None = None,
        config: Config | Mapping[str, Any] | None = None,
    ) -> None:
        if not name or len(name) > 255 or not name.isprintable():
            raise ConfigError(f"agent name {name!r}: expected 1 to 255 printable characters")
        if credentials is not None and not isinstance(credentials, Credentials):
            raise ConfigError(f"credentials are {credentials!r}; expected Certificates(...) or PreSharedKey(...)")
        self._listen = _address.listening(listen)
        self._credentials = credentials
        self.name = name
        self.config = Config.load(config)
        self._directory = open_directory(directory)
        self._wanted = None if backends is None else list(backends)
        self._probe = np.frombuffer(os.urandom(16), np.uint8).copy()  # peers try on it whether they can attach
        self._executor: ThreadPoolExecutor | None = None
        self._live: _Live | None = None
        self._closed: str | None = None
        self._ending: asyncio.Task[None] | None = None

    # ---- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Load backends, listen, and become known in the directory.

        Raises
        ------
        BackendError
            A backend that was asked for does not load.
        ConfigError
            The name is taken, or an address cannot be listened on: it is in use, or it can be reached from other
            hosts and there are no credentials.
        """
        if self._live is not None:
            raise ConfigError(f"agent {self.name!r} was started before; an agent lives once")
        loop = asyncio.get_running_loop()
        found, refused = await self._find_backends()
        if self._live is not None:
            raise ConfigError(f"agent {self.name!r} was started twice at once; an agent lives once")
        backends = _plugins.make(found, self.config)
        flights = Flights(loop, _loops.acquire(loop), self.config.notification_bytes)
        probe = self._probe.ctypes.data, self._probe.tobytes()
        peers = Peers(self.name, probe, backends, flights, self._credentials, self.config)
        regions = Regions(self.name, backends, refused, peers.acceptor, flights, self.config, self._in_thread)
        self._live = _Live(flights, peers, regions, backends, refused)
        _agents.add(self)
        try:
            await peers.start(self._listen)
            await self._directory.publish(self.name, self.metadata())
        except BaseException:
            await self._end("the agent could not be started")
            raise
        return self

    async def _find_backends(self) -> tuple[list[type[Backend] | Backend], dict[str, str]]:
        """Find them in a thread that ends with it: it may take a second."""
        from concurrent.futures import ThreadPoolExecutor

        thread = ThreadPoolExecutor(1, thread_name_prefix="axf-find")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, _plugins.find, self._wanted, self.config)
        finally:
            thread.shutdown(wait=False)

    async def aclose(self) -> None:
        """Let what is in flight end, leave all peers, close all regions and backends. Again does nothing.

        A call that is cancelled does not stop it: what has begun to close goes on closing, and another call waits
        for its end.

        Raises
        ------
        RegistrationError
            A peer was stopped inside a transfer with a region; see `Region.aclose`.
        """
        if self._ending is None:
            if self._live is None or self._closed is not None:
                return
            self._ending = asyncio.ensure_future(self._leave())
        elif self._ending.done():
            return
        await asyncio.shield(self._ending)

    async def _leave(self) -> None:
        try:
            await self._directory.withdraw(self.name, self.metadata())
        finally:
            await self._end(f"agent {self.name!r} was closed")

    async def _end(self, why: str) -> None:
        live = self._started()
        self._closed = live.flights.closed = why
        await live.flights.settle(live.flights.all(), within=self.config.close_timeout)
        await live.peers.leave_all()
        closings = [live.regions.close(region) for region in live.regions]
        stragglers = [e for e in await asyncio.gather(*closings, return_exceptions=True) if e is not None]
        await live.peers.close(why)
        for backend in live.backends.values():
            await backend.aclose()
        _agents.discard(self)
        _loops.release(live.flights.loop)
        if not _agents:
            outbox.shutdown()
        if self._executor is not None:
            self._executor.shutdown()
        if stragglers:
            raise stragglers[0]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self.__dict__.get("_live") is not None and self._closed is None:
            warnings.warn(f"{self!r} was not closed; use `async with`", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        if self._live is None:
            return f"<Agent {self.name!r}, new>"
        state = "closed" if self._closed else "open"
        return f"<Agent {self.name!r}, {state}, {len(self._live.regions)} regions, {len(self._live.peers)} peers>"

    def _started(self) -> _Live:
        if self._live is None:
            raise ClosedError(f"agent {self.name!r} has not been started; use `async with Agent(...)` or await start()")
        return self._live

    def _open(self) -> _Live:
        live = self._started()
        live.flights.check_open()
        return live

    async def _in_thread(self, call: Any, *args: object) -> Any:
        """Run what would hold up the loop in a thread of the agent's own."""
        from concurrent.futures import ThreadPoolExecutor

        if self._executor is None:
            self._executor = ThreadPoolExecutor(4, thread_name_prefix="axf-aux")
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    def _forked(self) -> None:
        """In a forked child: nothing here is ours; the parent's connections go on untouched."""
        self._closed = f"agent {self.name!r} belongs to the parent of this forked process; make a new one here"
        if self._live is not None:
            self._live.flights.drop(self._closed)
            self._live.regions.drop(self._closed)
            self._live.peers.drop()

    # ---- regions -------------------------------------------------------------------------------------------------

    def register(
        self, obj: object, *, name: str | None = None, access: Access = "rw", grants: Granted = None
    ) -> Opening:
        """Make memory reachable for peers, and usable in transfers.

        Parameters
        ----------
        obj : array, tensor, buffer, or list or tuple of them
            Anything with the buffer protocol, DLPack or ``__cuda_array_interface__``, or a torch tensor.
        name : str or None
            By which peers find it; None gives it a number.
        access : {"r", "w", "rw"}
            What peers may do: get from it, put to it. Read-only memory is only ever read.
        grants : mapping of str to access, iterable of str, or None
            Who may do so: peers by name, each with an access of its own or all with `access`. The others do not know
            of the region. None: every peer. `Region.grant` and `Region.revoke` change it later.

        Returns
        -------
        Opening
            ``await`` it for a `Region`, or ``async with`` it.

        Raises
        ------
        RegistrationError
            By the await: the memory cannot be described or used, or the name is taken.
        """
        return Opening(lambda: self._open().regions.register(obj, name, access, grants))

    def allocate(
        self,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike,
        *,
        kind: str = "dram",
        name: str | None = None,
        access: Access = "rw",
        grants: Granted = None,
        huge_pages: bool = False,
    ) -> Opening:
        """Make a region of new, zeroed memory that processes of this host can map.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : data type
        kind : {"dram"}
            Kind of memory.
        name, access, grants
            As in `register`.
        huge_pages : bool
            Take huge pages from the system's reserve, where enough of them are free. Without it, or them, memory of
            2 MiB and more is put together from free pages to huge ones where the kernel can (Linux 6.1).

        Returns
        -------
        Opening
            ``await`` it for a `Region`, whose `array` is the memory, or ``async with`` it.

        Raises
        ------
        RegistrationError
            By the await: there is not that much memory, or no such kind here.
        """
        return Opening(
            lambda: self._open().regions.allocate(shape, dtype, kind, name, access, grants, huge_pages=huge_pages)
        )

    def open(
        self,
        url: str | os.PathLike[str],
        mode: FileMode = "r",
        *,
        name: str | None = None,
        size: int | None = None,
        shape: int | Sequence[int] | None = None,
        dtype: npt.DTypeLike | None = None,
        direct: bool | None = None,
        durability: Durability | None = None,
        exists: Exists | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Opening:
        """Open a file or objects of a store as a region, to put to and get from.

        ``agent.get(memory[:], file[:])`` reads a file; ``agent.get(memory[:2], objects[["a", "b"]])`` reads two
        objects, each as long as its half of the memory, and ``objects["a", 0:4096]`` is a part of one. Peers do not
        see the region; several agents may open the same.

        Parameters
        ----------
        url : str or path
            A path or a ``file://`` URL, of a file or a block device; or objects below a prefix: ``s3://bucket/prefix``,
            ``az://container/prefix``, ``gs://bucket/prefix``.
        mode : {"r", "r+", "w"}
            Read only; read and write a file that exists; make the file, or resize the one that exists, and read and
            write it. With objects, "r" or any of the others.
        name : str or None
            None gives it a number.
        size : int or None, bytes
            How much of the file the region is; its length from now on in mode "w". None: what `shape` takes, else all.
        shape : int, tuple of int, or None
            By which it is indexed; None: one dimension.
        dtype : data type or None
            Of the elements, also ``"bfloat16"`` and what else only torch has; None: bytes.
        direct : bool, default False
            Go past the page cache where file offsets, lengths and memory are aligned, and the file system can.
        durability : {"none", "data", "full"}, default "none"
            When a put has ended: once the bytes can be read back; after fdatasync; after fsync.
        exists : {"replace", "keep", "error"}, default "replace"
            What a put does with an object that is there: replace it; leave it, as what has just these bytes (keys are
            made of the content); fail.
        options : mapping of str to object or None
            For the client of the store, such as ``endpoint_url``, ``profile_name``; see the page on objects.

        Returns
        -------
        Opening
            ``await`` it for a `Region`, or ``async with`` it.

        Raises
        ------
        ConfigError
            By the await: no such mode, durability or option, or a URL of nothing that can be opened.
        RegistrationError
            By the await: the file cannot be opened or is too short, there are no credentials for the store, or no
            backend for it is loaded.
        """
        given = {
            "size": size, "shape": shape, "dtype": dtype, "direct": direct, "durability": durability,
            "exists": exists, "options": options,
        }  # fmt: skip
        return Opening(lambda: self._open().regions.open(url, mode, name, given))

    # ---- peers ---------------------------------------------------------------------------------------------------

    def metadata(self) -> bytes:
        """What `connect` of another agent needs, for a channel of your own: at most 64 KiB, safe to decode."""
        return _metadata.encode(self._started().peers.me)

    async def connect(self, target: str | bytes, *, timeout: float | None = None) -> Peer:
        """Reach another agent; the one that is connected already, if it is the same.

        Parameters
        ----------
        target : str or bytes
            A name in the directory, waited for until it appears, or the bytes of the other's `metadata`.
        timeout : float or None, seconds
            None: configuration key connect_timeout.

        Raises
        ------
        PeerLostError
            It has ended, or has been replaced by a later generation.
        TransferTimeout
            The name did not appear, or the peer did not answer.
        MetadataError
            The bytes are no metadata.
        """
        live = self._open()
        limit = self.config.connect_timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                data = await self._directory.lookup(target) if isinstance(target, str) else bytes(target)
                metadata = _metadata.decode(data)
                return await live.peers.connect(metadata)
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"agent {target!r} did not appear or answer within {limit} s") from error

    def events(self) -> AsyncIterator[PeerEvent]:
        """Yield changes of peers' states from now on: joined, suspect, lost, restarted, left.

        Peers are those that this agent connected to and those that connected to it.
        """
        return self._open().peers.events()

    # ---- notifications -------------------------------------------------------------------------------------------

    def notifications(self) -> AsyncIterator[Notification]:
        """Yield notifications that arrive and that nobody expects by their tag."""
        return self._open().peers.inbox.read()

    async def expect(self, tag: bytes, *, peer: str | Peer | None = None, timeout: float | None = None) -> Notification:
        """Wait for one notification; one that came before is kept until it is asked for.

        Parameters
        ----------
        tag : bytes
        peer : str, Peer or None
            The sender; None: any.
        timeout : float or None, seconds

        Raises
        ------
        PeerLostError
            The sender is gone: `peer`, or the one that had announced this tag, or the last that was connected. One
            that said goodbye before the call counts as never there: another may come.
        TransferError
            The transfer that was to send it has failed.
        TransferTimeout
            It did not come in time.
        ClosedError
            The agent was closed.
        DescriptorError
            The tag is not bytes.
        """
        inbox = self._open().peers.inbox
        if not isinstance(tag, bytes):
            raise DescriptorError(f"a notification is bytes, not {type(tag).__name__}")
        return await inbox.expect(tag, peer.name if isinstance(peer, Peer) else peer, timeout)

    # ---- transfers -----------------------------------------------------------------------------------------------

    def put(
        self,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        backend: str | None = None,
        priority: int = 0,
        checksum: bool = False,
    ) -> Transfer:
        """Move bytes from local to remote. Posts at once; await the result.

        Parameters
        ----------
        local, remote : DescriptorList
            Of regions of this agent and of a peer; equal byte totals, in any number of rows. Where both lie in the
            same memory they must not overlap; bytes that are written twice end as either of the two.
        notify : bytes or None
            Tag that the peer receives once the data is visible there.
        timeout : float or None, seconds
        backend : str or None
            Insist on one, or on one of its ways (``"shm:attach"``).
        priority : int
            Above 0 before, below 0 after what is in flight with 0.
        checksum : bool
            Verify at the destination, by a CRC32C of each part; rows that come wrong are asked for once more. Only
            backends that go over a network do.

        Returns
        -------
        Transfer

        Raises
        ------
        DescriptorError, AccessError, NoRouteError, ClosedError, PeerLostError
            What the call can know is wrong.
        """
        plan = self.prepare("put", local, remote, backend=backend, checksum=checksum)
        return plan(notify=notify, timeout=timeout, priority=priority)

    def get(
        self,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        backend: str | None = None,
        priority: int = 0,
        checksum: bool = False,
    ) -> Transfer:
        """Move bytes from remote to local; parameters, result and errors as in `put`."""
        plan = self.prepare("get", local, remote, backend=backend, checksum=checksum)
        return plan(notify=notify, timeout=timeout, priority=priority)

    def prepare(
        self,
        op: Op,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        backend: str | None = None,
        checksum: bool = False,
    ) -> Plan:
        """Check, match, merge and route once; ``await plan()`` many times.

        Parameters
        ----------
        op : {"put", "get"}
        local, remote, backend, checksum
            As in `put`.

        Raises
        ------
        DescriptorError, AccessError, NoRouteError, ClosedError, PeerLostError
            What the call can know is wrong.
        """
        live = self._open()
        here, there = self._sides(live, op, local, remote)
        local, remote = sized(local, remote)
        pairs = match(local, remote)
        rows = int(pairs["count"].sum())
        taken = _chooser.quickest(rows, local.nbytes, _able(live, op, here, there, checksum=checksum), backend)
        if taken is None:
            offers = _offers(live, op, here, there)
            if checksum:
                unable = {name for name, backend in live.backends.items() if not backend.checksums}
                offers = [(n, Offer(o.via, reason=_NO_CHECKSUMS) if n in unable else o) for n, o in offers]
            taken = _chooser.choose(_chooser.weigh(op, rows, local.nbytes, offers, backend))
        remote_registration: Registration | RemoteRegistration
        peer, link, slot, epoch, endpoint = self.name, None, 0, 0, None
        if isinstance(there, RemoteRegion):
            remote_registration = there.attachments[taken.backend]
            peer, link, endpoint = there.peer.name, there.peer.link, there.peer.endpoints[taken.backend]
            slot, epoch = there.info.slot, there.info.epoch
        else:
            remote_registration = there.registrations[taken.backend]
        request = Request(
            op, taken.via, here.registrations[taken.backend], remote_registration, pairs, local.nbytes, rows,
            endpoint=endpoint, link=link, slot=slot, epoch=epoch, checksum=checksum, keep=(here, there),
            **_named(local, remote),
        )  # fmt: skip
        return Plan(
            live.backends[taken.backend], request, route=taken, local=local, remote=remote, flights=live.flights,
            counter=live.flights.counter(peer, taken.backend, op),
        )  # fmt: skip

    def explain(self, op: Op, local: DescriptorList, remote: DescriptorList) -> Explanation:
        """Tell every route that a transfer could take, with its predicted time and why it is or is not taken.

        Parameters
        ----------
        op : {"put", "get"}
        local, remote : DescriptorList
            As in `prepare`.

        Returns
        -------
        Explanation
            `str` of it is a table.

        Raises
        ------
        DescriptorError, AccessError, ClosedError, PeerLostError
            What the call can know is wrong.
        """
        live = self._open()
        here, there = self._sides(live, op, local, remote)
        local, remote = sized(local, remote)
        rows = int(match(local, remote)["count"].sum())
        return _chooser.weigh(op, rows, local.nbytes, _offers(live, op, here, there))

    def _sides(
        self, live: _Live, op: Op, local: DescriptorList, remote: DescriptorList
    ) -> tuple[Region, Region | RemoteRegion]:
        """Check what a transfer names: its regions, whose they are, and what they allow."""
        if op not in ("put", "get"):
            raise DescriptorError(f"op is {op!r}; expected 'put' or 'get'")
        for what, rows in (("local", local), ("remote", remote)):
            if not isinstance(rows, DescriptorList):
                raise DescriptorError(
                    f"{what} is {type(rows).__name__}; expected descriptors, such as region[...] or region.bytes[:]"
                )
        here, there = local.region, remote.region
        if isinstance(here, Region):
            here.check_open()
        if not isinstance(here, Region) or here not in live.regions:
            raise DescriptorError(f"local must be descriptors of a region of agent {self.name!r}, not of {here!r}")
        if isinstance(there, (Region, RemoteRegion)):
            there.check_open()
        of_a_peer = isinstance(there, RemoteRegion) and there.peer in live.peers
        if not of_a_peer and there not in live.regions:
            raise DescriptorError(
                f"remote must be descriptors of a region of agent {self.name!r} or of a peer that it has connected to, "
                f"not of {there!r}"
            )
        assert isinstance(there, (Region, RemoteRegion))
        need: Literal["r", "w"] = "w" if op == "put" else "r"
        if isinstance(there, RemoteRegion) and need not in there.access:
            raise AccessError(f"{op} needs access {need!r}; {there!r} grants {there.access!r}")
        written: Region | RemoteRegion = there if op == "put" else here
        if isinstance(written, Region) and written.readonly:
            why = "was opened in mode 'r'" if written.kind.stored else "is read-only memory"
            raise AccessError(f"{op} would write {written!r}, which {why}")
        return here, there

    # ---- figures -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Returns
        -------
        dict
            ``"sent"``: by peer, backend and direction what this agent moved (transfers, nbytes, failed, seconds);
            ``"served"``: by peer what connected initiators moved to and from this agent's regions; ``"in_flight"``,
            ``"regions"``, ``"peers"``, ``"backends"``; of the process, ``"threads"`` that copy, ``"network_threads"``.
        """
        live = self._started()
        sent: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for (peer, backend, op), counter in live.flights.counters.items():
            sent.setdefault(peer, {}).setdefault(backend, {})[op] = counter.figures()
        served: dict[str, dict[str, int]] = {}
        for incoming in live.peers.acceptor.incoming:
            total = served.setdefault(incoming.name, {})
            for key, value in incoming.page.counts().items():
                total[key] = total.get(key, 0) + value
        return {
            "sent": sent,
            "served": served,
            "in_flight": len(live.flights.all()),
            "regions": len(live.regions),
            "peers": len(live.peers),
            "backends": list(live.backends),
            "threads": engine.threads(),
            "network_threads": poller.running(),
        }


def _named(local: DescriptorList, remote: DescriptorList) -> dict[str, Any]:
    """What a request says of objects, where one of its sides is such."""
    for side in (local, remote):
        if isinstance(side, ObjectRows):
            return {"keys": side.keys, "whole": side.whole}
    return {}


_NO_CHECKSUMS = "does not compute checksums"


def _able(
    live: _Live, op: Op, here: Region, there: Region | RemoteRegion, *, checksum: bool
) -> Iterator[tuple[str, Offer]]:
    """What the backends offer that know both sides."""
    kinds = here.kind, there.kind
    remote = there.attachments if isinstance(there, RemoteRegion) else there.registrations
    for name, registration in here.registrations.items():
        backend, other = live.backends[name], remote.get(name)
        if other is not None and kinds in backend.capabilities.kinds and (backend.checksums or not checksum):
            endpoint = there.peer.endpoints.get(name) if isinstance(there, RemoteRegion) else None
            for offer in backend.offers(op, registration, other, endpoint):
                yield name, offer


def _offers(live: _Live, op: Op, here: Region, there: Region | RemoteRegion) -> list[tuple[str, Offer]]:
    offers: list[tuple[str, Offer]] = [(name, Offer(reason=why)) for name, why in live.refused.items()]
    for name, backend in live.backends.items():
        local = here.registrations.get(name)
        remote: Registration | RemoteRegistration | None
        endpoint: Endpoint | None = None
        if isinstance(there, RemoteRegion):
            remote, endpoint = there.attachments.get(name), there.peer.endpoints.get(name)
            refusals = there.refusals | there.peer.refusals
            missing = refusals.get(name, "does not know the peer's region")
        else:
            remote, missing = there.registrations.get(name), _missing(there, name)
        if local is None:
            offers.append((name, Offer(reason=_missing(here, name))))
        elif remote is None:
            offers.append((name, Offer(reason=missing)))
        elif (here.kind, there.kind) not in backend.capabilities.kinds:
            offers.append((name, Offer(reason=f"does not move {here.kind} to or from {there.kind}")))
        else:
            offers.extend((name, offer) for offer in backend.offers(op, local, remote, endpoint))
    return offers


def _missing(region: Region, backend: str) -> str:
    return f"region {region.name!r}: {region.refusals.get(backend, 'not registered')}"


def _after_fork() -> None:
    _identity.after_fork()
    engine.after_fork()
    outbox.after_fork()
    fileio.after_fork()
    poller.after_fork()
    for agent in list(_agents):
        agent._forked()
    _agents.clear()
    _loops.forget_all()
    forget_agents()


os.register_at_fork(after_in_child=_after_fork)
