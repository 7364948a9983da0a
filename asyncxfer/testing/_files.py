"""The contract of a backend for files: the tests of `BackendContract` with files for a peer, and tests of files alone.

The files are regions of the initiator's own agent, in a folder that pytest makes and forgets. What a test looks at it
reads and writes by ordinary calls, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from asyncxfer import AccessError, Agent, ClosedError, Done, Peer, Region, RemoteRegion, TransferError

from ._contract import BackendContract
from ._moving import both_ways
from ._stage import Op, Sides, Stage
from ._target import Access, AgentTarget

__all__ = ["FileContract", "FileTarget"]

_NBYTES = 3 << 20
_NOBODY = "nobody is at the other end of a file"


class FileTarget(AgentTarget):
    """Files of an agent of this process as the other side.

    Parameters
    ----------
    agent : Agent
        The initiator's own.
    folder : Path
        Where the files are.
    options : object
        What they are opened with: `direct`, `durability`.
    """

    def __init__(self, agent: Agent, folder: Path, **options: Any) -> None:
        super().__init__(agent)
        self.options = options
        self._folder = folder
        self._files: dict[str, Region] = {}

    def path(self, name: str) -> Path:
        """Where a region's file is."""
        return self._folder / name

    async def open(self, name: str, shape: Sequence[int], *, access: Access = "rw", shared: bool = False) -> None:
        """Make a file; all of them can be read and written."""
        self._files[name] = await self.agent.open(self.path(name), "w", name=name, shape=tuple(shape), **self.options)

    async def reach(self, name: str, peer: Peer | None) -> Region | RemoteRegion:
        """Give a region that was opened."""
        return self._files[name]

    async def close(self, name: str) -> None:
        """Close a region; the file stays."""
        await self._files[name].aclose()

    async def write(self, name: str, data: bytes) -> None:
        """Set all bytes of a file."""
        await asyncio.to_thread(_write, self.path(name), data)

    async def read(self, name: str) -> bytes:
        """Give all bytes of a file."""
        return await asyncio.to_thread(self.path(name).read_bytes)


def _write(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


class FileContract(BackendContract):
    """Tests that every backend for files passes, used as `BackendContract` is.

    Attributes
    ----------
    direct : bool
        Files are opened for going past the page cache.
    durability : {"none", "data", "full"}
        What the end of a put stands for.
    """

    direct: ClassVar[bool] = False
    durability: ClassVar[Literal["none", "data", "full"]] = "none"
    skips: ClassVar[Mapping[str, str]] = dict.fromkeys(("notify", "grant", "revoke", "leave", "count"), _NOBODY)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self._path = tmp_path

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Stage]:
        """Set up one test."""
        assert self.route, f"{type(self).__name__}.route: expected the name of the backend under test"
        async with Agent("initiator", backends=self.backends(), **self.options) as agent:
            target = FileTarget(agent, self._path, direct=self.direct, durability=self.durability)
            yield Stage(agent, None, target, self.route, self.shared, self.checksum)

    async def _cut(self, stage: Stage, sides: Sides, nbytes: int) -> Path:
        assert isinstance(stage.target, FileTarget)
        path = stage.target.path(sides.remote.name)
        await asyncio.to_thread(os.truncate, path, nbytes)
        return path

    @pytest.mark.parametrize("cut", [0, 1, 4096, _NBYTES - 4096, _NBYTES - 1])
    async def test_a_file_that_has_become_shorter_is_an_error_that_says_so(self, cut: int) -> None:
        async with self.stage() as stage:
            sides = await stage.open((_NBYTES,))
            there = (await sides.there()).copy()
            path = await self._cut(stage, sides, cut)
            with pytest.raises(TransferError, match="shorter than the descriptors ask") as caught:
                await stage.post("get", sides.region[:], sides.remote[:])
            text = str(caught.value)
            assert str(path) in text
            assert "expected at offset" in text
            assert "found" in text
            assert caught.value.backend == stage.route.partition(":")[0]
            assert caught.value.nbytes <= cut
            done = await stage.post("get", sides.region[:cut], sides.remote[:cut])  # what is there can still be read
            assert done.nbytes == cut
            assert np.array_equal(sides.here[:cut], there[:cut])

    async def test_one_short_row_among_many_is_found(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((64, 4096))
            order = np.random.default_rng(6).permutation(64)
            path = await self._cut(stage, sides, 63 * 4096 + 1000)
            with pytest.raises(TransferError) as caught:
                await stage.post("get", sides.region[:], sides.remote[order])
            told = re.search(rf"{path}: \S+ bytes expected at offset (\S+), (\S+) found", str(caught.value))
            assert told is not None, str(caught.value)
            offset, found = (int(number.replace(",", "")) for number in told.groups())
            assert offset + found == 63 * 4096 + 1000

    async def test_a_put_makes_a_file_that_has_become_shorter_long_again(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((_NBYTES,))
            await self._cut(stage, sides, 100)
            await stage.post("put", sides.region[:], sides.remote[:])
            assert np.array_equal(await sides.there(), sides.here)

    @both_ways
    async def test_a_file_closes_when_its_transfers_have_ended(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((_NBYTES,))
            plan = stage.prepare(op, sides.region[:], sides.remote[:])
            posted = [plan() for _ in range(16)]
            await stage.target.close(sides.remote.name)
            assert all(transfer.done() for transfer in posted)
            with pytest.raises(ClosedError, match=sides.remote.name):
                plan()
            for transfer in posted:
                error = transfer.exception()
                assert error is None or isinstance(error, TransferError), error

    async def test_many_files_at_once(self) -> None:
        async with self.stage() as stage:
            every = [await stage.open((5, 1000)) for _ in range(40)]
            posted = [stage.post("put", sides.region[::-1], sides.remote[:]) for sides in every]
            assert all(isinstance(done, Done) for done in await asyncio.gather(*posted))
            for sides in every:
                assert np.array_equal(await sides.there(), sides.here[::-1])

    @both_ways
    async def test_the_file_may_be_the_local_side(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((64, 1000))
            assert isinstance(sides.remote, Region)
            here, there = sides.here.copy(), (await sides.there()).copy()
            await stage.post(op, sides.remote[::2], sides.region[:32])
            if op == "put":
                here[:32] = there[::2]
            else:
                there[::2] = here[:32]
            assert np.array_equal(sides.here, here)
            assert np.array_equal(await sides.there(), there)

    async def test_two_agents_have_one_file_open(self) -> None:
        async with self.stage() as stage, Agent("another", backends=self.backends(), **self.options) as another:
            sides = await stage.open((100, 1000))
            assert isinstance(stage.target, FileTarget)
            path = stage.target.path(sides.remote.name)
            async with another.open(path, "r+", **stage.target.options) as file, another.register(sides.here) as memory:
                await stage.post("put", sides.region[:], sides.remote[:])
                sides.here[...] = 0
                there = await sides.there()
                await another.get(memory[:], file.bytes[:], backend=stage.route)
                assert np.array_equal(sides.here, there)
                assert there.any()

    async def test_a_file_that_is_open_for_reading_is_never_written(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((100,))
            assert isinstance(stage.target, FileTarget)
            path, before = stage.target.path(sides.remote.name), await sides.there()
            async with stage.agent.open(path, **stage.target.options) as file:
                with pytest.raises(AccessError, match="was opened in mode 'r'"):
                    stage.post("put", sides.region[:], file[:])
                with pytest.raises(AccessError, match="was opened in mode 'r'"):
                    stage.post("get", file[:], sides.region[:])
                await stage.post("get", sides.region[:], file[:])
            assert np.array_equal(await sides.there(), before)
            assert np.array_equal(sides.here, before)

    async def test_what_was_synced_is_in_the_file(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((100_000,))
            assert isinstance(sides.remote, Region)
            await stage.post("put", sides.region[:], sides.remote[:])
            await sides.remote.sync()
            assert np.array_equal(await sides.there(), sides.here)
