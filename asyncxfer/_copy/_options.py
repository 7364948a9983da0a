"""Options of the clients of stores as they come from the command line, and what of them must not be printed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping

__all__ = ["collect", "hide", "read_option", "read_size"]

_SECRET = re.compile(r"secret|token|key|password|credential|connection_string|sas", re.IGNORECASE)
_WORDS = {"true": True, "false": False}
_SIZE = re.compile(r"(\d+)\s*(|[KMGT]i?B?|B)", re.IGNORECASE)


def read_option(text: str) -> tuple[str, object]:
    """Read ``NAME=VALUE``; the text is not repeated in an error."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError("expected NAME=VALUE, such as endpoint_url=http://127.0.0.1:8333")
    return name, _WORDS.get(value.lower(), value)


def collect(*given: Iterable[tuple[str, object]]) -> Mapping[str, object]:
    """Put options together; the later of one name counts."""
    return {name: value for some in given for name, value in some}


def hide(text: str, options: Mapping[str, object]) -> str:
    """Take out of a message what is the value of a secret option."""
    for name, value in options.items():
        if _SECRET.search(name) and isinstance(value, str) and value:
            text = text.replace(value, "***")
    return text


def read_size(text: str) -> int:
    """Read a number of bytes, such as ``256MiB``; K, M, G and T are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 256MiB")
    return int(found[1]) << 10 * " KMGT".index((found[2][:1].upper() or " ").replace("B", " "))
