"""`asyncxfer kvbench kvcache` counts what torch and transformers allocate, for a small configuration of each family.

In a file of its own and late in the alphabet: once torch is imported, every later garbage collection is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asyncxfer.kvbench._config import read
from asyncxfer.kvbench._layers import Cache, Format, FullAttention, Latent, SlidingWindow, StateSpace
from asyncxfer.kvbench._shipped import load, names
from asyncxfer.kvbench._sizes import Asked, format_of, sizes

TOKENS = 11
BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 4,
    "mamba_chunk_size": 4,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "shared_expert_intermediate_size": 8,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": None, **EXPERTS},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"sliding_window": 5, **EXPERTS},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "num_hidden_layers": 7},
    "cohere2": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 2, "sliding_window": 5, "intermediate_size": [48] * 5,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4, "laurel_rank": 2,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "glm4_moe_lite": MLA,
    "mamba": {"num_hidden_layers": 2, "state_size": 6, "conv_kernel": 4},
    "mamba2": {
        "num_hidden_layers": 2, "state_size": 6, "num_heads": 8, "n_groups": 2, "chunk_size": 4, "conv_kernel": 4,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 4,
        "mamba_d_conv": 4, "mamba_expand": 2,
        "use_mamba_kernels": False, **EXPERTS,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "mamba"], "shared_intermediate_size": 8, **MAMBA2, **EXPERTS,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA2},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "chunk_size": 4,
        "conv_kernel": 4,
        "hybrid_override_pattern": "M*-M", "use_mamba_kernels": False,
    },
    "qwen3_next": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA,
    "lfm2": {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed; pip install torch")


@pytest.mark.leaks("threads", "maps", "fds", reason="torch keeps its threads and what they map")
@pytest.mark.filterwarnings("ignore")  # what transformers has to say of itself
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_transformers_fills(torch: Any, family: str) -> None:
    """A prompt goes through a model of random weights, and the tensors of the cache that it leaves are counted."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers")
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    given = {**BASE, **FAMILIES[family]}
    config = transformers.CONFIG_MAPPING[family](**given)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        answer = model(torch.arange(1, TOKENS + 1)[None], use_cache=True)
    cache = answer.get("past_key_values") or answer["cache_params"]
    allocated = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer))
    for entries in (
        config.to_dict(),
        {**given, "model_type": family},
    ):  # as written out in full, and as in a repository
        read_again = read({**entries, "dtype": "bfloat16"}, name=family, source="the configuration")
        form = format_of(read_again, states="transformers")
        counted = sizes(read_again, form, Asked(isl=TOKENS, page_size=1)).rank.bytes_total
        assert counted == allocated > 0, read_again.layers


def tensors_of(layer: Any) -> Iterator[Any]:
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        yield from (tensor for tensor in (held.values() if isinstance(held, dict) else [held]) if tensor is not None)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("name", names())
def test_pages_that_torch_allocates(torch: Any, name: str, kv_dtype: str) -> None:
    """The tensors of each layer as vLLM shapes them, of every model that comes with the package, on each rank."""
    model, asked = load(name), Asked(tp=2, pp=3, isl=1000, page_size=16)
    form = format_of(model, kv_dtype=kv_dtype)
    counted = sizes(model, form, asked)
    for stage, of_one in counted.stages:
        tensors = [tensor for cache in stage.caches for tensor in paged(torch, cache, form, asked)]
        assert sum(tensor.nbytes for tensor in tensors) == of_one.bytes_total


def paged(torch: Any, cache: Cache, form: Format, asked: Asked) -> Iterator[Any]:
    """Allocate what one layer keeps on a rank, without touching the memory."""
    pages, dtype = -(-asked.isl // asked.page_size), getattr(torch, form.kv_dtype)
    if isinstance(cache, Latent):
        yield torch.empty(pages, asked.page_size, cache.rank + cache.rope_dim, dtype=dtype)
    elif isinstance(cache, FullAttention):
        if isinstance(cache, SlidingWindow):  # the pages with one of the last window - 1 tokens
            pages = len({token // asked.page_size for token in range(asked.isl)[-cache.window + 1 :]})
        heads = max(1, cache.kv_heads // asked.tp)
        yield torch.empty(2, pages, asked.page_size, heads, cache.head_dim, dtype=dtype)


def test_states_that_torch_allocates(torch: Any) -> None:
    """The shapes of vLLM: (columns, channels) and (heads, head, state), a half of each on one of two ranks."""
    entries = {**BASE, **MAMBA2, "model_type": "falcon_h1", "torch_dtype": "bfloat16"}
    model = read(entries, name="tiny", source="the configuration")
    form, space = format_of(model), model.layers[0][1]
    assert isinstance(space, StateSpace)
    conv = torch.empty(4 - 1, (8 * 8 + 2 * 2 * 6) // 2, dtype=torch.bfloat16)
    carried = torch.empty(8 // 2, 8, 6, dtype=torch.bfloat16)
    assert space.state_bytes(2, form) == conv.nbytes + carried.nbytes
