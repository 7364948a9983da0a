"""A connection between two ends of one process, for tests that drive the native core directly."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncxfer._fast.completion import Completion, CompletionQueue
from asyncxfer._fast.descriptors import PAIR
from asyncxfer._fast.link import PAGE_BYTES, GatePage, Link
from asyncxfer._fast.memory import Mapping

__all__ = ["Connection", "connection", "pairs", "queue", "wait"]


@dataclass
class Connection:
    """Both ends: what the initiator has, and what the target has."""

    link: Link
    page: GatePage
    near: socket.socket
    far: socket.socket

    def frames(self) -> list[bytes]:
        """What has arrived at the target."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while frame := self.far.recv(1 << 16):
                found.append(frame)
        return found


@contextlib.contextmanager
def connection() -> Iterator[Connection]:
    """Connect this process to itself."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    page = GatePage()
    mapping = Mapping(page.fd, 0, PAGE_BYTES, writable=True)
    page.close_fd()
    with near, far:
        yield Connection(Link(near.fileno(), -1, os.getpid(), mapping), page, near, far)


@contextlib.contextmanager
def queue() -> Iterator[CompletionQueue]:
    """A queue that is closed at the end."""
    made = CompletionQueue()
    try:
        yield made
    finally:
        made.close()


def wait(made: CompletionQueue, *completions: Completion) -> None:
    """Drain until all have ended."""
    while not all(completion.done() for completion in completions):
        made.drain()
    while made.drain():
        pass


def pairs(rows: list[tuple[int, int, int, int, int, int]]) -> npt.NDArray[np.void]:
    """Pairs from (local, remote, length, local stride, remote stride, count) in segment 0 of both."""
    return np.array([(*row, 0, 0, 0) for row in rows], dtype=PAIR)
