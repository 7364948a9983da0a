"""Finding backends: the entry point group ``asyncxfer.backends``, and the only place that loads from it.

A backend that does not load is set aside with the reason; only one that was asked for by name raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from ._config import Config
from ._errors import BackendError
from .abc import Backend

__all__ = ["GROUP", "BackendSpec", "available", "load"]

GROUP = "asyncxfer.backends"
_SHIPPED = {"local": "asyncxfer.backends.local:LocalBackend", "shm": "asyncxfer.backends.shm:ShmBackend"}

BackendSpec = str | type[Backend] | Backend


def available() -> dict[str, EntryPoint]:
    """Every backend that is installed, by name; those shipped are there also without installed metadata."""
    found = {name: EntryPoint(name, value, GROUP) for name, value in _SHIPPED.items()}
    for point in entry_points(group=GROUP):
        found[point.name] = point
    return found


def load(wanted: Iterable[BackendSpec] | None, config: Config) -> tuple[dict[str, Backend], dict[str, str]]:
    """Make the backends of one agent.

    Parameters
    ----------
    wanted : iterable of str or Backend, or None
        Names, backend classes or instances; None for all that load.

    Returns
    -------
    backends : dict of str to Backend
    refused : dict of str to str
        Why the others did not load.

    Raises
    ------
    BackendError
        One that was asked for by name does not exist or does not load.
    """
    points = available()
    if wanted is None:
        return _load_all(points, config)
    backends: dict[str, Backend] = {}
    for spec in wanted:
        backend = _make(spec, points, config)
        backends[backend.name] = backend
    return backends, {}


def _load_all(points: Mapping[str, EntryPoint], config: Config) -> tuple[dict[str, Backend], dict[str, str]]:
    backends: dict[str, Backend] = {}
    refused: dict[str, str] = {}
    for name in points:
        try:
            backends[name] = _make(name, points, config)
        except BackendError as error:
            refused[name] = str(error)
    return backends, refused


def _make(spec: BackendSpec, points: Mapping[str, EntryPoint], config: Config) -> Backend:
    if isinstance(spec, Backend):
        return spec
    if isinstance(spec, type):
        return spec(config)
    if spec not in points:
        known = ", ".join(sorted(points))
        raise BackendError(f"there is no backend {spec!r}; installed are: {known}")
    try:
        backend_class = points[spec].load()
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {spec!r} does not load: {error}") from error
    backend_class.examine(config)
    backend: Backend = backend_class(config)
    return backend
