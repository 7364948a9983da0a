"""What each rank keeps of a sequence: layers divided among pipeline stages, heads among tensor-parallel ranks.

Every size is that of a stage's rank; the ranks of a stage keep equally much. It knows layers and numbers of ranks, no
files and no way of printing.

References
----------
Which stage has which layers: vLLM, ``get_pp_indices`` in ``vllm/distributed/utils.py``. Layers that are left over go to
the last stages but one, from behind, one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._config import Model
from ._errors import KvbenchError
from ._layers import Cache, Format, Layer, Shared, StateEngine, bytes_of

__all__ = ["Asked", "Count", "Sizes", "Stage", "format_of", "sizes", "stages"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Over how many ranks, for how long a prompt, in pages of how many tokens.

    Attributes
    ----------
    tp, pp : int
    isl : int, tokens
        Input sequence length.
    page_size : int, tokens
    partition : tuple of int or None
        Layers of each stage; None: as vLLM divides them.
    """

    tp: int = 1
    pp: int = 1
    isl: int = 1024
    page_size: int = 16
    partition: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers from `first` up to, not including, `end`, of a pipeline."""

    first: int
    end: int
    layers: tuple[Layer, ...]

    @property
    def caches(self) -> list[Cache]:
        """Of all its layers."""
        return [cache for layer in self.layers for cache in layer]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on one rank, on all, or of one copy.

    Attributes
    ----------
    bytes_per_token : int, bytes
        That one more token adds while no window is full.
    bytes_per_token_past_windows : int, bytes
        The same once windows are full, whose layers then give up as much as they add.
    bytes_per_block : int, bytes
        Of a page of tokens, in all layers that keep tokens.
    bytes_of_state : int, bytes
        That a sequence takes however long it is.
    bytes_total : int, bytes
        Of the prompt: the pages that each layer keeps, the last one whole, and the state.
    """

    bytes_per_token: int
    bytes_per_token_past_windows: int
    bytes_per_block: int
    bytes_of_state: int
    bytes_total: int

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def times(self, count: int) -> Sizes:
        """Of so many ranks that keep equally much."""
        return Sizes(*(value * count for value in self.values()))

    def values(self) -> tuple[int, ...]:
        """In the order of its attributes."""
        return tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Count:
    """Of a whole model.

    Attributes
    ----------
    stages : tuple of (Stage, Sizes)
        Each with what one of its ranks keeps.
    rank : Sizes
        The most that any rank keeps, of each size.
    all : Sizes
        What all ranks keep together, copies included.
    distinct : Sizes
        What there is without copies: on one rank that has all layers and all heads.
    """

    stages: tuple[tuple[Stage, Sizes], ...]
    rank: Sizes
    all: Sizes
    distinct: Sizes


def format_of(
    model: Model, *, kv_dtype: str = "auto", states: StateEngine = "vllm", ignore_windows: bool = False
) -> Format:
    """In what an engine keeps the cache of `model`.

    Parameters
    ----------
    model : Model
    kv_dtype : str
        Of keys, values and latents; ``auto`` is that of the weights.
    states : {"vllm", "transformers"}
        Whose layout states have. transformers keeps one more column of a convolution's state than the next token needs,
        and the other state in float32; vLLM keeps that in the dtype that the configuration names, or the weights'.
    ignore_windows : bool

    Raises
    ------
    KvbenchError
        A dtype is needed that is not said.
    """
    chosen = model.dtype if kv_dtype == "auto" else kv_dtype
    if chosen is None:
        raise KvbenchError(f"{model.source} names no dtype of a cache; say which, such as --kv-dtype bfloat16")
    bytes_of(chosen)
    conv = model.dtype or chosen
    carried = "float32" if states == "transformers" else model.state_dtype or conv
    return Format(chosen, conv, carried, 1 if states == "transformers" else 0, ignore_windows)


def stages(model: Model, pp: int, partition: Sequence[int] | None = None) -> list[Stage]:
    """Divide the layers among `pp` stages.

    Raises
    ------
    KvbenchError
        There are fewer layers than stages, the partition is of another number of either, or a layer shares the cache of
        one in another stage.
    """
    count = len(model.layers)
    if partition is None:
        each, left = divmod(count, pp)
        partition = [each + (pp - 1 - left <= number < pp - 1) for number in range(pp)]
    if len(partition) != pp or sum(partition) != count or min(partition) < 1:
        raise KvbenchError(f"{count} layers cannot be divided among {pp} stages as {list(partition)}")
    found, first = [], 0
    for size in partition:
        found.append(Stage(first, first + size, model.layers[first : first + size]))
        first += size
    for stage in found:
        for cache in stage.caches:
            if isinstance(cache, Shared) and cache.source < stage.first:
                raise KvbenchError(
                    f"layers {stage.first} to {stage.end - 1} are one stage, and one of them shares the cache of layer "
                    f"{cache.source}, which is in another; take fewer stages, or another --partition"
                )
    return found


def sizes(model: Model, form: Format, asked: Asked) -> Count:
    """What `model` keeps of a prompt.

    Raises
    ------
    KvbenchError
        It cannot be divided as asked.
    """
    divided = stages(model, asked.pp, asked.partition)
    each = [(stage, _of_stage(stage, form, asked, asked.tp)) for stage in divided]
    ranks = [of_one for _, of_one in each]
    most = Sizes(*(max(values) for values in zip(*(of_one.values() for of_one in ranks), strict=True)))
    together = sum((of_one.times(asked.tp) for of_one in ranks), Sizes(0, 0, 0, 0, 0))
    whole = Stage(0, len(model.layers), model.layers)
    return Count(tuple(each), most, together, _of_stage(whole, form, asked, 1))


def _of_stage(stage: Stage, form: Format, asked: Asked, tp: int) -> Sizes:
    token = past = state = total = 0
    page, endless = asked.page_size, 1 << 40
    for cache in stage.caches:
        of_token, of_state = cache.token_bytes(tp, form), cache.state_bytes(tp, form)
        grows = cache.pages(endless + 1, 1, form) - cache.pages(endless, 1, form)
        token += of_token
        past += of_token * grows
        state += of_state
        total += cache.pages(asked.isl, page, form) * page * of_token + of_state
    return Sizes(token, past, token * page, state, total)
