"""Blocks as objects, as their users see them: what is put is got, whole and its own key's, or missed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from object_backend import STORED, MemBackend
from servers import S3Server, plain_request
from store_bench import BLOCK, COUNT, Bench, versions
from store_writer import block_of, key_of

from asyncxfer import AccessError, Agent, ClosedError, ConfigError, DescriptorError
from asyncxfer import store as stores
from asyncxfer.store import ObjectStore, Store, StoreError, StoreFormatError
from asyncxfer.store._object_format import TRAILER_BYTES, name_of
from asyncxfer.store._objects import idents_of

_numbers = itertools.count()


class Bucket:
    """A bucket, as stores are opened in it and as the test itself reaches it."""

    def __init__(self, url: str, options: dict[str, object], server: S3Server | None) -> None:
        self.url = url
        self.options = options
        self._server = server

    def _where(self, name: str) -> tuple[str, str]:
        bucket, _, prefix = self.url.partition("://")[2].partition("/")
        return bucket, f"{prefix}/{name}"

    async def read(self, name: str) -> bytes:
        if self._server is None:
            return STORED[self._where(name)]
        return await self._request("GET", name)

    async def write(self, name: str, data: bytes) -> None:
        if self._server is None:
            STORED[self._where(name)] = data
        else:
            await self._request("PUT", name, data)

    async def _request(self, method: str, name: str, body: bytes = b"") -> bytes:
        assert self._server is not None
        where = "/".join((self._server.url, *self._where(name)))
        answer = await asyncio.to_thread(plain_request, method, where, identity=self._server.admin, body=body)
        assert answer.status == 200, answer
        return answer.body


def s3_options(server: S3Server) -> dict[str, object]:
    return {
        "endpoint_url": server.url, "region_name": "us-east-1", "addressing_style": "path",
        "aws_access_key_id": server.admin.access_key, "aws_secret_access_key": server.admin.secret_key,
    }  # fmt: skip


class ObjectBench(Bench):
    """An agent with memory, and a place for stores of objects."""

    def __init__(self, agent: Agent, region: Any, place: Bucket) -> None:
        self.agent = agent
        self.region = region
        self.memory = region.array
        self.place = place

    def open(self, **options: Any) -> stores.Opening[Store]:
        if options.get("mode", "w") == "w":
            options = {"block_bytes": BLOCK} | options
        given = {"options": self.place.options} | options
        return stores.open(given.pop("url", self.place.url), agent=self.agent, **given)


@pytest.fixture
async def bench(place: Bucket) -> AsyncIterator[ObjectBench]:
    backends: list[Any] = ["local", "s3"] if place.options else ["local", MemBackend]
    async with Agent("bench", backends=backends) as agent, agent.allocate((COUNT, BLOCK), np.uint8) as region:
        made = ObjectBench(agent, region, place)
        yield made
        vars(made).clear()


def object_of(number: int) -> str:
    return name_of(idents_of([key_of(number)])[0])


async def list_of(bench: ObjectBench) -> AsyncIterator[Any]:
    async with bench.agent.open(bench.place.url, options=bench.place.options) as region:
        async for info in region.objects.list():
            yield info


class Stored:
    """What holds wherever the objects are."""

    async def test_what_is_put_is_got_here_and_after_reopening(self, bench: ObjectBench) -> None:
        async with bench.open() as store:
            assert isinstance(store, ObjectStore)
            assert store.report.created
            await bench.put(store, versions(*range(20)))
            assert await bench.get(store, [5, 99, 19, 0]) == versions(5, 19, 0)
            assert store.stats() == {"puts": 20, "hits": 3, "misses": 1, "deleted": 0, "damaged": 0}
            assert "open" in repr(store)
            assert store
        async with bench.open(block_bytes=None) as store:
            assert (store.block_bytes, store.report.created) == (BLOCK, False)
            assert await bench.get(store, list(range(30))) == versions(*range(20))
            await store.compact()
        assert "closed" in repr(store)
        with pytest.raises(ClosedError):
            await store.contains([b"a"])

    async def test_a_reader_changes_nothing(self, bench: ObjectBench) -> None:
        with pytest.raises(StoreError, match="a writer has to make it"):
            await bench.open(mode="r")
        with pytest.raises(StoreError, match="block_bytes= is needed"):
            await bench.open(block_bytes=None)
        async with bench.open() as writer, bench.open(mode="r") as reader:
            await bench.put(writer, versions(1, 2))
            assert await bench.get(reader, [1, 2, 3]) == versions(1, 2)
            with pytest.raises(AccessError, match="mode 'r'"):
                await reader.put([b"a"], bench.region[0])
            with pytest.raises(AccessError, match="mode 'r'"):
                await reader.delete([b"a"])

    async def test_contains_and_delete(self, bench: ObjectBench) -> None:
        async with bench.open() as store:
            await bench.put(store, versions(1, 2, 3))
            assert (await store.contains([key_of(n) for n in (3, 9, 1)])).tolist() == [True, False, True]
            assert (await store.delete([key_of(n) for n in (2, 9, 2)])).tolist() == [True, False, True]
            assert await bench.get(store, [1, 2, 3]) == versions(1, 3)
            with pytest.raises(StoreError, match="not counted"):
                len(store)

    async def test_an_object_that_is_there_is_kept_unless_it_is_to_be_replaced(self, bench: ObjectBench) -> None:
        async with bench.open() as store:
            await bench.put(store, versions(1))
            if bench.place.options:  # the backend of this process knows no conditions
                await bench.put(store, versions(1, version=2))
                assert await bench.get(store, [1]) == versions(1)
            await bench.put(store, versions(1, version=3), replace=True)
            assert await bench.get(store, [1]) == versions(1, version=3)

    @pytest.mark.parametrize("harm", ["flipped", "short", "long", "of another key", "empty"])
    async def test_what_is_damaged_is_missed_told_and_put_anew(self, bench: ObjectBench, harm: str) -> None:
        async with bench.open() as store:
            await bench.put(store, versions(1, 2))
            data = bytearray(await bench.place.read(object_of(1)))
            assert len(data) == BLOCK + TRAILER_BYTES
            data[1000] ^= 1
            bad = {
                "flipped": bytes(data), "short": bytes(data[:-7]), "long": bytes(data) + b"more", "empty": b"",
                "of another key": await bench.place.read(object_of(2)),
            }[harm]  # fmt: skip
            await bench.place.write(object_of(1), bad)
            assert await bench.get(store, [1, 2], damaged=True) == versions(2)
            assert store.stats()["damaged"] == 1
            await bench.put(store, versions(1))
            assert await bench.get(store, [1, 2]) == versions(1, 2)

    async def test_a_budget_is_kept_by_deleting_what_was_used_longest_ago(self, bench: ObjectBench) -> None:
        whole = BLOCK + TRAILER_BYTES
        async with bench.open(budget=4 * whole) as store:
            await bench.put(store, versions(0))
            for number in range(1, 10):
                await bench.put(store, versions(number))
                assert await bench.get(store, [0]) == versions(0)
                assert store.stats()["bytes"] <= 4 * whole
            assert await bench.get(store, list(range(10))) == versions(0, 7, 8, 9)
            assert store.stats()["evicted"] == 6
            await bench.put(store, versions(*range(20, 28)))
            assert len(store) == 4
            assert len([info async for info in list_of(bench)]) == 5  # and the head
        async with bench.open(budget=2 * whole) as store:
            assert (store.report.blocks, store.report.over_budget, len(store)) == (2, 2, 2)
        with pytest.raises(StoreError, match="no room for an object"):
            await bench.open(budget=BLOCK)

    async def test_wrong_stores_and_wrong_calls(self, bench: ObjectBench) -> None:
        async with bench.open() as store:
            with pytest.raises(StoreFormatError, match="holds blocks of 4,096 bytes, not of 512"):
                await bench.open(block_bytes=512)
            with pytest.raises(ConfigError, match="are for files"):
                bench.open(direct=True)
            for call in (store.pin, store.unpin):
                with pytest.raises(StoreError, match="cannot be pinned"):
                    await call([b"a"])
            with pytest.raises(StoreError, match="cannot be pinned"):
                await store.put([b"a"], bench.region[0], pin=True)
            with pytest.raises(DescriptorError, match="need rows"):
                await store.put([b"a"], bench.region[:2])
            with pytest.raises(DescriptorError, match="0 bytes"):
                await store.get([b""], bench.region[0])
        await bench.place.write("store", b"something else")
        with pytest.raises(StoreFormatError, match="is not the head of a store"):
            await bench.open()
        await bench.place.write("store", bytes(64))
        with pytest.raises(StoreFormatError, match="is not the head of a store"):
            await bench.open()

    async def test_a_call_that_is_cancelled_leaves_nothing_half_done(self, bench: ObjectBench) -> None:
        numbers = range(COUNT)
        for number in numbers:
            bench.memory[number] = block_of(number, 1, BLOCK)
        keys = [key_of(number) for number in numbers]
        async with bench.open() as store:
            for turns in (1, 3, 10):
                putting = asyncio.ensure_future(store.put(keys, bench.region[:]))
                for _ in range(turns):
                    await asyncio.sleep(0)
                putting.cancel()
                await asyncio.wait([putting])
            await store.put(keys, bench.region[:])
            getting = asyncio.ensure_future(store.get(keys, bench.region[:]))
            await asyncio.sleep(0)
            getting.cancel()
            await asyncio.wait([getting])
            assert await bench.get(store, list(numbers)) == versions(*numbers)


class TestInThisProcess(Stored):
    @pytest.fixture
    def place(self) -> Iterator[Bucket]:
        yield Bucket(f"mem://bucket/{next(_numbers)}", {}, None)
        STORED.clear()


class TestSeaweedFS(Stored):
    @pytest.fixture
    def place(self, s3: S3Server, bucket: str) -> Bucket:
        return Bucket(f"s3://{bucket}/{next(_numbers)}", s3_options(s3), s3)


def test_names_tell_every_key_from_every_other() -> None:
    long = b"k" * 33
    keys = [b"a", b"a\0", b"/", b"\xff" * 32, long, idents_of([long])[0][:32]]
    names = [name_of(ident) for ident in idents_of(keys)]
    assert len(set(names)) == len(keys)
    assert names[0].endswith("/61")
    assert names[4].endswith(".sha256")
    assert all(name.isascii() and name == name.lower() for name in names)
    assert len({name_of(ident)[:2] for ident in idents_of([b"%d" % n for n in range(5000)])}) == 256
