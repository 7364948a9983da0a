"""Descriptor lists of objects: what indexing by keys gives, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncxfer import ConfigError, DescriptorError
from asyncxfer._descriptors import Layout
from asyncxfer._object_rows import KeyIndexable, ObjectRows, sized
from asyncxfer._objects import Objects, open_objects


class Keyed(KeyIndexable):
    """All that indexing needs of a region of objects."""

    def __init__(self, prefix: str = "pre/") -> None:
        self.layout = Layout((), (), (), (), 1, stacked=True)
        self._objects = Objects("s3", "bucket", prefix, False)

    def whole_key(self, key: str) -> str:
        return self._objects.whole_key(key)


REGION = Keyed()


def told(rows: Any) -> list[tuple[str, int, int]]:
    assert isinstance(rows, ObjectRows)
    return [(rows.keys[segment], offset, length) for offset, length, segment in rows.rows().tolist()]


def test_a_key_with_a_range_is_one_row() -> None:
    rows = REGION["a", 3:10]
    assert told(rows) == [("pre/a", 3, 7)]
    assert (len(rows), rows.nbytes) == (1, 7)
    assert "1 rows of 1 objects, 7 bytes" in repr(rows)


@pytest.mark.parametrize("keys", [["a", "b"], ("a", "b"), np.array(["a", "b"])])
def test_keys_with_a_range_are_a_row_each(keys: Any) -> None:
    assert told(REGION[keys, :4]) == [("pre/a", 0, 4), ("pre/b", 0, 4)]


def test_whole_objects_are_as_long_as_the_other_side_says() -> None:
    rows = REGION[["a", "b", "c"]]
    assert len(rows) == 3
    assert repr(rows) == "<DescriptorList of 3 whole objects>"
    with pytest.raises(DescriptorError, match="as long as the other side"):
        rows.nbytes  # noqa: B018
    assert isinstance(rows, ObjectRows)
    assert told(rows.sized(12)) == [("pre/a", 0, 4), ("pre/b", 0, 4), ("pre/c", 0, 4)]
    assert rows.sized(12).whole
    with pytest.raises(DescriptorError, match="13 bytes cannot be shared out evenly among 3 whole objects"):
        rows.sized(13)
    assert REGION["a", :] == REGION["a"]
    assert told(REGION["a"].sized(0)) == [("pre/a", 0, 0)]  # type: ignore[attr-defined]
    with pytest.raises(DescriptorError, match="among 0 whole objects"):
        REGION[[]].sized(1)  # type: ignore[attr-defined]


def test_either_side_of_a_transfer_says_how_long_the_other_is() -> None:
    whole, part = REGION[["a", "b"]], REGION["c", 0:10]
    for pair in ((part, whole), (whole, part)):
        assert [side.nbytes for side in sized(*pair)] == [10, 10]
    with pytest.raises(DescriptorError, match="as long as the other side"):
        sized(whole, whole)
    assert sized(part, part) == (part, part)


def test_a_row_a_key_from_columns() -> None:
    rows = REGION.descriptors([0, 5, 9], [1, 2, 3], keys=["b", "a", "b"])
    assert told(rows) == [("pre/b", 0, 1), ("pre/a", 5, 2), ("pre/b", 9, 3)]
    assert isinstance(rows, ObjectRows)
    assert rows.keys == ("pre/b", "pre/a")  # a key stands in the table once
    assert told(REGION.descriptors([0, 8], 4, keys="a")) == [("pre/a", 0, 4), ("pre/a", 8, 4)]
    assert told(REGION.descriptors([1, 2], [1, 1], keys=["a", "b"], segments=[1, 0])) == [
        ("pre/b", 1, 1),
        ("pre/a", 2, 1),
    ]
    assert REGION.rows([("b", 0, 1), ("a", 5, 2), ("b", 9, 3)]) == rows
    assert REGION.rows(rows) is rows
    assert len(REGION.rows([])) == 0


def test_lists_keep_their_keys_whatever_is_done_to_them() -> None:
    rows = REGION.descriptors([9, 0, 5], [3, 5, 2], keys=["b", "a", "a"])
    assert told(rows.select([2, 0])) == [("pre/a", 5, 2), ("pre/b", 9, 3)]
    assert told(rows.sorted()) == [("pre/b", 9, 3), ("pre/a", 0, 5), ("pre/a", 5, 2)]
    assert told(rows.sorted().merged()) == [("pre/b", 9, 3), ("pre/a", 0, 7)]
    assert told(rows.split(2))[:2] == [("pre/b", 9, 2), ("pre/b", 11, 1)]
    assert told(rows + REGION["c", :1]) == [*told(rows), ("pre/c", 0, 1)]
    assert rows != REGION.descriptors([9, 0, 5], [3, 5, 2], keys=["b", "a", "b"])
    assert rows != 3
    whole = REGION[["a", "b"]]
    assert told((whole + REGION["c"]).select([2, 0]).sized(4)) == [("pre/c", 0, 2), ("pre/a", 0, 2)]  # type: ignore[attr-defined]
    assert whole.merged() is whole
    with pytest.raises(DescriptorError, match="cannot be split"):
        whole.split(2)
    with pytest.raises(DescriptorError, match="cannot be in one list"):
        whole + rows
    with pytest.raises(DescriptorError, match="same region"):
        rows + Keyed()["a", :1]


@pytest.mark.parametrize(
    "key",
    [
        "", ["a", ""], "a\0b", "x" * 1021, "ä" * 511, "\ud800", 3, None, b"a", [b"a"], ["a", 3], {"a"}, ...,
        ("a", 3), ("a", slice(3)), ("a", slice(None, None, 2)), ("a", slice(-3, None)), ("a", slice(5, 3)),
        ("a", slice(0, 10, 2)), ("a", slice(0, -1)), ("a", slice("0", 3)), ("a", slice(0, 2**63)),
    ],
)  # fmt: skip
def test_what_names_no_object_is_refused(key: Any) -> None:
    if key == ("a", slice(3)):
        assert told(REGION[key]) == [("pre/a", 0, 3)]
        return
    with pytest.raises(DescriptorError):
        REGION[key]


@pytest.mark.parametrize(
    ("offsets", "lengths", "more"),
    [
        ([0], [1], {}),
        ([0], [-1], {"keys": "a"}),
        ([-1], [1], {"keys": "a"}),
        ([2**63 - 1], [1], {"keys": "a"}),
        ([0, 1], [1, 1], {"keys": ["a", "b", "c"]}),
        ([0, 1], [1, 1], {"keys": ["a", "b"], "segments": [0, 2]}),
        ([0.5], [1], {"keys": "a"}),
        ([0], [1], {"keys": [""]}),
    ],
)
def test_columns_that_can_be_in_no_object_are_refused(offsets: Any, lengths: Any, more: Any) -> None:
    with pytest.raises(DescriptorError):
        REGION.descriptors(offsets, lengths, **more)


@pytest.mark.parametrize("rows", [[("a", 0)], [("a", 0, 1), ("b", 0)], [3], [(0, "a", 1)]])
def test_rows_that_are_none_are_refused(rows: Any) -> None:
    with pytest.raises(DescriptorError):
        REGION.rows(rows)


def test_a_region_of_objects_has_no_bytes_of_its_own() -> None:
    with pytest.raises(DescriptorError, match="by key first"):
        REGION.bytes  # noqa: B018


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket/a/b", "bucket", "a/b/"),
        ("S3://bucket/a/b/", "bucket", "a/b/"),
    ],
)
def test_urls_of_objects(url: str, bucket: str, prefix: str) -> None:
    opened = open_objects(url, "r", options={"secret": "xyz"}).owner
    assert isinstance(opened, Objects)
    assert (opened.scheme, opened.bucket, opened.prefix) == ("s3", bucket, prefix)
    assert opened.readonly
    assert "xyz" not in repr(opened)


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "s3://bucket?x=1", "s3://bucket/#f", "s3://me:secret@bucket/a"])
def test_urls_that_name_no_objects_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="names no objects"):
        open_objects(url, "r")


@pytest.mark.parametrize("more", [{"mode": "a"}, {"mode": "r", "exists": "maybe"}])
def test_words_that_do_not_exist_are_refused(more: Any) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        open_objects("s3://bucket", **more)
