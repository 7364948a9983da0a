"""Regions of objects, by a backend that somebody else could have written; the contract for those who write one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from object_backend import STORED, MemBackend

from asyncxfer import Agent, ConfigError, MemoryKind, NoRouteError, RegistrationError
from asyncxfer.testing import ObjectContract

BACKENDS: dict[str, Any] = {"backends": ["local", MemBackend]}
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    STORED.clear()


class TestMem(ObjectContract):
    route = "mem"
    skips: ClassVar[dict[str, str]] = dict(ObjectContract.skips) | dict.fromkeys(
        ("cancel", "timeout", "exists", "upload"), "it is small"
    )

    @pytest.fixture(autouse=True)
    def _prefix(self) -> None:
        self.url = f"mem://bucket/{os.getpid()}-{next(_numbers)}"
        self.opening: dict[str, Any] = {}

    def backends(self) -> list[Any]:
        return [MemBackend]

    def _place(self, key: str) -> tuple[str, str]:
        return "bucket", f"{self.url.removeprefix('mem://bucket/')}/{key}"

    async def fetch(self, key: str) -> bytes:
        return STORED[self._place(key)]

    async def place(self, key: str, data: bytes) -> None:
        STORED[self._place(key)] = data


async def test_a_region_of_objects_says_what_it_is() -> None:
    async with Agent("a", **BACKENDS) as agent, agent.open("mem://bucket/some/prefix", name="blocks") as region:
        assert (region.name, region.kind, region.shape, region.nbytes) == ("blocks", MemoryKind.OBJECT, None, 0)
        assert "mem://bucket/some/prefix/" in repr(region)
        assert region.readonly
        assert region.objects.url == "mem://bucket/some/prefix/"
        with pytest.raises(RegistrationError, match="only a file can be synced"):
            await region.sync()
        with pytest.raises(RegistrationError, match="which peers do not reach"):
            region.grant("somebody")
        with pytest.raises(RegistrationError, match="was made by open"):
            region.array  # noqa: B018
        assert agent.stats()["regions"] == 1
    assert agent.stats()["regions"] == 0
    assert "closed" in repr(region)


async def test_memory_and_files_have_no_objects(tmp_path: Any) -> None:
    async with Agent("a", **BACKENDS) as agent, agent.allocate(8, "uint8") as memory:
        with pytest.raises(RegistrationError, match="only what was opened in a store"):
            memory.objects  # noqa: B018


@pytest.mark.parametrize(
    ("url", "more", "kind", "text"),
    [
        ("other://bucket", {}, RegistrationError, r"no backend can use other://bucket/ .*mem: opens mem://, not other"),
        ("mem://bucket", {"options": {"wrong": 1}}, RegistrationError, "there is no option 'wrong'"),
        ("mem://bucket", {"size": 5}, ConfigError, "size= is not for objects"),
        ("mem://bucket", {"mode": "a"}, ConfigError, "mode is 'a'"),
        ("mem://bucket", {"exists": "perhaps"}, ConfigError, "exists is 'perhaps'"),
        ("mem://", {}, ConfigError, "names no objects"),
    ],
)
async def test_what_cannot_be_opened_says_why(url: str, more: Any, kind: type[Exception], text: str) -> None:
    async with Agent("a", **BACKENDS) as agent:
        with pytest.raises(kind, match=text):
            await agent.open(url, **more)
        assert agent.stats()["regions"] == 0


async def test_objects_do_not_move_to_objects() -> None:
    async with Agent("a", **BACKENDS) as agent, agent.open("mem://bucket", "w") as region:
        with pytest.raises(NoRouteError, match="does not move object to or from object"):
            agent.put(region["a", :3], region["b", :3])
        explained = agent.explain("put", region["a", :3], region["b"])
        assert explained.nbytes == 3
        assert explained.route is None


async def test_a_plan_of_objects_can_be_a_plan_of_some() -> None:
    async with (
        Agent("a", **BACKENDS) as agent, agent.open("mem://bucket", "w") as region,
        agent.register(np.arange(40, dtype=np.uint8).reshape(4, 10)) as memory,
    ):  # fmt: skip
        plan = agent.prepare("put", memory[[0, 1, 2, 3]], region[["a", "b", "c", "d"]])
        await plan.select([3, 0], [1, 2])()
        assert {("bucket", "b"): bytes(range(30, 40)), ("bucket", "c"): bytes(range(10))} == STORED
