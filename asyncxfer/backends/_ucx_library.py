"""Which UCX is in this process: the only module that imports ucxx, and the only one that loads UCX.

It owns the choice of the build (the wheel that comes with ucxx, another that `ucx_library` names, or the one that is
in the process already), the refusal of two, the options that a context is made with, and what ``asyncxfer doctor``
says of all that. It keeps the environment as it was: importing ucxx sets variables that other users of UCX in the
process would read. It makes a context to see what it offers, and knows nothing of workers, endpoints and memory.

Two builds in one process are refused. UCX learns that memory was unmapped by putting itself in the place of
``munmap``; of two copies only the last sees any of it, and the registration cache of the other serves memory that is
no longer there. Where both have the same sonames, the second is even linked to libraries of the first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._errors import BackendError, ConfigError
from ._alias import load_as

if TYPE_CHECKING:
    from .._config import Config

__all__ = [
    "Library",
    "Resource",
    "Started",
    "check",
    "components",
    "examine",
    "findings",
    "load",
    "native",
    "options",
    "require_ucxx",
    "resources",
    "take",
]

_INSTALL = "pip install 'asyncxfer[ucx-cu12]' (or ucx-cu13 with CUDA 13)"
_SONAME = "libucp.so.0"  # what ucxx needs
_PARTS = ("libucm", "libucs", "libuct", "libucp")
_FILE = re.compile(r"(libuc[mpst])(-[0-9a-f]{8})?\.so[.\d]*")  # with a hash where auditwheel has put it in a wheel
_FOLDERS = ("", "lib", "lib64", "ucx/lib", "libucx/lib")  # where a build, a prefix, HPC-X and the wheel keep them
_RDMA = ("rc_", "dc_", "ud_", "srd", "gga_")
_RDMA_NAMES = ("ib", "rc", "dc", "ud", "srd", "gga")  # what those and their aliases begin with
_RDMA_DEVICES = Path("/sys/class/infiniband")

# What UCX reads when it is loaded, unless the user has set it. Without, SIGHUP would stop the process for a debugger;
# SIGSEGV would be caught (before 1.21); messages would go to stdout; and what kind of memory an address is would come
# from a cache that misses some of CUDA's allocators.
_AT_LOAD = {
    "UCX_DEBUG_SIGNO": "0",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_LOG_FILE": "stderr",
    "UCX_MEMTYPE_CACHE": "n",
}

# From here on UCX's tcp sends messages from where they lie. Its own choice is to copy them into pieces of 8 KiB, with a
# system call for each: a third of the speed, see docs/performance.md.
_TCP_ZCOPY = "8k"

_lock = threading.Lock()
# At most one, with the process, the options and the number of workers that it was made with.
_spare: list[tuple[int, dict[str, str], int, Started]] = []
_first_process = 0  # the one that made a context first


@dataclass(frozen=True, slots=True)
class Library:
    """The UCX that this process uses.

    Attributes
    ----------
    path : str
        Of its libucp.
    version : str
    origin : str
        Where it comes from, in words.
    ucxx_version : str
    """

    path: str
    version: str
    origin: str
    ucxx_version: str

    def __str__(self) -> str:
        return f"UCX {self.version} ({self.origin})"


class Started(NamedTuple):
    """A context of UCXX, and workers of it."""

    library: Library
    context: Any
    workers: list[Any]


class Resource(NamedTuple):
    """A transport on a device, as a context offers it."""

    transport: str
    device: str

    @property
    def is_rdma(self) -> bool:
        """Whether it moves data by RDMA to other hosts."""
        return self.transport.startswith(_RDMA)


# ---- loading ------------------------------------------------------------------------------------------------------


def load(config: Config) -> Library:
    """Load UCX and ucxx, once in a process; blocks for half a second then, and a millisecond later.

    Parameters
    ----------
    config : Config
        `ucx_library` says which build, None any: the one in the process, or else what ucxx brings.

    Returns
    -------
    Library

    Raises
    ------
    BackendError
        ucxx is not installed, the build is not there or does not load, another one is in the process, or two are.
    """
    with _lock:
        here = _in_process()
        wanted = here if config.ucx_library is None else _build(config.ucx_library)
        if here and wanted and not here["libucp"].parent.samefile(wanted["libucp"].parent):
            raise BackendError(
                f"ucx_library is {config.ucx_library!r}, and this process has another UCX loaded: {here['libucp']}. "
                "A process can use one; load that one everywhere, or start asyncxfer before what loads the other"
            )
        module = _import(here or wanted)
        loaded = _in_process()
        if not loaded:
            raise BackendError("ucxx was loaded, and no libucp with it: a statically linked UCX cannot be used")
        version = ".".join(map(str, module.get_ucx_version()))
        path = loaded["libucp"]
        return Library(str(path), version, _origin(path), sys.modules["ucxx"].__version__)


def _import(build: Mapping[str, Path]) -> Any:
    """The native module of ucxx, made to use this build, or its own where none is given."""
    require_ucxx()
    name = "ucxx._lib.libucxx"
    if name in sys.modules:
        return sys.modules[name]
    try:
        if not build:
            with _environment(_AT_LOAD):
                return importlib.import_module(name)
        modules = {"UCX_MODULE_DIR": str(build["libucp"].parent / "ucx")}  # or it looks where it was built for, too
        with _environment(_AT_LOAD | modules), _not_installed("libucx"):
            load_as(_SONAME, [build[part] for part in _PARTS])
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        where = build.get("libucp", "what ucxx brings")
        raise BackendError(f"UCX does not load from {where}: {error}") from error


def require_ucxx() -> None:
    """Look whether ucxx is installed, without importing it.

    Raises
    ------
    BackendError
        It is not.
    """
    if importlib.util.find_spec("ucxx") is None:
        raise BackendError(f"ucxx is not installed: {_INSTALL}")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set; take back, of UCX's, all that was changed since."""
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UCX_")]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextmanager
def _not_installed(package: str) -> Iterator[None]:
    """Let imports of a package fail as if it were not installed: this one would load its own UCX beside ours."""
    there = package in sys.modules
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]  # documented: ModuleNotFoundError
    try:
        yield
    finally:
        if there:
            sys.modules[package] = before  # type: ignore[assignment]
        else:
            del sys.modules[package]


def _in_process() -> dict[str, Path]:
    """The files of the UCX in this process; empty where there is none."""
    found: dict[str, set[Path]] = defaultdict(set)
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line[line.find("/") :]) if "/libuc" in line else None
        if path is not None and (match := _FILE.fullmatch(path.name)):
            found[match[1]].add(path)
    for paths in found.values():
        if len(paths) > 1:
            raise BackendError(
                f"two builds of UCX are in this process: {' and '.join(sorted(map(str, paths)))}. Memory that is "
                "unmapped is noticed by one of them only, so none can be trusted; make all use the same "
                "(ucx_library), see docs/rdma.md"
            )
    return {part: path for part, (path,) in found.items()} if "libucp" in found else {}


def _build(where: str) -> dict[str, Path]:
    """The files of the build that `ucx_library` means."""
    place = Path(where).expanduser()
    folders = [place.parent] if place.is_file() else [place / folder for folder in _FOLDERS]
    for folder in folders:
        files = {part: _file(folder, part) for part in _PARTS}
        if place.is_file():
            files["libucp"] = place
        if all(files.values()):
            return {part: path for part, path in files.items() if path is not None}
    inside = ", ".join(folder for folder in _FOLDERS if folder)
    raise BackendError(
        f"ucx_library is {where!r}: libucm, libucs, libuct and libucp are not all there, nor in its {inside}"
    )


def _file(folder: Path, part: str) -> Path | None:
    """The file of one of UCX's libraries; None where there is none."""
    if (usual := folder / f"{part}.so.0").is_file():
        return usual
    matches = ((path, _FILE.fullmatch(path.name)) for path in sorted(folder.glob(f"{part}*")))
    return next((path for path, match in matches if match is not None and match[1] == part), None)


def _origin(libucp: Path) -> str:
    parts = libucp.parts
    if any(part.startswith("nixl") and part.endswith(".libs") for part in parts):
        return "inside the nixl wheel"
    if "libucx" in parts:
        return "a libucx wheel"
    if any("hpcx" in part.lower() for part in parts):
        return "HPC-X"
    if libucp.is_relative_to(sys.prefix):
        return "this environment"
    if libucp.is_relative_to("/usr") or libucp.is_relative_to("/lib"):
        return "the system"
    return str(libucp.parent)


# ---- what a context is made with ----------------------------------------------------------------------------------


def options(config: Config) -> dict[str, str]:
    """Return what a UCX context is made with, without the prefix ``UCX_``.

    These win over the environment; whatever is not here UCX takes from there.

    Raises
    ------
    ConfigError
        The configuration would let anyone on a network reach UCX's tcp transport, or does not say where it listens.
    """
    transports = "^tcp" if config.ucx_transports is None else config.ucx_transports
    chosen = {"TLS": transports, "RNDV_THRESH": "inf", "KEEPALIVE_INTERVAL": f"{config.ucx_keepalive:g}s"}
    devices = config.ucx_devices
    if _listens(transports):
        if devices is None and _may_be_rdma(transports):
            raise ConfigError(
                f"ucx_transports is {transports!r}: with tcp beside RDMA, ucx_devices has to name the devices, "
                "such as 'mlx5_0:1,lo'"
            )
        devices = devices or "lo"
        _refuse_open(devices, config)
        chosen["ZCOPY_THRESH"] = _TCP_ZCOPY
    if devices is not None:
        chosen["NET_DEVICES"] = devices
    return chosen


def _names(transports: str) -> tuple[bool, set[str]]:
    """Read a list as UCX does: whether it says what is left out, and the names."""
    names = {part.strip().lstrip("^\\").partition(":")[0] for part in transports.split(",")}
    return transports.strip().startswith("^"), names


def _listens(transports: str) -> bool:
    """Whether UCX's tcp is among them."""
    left_out, names = _names(transports)
    return "tcp" not in names if left_out else bool(names & {"tcp", "all"})


def _may_be_rdma(transports: str) -> bool:
    left_out, names = _names(transports)
    return left_out or "all" in names or any(name.startswith(_RDMA_NAMES) for name in names)


def _refuse_open(devices: str, config: Config) -> None:
    if config.open_listener:
        return
    for device in (part.strip() for part in devices.split(",")):
        is_rdma = re.fullmatch(r"[\w.-]+:\d+", device) and (_RDMA_DEVICES / device.partition(":")[0]).exists()
        if device != "lo" and not is_rdma:
            raise ConfigError(
                f"ucx_devices is {devices!r}, and UCX's tcp would listen on {device!r}: it asks nobody who they are, "
                "and who reaches it can write into this process. Take tcp from ucx_transports, keep to 'lo', or, in "
                "a network where everyone is trusted, set open_listener=True"
            )


def native() -> Any:
    """The native module of ucxx, once it has been loaded."""
    return sys.modules["ucxx._lib.libucxx"]


def take(config: Config) -> Started:
    """Return what a backend works with: what `examine` has made, where it was asked the same just before.

    Raises
    ------
    BackendError
        UCX refuses.
    ConfigError
        The configuration is not safe.
    """
    chosen = options(config)
    with _lock:
        spare = _spare.pop() if _spare else None
    if spare is not None and spare[:3] == (os.getpid(), chosen, config.ucx_workers):
        return spare[3]
    library = load(config)
    context = _make_context(config, chosen)
    return Started(library, context, _make_workers(context, config))


def _make_workers(context: Any, config: Config) -> list[Any]:
    try:
        return [native().UCXWorker(context, False, False) for _ in range(config.ucx_workers)]
    except native().UCXError as error:
        raise BackendError(f"UCX makes no worker: {error}; `asyncxfer doctor` lists what there is") from error


def _make_context(config: Config, chosen: Mapping[str, str]) -> Any:
    """Make one. Blocks: with hardware for tens of milliseconds and more."""
    global _first_process
    _first_process = _first_process or os.getpid()
    if _first_process != os.getpid():
        raise BackendError(
            "UCX was started before this process was forked, and its thread has stayed in the parent; fork before the "
            "first agent, or start processes by 'spawn'"
        )
    features = (native().Feature.RMA, native().Feature.AM, native().Feature.WAKEUP)
    try:
        return native().UCXContext(dict(chosen), features)
    except native().UCXError as error:
        raise BackendError(
            f"UCX does not start with ucx_transports={config.ucx_transports!r}, ucx_devices={config.ucx_devices!r}: "
            f"{error}; `asyncxfer doctor` lists what there is"
        ) from error


def _after_fork() -> None:
    """In a child: another thread of the parent may have been loading, and the parent's context is the parent's."""
    global _lock
    _lock = threading.Lock()
    _parents.extend(_spare)
    _spare.clear()


_parents: list[object] = []  # kept: to end a context here would be to end it with a thread that is not here
os.register_at_fork(after_in_child=_after_fork)


# ---- what a context offers ----------------------------------------------------------------------------------------


def resources(info: str) -> list[Resource]:
    """Read from a context's `info` which transports it has on which devices."""
    return [Resource(*found) for found in re.findall(r"^# +resource \d+ .* (\w+)/(\S+)$", info, re.MULTILINE)]


def components(info: str) -> list[str]:
    """Read from a context's `info` which parts of UCX were loaded, with a device or without."""
    return re.findall(r"^# +component \d+ +: +(\S+)", info, re.MULTILINE)


def check(info: str, config: Config, library: Library) -> list[Resource]:
    """Return what a context offers if the backend can work with it, and nobody is let in who should not be.

    Raises
    ------
    BackendError
        It cannot; the message says what to do.
    """
    found = resources(info)
    listening = sorted({each.device for each in found if each.transport == "tcp" and each.device != "lo"})
    if listening and not config.open_listener:
        raise BackendError(f"UCX's tcp would listen on {', '.join(listening)}, and open_listener is not set")
    if any(each.is_rdma or each.transport == "tcp" for each in found):
        return found
    if config.ucx_transports is not None:
        raise BackendError(
            f"ucx_transports is {config.ucx_transports!r}, and this {library} has {_by_device(found)}: none of them "
            "notices the end of a peer; add rc, dc, ud or srd (RDMA), or tcp"
        )
    why = "no device can be used (`ibv_devinfo`)" if "ib" in components(info) else "it was built without verbs"
    raise BackendError(f"this {library} has no transport for RDMA: {why}. docs/rdma.md says how to use another build")


def examine(config: Config) -> str:
    """Say in a line what the backend would use.

    Raises
    ------
    BackendError
        It would not work; the message says what is missing and how to get it.
    ConfigError
        The configuration is not safe.
    """
    require_ucxx()
    chosen = options(config)
    if config.ucx_transports is None and not _rdma_devices():  # so that UCX is not loaded for nothing
        raise BackendError(f"there is no RDMA device ({_RDMA_DEVICES} is empty); ucx_transports names other transports")
    library = load(config)
    context = _make_context(config, chosen)
    found = check(context.info, config, library)
    workers = _make_workers(context, config)  # now, not on an event loop
    with _lock:
        _spare[:] = [(os.getpid(), chosen, config.ucx_workers, Started(library, context, workers))]
    return f"{library}: {_by_device(found)}"


def findings(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Look at all that UCX could do here, whatever is configured.

    Yields
    ------
    name : str
    ok : bool
    detail : str
    """
    try:
        library = load(config)
        info = _make_context(config, {"TLS": "all"}).info  # a context does not listen yet
    except BackendError as error:
        yield "library", False, str(error)
        return
    yield "library", True, f"{library.path}: {library}, ucxx {library.ucxx_version}"
    found = resources(info)
    yield "transports", bool(found), _by_device(found)
    modules = {path.name.split(".")[0] for path in (Path(library.path).parent / "ucx").glob("libuct_*.so*")}
    known = components(info)
    used = {each.transport for each in found}
    rdma = sorted({each.device for each in found if each.is_rdma})
    yield _state("verbs", on=", ".join(rdma), loaded="ib" in known, built="libuct_ib" in modules)
    cuda = sorted(used & {"cuda_copy", "cuda_ipc"})
    loaded = any(each.startswith("cuda") for each in known)
    yield _state("CUDA", on=", ".join(cuda), loaded=loaded, built="libuct_cuda" in modules)
    gdr = sorted(used & {"gdr_copy"})
    built = bool({"libuct_gdr_copy", "libuct_cuda_gdrcopy"} & modules)
    yield _state("GDR", on=", ".join(gdr), loaded="gdr_copy" in known, built=built)


def _state(name: str, *, on: str, loaded: bool, built: bool) -> tuple[str, bool, str]:
    if on:
        return name, True, on
    if loaded:
        return name, False, "in this build; no device"
    if built:
        return name, False, "in this build; does not load, a driver or its library is missing"
    return name, False, "not in this build"


def _rdma_devices() -> list[str]:
    return sorted(os.listdir(_RDMA_DEVICES)) if _RDMA_DEVICES.is_dir() else []


def _by_device(found: Iterable[Resource]) -> str:
    """``rc_mlx5 and ud_mlx5 on mlx5_0:1; cma on memory``."""
    transports: dict[str, list[str]] = defaultdict(list)
    for transport, device in found:
        transports[device].append(transport)
    return "; ".join(f"{', '.join(names)} on {device}" for device, names in transports.items())
