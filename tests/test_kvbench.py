"""`asyncxfer kvbench kvcache`: sizes are those of a derivation by hand, and nothing is guessed.

The numbers of each model are those of its config.json on Hugging Face, in the repository that is named. What a cache of
torch or transformers takes is compared in test_torch_kvbench.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncxfer.kvbench._config import Model, read
from asyncxfer.kvbench._errors import KvbenchError
from asyncxfer.kvbench._kvcache import Question, explain, to_json, to_text
from asyncxfer.kvbench._layers import FullAttention, Latent, Shared, SlidingWindow, StateSpace
from asyncxfer.kvbench._shipped import load, names
from asyncxfer.kvbench._sizes import Asked, Count, format_of, sizes, stages

K, V = 1, 1
BF16 = FP16 = 2
LLAMA = {
    "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 32, "mamba_d_conv": 4,
}  # fmt: skip


def kvbench(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncxfer", "kvbench", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def model_of(entries: dict[str, Any], **more: Any) -> Model:
    return read({**entries, **more}, name="tiny", source="a config.json")


def count(model: Model, kv_dtype: str = "auto", *, ignore_windows: bool = False, **asked: Any) -> Count:
    form = format_of(model, kv_dtype=kv_dtype, ignore_windows=ignore_windows)
    return sizes(model, form, Asked(**asked))


# ---- models that come with the package ------------------------------------------------------------------------------

# Bytes a token in all layers, in bfloat16: layers x (K + V) x KV heads x head_dim x 2.
PER_TOKEN = {
    # meta-llama/Llama-3.1-8B: num_hidden_layers 32, num_key_value_heads 8, hidden_size 4096 / num_attention_heads 32
    "llama-3.1-8b": 32 * (K + V) * 8 * (4096 // 32) * BF16,
    # meta-llama/Llama-3.1-70B: 80, 8, 8192 / 64
    "llama-3.1-70b": 80 * (K + V) * 8 * (8192 // 64) * BF16,
    # meta-llama/Llama-3.1-405B: 126, 8, 16384 / 128
    "llama-3.1-405b": 126 * (K + V) * 8 * (16384 // 128) * BF16,
    # deepseek-ai/DeepSeek-R1: num_hidden_layers 61, kv_lora_rank 512, qk_rope_head_dim 64
    "deepseek-r1": 61 * (512 + 64) * BF16,
    # Qwen/Qwen3-8B: 36, 8, head_dim 128; use_sliding_window false
    "qwen3-8b": 36 * (K + V) * 8 * 128 * BF16,
    # Qwen/Qwen3-235B-A22B: 94, 4, head_dim 128; use_sliding_window false
    "qwen3-235b-a22b": 94 * (K + V) * 4 * 128 * BF16,
    # openai/gpt-oss-20b: 24, 8, head_dim 64
    "gpt-oss-20b": 24 * (K + V) * 8 * 64 * BF16,
    # openai/gpt-oss-120b: 36, 8, head_dim 64
    "gpt-oss-120b": 36 * (K + V) * 8 * 64 * BF16,
    # google/gemma-3-27b-it, text_config: 62, 16, head_dim 128
    "gemma-3-27b": 62 * (K + V) * 16 * 128 * BF16,
    # mistralai/Mixtral-8x7B-v0.1: 32, 8, 4096 / 32; sliding_window null
    "mixtral-8x7b": 32 * (K + V) * 8 * (4096 // 32) * BF16,
}
# The same as plain numbers, as they are known of these models.
KNOWN = {
    "llama-3.1-8b": 131_072, "llama-3.1-70b": 327_680, "llama-3.1-405b": 516_096, "deepseek-r1": 70_272,
    "qwen3-8b": 147_456, "qwen3-235b-a22b": 192_512, "gpt-oss-20b": 49_152, "gpt-oss-120b": 73_728,
    "gemma-3-27b": 507_904, "mixtral-8x7b": 131_072,
}  # fmt: skip


def test_every_model_that_is_shipped_is_derived_here() -> None:
    assert set(names()) == set(PER_TOKEN) == set(KNOWN)


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_bytes_of_a_token(name: str) -> None:
    found = count(load(name), isl=1000, page_size=16)
    assert found.rank.bytes_per_token == PER_TOKEN[name] == KNOWN[name]
    assert found.rank.bytes_per_block == PER_TOKEN[name] * 16
    assert found.rank == found.all == found.distinct


@pytest.mark.parametrize("name", sorted(set(PER_TOKEN) - {"gpt-oss-20b", "gpt-oss-120b", "gemma-3-27b"}))
def test_a_prompt_takes_whole_pages_in_every_layer(name: str) -> None:
    assert count(load(name), isl=1000, page_size=16).rank.bytes_total == 63 * 16 * PER_TOKEN[name]  # 62.5 pages


@pytest.mark.parametrize(("name", "layers"), [("gpt-oss-20b", 24), ("gpt-oss-120b", 36)])
def test_half_the_layers_of_gpt_oss_keep_their_window(name: str, layers: int) -> None:
    """sliding_window 128, layer_types sliding and full in turn, sliding first."""
    token = (K + V) * 8 * 64 * BF16  # of one layer
    exact = count(load(name), isl=8192, page_size=1)
    assert exact.rank.bytes_total == layers // 2 * token * (8192 + 127)  # the next token is the 128th of its window
    assert exact.rank.bytes_per_token_past_windows == layers // 2 * token
    # After 8,192 tokens the next window begins with token 8,065: the first 504 pages of 16 (8,064 tokens) are given up.
    paged = count(load(name), isl=8192, page_size=16)
    assert paged.rank.bytes_total == layers // 2 * token * 16 * (512 + 8)
    # A window that begins within a page keeps all of it: after 8,190 tokens at 8,063, in page 503 of 0 to 511.
    assert count(load(name), isl=8190, page_size=16).rank.bytes_total == layers // 2 * token * 16 * (512 + 9)
    whole = count(load(name), isl=8192, page_size=16, ignore_windows=True)
    assert whole.rank.bytes_total == 8192 * KNOWN[name]


def test_one_layer_in_six_of_gemma_attends_to_everything() -> None:
    """sliding_window 1024, and layers 6, 12, ..., 60 of 62 without."""
    model, token = load("gemma-3-27b"), (K + V) * 16 * 128 * BF16
    assert [number for number, layer in enumerate(model.layers) if not isinstance(layer[0], SlidingWindow)] == [
        5, 11, 17, 23, 29, 35, 41, 47, 53, 59,
    ]  # fmt: skip
    assert count(model, isl=32768, page_size=1).rank.bytes_total == token * (10 * 32768 + 52 * 1023)
    assert count(model, isl=500, page_size=1).rank.bytes_total == token * 62 * 500  # no window is full yet


def test_the_files_hold_what_matters_and_where_it_is_from() -> None:
    folder = Path(sys.modules["asyncxfer.kvbench"].__file__ or "").parent / "models"
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["_source"]["repository"].count("/") == 1
        assert len(path.read_text()) < 3000


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_tensor_parallel_ranks_divide_heads_and_copy_them_where_they_are_fewer() -> None:
    model = load("llama-3.1-70b")  # 8 KV heads
    eight, sixteen = count(model, tp=8), count(model, tp=16)
    assert eight.rank.bytes_per_token == 327_680 // 8
    assert eight.all == eight.distinct == count(model).rank
    assert sixteen.rank == eight.rank
    assert sixteen.all.bytes_total == 2 * sixteen.distinct.bytes_total
    assert count(load("qwen3-235b-a22b"), tp=8).rank.bytes_per_token == 192_512 // 4  # 4 KV heads, each twice
    with pytest.raises(KvbenchError, match="8 KV heads cannot be divided among 3 ranks"):
        count(model, tp=3)


def test_every_tensor_parallel_rank_has_the_latent() -> None:
    found = count(load("deepseek-r1"), tp=8, isl=1024)
    assert found.rank == found.distinct
    assert found.rank.bytes_total == 1024 * 70_272
    assert found.all.bytes_total == 8 * 1024 * 70_272


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [(32, 4, [8, 8, 8, 8]), (61, 2, [31, 30]), (61, 4, [15, 15, 16, 15]), (126, 8, [15, 16, 16, 16, 16, 16, 16, 15])],
)
def test_pipeline_stages_have_the_layers_that_vllm_gives_them(layers: int, pp: int, expected: list[int]) -> None:
    model = model_of(LLAMA, num_hidden_layers=layers)
    assert [len(stage.layers) for stage in stages(model, pp)] == expected
    assert [stage.end for stage in stages(model, pp)] == [sum(expected[: number + 1]) for number in range(pp)]


def test_the_largest_stage_counts_for_a_rank() -> None:
    found = count(load("deepseek-r1"), tp=4, pp=4, isl=100, page_size=64)
    per_layer = 576 * BF16
    assert [of_one.bytes_per_token for _, of_one in found.stages] == [15 * per_layer] * 2 + [
        16 * per_layer,
        15 * per_layer,
    ]
    assert found.rank.bytes_total == 16 * per_layer * 128
    assert found.all.bytes_total == 4 * 61 * per_layer * 128
    by_hand = count(load("deepseek-r1"), pp=2, partition=(60, 1), isl=100, page_size=64)
    assert by_hand.rank.bytes_total == 60 * per_layer * 128
    for partition in [(60, 2), (61,), (61, 0)]:
        with pytest.raises(KvbenchError, match="61 layers cannot be divided"):
            count(load("deepseek-r1"), pp=2, partition=partition)


def test_the_dtype_of_the_cache_is_not_that_of_the_weights() -> None:
    model = load("llama-3.1-8b")
    assert count(model, "fp8").rank.bytes_per_token == 131_072 // 2
    assert count(model, "float32").rank.bytes_per_token == 131_072 * 2
    with pytest.raises(KvbenchError, match="dtype 'nvfp4' is not known"):
        count(model, "nvfp4")
    unsaid = model_of({**LLAMA, "torch_dtype": None})
    assert count(unsaid, "float16").rank.bytes_per_token == 6 * 2 * 4 * 8 * FP16
    with pytest.raises(KvbenchError, match="say which, such as --kv-dtype"):
        count(unsaid)


# ---- families -------------------------------------------------------------------------------------------------------


def test_kinds_of_attention_are_told_apart() -> None:
    for kv_heads, kind in ((8, "MHA"), (4, "GQA"), (1, "MQA")):
        model = model_of(LLAMA, num_key_value_heads=kv_heads)
        assert model.layers == ((FullAttention(kv_heads, 8),),) * 6
        assert any(note.startswith(kind) for note in model.notes)
    assert model_of({**LLAMA, "num_key_value_heads": None}).layers == ((FullAttention(8, 8),),) * 6


def test_windows() -> None:
    wide, full = (SlidingWindow(4, 8, 512),), (FullAttention(4, 8),)
    window = {"sliding_window": 512}
    assert model_of(LLAMA, model_type="mistral", **window).layers == (wide,) * 6
    assert model_of(LLAMA, model_type="mistral", sliding_window=None).layers == (full,) * 6
    assert model_of(LLAMA, model_type="cohere2", **window).layers == (wide, wide, wide, full, wide, wide)
    assert model_of(LLAMA, model_type="gemma2", head_dim=8, **window).layers == (wide, full) * 3
    qwen = {**LLAMA, "model_type": "qwen2", "max_window_layers": 4, **window}
    assert model_of(qwen).layers == model_of(qwen, use_sliding_window=False).layers == (full,) * 6
    assert model_of(qwen, use_sliding_window=True).layers == (full,) * 4 + (wide,) * 2
    types = ["full_attention", "sliding_attention"] * 3
    assert model_of(LLAMA, model_type="of tomorrow", layer_types=types, **window).layers == (full, wide) * 3


def test_shared_caches_are_counted_once() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    gemma = {**LLAMA, "model_type": "gemma3n_text", "head_dim": 8, "layer_types": types, "sliding_window": 32}
    model = model_of(gemma, num_kv_shared_layers=3)
    assert model.layers[3:] == ((Shared(1),), (Shared(1),), (Shared(2),))
    assert count(model).rank.bytes_per_token == 3 * 2 * 4 * 8 * BF16
    with pytest.raises(KvbenchError, match="shares the cache of layer 1, which is in another"):
        count(model, pp=2)
    hunyuan = model_of(LLAMA, model_type="hunyuan", use_cla=True, cla_share_factor=2)
    assert [layer[0] for layer in hunyuan.layers] == [FullAttention(4, 8), Shared(0), FullAttention(4, 8), Shared(2),
                                                      FullAttention(4, 8), Shared(4)]  # fmt: skip
    assert model_of(LLAMA, model_type="hunyuan", attention_head_dim=16).layers == ((FullAttention(4, 16),),) * 6
    assert count(hunyuan, pp=3).rank.bytes_per_token == 2 * 4 * 8 * BF16


def test_states_have_one_size_however_long_the_sequence_is() -> None:
    """Mamba 2, as vLLM shapes it: the last 3 inputs of 4 x 16 x 2 + 2 groups x 2 x 32 channels; 8 heads x 16 x 32."""
    model = model_of({**LLAMA, **MAMBA2}, model_type="bamba", attn_layer_indices=[2, 5], head_dim=8)
    space = StateSpace(4, 128, groups=2, group_channels=64, heads=8, head_state=512)
    assert [isinstance(layer[0], FullAttention) for layer in model.layers] == [False, False, True] * 2
    assert model.layers[0] == (space,)
    state = (128 + 2 * 64) * 3 * BF16 + 8 * 512 * BF16
    found = count(model, isl=100, page_size=16)
    assert found.rank.bytes_of_state == 4 * state
    assert found.rank.bytes_total == 4 * state + 2 * 112 * (2 * 4 * 8 * BF16)
    halves = count(model, tp=2, isl=100)
    assert halves.rank.bytes_of_state == 4 * state // 2
    assert count(model, "fp8", isl=100).rank.bytes_of_state == 4 * state  # the states are not of the cache's dtype
    with pytest.raises(KvbenchError, match="2 groups of the state space cannot be divided among 4 ranks"):
        count(model, tp=4)
    # One group is copied to every rank.
    alone = model_of({**LLAMA, **MAMBA2}, model_type="bamba", attn_layer_indices=[2], mamba_n_groups=1, head_dim=8)
    of_rank = (128 // 4 + 64) * 3 * BF16 + 2 * 512 * BF16
    assert count(alone, tp=4).rank.bytes_of_state == 5 * of_rank


def test_the_state_may_have_a_dtype_of_its_own() -> None:
    model = model_of({**LLAMA, **MAMBA2}, model_type="falcon_h1", mamba_ssm_cache_dtype="float32")
    assert count(model).rank.bytes_of_state == 6 * ((128 + 2 * 64) * 3 * BF16 + 8 * 512 * 4)
    assert count(model).rank.bytes_per_token == 6 * 2 * 4 * 8 * BF16  # each layer attends as well
    kept = format_of(model_of({**LLAMA, **MAMBA2}, model_type="falcon_h1"), states="transformers")
    assert (kept.state_dtype, kept.spare_columns) == ("float32", 1)


def test_other_hybrids() -> None:
    jamba = model_of(LLAMA, model_type="jamba", attn_layer_period=3, attn_layer_offset=1, mamba_expand=2,
                     mamba_d_conv=4, mamba_d_state=16)  # fmt: skip
    assert [type(layer[0]).__name__ for layer in jamba.layers] == ["StateSpace", "FullAttention", "StateSpace"] * 2
    assert count(jamba).rank.bytes_of_state == 4 * (128 * 3 + 128 * 16) * BF16
    nemotron = model_of(LLAMA, model_type="nemotron_h", hybrid_override_pattern="M-*EM-", head_dim=8, n_groups=1,
                        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=16, conv_kernel=4)  # fmt: skip
    assert [len(layer) for layer in nemotron.layers] == [1, 0, 1, 0, 1, 0]
    assert count(nemotron).rank.bytes_of_state == 2 * ((32 + 2 * 16) * 3 + 4 * 8 * 16) * BF16
    qwen = model_of(LLAMA, model_type="qwen3_next", head_dim=32, full_attention_interval=3, linear_num_key_heads=2,
                    linear_key_head_dim=8, linear_num_value_heads=4, linear_value_head_dim=16,
                    linear_conv_kernel_dim=4)  # fmt: skip
    assert count(qwen).rank.bytes_of_state == 4 * ((2 * 2 * 8 + 4 * 16) * 3 + 4 * 8 * 16) * BF16
    lfm = model_of(LLAMA, model_type="lfm2", full_attn_idxs=[2], conv_L_cache=3)
    assert count(lfm).rank.bytes_of_state == 5 * 64 * 2 * BF16
    mamba = model_of({"model_type": "mamba", "torch_dtype": "float32"}, hidden_size=8, num_hidden_layers=2,
                     state_size=16, conv_kernel=4, expand=2)  # fmt: skip
    assert count(mamba).rank.bytes_total == 2 * (16 * 3 + 16 * 16) * 4


def test_a_latent_beside_nothing_else() -> None:
    entries = {**LLAMA, "model_type": "deepseek_v3", "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 8}
    assert model_of(entries).layers == ((Latent(32, 16),),) * 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "has no num_hidden_layers; if the model takes a default"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers is '6'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000 in a config.json; expected at most 10,000"),
        ({"model_type": "of tomorrow", "kv_channels": 128}, "kv_channels, which can change"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 KV heads"),
        ({"hidden_size": 60}, "8 heads do not divide hidden_size 60"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "mistral"}, "has no sliding_window; if the model takes a default"),
        ({"model_type": "qwen3"}, "has no head_dim"),
        ({"model_type": "gemma2", "num_key_value_heads": None}, "has no num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "not a list of 6 words"),
        ({"layer_types": ["chunked_attention"] * 6}, "'chunked_attention', which is not understood"),
        ({"layer_types": ["sliding_attention"] * 6}, "has no sliding_window"),
        ({"sliding_window": 128}, "no layer_types say which layers have it"),
        ({"model_type": "gemma2", "head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 0}, "pattern is 0"),
        (
            {
                "model_type": "gemma3n_text",
                "head_dim": 8,
                "sliding_window": 9,
                "layer_types": ["full_attention"] * 6,
                "num_kv_shared_layers": 6,
            },
            "num_kv_shared_layers is 6",
        ),
        ({**MAMBA2, "model_type": "nemotron_h", "head_dim": 8, "hybrid_override_pattern": "M*"}, "names 2 layers"),
        ({**MAMBA2, "model_type": "bamba", "attn_layer_indices": 3}, "not a list of numbers"),
        ({"model_type": "deepseek_v32", "kv_lora_rank": 512, "index_head_dim": 128}, "index_head_dim, kv_lora_rank"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "is_encoder_decoder, which can change"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "attention_chunk_size, which can change"),
        ({"model_type": "gemma4_text", "per_layer_config": {"5": {}}}, "per_layer_config, which can change"),
        ({"model_type": "zamba2", "mamba_d_state": 64}, "mamba_d_state, which can change"),
        ({"model_type": "granitemoehybrid"}, "has no layer_types"),
    ],
)
def test_nothing_is_guessed(change: dict[str, Any], words: str) -> None:
    with pytest.raises(KvbenchError, match=words):
        model_of(LLAMA, **change)


def test_an_unknown_family_is_said_to_be_one() -> None:
    model = model_of(LLAMA, model_type="of tomorrow", num_experts=8, chunk_size_feed_forward=0)
    assert model.layers == ((FullAttention(4, 8),),) * 6
    question = Question(model, format_of(model), Asked())
    assert "- model_type 'of tomorrow' is not known: read as plain attention" in explain(question)
    assert "not known" not in explain(Question(load("llama-3.1-8b"), format_of(load("llama-3.1-8b")), Asked()))


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_json() -> None:
    ran = kvbench("kvcache", "--model", "deepseek-r1", "--tp", 8, "--pp", 2, "--isl", 1000, "--page-size", 64, "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["tp"], told["pp"], told["isl"], told["page_size"], told["kv_dtype"]) == (8, 2, 1000, 64, "bfloat16")
    per_layer = 576 * BF16
    assert told["bytes_per_token"] == {"rank": 31 * per_layer, "all": 8 * 61 * per_layer, "distinct": 61 * per_layer}
    assert told["bytes_per_block"]["rank"] == 64 * 31 * per_layer
    assert told["bytes_total"] == {name: 1024 * value for name, value in told["bytes_per_token"].items()}
    assert [(stage["first_layer"], stage["layers"]) for stage in told["stages"]] == [(0, 31), (31, 30)]


def test_explanation_and_table() -> None:
    ran = kvbench("kvcache", "--model", "gpt-oss-20b", "--isl", 8192, "--tp", 8, "--explain")
    assert ran.returncode == 0, ran.stderr
    assert "layers 0, 2, 4" in ran.stdout
    assert "sliding window of 128: 2 (K, V) x 1 of 8 KV heads x 64 x 2 B (bfloat16) = 256 B a token" in ran.stdout
    assert "8 pages of 16" in ran.stdout
    assert "GQA: num_attention_heads 64, num_key_value_heads 8" in ran.stdout
    model = model_of({**LLAMA, **MAMBA2}, model_type="falcon_h1")
    question = Question(model, format_of(model), Asked())
    assert "256 channels x 3 columns x 2 B (bfloat16) + 8 heads x 512 x 2 B" in explain(question)
    assert "bytes of state" in to_text(question)
    assert "bytes of state" not in ran.stdout
    assert json.loads(to_json(question))["bytes_of_state"]["rank"] > 0


def test_a_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        ran = kvbench("kvcache", "--model", path, "--json", "--explain")
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["bytes_per_token"]["rank"] == 6 * 2 * 4 * 8 * BF16
        assert "hidden_size 64 / num_attention_heads 8 = 8" in ran.stderr
    for text, words in (("[]", "does not hold a JSON object"), ("{", "cannot be read"), ("{}", "has no model_type")):
        (tmp_path / "config.json").write_text(text)
        ran = kvbench("kvcache", "--model", tmp_path)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert words in ran.stderr
    named = kvbench("kvcache", "--model", "Qwen/Qwen3-8B", "--json")
    assert json.loads(named.stdout)["model"] == "qwen3-8b"
    ran = kvbench("kvcache", "--model", "llama-9")
    assert ran.returncode == 2
    assert "neither a file nor a model that comes with the package: deepseek-r1, " in ran.stderr


def test_importing_asyncxfer_loads_nothing_of_it() -> None:
    code = "import sys, asyncxfer; print([name for name in sys.modules if 'kvbench' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
