"""What the backends of an agent serve to one initiator over connections of their own.

A service is made when its first connection comes, or at once where the backend wants that, and is shown every region
that is open to the initiator. How connections are made, and who may see which region, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from . import _proof
from ._errors import BackendError
from ._memory import Access

if TYPE_CHECKING:
    from ._fast.link import GatePage
    from ._region import Region
    from .abc import Backend, Service

__all__ = ["Services"]


class Services:
    """The services for one initiator, by backend.

    Parameters
    ----------
    backends : mapping of str to Backend
    page : GatePage
        The gates of the regions as they are open to this initiator.
    tell : callable
        Takes the kind and the tag of a notification that came with data.
    secret : bytes
        The session's, of which each service is given a key.
    remote : bool
        The initiator came over a network.
    """

    def __init__(
        self, backends: Mapping[str, Backend], page: GatePage, tell: Callable[[int, bytes], None], secret: bytes, *,
        remote: bool,
    ) -> None:  # fmt: skip
        self._backends = backends
        self._page = page
        self._tell = tell
        self._secret = secret
        self._remote = remote
        self._paused = False
        self._services: dict[str, Service] = {}
        self._open: dict[int, tuple[Region, Access]] = {}

    def join(self) -> None:
        """Make the services of backends that do not wait for a connection.

        Raises
        ------
        BackendError
            One cannot serve this initiator.
        """
        for name, backend in self._backends.items():
            if backend.joins:
                self._make(name, backend)

    def of(self, name: str) -> Service:
        """Give the service of a backend, which is made when it is first asked for.

        Raises
        ------
        BackendError
            This agent has no such backend, or it takes no connections.
        """
        service = self._services.get(name)
        if service is None:
            backend = self._backends.get(name)
            service = None if backend is None else self._make(name, backend)
            if service is None:
                raise BackendError(f"no backend {name!r} here takes connections")
        return service

    def _make(self, name: str, backend: Backend) -> Service | None:
        service = backend.serve(self._page, self._tell, _proof.key(self._secret, name), remote=self._remote)
        if service is not None:
            self._services[name] = service
            if self._paused:
                service.pause()
            for region, access in self._open.values():
                _show(name, service, region, access)
        return service

    def open(self, region: Region, access: Access) -> None:
        """Serve a region from now on; one that is served already, with this access."""
        self._open[region.slot] = region, access
        for name, service in self._services.items():
            _show(name, service, region, access)

    def shut(self, slot: int) -> None:
        """Forget a region whose gate has been shut, and inside which nobody is."""
        if self._open.pop(slot, None) is not None:
            for service in self._services.values():
                service.shut(slot)

    def pause(self) -> None:
        """Have no further request accepted for now."""
        self._paused = True
        for service in self._services.values():
            service.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        for service in self._services.values():
            service.resume()

    def close(self) -> None:
        """End all connections; when this returns, no service touches any region."""
        while self._services:
            _, service = self._services.popitem()
            service.close()
        self._open.clear()


def _show(name: str, service: Service, region: Region, access: Access) -> None:
    registration = region.registrations.get(name)
    if registration is not None:
        service.open(region.slot, region.epoch, registration, access)
