"""One completion queue, and one eventfd, for each event loop of the process, shared by the agents that use it."""

from __future__ import annotations

import asyncio
import threading

from ._fast.completion import CompletionQueue

__all__ = ["acquire", "forget_all", "release"]

_lock = threading.Lock()
_queues: dict[asyncio.AbstractEventLoop, tuple[CompletionQueue, int]] = {}


def acquire(loop: asyncio.AbstractEventLoop) -> CompletionQueue:
    """Return the loop's queue, watched by it. Called in the loop's own thread."""
    with _lock:
        queue, users = _queues.get(loop, (None, 0))
        if queue is None:
            queue = CompletionQueue()
            loop.add_reader(queue.fileno(), queue.drain)
        _queues[loop] = (queue, users + 1)
    return queue


def release(loop: asyncio.AbstractEventLoop) -> None:
    """Undo one `acquire`; nothing that the caller posted with the queue is in flight."""
    with _lock:
        queue, users = _queues[loop]
        if users > 1:
            _queues[loop] = (queue, users - 1)
            return
        del _queues[loop]
    if not loop.is_closed():
        loop.remove_reader(queue.fileno())
    queue.close()


def forget_all() -> None:
    """In a forked child: the loops belong to the parent, and so does what the eventfds say."""
    for queue, _ in _queues.values():
        queue.forget()
    _queues.clear()
