"""Real NIXL between memory and objects: its plug-ins OBJ and AZURE_BLOB, prepared as far as they can be.

Both descriptor lists and the request are prepared before the clock starts; the clock runs from ``transfer`` until
``check_xfer_state`` says DONE. Small requests are polled without pause. Large ones are moved by threads of the plug-in,
which a poll without pause would keep from a core, so they are polled with pauses.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ._object_azure import AzureAt
from ._object_s3 import S3At
from ._object_side import ObjectSide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._object_cases import ObjectCase
    from ._object_store import StoreAt
    from ._shapes import Rows

__all__ = ["NixlObjectSide"]

_OPERATIONS = {"put": "WRITE", "get": "READ"}
_SMALL = 256 << 10  # bytes of a transfer
_PAUSE = 1e-4


class NixlObjectSide(ObjectSide):
    """A ``nixl_agent`` with the plug-in of the store."""

    def __init__(self) -> None:
        api: Any = importlib.import_module("nixl._api")
        self._agent: Any = api.nixl_agent("bench", api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._plugin = ""
        self._at = 0
        self._prefix = ""
        self._pause: float | None = None
        self._memory_registration: Any = None
        self._objects_registration: Any = None
        self._prepared: list[Any] = []

    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        self._plugin, parameters = _plugin(store)
        if store.ca is not None:
            parameters["ca_bundle"] = store.ca
        self._agent.create_backend(self._plugin, parameters)
        self._at, self._prefix = memory.ctypes.data, store.prefix
        rows = [(self._at, memory.nbytes, 0, "")]
        self._memory_registration = self._agent.register_memory(rows, "DRAM", backends=[self._plugin])

    async def prepare(self, case: ObjectCase) -> str:
        await self.release()
        length = case.shape.length
        self._pause = None if case.shape.nbytes <= _SMALL else _PAUSE
        objects = [(0, length, number, self._prefix + key) for number, key in enumerate(case.keys())]
        self._objects_registration = self._agent.register_memory(objects, "OBJ", backends=[self._plugin])
        offsets, lengths = case.rows()
        every = np.arange(case.shape.count, dtype=np.int32)
        here = _rows(offsets + np.uint64(self._at), lengths, np.zeros_like(offsets))
        there = _rows(np.zeros_like(offsets), lengths, every.astype(np.uint64))
        local = self._agent.prep_xfer_dlist("", here, "DRAM", backends=[self._plugin])
        remote = self._agent.prep_xfer_dlist(self._agent.name, there, "OBJ", backends=[self._plugin])
        operation = _OPERATIONS[case.op]
        request = self._agent.make_prepped_xfer(operation, local, every, remote, every, backends=[self._plugin])
        self._prepared = [request, local, remote]
        return self._plugin

    async def move(self, repeats: int) -> None:
        for _ in range(repeats):
            self._once()

    def _once(self) -> None:
        request, check = self._prepared[0], self._agent.check_xfer_state
        state = self._agent.transfer(request)
        while state == "PROC":
            if self._pause is not None:
                time.sleep(self._pause)
            state = check(request)
        if state != "DONE":
            raise RuntimeError(f"NIXL ended a transfer in state {state}")

    async def release(self) -> None:
        if self._prepared:
            request, *lists = self._prepared
            self._prepared = []
            self._agent.release_xfer_handle(request)
            for prepared in lists:
                self._agent.release_dlist_handle(prepared)
            self._agent.deregister_memory(self._objects_registration, backends=[self._plugin])

    async def close(self) -> None:
        await self.release()
        if self._memory_registration is not None:
            self._agent.deregister_memory(self._memory_registration, backends=[self._plugin])


def _rows(*columns: Rows) -> Rows:
    """Rows of address or offset, length, and device or object, as ``prep_xfer_dlist`` takes them."""
    return np.column_stack(columns)


def _plugin(store: StoreAt) -> tuple[str, dict[str, str]]:
    """The plug-in for a store, and what says where it is and who asks."""
    if isinstance(store, AzureAt):
        return "AZURE_BLOB", {"connection_string": store.connection_string, "container_name": store.bucket}
    assert isinstance(store, S3At)
    scheme = store.endpoint.partition(":")[0]
    parameters = {"endpoint_override": store.endpoint, "scheme": scheme, "region": store.region}
    parameters |= {"bucket": store.bucket, "access_key": store.access_key, "secret_key": store.secret_key}
    if store.session_token is not None:
        parameters["session_token"] = store.session_token
    return "OBJ", parameters
