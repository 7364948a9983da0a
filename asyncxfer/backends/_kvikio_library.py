"""Which KvikIO is in this process: the only module that imports kvikio, and what ``asyncxfer doctor`` says of it.

KvikIO calls the CUDA driver to learn what kind of memory an address is, so without libcuda.so.1 it moves nothing, not
even host memory; that is found out before it is imported. Its settings (threads, compatibility mode, direct I/O) are
the process's, shared with whoever else uses it, and are read here, never changed. It knows nothing of transfers.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._errors import BackendError

__all__ = ["cufile", "examine", "findings", "task_bytes"]

_INSTALL = "pip install 'asyncxfer[kvikio-cu12]' (or kvikio-cu13 with CUDA 13)"
_DRIVER = "libcuda.so.1"
_DRIVER_FILES = Path("/proc/driver/nvidia-fs")
_SETTINGS = Path("/etc/cufile.json")


def cufile() -> Any:
    """Return the class of KvikIO's files; `examine` has been asked before."""
    return importlib.import_module("kvikio").CuFile


def task_bytes() -> int:
    """Return how large a piece KvikIO gives to a thread: ``KVIKIO_TASK_SIZE``."""
    return int(_defaults("task_size"))


def examine() -> str:
    """Say in a line which KvikIO there is, and how it would reach files.

    Raises
    ------
    BackendError
        It cannot work here; the message says what is missing and how to get it.
    """
    if importlib.util.find_spec("kvikio") is None:
        raise BackendError(f"KvikIO is not installed: {_INSTALL}")
    _driver()
    return f"KvikIO {_import().__version__}, {_mode()}"


def findings() -> Iterator[tuple[str, bool, str]]:
    """Look at what GPUDirect Storage is made of, whether KvikIO works or not.

    Yields
    ------
    name : str
    ok : bool
    detail : str
    """
    try:
        yield "CUDA driver", True, f"{_DRIVER}, for CUDA {_driver()}"
        yield "KvikIO", True, f"{_import().__version__}, libcufile {_cufile_version()}"
    except BackendError as error:
        yield "CUDA driver", False, str(error)
    else:
        names = ("num_threads", "task_size", "gds_threshold", "bounce_buffer_size")
        yield "settings", True, ", ".join(f"{name} {_defaults(name):,}" for name in names)
        yield "GPUDirect", not _in_compatibility_mode(), _mode()
    yield _kernel_module()
    found = _SETTINGS.is_file()
    otherwise = "not there: libcufile uses its defaults, or the file that CUFILE_ENV_PATH_JSON names"
    yield "cufile.json", found, str(_SETTINGS) if found else otherwise


def _driver() -> str:
    """The CUDA version that the driver is for."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise BackendError(
            f"KvikIO needs NVIDIA's driver, also for host memory, and it does not load here: {error}"
        ) from error
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        raise BackendError(f"NVIDIA's driver ({_DRIVER}) does not answer; `nvidia-smi` may say why")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _import() -> Any:
    try:
        return importlib.import_module("kvikio")
    except (ImportError, OSError) as error:
        raise BackendError(f"KvikIO does not load: {error}; {_INSTALL}") from error


def _defaults(name: str) -> int:
    value: int = importlib.import_module("kvikio.defaults").get(name)
    return value


def _cufile_version() -> str:
    major, minor = importlib.import_module("kvikio.cufile_driver").libcufile_version()
    return f"{major}.{minor}" if major else "is missing, or older than 1.8"


def _in_compatibility_mode() -> bool:
    preferred: bool = importlib.import_module("kvikio.defaults").is_compat_mode_preferred()
    return preferred


def _mode() -> str:
    if _in_compatibility_mode():
        return "compatibility mode: by way of host memory (docs/gds.md says how to set up GPUDirect Storage)"
    return "through libcufile: GPUDirect Storage where the file system can (docs/gds.md says how to be sure)"


def _kernel_module() -> tuple[str, bool, str]:
    """Whether nvidia-fs is loaded."""
    version = _DRIVER_FILES / "version"
    if not version.is_file():
        without = "GPUDirect Storage works without it only with NVMe and PCI P2PDMA (docs/gds.md)"
        return "nvidia-fs", False, f"the kernel module is not loaded ({_DRIVER_FILES} is not there); {without}"
    return "nvidia-fs", True, " ".join(version.read_text().split())
