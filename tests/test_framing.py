"""Frames on a stream, and the preface before them: whatever the pieces, and whatever the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer._errors import MetadataError, PeerLostError
from asyncxfer._framing import Framer, frame
from asyncxfer._metadata import MAX_FRAME_BYTES
from asyncxfer._preface import PREFACE_BYTES, Kind, Preface, Status, check_answer

PAYLOADS = st.lists(st.binary(min_size=1, max_size=300), max_size=20)


def taken(framer: Framer) -> list[bytes]:
    frames = []
    while (complete := framer.take()) is not None:
        frames.append(complete)
    return frames


@given(PAYLOADS, st.lists(st.integers(1, 200), min_size=1))
def test_frames_survive_any_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, payloads))
    framer, got, turn = Framer(), [], 0
    while stream:
        size = cuts[turn % len(cuts)]
        framer.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
        got += taken(framer)
    assert got == payloads
    assert framer.kept == 0


@given(st.lists(st.binary(max_size=200_000), max_size=5))
def test_any_bytes_give_frames_or_an_error_and_keep_little(pieces: list[bytes]) -> None:
    framer = Framer()
    for piece in pieces:
        framer.feed(piece)
        try:
            assert all(0 < len(complete) <= MAX_FRAME_BYTES for complete in taken(framer))
        except MetadataError:
            return
        assert framer.kept <= MAX_FRAME_BYTES + 4


@pytest.mark.parametrize("head", [b"\0\0\0\0", (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"\xff\xff\xff\xff", b"GET "])
def test_a_length_that_no_frame_has_is_refused_before_the_rest_comes(head: bytes) -> None:
    framer = Framer()
    framer.feed(head)
    with pytest.raises(MetadataError, match="expected 1 to 60000"):
        framer.take()


def test_the_largest_frame_and_those_that_cannot_be_sent() -> None:
    framer = Framer()
    framer.feed(frame(bytes(MAX_FRAME_BYTES)))
    assert framer.take() == bytes(MAX_FRAME_BYTES)
    for payload in (b"", bytes(MAX_FRAME_BYTES + 1)):
        with pytest.raises(MetadataError):
            frame(payload)


@given(st.sampled_from(Kind), st.booleans())
def test_a_preface_round_trip(kind: Kind, tls: bool) -> None:
    data = Preface(kind, tls).encode()
    assert len(data) == PREFACE_BYTES
    assert Preface.decode(data) == Preface(kind, tls)


@given(st.binary(max_size=12) | st.binary(max_size=5).map(lambda tail: (b"AXF" + tail).ljust(8, b"\0")))
def test_any_bytes_are_a_preface_of_this_version_or_another_or_none(data: bytes) -> None:
    try:
        preface = Preface.decode(data)
    except MetadataError:
        return
    assert (preface is None) == (data[3] != 1)
    assert preface is None or preface.encode() == data


@pytest.mark.parametrize("status", Status)
def test_every_answer_is_understood(status: Status) -> None:
    if status in (Status.GO_ON, Status.CROWDED):
        assert check_answer(status.answer) is status
    else:
        with pytest.raises(PeerLostError):
            check_answer(status.answer)


@given(st.binary(max_size=12))
def test_any_other_answer_is_that_of_no_agent(data: bytes) -> None:
    if data[:3] != b"AXF":
        with pytest.raises(PeerLostError, match="no agent"):
            check_answer(data)
