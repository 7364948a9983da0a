"""The contract of a backend for objects: the tests of `BackendContract` with objects for a peer, and tests of objects.

A region of the other side is as many objects as it has rows, one each; a test that would put a part of an object is
skipped, since no store can. What a test looks at it reads and writes by means that are not under test.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import pytest

from asyncxfer import (
    AccessError,
    Agent,
    ClosedError,
    DescriptorError,
    DescriptorList,
    ObjectExistsError,
    ObjectMissingError,
    Peer,
    Plan,
    Region,
    RemoteRegion,
    Transfer,
    TransferError,
)
from asyncxfer.abc import Layout

from ._contract import BackendContract
from ._moving import both_ways
from ._stage import Op, Stage
from ._target import Access, AgentTarget

__all__ = ["ObjectContract", "ObjectTarget"]

_NOBODY = "nobody is at the other end of an object"
_PARTS = "objects are put whole"
_PART = 5 << 20  # bytes: what every store takes
_RANDOM = np.random.default_rng(7)


class ObjectArray:
    """Objects of equal length as an array of bytes, whose first axis chooses the object.

    Parameters
    ----------
    region : Region
        They are in it.
    name : str
        What their keys begin with.
    shape : tuple of int
    """

    def __init__(self, region: Region, name: str, shape: Sequence[int]) -> None:
        self.name = name
        self.shape = tuple(shape) if len(shape) > 1 else (1, *shape)
        self.keys = [f"{name}/{number:06d}" for number in range(self.shape[0])]
        self._region = region
        self._flat = len(shape) == 1
        self._layout = Layout.of(self.shape[1:], 1, parts=self.shape[0])
        self.closed = False
        if self._flat:
            self.shape = tuple(shape)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return int(np.prod(self.shape))

    def _made(self, runs: npt.NDArray[np.void]) -> DescriptorList:
        if self.closed:
            raise ClosedError(f"{self.name} was closed")
        lone = DescriptorList(cast(Any, self), runs).rows()
        return self._region.descriptors(lone[:, 0], lone[:, 1], segments=lone[:, 2], keys=self.keys)

    def __getitem__(self, key: Any) -> DescriptorList:
        keys = key if isinstance(key, tuple) else (key,)
        return self._made(self._layout.index((0, *keys) if self._flat else keys))

    @property
    def bytes(self) -> ObjectArray:
        """Itself, which has one axis."""
        assert self._flat
        return self

    def descriptors(self, offsets: Sequence[int], lengths: Sequence[int]) -> DescriptorList:
        """Byte ranges of the only one."""
        assert self._flat
        return self._region.descriptors(offsets, lengths, keys=self.keys[0])

    def whole(self, rows: DescriptorList) -> bool:
        """Whether rows are all the bytes of the objects that they are of, once each."""
        table = rows.rows()
        size = self.nbytes // len(self.keys)
        parts = [table[table[:, 2] == segment] for segment in np.unique(table[:, 2])]
        return all(
            int(part[:, 1].sum()) == size and len(np.unique(part[:, 0])) == len(part) and int(part[:, 0].min()) == 0
            for part in parts
        )


class ObjectStage(Stage):
    """A stage on which parts of objects are not put."""

    arrays: dict[str, ObjectArray]

    def _check(self, op: Op, local: DescriptorList, remote: DescriptorList) -> None:
        for side, written in ((remote, op == "put"), (local, op == "get")):
            keys = getattr(side, "keys", ())
            array = self.arrays.get(keys[0].rpartition("/")[0].rpartition("/")[2]) if keys else None
            if written and array is not None and len(side) and not array.whole(side):
                pytest.skip(_PARTS)

    def post(self, op: Op, local: DescriptorList, remote: DescriptorList, **options: Any) -> Transfer:
        """Post a transfer, if a store can carry it out."""
        self._check(op, local, remote)
        return super().post(op, local, remote, **options)

    def prepare(self, op: Op, local: DescriptorList, remote: DescriptorList) -> Plan:
        """Prepare a transfer, if a store can carry it out."""
        self._check(op, local, remote)
        return super().prepare(op, local, remote)


class ObjectTarget(AgentTarget):
    """Objects below a prefix as the other side.

    Parameters
    ----------
    agent : Agent
        The initiator's own.
    region : Region
        The prefix, opened.
    contract : ObjectContract
        Reads and writes objects by other means.
    """

    def __init__(self, agent: Agent, region: Region, contract: ObjectContract) -> None:
        super().__init__(agent)
        self.region = region
        self.arrays: dict[str, ObjectArray] = {}
        self._contract = contract

    async def open(self, name: str, shape: Sequence[int], *, access: Access = "rw", shared: bool = False) -> None:
        """Choose the keys; `write` makes the objects."""
        self.arrays[name] = ObjectArray(self.region, name, shape)

    async def reach(self, name: str, peer: Peer | None) -> Region | RemoteRegion:
        """Give the objects as an array."""
        return cast(Region, self.arrays[name])

    async def close(self, name: str) -> None:
        """Close the region; the objects stay."""
        await self.region.aclose()

    async def write(self, name: str, data: bytes) -> None:
        """Make the objects."""
        array = self.arrays[name]
        size = len(data) // len(array.keys)
        await self._each(
            self._contract.place(key, data[number * size : (number + 1) * size])
            for number, key in enumerate(array.keys)
        )

    async def read(self, name: str) -> bytes:
        """Give the bytes of the objects."""
        return b"".join(await self._each(self._contract.fetch(key) for key in self.arrays[name].keys))

    @staticmethod
    async def _each(calls: Any) -> list[Any]:
        found: list[Any] = []
        for some in itertools.batched(calls, 16) if hasattr(itertools, "batched") else _batched(calls, 16):
            found += await asyncio.gather(*some)
        return found


def _batched(calls: Any, n: int) -> Any:
    calls = iter(calls)
    while some := tuple(itertools.islice(calls, n)):
        yield some


class ObjectContract(BackendContract, abc.ABC):
    """Tests that every backend for objects passes, used as `BackendContract` is.

    Each test has a prefix of its own. A subclass gives `url` and `opening`, and reads and writes objects by other means
    than those under test. Of the capabilities that `skips` names there are three more: ``"exists"`` (what is there can
    be kept), ``"upload"`` (objects can be written part by part), and ``"keep"`` (what is there be kept by that, too).
    """

    many: ClassVar[int] = 240
    large: ClassVar[int] = 4 << 20
    skips: ClassVar[Mapping[str, str]] = dict.fromkeys(("notify", "grant", "revoke", "leave", "count"), _NOBODY)

    url: str
    """What is opened: a bucket or container, and a prefix that no other test has, ``"s3://bucket/prefix"``."""
    opening: Mapping[str, Any]
    """For the store's client: `options` of `Agent.open`."""

    @abc.abstractmethod
    async def fetch(self, key: str) -> bytes:
        """Read an object by other means; the key is behind the prefix."""

    @abc.abstractmethod
    async def place(self, key: str, data: bytes) -> None:
        """Make an object by other means."""

    async def unfinished(self) -> list[str]:
        """Name what the store keeps of uploads that were neither completed nor given up, where it tells."""
        return []

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Stage]:
        """Set up one test."""
        assert self.route, f"{type(self).__name__}.route: expected the name of the backend under test"
        async with (
            Agent("initiator", backends=self.backends(), **self.options) as agent,
            agent.open(self.url, "r+", options=self.opening) as region,
        ):
            target = ObjectTarget(agent, region, self)
            stage = ObjectStage(agent, None, target, self.route, self.shared, self.checksum)
            stage.arrays = target.arrays
            yield stage

    @contextlib.asynccontextmanager
    async def _objects(self, mode: Any = "r+", **more: Any) -> AsyncIterator[tuple[Agent, Region]]:
        async with (
            Agent("initiator", backends=self.backends(), **self.options) as agent,
            agent.open(self.url, mode, options=self.opening, **more) as region,
        ):
            yield agent, region

    # -- whole objects

    @pytest.mark.parametrize("nbytes", [0, 1, 16 << 10, (1 << 20) + 1])
    async def test_whole_objects_both_ways(self, nbytes: int) -> None:
        keys = [f"whole/{number}" for number in range(5)]
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, (5, nbytes), np.uint8)
            back = np.zeros_like(data)
            async with agent.register(data) as source, agent.register(back) as target:
                done = await agent.put(source[:], region[keys], backend=self.route)
                assert (done.nbytes, done.backend) == (5 * nbytes, self.route.partition(":")[0])
                for key, row in zip(keys, data, strict=True):
                    assert await self.fetch(key) == row.tobytes()
                await agent.get(target[::-1], region[keys], backend=self.route)
                assert np.array_equal(back[::-1], data)

    async def test_an_object_above_the_size_of_parts_both_ways(self) -> None:
        nbytes = (80 << 20) + 5
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, nbytes + 1, np.uint8)
            back = np.zeros(nbytes + 1, np.uint8)
            async with agent.register(data) as source, agent.register(back) as target:
                await agent.put(source[1:], region["large"], backend=self.route)
                assert (await region.objects.head("large")).nbytes == nbytes
                await agent.get(target[:nbytes], region["large"], backend=self.route)
                assert np.array_equal(back[:nbytes], data[1:])
                await agent.get(target[: 70 << 20], region["large", 7 : (70 << 20) + 7], backend=self.route)
                assert np.array_equal(back[: 70 << 20], data[8 : (70 << 20) + 8])

    async def test_rows_of_one_object_in_any_order_are_put_as_one(self) -> None:
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, (64, 100), np.uint8)
            order = _RANDOM.permutation(64)
            async with agent.register(data) as source:
                rows = region.descriptors(order * 100, 100, keys="rows")
                await agent.put(source[:], rows, backend=self.route)
                expected = np.empty_like(data)
                expected[order] = data
                assert await self.fetch("rows") == expected.tobytes()

    async def test_a_part_of_an_object_cannot_be_put(self) -> None:
        async with self._objects() as (agent, region), agent.register(bytes(100)) as source:
            for rows in (
                region["part", 10:110],
                region.descriptors([0, 60], [50, 50], keys="part"),
                region.descriptors([0, 40], [50, 50], keys="part"),
                region["part", 0:50] + region["part", 0:50],
            ):
                with pytest.raises(DescriptorError, match="a put makes whole objects"):
                    agent.put(source[:], rows, backend=self.route)

    @pytest.mark.parametrize("asked", [99, 101])
    async def test_an_object_of_another_length_is_an_error_that_says_so(self, asked: int) -> None:
        async with self._objects() as (agent, region):
            await self.place("short", bytes(range(100)))
            async with agent.register(np.zeros(asked, np.uint8)) as target:
                with pytest.raises(TransferError, match=r"100.*bytes") as caught:
                    await agent.get(target[:], region["short"], backend=self.route)
                text = str(caught.value)
                assert "short" in text
                assert self.url in text
                assert str(asked) in text
                assert caught.value.backend == self.route.partition(":")[0]

    async def test_a_range_beyond_the_end_is_an_error_that_says_so(self) -> None:
        async with self._objects() as (agent, region):
            await self.place("short", bytes(range(100)))
            async with agent.register(np.zeros(60, np.uint8)) as target:
                for start in (50, 100, 1000):
                    with pytest.raises(TransferError, match="bytes") as caught:
                        await agent.get(target[:], region["short", start : start + 60], backend=self.route)
                    assert f"{self.url}/short" in str(caught.value)
                await agent.get(target[:50], region["short", 50:100], backend=self.route)

    @pytest.mark.parametrize("part", [slice(None), slice(3, 7)])
    async def test_a_missing_key_is_an_error_that_names_it(self, part: slice) -> None:
        async with self._objects() as (agent, region), agent.register(np.zeros(4, np.uint8)) as target:
            with pytest.raises(ObjectMissingError, match="no/such key") as caught:
                await agent.get(target[:], region["no/such key", part], backend=self.route)
            assert isinstance(caught.value, FileNotFoundError)
            assert caught.value.status == 404
            with pytest.raises(ObjectMissingError, match="no/such key"):
                await region.objects.head("no/such key")

    @pytest.mark.parametrize(
        "key", ["a b", "ä/ö/日本", "q?x=1&y=2", "100%", "a+b", "a#b", "~!*'()", "deep/er/and/deeper"]
    )
    async def test_keys_with_special_characters(self, key: str) -> None:
        async with self._objects() as (agent, region), agent.register(b"0123456789") as source:
            await agent.put(source[:], region[key], backend=self.route)
            assert await self.fetch(key) == b"0123456789"
            assert [info.key async for info in region.objects.list()] == [key]
            back = np.zeros(10, np.uint8)
            async with agent.register(back) as target:
                await agent.get(target[:], region[key], backend=self.route)
            assert back.tobytes() == b"0123456789"
            await region.objects.delete(key)
            assert [info.key async for info in region.objects.list()] == []

    # -- what is there already

    async def test_what_is_there_is_kept_or_an_error_if_that_was_asked_for(self) -> None:
        self.need("exists")
        await self.place("there", b"before")
        async with self._objects(exists="keep") as (agent, region), agent.register(b"behind") as source:
            await agent.put(source[:], region["there"], backend=self.route)
            assert await self.fetch("there") == b"before"
            await agent.put(source[:], region["new"], backend=self.route)
            assert await self.fetch("new") == b"behind"
        async with self._objects(exists="error") as (agent, region), agent.register(b"behind") as source:
            with pytest.raises(ObjectExistsError, match="there"):
                await agent.put(source[:], region["there"], backend=self.route)
            assert await self.fetch("there") == b"before"
        async with self._objects() as (agent, region), agent.register(b"behind") as source:
            await agent.put(source[:], region["there"], backend=self.route)
            assert await self.fetch("there") == b"behind"

    # -- part by part

    async def test_parts_in_any_order_make_one_object(self) -> None:
        self.need("upload")
        data = _RANDOM.integers(0, 256, 2 * _PART + 100, np.uint8)
        async with self._objects() as (agent, region), agent.register(data) as memory:
            async with region.objects.upload("parts/whole") as upload:
                with pytest.raises(ObjectMissingError):
                    await region.objects.head("parts/whole")
                await upload.put(2, memory[_PART : 2 * _PART])
                await asyncio.gather(
                    upload.put(3, memory[2 * _PART :]),
                    upload.put(1, memory.descriptors([0, _PART // 2], [_PART // 2, _PART // 2])),
                )
                etag = await upload.complete()
            info = await region.objects.head("parts/whole")
            assert (info.nbytes, info.etag) == (len(data), etag)
            assert await self.fetch("parts/whole") == data.tobytes()
            with pytest.raises(ClosedError, match="has ended"):
                await upload.put(4, memory[:_PART])
            with pytest.raises(ClosedError, match="has ended"):
                await upload.complete()
            assert [info.key async for info in region.objects.list()] == ["parts/whole"]
        assert await self.unfinished() == []

    @pytest.mark.parametrize("how", ["left", "failed", "cancelled"])
    async def test_an_upload_that_is_not_completed_leaves_nothing(self, how: str) -> None:
        self.need("upload")
        async with self._objects() as (agent, region), agent.register(np.zeros(_PART, np.uint8)) as memory:
            stored = asyncio.Event()

            async def write() -> None:
                async with region.objects.upload("parts/never") as upload:
                    await upload.put(1, memory[:])
                    stored.set()
                    if how == "cancelled":
                        await asyncio.Event().wait()
                    if how == "failed":
                        raise ZeroDivisionError

            writing = asyncio.create_task(write())
            await asyncio.wait({writing, waiting := asyncio.create_task(stored.wait())}, return_when="FIRST_COMPLETED")
            waiting.cancel()
            if how == "cancelled":
                writing.cancel()
            await asyncio.wait({writing})
            assert writing.cancelled() == (how == "cancelled")
            if how != "cancelled":
                assert isinstance(writing.exception(), ZeroDivisionError) == (how == "failed")
            with pytest.raises(ObjectMissingError):
                await region.objects.head("parts/never")
            assert [info.key async for info in region.objects.list()] == []
        assert await self.unfinished() == []

    async def test_parts_are_of_host_memory_and_numbered_from_one(self) -> None:
        self.need("upload")
        async with self._objects() as (agent, region), agent.register(np.zeros(100, np.uint8)) as memory:
            async with region.objects.upload("parts/wrong") as upload:
                with pytest.raises(DescriptorError, match="a number from 1"):
                    await upload.put(0, memory[:])
                with pytest.raises(DescriptorError, match="host memory"):
                    await upload.put(1, region["parts/other"])
            with pytest.raises(ClosedError, match="async with"):
                await region.objects.upload("parts/unbegun").put(1, memory[:])
        async with self._objects("r") as (_, region):
            with pytest.raises(AccessError, match="was opened in mode 'r'"):
                region.objects.upload("parts/wrong")
        assert await self.unfinished() == []

    async def test_an_upload_keeps_what_is_there_or_is_an_error_if_that_was_asked_for(self) -> None:
        self.need("upload")
        self.need("keep")
        await self.place("there", b"before")
        async with self._objects(exists="keep") as (agent, region), agent.register(b"behind") as source:
            async with region.objects.upload("there") as upload:
                await upload.put(1, source[:])
                assert await upload.complete() == ""
            assert await self.fetch("there") == b"before"
        async with self._objects(exists="error") as (agent, region), agent.register(b"behind") as source:
            async with region.objects.upload("there") as upload:
                await upload.put(1, source[:])
                with pytest.raises(ObjectExistsError, match="there"):
                    await upload.complete()
            assert await self.fetch("there") == b"before"
        async with self._objects() as (agent, region), agent.register(b"behind") as source:
            async with region.objects.upload("there") as upload:
                await upload.put(1, source[:])
                assert await upload.complete()
            assert await self.fetch("there") == b"behind"
        assert await self.unfinished() == []

    # -- what moves no bytes

    async def test_list_head_copy_and_delete(self) -> None:
        async with self._objects() as (_, region):
            for key in ("a/1", "a/2", "ab", "b"):
                await self.place(key, key.encode())
            found = [info async for info in region.objects.list()]
            assert [info.key for info in found] == ["a/1", "a/2", "ab", "b"]
            assert [info.nbytes for info in found] == [3, 3, 2, 1]
            assert [info.key async for info in region.objects.list("a/")] == ["a/1", "a/2"]
            assert [info.key async for info in region.objects.list(after="a/2")] == ["ab", "b"]
            async for info in region.objects.list():
                assert info.key == "a/1"
                break
            info = await region.objects.head("ab")
            assert (info.key, info.nbytes) == ("ab", 2)
            assert info.etag
            await region.objects.copy("ab", "c/new")
            assert await self.fetch("c/new") == b"ab"
            with pytest.raises(ObjectMissingError, match="nothing"):
                await region.objects.copy("nothing", "c/other")
            await region.objects.delete(["ab", "b", "was-never-there"])
            assert [info.key async for info in region.objects.list()] == ["a/1", "a/2", "c/new"]

    async def test_what_is_open_for_reading_is_never_written(self) -> None:
        await self.place("kept", b"kept")
        async with self._objects("r") as (agent, region), agent.register(b"lost") as source:
            with pytest.raises(AccessError, match="was opened in mode 'r'"):
                agent.put(source[:], region["kept"], backend=self.route)
            with pytest.raises(AccessError, match="was opened in mode 'r'"):
                await region.objects.delete("kept")
            with pytest.raises(AccessError, match="was opened in mode 'r'"):
                await region.objects.copy("kept", "other")
            assert await self.fetch("kept") == b"kept"

    async def test_a_closed_region_is_of_no_use(self) -> None:
        async with self._objects() as (agent, region), agent.register(b"data") as source:
            rows = region["key"]
            plan = agent.prepare("put", source[:], rows, backend=self.route)
            await region.aclose()
            with pytest.raises(ClosedError):
                plan()
            with pytest.raises(ClosedError):
                region["key"]
            with pytest.raises(ClosedError):
                await region.objects.head("key")

    # -- either side, and many

    @both_ways
    async def test_the_objects_may_be_the_local_side(self, op: Op) -> None:
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, (3, 1000), np.uint8)
            before = data.copy()
            stored = _RANDOM.integers(0, 256, (3, 1000), np.uint8)
            for number in range(3):
                await self.place(f"near/{number}", stored[number].tobytes())
            keys = [f"near/{number}" for number in range(3)]
            async with agent.register(data) as memory:
                call = agent.put if op == "put" else agent.get
                await call(region[keys], memory[:], backend=self.route)
            if op == "put":
                assert np.array_equal(data, stored)
            else:
                assert b"".join([await self.fetch(key) for key in keys]) == before.tobytes()

    async def test_thousands_of_rows_of_hundreds_of_objects(self) -> None:
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, (200, 16, 64), np.uint8)
            back = np.zeros_like(data)
            keys = [f"many/{number}" for number in range(200)]
            order = _RANDOM.permutation(200)
            async with agent.register(data) as source, agent.register(back) as target:
                await agent.put(source[order], region[[keys[n] for n in order]], backend=self.route)
                # The rows of one object lie scattered in memory, as the layers of a block of a KV cache do.
                rows = region.descriptors(
                    np.tile(np.arange(16) * 64, 200), 64, keys=[key for key in keys for _ in range(16)]
                )
                await agent.get(target[:, ::-1], rows, backend=self.route)
            assert np.array_equal(back[:, ::-1], data)

    async def test_told_row_by_row(self) -> None:
        async with self._objects() as (agent, region):
            data = _RANDOM.integers(0, 256, (50, 1000), np.uint8)
            keys = [f"told/{number}" for number in range(50)]
            async with agent.register(data.copy()) as memory:
                await agent.put(memory[:], region[keys], backend=self.route)
            back = np.zeros_like(data)
            async with agent.register(back) as target:
                order = _RANDOM.permutation(50)
                told = []
                async for row in agent.get(target[order], region[[keys[n] for n in order]], backend=self.route):
                    assert np.array_equal(back[order[row]], data[order[row]])
                    told.append(row)
                assert sorted(told) == list(range(50))
