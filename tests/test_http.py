"""The HTTP client against real sockets: what it sends and receives, who gets which connection, and how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, Issued
from cryptography import x509
from http_server import Client, Script, ok, serving, unanswering
from lent import until

from asyncxfer._errors import ClosedError, ConfigError, PeerLostError, TransferTimeout
from asyncxfer._http import (
    BrokenError,
    HttpError,
    LateError,
    LengthError,
    MalformedError,
    Pool,
    Progress,
    UntrustedError,
)
from asyncxfer._http_pieces import Pieces
from asyncxfer._http_streams import PIECE, plain

SEA = os.urandom(3 << 20)
FAR = 60.0  # seconds: a deadline that is no part of the test


def soon(seconds: float = FAR) -> float:
    return asyncio.get_running_loop().time() + seconds


def place(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def always(answer: bytes) -> Script:
    """Give the same answer to every request."""

    async def script(client: Client) -> None:
        while True:
            await client.request()
            await client.say(answer)

    return script


@contextlib.asynccontextmanager
async def pool_for(script: Script, limit: int = 4, idle_timeout: float = 15.0) -> AsyncIterator[Pool]:
    async with serving(script) as url, Pool(url, limit=limit, idle_timeout=idle_timeout) as pool:
        yield pool


# ---- bodies -------------------------------------------------------------------------------------------------------


async def test_a_body_is_received_into_memory() -> None:
    async with pool_for(always(ok(SEA, b"ETag:  \t x ", b"x-more: 1", b"X-More: 2"))) as pool:
        found = place(len(SEA))
        answer = await pool.request(b"GET", b"/b/k", into=(found,), deadline=soon())
        assert (answer.status, answer.received, answer.body) == (200, len(SEA), b"")
        assert (answer.headers[b"etag"], answer.headers[b"x-more"]) == (b"x", b"1, 2")
        assert found == SEA


@pytest.mark.parametrize("row", [1, 999, 70_000])
async def test_a_body_is_received_into_rows(row: int) -> None:
    body = SEA[: 1 << 20 if row > 1 else 5000]
    async with pool_for(always(ok(body))) as pool:
        found = place(len(body) + 10)
        rows = [found[at : min(at + row, len(body))] for at in range(0, len(body), row)]
        answer = await pool.request(b"GET", b"/", into=[*rows[:1], place(0), *rows[1:]], deadline=soon())
        assert answer.received == len(body)
        assert found[: len(body)] == body
        assert found[len(body) :] == bytes(10)


@pytest.mark.parametrize("row", [1, 999, 70_000])
async def test_a_body_is_sent_in_rows(row: int) -> None:
    body, got = SEA[: 1 << 20 if row > 1 else 5000], []

    async def script(client: Client) -> None:
        got.append(await client.head())
        got.append(await client.exactly(len(body)))
        await client.say(ok())

    async with pool_for(script) as pool:
        view = memoryview(body)
        rows = [view[at : at + row] for at in range(0, len(body), row)]
        await pool.request(b"PUT", b"/b/k", [(b"x-a", b"b")], body=[b"", *rows], deadline=soon())
        head = b"PUT /b/k HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\nx-a: b\r\n\r\n"
        assert got == [head % (pool.host, len(body)), body]


async def test_a_turn_is_short_however_small_the_rows() -> None:
    """What is sent in a turn of the loop is bounded by bytes and by rows."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        stream = plain(ours)
        body = Pieces([memoryview(b"x")] * 10_000)
        stream.send(body)
        assert 0 < body.passed <= stream.turn // PIECE
        stream.close()


async def test_memory_of_other_types_is_taken_by_its_bytes() -> None:
    async with pool_for(always(ok(SEA[:800]))) as pool:
        numbers: Any = memoryview(bytearray(800)).cast("d", (10, 10))
        await pool.request(b"GET", b"/", body=(numbers,), into=(numbers,), deadline=soon())
        assert numbers.tobytes() == SEA[:800]


def chunked(body: bytes, size: int, *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    coded = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + coded + b"0\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(chunked(SEA[:100_000], 1 << 14), id="chunks"),
        pytest.param(chunked(SEA[:100_000], 100_000), id="one chunk"),
        pytest.param(chunked(SEA[:100_000], 7, extension=b" ;a=b", trailers=b"x: y\r\nz: w\r\n"), id="small chunks"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + ok(SEA[:100_000]), id="announced"),
    ],
)
@pytest.mark.parametrize("gathered", [False, True])
async def test_whatever_delimits_it_the_body_is_the_same(answer: bytes, gathered: bool) -> None:
    async with pool_for(always(answer)) as pool:
        for _ in range(2):
            found = place(100_000)
            got = await pool.request(b"GET", b"/", into=None if gathered else (found,), deadline=soon())
            assert (got.body if gathered else found) == SEA[:100_000]
        assert pool.connected == 1


@pytest.mark.parametrize("gathered", [False, True])
async def test_a_body_that_ends_with_the_connection(gathered: bool) -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.say(b"HTTP/1.1 200 OK\r\n\r\n" + SEA)

    async with pool_for(script) as pool:
        found = place(len(SEA))
        got = await pool.request(b"GET", b"/", into=None if gathered else (found,), deadline=soon())
        assert (got.body if gathered else found) == SEA
        assert pool.connected == 0


async def test_a_trickle_is_put_together() -> None:
    body = SEA[:40]

    async def script(client: Client) -> None:
        await client.request()
        for byte in chunked(body, 3, trailers=b"x: y\r\n"):
            await client.say(bytes((byte,)))
            await asyncio.sleep(0)
        await client.gone()

    async with pool_for(script) as pool:
        found = place(len(body))
        assert (await pool.request(b"GET", b"/", into=(found,), deadline=soon())).received == len(body)
        assert found == body


@pytest.mark.parametrize(
    ("method", "answer", "status"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n", 200),
        (b"HEAD", b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n", 404),
        (b"DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 12345\r\n\r\n", 304),
        (b"GET", ok(), 200),
        (b"GET", b"HTTP/1.1 200 \r\ncontent-length: 0\r\n\r\n", 200),
    ],
)
async def test_answers_without_a_body(method: bytes, answer: bytes, status: int) -> None:
    async with pool_for(always(answer)) as pool:
        for _ in range(2):
            got = await pool.request(method, b"/", deadline=soon())
            assert (got.status, got.body, got.received) == (status, b"", 0)
        assert pool.connected == 1


async def test_the_body_of_an_error_leaves_memory_alone() -> None:
    async with pool_for(always(ok(b"<Error/>", status=b"404 Not Found"))) as pool:
        found = place(8)
        answer = await pool.request(b"GET", b"/", into=(found,), deadline=soon())
        assert (answer.status, answer.body, answer.received) == (404, b"<Error/>", 0)
        assert found == bytes(8)


@pytest.mark.parametrize("coded", [False, True])
async def test_of_a_long_error_the_beginning_is_kept(coded: bool) -> None:
    long = chunked(SEA, 1 << 15).replace(b"200 OK", b"500 Oh", 1) if coded else ok(SEA, status=b"500 Oh")
    async with pool_for(always(long)) as pool:
        answer = await pool.request(b"GET", b"/", deadline=soon())
        assert (answer.status, answer.body) == (500, SEA[: 1 << 20])
        assert pool.connected == 0


# ---- lengths that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found", "written"),
    [
        pytest.param(ok(SEA[:101]), 101, 0, id="told"),
        pytest.param(chunked(SEA[:101], 60), 101, 60, id="chunks"),
        pytest.param(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + SEA[:101], 101, 0, id="until the end"),
        pytest.param(ok(SEA[:99]), 99, 99, id="short"),
        pytest.param(chunked(SEA[:99], 60), 99, 99, id="short chunks"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 0, 0, id="none"),
    ],
)
async def test_a_body_of_another_length(answer: bytes, found: int, written: int) -> None:
    async with pool_for(always(answer)) as pool:
        sea = place(200)
        with pytest.raises(LengthError, match=f"expected 100 bytes, found .*{found}") as caught:
            await pool.request(b"GET", b"/", into=(sea[:50], sea[50:100]), deadline=soon())
        assert (caught.value.expected, caught.value.found, caught.value.nbytes) == (100, found, written)
        assert sea[:written] == SEA[:written]
        assert sea[written:] == bytes(200 - written)
        assert pool.connected == (found <= 100)


@pytest.mark.parametrize("answer", [ok(SEA[:101]), chunked(SEA[:101], 60)])
async def test_a_success_longer_than_the_caller_wants(answer: bytes) -> None:
    async with pool_for(always(answer)) as pool:
        with pytest.raises(LengthError, match=r"expected 100 bytes, found .*101"):
            await pool.request(b"GET", b"/", most=100, deadline=soon())


# ---- what is not HTTP ---------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\n"
GARBAGE = {
    "a banner": b"SSH-2.0-OpenSSH_9.2\r\n",
    "another version": b"HTTP/2.0 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status out of range": b"HTTP/1.1 2000 OK\r\n\r\n",
    "zeros": bytes(100),
    "a folded line": HEAD + b"a: b\r\n c\r\ncontent-length: 0\r\n\r\n",
    "a space in a name": HEAD + b"content-length : 0\r\n\r\n",
    "a line without a colon": HEAD + b"content-length\r\n\r\n",
    "a bare line feed": HEAD + b"a: b\nc: d\r\n\r\n",
    "a bare return": HEAD + b"a: b\rc\r\n\r\n",
    "a NUL": HEAD + b"a: \0\r\n\r\n",
    "a negative length": HEAD + b"content-length: -1\r\n\r\n",
    "an endless length": HEAD + b"content-length: %b\r\n\r\n" % (b"9" * 30),
    "a length of signs": HEAD + b"content-length: +5\r\n\r\n12345",
    "two lengths": HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n1",
    "a length and chunks": HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    "another coding": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n",
    "no size": HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    "a negative size": HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\n",
    "an endless size": HEAD + b"transfer-encoding: chunked\r\n\r\n%b\r\n" % (b"0" * 5000),
    "a chunk that goes on": HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
    "endless trailers": HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000,
    "an endless head": HEAD + b"a: b\r\n" * 20_000,
    "an endless line": b"HTTP/1.1 200 " + b"O" * 100_000,
    "endless announcements": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_is_an_error_and_the_end_of_the_connection(garbage: bytes) -> None:
    closed = asyncio.Event()

    async def script(client: Client) -> None:
        await client.request()
        with contextlib.suppress(ConnectionError):
            await client.say(garbage)
            await client.gone()
        closed.set()

    async with pool_for(script) as pool:
        found = place(5)
        with pytest.raises(MalformedError, match=r"127\.0\.0\.1") as caught:
            await pool.request(b"GET", b"/", into=(found,), deadline=soon())
        assert caught.value.progress is Progress.ANSWER
        assert pool.connected == 0
        await closed.wait()


async def test_the_largest_head_that_there_may_be() -> None:
    async with pool_for(always(ok(b"x", b"a: " + b"b" * 65_000))) as pool:
        assert (await pool.request(b"GET", b"/", deadline=soon())).headers[b"a"] == b"b" * 65_000


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        (b"GET", b"/a b", []),
        (b"GET", b"/a\r\nx: y", []),
        (b"GET", b"", []),
        (b"G T", b"/", []),
        (b"", b"/", []),
        (b"GET", b"/", [(b"a", b"b\r\nc: d")]),
        (b"GET", b"/", [(b"a", b"b\n")]),
        (b"GET", b"/", [(b"a", b"\0")]),
        (b"GET", b"/", [(b"a b", b"c")]),
        (b"GET", b"/", [(b"Host", b"c")]),
        (b"GET", b"/", [(b"content-length", b"3")]),
        (b"GET", b"/", [(b"transfer-encoding", b"chunked")]),
    ],
)
async def test_a_request_that_cannot_be_is_refused(
    method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    async with Pool("http://127.0.0.1:9") as pool:
        with pytest.raises(ValueError, match=r"request|header"):
            await pool.request(method, target, headers, deadline=soon())


@pytest.mark.parametrize("url", ["ftp://a", "a:80", "http://", "http://a/b", "http://a:b", "http://u@a", "http://a?b"])
async def test_a_url_that_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Pool(url)
    with pytest.raises(ConfigError, match="expected one"):
        Pool("http://a", limit=0)


async def test_the_host_is_told_as_it_is_to_be_told() -> None:
    hosts = {
        url: Pool(url).host for url in ("http://a", "http://a:80", "https://a:80", "https://a/", "http://[::1]:81")
    }
    assert list(hosts.values()) == [b"a", b"a", b"a:80", b"a", b"[::1]:81"]


async def test_ipv6() -> None:
    async with serving(always(ok(b"six")), host="::1") as url, Pool(url) as pool:
        assert (await pool.request(b"GET", b"/", deadline=soon())).body == b"six"


# ---- who gets which connection ------------------------------------------------------------------------------------


class Numbered:
    """Answers with the number of the connection; holds answers back until `go`."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.open = 0
        self.most = 0
        self.go = asyncio.Event()

    async def __call__(self, client: Client) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            while True:
                head = await client.request()
                self.asked.append(head.split()[1])
                await self.go.wait()
                await client.say(ok(b"%d" % client.number))
        finally:
            self.open -= 1


async def ask(pool: Pool, target: bytes = b"/", method: bytes = b"GET") -> bytes:
    return (await pool.request(method, target, deadline=soon())).body


async def test_there_are_so_many_connections_and_the_others_wait_in_order() -> None:
    server = Numbered()
    async with pool_for(server, limit=2) as pool:
        tasks = [asyncio.create_task(ask(pool, b"/%d" % number)) for number in range(7)]
        await until(lambda: len(server.asked) == 2)
        tasks[3].cancel()
        server.go.set()
        await asyncio.gather(*tasks[:3], *tasks[4:])
        assert server.asked[2:] == [b"/2", b"/4", b"/5", b"/6"]
        assert server.most == pool.connected == 2
        assert tasks[3].cancelled()


async def test_the_one_used_last_is_used_first_and_the_others_grow_old() -> None:
    server = Numbered()
    async with pool_for(server, idle_timeout=0.2) as pool:
        tasks = [asyncio.create_task(ask(pool)) for _ in range(3)]
        await until(lambda: len(server.asked) == 3)
        server.go.set()
        await asyncio.gather(*tasks)
        assert pool.connected == 3
        used = {await ask(pool)}
        while pool.connected > 1:
            used.add(await ask(pool))
        assert len(used) == 1
        await until(lambda: not pool.connected)
        assert await ask(pool) == b"3"


@pytest.mark.parametrize(("header", "kept"), [(b"Keep-Alive: timeout=1, max=5", 0), (b"Keep-Alive: timeout=100", 1)])
async def test_a_server_says_how_long_it_keeps_a_connection(header: bytes, kept: int) -> None:
    async with pool_for(always(ok(b"", header))) as pool:
        await ask(pool)
        await asyncio.sleep(0.01)
        assert pool.connected == kept


@pytest.mark.parametrize(
    "answer", [ok(b"", b"Connection: close"), ok().replace(b"1.1", b"1.0"), ok() + b"HTTP/1.1 200 OK\r\n"]
)
async def test_a_connection_is_not_used_again_that_should_not_be(answer: bytes) -> None:
    async with pool_for(always(answer)) as pool:
        await ask(pool)
        assert pool.connected == 0


async def test_an_old_server_may_keep_a_connection() -> None:
    async with pool_for(always(ok(b"", b"connection: Keep-Alive").replace(b"1.1", b"1.0"))) as pool:
        await ask(pool)
        assert pool.connected == 1


@pytest.mark.parametrize("last_words", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_a_server_that_closes_an_idle_connection_is_heard(last_words: bytes) -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.say(ok(b"%d" % client.number))
        if client.number == 0:
            await asyncio.sleep(0.02)
            await client.say(last_words)
            return
        await client.gone()

    async with pool_for(script) as pool:
        assert await ask(pool) == b"0"
        await until(lambda: not pool.connected)
        assert await ask(pool) == b"1"


def once_each(*, reset: bool, tries: list[int]) -> Script:
    """Answer the first request of each connection, and break off on the second."""

    async def script(client: Client) -> None:
        await client.request()
        tries.append(client.number)
        await client.say(ok())
        await client.request()
        tries.append(client.number)
        if reset:
            client.reset()

    return script


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE"])
async def test_a_request_that_finds_its_connection_closed_is_repeated(method: bytes, reset: bool) -> None:
    tries: list[int] = []
    async with pool_for(once_each(reset=reset, tries=tries)) as pool:
        repeated = []
        for _ in range(3):
            body = (memoryview(SEA),) if method == b"PUT" else ()
            answer = await pool.request(method, b"/", body=body, deadline=soon())
            assert answer.status == 200
            repeated.append(answer.repeated)
        assert repeated == [False, True, True]
        assert tries == [0, 0, 1, 1, 2]


async def test_a_request_that_changes_something_each_time_is_not_repeated() -> None:
    tries: list[int] = []
    async with pool_for(once_each(reset=False, tries=tries)) as pool:
        await ask(pool, method=b"POST")
        with pytest.raises(BrokenError) as caught:
            await ask(pool, method=b"POST")
        assert caught.value.progress is Progress.SENT
        assert tries == [0, 0]


async def test_a_request_is_repeated_once() -> None:
    async def script(client: Client) -> None:
        await client.request()
        if client.number == 0:
            await client.say(ok())
            await client.request()

    async with pool_for(script) as pool:
        await ask(pool)
        with pytest.raises(BrokenError, match="closed; the request was sent") as caught:
            await ask(pool)
        assert caught.value.repeated


async def test_an_answer_before_the_whole_request_is_taken() -> None:
    """A server that refuses a body need not read it, and may break off."""

    async def script(client: Client) -> None:
        await client.head()
        await client.say(ok(b"no", status=b"403 Forbidden"))
        await asyncio.sleep(0.01)
        if client.number % 2:
            client.reset()

    async with pool_for(script) as pool:
        for _ in range(4):
            body = [memoryview(SEA)] * 20
            answer = await pool.request(b"PUT", b"/", body=body, deadline=soon())
            assert (answer.status, answer.body) == (403, b"no")
            assert pool.connected == 0


async def test_closing_a_pool_ends_what_is_under_way() -> None:
    server = Numbered()
    async with serving(server) as url:
        pool = Pool(url, limit=1)
        tasks = [asyncio.create_task(ask(pool)) for _ in range(2)]
        await until(lambda: len(server.asked) == 1)
        await pool.aclose()
        for task, progress in zip(tasks, (Progress.SENT, Progress.NOTHING), strict=True):
            with pytest.raises(ClosedError, match=progress.value):
                await task
        with pytest.raises(ClosedError):
            await ask(pool)
        server.go.set()
        await until(lambda: not server.open)


async def test_closing_a_pool_that_connects() -> None:
    with unanswering() as url:
        pool = Pool(url)
        task = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.01)
        await pool.aclose()
        with pytest.raises(ClosedError, match="nothing was sent"):
            await task


# ---- faults in each phase -----------------------------------------------------------------------------------------


class Held:
    """A server that comes as far as a phase and then does nothing until it is told how to go on."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self.gone = asyncio.Event()
        self.reset = False
        self.then = b""

    async def __call__(self, client: Client) -> None:
        if self.phase == "handshake":
            await client.exactly(5)
        elif self.phase != "sending":
            await client.request()
            await client.say(STARTS[self.phase])
        self.reached.set()
        await self.go.wait()
        if self.reset:
            client.reset()
            return
        with contextlib.suppress(ConnectionError):
            await client.say(self.then)
            if not self.then:
                return
            await client.gone()
        self.gone.set()


WHOLE = ok(SEA[:100_000])
STARTS = {"waiting": b"", "head": WHOLE[:10], "body": WHOLE[:50_000], "chunk": chunked(SEA[:100_000], 60_000)[:80_000]}
PROGRESS = {
    "handshake": Progress.NOTHING,
    "sending": Progress.PART,
    "waiting": Progress.SENT,
    "head": Progress.ANSWER,
    "body": Progress.ANSWER,
    "chunk": Progress.ANSWER,
}
phases = pytest.mark.parametrize("phase", PROGRESS)


class Faulty:
    """A request, in flight to a server that is held in a phase."""

    def __init__(self, url: str, server: Held) -> None:
        self.server = server
        secure = server.phase == "handshake"
        self.pool = Pool(url.replace("http", "https") if secure else url, tls=ssl.create_default_context())
        self.place = place(100_000)

    def start(self, deadline: float) -> asyncio.Task[object]:
        body = [memoryview(SEA)] * 20 if self.server.phase == "sending" else []
        request = self.pool.request(b"PUT", b"/", body=body, into=(self.place,), deadline=deadline)
        return asyncio.create_task(request)

    async def is_left_alone(self) -> None:
        """Whatever the server sends afterwards, it goes nowhere; the connection was closed."""
        before = bytes(self.place)
        assert self.pool.connected == 0
        self.server.then = bytes(200_000)
        self.server.go.set()
        if self.server.reached.is_set():
            await self.server.gone.wait()
        assert self.place == before


@contextlib.asynccontextmanager
async def faulty(phase: str) -> AsyncIterator[Faulty]:
    server = Held(phase)
    async with serving(server) as url:
        found = Faulty(url, server)
        async with found.pool:
            yield found


@phases
async def test_a_deadline_in_each_phase(phase: str) -> None:
    async with faulty(phase) as fault:
        task = fault.start(soon(0.1))
        with pytest.raises(LateError, match=PROGRESS[phase].value) as caught:
            await task
        assert isinstance(caught.value, TransferTimeout)
        assert caught.value.progress is PROGRESS[phase]
        if phase != "handshake":
            await fault.is_left_alone()


async def test_what_does_not_move_is_given_up() -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.say(ok(SEA, b"etag: x")[:-1000])
        await client.gone()

    async with pool_for(script) as pool:
        with pytest.raises(LateError, match=r"nothing moved for 0\.05 s; a part of the answer had come") as caught:
            await pool.request(b"GET", b"/", into=(place(len(SEA)),), deadline=soon(), patience=0.05)
        assert caught.value.nbytes == len(SEA) - 1000
        assert caught.value.head is not None
        assert caught.value.head.headers[b"etag"] == b"x"


async def test_what_moves_slowly_is_not_given_up() -> None:
    async def script(client: Client) -> None:
        await client.request()
        for byte in ok(b"0123456789"):
            await client.say(bytes([byte]))
            if client.number == 0:
                await asyncio.sleep(0.005)

    async with pool_for(script) as pool:
        answer = await pool.request(b"GET", b"/", deadline=soon(), patience=0.3)
        assert answer.body == b"0123456789"


@pytest.mark.parametrize("nbytes", [1, 1000, 2 << 20])
async def test_a_connection_that_breaks_behind_bytes_is_noticed(nbytes: int) -> None:
    """Whatever the loop says of a socket that has both bytes and an error; it may say it once."""

    async def script(client: Client) -> None:
        await client.request()
        await client.say(ok(SEA)[: nbytes - len(SEA)])
        client.reset()

    async with pool_for(script) as pool:
        for _ in range(20):
            with pytest.raises(BrokenError):
                await pool.request(b"GET", b"/", into=(place(len(SEA)),), deadline=soon(20))


@phases
async def test_cancellation_in_each_phase(phase: str) -> None:
    async with faulty(phase) as fault:
        task = fault.start(soon())
        await fault.server.reached.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if phase != "handshake":
            await fault.is_left_alone()


@phases
@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_ends_in_each_phase(phase: str, reset: bool) -> None:
    async with faulty(phase) as fault:
        task = fault.start(soon())
        await fault.server.reached.wait()
        fault.server.reset = reset
        fault.server.go.set()
        with pytest.raises(BrokenError, match=PROGRESS[phase].value) as caught:
            await task
        assert isinstance(caught.value, PeerLostError)
        assert caught.value.progress is PROGRESS[phase]
        assert caught.value.endpoint == fault.pool.endpoint
        assert (caught.value.nbytes > 0) == (phase in ("body", "chunk"))
        assert fault.pool.connected == 0


async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with Pool(f"http://127.0.0.1:{sock.getsockname()[1]}") as pool:
            with pytest.raises(BrokenError, match="nothing was sent") as caught:
                await ask(pool)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_a_name_that_does_not_exist() -> None:
    async with Pool("http://nobody.invalid") as pool:
        with pytest.raises(BrokenError, match=r"nobody\.invalid:80: no connection"):
            await ask(pool)


async def test_a_host_that_does_not_answer() -> None:
    with unanswering() as url:
        async with Pool(url, connect_timeout=0.05) as pool:
            with pytest.raises(LateError, match=r"no connection within 0\.05 s; nothing was sent"):
                await ask(pool)
        async with Pool(url) as pool:
            with pytest.raises(LateError, match="the deadline passed; nothing was sent"):
                await pool.request(b"GET", b"/", deadline=soon(0.05))


async def test_a_request_whose_deadline_has_passed_while_it_waited() -> None:
    server = Numbered()
    async with pool_for(server, limit=1) as pool:
        first = asyncio.create_task(ask(pool, b"/first"))
        await until(lambda: len(server.asked) == 1)
        with pytest.raises(LateError, match="nothing was sent"):
            await pool.request(b"GET", b"/second", deadline=soon(0.01))
        server.go.set()
        await first
        await ask(pool, b"/third")
        assert server.asked == [b"/first", b"/third"]


async def test_one_failure_does_not_hold_up_who_waits_behind_it() -> None:
    async def script(client: Client) -> None:
        await client.request()
        if client.number:
            await client.say(ok(b"well"))
            await client.gone()

    async with pool_for(script, limit=1) as pool:
        ends = await asyncio.gather(ask(pool), ask(pool), return_exceptions=True)
        assert isinstance(ends[0], HttpError)
        assert ends[1] == b"well"


async def test_memory_is_let_go_of_with_the_error() -> None:
    """It can be resized at once, without a collection of garbage."""

    class Mine(bytearray):
        pass

    gc.collect()
    gc.disable()
    try:
        for answer in (WHOLE[:50_000], b"garbage\r\n", ok(b"too short"), ok(SEA)):

            async def script(client: Client, answer: bytes = answer) -> None:
                await client.request()
                await client.say(answer)

            async with pool_for(script) as pool:
                memory = Mine(100_000)
                seen = weakref.ref(memory)
                with pytest.raises(HttpError):
                    await pool.request(b"GET", b"/", into=(memoryview(memory),), deadline=soon())
                del memory
                await asyncio.sleep(0)
                assert seen() is None
    finally:
        gc.enable()


# ---- TLS ----------------------------------------------------------------------------------------------------------

AUTHORITY = Authority()
LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def context_of(issued: Issued, folder: Path) -> ssl.SSLContext:
    (folder / "certificate").write_bytes(issued.certificate)
    (folder / "key").write_bytes(issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context


def believing() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=AUTHORITY.pem.decode())


def by_python(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have a context that is not taken over: it would hand the keys to the kernel, where that can be."""
    context.options |= 1 << 3  # ssl.OP_ENABLE_KTLS, of Python 3.12
    return context


def of_version(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = believing()
    context.minimum_version = context.maximum_version = version
    return context


@pytest.fixture(
    name="client_tls",
    params=[
        pytest.param(believing, id="native"),
        pytest.param(lambda: of_version(ssl.TLSVersion.TLSv1_2), id="native-1.2"),
        pytest.param(lambda: by_python(believing()), id="python"),
    ],
)
def client_tls_fixture(request: pytest.FixtureRequest) -> ssl.SSLContext:
    return request.param()  # type: ignore[no-any-return]


@pytest.mark.parametrize("row", [1, 1000, 3 << 20])
async def test_bodies_over_tls(tmp_path: Path, client_tls: ssl.SSLContext, row: int) -> None:
    got = []
    sea = SEA if row > 1 else SEA[:40_000]

    async def script(client: Client) -> None:
        for _ in range(2):
            await client.head()
            got.append(await client.exactly(len(sea)))
            await client.say(ok(sea))
        await client.gone()

    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(script, tls=tls) as url, Pool(url, tls=client_tls) as pool:
        for _ in range(2):
            found = place(len(sea))
            rows = [slice(at, at + row) for at in range(0, len(sea), row)]
            body = [memoryview(sea)[each] for each in rows]
            answer = await pool.request(b"PUT", b"/", body=body, into=[found[each] for each in rows], deadline=soon())
            assert answer.received == len(sea)
            assert found == sea
        assert got == [sea, sea]
        assert pool.connected == 1


async def test_an_answer_over_tls_before_the_whole_request_is_taken(tmp_path: Path, client_tls: ssl.SSLContext) -> None:
    async def script(client: Client) -> None:
        await client.head()
        await client.say(ok(b"no", status=b"403 Forbidden"))
        await client.gone()

    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(script, tls=tls) as url, Pool(url, tls=client_tls) as pool:
        answer = await pool.request(b"PUT", b"/", body=[bytes(64 << 20)], deadline=soon())
        assert (answer.status, answer.body) == (403, b"no")
        assert pool.connected == 0


async def test_a_body_over_tls_that_ends_with_its_farewell(tmp_path: Path, client_tls: ssl.SSLContext) -> None:
    """The connection itself stays open: what TLS says is the end."""

    async def script(client: Client) -> None:
        await client.request()
        await client.say(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        await client.farewell()
        await client.gone()

    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(script, tls=tls) as url, Pool(url, tls=client_tls) as pool:
        assert await ask(pool) == b"all of it"
        assert pool.connected == 0


async def test_what_is_damaged_on_the_way_is_an_error(tmp_path: Path, client_tls: ssl.SSLContext) -> None:
    async def script(client: Client) -> None:
        await client.request()
        await client.say(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + bytes(50_000))
        await client.say_unencrypted(b"\x17\x03\x03\x00\x40" + bytes(64))  # a record, by its head
        await client.gone()

    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(script, tls=tls) as url, Pool(url, tls=client_tls) as pool:
        with pytest.raises(BrokenError, match=r"(bad record mac|decryption failed).*; a part of the answer had come"):
            await pool.request(b"GET", b"/", into=(place(100_000),), deadline=soon())


@pytest.mark.parametrize(
    ("names", "days", "authority"),
    [
        pytest.param((LOOPBACK,), (-1, 1), Authority(), id="another authority"),
        pytest.param((x509.DNSName("localhost"),), (-1, 1), AUTHORITY, id="another host"),
        pytest.param((LOOPBACK,), (-2, -1), AUTHORITY, id="no longer valid"),
    ],
)
async def test_a_certificate_that_is_not_believed(
    tmp_path: Path,
    client_tls: ssl.SSLContext,
    names: tuple[x509.GeneralName, ...],
    days: tuple[float, float],
    authority: Authority,
) -> None:
    tls = context_of(authority.issue(names=names, days=days), tmp_path)
    async with serving(always(ok()), tls=tls) as url, Pool(url, tls=client_tls) as pool:
        with pytest.raises(UntrustedError, match=r"certificate verify failed.*; nothing was sent"):
            await ask(pool)


async def test_by_default_the_system_says_who_is_believed(tmp_path: Path) -> None:
    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(always(ok()), tls=tls) as url, Pool(url) as pool:
        with pytest.raises(UntrustedError, match="certificate verify failed"):
            await ask(pool)


async def test_a_server_without_tls() -> None:
    async def script(client: Client) -> None:
        await client.some()
        await client.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await client.gone()

    async with serving(script) as url, Pool(url.replace("http", "https"), tls=believing()) as pool:
        with pytest.raises(UntrustedError, match=r"no TLS.*; nothing was sent"):
            await ask(pool)


async def test_a_body_over_tls_that_is_cut_off_is_not_complete(tmp_path: Path, client_tls: ssl.SSLContext) -> None:
    """Without the farewell of TLS, the end of the connection is not the end of the body."""

    async def script(client: Client) -> None:
        await client.request()
        await client.say(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await asyncio.sleep(0.01)
        client.reset()

    tls = context_of(AUTHORITY.issue(names=(LOOPBACK,)), tmp_path)
    async with serving(script, tls=tls) as url, Pool(url, tls=client_tls) as pool:
        with pytest.raises(BrokenError, match="a part of the answer had come"):
            await ask(pool)
