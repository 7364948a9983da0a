"""XML as object stores speak it: small, in UTF-8, without a document type. What comes in is not trusted."""

from __future__ import annotations

from xml.etree import ElementTree as ET

__all__ = ["Node", "Unreadable", "parse"]

_BYTES = 8 << 20


class Unreadable(Exception):  # noqa: N818 - whoever knows whose answer it is makes an error of it
    """What came is not such XML."""


class Node:
    """An element, its children found by name whatever their name space."""

    __slots__ = ("_element",)

    def __init__(self, element: ET.Element) -> None:
        self._element = element

    @property
    def name(self) -> str:
        """Without its name space."""
        return self._element.tag.rpartition("}")[2]

    def all(self, name: str) -> list[Node]:
        """Give the children of this name."""
        return [node for node in map(Node, self._element) if node.name == name]

    def text(self, *path: str) -> str:
        """Give the text of the first child of this name, or of its child of the next; empty where there is none."""
        element: Node | None = self
        for name in path:
            element = next(iter(element.all(name)), None) if element is not None else None
        return (element._element.text or "") if element is not None else ""

    def attribute(self, name: str) -> str:
        """Give the value of an attribute; empty where there is none."""
        return self._element.get(name, "")


def parse(body: bytes) -> Node:
    """Give the root.

    Raises
    ------
    Unreadable
        It is longer than 8 MiB, or not XML, or has a document type: entities, that is.
    """
    if len(body) > _BYTES:
        raise Unreadable(f"XML of {len(body)} bytes; expected {_BYTES} at most")
    try:
        text = body.decode()
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise Unreadable("XML with a document type")
        return Node(ET.fromstring(text))  # noqa: S314 - entities are refused above
    except (UnicodeDecodeError, ET.ParseError, ValueError) as error:
        raise Unreadable(f"no XML: {error}") from None
