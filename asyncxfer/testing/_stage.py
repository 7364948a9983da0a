"""The set-up of one contract test: two agents, a region at each side, and what ought to be in them afterwards.

The model is one line of numpy: the bytes at these positions of one side become those at those positions of the other,
and no other byte changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asyncxfer import Agent, DescriptorList, Done, Peer, Plan, Region, RemoteRegion, Transfer

from ._target import Access, Target, make_region

__all__ = ["Op", "Selection", "Sides", "Stage"]

Op = Literal["put", "get"]


@dataclass(frozen=True)
class Selection:
    """Some bytes of a region, twice: as descriptors, and as positions that numpy understands.

    Attributes
    ----------
    rows : DescriptorList
    at : (nbytes,) int64
        The position in the region of each byte, in stream order.
    """

    rows: DescriptorList
    at: npt.NDArray[np.int64]

    @classmethod
    def by_key(cls, region: Region | RemoteRegion, key: Any) -> Selection:
        """What a numpy index selects."""
        positions = np.arange(region.nbytes).reshape(region.shape or ())
        return cls(region[key], positions[key].ravel())

    @classmethod
    def by_ranges(cls, region: Region | RemoteRegion, offsets: Sequence[int], lengths: Sequence[int]) -> Selection:
        """Byte ranges, one after the other."""
        ranges = [np.arange(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)]
        at = np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
        return cls(region.descriptors(offsets, lengths), at)


@dataclass
class Sides:
    """A region of this agent and one of the peer, of bytes.

    Attributes
    ----------
    region : Region
    here : (*shape) uint8
        Its memory.
    remote : RemoteRegion
        Or a file, which is a region of the initiator's own agent.
    """

    region: Region
    here: npt.NDArray[np.uint8]
    remote: RemoteRegion | Region
    target: Target

    async def there(self) -> npt.NDArray[np.uint8]:
        """What is in the peer's region now: (*shape) uint8."""
        return np.frombuffer(await self.target.read(self.remote.name), np.uint8).reshape(self.remote.shape or ())

    async def fill(self, seed: int) -> None:
        """Put random bytes into both."""
        random = np.random.default_rng(seed)
        self.here[...] = np.frombuffer(random.bytes(self.region.nbytes), np.uint8).reshape(self.here.shape)
        await self.target.write(self.remote.name, random.bytes(self.remote.nbytes))


@dataclass
class Stage:
    """An agent that moves, and a peer that it is connected to, or files.

    Attributes
    ----------
    agent : Agent
    connected : Peer or None
        None where the other side is files.
    target : Target
        The other side.
    route : str
        What transfers insist on.
    shared : bool
        Regions come from `Agent.allocate`.
    checksum : bool
        Every transfer is verified at its destination.
    """

    agent: Agent
    connected: Peer | None
    target: Target
    route: str
    shared: bool
    checksum: bool = False
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def open(
        self, shape: Sequence[int], remote_shape: Sequence[int] | None = None, *, access: Access = "rw"
    ) -> Sides:
        """Make a region at each side, with random bytes in it.

        Parameters
        ----------
        shape, remote_shape : tuple of int
            Of bytes; None: the same at both sides.
        access : {"r", "w", "rw"}
            What the peer's region grants.
        """
        name = f"region-of-test-{next(self._numbers)}"
        await self.target.open(name, remote_shape or shape, access=access, shared=self.shared)
        region, here = await make_region(self.agent, shape, shared=self.shared)
        sides = Sides(region, here, await self.target.reach(name, self.connected), self.target)
        await sides.fill(len(name))
        return sides

    @property
    def peer(self) -> Peer:
        """The peer, in tests that need one."""
        assert self.connected is not None, "this test needs a peer; declare in `skips` what cannot be tested without"
        return self.connected

    @property
    def counted(self) -> dict[str, Any]:
        """What the agent has counted towards the other side, by the backend under test and direction."""
        towards = self.agent if self.connected is None else self.connected
        counted: dict[str, Any] = self.agent.stats()["sent"][towards.name][self.route.partition(":")[0]]
        return counted

    def post(self, op: Op, local: DescriptorList, remote: DescriptorList, **options: Any) -> Transfer:
        """Post a transfer by the route under test."""
        call: Callable[..., Transfer] = self.agent.put if op == "put" else self.agent.get
        return call(local, remote, backend=self.route, checksum=self.checksum, **options)

    def prepare(self, op: Op, local: DescriptorList, remote: DescriptorList) -> Plan:
        """Prepare a transfer by the route under test."""
        return self.agent.prepare(op, local, remote, backend=self.route, checksum=self.checksum)

    async def moves(self, sides: Sides, op: Op, local: Selection, remote: Selection, **options: Any) -> Done:
        """Move and compare every byte of both sides with the model."""
        here, there = sides.here.copy(), (await sides.there()).copy()
        done = await self.post(op, local.rows, remote.rows, **options)
        if op == "put":
            there.reshape(-1)[remote.at] = here.reshape(-1)[local.at]
        else:
            here.reshape(-1)[local.at] = there.reshape(-1)[remote.at]
        assert np.array_equal(sides.here, here), f"{op}: the bytes of this side are not what they should be"
        assert np.array_equal(await sides.there(), there), f"{op}: the bytes of the peer are not what they should be"
        return done
