"""What is tried again, when, and what is said where it ends: attempts at a server that does what each test says."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from http_server import Client, Script, ok, serving, unanswering
from lent import until
from s3_accounts import soon

from asyncxfer import ChecksumError, ObjectError, ObjectMissingError, TransferTimeout
from asyncxfer._config import Config
from asyncxfer._http import Answer
from asyncxfer.backends._object._attempts import Act, Ask, Attempts, Header, Verdict
from asyncxfer.backends._object._pace import Pace, priority
from asyncxfer.backends._object._reading import Claim, Tongue, read
from asyncxfer.backends._object._sums import AT_ONCE, as_header, crc32c_of, crc64_of, crc64_of_small, from_header
from asyncxfer.backends._object._xml import Unreadable, parse

BODY = bytes(range(256)) * 40


class Plain:
    """A store without signatures: the status of an answer says it all."""

    backend = "plain"
    url = "plain://box"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.tls: ssl.SSLContext | None = None
        self.era = 0
        self.skew = 0.0
        self.told: list[str] = []
        self.elsewhere = endpoint

    async def sign(self, ask: Ask, host: bytes, deadline: float) -> tuple[bytes, list[Header]]:
        ask.era = self.era
        return ask.path, ask.headers

    def judge(self, ask: Ask, answer: Answer) -> Verdict:
        acts = {503: Act.SLOWER, 401: Act.RENEW, 403: Act.CLOCK, 301: Act.MOVE, 404: Act.END}
        after = answer.headers.get(b"retry-after")
        kind = ObjectMissingError if answer.status == 404 else ObjectError
        return Verdict(
            acts.get(answer.status, Act.AGAIN), "it refused", "ask nicely", answer.status, "Word", "id-1",
            after=None if after is None else float(after), region="there", skew=5.0, kind=kind,
        )  # fmt: skip

    async def renew(self, era: int) -> None:
        self.told.append("renew")

    async def move(self, region: str, era: int) -> None:
        self.told.append(f"move {region}")
        self.endpoint = self.elsewhere


def answers(*said: bytes) -> tuple[Script, list[bytes]]:
    """Give these one after the other, whatever the connection, the last for ever; and what was asked."""
    asked: list[bytes] = []

    async def script(client: Client) -> None:
        while True:
            asked.append(await client.request())
            await client.say(said[min(len(asked), len(said)) - 1])

    return script, asked


@contextlib.asynccontextmanager
async def attempts_at(url: str, **config: Any) -> AsyncIterator[tuple[Attempts, Plain]]:
    dialect = Plain(url)
    attempts = Attempts(dialect, Config(**config))
    try:
        yield attempts, dialect
    finally:
        await attempts.aclose()


@contextlib.asynccontextmanager
async def attempts_with(script: Script, **config: Any) -> AsyncIterator[tuple[Attempts, Plain]]:
    async with serving(script) as url, attempts_at(url, **config) as made:
        yield made


def get(into: memoryview | None = None) -> Ask:
    views = None if into is None else (into,)
    return Ask("get", "key", b"GET", b"/key", into=views, size=0 if into is None else into.nbytes)


FAIL = ok(b"", status=b"500 No")
SLOW = ok(b"", status=b"503 Slow")


# ---- again --------------------------------------------------------------------------------------------------------


async def test_what_fails_is_asked_for_again() -> None:
    script, asked = answers(FAIL, FAIL, ok())
    async with attempts_with(script) as (attempts, _):
        await attempts.run(get(), soon())
        assert len(asked) == 3


async def test_what_goes_on_failing_ends_with_what_the_store_said() -> None:
    script, asked = answers(FAIL)
    async with attempts_with(script, object_attempts=3) as (attempts, _):
        message = r"^get of plain://box/key: it refused \(500, Word, request id id-1, 3 attempts\); ask nicely$"
        with pytest.raises(ObjectError, match=message) as caught:
            await attempts.run(get(), soon())
        error = caught.value
        assert (error.url, error.status, error.code, error.request_id, error.backend) == (
            "plain://box/key", 500, "Word", "id-1", "plain",
        )  # fmt: skip
        assert len(asked) == 3


async def test_what_is_final_is_not_asked_for_again() -> None:
    script, asked = answers(ok(b"", status=b"404 No"))
    async with attempts_with(script) as (attempts, _):
        with pytest.raises(ObjectMissingError):
            await attempts.run(get(), soon())
        assert len(asked) == 1


async def test_repetitions_have_a_budget_which_success_fills() -> None:
    script, asked = answers(*[FAIL] * 3, ok())
    async with attempts_with(script) as (attempts, _):
        attempts.tokens = 12.0
        with pytest.raises(ObjectError, match="and so much fails that it is not tried again"):
            await attempts.run(get(), soon())
        assert (len(asked), attempts.tokens) == (3, 2.0)
        for _ in range(3):
            await attempts.run(get(), soon())
        assert attempts.tokens == 5.0
        del asked[:]
        attempts.tokens = 16.0
        await attempts.run(get(), soon())
        assert (len(asked), attempts.tokens) == (4, 17.0), "what it cost is given back"


# ---- remedies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"), [(b"401 Who", ["renew"]), (b"301 There", ["move there"]), (b"403 When", [])]
)
async def test_a_remedy_is_tried_once(status: bytes, told: list[str]) -> None:
    script, asked = answers(ok(b"", status=status), ok())
    async with attempts_with(script, object_attempts=1) as (attempts, dialect):
        await attempts.run(get(), soon())
        assert (dialect.told, len(asked)) == (told, 2)
        assert dialect.skew == (5.0 if not told else 0.0)
    script, asked = answers(ok(b"", status=status))
    async with attempts_with(script) as (attempts, dialect):
        with pytest.raises(ObjectError, match="2 attempts"):
            await attempts.run(get(), soon())
        assert (dialect.told, len(asked)) == (told, 2)


async def test_who_moves_asks_there_from_then_on() -> None:
    here, asked_here = answers(ok(b"", status=b"301 There"))
    there, asked_there = answers(ok())
    async with serving(there) as elsewhere, attempts_with(here) as (attempts, dialect):
        dialect.elsewhere = elsewhere
        for _ in range(2):
            await attempts.run(get(), soon())
        assert (len(asked_here), len(asked_there)) == (1, 2)


# ---- time ---------------------------------------------------------------------------------------------------------


async def test_the_deadline_ends_it_with_what_was_met_last() -> None:
    script, _ = answers(FAIL)
    async with attempts_with(script, object_attempts=100) as (attempts, _):
        with pytest.raises(TransferTimeout, match=r"get of plain://box/key: not done in time; .*: it refused \(500"):
            await attempts.run(get(), soon(0.3))


async def test_who_is_to_come_again_after_the_deadline_is_told_at_once() -> None:
    script, asked = answers(ok(b"", b"retry-after: 3600", status=b"503 Slow"))
    async with attempts_with(script) as (attempts, _), asyncio.timeout(20):
        with pytest.raises(TransferTimeout, match="503"):
            await attempts.run(get(), soon(60))
        assert len(asked) == 1


async def test_what_answers_nothing_is_asked_anew() -> None:
    waiting: list[Client] = []

    async def script(client: Client) -> None:
        await client.request()
        if not waiting:
            waiting.append(client)
            await client.gone()
        await client.say(ok())

    async with attempts_with(script, object_attempt_timeout=0.05) as (attempts, _):
        await attempts.run(get(), soon())
        assert waiting


async def test_an_attempt_may_take_long_while_it_moves() -> None:
    async def script(client: Client) -> None:
        await client.request()
        answer = ok(BODY)
        for at in range(0, len(answer), 512):
            await client.say(answer[at : at + 512])
            await asyncio.sleep(0.02)

    found = memoryview(bytearray(len(BODY)))
    async with attempts_with(script, object_attempt_timeout=0.15, object_floor_rate=4096, object_attempts=1) as (
        attempts,
        _,
    ):
        await attempts.run(get(found), soon())
        assert found == BODY


async def test_who_cannot_be_reached_is_told_so() -> None:
    async with serving(answers(ok())[0]) as url:
        pass
    async with attempts_at(url, object_attempts=2) as (attempts, _):
        with pytest.raises(ObjectError, match=rf"{url}: no connection.*2 attempts\); check the endpoint") as caught:
            await attempts.run(get(), soon())
        assert caught.value.status == 0
    with unanswering() as url:
        async with attempts_at(url, object_attempts=2, object_attempt_timeout=0.05) as (attempts, _):
            with pytest.raises(ObjectError, match="check the endpoint"):
                await attempts.run(get(), soon())


async def test_cancelling_ends_it() -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.gone()

    async with attempts_with(script, object_concurrency=1) as (attempts, _):
        first = asyncio.create_task(attempts.run(get(), soon()))
        second = asyncio.create_task(attempts.run(get(), soon()))
        await until(lambda: attempts.pace.taken == 1)
        second.cancel()
        first.cancel()
        await asyncio.wait([first, second])
        assert first.cancelled()
        assert second.cancelled()
        assert attempts.pace.taken == 0


# ---- pace ---------------------------------------------------------------------------------------------------------


async def test_slow_down_slows_down_and_success_speeds_up() -> None:
    script, _ = answers(SLOW, ok())
    async with attempts_with(script, object_concurrency=8) as (attempts, _):
        await attempts.run(get(), soon())
        slowest = attempts.pace.limit
        assert 4 <= slowest < 8
        for _ in range(40):
            await attempts.run(get(), soon())
        assert attempts.pace.limit == 8


async def test_no_more_are_under_way_than_there_are_turns() -> None:
    now: list[int] = []
    most = 0
    go_on = asyncio.Event()

    async def script(client: Client) -> None:
        nonlocal most
        while True:
            await client.request()
            now.append(1)
            most = max(most, len(now))
            await go_on.wait()
            now.pop()
            await client.say(ok())

    async with attempts_with(script, object_concurrency=3) as (attempts, _):
        tasks = [asyncio.create_task(attempts.run(get(), soon())) for _ in range(9)]
        await until(lambda: len(now) == 3)
        go_on.set()
        await asyncio.gather(*tasks)
        assert most == 3


async def test_a_turn_that_does_not_come_is_a_timeout() -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.gone()

    async with attempts_with(script, object_concurrency=1) as (attempts, _):
        first = asyncio.create_task(attempts.run(get(), soon()))
        await until(lambda: attempts.pace.taken == 1)
        with pytest.raises(TransferTimeout, match="its turn did not come"):
            await attempts.run(get(), soon(0.05))
        first.cancel()
        await asyncio.wait([first])


async def test_one_burst_of_complaints_is_one_complaint() -> None:
    pace = Pace(64)
    epoch = pace.epoch
    for _ in range(20):
        pace.slower(epoch)
    assert pace.limit == 32
    for _ in range(20):
        pace.slower(pace.epoch)
    assert pace.limit == 1
    assert pace.take()
    assert not pace.take()


async def test_turns_come_in_order_and_are_not_lost() -> None:
    pace = Pace(1)
    assert pace.take()
    order: list[int] = []

    async def take(number: int) -> None:
        await pace.wait(soon())
        order.append(number)
        pace.give()

    tasks = [asyncio.create_task(take(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    pace.give()
    tasks[0].cancel()  # it has been given the turn, and has not run
    await asyncio.wait(tasks)
    assert order == [2, 3]
    assert pace.taken == 0


async def test_turns_come_by_priority() -> None:
    pace = Pace(1)
    assert pace.take()
    order: list[tuple[int, int]] = []

    async def take(level: int, number: int) -> None:
        priority.set(level)
        await pace.wait(soon())
        order.append((level, number))
        pace.give()

    tasks = [asyncio.create_task(take(level, number)) for number, level in enumerate([0, -1, 1, 0, 1])]
    await asyncio.sleep(0)
    pace.give()
    await asyncio.wait(tasks)
    assert order == [(1, 2), (1, 4), (0, 0), (0, 3), (-1, 1)]


# ---- hedges -------------------------------------------------------------------------------------------------------


def hedged_script(first: Callable[[Client], Any]) -> tuple[Script, list[int]]:
    """Do `first` with the first request; answer the others."""
    came: list[int] = []

    async def script(client: Client) -> None:
        while True:
            await client.request()
            came.append(client.number)
            if len(came) == 1:
                await first(client)
                return
            await client.say(ok(BODY))

    return script, came


async def test_a_slow_read_is_asked_for_twice() -> None:
    ended = asyncio.Event()

    async def slow(client: Client) -> None:
        await client.say(ok(b"X" * len(BODY))[:-10])
        await client.gone()
        ended.set()

    script, came = hedged_script(slow)
    found = memoryview(bytearray(len(BODY)))
    async with attempts_with(script, object_hedge=0.05) as (attempts, _):
        await attempts.run(get(found), soon())
        assert found == BODY
        assert len(came) == 2
        assert attempts.pace.taken == 0
        await asyncio.wait_for(ended.wait(), 30)


async def test_the_first_may_still_win() -> None:
    second = asyncio.Event()

    async def script(client: Client) -> None:
        await client.request()
        if client.number:
            second.set()
            await client.gone()
        else:
            await second.wait()
            await client.say(ok(BODY))

    found = memoryview(bytearray(len(BODY)))
    async with attempts_with(script, object_hedge=0.0) as (attempts, _):
        await attempts.run(get(found), soon())
        assert found == BODY


async def test_what_the_second_had_received_is_not_taken_for_the_callers() -> None:
    both = asyncio.Event()
    over = asyncio.Event()
    came = 0

    async def script(client: Client) -> None:
        nonlocal came
        asked = await client.request()
        came += 1
        if came == 1:
            await both.wait()
            await client.say(said(BODY)[: -len(BODY) + 1000])
            await asyncio.sleep(0.05)
            over.set()
        elif came == 2:
            both.set()
            await over.wait()
            await asyncio.sleep(0.05)  # the end of the first is to be noticed before
            await client.say(said(BODY)[: -len(BODY) + 8000])
        elif b"range: bytes=" in asked:
            at = int(asked.partition(b"bytes=")[2].partition(b"-")[0])
            await client.say(part(at, len(BODY) - 1, len(BODY), BODY[at:]))
        else:
            await client.say(said(BODY))

    async with attempts_with(script, object_hedge=0.02) as (attempts, _):
        assert await whole(attempts) == BODY
        assert came > 2


async def test_a_hedge_takes_no_turn_from_others() -> None:
    go_on = asyncio.Event()

    async def slow(client: Client) -> None:
        await go_on.wait()
        await client.say(ok(BODY))

    script, came = hedged_script(slow)
    found = memoryview(bytearray(len(BODY)))
    async with attempts_with(script, object_hedge=0.0, object_concurrency=1) as (attempts, _):
        task = asyncio.create_task(attempts.run(get(found), soon()))
        await until(lambda: len(came) == 1)
        go_on.set()
        await task
        assert found == BODY
        assert len(came) == 1


# ---- reading ------------------------------------------------------------------------------------------------------


def said(body: bytes, *headers: bytes, etag: bytes = b'"1"') -> bytes:
    return ok(body, b"etag: " + etag, *headers)


def part(first: int, last: int, length: int, body: bytes, *, etag: bytes = b'"1"') -> bytes:
    place = b"content-range: bytes %d-%d/%d" % (first, last, length)
    return ok(body, b"etag: " + etag, place, status=b"206 Partial")


def claim(headers: Any) -> Claim | None:
    for algorithm, name in (("crc64nvme", b"x-64"), ("crc32c", b"x-32")):
        value = from_header(headers.get(name, b""))
        if value is not None:
            return Claim(algorithm, value)
    return None


TONGUE = Tongue(b"/key", b"", [], b"x-id", claim)


async def whole(attempts: Attempts, nbytes: int = len(BODY), *, verify: bool = False, etag: str | None = None) -> bytes:
    found = memoryview(bytearray(nbytes))
    await read(attempts, TONGUE, "key", 0, (found,), whole=True, verify=verify, etag=etag, crc=False, deadline=soon())
    return bytes(found)


async def test_a_body_that_breaks_is_gone_on_with() -> None:
    asked: list[bytes] = []
    sum_ = b"x-64: " + as_header(crc64_of_small((memoryview(BODY),)))

    async def script(client: Client) -> None:
        asked.append(await client.request())
        if len(asked) == 1:
            await client.say(said(BODY, sum_)[: -len(BODY) + 1000])
        else:
            at = int(asked[-1].partition(b"bytes=")[2].partition(b"-")[0])
            answer = part(at, len(BODY) - 1, len(BODY), BODY[at:])
            await client.say(answer[: -len(BODY) + at + 2000] if len(asked) < 4 else answer)

    async with attempts_with(script, object_attempts=1) as (attempts, _):
        assert await whole(attempts) == BODY
        assert len(asked) == 4
        assert all(b'if-match: "1"' in head for head in asked[1:])


async def test_another_version_is_not_put_behind_the_first() -> None:
    other = BODY[::-1]
    asked: list[bytes] = []

    async def script(client: Client) -> None:
        asked.append(await client.request())
        if len(asked) == 1:
            await client.say(said(BODY)[: -len(BODY) + 1000])
        elif b"if-match" in asked[-1]:
            await client.say(ok(b"", status=b"412 Changed"))
        else:
            await client.say(said(other, etag=b'"2"'))

    async with attempts_with(script) as (attempts, _):
        assert await whole(attempts) == other


@pytest.mark.parametrize("algorithm", ["64", "32"])
async def test_damage_is_found_and_repaired_or_told(algorithm: str) -> None:
    views = (memoryview(BODY),)
    sum_ = as_header(await crc64_of(views)) if algorithm == "64" else as_header(await crc32c_of(views), 4)
    header = b"x-%b: %b" % (algorithm.encode(), sum_)
    damaged = said(BODY[:-1] + b"\0", header, b"x-id: 7")
    script, asked = answers(damaged, said(BODY, header))
    async with attempts_with(script) as (attempts, _):
        assert await whole(attempts) == BODY
        assert len(asked) == 2
    script, asked = answers(damaged)
    async with attempts_with(script, object_attempts=3) as (attempts, _):
        with pytest.raises(ChecksumError, match=r"damaged bytes.*\(200, request id 7, 3 attempts\)"):
            await whole(attempts)
        assert len(asked) == 3


async def test_what_has_no_checksum_is_read_twice_to_prove_it() -> None:
    asked: list[bytes] = []

    async def script(client: Client) -> None:
        while True:
            asked.append(await client.request())
            if len(asked) == 1:
                await client.say(said(b"\xff" + BODY[1:]))
            else:
                await client.say(part(0, len(BODY) - 1, len(BODY), BODY))

    async with attempts_with(script) as (attempts, _):
        assert await whole(attempts, verify=True) == BODY
        assert len(asked) == 3


async def test_what_is_never_the_same_twice_is_told() -> None:
    count = 0

    async def script(client: Client) -> None:
        nonlocal count
        while True:
            asked = await client.request()
            count += 1
            body = bytes([count]) + BODY[1:]
            await client.say(part(0, len(BODY) - 1, len(BODY), body) if b"range: " in asked else said(body))

    async with attempts_with(script, object_attempts=3) as (attempts, _):
        with pytest.raises(ChecksumError, match="no two in a row were of the same bytes"):
            await whole(attempts, verify=True)


async def test_an_answer_of_other_bytes_is_not_taken() -> None:
    script, asked = answers(part(5, 5 + len(BODY) - 1, 99999, BODY), said(BODY))
    async with attempts_with(script) as (attempts, _):
        assert await whole(attempts) == BODY
        assert len(asked) == 2


async def test_a_server_that_ignores_if_match_is_seen() -> None:
    script, _ = answers(said(BODY))
    async with attempts_with(script) as (attempts, _):
        with pytest.raises(ObjectError, match='the object is not the version "0" any more'):
            await whole(attempts, etag='"0"')


# ---- sums and XML -------------------------------------------------------------------------------------------------


async def test_sums_of_pieces_are_those_of_the_whole() -> None:
    data = memoryview(BODY * 350)
    assert data.nbytes > 3 * AT_ONCE
    pieces = (data[:5], data[5 : AT_ONCE + 7], data[AT_ONCE + 7 :])
    assert await crc64_of(pieces) == crc64_of_small((data,))
    assert await crc32c_of(pieces) == await crc32c_of((memoryview(bytes(data)),))
    assert await crc64_of((memoryview(b"123456789"),)) == 0xAE8B14860A799888
    assert from_header(as_header(0xAE8B14860A799888)) == 0xAE8B14860A799888
    assert from_header(b"") is None
    assert from_header(b"not base64!") is None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"<a>", b"\xff\xfe<\0a\0/\0>\0", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<a>&b;</a>",
        b"<a>" + b" " * (8 << 20) + b"</a>", b"<a>\0</a>",
    ],
    ids=["nothing", "open", "UTF-16", "a document type", "an entity", "long", "NUL"],
)  # fmt: skip
def test_xml_that_is_refused(text: bytes) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_xml_is_read_whatever_its_name_space() -> None:
    node = parse(b'<?xml version="1.0" encoding="UTF-8"?>\n<r xmlns="urn:x"><a><b>\xc3\xbc&amp;</b></a><a/></r>')
    assert (node.name, node.text("a", "b"), node.text("c", "b"), len(node.all("a"))) == ("r", "\xfc&", "", 2)
