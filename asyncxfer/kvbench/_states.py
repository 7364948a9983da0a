"""Families with state spaces, by themselves or between layers that attend: which layer has what.

Entries that nobody reads say how a state is computed here, not what is kept of it. It computes no sizes.

References
----------
The configuration classes and models of transformers, ``src/transformers/models/``, and vLLM's for the shapes of states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._attention import Notes, attention
from ._errors import KvbenchError
from ._fields import Fields
from ._layers import Layer, StateSpace

__all__ = ["bamba", "falcon_h1", "granite", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h", "qwen3_next"]


def mamba(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Mamba: each channel carries a state of its own."""
    expanded = fields.number_or("expand", 2) * fields.number("hidden_size")
    inner = fields.number_or("intermediate_size", expanded)
    state = fields.number("state_size")
    return [(StateSpace(fields.number("conv_kernel"), inner, heads=inner, head_state=state),)] * fields.layers()


def mamba2(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Mamba 2: heads carry states, and groups of them share inputs."""
    space = _mamba2_space(fields, "num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
    return [(space,)] * fields.layers()


def _mamba2_space(fields: Fields, heads: str, head_dim: str, groups: str, state: str, kernel: str) -> StateSpace:
    """The state space that the entries of these names describe."""
    count, size, states = fields.number(heads), fields.number(head_dim), fields.number(state)
    return StateSpace(
        fields.number(kernel),
        channels=count * size,
        groups=fields.number(groups),
        group_channels=2 * states,
        heads=count,
        head_state=size * states,
    )


def _prefixed_space(fields: Fields) -> StateSpace:
    """Mamba 2 as Bamba, Granite 4 and Falcon H1 name its entries."""
    if fields.get("mamba_d_head") == "auto":
        raise KvbenchError(f"mamba_d_head is 'auto' in {fields.place}; write the number out")
    return _mamba2_space(fields, "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")


def jamba(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Jamba: Mamba, and attention at each period of layers."""
    count, attending = fields.layers(), attention(fields, family, notes)
    period, offset = fields.number("attn_layer_period"), fields.number("attn_layer_offset", least=0)
    inner = fields.number("mamba_expand") * fields.number("hidden_size")
    space = StateSpace(fields.number("mamba_d_conv"), inner, heads=inner, head_state=fields.number("mamba_d_state"))
    return [(attending,) if number % period == offset else (space,) for number in range(count)]


def bamba(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Bamba: Mamba 2, and attention in the layers that are listed."""
    numbers = fields.get("attn_layer_indices") or []
    attending, space = attention(fields, family, notes), _prefixed_space(fields)
    count = fields.layers()
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise KvbenchError(f"attn_layer_indices in {fields.place} is not a list of numbers of layers")
    return [(attending,) if number in numbers else (space,) for number in range(count)]


def granite(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Granite 4: Mamba 2 and attention, as `layer_types` says."""
    attending: Layer = (attention(fields, family, notes),)
    types = fields.words("layer_types", fields.layers())
    if types is None:
        raise fields.missing("layer_types")
    kinds = {"attention": attending, "full_attention": attending}
    if {"mamba", "linear_attention"} & set(types):
        kinds |= dict.fromkeys(("mamba", "linear_attention"), (_prefixed_space(fields),))
    return _by_word(types, kinds, fields)


def falcon_h1(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Falcon H1: both in each layer."""
    notes.append("each layer has attention and a state space side by side")
    layer: Layer = (attention(fields, family, notes), _prefixed_space(fields))
    return [layer] * fields.layers()


def nemotron_h(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Nemotron-H: Mamba 2, attention, and layers that are an MLP or experts by themselves."""
    pattern = fields.get("hybrid_override_pattern")
    types = fields.get("layers_block_type") if pattern is None else list(str(pattern))
    if not isinstance(types, list) or not types:
        raise KvbenchError(f"{fields.place} has neither hybrid_override_pattern nor layers_block_type")
    if fields.get("num_hidden_layers") not in (None, len(types)):
        raise KvbenchError(f"{fields.place} names {len(types)} layers, and num_hidden_layers is another number")
    attending: Layer = (attention(fields, family, notes),)
    space: Layer = (
        _mamba2_space(fields, "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    )
    kinds: dict[str, Layer] = dict.fromkeys(("M", "mamba", "linear_attention"), space)
    kinds |= dict.fromkeys(("*", "attention", "full_attention"), attending)
    kinds |= dict.fromkeys(("-", "E", "mlp", "moe"), ())
    notes.append("layers that are an MLP or experts keep nothing")
    return _by_word(types, kinds, fields)


def qwen3_next(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Qwen3-Next and 3.5: gated delta networks, and attention in each n-th layer."""
    count, attending = fields.layers(), attention(fields, family, notes)
    types = fields.words("layer_types", count)
    if types is None:
        each = fields.number("full_attention_interval")
        types = ["linear_attention" if (number + 1) % each else "full_attention" for number in range(count)]
    key_heads, key_dim = fields.number("linear_num_key_heads"), fields.number("linear_key_head_dim")
    heads, dim = fields.number("linear_num_value_heads"), fields.number("linear_value_head_dim")
    delta = StateSpace(
        fields.number("linear_conv_kernel_dim"),
        channels=heads * dim,
        groups=key_heads,
        group_channels=2 * key_dim,
        heads=heads,
        head_state=key_dim * dim,
    )
    return _by_word(types, {"linear_attention": (delta,), "full_attention": (attending,)}, fields)


def lfm2(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """LFM2: short convolutions, which carry nothing on but their last inputs, and attention."""
    count, attending = fields.layers(), attention(fields, family, notes)
    types = fields.words("layer_types", count)
    if types is None:
        numbers = fields.get("full_attn_idxs")
        if not isinstance(numbers, list):
            raise KvbenchError(f"{fields.place} has neither layer_types nor full_attn_idxs")
        types = ["full_attention" if number in numbers else "conv" for number in range(count)]
    short = StateSpace(fields.number("conv_L_cache"), fields.number("hidden_size"))
    return _by_word(types, {"conv": (short,), "full_attention": (attending,)}, fields)


def _by_word(words: Sequence[object], kinds: Mapping[str, Layer], fields: Fields) -> list[Layer]:
    for word in words:
        if not isinstance(word, str) or word not in kinds:
            raise KvbenchError(f"{fields.place} has a layer {word!r}, which is not understood here")
    return [kinds[str(word)] for word in words]
