"""Real NIXL as one side of a pair, through its own Python API, prepared as far as it can be.

Both descriptor lists and the request are prepared before the clock starts; the clock runs from
``transfer`` until ``check_xfer_state`` says DONE, polled without pause. Where a case is not
prepared, every transfer goes the other way that NIXL offers, ``get_xfer_descs`` and
``initialize_xfer``, from ready arrays of address, length and device, and releases its request. Its
memory is always an ordinary numpy array, which it moves no slower than a shared mapping. It knows
nothing of asyncxfer but the cases.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.metadata
import importlib.util
import json
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._side import PACE, TELL_WITHIN, Message, Role, Side, tags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._pattern import Bytes
    from ._shapes import Case, Memory, Rows

__all__ = ["INSTALL", "NixlSide", "Thread", "installed_version"]

Thread = Literal["on", "off", "spin"]

INSTALL = "pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1"
_OPERATIONS = {"put": "WRITE", "get": "READ"}


def installed_version() -> str | None:
    """The version of NIXL that is installed, or None."""
    if importlib.util.find_spec("nixl") is None:
        return None
    return importlib.metadata.version("nixl")


class NixlSide(Side):
    """An initiator or a target that is a ``nixl_agent`` with the UCX backend.

    Parameters
    ----------
    role : {"initiator", "target"}
    thread : {"on", "off", "spin"}
        NIXL's own default is on: one thread an agent, which spins. Without it an agent answers only while it is
        polled: with "off" every millisecond, with "spin" without pause.
    """

    def __init__(self, role: Role, *, thread: Thread) -> None:
        api: Any = importlib.import_module("nixl._api")
        config = api.nixl_agent_config(enable_prog_thread=thread == "on")
        self._agent: Any = api.nixl_agent(role, config)
        self._thread = thread
        self._array: Bytes = np.zeros(0, dtype=np.uint8)
        self._registration: Any = None
        self._peer = ""
        self._peer_start = 0
        self._prepared: list[Any] = []
        self._unprepared: tuple[str, Rows, Rows] | None = None
        self._notes: dict[bytes, float] = {}  # what has come, and when
        self._polling: asyncio.Task[None] | None = None

    async def open(self, nbytes: int, memories: Sequence[Memory]) -> str:
        self._array = np.zeros(nbytes, dtype=np.uint8)
        self._array[:] = 1  # every page is there before anything is registered or timed
        row = (self._array.ctypes.data, nbytes, 0, "")
        self._registration = self._agent.register_memory([row], "DRAM")
        if self._thread != "on":
            self._polling = asyncio.create_task(self._poll())
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return json.dumps({"metadata": metadata, "start": self._array.ctypes.data})

    async def _poll(self) -> None:
        while True:
            self._note()
            await asyncio.sleep(0.001 if self._thread == "off" else 0)

    def _note(self) -> None:
        """Take what notifications have come, with the time."""
        for came in self._agent.get_new_notifs().values():
            self._notes.update(dict.fromkeys(came, time.perf_counter()))

    async def connect(self, address: str) -> None:
        message = json.loads(address)
        self._peer = self._agent.add_remote_agent(base64.b64decode(message["metadata"]))
        self._peer_start = message["start"]
        self._agent.make_connection(self._peer)

    async def prepare(self, case: Case) -> None:
        here = _rows(self._array.ctypes.data, *case.rows(case.local_order()))
        there = _rows(self._peer_start, *case.rows(case.remote_order()))
        if not case.prepared:
            self._unprepared = _OPERATIONS[case.op], here, there
            return
        local = self._agent.prep_xfer_dlist("", here, "DRAM")
        remote = self._agent.prep_xfer_dlist(self._peer, there, "DRAM")
        every = np.arange(case.shape.count, dtype=np.int32)
        request = self._agent.make_prepped_xfer(_OPERATIONS[case.op], local, every, remote, every)
        self._prepared = [request, local, remote]

    async def run(self, repeats: int) -> Message:
        cpu, start = time.process_time(), time.perf_counter()
        if self._unprepared is not None:
            for _ in range(repeats):
                self._move_unprepared(*self._unprepared)
        else:
            post, request = self._agent.transfer, self._prepared[0]
            for _ in range(repeats):
                self._end(request, post(request))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "backend": "UCX"}

    def _move_unprepared(self, operation: str, here: Rows, there: Rows) -> None:
        lists = [self._agent.get_xfer_descs(rows, "DRAM") for rows in (here, there)]
        request = self._agent.initialize_xfer(operation, *lists, self._peer)
        self._end(request, self._agent.transfer(request))
        self._agent.release_xfer_handle(request)

    def _end(self, request: Any, state: str) -> None:
        """Poll a request that was posted until it is done."""
        check = self._agent.check_xfer_state
        while state == "PROC":
            state = check(request)
        if state != "DONE":
            raise RuntimeError(f"NIXL ended a transfer in state {state}")

    async def post(self, count: int) -> Message:
        request, called, ended, at_once = self._prepared[0], [], [], 0
        cpu = time.process_time()
        for _ in range(count):
            start = time.perf_counter()
            state = self._agent.transfer(request)
            called.append(time.perf_counter() - start)
            at_once += state == "DONE"
            self._end(request, state)
            ended.append(time.perf_counter() - start)
        used = time.process_time() - cpu
        return {"called": called, "ended": ended, "at_once": at_once, "cpu_seconds": used}

    async def tell(self, count: int) -> list[float]:
        request, times = self._prepared[0], []
        for tag in tags(count):
            times.append(time.perf_counter())
            self._end(request, self._agent.transfer(request, tag))
            end = time.perf_counter() + PACE
            while time.perf_counter() < end:
                self._note()  # without its thread, this is what sends
        return times

    async def listen(self, count: int) -> list[float]:
        times: list[float] = []
        for tag in tags(count):
            end = time.perf_counter() + TELL_WITHIN
            while tag not in self._notes:
                if time.perf_counter() > end:
                    raise TimeoutError(f"{len(times)} of {count} notifications came, then none for {TELL_WITHIN:.0f} s")
                self._note()
            times.append(self._notes.pop(tag))
        return times

    async def release(self) -> None:
        self._unprepared = None
        if self._prepared:
            request, *lists = self._prepared
            self._prepared = []
            self._agent.release_xfer_handle(request)
            for prepared in lists:
                self._agent.release_dlist_handle(prepared)

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
        await self.release()
        if self._peer:
            self._agent.remove_remote_agent(self._peer)
        if self._registration is not None:
            self._agent.deregister_memory(self._registration)

    def memory(self, memory: Memory) -> Bytes:
        return self._array


def _rows(start: int, offsets: Rows, lengths: Rows) -> Rows:
    """Rows of address, length and device, as ``prep_xfer_dlist`` takes them."""
    device = np.zeros_like(offsets)
    return np.column_stack((offsets + np.uint64(start), lengths, device))
