"""A plain stream as one side of a pair: a socket of Python's, or its `ssl`, and one row in one piece.

What a program would get that has nothing else to do: the target's thread blocks in `recv_into` and `sendall`, as the
initiator does, on the whole row. The clock runs until the target says that it has the row, or until the row is here. It
takes cases of a single row only, and knows nothing of other systems.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._side import Message, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._pattern import Bytes
    from ._shapes import Case, Memory

__all__ = ["StreamSide"]

_ORDER = struct.Struct("!?Q")  # whether it is a put, and how many bytes
_HAVE_IT = b"!"
#: How much is given to `sendall` and `recv_into` at a time.
_PIECE = 1 << 20


class StreamSide(Side):
    """One end of a TCP or TLS connection."""

    def __init__(self, options: Message) -> None:
        self._role: str = options["role"]
        self._address: str = options["address"]
        self._folder: str | None = options["certificates"]
        self._array: Bytes = np.zeros(0, dtype=np.uint8)
        self._sock: socket.socket | None = None
        self._order = b""
        self._row = memoryview(b"")

    async def open(self, nbytes: int, memories: Sequence[Memory]) -> str:
        self._array = np.ones(nbytes, dtype=np.uint8)  # every page is there before anything is timed
        if self._role == "initiator":
            return ""
        listener = socket.create_server((self._address, 0))
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return json.dumps(listener.getsockname())

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            plain, _ = listener.accept()
        with self._secured(plain) as sock, contextlib.suppress(EOFError, ConnectionError):
            while True:
                order = bytearray(_ORDER.size)
                _receive(sock, memoryview(order))
                is_put, nbytes = _ORDER.unpack(order)
                row = self._array.data[:nbytes]
                if is_put:
                    _receive(sock, row)
                    sock.sendall(_HAVE_IT)
                else:
                    _send(sock, row)

    async def connect(self, address: str) -> None:
        self._sock = self._secured(socket.create_connection(tuple(json.loads(address))))

    def _secured(self, sock: socket.socket) -> socket.socket:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._folder is None:
            return sock
        is_server = self._role == "target"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        folder = Path(self._folder)
        context.load_cert_chain(folder / f"{self._role}.pem", folder / f"{self._role}-key.pem")
        context.load_verify_locations(folder / "ca.pem")
        return context.wrap_socket(sock, server_side=is_server)

    async def prepare(self, case: Case) -> None:
        if case.shape.count != 1:
            raise ValueError(f"a stream carries one row, not {case.shape}")
        self._order = _ORDER.pack(case.op == "put", case.shape.length)
        self._row = self._array.data[: case.shape.length]

    async def run(self, repeats: int) -> Message:
        if self._sock is None:
            raise RuntimeError("a run came before the connection")
        sock, is_put = self._sock, self._order[0]
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            sock.sendall(self._order)
            if is_put:
                _send(sock, self._row)
                _receive(sock, memoryview(bytearray(len(_HAVE_IT))))
            else:
                _receive(sock, self._row)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        backend = sock.cipher()[0] if isinstance(sock, ssl.SSLSocket) else "TCP"  # type: ignore[index]
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "backend": backend}

    async def release(self) -> None:
        self._row = memoryview(b"")

    async def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def memory(self, memory: Memory) -> Bytes:
        return self._array


def _send(sock: socket.socket, row: memoryview) -> None:
    for start in range(0, len(row), _PIECE):
        sock.sendall(row[start : start + _PIECE])


def _receive(sock: socket.socket, row: memoryview) -> None:
    got = 0
    while got < len(row):
        came = sock.recv_into(row[got : got + _PIECE])
        if came == 0:
            raise EOFError("the other side has closed the connection")
        got += came
