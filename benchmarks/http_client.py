"""What the HTTP client costs, beside a server that does nothing: ``python benchmarks/http_client.py [SECONDS]``.

The server is another process, which keeps its answers ready and counts off what it is sent. Small objects are 64 KiB,
16 requests at a time; large ones 64 MiB, one at a time. CPU is this process's only. A hand-made request over
`asyncio.BufferedProtocol`, which knows beforehand how long its answer is, stands beside.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from asyncxfer._http import Pool

SMALL, LARGE, AT_ONCE = 64 << 10, 64 << 20, 16


class Null(asyncio.Protocol):
    """Answers GET with as many bytes as the target says; takes the body of PUT, and forgets it."""

    ready: dict[int, bytes] = {}  # noqa: RUF012 - shared by all connections

    def connection_made(self, transport: Any) -> None:
        self.transport, self.left = transport, 0

    def data_received(self, data: bytes) -> None:
        if not self.left:
            head, _, data = data.partition(b"\r\n\r\n")
            if head.startswith(b"GET"):
                self.transport.write(self.answer(int(head[5 : head.index(b" ", 5)])))
                return
            self.left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.left -= len(data)
        if not self.left:
            self.transport.write(self.answer(0))

    def answer(self, length: int) -> bytes:
        found = self.ready.get(length)
        if found is None:
            found = self.ready[length] = (
                b"HTTP/1.1 200 OK\r\nServer: null\r\nDate: Sun, 01 Nov 2026 00:00:00 GMT\r\n"
                b'ETag: "0123456789abcdef"\r\nx-amz-request-id: 0123456789ABCDEF\r\nAccept-Ranges: bytes\r\n'
                b"Content-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % length + bytes(length)
            )
        return found


def serve(ready: Connection, tls: str | None) -> None:
    async def run() -> None:
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
        server = await asyncio.get_running_loop().create_server(Null, "127.0.0.1", 0, ssl=context)
        ready.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, ready.poll, None)

    uvloop.run(run())


@contextlib.contextmanager
def server(tls: str | None) -> Iterator[int]:
    """Run the server; its port."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, tls))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("end")
        process.join()


@contextlib.contextmanager
def certificate(*, wanted: bool) -> Iterator[str | None]:
    """Make a certificate for loopback that signs itself; its file, with the key."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "server.pem"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=null"
        subprocess.run(
            [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path],
            check=True, capture_output=True,
        )  # fmt: skip
        yield str(path)


async def measure(
    name: str, seconds: float, at_once: int, nbytes: int, one: Callable[[int], Awaitable[object]]
) -> None:
    """Do it at_once times side by side, over and over, and print what that came to."""
    done = 0
    stop = asyncio.Event()

    async def worker(number: int) -> None:
        nonlocal done
        while not stop.is_set():
            await one(number)
            done += 1

    await asyncio.gather(*(one(number) for number in range(at_once)))
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    workers = [asyncio.create_task(worker(number)) for number in range(at_once)]
    await asyncio.sleep(seconds)
    stop.set()
    await asyncio.gather(*workers)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"  {name:<28}{done / took:>10,.0f} /s{done * nbytes / took / (1 << 20):>10,.0f} MiB/s"
        f"{cpu / done * 1e6:>12,.1f} us CPU each"
    )


class ByHand(asyncio.BufferedProtocol):
    """One GET at a time by hand, with the length of the answer known."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(SMALL + 1024))
        self.waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer[self.at :]

    def buffer_updated(self, nbytes: int) -> None:
        self.at += nbytes
        if self.at >= self.size and self.waiter is not None:
            self.waiter.set_result(None)
            self.waiter = None

    async def get(self, size: int) -> None:
        self.at, self.size = 0, size
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(b"GET /%d HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % SMALL)
        await self.waiter


async def by_hand(port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(ByHand, "127.0.0.1", port))[1] for _ in range(AT_ONCE)]
    size = len(Null().answer(SMALL))
    await measure("GET 64 KiB, by hand", seconds, AT_ONCE, SMALL, lambda number: made[number].get(size))
    for protocol in made:
        protocol.transport.abort()


async def measure_all(port: int, seconds: float, tls: str | None) -> None:
    loop = asyncio.get_running_loop()
    context = None if tls is None else ssl.create_default_context(cafile=tls)
    places = [memoryview(bytearray(SMALL)) for _ in range(AT_ONCE)]
    rows = [memoryview(bytearray(SMALL)) for _ in range(AT_ONCE)]
    large = memoryview(bytearray(LARGE))
    async with Pool(f"http{'s' if tls else ''}://127.0.0.1:{port}", limit=AT_ONCE, tls=context) as pool:

        async def get(number: int) -> None:
            await pool.request(b"GET", b"/65536", into=(places[number],), deadline=loop.time() + 10)

        async def get_rows(number: int) -> None:
            place = rows[number]
            pieces = [place[at : at + 4096] for at in range(0, SMALL, 4096)]
            await pool.request(b"GET", b"/65536", into=pieces, deadline=loop.time() + 10)

        async def put(number: int) -> None:
            await pool.request(b"PUT", b"/x", body=(places[number],), deadline=loop.time() + 10)

        async def get_large(number: int) -> None:
            await pool.request(b"GET", b"/%d" % LARGE, into=(large,), deadline=loop.time() + 30)

        async def put_large(number: int) -> None:
            await pool.request(b"PUT", b"/x", body=(large,), deadline=loop.time() + 30)

        await measure("GET 64 KiB", seconds, AT_ONCE, SMALL, get)
        await measure("GET 64 KiB into 16 rows", seconds, AT_ONCE, SMALL, get_rows)
        await measure("PUT 64 KiB", seconds, AT_ONCE, SMALL, put)
        await measure("GET 64 MiB", seconds, 1, LARGE, get_large)
        await measure("PUT 64 MiB", seconds, 1, LARGE, put_large)
    if tls is None:
        await by_hand(port, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float, nargs="?", default=3.0, help="a measurement")
    parser.add_argument("--tls", action="store_true", help="over https")
    arguments = parser.parse_args()
    with certificate(wanted=arguments.tls) as tls, server(tls) as port:
        for name, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
            print(f"{name}, Python {sys.version.split()[0]}{', https' if arguments.tls else ''}")
            run(measure_all(port, arguments.seconds, tls))


if __name__ == "__main__":
    main()
