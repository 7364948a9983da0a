"""Copies between GPU memory and pinned host memory, by the CUDA driver: libcuda, and a thread in which it is called.

A call of the driver may take long (a first context, pinning, a lock that another library holds), so whoever wants
something is given a future at once. Copies are asynchronous, on streams of our own, one a direction and GPU, so that
nothing waits for kernels of others nor they for us; the thread asks for all that it was asked for and then waits for
the oldest. GPUs are entered by their primary contexts, which CuPy and torch use, too.

Nothing is imported for it, and no GPU is touched before it is needed. It knows no transfers and no event loop.

References
----------
https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._errors import BackendError, TransferError
from .._fast.devicecopy import copy_rows

__all__ = ["Copier", "device_of", "examine"]

_LIBRARY = "libcuda.so.1"
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: pinned for every GPU
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that for it
_EVENT = 1 | 2  # CU_EVENT_BLOCKING_SYNC, who waits sleeps; CU_EVENT_DISABLE_TIMING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: whatever another thread captures into a graph, it has nothing of ours
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
}


class _Driver:
    """The library's functions, and its words for what went wrong."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
            for name, arguments in _FUNCTIONS.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise BackendError(f"GPU memory needs NVIDIA's driver, and there is none that loads: {error}") from error
        code = self.try_("cuInit", 0)
        if code:
            raise BackendError(
                f"NVIDIA's driver ({_LIBRARY}) does not start: {self.words(code)}; `nvidia-smi` may say why"
            )

    def try_(self, name: str, *arguments: Any) -> int:
        """Call a function; what it says: 0, or what went wrong."""
        code: int = getattr(self._library, name)(*arguments)
        return code

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that has to do what it is for.

        Raises
        ------
        TransferError
            It has not, with the driver's own words.
        """
        self.check(name, self.try_(name, *arguments))

    def check(self, name: str, code: int) -> None:
        """Raise TransferError where a function has said that something went wrong."""
        if code:
            raise TransferError(f"{name}: {self.words(code)}")

    def address(self, name: str) -> int:
        """Where a function is, for native code."""
        found = ctypes.cast(getattr(self._library, name), c_void_p).value
        assert found is not None
        return found

    def words(self, code: int) -> str:
        """An error by its name and in words."""
        told = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self.try_(name, code, ctypes.byref(text))
            told.append((text.value or b"unknown").decode(errors="replace"))
        return f"{told[0]} ({code}: {told[1]})"


@functools.cache
def _driver() -> _Driver:
    """The driver, once it has been found to work in this process."""
    return _Driver()


def examine() -> str:
    """Say in a line what there is. Blocks: the driver starts.

    Raises
    ------
    BackendError
        There is no driver that works, or no GPU.
    """
    driver = _driver()
    version, count = c_int(), c_int()
    driver.try_("cuDriverGetVersion", ctypes.byref(version))
    code = driver.try_("cuDeviceGetCount", ctypes.byref(count))
    if code or not count.value:
        raise BackendError(
            f"NVIDIA's driver ({_LIBRARY}) knows no GPU; `nvidia-smi` and CUDA_VISIBLE_DEVICES may say why"
        )
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return f"{_LIBRARY}, for CUDA {cuda}, {count.value} GPU{'s' if count.value > 1 else ''}"


def device_of(address: int) -> int:
    """Which GPU some memory is of. Blocks, as `examine` does.

    Raises
    ------
    BackendError
        There is no driver that works, or it knows no such memory.
    """
    driver, device = _driver(), c_int()
    code = driver.try_("cuPointerGetAttribute", ctypes.byref(device), _DEVICE_ORDINAL, address)
    if code:
        raise BackendError(f"{address:#x} is no memory that the CUDA driver knows: {driver.words(code)}")
    if device.value < 0:
        raise BackendError(f"{address:#x} is memory of no GPU, as the CUDA driver knows it")
    return device.value


class _Gpu:
    """A GPU as this module has entered it; `with` it, its context is that of the thread."""

    def __init__(self, driver: _Driver, number: int) -> None:
        self._driver = driver
        self._number = c_int()
        self._context = c_void_p()
        self._streams: dict[bool, c_void_p] = {}  # by whether they go to the GPU
        driver.call("cuDeviceGet", ctypes.byref(self._number), number)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._number)
        try:
            with self:
                for to_device in (False, True):
                    stream = c_void_p()
                    driver.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
                    self._streams[to_device] = stream
        except TransferError:
            self.close()
            raise

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent_v2", self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.try_("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def begin(self, rows: npt.NDArray[np.uint64], host: int, *, to_device: bool) -> c_void_p:
        """Ask for copies; the event that comes when they have been made. Where it raises, none goes on."""
        driver, stream, event = self._driver, self._streams[to_device], c_void_p()
        name = "cuMemcpyHtoDAsync_v2" if to_device else "cuMemcpyDtoHAsync_v2"
        with self:
            driver.call("cuEventCreate", ctypes.byref(event), _EVENT)
            try:
                assert stream.value is not None
                driver.check(name, copy_rows(driver.address(name), rows, host, stream.value, to_device=to_device))
                driver.call("cuEventRecord", event, stream)
            except TransferError:
                driver.try_("cuStreamSynchronize", stream)
                driver.try_("cuEventDestroy_v2", event)
                raise
        return event

    def wait(self, event: c_void_p) -> None:
        """Wait for an event; TransferError where what it stands for has gone wrong."""
        with self:
            code = self._driver.try_("cuEventSynchronize", event)
            self._driver.try_("cuEventDestroy_v2", event)
        self._driver.check("cuEventSynchronize", code)

    def pin(self, nbytes: int) -> int:
        """Allocate host memory that every GPU reaches; its address."""
        found = c_void_p()
        with self:
            self._driver.call("cuMemHostAlloc", ctypes.byref(found), nbytes, _PORTABLE)
        assert found.value is not None
        return found.value

    def unpin(self, address: int) -> None:
        """Give it back. A context that is broken says no, and nobody could do anything about it."""
        with contextlib.suppress(TransferError), self:
            self._driver.try_("cuMemFreeHost", address)

    def close(self) -> None:
        """Leave the GPU; a context that is broken says no, as above."""
        with contextlib.suppress(TransferError), self:
            for stream in self._streams.values():
                self._driver.try_("cuStreamDestroy_v2", stream)
        self._driver.try_("cuDevicePrimaryCtxRelease_v2", self._number)


class _Copy(NamedTuple):
    """A copy that is under way."""

    gpu: _Gpu
    event: c_void_p
    done: Future[None]
    what: str


class Copier:
    """A thread that copies, and what it has taken of the GPUs: contexts, streams, pinned memory. Ends by `close`.

    Raises
    ------
    BackendError
        There is no driver that works.
    """

    def __init__(self) -> None:
        self._driver = _driver()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._gpus: dict[int, _Gpu] = {}
        self._pinned: list[tuple[_Gpu, int]] = []
        self._under_way: deque[_Copy] = deque()
        self._thread = Thread(target=self._run, name="axf-cuda", daemon=True)
        self._thread.start()

    def pin(self, device: int, nbytes: int) -> Future[memoryview]:
        """Have host memory pinned, from any thread; it lives until `close`. The future raises TransferError."""
        done: Future[memoryview] = _begun()
        self._inbox.put(functools.partial(self._pin, device, nbytes, done))
        return done

    def copy(self, device: int, rows: npt.NDArray[np.uint64], host: int, *, to_device: bool) -> Future[None]:
        """Have rows of GPU memory copied from or to pinned memory, from any thread.

        Parameters
        ----------
        device : int
        rows : (n, 2) uint64
            Addresses, and lengths in bytes.
        host : int
            Address at which the bytes of all rows lie, one behind the other.
        to_device : bool
            To the GPU, and not from it.

        Returns
        -------
        Future
            Ends, also by TransferError, when nothing of it touches either memory any more.
        """
        done: Future[None] = _begun()
        self._inbox.put(functools.partial(self._copy, device, rows, host, to_device, done))
        return done

    def close(self) -> None:
        """Give everything back and end the thread, which has nothing to do any more."""
        self._inbox.put(None)
        self._thread.join()

    # -- in the thread

    def _run(self) -> None:
        self._driver.try_("cuThreadExchangeStreamCaptureMode", ctypes.byref(c_int(_RELAXED)))
        while True:
            try:
                job = self._inbox.get(block=not self._under_way)
            except Empty:
                self._wait(*self._under_way.popleft())
                continue
            if job is None:
                break
            job()
            del job  # or what it has would be kept until the next comes
        while self._under_way:
            self._wait(*self._under_way.popleft())
        for gpu, address in self._pinned:
            gpu.unpin(address)
        for gpu in self._gpus.values():
            gpu.close()

    def _gpu(self, device: int) -> _Gpu:
        if device not in self._gpus:
            self._gpus[device] = _Gpu(self._driver, device)
        return self._gpus[device]

    def _pin(self, device: int, nbytes: int, done: Future[memoryview]) -> None:
        with _telling(done, f"{nbytes:,} bytes of host memory could not be pinned for GPU {device}"):
            gpu = self._gpu(device)
            address = gpu.pin(nbytes)
            self._pinned.append((gpu, address))
            done.set_result(memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B"))

    def _copy(self, device: int, rows: npt.NDArray[np.uint64], host: int, to_device: bool, done: Future[None]) -> None:
        what = f"copy {'to' if to_device else 'from'} GPU {device}"
        with _telling(done, what):
            gpu = self._gpu(device)
            self._under_way.append(_Copy(gpu, gpu.begin(rows, host, to_device=to_device), done, what))

    @staticmethod
    def _wait(gpu: _Gpu, event: c_void_p, done: Future[None], what: str) -> None:
        with _telling(done, what):
            gpu.wait(event)
            done.set_result(None)


def _begun() -> Future[Any]:
    """A future that cannot be cancelled: what it stands for ends in any case."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@contextlib.contextmanager
def _telling(done: Future[Any], what: str) -> Iterator[None]:
    """Tell whoever waits what went wrong, and with what."""
    try:
        yield
    except TransferError as error:
        done.set_exception(TransferError(f"{what}: {error}"))
    except Exception as error:  # noqa: BLE001 - or everybody would wait for ever
        done.set_exception(error)


os.register_at_fork(after_in_child=_driver.cache_clear)  # CUDA is of no use in a child; asked anew, it says so
