"""asyncxfer: move bytes between memory, processes, files and objects, as awaitables.

``Agent`` is where to begin. Everything that users need is in this module; `asyncxfer.abc` is for those who write a
backend.
"""

from ._agent import Agent
from ._chooser import Candidate, Explanation
from ._config import Config
from ._credentials import Certificates, PreSharedKey
from ._descriptors import DescriptorList, MemoryKind
from ._done import Done
from ._errors import (
    AccessError,
    BackendError,
    ChecksumError,
    ClosedError,
    ConfigError,
    DescriptorError,
    MetadataError,
    NoRouteError,
    ObjectError,
    ObjectExistsError,
    ObjectMissingError,
    PeerLostError,
    RegistrationError,
    TransferError,
    TransferTimeout,
    XferError,
)
from ._inbox import Notification
from ._objects import ObjectInfo
from ._peer import Peer, PeerEvent, PeerState
from ._plan import Plan
from ._region import Opening, Region, RemoteRegion
from ._stored import StoredObjects, Upload
from ._transfer import Transfer

__version__ = "0.1.0.dev0"

__all__ = [
    "AccessError",
    "Agent",
    "BackendError",
    "Candidate",
    "Certificates",
    "ChecksumError",
    "ClosedError",
    "Config",
    "ConfigError",
    "DescriptorError",
    "DescriptorList",
    "Done",
    "Explanation",
    "MemoryKind",
    "MetadataError",
    "NoRouteError",
    "Notification",
    "ObjectError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectMissingError",
    "Opening",
    "Peer",
    "PeerEvent",
    "PeerLostError",
    "PeerState",
    "Plan",
    "PreSharedKey",
    "Region",
    "RegistrationError",
    "RemoteRegion",
    "StoredObjects",
    "Transfer",
    "TransferError",
    "TransferTimeout",
    "Upload",
    "XferError",
]

# Tracebacks and help show the public name, not where a class happens to be written.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
