"""What agents tell one another, as bytes: agent metadata, control frames, notifications.

A sans-I/O codec: bytes in, typed values out, and back. It owns the wire format and distrusts every byte of
it: all strings, lists and integers are bounded, nothing is unpickled, and a value that decodes is also
consistent (every part of a region lies inside its segment). Bad bytes give MetadataError, never another
exception. It refuses to know sockets, file descriptors and agents; who may send what when is the control
channel's business.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from ._errors import MetadataError
from ._region_info import Index, Name, RegionInfo, SegmentInfo, Unsigned

if TYPE_CHECKING:
    pass

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_TAG_BYTES",
    "PROTOCOL",
    "AgentMetadata",
    "Beat",
    "Bye",
    "Frame",
    "Hello",
    "Letter",
    "LetterAck",
    "Note",
    "NoteKind",
    "Ready",
    "Refused",
    "RegionAdded",
    "RegionInfo",
    "RegionRemoved",
    "SegmentInfo",
    "Welcome",
    "decode",
    "decode_frame",
    "decode_note",
    "encode",
    "encode_frame",
    "encode_note",
]

PROTOCOL = 1
"""Version of the control protocol that this code speaks."""

MAX_METADATA_BYTES = 64 * 1024
MAX_FRAME_BYTES = 60_000  # one sequenced packet on a Unix socket with default buffers, with room to spare
MAX_TAG_BYTES = 32 * 1024

_T = TypeVar("_T")
_Text = Annotated[str, Meta(max_length=1000)]
_Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]


class AgentMetadata(Struct, frozen=True, kw_only=True):
    """What another agent needs to find this one.

    Attributes
    ----------
    version : int
        Control protocol that the agent speaks.
    name : str
    generation : int
        Grows each time that an agent of this name starts: tells a restart from a reconnect.
    process, host : (16,) bytes
        Random identities of the process and of the booted host.
    addresses : list of str
        Where its control channel answers.
    """

    version: Index = PROTOCOL
    name: Name
    generation: Unsigned
    process: _Bytes16
    host: _Bytes16
    addresses: Annotated[list[Annotated[str, Meta(max_length=512)]], Meta(max_length=64)]


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """First frame of the side that connected.

    Attributes
    ----------
    resume : (16,) bytes, or empty
        The session that it goes on with, after its connection broke.
    attempt : int
        Grows with each try to do so.
    proof : (32,) bytes, or empty
        That it knows the secret of that session: see `_proof`.
    """

    version: Index = PROTOCOL
    name: Name
    generation: Unsigned
    process: _Bytes16
    host: _Bytes16
    resume: Annotated[bytes, Meta(max_length=16)] = b""
    attempt: Unsigned = 0
    proof: Annotated[bytes, Meta(max_length=32)] = b""


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello: who accepted, and what belongs to this connection.

    Attributes
    ----------
    session : (16,) bytes
        Its public number.
    secret : (32,) bytes
        By which data connections, and one that resumes it, prove that they belong to it.
    probe_address, probe_value
        On one host: a value at an address to try cross-process reads on.
    backends : dict of str to bytes
        Addresses of backends.
    """

    name: Name
    generation: Unsigned
    process: _Bytes16
    host: _Bytes16
    session: _Bytes16
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    probe_address: Unsigned = 0
    probe_value: Annotated[bytes, Meta(max_length=16)] = b""
    slots: Index
    backends: Annotated[dict[Name, bytes], Meta(max_length=64)] = {}  # msgspec makes a new one each time


class RegionAdded(Struct, frozen=True, tag="added"):
    """A region exists; its descriptors travel with the frame."""

    info: RegionInfo


class RegionRemoved(Struct, frozen=True, tag="removed"):
    """A region is gone."""

    id: Unsigned


class Ready(Struct, frozen=True, tag="ready"):
    """All regions that existed at the handshake have been sent."""


class Beat(Struct, frozen=True, tag="beat"):
    """The sender's event loop turns; it wants to know whether the other's does.

    Attributes
    ----------
    asks : bool
        False in the answer.
    """

    asks: bool = True


class Bye(Struct, frozen=True, tag="bye"):
    """The sender leaves on purpose."""

    reason: _Text = ""


class Refused(Struct, frozen=True, tag="refused"):
    """The connection is not accepted; the last frame of a channel."""

    reason: _Text


class NoteKind(enum.IntEnum):
    """First byte of a notification."""

    DELIVERED = ord("N")
    """The transfer's data is in place."""
    ANNOUNCED = ord("I")
    """A transfer with this tag has begun."""
    FAILED = ord("F")
    """The transfer with this tag will not complete."""


class Letter(Struct, frozen=True, tag="letter"):
    """A notification to a peer on another host, kept by its sender until it is acknowledged.

    Attributes
    ----------
    seq : int
        1 for the first of a session, and one more for each that follows.
    kind : (1,) bytes
        A `NoteKind`.
    """

    seq: Unsigned
    kind: Annotated[bytes, Meta(min_length=1, max_length=1)]
    tag: Annotated[bytes, Meta(max_length=MAX_TAG_BYTES)]

    @property
    def note(self) -> Note:
        """What it says."""
        return decode_note(self.kind + self.tag)


class LetterAck(Struct, frozen=True, tag="ack"):
    """All letters up to a number have arrived."""

    seq: Unsigned


Frame: TypeAlias = (
    Hello | Welcome | RegionAdded | RegionRemoved | Ready | Beat | Bye | Refused | Letter | LetterAck
)  # fmt: skip


class Note(NamedTuple):
    """A notification: what happened, and the tag it carries."""

    kind: NoteKind
    tag: bytes


_MAGIC = b"AXFM"
_FORMAT = 1
_HEADER = struct.Struct(">4sBI")  # magic, format, crc32 of the rest
_FRAME_MARK = b"M"
_NOTE_KINDS = {int(kind): kind for kind in NoteKind}

_encoder = msgspec.msgpack.Encoder()
_metadata_decoder = msgspec.msgpack.Decoder(AgentMetadata)
_frame_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(metadata: AgentMetadata) -> bytes:
    """Return `metadata` as bytes for a side channel or a directory.

    Raises
    ------
    MetadataError
        A field is out of its bounds, or the result would pass 64 KiB.
    """
    payload = _pack(metadata, _metadata_decoder, what="agent metadata")
    data = _HEADER.pack(_MAGIC, _FORMAT, zlib.crc32(payload)) + payload
    if len(data) > MAX_METADATA_BYTES:
        raise MetadataError(f"agent metadata of {len(data)} bytes; at most {MAX_METADATA_BYTES} can be sent")
    return data


def decode(data: bytes) -> AgentMetadata:
    """Return the metadata that `encode` made `data` from.

    Raises
    ------
    MetadataError
        The bytes are not agent metadata, are damaged, or come from a newer format.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise MetadataError(f"agent metadata of {len(data)} bytes; expected at most {MAX_METADATA_BYTES}")
    if len(data) < _HEADER.size:
        raise MetadataError(f"agent metadata of {len(data)} bytes; expected at least {_HEADER.size}")
    magic, version, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise MetadataError(f"not agent metadata: it begins with {magic!r}, expected {_MAGIC!r}")
    if version != _FORMAT:
        raise MetadataError(f"agent metadata in format {version}; this asyncxfer reads format {_FORMAT}")
    payload = memoryview(data)[_HEADER.size :]
    if zlib.crc32(payload) != crc:
        raise MetadataError(f"agent metadata is damaged: checksum {zlib.crc32(payload):#010x}, expected {crc:#010x}")
    return _unpack(payload, _metadata_decoder, what="agent metadata")


def encode_frame(frame: Frame) -> bytes:
    """Return a control frame as bytes.

    Raises
    ------
    MetadataError
        A field is out of its bounds, or the frame would pass 60,000 bytes.
    """
    what = f"control frame {type(frame).__name__}"
    data = _FRAME_MARK + _pack(frame, _frame_decoder, what=what)
    if len(data) > MAX_FRAME_BYTES:
        advice = ""
        if isinstance(frame, RegionAdded):
            advice = f"; register the {len(frame.info.segments)} arrays of {frame.info.name!r} as several regions"
        raise MetadataError(f"{what} of {len(data)} bytes; at most {MAX_FRAME_BYTES} can be sent{advice}")
    return data


def decode_frame(data: bytes) -> Frame:
    """Return the control frame that `encode_frame` made `data` from.

    Raises
    ------
    MetadataError
        The bytes are not a well-formed control frame.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise MetadataError(f"control frame of {len(data)} bytes; expected at most {MAX_FRAME_BYTES}")
    if data[:1] != _FRAME_MARK:
        raise MetadataError(f"not a control frame: it begins with {bytes(data[:1])!r}, expected {_FRAME_MARK!r}")
    return _unpack(memoryview(data)[1:], _frame_decoder, what="control frame")


def encode_note(kind: NoteKind, tag: bytes) -> bytes:
    """Return a notification as bytes.

    Raises
    ------
    MetadataError
        `tag` is longer than 32 KiB.
    """
    if len(tag) > MAX_TAG_BYTES:
        raise MetadataError(f"notification tag of {len(tag)} bytes; at most {MAX_TAG_BYTES} can be sent")
    return bytes((kind,)) + tag


def decode_note(data: bytes) -> Note:
    """Return the notification that `data` stands for.

    Raises
    ------
    MetadataError
        The bytes are not a notification.
    """
    kind = _NOTE_KINDS.get(data[0]) if data else None
    if kind is None:
        known = ", ".join(repr(bytes((value,))) for value in _NOTE_KINDS)
        raise MetadataError(f"not a notification: it begins with {bytes(data[:1])!r}, expected one of {known}")
    if len(data) > 1 + MAX_TAG_BYTES:
        raise MetadataError(f"notification tag of {len(data) - 1} bytes; expected at most {MAX_TAG_BYTES}")
    return Note(kind, bytes(data[1:]))


def _pack(value: _T, decoder: msgspec.msgpack.Decoder[_T], *, what: str) -> bytes:
    try:
        payload = _encoder.encode(value)
    except (msgspec.MsgspecError, TypeError, OverflowError, UnicodeError) as error:
        raise MetadataError(f"{what} cannot be encoded: {error}") from error
    _unpack(payload, decoder, what=f"own {what}")  # bounds hold here, so that no peer has to refuse it
    return payload


def _unpack(payload: memoryview | bytes, decoder: msgspec.msgpack.Decoder[_T], *, what: str) -> _T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise MetadataError(f"{what} does not decode: {error}") from error
