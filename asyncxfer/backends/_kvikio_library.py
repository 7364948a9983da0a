"""Which KvikIO is in this process: the only module that imports kvikio, and what ``asyncxfer doctor`` says of it.

KvikIO calls the CUDA driver to learn what kind of memory an address is, so without libcuda.so.1 it moves nothing, not
even host memory; that is found out before it is imported. Its settings (threads, compatibility mode, direct I/O) are
the process's, shared with whoever else uses it, and are read here, never changed. It knows nothing of transfers.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._errors import BackendError

__all__ = ["cufile", "examine", "findings", "task_bytes"]

_INSTALL = "pip install 'asyncxfer[kvikio-cu12]' (or kvikio-cu13 with CUDA 13)"
_DRIVER = "libcuda.so.1"
_DRIVER_FILES = Path("/proc/driver/nvidia-fs")
_SETTINGS = Path("/etc/cufile.json")
_UDEV = Path("/run/udev")


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
    _look_for_package()
    _driver()
    return f"{_package()}, {_mode()}"


def findings() -> Iterator[tuple[str, bool, str]]:
    """Look at what GPUDirect Storage is made of, whether KvikIO works or not.

    Yields
    ------
    name : str
    ok : bool
    detail : str
    """
    works = True
    for name, look in (("package", _package), ("CUDA driver", _driver)):
        try:
            yield name, True, look()
        except BackendError as error:
            works = False
            yield name, False, str(error)
    if works:
        yield "libcufile", True, _cufile_version()
        settings = ("num_threads", "task_size", "gds_threshold", "bounce_buffer_size")
        yield "settings", True, ", ".join(f"{setting} {_defaults(setting):,}" for setting in settings)
        yield "GPUDirect", not _in_compatibility_mode(), _mode()
    yield _kernel_module()
    yield _udev()
    found = _SETTINGS.is_file()
    otherwise = "not there: libcufile uses its defaults, or the file that CUFILE_ENV_PATH_JSON names"
    yield "cufile.json", found, str(_SETTINGS) if found else otherwise


def _look_for_package() -> None:
    if importlib.util.find_spec("kvikio") is None:
        raise BackendError(f"KvikIO is not installed: {_INSTALL}")


def _package() -> str:
    """KvikIO and its version, imported."""
    _look_for_package()
    try:
        return f"KvikIO {importlib.import_module('kvikio').__version__}"
    except Exception as error:  # what its loader raises for a missing library is neither ImportError nor OSError
        raise BackendError(f"KvikIO does not load: {error}; {_INSTALL}") from error


def _driver() -> str:
    """The driver, and the CUDA that it is for."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise BackendError(f"KvikIO needs NVIDIA's driver, also for host memory, and there is none: {error}") from error
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        raise BackendError(f"NVIDIA's driver ({_DRIVER}) does not answer; `nvidia-smi` may say why")
    return f"{_DRIVER}, for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _defaults(name: str) -> int:
    value: int = importlib.import_module("kvikio.defaults").get(name)
    return value


def _cufile_version() -> str:
    major, minor = importlib.import_module("kvikio.cufile_driver").libcufile_version()
    return f"{major}.{minor}" if major else "not there, or older than 1.8"


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


def _udev() -> tuple[str, bool, str]:
    """Whether KvikIO can see what it looks for before it uses libcufile."""
    if os.access(_UDEV, os.R_OK):
        return "udev", True, f"{_UDEV} can be read"
    return (
        "udev",
        False,
        f"{_UDEV} cannot be read: KvikIO stays in compatibility mode; a container needs it as a volume",
    )
