"""Finding backends: the entry point group ``asyncxfer.backends``, and the only place that loads from it.

A backend that does not load is set aside with the reason; only one that was asked for by name raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from ._config import Config
from ._errors import BackendError
from .abc import Backend

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "BackendSpec", "available", "find", "make"]

GROUP = "asyncxfer.backends"
_SHIPPED = {
    "local": "asyncxfer.backends.local:LocalBackend",
    "shm": "asyncxfer.backends.shm:ShmBackend",
    "tcp": "asyncxfer.backends.tcp:TcpBackend",
    "ucx": "asyncxfer.backends.ucx:UcxBackend",
    "uring": "asyncxfer.backends.uring:UringBackend",
    "kvikio": "asyncxfer.backends.kvikio:KvikioBackend",
    "s3": "asyncxfer.backends.s3:S3Backend",
    "azure": "asyncxfer.backends.azure:AzureBackend",
    "gcs": "asyncxfer.backends.gcs:GcsBackend",
}

BackendSpec: TypeAlias = str | type[Backend] | Backend


def available() -> dict[str, EntryPoint]:
    """Every backend that is installed, by name; those shipped are there also without installed metadata."""
    from importlib.metadata import EntryPoint, entry_points  # 20 ms, and needed only by who starts an agent

    found = {name: EntryPoint(name, value, GROUP) for name, value in _SHIPPED.items()}
    for point in entry_points(group=GROUP):
        found[point.name] = point
    return found


def find(wanted: Iterable[BackendSpec] | None, config: Config) -> tuple[list[type[Backend] | Backend], dict[str, str]]:
    """Find the backends of one agent and ask them whether they work here. Blocks: libraries are read and imported.

    Parameters
    ----------
    wanted : iterable of str or Backend, or None
        Names, backend classes or instances; None for all that load.

    Returns
    -------
    found : list of type or Backend
        For `make`.
    refused : dict of str to str
        Why the others did not load.

    Raises
    ------
    BackendError
        One that was asked for by name does not exist or does not load.
    """
    points = available()
    if wanted is None:
        return _all_that_work(points, config)
    return [_resolve(spec, points, config) for spec in wanted], {}


def make(found: Iterable[type[Backend] | Backend], config: Config) -> dict[str, Backend]:
    """Make the backends of one agent, all of which are known to work; by name."""
    made = [spec if isinstance(spec, Backend) else spec(config) for spec in found]
    return {backend.name: backend for backend in made}


def _all_that_work(
    points: Mapping[str, EntryPoint], config: Config
) -> tuple[list[type[Backend] | Backend], dict[str, str]]:
    ready: list[type[Backend] | Backend] = []
    refused: dict[str, str] = {}
    for name in points:
        try:
            ready.append(_resolve(name, points, config))
        except BackendError as error:
            refused[name] = str(error)
    return ready, refused


def _resolve(spec: BackendSpec, points: Mapping[str, EntryPoint], config: Config) -> type[Backend] | Backend:
    """The class, or the instance that was given, once it is known to work here."""
    if isinstance(spec, Backend):
        return spec
    backend_class = _load(spec, points) if isinstance(spec, str) else spec
    backend_class.examine(config)
    return backend_class


def _load(name: str, points: Mapping[str, EntryPoint]) -> type[Backend]:
    if name not in points:
        known = ", ".join(sorted(points))
        raise BackendError(f"there is no backend {name!r}; installed are: {known}")
    try:
        backend_class: type[Backend] = points[name].load()
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} does not load: {error}") from error
    return backend_class
