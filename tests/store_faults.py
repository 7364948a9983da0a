"""Every fault that a network and a store can have, at every request of every operation: what all clouds share.

What comes is the right bytes or the right error, within the deadline; a byte that was changed is found; nothing is left
of an upload that failed. The servers are real, the proxy before them does the harm, and what was done is looked at past
it. Which request is which and in which words a store refuses is for a subclass of `StoreFaults` to say. `FAULT_ROUNDS`
is how often each fault is met.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import pytest
from fault_proxy import CutUpload, Fault, FaultProxy, Flip, Length, Reply, Request, Reset, Stall, StallUpload, Truncate
from lent import until
from s3_accounts import rounds, soon

from asyncxfer import ChecksumError, ObjectError, TransferTimeout
from asyncxfer.backends._object._attempts import Ask, Attempts
from asyncxfer.backends._object._store import ObjectStore, Part

__all__ = [
    "LARGE",
    "NBYTES",
    "SEA",
    "Stage",
    "StoreFaults",
    "Target",
    "When",
    "abort",
    "another_key",
    "copy",
    "delete",
    "delete_one",
    "get",
    "get_range",
    "head",
    "list_",
    "place",
    "put",
    "put_new",
    "put_parts",
    "put_two_parts",
]

NBYTES = 200_000
SEA = os.urandom(NBYTES)
LARGE = os.urandom(5 << 20)
_names = itertools.count()


def another_key(what: str) -> str:
    """A key that nothing else has."""
    return f"{what}-{os.getpid()}-{next(_names)}"


def place(nbytes: int) -> memoryview:
    """Memory for so many bytes."""
    return memoryview(bytearray(nbytes))


class Faulted(ObjectStore, Protocol):
    """A store over HTTP of our own."""

    attempts: Attempts


@dataclass
class Stage(ABC):
    """A store behind a proxy, and the same bucket past it.

    Attributes
    ----------
    another : callable
        Opens one more behind the proxy, with this configuration.
    """

    proxy: FaultProxy
    store: Faulted
    direct: Faulted
    another: Callable[..., AbstractAsyncContextManager[Faulted]]

    @abstractmethod
    def left(self, key: str) -> list[str]:
        """Look for what is left of uploads of an object: there should be nothing."""

    async def has(self, key: str, body: bytes) -> None:
        """See that an object has these bytes."""
        found = place(len(body))
        await self.direct.read(key, 0, (found,), whole=True, verify=False, etag=None, deadline=soon())
        assert found == body

    async def make(self, key: str, body: bytes) -> str:
        """Make an object past the proxy."""
        return await self.direct.write(key, (memoryview(body),), exists="replace", deadline=soon())


# ---- operations ---------------------------------------------------------------------------------------------------


async def get(stage: Stage, key: str) -> None:
    await stage.make(key, SEA)
    found = place(NBYTES)
    await stage.store.read(key, 0, (found[:99], found[99:]), whole=True, verify=False, etag=None, deadline=soon())
    assert found == SEA


async def get_range(stage: Stage, key: str) -> None:
    await stage.make(key, SEA)
    found = place(NBYTES - 10)
    await stage.store.read(key, 10, (found,), whole=False, verify=True, etag=None, deadline=soon())
    assert found == SEA[10:]


async def put(stage: Stage, key: str) -> None:
    await stage.store.write(key, (memoryview(SEA),), exists="replace", deadline=soon())
    await stage.has(key, SEA)


async def put_new(stage: Stage, key: str) -> None:
    assert await stage.store.write(key, (memoryview(SEA),), exists="error", deadline=soon())
    await stage.has(key, SEA)


async def put_parts(stage: Stage, key: str, bodies: tuple[bytes, ...] = (SEA,)) -> None:
    store = stage.store
    upload = await store.begin(key, deadline=soon())
    try:
        parts: list[Part] = []
        for number, body in enumerate(bodies, 1):
            parts.append(await store.part(key, upload, number, (memoryview(body),), deadline=soon()))
        assert await store.complete(key, upload, parts, exists="error", deadline=soon())
    except BaseException:
        await store.abort(key, upload, deadline=soon())
        raise
    await stage.has(key, b"".join(bodies))


async def put_two_parts(stage: Stage, key: str) -> None:
    await put_parts(stage, key, (LARGE, SEA))


async def abort(stage: Stage, key: str) -> None:
    upload = await stage.store.begin(key, deadline=soon())
    await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
    try:
        await stage.store.abort(key, upload, deadline=soon())
    except ObjectError:
        await stage.store.abort(key, upload, deadline=soon())
        raise


async def head(stage: Stage, key: str) -> None:
    etag = await stage.make(key, SEA)
    info = await stage.store.head(key, deadline=soon())
    assert (info.nbytes, info.etag) == (NBYTES, etag)


async def list_(stage: Stage, key: str) -> None:
    for part in "abc":
        await stage.make(f"{key}/{part}", SEA[:9])
    found = [info async for info in stage.store.list(f"{key}/", deadline=soon())]
    assert [(info.key, info.nbytes) for info in found] == [(f"{key}/{part}", 9) for part in "abc"]


async def delete(stage: Stage, key: str) -> None:
    keys = [f"{key}/{part}" for part in "abc"]
    for each in keys:
        await stage.make(each, SEA[:9])
    await stage.store.delete(keys, deadline=soon())
    assert [info async for info in stage.direct.list(f"{key}/", deadline=soon())] == []


async def delete_one(stage: Stage, key: str) -> None:
    await stage.make(key, SEA[:9])
    await stage.store.delete([key], deadline=soon())
    assert [info async for info in stage.direct.list(key, deadline=soon())] == []


async def copy(stage: Stage, key: str) -> None:
    await stage.make(key, SEA)
    await stage.store.copy(key, f"{key}-copy", deadline=soon())
    await stage.has(f"{key}-copy", SEA)


When = Callable[[Request], bool]


class Target(NamedTuple):
    """An operation, and which of its requests the fault meets."""

    do: Callable[[Stage, str], Awaitable[None]]
    when: When
    answered: int = 0  # bytes that the body of a right answer has at least
    sent: int = 0  # bytes that the body of the request has
    sized: bool = True  # the answer's length says when all of it has come
    told: bool = True  # that it was refused


# ---- the tests ----------------------------------------------------------------------------------------------------


class StoreFaults(ABC):
    """Tests of the store of a cloud.

    Attributes
    ----------
    targets : mapping of str to Target
        By their names.
    ways : tuple of (str, str)
        Names and schemes, of what is also tried by another scheme than http.
    url : str
        What urls begin with, for messages.
    refusal : str
        What the error of `denied` matches.
    """

    targets: ClassVar[Mapping[str, Target]]
    ways: ClassVar[tuple[tuple[str, str], ...]] = ()
    timed: ClassVar[tuple[str, ...]] = ("get", "put", "head", "list", "complete")
    url: str
    refusal: ClassVar[str]

    @abstractmethod
    def staged(self, scheme: str = "http", **config: Any) -> AbstractAsyncContextManager[Stage]:
        """Open a store behind a proxy, with this configuration."""

    @abstractmethod
    def said(self) -> Iterator[Fault]:
        """Give what the store itself may say for a while."""

    @abstractmethod
    def denied(self) -> Fault:
        """Give what it says to who may not."""

    def met(self, stage: Stage) -> None:
        """See what the faults of `said` have led to, once all of them were met; nothing that would be seen here."""
        assert stage.store.attempts.tokens > 0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "scheme" in metafunc.fixturenames:
            metafunc.parametrize(("name", "scheme"), [*((name, "http") for name in self.targets), *self.ways])
        elif "timed_name" in metafunc.fixturenames:
            metafunc.parametrize("timed_name", self.timed)
        elif "told_name" in metafunc.fixturenames:
            metafunc.parametrize("told_name", [name for name, target in self.targets.items() if target.told])
        elif "name" in metafunc.fixturenames:
            metafunc.parametrize("name", list(self.targets))

    def faults(self, target: Target) -> Iterator[Fault]:
        """Give those that this request can meet."""
        yield Reset(reaches_server=False)
        yield Reset()
        yield Stall(seconds=0.1)
        yield from self.said()
        if target.sized:
            yield Length(by=5)
        if target.sized and target.answered:
            yield Length(by=-1)
        if target.answered:
            yield Flip(at=0)
            for after in (1, target.answered // 2):
                yield Reset(after=after)
                yield Truncate(after=after)
            if target.answered == NBYTES:
                yield Flip(at=NBYTES // 2)
                yield Flip(at=NBYTES - 1)
                yield Truncate(after=NBYTES - 1)
        if target.sent:
            yield CutUpload(after=target.sent // 2)

    async def test_a_fault_that_passes_does_no_harm(self, name: str, scheme: str) -> None:
        target = self.targets[name]
        async with self.staged(scheme) as stage:
            for _ in rounds():
                for fault in self.faults(target):
                    key = another_key(name)
                    stage.proxy.next(fault, when=target.when)
                    try:
                        await target.do(stage, key)
                    except Exception as error:
                        error.add_note(f"met {fault}")
                        raise
                    assert stage.left(key) == [], fault
                    assert stage.proxy.waiting == 0, f"nothing met {fault}"
            self.met(stage)

    async def test_what_stands_still_is_asked_for_again(self, name: str) -> None:
        target = self.targets[name]
        stalls: list[Fault] = [Stall()]
        stalls += [Stall(after=target.answered // 2)] if target.answered else []
        stalls += [StallUpload(after=target.sent // 2)] if target.sent else []
        async with self.staged(object_attempt_timeout=0.15, object_attempts=20) as stage:
            for fault in stalls:
                for _ in rounds():
                    key = another_key(name)
                    stage.proxy.next(fault, when=target.when)
                    await target.do(stage, key)
                    assert stage.left(key) == [], fault

    async def test_a_refusal_is_told(self, told_name: str) -> None:
        target = self.targets[told_name]
        async with self.staged() as stage:
            for _ in rounds():
                key = another_key(told_name)
                stage.proxy.next(self.denied(), when=target.when)
                with pytest.raises(ObjectError, match=self.refusal) as caught:
                    await target.do(stage, key)
                assert caught.value.status == 403
                assert stage.left(key) == []

    async def test_who_is_refused_comes_again(self) -> None:
        async with self.staged(object_attempts=50) as stage:
            for _ in rounds():
                key = another_key("refused")
                stage.proxy.refuse()
                async with stage.another(object_attempts=50) as store:
                    full = store.attempts.tokens
                    task = asyncio.create_task(store.write(key, (memoryview(SEA),), exists="replace", deadline=soon()))
                    await until(lambda store=store, full=full: store.attempts.tokens < full)  # type: ignore[misc]
                    stage.proxy.accept()
                    await task
                await stage.has(key, SEA)
            stage.proxy.refuse()
            async with stage.another(object_attempts=2) as store:
                with pytest.raises(
                    ObjectError, match=rf"put of {self.url}/k: {stage.proxy.url}: no connection.*; check"
                ):
                    await store.write("k", (memoryview(SEA),), exists="replace", deadline=soon())

    async def test_the_deadline_holds_whatever_is_met(self, timed_name: str) -> None:
        target = self.targets[timed_name]
        async with self.staged() as stage:
            for fault in (Stall(), Reply(500)):
                key = another_key(timed_name)
                stage.proxy.always(fault, when=target.when)
                late = stage.store.attempts

                async def run(ask: Ask, deadline: float, late: Attempts = late) -> None:
                    await Attempts.run(late, ask, min(deadline, soon(0.3)))

                stage.store.attempts.run = run  # type: ignore[method-assign]
                with pytest.raises((TransferTimeout, ObjectError), match=f"{self.url}/"):
                    await target.do(stage, key)
                del stage.store.attempts.run
                stage.proxy.always(None)
                assert stage.left(key) == []

    async def test_damage_that_goes_on_is_told(self) -> None:
        async with self.staged(object_attempts=3) as stage:
            stage.proxy.always(Flip(at=7), when=self.targets["get"].when)
            with pytest.raises(ChecksumError, match=rf"get of {self.url}/.*: damaged bytes.*\(200, .*3 attempts\)"):
                await get(stage, another_key("damage"))

    @pytest.mark.parametrize("broken", ["part", "complete"])
    async def test_nothing_is_left_of_an_upload_that_fails(self, broken: str) -> None:
        """Whatever is refused, again and again: the upload is given up, and what was stored of it goes."""
        async with self.staged(object_attempts=2) as stage:
            for fault in (self.denied(), Reply(500), Reset()):
                stage.proxy.always(fault, when=self.targets[broken].when)
                key = another_key("given up")
                with pytest.raises(ObjectError, match=f"put of {self.url}/"):
                    await (put_two_parts if broken == "part" else put_parts)(stage, key)
                stage.proxy.always(None)
                assert stage.left(key) == [], fault
