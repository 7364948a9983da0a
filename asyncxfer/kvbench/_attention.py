"""Families whose layers attend: which cache each layer has, full, with a window, shared with another, or a latent.

A family that is not known is read as plain attention, which is noted, and refused where it has an entry that shapes a
cache and that nobody here has read. It computes no sizes.

References
----------
The configuration classes of transformers, ``src/transformers/models/*/configuration_*.py``, for what an entry means and
what one that is not given means; vLLM's model of Hunyuan for layers that share a cache with their neighbour.
"""

from __future__ import annotations

from ._errors import KvbenchError
from ._fields import Fields
from ._layers import FullAttention, Latent, Layer, Shared, SlidingWindow

__all__ = ["Notes", "attention", "gemma3n", "latent", "plain"]

Notes = list[str]

#: Families whose class takes other heads, or other sizes of heads, where they are not given than MHA and the quotient.
_OWN_KV_HEADS = frozenset({
    "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gpt_oss", "glm", "glm4", "glm4_moe", "starcoder2", "stablelm", "smollm3", "seed_oss",
    "ernie4_5", "phimoe", "exaone4", "jamba", "bamba", "falcon_h1", "nemotron_h", "qwen3_next", "qwen3_5_text",
    "qwen3_5_moe_text", "lfm2",
})  # fmt: skip
_OWN_HEAD_DIM = frozenset({
    "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "glm", "glm4", "seed_oss", "ernie4_5",
    "nemotron_h", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
})  # fmt: skip
#: Families whose class has a window where none is given.
_OWN_WINDOW = frozenset({
    "mistral", "gemma2", "gemma3_text", "gemma3n_text", "cohere2", "gpt_oss", "olmo3", "exaone4",
})  # fmt: skip
#: Families in which a window is of every layer, and those in which all but each n-th layer has it.
_WINDOW_EVERYWHERE = frozenset({"mistral", "mixtral", "phi3", "starcoder2", "phimoe", "ministral"})
_WINDOW_BUT_EACH = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "olmo3": 4, "gemma3_text": 6}
_WINDOW_IS_SWITCHED_ON = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
_WINDOW_RULES = ("use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern")
_PLAIN = frozenset({
    "llama", "cohere", "olmo", "olmo2", "granite", "granitemoe", "arcee", "nemotron", "hunyuan",
})  # fmt: skip


def attention(fields: Fields, family: str, notes: Notes) -> FullAttention:
    """What a layer that attends to everything keeps."""
    heads = fields.number("num_attention_heads")
    if family in _OWN_KV_HEADS:
        kv_heads = fields.number("num_key_value_heads")
    else:
        kv_heads = fields.number_or("num_key_value_heads", heads)
    if kv_heads > heads or heads % kv_heads:
        raise KvbenchError(f"{heads} heads cannot share {kv_heads} KV heads equally, in {fields.place}")
    kind = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
    notes.append(f"{kind}: num_attention_heads {heads}, num_key_value_heads {kv_heads}")
    return FullAttention(kv_heads, _head_dim(fields, family, heads, notes))


def _head_dim(fields: Fields, family: str, heads: int, notes: Notes) -> int:
    other = "attention_head_dim"  # as Hunyuan and early Nemotron-H call it
    if fields.get("head_dim") is None and fields.get(other) is not None:
        return fields.number(other)
    if fields.get("head_dim") is None and family not in _OWN_HEAD_DIM:
        hidden = fields.number("hidden_size")
        if hidden % heads:
            raise KvbenchError(f"{fields.place} has no head_dim, and {heads} heads do not divide hidden_size {hidden}")
        notes.append(f"head_dim: hidden_size {hidden} / num_attention_heads {heads} = {hidden // heads}")
        return hidden // heads
    return fields.number("head_dim")


def _attention_layers(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    count, full = fields.layers(), attention(fields, family, notes)
    windowed = _windowed(fields, family, count)
    if not any(windowed):
        return [(full,)] * count
    sliding = SlidingWindow(full.kv_heads, full.head_dim, fields.number("sliding_window"))
    return [(sliding if has_window else full,) for has_window in windowed]


def _windowed(fields: Fields, family: str, count: int) -> list[bool]:
    """Tell of each layer whether it has a window."""
    types = fields.words("layer_types", count)
    if types is not None:
        for name in (*_WINDOW_RULES, "sliding_window"):
            fields.get(name)  # the list of layers comes before any rule
        for word in types:
            if word not in ("full_attention", "attention", "sliding_attention"):
                raise KvbenchError(f"layer_types of {fields.place} has {word!r}, which is not understood here")
        return [word == "sliding_attention" for word in types]
    if family in _OWN_WINDOW and not fields.has("sliding_window"):
        raise fields.missing("sliding_window")
    switch = fields.get("use_sliding_window")
    if not fields.get("sliding_window") or switch is False or (switch is None and family in _WINDOW_IS_SWITCHED_ON):
        for name in _WINDOW_RULES:
            fields.get(name)
        return [False] * count
    return _windowed_by_rule(fields, family, count)


def _windowed_by_rule(fields: Fields, family: str, count: int) -> list[bool]:
    """The same where there is a window, by what the family's class does."""
    if family in _WINDOW_EVERYWHERE:
        return [True] * count
    if family in ("qwen2", "qwen3"):
        first = fields.number("max_window_layers", least=0)
        return [number >= first for number in range(count)]
    if family in _WINDOW_BUT_EACH:
        given = fields.number_or("_sliding_window_pattern", _WINDOW_BUT_EACH[family])
        each = fields.number_or("sliding_window_pattern", given)
        return [(number + 1) % each != 0 for number in range(count)]
    raise KvbenchError(f"{fields.place} has a sliding_window, and no layer_types say which layers have it")


def plain(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Layers that attend, of a family that has nothing special, or that is not known."""
    known = _PLAIN | _OWN_KV_HEADS | _WINDOW_EVERYWHERE | _WINDOW_BUT_EACH.keys()
    if family not in known:
        notes.append(f"model_type {family!r} is not known: read as plain attention, since nothing in it says otherwise")
    layers = _attention_layers(fields, family, notes)
    if fields.get("use_cla"):
        factor = fields.number("cla_share_factor")
        notes.append(f"use_cla: {factor} neighbouring layers share the cache of the first")
        layers = [(Shared(number - number % factor),) if number % factor else own for number, own in enumerate(layers)]
    elif fields.get("cla_share_factor") is not None:
        notes.append("cla_share_factor counts for nothing without use_cla")
    return layers


def gemma3n(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """The last layers read the cache of the last layer of their kind that has one of its own."""
    layers = _attention_layers(fields, family, notes)
    shared = fields.number_or("num_kv_shared_layers", 0, least=0)
    own = len(layers) - shared
    if own < 1:
        raise KvbenchError(f"num_kv_shared_layers is {shared} in {fields.place}, which has {len(layers)} layers")
    notes.append(f"num_kv_shared_layers: from layer {own} on, the last earlier layer of the same kind is read")
    sources = {layer: number for number, layer in enumerate(layers[:own])}
    for layer in layers[own:]:
        if layer not in sources:
            raise KvbenchError(f"{fields.place}: a layer shares a cache with {layer[0].name}, which none before has")
    return [*layers[:own], *((Shared(sources[layer]),) for layer in layers[own:])]


def latent(fields: Fields, family: str, notes: Notes) -> list[Layer]:
    """Layers of DeepSeek V2 and V3, and of those built alike: MLA."""
    count = fields.layers()
    kept = Latent(fields.number("kv_lora_rank"), fields.number("qk_rope_head_dim"))
    for name in ("qk_nope_head_dim", "qk_head_dim", "v_head_dim"):
        fields.get(name)  # of what is computed from the latent, which is not kept
    notes.append("MLA: the latent is kept, not the keys and values that heads make of it; every rank has all of it")
    if fields.get("num_nextn_predict_layers"):
        notes.append("num_nextn_predict_layers: a layer for speculative decoding would keep a cache too; not counted")
    return [(kept,)] * count
