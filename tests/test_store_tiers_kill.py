"""kill -9 of a tiered store's writer under load: each block that was acknowledged is found, and whole, in some tier.

TIER_BLOCKS sets how many blocks are put (480 by default), TIER_ROUNDS how often the writer is killed meanwhile (3);
TIER_SEED repeats a run, whose seed is printed. Figures are printed, and no times asserted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from servers import S3Server
from store_writer import version_of
from test_store_objects import s3_options
from tiers_writer import BATCH, BLOCK, MEMORY, key_of, tiered

import asyncxfer
from asyncxfer import Agent
from asyncxfer.store import Tier

BLOCKS = int(os.environ.get("TIER_BLOCKS", "480")) // BATCH * BATCH
ROUNDS = int(os.environ.get("TIER_ROUNDS", "3"))
TESTS = Path(__file__).parent
#: What a writer may grow by, once it is open, besides its memory tier: staging, connections, what Python keeps.
BESIDES = 32 * 1024 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.stress, pytest.mark.timeout(120 + BLOCKS // 50)]


class Story:
    """What the writers of a test have said."""

    def __init__(self) -> None:
        self.acknowledged: set[int] = set()
        self.figures: dict[str, float] = {}

    def read(self, line: str) -> None:
        if line.startswith("="):
            first, count = map(int, line[1:].split())
            self.acknowledged.update(range(first, first + count))
        elif line.startswith("!"):
            self.figures.update(json.loads(line[1:]))


def write(story: Story, arguments: list[str], first: int, batches: int | None, dice: random.Random) -> int:
    """Run a writer; where `batches` says so, kill it a moment after so many were acknowledged. What it returned."""
    command = [sys.executable, str(TESTS / "tiers_writer.py"), *arguments, str(first), str(BLOCKS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(asyncxfer.__file__).parent.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = 0
        for line in process.stdout:
            story.read(line.decode())
            seen += line.startswith(b"=")
            if seen == batches:
                time.sleep(0.01 * dice.random())
                process.kill()
                batches = None
        errors = process.stderr.read().decode()
        status = process.wait(timeout=30)
    assert status in (0, -9), errors
    return status


async def look(path: Path, url: str, options: dict[str, object], numbers: list[int]) -> Counter[Tier]:
    """Find blocks in their tiers; what is not there, or is not whole, fails."""
    found: Counter[Tier] = Counter()
    async with (
        Agent("looker", backends=["local", "uring", "s3"]) as agent,
        agent.allocate((64, BLOCK), np.uint8) as region,
        tiered(agent, str(path), url, options) as store,
    ):
        for start in range(0, len(numbers), 64):
            part = numbers[start : start + 64]
            sources = await store.fetch([key_of(number) for number in part], region[: len(part)])
            found.update(Tier(source) for source in sources.tolist())
            for row, (number, source) in enumerate(zip(part, sources, strict=True)):
                assert source, f"block {number} was acknowledged, and is in no tier"
                assert version_of(number, region.array[row]) == 1, f"block {number} is not what was put"
        assert store.stats()["lost"] == 0
        await store.flush()
    return found


def test_what_was_acknowledged_outlives_kill_9(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("TIER_SEED", time.time_ns() % 10**6))
    print(f"TIER_SEED={seed}")  # noqa: T201
    dice = random.Random(seed)
    story, url, options = Story(), f"s3://{bucket}/tiers", s3_options(s3)
    arguments = [str(tmp_path / "store"), url, json.dumps(options)]
    kills = 0
    started = time.monotonic()
    for left in range(ROUNDS, -1, -1):
        first = next((n for n in range(0, BLOCKS, BATCH) if n not in story.acknowledged), BLOCKS)
        batches = dice.randint(1, max(1, (BLOCKS - first) // BATCH // (left + 1))) if left else None
        kills += write(story, arguments, first, batches, dice) == -9
        if left:
            sample = sorted(story.acknowledged)
            sample = sorted(dice.sample(sample, min(200, len(sample))))
            asyncio.run(look(tmp_path / "store", url, options, sample))
    seconds = time.monotonic() - started
    assert kills > 0
    assert story.acknowledged == set(range(BLOCKS))
    assert story.figures["pending"] == 0
    assert story.figures["grown"] < MEMORY + BESIDES
    found = asyncio.run(look(tmp_path / "store", url, options, list(range(BLOCKS))))
    assert sum(found.values()) == BLOCKS
    alone = asyncio.run(look(tmp_path / "anew", url, options, list(range(BLOCKS))))
    assert alone[Tier.OBJECTS] == BLOCKS
    print(f"{BLOCKS} blocks, {kills} kills, {seconds:.1f} s; {json.dumps(story.figures)}; {dict(found)}")  # noqa: T201
