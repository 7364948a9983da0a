"""What one layer keeps for a sequence: the arithmetic of each kind of cache, and how it is written out.

A layer has one cache, several (attention beside a state space) or none (an MLP of its own). Nothing here knows a
configuration file, or which rank a layer is on; only how many ranks a layer is divided among.

References
----------
How engines divide and page caches: vLLM, ``vllm/v1/kv_cache_interface.py`` (bytes of a page),
``vllm/v1/core/single_type_kv_cache_manager.py`` (pages behind a window are given up),
``vllm/model_executor/layers/mamba/mamba_utils.py`` (shapes of states, and their division).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ._errors import KvbenchError

__all__ = [
    "DTYPES",
    "Cache",
    "Format",
    "FullAttention",
    "Latent",
    "Layer",
    "Shared",
    "SlidingWindow",
    "StateEngine",
    "StateSpace",
    "bytes_of",
]

#: Bytes of an element. ``fp8`` is what engines call either kind.
DTYPES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8_e4m3": 1,
    "fp8_e5m2": 1, "int8": 1,
}  # fmt: skip

StateEngine = Literal["vllm", "transformers"]


def bytes_of(dtype: str) -> int:
    """Bytes of one element.

    Raises
    ------
    KvbenchError
        It is not known, or its elements share their bytes with scales.
    """
    try:
        return DTYPES[dtype]
    except KeyError:
        raise KvbenchError(f"dtype {dtype!r} is not known; expected one of {', '.join(DTYPES)}") from None


@dataclass(frozen=True, slots=True)
class Format:
    """In what the elements of a cache are kept.

    Attributes
    ----------
    kv_dtype : str
        Of keys, values and latents.
    conv_dtype, state_dtype : str
        Of the two states of a state space: the last inputs of its convolution, and what it carries on.
    spare_columns : int
        Columns of the convolution's state that are kept besides those that the next token needs.
    ignore_windows : bool
        Layers with a window keep all tokens, as in an engine that has one allocator for all layers.
    """

    kv_dtype: str
    conv_dtype: str
    state_dtype: str
    spare_columns: int = 0
    ignore_windows: bool = False


def _heads_on_rank(heads: int, tp: int, what: str) -> int:
    """Heads that a rank has: an equal part or, where there are fewer heads than ranks, a copy of one."""
    if heads % tp == 0:
        return heads // tp
    if heads < tp and tp % heads == 0:
        return 1
    raise KvbenchError(f"{heads} {what} cannot be divided among {tp} ranks, nor copied to equally many of them")


def _whole(count: int, tp: int, what: str) -> int:
    if count % tp:
        raise KvbenchError(f"{count} {what} cannot be divided among {tp} ranks")
    return count // tp


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Keys and values of all tokens: MHA, GQA and MQA, by the number of heads."""

    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """As people call it."""
        return "full attention"

    def token_bytes(self, tp: int, form: Format) -> int:
        """Bytes of one token on one of `tp` ranks."""
        return 2 * _heads_on_rank(self.kv_heads, tp, "KV heads") * self.head_dim * bytes_of(form.kv_dtype)

    def pages(self, tokens: int, page_size: int, form: Format) -> int:
        """Pages that are kept after so many tokens."""
        return _pages(tokens, page_size)

    def state_bytes(self, tp: int, form: Format) -> int:
        """Bytes that do not grow with the tokens."""
        return 0

    def derive(self, tp: int, form: Format) -> str:
        """Bytes of a token, written out."""
        heads = _heads_on_rank(self.kv_heads, tp, "KV heads")
        shared = "" if tp == 1 else f" of {self.kv_heads}"
        return (
            f"2 (K, V) x {heads}{shared} KV heads x {self.head_dim} x {bytes_of(form.kv_dtype)} B ({form.kv_dtype}) = "
            f"{self.token_bytes(tp, form):,} B a token"
        )


@dataclass(frozen=True, slots=True)
class SlidingWindow(FullAttention):
    """Keys and values of the tokens that the next one still attends to: `window` - 1, and itself."""

    window: int

    @property
    def name(self) -> str:
        """As people call it."""
        return f"sliding window of {self.window:,}"

    def pages(self, tokens: int, page_size: int, form: Format) -> int:
        """Pages that are kept after so many tokens: those before the window are given up when all of them is."""
        if form.ignore_windows:
            return _pages(tokens, page_size)
        return _pages(tokens, page_size) - max(0, tokens - self.window + 1) // page_size


@dataclass(frozen=True, slots=True)
class Latent:
    """The latent of MLA and the rotated part of the key, which all heads share: every rank has all of it."""

    rank: int
    rope_dim: int

    @property
    def name(self) -> str:
        """As people call it."""
        return "latent attention (MLA)"

    def token_bytes(self, tp: int, form: Format) -> int:
        """Bytes of one token on one rank, however many there are."""
        return (self.rank + self.rope_dim) * bytes_of(form.kv_dtype)

    def pages(self, tokens: int, page_size: int, form: Format) -> int:
        """Pages that are kept after so many tokens."""
        return _pages(tokens, page_size)

    def state_bytes(self, tp: int, form: Format) -> int:
        """Bytes that do not grow with the tokens."""
        return 0

    def derive(self, tp: int, form: Format) -> str:
        """Bytes of a token, written out."""
        copied = "" if tp == 1 else f", the same on each of {tp} ranks"
        return (
            f"({self.rank} latent + {self.rope_dim} rotated key) x {bytes_of(form.kv_dtype)} B ({form.kv_dtype}) = "
            f"{self.token_bytes(tp, form):,} B a token{copied}"
        )


@dataclass(frozen=True, slots=True)
class StateSpace:
    """States of one size however long the sequence is: Mamba, Mamba 2, gated delta networks, short convolutions.

    Attributes
    ----------
    kernel : int
        Of the causal convolution, which looks back `kernel` - 1 tokens.
    channels : int
        That the convolution runs over and ranks divide among them.
    groups, group_channels : int
        Further channels, in groups that several heads share; a group is divided among ranks as a head is.
    heads, head_state : int
        Of the state that is carried on, and its elements a head; none of a plain convolution.
    """

    kernel: int
    channels: int
    groups: int = 0
    group_channels: int = 0
    heads: int = 0
    head_state: int = 0

    @property
    def name(self) -> str:
        """As people call it."""
        return "state space" if self.heads else "short convolution"

    def _on_rank(self, tp: int) -> tuple[int, int]:
        groups = 0
        if self.groups:
            one_for_all = self.groups == 1
            groups = 1 if one_for_all else _whole(self.groups, tp, "groups of the state space")
        channels = _whole(self.channels, tp, "channels of the convolution") + groups * self.group_channels
        return channels, _whole(self.heads, tp, "heads of the state space")

    def token_bytes(self, tp: int, form: Format) -> int:
        """Nothing: a token changes the state and leaves nothing behind."""
        return 0

    def pages(self, tokens: int, page_size: int, form: Format) -> int:
        """None, for the same reason."""
        return 0

    def state_bytes(self, tp: int, form: Format) -> int:
        """Bytes of both states on one of `tp` ranks."""
        channels, heads = self._on_rank(tp)
        columns = self.kernel - 1 + form.spare_columns
        return channels * columns * bytes_of(form.conv_dtype) + heads * self.head_state * bytes_of(form.state_dtype)

    def derive(self, tp: int, form: Format) -> str:
        """Bytes of a sequence, written out."""
        channels, heads = self._on_rank(tp)
        columns = self.kernel - 1 + form.spare_columns
        text = f"{channels:,} channels x {columns} columns x {bytes_of(form.conv_dtype)} B ({form.conv_dtype})"
        if heads:
            text += f" + {heads} heads x {self.head_state:,} x {bytes_of(form.state_dtype)} B ({form.state_dtype})"
        return f"{text} = {self.state_bytes(tp, form):,} B a sequence, however long"


@dataclass(frozen=True, slots=True)
class Shared:
    """The cache of an earlier layer, read once more: nothing of its own."""

    source: int

    @property
    def name(self) -> str:
        """As people call it."""
        return f"shares the cache of layer {self.source}"

    def token_bytes(self, tp: int, form: Format) -> int:
        """Nothing."""
        return 0

    def pages(self, tokens: int, page_size: int, form: Format) -> int:
        """None."""
        return 0

    def state_bytes(self, tp: int, form: Format) -> int:
        """Nothing."""
        return 0

    def derive(self, tp: int, form: Format) -> str:
        """That there is nothing to derive."""
        return "0 B"


Cache: TypeAlias = FullAttention | Latent | StateSpace | Shared
Layer: TypeAlias = tuple[Cache, ...]
