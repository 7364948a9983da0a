"""`asyncxfer kvbench plan`, `profile`, `traffic` and `trace`: what they run is right, and what they print can be read.

No test looks at a time but to see that there is one.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import options_of
from servers import S3Server

from asyncxfer import Agent, store
from asyncxfer.bench._shapes import Shape
from asyncxfer.kvbench import _pattern, _plan, _profile, _requests
from asyncxfer.kvbench._config import read
from asyncxfer.kvbench._errors import KvbenchError
from asyncxfer.kvbench._kvcache import Question
from asyncxfer.kvbench._quantities import percentiles, size
from asyncxfer.kvbench._rank import Rank
from asyncxfer.kvbench._ranks import Ranks
from asyncxfer.kvbench._replay import Replay
from asyncxfer.kvbench._requests import Request
from asyncxfer.kvbench._rows import shapes_of
from asyncxfer.kvbench._shipped import load
from asyncxfer.kvbench._sizes import Asked, format_of, stages

TINY = {
    "model_type": "gpt_oss", "dtype": "bfloat16", "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 33,
}  # fmt: skip
PAGE = 16 * 2 * 2 * 64 * 2  # tokens, K and V, heads, head_dim, bfloat16


def kvbench(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncxfer", "kvbench", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def told(ran: subprocess.CompletedProcess[str]) -> Any:
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model with two layers of each kind, and a folder."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


# ---- plan and profile ---------------------------------------------------------------------------------------------


def test_rows_are_what_a_rank_keeps() -> None:
    model = read(TINY, name="tiny", source="a config.json")
    form, asked = format_of(model), Asked(isl=160, page_size=16)
    (stage,) = stages(model, 1)
    # After 160 tokens the next window begins with token 128, so that 2 of 10 pages are kept.
    assert shapes_of(stage, form, asked, "layer") == [Shape(2 * 10 + 2 * 2, PAGE)]
    assert shapes_of(stage, form, asked, "block") == [Shape(10 + 2, 2 * PAGE)]
    for name in ("gemma-3-27b", "deepseek-r1", "llama-3.1-8b"):
        model, asked = load(name), Asked(tp=2, pp=2, isl=3000)
        question = Question(model, format_of(model), asked)
        for stage, of_one in question.answer().stages:
            for layout in ("layer", "block"):
                shapes = shapes_of(stage, question.form, asked, layout)
                assert sum(shape.nbytes for shape in shapes) == of_one.bytes_total


def test_states_are_rows_too() -> None:
    entries = {
        **TINY, "model_type": "falcon_h1", "hidden_size": 256, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4,
    }  # fmt: skip
    model = read(entries, name="tiny", source="a config.json")
    state, (stage,) = ((32 + 32) * 3 + 4 * 8 * 16) * 2, stages(model, 1)
    form, asked = format_of(model), Asked(isl=32)
    assert shapes_of(stage, form, asked, "layer") == [Shape(8, PAGE), Shape(4, state)]
    assert shapes_of(stage, form, asked, "block") == [Shape(2, 4 * PAGE), Shape(1, 4 * state)]


def test_the_plan_is_for_the_rank_that_keeps_most() -> None:
    model = load("deepseek-r1")
    question = Question(model, format_of(model), Asked(tp=8, pp=4, isl=1024))
    plan = _plan.make(
        question, _plan.Options(tiers=_plan.TIERS, endpoint="http://127.0.0.1:1", bucket="kv", folder="/a b")
    )
    assert plan.stage == 2
    assert {command.nbytes for command in plan.commands} == {1024 * 16 * 1152}
    lines = {command.tier: command.line for command in plan.commands}
    assert lines["host"].startswith("asyncxfer bench --shapes 1024x18KiB --op put,get")
    assert "--over tcp" in lines["tcp"]
    assert "--over ucx" in lines["ucx"]
    assert "--shapes 64x288KiB" in lines["file"]
    assert "--way direct --folder '/a b'" in lines["file"]
    assert "--endpoint http://127.0.0.1:1 --bucket kv" in lines["s3"]
    by_layer = _plan.make(question, _plan.Options(tiers=["file"], layout="layer"))
    assert "--way cached" in by_layer.commands[0].line  # 18 KiB are no multiple of 4 KiB


def test_planned_commands_run_as_they_are_printed(tiny: Path) -> None:
    asked = ("--model", tiny, "--isl", 160, "--rounds", 1, "--op", "put", "--tiers", "host,file", "--folder", tiny)
    printed = kvbench("plan", *asked)
    assert printed.returncode == 0, printed.stderr
    lines = [line for line in printed.stdout.splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "asyncxfer"
        command = [sys.executable, "-m", "asyncxfer", *words, "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        (result,) = told(ran)["results"]
        assert result["ours"]["verified"]
    planned = told(kvbench("plan", *asked, "--json"))["commands"]
    assert [shlex.join(command["arguments"]) for command in planned] == lines
    assert {command["nbytes"] for command in planned} == {24 * PAGE}


def test_profile(tiny: Path) -> None:
    asked = ("--model", tiny, "--isl", 160, "--rounds", 1, "--op", "put", "--tiers", "host,tcp,file", "--folder", tiny)
    report = told(kvbench("profile", *asked, "--json"))
    assert [(one["tier"], one["op"]) for one in report["results"]] == [
        (tier, "put") for tier in ("host", "tcp", "file")
    ]
    for one in report["results"]:
        assert one["verified"]
        assert one["nbytes"] == 24 * PAGE
        assert one["seconds"] > 0
        assert one["backend"]


def test_rows_of_several_lengths_are_added_up() -> None:
    """Gemma 3 by block: 64 rows of ten layers' pages, and as many as a window has of 52 layers'."""
    model = load("gemma-3-27b")
    question = Question(model, format_of(model), Asked(tp=8, isl=4096))
    (command,) = _plan.make(question, _plan.Options(tiers=["file"])).commands
    system = {"backend": "uring", "seconds": 0.5, "verified": True}
    results = [{"op": op, "ours": system} for op in ("put", "get") for _ in command.shapes]
    results[-1] = {"op": "get", "ours": {**system, "verified": False}}
    moved = list(_profile.moved(command, results))
    assert [(one.op, one.seconds, one.backend, one.verified) for one in moved] == [
        ("put", 1.0, "uring", True), ("get", 1.0, "uring", False),
    ]  # fmt: skip
    nbytes = 16 * 1024 * (256 * 10 + 64 * 52)
    assert [one.nbytes for one in moved] == [nbytes] * 2
    assert moved[0].gigabytes_per_second == nbytes / 1e9
    lines = _profile.to_text(_plan.Plan(question, 0, (command,)), moved).splitlines()
    assert lines[0] == "gemma-3-27b, 4,096 tokens, one rank of stage 0 of TP 8, PP 1"
    assert [line.split()[-1] for line in lines[2:]] == ["verified", "WRONG"]
    assert "1000.000" in lines[2]


def test_a_command_that_fails_is_named(tiny: Path) -> None:
    ran = kvbench("profile", "--model", tiny, "--tiers", "file", "--folder", tiny / "nowhere")
    assert ran.returncode == 2
    assert "asyncxfer bench --over file" in ran.stderr


# ---- traffic --------------------------------------------------------------------------------------------------------

TRAFFIC = """
steps:
  - name: prefill to decode
    gap: 0.005
    repeat: 2
    row: 1KiB
    matrix:
      - [0, 0, 100000]
      - [0, 0, 64 KiB]
      - [0, 0, 0]
  - pairs: [{from: 2, to: 0, size: 4097}]
"""


def described(tmp_path: Path, text: str = TRAFFIC) -> Path:
    path = tmp_path / "traffic.yaml"
    path.write_text(text)
    return path


def test_places_do_not_overlap(tmp_path: Path) -> None:
    traffic = _pattern.read(described(tmp_path))
    assert [step.name for step in traffic.steps] == ["prefill to decode, 1", "prefill to decode, 2", "step 1"]
    assert traffic.ranks == 3
    assert [transfer.number for transfer in traffic.transfers] == list(range(5))
    for rank in range(3):
        sent, received = traffic.memory(rank)
        taken = [(one.source_offset, one.span) for one in traffic.transfers if one.source == rank]
        assert sum(span for _, span in taken) == sent == max((start + span for start, span in taken), default=0)
        taken = [(one.target_offset, one.span) for one in traffic.transfers if one.target == rank]
        assert sum(span for _, span in taken) == received == max((start + span for start, span in taken), default=0)
    first = traffic.transfers[0]
    assert first.span == 100000 + 97 * 1024  # 97 gaps between 98 rows; whole words


@pytest.mark.parametrize("over", ["host", "tcp"])
def test_traffic_alone_and_beside_others(tmp_path: Path, over: str) -> None:
    report = told(kvbench("traffic", described(tmp_path), "--rounds", 2, "--over", over, "--json"))
    assert report["verified"]
    found = [(one["step"], one["source"], one["target"], one["nbytes"]) for one in report["transfers"]]
    assert found == [
        ("prefill to decode, 1", 0, 2, 100000), ("prefill to decode, 1", 1, 2, 65536),
        ("prefill to decode, 2", 0, 2, 100000), ("prefill to decode, 2", 1, 2, 65536), ("step 1", 2, 0, 4097),
    ]  # fmt: skip
    for one in report["transfers"]:
        assert min(one["isolated"], one["contended"]) > 0
        assert one["slowdown"] == pytest.approx(one["contended"] / one["isolated"])


def test_traffic_for_people(tmp_path: Path) -> None:
    ran = kvbench("traffic", described(tmp_path), "--rounds", 1)
    assert ran.returncode == 0, ran.stderr
    assert "isolated ms  contended ms" in ran.stdout
    assert ran.stdout.splitlines()[-1].endswith("verified")
    assert "rank 0 to 2 by itself, 100,000 bytes" in ran.stderr


@pytest.fixture
def traffic(tmp_path: Path) -> _pattern.Traffic:
    return _pattern.read(described(tmp_path))


async def test_wrong_bytes_are_seen(traffic: _pattern.Traffic) -> None:
    async with Ranks.start(traffic, "host") as ranks:
        await ranks.fill()
        problems = await ranks.problems()  # nothing was moved yet
        assert len(problems) == 5
        assert problems[0].endswith("bytes from rank 2 to 0 are wrong")
        await ranks.together(traffic.steps)
        assert await ranks.problems() == []
    rank = Rank({"rank": 0, "over": "host", "certificates": None, "address": "127.0.0.1"})
    with pytest.raises(ValueError, match="command 'dance' is unknown"):
        await rank.answer({"do": "dance"})
    await rank.close()


async def test_a_rank_that_fails_is_named() -> None:
    huge = _pattern.Transfer(0, 0, 1, 1 << 60, 0, 0, 0)
    with pytest.raises(KvbenchError, match=r"rank \d: 'open' failed: "):
        async with Ranks.start(_pattern.Traffic(2, (_pattern.Step("", 0.0, (huge,)),)), "host"):
            pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: []", "0 steps between 0 ranks"),
        ("steps: 3", "cannot be read"),
        ("[", "cannot be read"),
        ("steps: [{pairs: [{from: 0, to: 1, size: 1, colour: red}]}]", "unknown field `colour`"),
        ("steps: [{name: a, matrix: [[0, 1]]}]\nranks: 2", "a: the matrix does not have 2 lines of 2"),
        ("steps: [{pairs: [{from: 1, to: 1, size: 1}]}]", "step 0: from rank 1 to 1"),
        ("steps: [{pairs: [{from: 0, to: 5, size: 1}]}]\nranks: 2", "from rank 0 to 5; expected two of 2"),
        ("steps: [{pairs: [{from: 0, to: 1, size: much}]}]", "'much' is no amount of bytes"),
        ("steps: [{pairs: [{from: 0, to: 1, size: 1}], repeat: 0}]", "gap is 0.0 and repeat 0"),
        ("steps: [{pairs: [{from: 0, to: 1, size: 0}]}]", "step 0 moves nothing"),
        ("steps: [{pairs: [{from: 0, to: 300, size: 1}]}]", "between 301 ranks"),
    ],
)
def test_traffic_that_makes_no_sense(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(KvbenchError, match=words):
        _pattern.read(described(tmp_path, text))


# ---- trace ----------------------------------------------------------------------------------------------------------


def trace(folder: Path, prompts: Sequence[Sequence[int]]) -> Path:
    """Prompts that come 100 ms after one another, their last block half full."""
    path = folder / "trace.jsonl"
    lines = [
        json.dumps(
            {
                "timestamp": 1000 + 100 * number,
                "input_length": len(ids) * 512 - 256,
                "output_length": 1,
                "hash_ids": ids,
            }
        )
        for number, ids in enumerate(prompts)
    ]
    path.write_text("\n".join(lines) + "\n\n")
    return path


PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5], [9, 2, 3], [1, 2, 7], [1, 2, 3, 4, 5]]
IN_TURN = ("--in-flight", 1, "--speed", 100)  # no request begins before the one before has stored its blocks
HITS = 0 + 3 + 0 + 2 + 5  # of the blocks of prefixes: what follows an unknown block cannot be used


def test_a_trace_reuses_prefixes(tmp_path: Path) -> None:
    path = trace(tmp_path, PROMPTS)
    report = told(kvbench("trace", path, "--block-bytes", "16KiB", *IN_TURN, "--buffer", "32KiB", "--json"))
    assert (report["requests"], report["blocks"], report["hits"], report["reusable"]) == (5, 19, HITS, HITS)
    assert report["hit_rate"] == HITS / 19
    assert report["hit_tokens"] == HITS * 512 - 256  # the last hit of the last prompt is of a block that is half full
    assert report["loaded_bytes"] == HITS * 16384
    assert report["stored_bytes"] == (19 - HITS) * 16384
    assert report["wrong"] == 0
    assert 0 < report["loading_ms"]["p50"] <= report["loading_ms"]["p90"] <= report["loading_ms"]["p99"]
    text = kvbench("trace", path, "--block-bytes", "16KiB", *IN_TURN, "--limit", 2)
    assert text.returncode == 0, text.stderr
    assert "2 requests: 3 of 8 blocks were there" in text.stdout
    assert "verified" in text.stdout


def test_blocks_are_those_of_a_model_and_stay_in_a_store(tiny: Path) -> None:
    path, kept = trace(tiny, PROMPTS[:1]), tiny / "kv"
    first, again = (told(kvbench("trace", path, "--model", tiny, "--store", kept, "--json")) for _ in range(2))
    assert (first["hits"], again["hits"]) == (0, 3)
    assert again["loaded_bytes"] == 3 * 512 // 16 * 4 * PAGE
    ran = kvbench("trace", path, "--block-bytes", 4096, "--store", kept)
    assert ran.returncode == 2
    assert "StoreFormatError" in ran.stderr or "ConfigError" in ran.stderr


def test_a_trace_against_tiers(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    path = trace(tmp_path, PROMPTS)
    tiers = ("--store", tmp_path / "kv", "--objects", f"s3://{bucket}/kvbench", "--memory", "64KiB", *options_of(s3))
    report = told(kvbench("trace", path, "--block-bytes", "16KiB", *IN_TURN, "--json", *tiers))
    assert report["hits"] == sum(report["tiers"].values()) == HITS
    assert set(report["tiers"]) <= {"memory", "disk", "objects"}
    assert report["wrong"] == 0


async def test_wrong_blocks_are_seen(tmp_path: Path) -> None:
    async with (
        Agent("replay") as agent,
        store.open(tmp_path / "kv", agent=agent, block_bytes=4096) as blocks,
        agent.allocate((1, 2, 4096), np.uint8) as region,
    ):
        region.array[0, 0] = 3
        await blocks.put([(1).to_bytes(8, "little")], region[0, 0])
        replay = Replay(blocks, region, 512)
        (served,) = await replay.run([Request(0.0, 1000, 1, [1, 2])], speed=1.0, progress=lambda number: None)
        assert (served.hits, served.blocks, replay.wrong) == (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no requests"),
        ("{", "line 1: "),
        ('{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "1 hash_ids for 600 tokens"),
        ('\n{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "line 2: 0 hash_ids for 0"),
        ('{"timestamp": 1, "input_length": 6, "output_length": 1, "hash_ids": [-1]}', "a hash_id is no number"),
        ('{"timestamp": 1, "input_length": 6, "output_length": 1}', "hash_ids"),
    ],
)
def test_a_trace_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(KvbenchError, match=words):
        _requests.read(tmp_path / "trace.jsonl", block_tokens=512)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--block-bytes", "4KiB", "--speed", "0"], "--speed is 0.0"),
        ([], "how large is a block"),
        (["--block-bytes", "12"], "expected a multiple of 8"),
        (["--block-bytes", "4KiB", "-o", "region"], "is not NAME=VALUE"),
        (["--block-bytes", "4 miles"], "'4 miles' is no amount of bytes"),
        (["--block-bytes", "16KiB", "--budget", "16KiB"], "StoreFullError"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: list[str], words: str) -> None:
    ran = kvbench("trace", trace(tmp_path, PROMPTS[:1]), *options)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert words in ran.stderr


def test_quantities() -> None:
    assert [size(text) for text in ("4096", 7, "4KiB", "1 MB", "2GiB", "3b")] == [4096, 7, 4096, 10**6, 2 << 30, 3]
    assert percentiles([]) == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
