"""A server that says what an object store would say and stores nothing, so that what is measured is the client.

A process of its own with one thread: GET answers bytes out of one file in memory, which the kernel sends without this
program touching them; PUT is thrown away where it arrives. It speaks HTTP/1.1 and as much of S3 and of Azure as a
client needs to get, put, and put in parts; which of them, the header tells with which Azure's clients say their
version. It checks no signature and no checksum. Over https, the bytes are encrypted out of that file and decrypted into
one place, records of 16 KiB by one call.

The size of an object is the number that its key ends in, and its bytes are those of `content`. The program imports
nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    # What a connection waits for before it goes on: events of epoll.
    Waits = Generator[int, None, None]
    _T = TypeVar("_T")

__all__ = ["NullServer", "content"]

#: Objects repeat after this many bytes.
_PERIOD = 16 << 20
_WORD = 8
_RECEIVE = 256 << 10
_HEAD = 64 << 10
_DISCARD = 16 << 20
_RECORD = 16 << 10  # of TLS
_PR_SET_PDEATHSIG = 1

_SIZE = re.compile(rb"(\d{1,18})$")
_ETAG = b'ETag: "00000000000000000000000000000000"\r\n'
#: What every answer of Azure about a blob has, and some of its clients insist on.
_BLOB = (
    b'ETag: "0x000000000000000"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
    b"x-ms-creation-time: Thu, 01 Jan 2026 00:00:00 GMT\r\nx-ms-blob-type: BlockBlob\r\n"
    b"x-ms-lease-state: available\r\nx-ms-lease-status: unlocked\r\nx-ms-server-encrypted: true\r\n"
    b"x-ms-request-server-encrypted: true\r\nx-ms-request-id: 0\r\nx-ms-version: 2023-11-03\r\n"
)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_XML = b'<?xml version="1.0" encoding="UTF-8"?>\n'
_CREATED = _XML + b"<InitiateMultipartUploadResult><UploadId>null</UploadId></InitiateMultipartUploadResult>"
_COMPLETED = _XML + b"<CompleteMultipartUploadResult><ETag>&quot;0-1&quot;</ETag></CompleteMultipartUploadResult>"
_NO_KEY = _XML + b"<Error><Code>NoSuchKey</Code><Message>a key here ends in the object's size</Message></Error>"
_NO_RANGE = _XML + b"<Error><Code>InvalidRange</Code><Message>the range lies behind the object</Message></Error>"


def content(offset: int, size: int) -> bytes:
    """What bytes an object has from `offset`, whatever its key.

    Each word of 8 bytes, in this machine's order, is its place: the offset divided by 8, modulo 2 Mi.
    """
    first, last = offset // _WORD, -(-(offset + size) // _WORD)
    words = array.array("Q", (word % (_PERIOD // _WORD) for word in range(first, last)))
    return words.tobytes()[offset - first * _WORD :][:size]


class NullServer:
    """The server in a process of its own, on a free port of 127.0.0.1, for as long as the ``with`` block runs.

    Parameters
    ----------
    certificate : Path or None
        A file of PEM with a certificate and its key: then it speaks https.

    Attributes
    ----------
    url : str
        Where it listens.
    pid : int
        Its process.
    """

    url: str
    pid: int

    def __init__(self, certificate: Path | None = None) -> None:
        self._certificate = certificate

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid())]
        if self._certificate is not None:
            command.append(str(self._certificate))
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        port = self._process.stdout.readline()
        if not port:
            self.__exit__(None, None, None)
            raise RuntimeError(f"{' '.join(command)} ended before it listened; its error is above")
        self.url = f"http{'' if self._certificate is None else 's'}://127.0.0.1:{int(port)}"
        self.pid = self._process.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()


# ---- the program ----------------------------------------------------------------------------------------------------


def _fill() -> int:
    """A file in memory with the bytes of objects."""
    fd = os.memfd_create("null-objects", os.MFD_CLOEXEC)
    os.pwrite(fd, array.array("Q", range(_PERIOD // _WORD)), 0)
    return fd


class _Connection:
    """One client: a generator that yields what it waits for, and ends with the connection."""

    def __init__(self, sock: socket.socket, fd: int, sink: mmap.mmap) -> None:
        self.sock = sock
        self._fd = fd
        self._sink = sink
        self._received = bytearray()
        self.watched = select.EPOLLIN

    def serve(self) -> Waits:
        while True:
            while (end := self._received.find(b"\r\n\r\n")) < 0:
                if len(self._received) > _HEAD or not (yield from self._receive()):
                    return
            line, *fields = bytes(self._received[:end]).split(b"\r\n")
            del self._received[: end + 4]
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(b":") for field in fields)}
            method, target, _ = line.split(b" ", 2)
            if headers.get(b"expect", b"").lower() == b"100-continue":
                yield from self._send(_CONTINUE)
            yield from self._discard(headers)
            yield from self._answer(method, target, headers)

    def _receive(self) -> Generator[int, None, int]:
        """Take more in; how many bytes, 0 at the end."""
        while True:
            try:
                data = self.sock.recv(_RECEIVE)
            except BlockingIOError:
                yield select.EPOLLIN
                continue
            self._received += data
            return len(data)

    def _discard(self, headers: dict[bytes, bytes]) -> Waits:
        """Let the request's body be gone."""
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            while size := int((yield from self._line()).split(b";")[0], 16):
                yield from self._skip(size + 2)
            while (yield from self._line()):
                pass
            return
        yield from self._skip(int(headers.get(b"content-length", b"0")))

    def _line(self) -> Generator[int, None, bytes]:
        while (end := self._received.find(b"\r\n")) < 0:
            if not (yield from self._receive()):
                raise ConnectionError
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    def _skip(self, count: int) -> Waits:
        taken = min(count, len(self._received))
        del self._received[:taken]
        count -= taken
        while count:
            try:
                # The kernel drops what it would have copied, so the memory of the sink is never touched.
                got = self.sock.recv_into(self._sink, min(count, _DISCARD), socket.MSG_TRUNC)
            except BlockingIOError:
                yield select.EPOLLIN
                continue
            if not got:
                raise ConnectionError
            count -= got

    def _send(self, data: bytes) -> Waits:
        yield from self._send_plain(data)

    def _send_plain(self, data: bytes, more: int = 0) -> Waits:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view, more) :]
            except BlockingIOError:
                yield select.EPOLLOUT

    def _send_object(self, head: bytes, offset: int, count: int) -> Waits:
        yield from self._send_plain(head, socket.MSG_MORE)
        while count:
            place = offset % _PERIOD
            try:
                sent = os.sendfile(self.sock.fileno(), self._fd, place, min(count, _PERIOD - place))
            except BlockingIOError:
                yield select.EPOLLOUT
                continue
            offset += sent
            count -= sent

    def _answer(self, method: bytes, target: bytes, headers: dict[bytes, bytes]) -> Waits:
        path, _, query = target.partition(b"?")
        azure = b"x-ms-version" in headers
        if method in (b"GET", b"HEAD"):
            wanted = headers.get(b"x-ms-range") or headers.get(b"range")
            yield from self._get(path, wanted, _BLOB if azure else _ETAG, bodiless=method == b"HEAD")
        elif method == b"PUT" and azure:
            yield from self._send(b"HTTP/1.1 201 Created\r\n" + _BLOB + b"Content-Length: 0\r\n\r\n")
        elif method == b"PUT":
            yield from self._send(b"HTTP/1.1 200 OK\r\n" + _ETAG + b"Content-Length: 0\r\n\r\n")
        elif method == b"POST":
            yield from self._say(b"200 OK", _COMPLETED if b"uploadId=" in query else _CREATED)
        elif method == b"DELETE":
            yield from self._send(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            yield from self._say(b"405 Method Not Allowed", b"")

    def _say(self, status: bytes, body: bytes, *, bodiless: bool = False) -> Waits:
        head = b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        yield from self._send(head if bodiless else head + body)

    def _get(self, path: bytes, wanted: bytes | None, about: bytes, *, bodiless: bool) -> Waits:
        sized = _SIZE.search(path)
        if sized is None:
            yield from self._say(b"404 Not Found", _NO_KEY, bodiless=bodiless)
            return
        size = int(sized[1])
        first, end, status, told = 0, size, b"200 OK", b""
        if wanted is not None:
            first, end = _range(wanted, size)
            if first >= end:
                yield from self._say(b"416 Range Not Satisfiable", _NO_RANGE, bodiless=bodiless)
                return
            status, told = b"206 Partial Content", b"Content-Range: bytes %d-%d/%d\r\n" % (first, end - 1, size)
        head = b"HTTP/1.1 %b\r\n%b%bContent-Length: %d\r\n\r\n" % (status, about, told, end - first)
        if bodiless or first == end:
            yield from self._send(head)
        else:
            yield from self._send_object(head, first, end - first)


class _Encrypted(_Connection):
    """One client that speaks TLS."""

    def __init__(self, sock: ssl.SSLSocket, content: memoryview, sink: mmap.mmap) -> None:
        super().__init__(sock, -1, sink)
        self._content = content

    def serve(self) -> Waits:
        assert isinstance(self.sock, ssl.SSLSocket)
        yield from self._do(self.sock.do_handshake)
        yield from super().serve()

    def _do(self, step: Callable[[], _T]) -> Generator[int, None, _T]:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                yield select.EPOLLIN
            except ssl.SSLWantWriteError:
                yield select.EPOLLOUT

    def _receive(self) -> Generator[int, None, int]:
        data = yield from self._do(lambda: self.sock.recv(_RECEIVE))
        self._received += data
        return len(data)

    def _skip(self, count: int) -> Waits:
        taken = min(count, len(self._received))
        del self._received[:taken]
        count -= taken
        while count:
            most = min(count, _RECORD)
            got = yield from self._do(lambda most=most: self.sock.recv_into(self._sink, most))  # type: ignore[misc]
            if not got:
                raise ConnectionError
            count -= got

    def _send(self, data: bytes) -> Waits:
        yield from self._do(lambda: self.sock.send(data))

    def _send_object(self, head: bytes, offset: int, count: int) -> Waits:
        # What begins with the head fills one record; what follows is encrypted where it lies.
        first = min(count, _RECORD - len(head), _PERIOD - offset % _PERIOD)
        while True:
            place = offset % _PERIOD
            piece = self._content[place : place + first]
            data = head + piece if head else piece
            yield from self._do(lambda data=data: self.sock.send(data))  # type: ignore[misc]
            offset += first
            count -= first
            if not count:
                return
            head, first = b"", min(count, _PERIOD - offset % _PERIOD)


def _range(wanted: bytes, size: int) -> tuple[int, int]:
    """Where ``bytes=first-last``, ``bytes=first-`` or ``bytes=-count`` begins and ends."""
    first, _, last = wanted.removeprefix(b"bytes=").partition(b"-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _serve(listener: socket.socket, fd: int, tls: ssl.SSLContext | None) -> None:
    content = memoryview(mmap.mmap(fd, _PERIOD, prot=mmap.PROT_READ))
    sink = mmap.mmap(-1, _DISCARD)
    connections: dict[int, tuple[_Connection, Waits]] = {}
    with select.epoll() as epoll:
        epoll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in epoll.poll():
                if number == listener.fileno():
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection: _Connection
                    if tls is None:
                        connection = _Connection(sock, fd, sink)
                    else:
                        sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                        connection = _Encrypted(sock, content, sink)
                    connections[sock.fileno()] = connection, connection.serve()
                    epoll.register(sock, select.EPOLLIN)
                    continue
                connection, serving = connections[number]
                try:
                    wanted = next(serving)
                except (StopIteration, OSError, ValueError):  # it has left, or does not speak HTTP
                    del connections[number]
                    connection.sock.close()
                    continue
                if wanted != connection.watched:
                    connection.watched = wanted
                    epoll.modify(number, wanted)


def main() -> None:
    """Serve until killed, or until the parent ends, whose process id is the first argument.

    The second, if there is one, is a file with a certificate and its key.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    fd = _fill()
    tls = None
    if len(sys.argv) > 2:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[2])
        tls.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE  # the client is what is measured
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.close()
        _serve(listener, fd, tls)


if __name__ == "__main__":
    main()
