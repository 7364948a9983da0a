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
_RDMA_ALIASES = ("ib", "rc", "dc", "ud", "gga")
_RDMA_DEVICES = Path("/sys/class/infiniband")

# What UCX reads when it is loaded, unless the user has set it. Without: SIGHUP would stop the process for a debugger;
# messages would go to stdout; and the type of memory would come from a cache that misses CUDA's own allocators.
_AT_LOAD = {"UCX_DEBUG_SIGNO": "0", "UCX_LOG_FILE": "stderr", "UCX_MEMTYPE_CACHE": "n"}

_lock = threading.Lock()
# At most one: process, options, number of workers; context and workers.
_spare: list[tuple[int, dict[str, str], int, tuple[Any, list[Any]]]] = []


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
        here = _the_only_one()
        wanted = here if config.ucx_library is None else _find(config.ucx_library)
        if here is not None and wanted is not None and not here.samefile(wanted):
            raise BackendError(
                f"ucx_library is {config.ucx_library!r}, and this process has another UCX loaded: {here}. "
                "A process can use one; load that one everywhere, or start asyncxfer before what loads the other"
            )
        module = _import(wanted)
        path = _the_only_one()
        if path is None:
            raise BackendError("ucxx was loaded, and no libucp with it: a statically linked UCX cannot be used")
        version = ".".join(map(str, module.get_ucx_version()))
        return Library(str(path), version, _origin(path), sys.modules["ucxx"].__version__)


def _import(libucp: Path | None) -> Any:
    """The native module of ucxx, made to use this build, or its own."""
    require_ucxx()
    name = "ucxx._lib.libucxx"
    if name in sys.modules:
        return sys.modules[name]
    try:
        if libucp is None:
            with _environment(_AT_LOAD):
                return importlib.import_module(name)
        modules = {"UCX_MODULE_DIR": str(libucp.parent / "ucx")}  # or it would look where it was built for, too
        with _environment(_AT_LOAD | modules), _not_installed("libucx"):
            load_as(_SONAME, [*(_part(libucp.parent, part) for part in _PARTS[:-1]), libucp])
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"UCX does not load from {libucp or 'what ucxx brings'}: {error}") from error


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


def _the_only_one() -> Path | None:
    """The libucp in this process; None where there is none."""
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
    return next(iter(found["libucp"]), None)


def _find(where: str) -> Path:
    """The libucp that `ucx_library` means."""
    place = Path(where).expanduser()
    if place.is_file():
        return place
    for folder in _FOLDERS:
        try:
            return _part(place / folder, "libucp")
        except BackendError:
            continue
    folders = ", ".join(repr(folder) for folder in _FOLDERS[1:])
    raise BackendError(f"ucx_library is {where!r}: there is no libucp.so.0 in it, nor in its {folders}")


def _part(folder: Path, part: str) -> Path:
    """The file of one of UCX's libraries."""
    if (usual := folder / f"{part}.so.0").is_file():
        return usual
    matches = ((path, _FILE.fullmatch(path.name)) for path in sorted(folder.glob(f"{part}*")))
    for path, match in matches:
        if match is not None and match[1] == part:
            return path
    raise BackendError(f"there is no {part}.so.0 in {folder}")


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
        if devices is None and _names(transports) & {*_RDMA_ALIASES, "all"} | _negated(transports):
            raise ConfigError(
                f"ucx_transports is {transports!r}: with tcp beside RDMA, ucx_devices has to name the devices, "
                "such as 'mlx5_0:1,lo'"
            )
        devices = devices or "lo"
        _refuse_open(devices, config)
    if devices is not None:
        chosen["NET_DEVICES"] = devices
    return chosen


def _names(transports: str) -> set[str]:
    return {part.strip().lstrip("^\\").partition(":")[0] for part in transports.split(",")}


def _negated(transports: str) -> set[str]:
    return {"^"} if transports.strip().startswith("^") else set()


def _listens(transports: str) -> bool:
    """Whether UCX's tcp is among them: a name, or not one of those that are left out."""
    if _negated(transports):
        return "tcp" not in _names(transports)
    return bool(_names(transports) & {"tcp", "all"})


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


def take(config: Config) -> tuple[Any, list[Any]]:
    """Return a ``UCXContext`` and its workers: those that `examine` made, where it asked the same just before.

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
    return _make(config, chosen)


def _make(config: Config, chosen: Mapping[str, str]) -> tuple[Any, list[Any]]:
    context = _make_context(config, chosen)
    return context, _make_workers(context, config)


def _make_workers(context: Any, config: Config) -> list[Any]:
    try:
        return [native().UCXWorker(context, False, False) for _ in range(config.ucx_workers)]
    except native().UCXError as error:
        raise BackendError(f"UCX makes no worker: {error}; `asyncxfer doctor` lists what there is") from error


def _make_context(config: Config, chosen: Mapping[str, str]) -> Any:
    """Make one. Blocks: with hardware for tens of milliseconds and more."""
    features = (native().Feature.RMA, native().Feature.AM, native().Feature.WAKEUP)
    try:
        return native().UCXContext(dict(chosen), features)
    except native().UCXError as error:
        raise BackendError(
            f"UCX does not start with ucx_transports={config.ucx_transports!r}, ucx_devices={config.ucx_devices!r}: "
            f"{error}; `asyncxfer doctor` lists what there is"
        ) from error


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
            f"ucx_transports is {config.ucx_transports!r}, and this {library} has {_by_device(found)}: none that notices "
            "the end of a peer; add rc, dc, ud or srd (RDMA), or tcp"
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
        _spare[:] = [(os.getpid(), chosen, config.ucx_workers, (context, workers))]
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
