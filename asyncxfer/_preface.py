"""The first eight bytes of a connection over TCP, in plain text, each way: what it is for, and whether it is taken.

Sans-I/O. It knows how the answers read to who gets them; who gives which is decided elsewhere.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from ._errors import MetadataError, PeerLostError

__all__ = ["PREFACE_BYTES", "Kind", "Preface", "Status", "check_answer"]

PREFACE_BYTES = 8
_MAGIC = b"AXF"
_VERSION = 1
_TLS = 1


class Kind(enum.IntEnum):
    """What a connection is for."""

    CONTROL = ord("C")
    DATA = ord("D")


class Status(enum.IntEnum):
    """How a preface was taken."""

    GO_ON = 0
    CREDENTIALS_NEEDED = 1
    NO_CREDENTIALS = 2
    VERSION = 3
    CROWDED = 4
    PLAIN_DATA = 5

    @property
    def answer(self) -> bytes:
        """The bytes that say so."""
        return _MAGIC + bytes((_VERSION, self)) + bytes(3)


_REFUSALS = {
    Status.CREDENTIALS_NEEDED: "it asks for credentials, and this agent has none; give both Agent(credentials=...)",
    Status.NO_CREDENTIALS: "it has no credentials, and this agent has; give both Agent(credentials=...), or none",
    Status.VERSION: "it speaks another version of the protocol",
    Status.CROWDED: "too many connections wait there to be let in",
    Status.PLAIN_DATA: "it takes encrypted data only; set configuration key encrypt_data alike on both sides",
}


class Preface(NamedTuple):
    """What the side that connected says first.

    Attributes
    ----------
    kind : Kind
    tls : bool
        Whether encryption begins behind the answer.
    """

    kind: Kind
    tls: bool

    def encode(self) -> bytes:
        """Its bytes."""
        return _MAGIC + bytes((_VERSION, self.kind, _TLS if self.tls else 0)) + bytes(2)

    @classmethod
    def decode(cls, data: bytes) -> Preface | None:
        """What the bytes say; None where they are of another version.

        Raises
        ------
        MetadataError
            They are no preface.
        """
        if len(data) != PREFACE_BYTES or data[:3] != _MAGIC:
            raise MetadataError(f"not an agent: it begins with {data!r}")
        if data[3] != _VERSION:
            return None
        if data[4] not in (Kind.CONTROL, Kind.DATA) or data[5] & ~_TLS or data[6:] != bytes(2):
            raise MetadataError(f"not a preface of version {_VERSION}: {data!r}")
        return cls(Kind(data[4]), bool(data[5]))


def check_answer(data: bytes) -> Status:
    """Return how the preface was taken: `Status.GO_ON`, or `Status.CROWDED`, for a later try.

    Raises
    ------
    PeerLostError
        It was refused, or what answers is no agent.
    """
    if len(data) != PREFACE_BYTES or data[:3] != _MAGIC or data[4] not in Status.__members__.values():
        raise PeerLostError(f"what answers there is no agent: it begins with {data!r}")
    status = Status(data[4])
    if status in (Status.GO_ON, Status.CROWDED):
        return status
    version = f" ({data[3]}, this agent {_VERSION})" if status is Status.VERSION else ""
    raise PeerLostError(_REFUSALS[status] + version)
