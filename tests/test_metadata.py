"""The codec: everything that is sent comes back the same, and no bytes whatever do more than raise MetadataError."""

from __future__ import annotations

import contextlib
import pickle
import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncxfer import _metadata as wire
from asyncxfer._descriptors import Layout, MemoryKind
from asyncxfer._errors import MetadataError

if TYPE_CHECKING:
    from collections.abc import Callable

U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=40)
IDENTITIES = st.binary(min_size=16, max_size=16)
SMALL = st.integers(0, 2**31 - 1)


@st.composite
def regions(draw: st.DrawFn) -> wire.RegionInfo:
    stacked = draw(st.booleans())
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    shapes = tuple(
        tuple(draw(st.lists(st.integers(0, 5), max_size=4))) for _ in range(draw(st.integers(1, 4)) if stacked else 1)
    )
    strides, offsets, segments = [], [], []
    for shape in shapes:
        steps, step, offset = [], itemsize, 0
        for count in reversed(shape):
            backwards = draw(st.booleans())
            steps.append(-step if backwards else step)
            offset += step * max(count - 1, 0) if backwards else 0
            step *= max(count, 1)
        strides.append(tuple(reversed(steps)))
        offsets.append(0 if 0 in shape else offset)
        segments.append(
            wire.SegmentInfo(draw(st.integers(0, 2**63)), step, draw(st.integers(-1, 252)), draw(st.integers(0, 2**62)))
        )
    layout = Layout(
        segment_sizes=tuple(segment.nbytes for segment in segments),
        shapes=shapes,
        strides=tuple(strides),
        offsets=tuple(offsets),
        itemsize=itemsize,
        stacked=stacked,
    )
    return wire.RegionInfo.of(
        layout,
        segments,
        id=draw(U64),
        slot=draw(SMALL),
        epoch=draw(U64),
        name=draw(NAMES),
        kind=draw(st.sampled_from(MemoryKind)),
        device=draw(st.integers(-1, 8)),
        access=draw(st.sampled_from(["r", "w", "rw"])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "|V8"])),
        exports=draw(st.dictionaries(NAMES, st.binary(max_size=20), max_size=2)),
    )


AGENTS = st.builds(
    wire.AgentMetadata,
    version=SMALL,
    name=NAMES,
    generation=U64,
    process=IDENTITIES,
    host=IDENTITIES,
    addresses=st.lists(NAMES, max_size=5),
)
FRAMES: st.SearchStrategy[wire.Frame] = st.one_of(
    st.builds(
        wire.Hello,
        version=SMALL,
        name=NAMES,
        generation=U64,
        process=IDENTITIES,
        host=IDENTITIES,
        resume=st.sampled_from([b"", bytes(16)]),
        attempt=U64,
        proof=st.binary(max_size=32),
    ),
    st.builds(
        wire.Welcome,
        name=NAMES,
        generation=U64,
        process=IDENTITIES,
        host=IDENTITIES,
        probe_address=U64,
        probe_value=IDENTITIES,
        slots=SMALL,
        session=IDENTITIES,
        secret=st.binary(min_size=32, max_size=32),
    ),
    st.builds(wire.RegionAdded, regions()),
    st.builds(wire.RegionRemoved, U64),
    st.builds(wire.Ready),
    st.builds(wire.Beat, st.booleans()),
    st.builds(wire.Bye, NAMES),
    st.builds(wire.Refused, NAMES),
    st.builds(wire.Letter, U64, st.binary(min_size=1, max_size=1), st.binary(max_size=100)),
    st.builds(wire.LetterAck, U64),
)


def agent(**changes: Any) -> wire.AgentMetadata:
    fields = {"name": "a", "generation": 1, "process": bytes(16), "host": bytes(16), "addresses": ["unix:@x"]}
    return wire.AgentMetadata(**{**fields, **changes})


def region(**changes: Any) -> wire.RegionInfo:
    fields: dict[str, Any] = {
        "id": 1, "slot": 0, "epoch": 1, "name": "kv", "kind": MemoryKind.DRAM, "access": "rw", "dtype": "float16",
        "itemsize": 2, "shapes": ((3, 4),), "strides": ((8, 2),), "offsets": (0,),
        "segments": (wire.SegmentInfo(4096, 24),),
    }  # fmt: skip
    return wire.RegionInfo(**{**fields, **changes})


def sealed_envelope(payload: bytes, *, magic: bytes = b"AXFM", version: int = 1) -> bytes:
    return struct.pack(">4sBI", magic, version, zlib.crc32(payload)) + payload


def mutate(data: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(data)
    for position, value in edits:
        changed[position % len(changed)] = value
    return bytes(changed[: len(changed) - cut % len(changed)])


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)


@given(AGENTS)
def test_agent_metadata_round_trip(metadata: wire.AgentMetadata) -> None:
    assert wire.decode(wire.encode(metadata)) == metadata


@given(FRAMES)
def test_frame_round_trip(frame: wire.Frame) -> None:
    data = wire.encode_frame(frame)
    assert data[:1] == b"M"
    assert wire.decode_frame(data) == frame
    assert wire.decode_frame(memoryview(data)) == frame  # type: ignore[arg-type]


@given(st.sampled_from(wire.NoteKind), st.binary(max_size=64))
def test_note_round_trip(kind: wire.NoteKind, tag: bytes) -> None:
    assert wire.decode_note(wire.encode_note(kind, tag)) == (kind, tag)


def test_notification_bytes_are_those_of_the_native_code() -> None:
    assert [bytes((kind,)) for kind in (wire.NoteKind.DELIVERED, wire.NoteKind.ANNOUNCED, wire.NoteKind.FAILED)] == [
        b"N", b"I", b"F",
    ]  # fmt: skip
    assert wire.encode_note(wire.NoteKind.FAILED, b"req-17") == b"Freq-17"


@pytest.mark.parametrize("decode", [wire.decode, wire.decode_frame, wire.decode_note])
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_only_raise_metadata_error(decode: Callable[[bytes], object], data: bytes) -> None:
    for candidate in (data, b"M" + data, sealed_envelope(data)):
        with contextlib.suppress(MetadataError):
            decode(candidate)


@given(FRAMES, EDITS, st.integers(0, 50))
def test_mutated_frames_decode_or_raise_metadata_error(
    frame: wire.Frame, edits: list[tuple[int, int]], cut: int
) -> None:
    try:
        decoded = wire.decode_frame(mutate(wire.encode_frame(frame), edits, cut))
    except MetadataError:
        return
    if isinstance(decoded, wire.RegionAdded):
        layout = decoded.info.layout()  # whatever survived is consistent
        assert layout.segment_sizes == tuple(segment.nbytes for segment in decoded.info.segments)


@given(AGENTS, EDITS, st.integers(0, 50))
def test_mutated_metadata_decodes_or_raises_metadata_error(
    metadata: wire.AgentMetadata, edits: list[tuple[int, int]], cut: int
) -> None:
    payload = mutate(wire.encode(metadata)[9:], edits, cut)
    with contextlib.suppress(MetadataError):
        wire.decode(sealed_envelope(payload))  # past the checksum, down to the decoder


@given(AGENTS, st.integers(0, 2**16), st.integers(1, 255))
def test_one_changed_byte_is_noticed(metadata: wire.AgentMetadata, position: int, change: int) -> None:
    data = bytearray(wire.encode(metadata))
    data[position % len(data)] ^= change
    with pytest.raises(MetadataError):
        wire.decode(bytes(data))


@given(regions())
@example(region(stacked=True, segments=(wire.SegmentInfo(0, 24), wire.SegmentInfo(64, 24))))
def test_layout_survives_the_wire(info: wire.RegionInfo) -> None:
    sent = info.layout()
    arrived = wire.decode_frame(wire.encode_frame(wire.RegionAdded(info)))
    assert isinstance(arrived, wire.RegionAdded)
    assert arrived.info.layout() == sent
    assert len(sent.shapes) == len(sent.strides) == len(sent.offsets) == len(info.segments)


def test_like_parts_are_sent_once() -> None:
    layout = Layout(
        segment_sizes=(24,) * 50,
        shapes=((3, 4),) * 50,
        strides=((8, 2),) * 50,
        offsets=(0,) * 50,
        itemsize=2,
        stacked=True,
    )
    segments = [wire.SegmentInfo(4096 * index, 24) for index in range(50)]
    info = wire.RegionInfo.of(
        layout, segments, id=1, slot=0, epoch=1, name="kv", kind=MemoryKind.DRAM, device=0, access="rw", dtype="float16"
    )
    assert info.shapes == ((3, 4),)
    assert info.layout() == layout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": (1,)}, "bytes 1 to 25 are outside its segment of 24"),
        ({"strides": ((-8, 2),)}, "bytes -16 to 8 are outside"),
        ({"strides": ((9, 2),)}, "bytes 0 to 26 are outside"),
        ({"strides": ((0, 0),), "shapes": ((2**40, 2**40),)}, "larger than its segment"),
        ({"strides": ((2**63 - 1, 2),)}, "outside its segment"),
        ({"shapes": ((3, 4, 1),)}, "3 dimensions and 2 strides"),
        ({"shapes": ((0, 4),), "offsets": (25,)}, "outside its segment"),
        ({"segments": (wire.SegmentInfo(2**64 - 8, 24),)}, "address space"),
        ({"segments": (wire.SegmentInfo(0, 24, 0, 2**63 - 10),)}, "file offset"),
        ({"segments": (wire.SegmentInfo(0, 24),) * 2}, "not stacked"),
        (
            {"segments": (wire.SegmentInfo(0, 24),) * 3, "stacked": True, "offsets": (0, 0)},
            "2 offsets; expected 1, or 3",
        ),
    ],
)
def test_inconsistent_regions_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MetadataError, match=words):
        region(**changes)
    # and on arrival: the same fields, put together without the class's own check
    good = msgspec.msgpack.decode(msgspec.msgpack.encode(wire.RegionAdded(region())))
    good["info"].update(msgspec.to_builtins(changes))
    with pytest.raises(MetadataError, match=words):
        wire.decode_frame(b"M" + msgspec.msgpack.encode(good))


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        (agent(name=""), r"\$\.name"),
        (agent(name="a\nb"), r"\$\.name"),
        (agent(name="n" * 256), r"\$\.name"),
        (agent(name="\ud800"), "surrogate"),
        (agent(process=bytes(15)), r"\$\.process"),
        (agent(generation=-1), r"\$\.generation"),
        (agent(generation=2**64), "encoded"),
        (agent(addresses=["x"] * 65), r"\$\.addresses"),
        (agent(addresses=["x" * 513]), r"\$\.addresses"),
        (agent(name=7), r"\$\.name"),
    ],
)
def test_what_a_peer_would_refuse_is_not_sent(metadata: wire.AgentMetadata, path: str) -> None:
    with pytest.raises(MetadataError, match=path):
        wire.encode(metadata)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"AXFM\x01\0\0\0", "8 bytes"),
        (sealed_envelope(b"", magic=b"NIXL"), "begins with b'NIXL'"),
        (sealed_envelope(b"", version=2), "format 2; this asyncxfer reads format 1"),
        (wire.encode(agent())[:-1], "damaged"),
        (bytes(64 * 1024 + 1), "65537 bytes"),
        (sealed_envelope(msgspec.msgpack.encode({"name": "a"})), "generation"),
        (sealed_envelope(pickle.dumps(agent)), "does not decode"),
    ],
)
def test_bad_metadata_says_what_is_wrong(data: bytes, words: str) -> None:
    with pytest.raises(MetadataError, match=words):
        wire.decode(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "begins with b''"),
        (b"Nreq", "begins with b'N'"),
        (b"M", "truncated"),
        (b"M" + bytes(60_000), "60001 bytes"),
        (b"M" + msgspec.msgpack.encode({"type": "surprise"}), "surprise"),
        (b"M" + msgspec.msgpack.encode({"type": "removed", "id": -1}), r"\$\.id"),
        (b"M" + msgspec.msgpack.encode({"type": "ready", "more": [0]})[:-2] + b"\x91" * 50_000, "recursion"),
        (b"M\x82\xa4type\xa7refused\xa6reason\xa2\xff\xff", "utf-8"),
        (b"M" + msgspec.msgpack.encode({"type": "ready"}) + b"\0", "trailing"),
    ],
)
def test_bad_frames_say_what_is_wrong(data: bytes, words: str) -> None:
    with pytest.raises(MetadataError, match=words):
        wire.decode_frame(data)


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert wire.decode_frame(b"M" + msgspec.msgpack.encode({"type": "ready", "later": [1, 2]})) == wire.Ready()


def test_a_region_of_too_many_parts_says_what_to_do() -> None:
    parts = 4096
    shapes = tuple((index % 7 + 1, 4) for index in range(parts))
    info = region(
        stacked=True,
        shapes=shapes,
        strides=((8, 2),) * parts,
        offsets=(0,) * parts,
        segments=tuple(wire.SegmentInfo(2**40 + 4096 * index, 56) for index in range(parts)),
    )
    with pytest.raises(MetadataError, match=r"at most 60000 .* register the 4096 arrays of 'kv' as several regions"):
        wire.encode_frame(wire.RegionAdded(info))


def test_notification_limits() -> None:
    longest = bytes(32 * 1024)
    assert wire.decode_note(wire.encode_note(wire.NoteKind.DELIVERED, longest)).tag == longest
    with pytest.raises(MetadataError, match="32769"):
        wire.encode_note(wire.NoteKind.DELIVERED, longest + b"x")
    with pytest.raises(MetadataError, match="32769"):
        wire.decode_note(b"N" + longest + b"x")
    with pytest.raises(MetadataError, match="begins with b'Z'"):
        wire.decode_note(b"Z")
