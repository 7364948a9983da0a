"""A trace of requests: when each came, how long it was, and which blocks its prompt has.

Traces are lines of JSON as Mooncake publishes them: ``timestamp`` in milliseconds, ``input_length`` and
``output_length`` in tokens, and ``hash_ids``, one for each block of the prompt, equal where prompts are the same up to
the end of that block.

References
----------
Mooncake, ``FAST25-release/traces``, https://github.com/kvcache-ai/Mooncake; its blocks have 512 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ._errors import KvbenchError

__all__ = ["Request", "read", "reusable"]

_MOST_LINE_BYTES = 16 << 20


class Request(msgspec.Struct, frozen=True):
    """One request.

    Attributes
    ----------
    timestamp : float, milliseconds
    input_length, output_length : int, tokens
    hash_ids : list of int
        One for each block of the prompt, the last of which may be shorter.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read(path: Path, *, block_tokens: int, most: int | None = None) -> list[Request]:
    """Read the trace at `path`, in the order in which requests came.

    Parameters
    ----------
    path : Path
    block_tokens : int
        Of a block.
    most : int or None
        Of the requests; None: all.

    Raises
    ------
    KvbenchError
        It cannot be read, or a line is no request.
    """
    decoder = msgspec.json.Decoder(Request)
    found: list[Request] = []
    number = 0
    try:
        with path.open("rb") as lines:
            while len(found) != most and (line := lines.readline(_MOST_LINE_BYTES)):
                number += 1
                if line.strip():
                    found.append(_checked(decoder.decode(line), block_tokens))
    except OSError as error:
        raise KvbenchError(f"{path} cannot be read: {error}") from error
    except (ValueError, KvbenchError) as error:
        raise KvbenchError(f"{path}, line {number}: {error}") from error
    if not found:
        raise KvbenchError(f"{path} has no requests")
    return sorted(found, key=lambda request: request.timestamp)


def _checked(request: Request, block_tokens: int) -> Request:
    blocks = -(-request.input_length // block_tokens)
    if request.input_length < 1 or len(request.hash_ids) != blocks:
        told = f"{len(request.hash_ids)} hash_ids for {request.input_length} tokens"
        raise KvbenchError(f"{told}, which are {blocks} blocks of {block_tokens}")
    if any(not 0 <= number < 2**63 for number in request.hash_ids):
        raise KvbenchError("a hash_id is no number of at least 0")
    return request


def reusable(requests: Sequence[Request]) -> int:
    """Blocks of prefixes that earlier requests had: the hits of a store that keeps everything."""
    seen: set[int] = set()
    hits = 0
    for request in requests:
        known = [number in seen for number in request.hash_ids]
        hits += known.index(False) if False in known else len(known)
        seen.update(request.hash_ids)
    return hits
