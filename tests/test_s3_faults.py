"""Every fault that a network and a store can have, at every request of every operation of `S3Store`.

What comes is the right bytes or the right error, within the deadline; a byte that was changed is found; nothing is left
of an upload that failed. The server is real, the proxy before it does the harm, and what was done is looked at past it.
`FAULT_ROUNDS` is how often each fault is met.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from fault_proxy import (
    CutUpload,
    Fault,
    FaultProxy,
    Flip,
    Length,
    Reply,
    Request,
    Reset,
    Stall,
    StallUpload,
    Truncate,
    access_denied,
    another_region,
    expired_token,
    internal_error,
    slow_down,
)
from lent import until
from s3_accounts import FixedAccount, rounds, s3_store, soon
from servers import S3Server, plain_request

from asyncxfer import ChecksumError, ObjectError, TransferTimeout
from asyncxfer.backends._object._attempts import Ask, Attempts
from asyncxfer.backends._object._store import Part
from asyncxfer.backends._s3_store import S3Store

NBYTES = 200_000
SEA = os.urandom(NBYTES)
LARGE = os.urandom(5 << 20)
_names = itertools.count()


@pytest.fixture(name="shared", scope="module")
def shared_fixture(s3: S3Server) -> Iterator[str]:
    """A bucket for all tests here: a new one takes a second to have room for much."""
    with s3.bucket() as name:
        yield name


def place(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


@dataclass
class Stage:
    """A store behind a proxy, and the same bucket past it."""

    proxy: FaultProxy
    account: FixedAccount
    store: S3Store
    direct: S3Store
    s3: S3Server
    bucket: str

    def uploads(self) -> list[str]:
        """Multipart uploads that were begun and have not ended."""
        answer = plain_request("GET", f"{self.s3.url}/{self.bucket}?uploads=", identity=self.s3.admin)
        assert answer.status == 200
        return [piece.partition("<")[0] for piece in answer.body.decode().split("<UploadId>")[1:]]

    async def has(self, key: str, body: bytes) -> None:
        found = place(len(body))
        await self.direct.read(key, 0, (found,), whole=True, verify=False, etag=None, deadline=soon())
        assert found == body


@contextlib.asynccontextmanager
async def staged(s3: S3Server, bucket: str, *, scheme: str = "http", **config: object) -> AsyncIterator[Stage]:
    tls, target = (None, s3.url) if scheme == "http" else (s3.tls, s3.https_url)
    server_tls = None if tls is None else s3.certified.server_context()
    with FaultProxy(target, tls=server_tls, target_tls=tls) as proxy:
        account = FixedAccount(proxy.url, bucket, s3.admin, tls=tls)
        async with s3_store(account, **config) as store, s3_store(FixedAccount(s3.url, bucket, s3.admin)) as direct:
            yield Stage(proxy, account, store, direct, s3, bucket)


# ---- operations ---------------------------------------------------------------------------------------------------


async def get(stage: Stage, key: str) -> None:
    await stage.direct.write(key, (memoryview(SEA),), exists="replace", deadline=soon())
    found = place(NBYTES)
    await stage.store.read(key, 0, (found[:99], found[99:]), whole=True, verify=False, etag=None, deadline=soon())
    assert found == SEA


async def get_range(stage: Stage, key: str) -> None:
    await stage.direct.write(key, (memoryview(SEA),), exists="replace", deadline=soon())
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
    etag = await stage.direct.write(key, (memoryview(SEA),), exists="replace", deadline=soon())
    info = await stage.store.head(key, deadline=soon())
    assert (info.nbytes, info.etag) == (NBYTES, etag)


async def list_(stage: Stage, key: str) -> None:
    for part in "abc":
        await stage.direct.write(f"{key}/{part}", (memoryview(SEA)[:9],), exists="replace", deadline=soon())
    found = [info async for info in stage.store.list(f"{key}/", deadline=soon())]
    assert [(info.key, info.nbytes) for info in found] == [(f"{key}/{part}", 9) for part in "abc"]


async def delete(stage: Stage, key: str) -> None:
    keys = [f"{key}/{part}" for part in "abc"]
    for each in keys:
        await stage.direct.write(each, (memoryview(SEA)[:9],), exists="replace", deadline=soon())
    await stage.store.delete(keys, deadline=soon())
    assert [info async for info in stage.direct.list(f"{key}/", deadline=soon())] == []


async def delete_one(stage: Stage, key: str) -> None:
    await stage.direct.write(key, (memoryview(SEA)[:9],), exists="replace", deadline=soon())
    await stage.store.delete([key], deadline=soon())
    assert [info async for info in stage.direct.list(key, deadline=soon())] == []


async def copy(stage: Stage, key: str) -> None:
    await stage.direct.write(key, (memoryview(SEA),), exists="replace", deadline=soon())
    await stage.store.copy(key, f"{key}-copy", deadline=soon())
    await stage.has(f"{key}-copy", SEA)


class Target(NamedTuple):
    """An operation, and which of its requests the fault meets."""

    do: Callable[[Stage, str], Awaitable[None]]
    when: Callable[[Request], bool]
    answered: int = 0  # bytes that the body of a right answer has at least
    sent: int = 0  # bytes that the body of the request has


TARGETS = {
    "get": Target(get, lambda asked: asked.method == "GET", NBYTES),
    "get range": Target(get_range, lambda asked: asked.method == "GET", NBYTES - 10),
    "put": Target(put, lambda asked: asked.method == "PUT", sent=NBYTES),
    "put new": Target(put_new, lambda asked: asked.method == "PUT", sent=NBYTES),
    "begin": Target(put_parts, lambda asked: asked.method == "POST" and "uploads=" in asked.target, 200),
    "part": Target(put_two_parts, lambda asked: asked.method == "PUT" and "partNumber=2" in asked.target, sent=NBYTES),
    "complete": Target(put_parts, lambda asked: asked.method == "POST" and "uploadId=" in asked.target, 200, 200),
    "abort": Target(abort, lambda asked: asked.method == "DELETE" and "uploadId=" in asked.target),
    "head": Target(head, lambda asked: asked.method == "HEAD"),
    "list": Target(list_, lambda asked: asked.method == "GET", 500),
    "delete": Target(delete, lambda asked: asked.method == "POST", 60, 100),
    "delete one": Target(delete_one, lambda asked: asked.method == "DELETE"),
    "copy": Target(copy, lambda asked: asked.method == "PUT", 100),
}


def faults(name: str) -> Iterator[Fault]:
    """Give those that this request can meet."""
    target = TARGETS[name]
    yield Reset(reaches_server=False)
    yield Reset()
    yield internal_error()
    yield internal_error(reaches_server=True)
    yield slow_down()
    yield slow_down(retry_after=0.05)
    yield Stall(seconds=0.1)
    yield expired_token()
    yield another_region(f"region-{next(_names)}")
    if name not in ("head", "abort", "delete one"):  # HEAD tells a length that nothing proves; the others tell none
        yield Length(by=5)
    if target.answered:
        yield Length(by=-1)
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


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "http") for name in TARGETS), ("get", "https"), ("put", "https")]
)
async def test_a_fault_that_passes_does_no_harm(s3: S3Server, shared: str, name: str, scheme: str) -> None:
    target = TARGETS[name]
    async with staged(s3, shared, scheme=scheme) as stage:
        for _ in rounds():
            for fault in faults(name):
                stage.proxy.next(fault, when=target.when)
                try:
                    await target.do(stage, f"{name}-{next(_names)}")
                except Exception as error:
                    error.add_note(f"met {fault}")
                    raise
                assert stage.uploads() == [], fault
        assert stage.account.refreshed
        assert stage.account.moves


@pytest.mark.parametrize("name", TARGETS)
async def test_what_stands_still_is_asked_for_again(s3: S3Server, shared: str, name: str) -> None:
    target = TARGETS[name]
    stalls: list[Fault] = [Stall()]
    stalls += [Stall(after=target.answered // 2)] if target.answered else []
    stalls += [StallUpload(after=target.sent // 2)] if target.sent else []
    async with staged(s3, shared, object_attempt_timeout=0.15, object_attempts=20) as stage:
        for fault in stalls:
            for _ in rounds():
                stage.proxy.next(fault, when=target.when)
                await target.do(stage, f"{name}-{next(_names)}")
                assert stage.uploads() == [], fault


@pytest.mark.parametrize("name", TARGETS)
async def test_a_refusal_is_told(s3: S3Server, shared: str, name: str) -> None:
    target = TARGETS[name]
    async with staged(s3, shared) as stage:
        for _ in rounds():
            stage.proxy.next(access_denied(), when=target.when)
            with pytest.raises(
                ObjectError, match=r"s3://.* \(403, .*request id|s3://.* \(403, Forbidden\); let"
            ) as caught:
                await target.do(stage, f"{name}-{next(_names)}")
            assert caught.value.status == 403
            assert stage.uploads() == []


# ---- one by one ---------------------------------------------------------------------------------------------------


async def test_who_is_refused_comes_again(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared, object_attempts=50) as stage:
        for _ in rounds():
            key = f"refused-{next(_names)}"
            stage.proxy.refuse()
            async with s3_store(stage.account, object_attempts=50) as store:
                full = store.attempts.tokens
                task = asyncio.create_task(store.write(key, (memoryview(SEA),), exists="replace", deadline=soon()))
                await until(lambda store=store, full=full: store.attempts.tokens < full)  # type: ignore[misc]
                stage.proxy.accept()
                await task
            await stage.has(key, SEA)
        stage.proxy.refuse()
        async with s3_store(stage.account, object_attempts=2) as store:
            with pytest.raises(
                ObjectError, match=rf"put of s3://{shared}/k: {stage.proxy.url}: no connection.*; check"
            ):
                await store.write("k", (memoryview(SEA),), exists="replace", deadline=soon())


@pytest.mark.parametrize("name", ["get", "put", "head", "list", "complete"])
async def test_the_deadline_holds_whatever_is_met(s3: S3Server, shared: str, name: str) -> None:
    target = TARGETS[name]
    async with staged(s3, shared) as stage:
        for fault in (Stall(), internal_error()):
            stage.proxy.always(fault, when=target.when)
            late = stage.store.attempts

            async def run(ask: Ask, deadline: float, late: Attempts = late) -> None:
                await Attempts.run(late, ask, min(deadline, soon(0.3)))

            stage.store.attempts.run = run  # type: ignore[method-assign]
            with pytest.raises((TransferTimeout, ObjectError), match=f"s3://{shared}/"):
                await target.do(stage, f"{name}-{next(_names)}")
            del stage.store.attempts.run
            stage.proxy.always(None)


async def test_nothing_is_left_of_an_upload_whose_id_was_damaged(s3: S3Server, shared: str) -> None:
    """It may not be seen from the answer; what was begun is found by its time when the other is aborted."""
    async with staged(s3, shared) as stage:
        for _ in rounds():
            key = f"damaged-{next(_names)}"
            body = "<InitiateMultipartUploadResult><UploadId>1_2</UploadId></InitiateMultipartUploadResult>"
            stage.proxy.next(Reply(200, body.encode(), reaches_server=True), when=TARGETS["begin"].when)
            upload = await stage.store.begin(key, deadline=soon())
            assert len(stage.uploads()) == 1
            with pytest.raises(ObjectError):
                await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
            await stage.store.abort(key, upload, deadline=soon())
            assert stage.uploads() == []


async def test_nothing_is_left_of_uploads_that_were_begun_unheard(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared, object_attempts=2) as stage:
        key = f"unheard-{next(_names)}"
        stage.proxy.next(Reset(), Reset(), when=TARGETS["begin"].when)
        with pytest.raises(ObjectError, match="put of"):
            await stage.store.begin(key, deadline=soon())
        assert stage.uploads() == []
        stage.proxy.next(Reset(), Reset(), when=TARGETS["begin"].when)
        stage.proxy.always(internal_error(), when=lambda asked: asked.method == "GET")
        with pytest.raises(ObjectError, match="put of"):
            await stage.store.begin(key, deadline=soon())
        assert len(stage.uploads()) == 2
        stage.proxy.always(None)
        await stage.store.aclose()
        assert stage.uploads() == []


async def test_uploads_of_one_key_at_once_leave_one_another_alone(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        key = f"together-{next(_names)}"
        stage.proxy.next(Reset(), Stall(seconds=0.3), Reset(), when=TARGETS["begin"].when)
        await asyncio.gather(*[put_over(stage, key) for _ in range(6)])
        await stage.store.aclose()
        assert stage.uploads() == []


async def put_over(stage: Stage, key: str) -> None:
    upload = await stage.store.begin(key, deadline=soon())
    part = await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
    await stage.store.complete(key, upload, (part,), exists="replace", deadline=soon())


async def test_an_upload_of_another_is_left_alone(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        key = f"shared-{next(_names)}"
        others = await stage.direct.begin(key, deadline=soon())
        await stage.direct.part(key, others, 1, (memoryview(SEA),), deadline=soon())
        stage.proxy.next(Reset(), when=TARGETS["begin"].when)
        mine = await stage.store.begin(key, deadline=soon())
        await stage.store.abort(key, mine, deadline=soon())
        assert stage.uploads() == [others]
        await stage.direct.abort(key, others, deadline=soon())


@pytest.mark.parametrize("off", [-7200.0, 7200.0])
async def test_a_clock_that_is_off_is_corrected(s3: S3Server, shared: str, off: float) -> None:
    async with staged(s3, shared) as stage:
        for name in ("get", "head", "put"):
            stage.store.dialect.skew = off
            await TARGETS[name].do(stage, f"{name}-{next(_names)}")
            assert abs(stage.store.dialect.skew) < 60


@pytest.mark.parametrize("name", ["copy", "complete", "delete", "list"])
async def test_a_success_that_turns_out_to_be_none_is_asked_for_again(s3: S3Server, shared: str, name: str) -> None:
    error = b"<Error><Key>k</Key><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    body = b"<DeleteResult>" + error + b"</DeleteResult>" if name == "delete" else error
    async with staged(s3, shared) as stage:
        stage.proxy.next(Reply(200, body), when=TARGETS[name].when)
        await TARGETS[name].do(stage, f"{name}-{next(_names)}")
        assert stage.store.attempts.pace.limit < 64
        stage.proxy.next(Reply(200, body.replace(b"SlowDown", b"AccessDenied")), when=TARGETS[name].when)
        with pytest.raises(ObjectError, match=r"\(200, AccessDenied.*let these credentials do s3:"):
            await TARGETS[name].do(stage, f"{name}-{next(_names)}")
        assert stage.uploads() == []


async def test_credentials_that_stay_expired_are_told(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        stage.proxy.always(expired_token())
        with pytest.raises(ObjectError, match=r"\(400, ExpiredToken, .*; get new credentials"):
            await put(stage, "k")
        assert stage.account.refreshed == 1


async def test_a_region_that_is_not_found_is_told(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        stage.proxy.next(another_region("a"), another_region("b"))
        with pytest.raises(
            ObjectError, match=r"in region b, not a \(301, PermanentRedirect, .*; name the bucket's region"
        ):
            await put(stage, "k")
        assert stage.account.moves == ["a"]
        await put(stage, "k")


async def test_a_server_that_is_not_trusted_is_told(s3: S3Server, shared: str) -> None:
    account = FixedAccount(s3.https_url, shared, s3.admin, tls=ssl.create_default_context())
    async with s3_store(account) as store:
        with pytest.raises(ObjectError, match=r"no TLS.*; name the authority"):
            await store.head("k", deadline=soon())


async def test_damage_that_goes_on_is_told(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared, object_attempts=3) as stage:
        stage.proxy.always(Flip(at=7), when=TARGETS["get"].when)
        with pytest.raises(ChecksumError, match=r"get of s3://.*: damaged bytes.*\(200, request id \w+, 3 attempts\)"):
            await get(stage, f"damage-{next(_names)}")
