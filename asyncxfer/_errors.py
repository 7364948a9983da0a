"""The error tree: every exception that asyncxfer raises on its own account.

::

    XferError
    ├── ConfigError (ValueError)          an unknown key, or a value out of its range
    ├── DescriptorError (ValueError)      an index, offset or length outside its region
    ├── RegistrationError                 memory that cannot be registered or allocated
    ├── MetadataError                     bytes from a peer that do not decode
    ├── NoRouteError                      no backend can carry the transfer; see ``reasons``
    ├── BackendError                      a backend failed to load, start or answer
    ├── ClosedError                       the agent, region or peer was closed before the call
    ├── AccessError (PermissionError)     a region does not grant this direction
    └── TransferError                     a transfer that was posted and failed
        ├── PeerLostError (ConnectionError)
        ├── TransferTimeout (TimeoutError)
        ├── ChecksumError
        └── ObjectError                   an object store that refused, or did not do it; see ``code``
            ├── ObjectMissingError (FileNotFoundError)
            └── ObjectExistsError (FileExistsError)

What a call can know is wrong is raised by the call; what happens later is raised by the await.
This module imports nothing and knows no other part of the package.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "AccessError",
    "BackendError",
    "ChecksumError",
    "ClosedError",
    "ConfigError",
    "DescriptorError",
    "MetadataError",
    "NoRouteError",
    "ObjectError",
    "ObjectExistsError",
    "ObjectMissingError",
    "PeerLostError",
    "RegistrationError",
    "TransferError",
    "TransferTimeout",
    "XferError",
]


class XferError(Exception):
    """Base of every error that asyncxfer raises."""


class ConfigError(XferError, ValueError):
    """A configuration key that does not exist, or a value outside its range."""


class DescriptorError(XferError, ValueError):
    """An index, offset, length or byte total that does not fit its region or its counterpart."""


class RegistrationError(XferError):
    """Memory that cannot be described, registered, allocated or given back."""


class MetadataError(XferError):
    """Bytes from elsewhere that are not well-formed asyncxfer metadata or control frames."""


class NoRouteError(XferError):
    """No backend can carry this transfer.

    Attributes
    ----------
    reasons : dict of str to str
        For each backend that was considered, why it cannot.
    """

    def __init__(self, message: str, *, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons: dict[str, str] = dict(reasons or {})


class BackendError(XferError):
    """A backend that failed to load, to start, or to do what it had promised."""


class ClosedError(XferError):
    """The agent, region, peer or plan was closed before this call."""


class AccessError(XferError, PermissionError):
    """The region does not grant the direction that was asked for."""


class TransferError(XferError):
    """A transfer that was posted and did not succeed.

    Attributes
    ----------
    nbytes : int
        Bytes that had been moved when it ended.
    backend : str or None
        The backend that carried it.
    """

    def __init__(self, message: str, *, nbytes: int = 0, backend: str | None = None) -> None:
        super().__init__(message)
        self.nbytes = nbytes
        self.backend = backend


class PeerLostError(TransferError, ConnectionError):
    """The peer ended, restarted or left while this side depended on it."""


class TransferTimeout(TransferError, TimeoutError):
    """The time given to a transfer, a connection or an expectation ran out."""


class ChecksumError(TransferError):
    """The bytes that arrived are not the bytes that were sent."""


class ObjectError(TransferError):
    """An object store refused, or did not do, what was asked.

    Attributes
    ----------
    url : str
        The object, such as ``s3://bucket/key``.
    status : int
        Of the answer; 0: there was none.
    code : str
        The store's own word, such as ``NoSuchKey``.
    request_id : str
        By which the store finds the request.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str = "",
        status: int = 0,
        code: str = "",
        request_id: str = "",
        nbytes: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(message, nbytes=nbytes, backend=backend)
        self.url = url
        self.status = status
        self.code = code
        self.request_id = request_id


class ObjectMissingError(ObjectError, FileNotFoundError):
    """There is no object of this key."""


class ObjectExistsError(ObjectError, FileExistsError):
    """There is an object of this key, where there was to be none."""
