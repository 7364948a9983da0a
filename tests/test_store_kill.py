"""kill -9 of a store's writer under load: what was acknowledged is there and right, nothing else is served.

STORE_ROUNDS scales the rounds of each durability (6 by default); STORE_SEED repeats a run, whose seed is printed. The
store is the same in all rounds of a test, so that each writer goes on with what the one before was killed over.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import select
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_writer import BLOCK, KEYS, TASKS, block_of, key_of, version_of

import asyncxfer
from asyncxfer import Agent
from asyncxfer import store as stores

ROUNDS = int(os.environ.get("STORE_ROUNDS", "6"))
TESTS = Path(__file__).parent
GONE = -1  # for a version: the key is not there

pytestmark = [pytest.mark.slow, pytest.mark.stress, pytest.mark.timeout(120 + 3 * ROUNDS)]


class History:
    """What may be found of each key: what was acknowledged last, or anything that was begun since."""

    def __init__(self) -> None:
        self.may_be: defaultdict[int, set[int]] = defaultdict(lambda: {GONE})
        self._begun: dict[int, int] = {}
        self.begun_since_asked: defaultdict[int, set[int]] = defaultdict(set)
        self.acknowledged = 0

    def read(self, line: str) -> None:
        if line.startswith("+"):
            number, version = map(int, line[1:].split())
            self._begin(number, version)
        elif line.startswith("-"):
            self._begin(int(line[1:]), GONE)
        elif line.startswith("="):
            self.may_be[int(line[1:])] = {self._begun[int(line[1:])]}
            self.acknowledged += 1

    def _begin(self, number: int, version: int) -> None:
        self.may_be[number].add(version)
        self.begun_since_asked[number].add(version)
        self._begun[number] = version

    def found(self, number: int, version: int) -> None:
        """Settle what a key is, now that nobody writes."""
        self.may_be[number] = {version}


def writer(path: Path, durability: str, seed: int, budget: int, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a writer."""
    command = [sys.executable, str(TESTS / "store_writer.py"), str(path), durability, str(seed), str(budget)]
    environment = {**os.environ, "PYTHONPATH": str(Path(asyncxfer.__file__).parent.parent)}
    return subprocess.Popen(command, env=environment, **pipes)


def killed(path: Path, durability: str, seed: int, budget: int, delay: float) -> list[str]:
    """Run a writer and kill it; what it said."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with writer(path, durability, seed, budget, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline().decode()
        if not first:
            raise AssertionError(process.stderr.read().decode())
        killer = time.monotonic() + delay
        said = b""
        while select.select([process.stdout], [], [], max(0.0, killer - time.monotonic()))[0]:
            more = os.read(process.stdout.fileno(), 1 << 16)
            said += more
            if not more or time.monotonic() >= killer:
                break
        process.kill()
        said += process.stdout.read()
        assert process.wait(timeout=30) == -9
    return [first.strip(), *said.decode().splitlines()]


async def look(path: Path, mode: stores.Mode) -> tuple[dict[int, int], stores.Report, int]:
    """Read all keys: the version of each that is there; what is no whole block of its key fails."""
    count = TASKS * KEYS
    async with (
        Agent("looker") as agent,
        agent.allocate((count, BLOCK), np.uint8) as region,
        stores.open(path, agent=agent, mode=mode) as store,
    ):
        region.array[:] = 0xAB
        hits = await store.get([key_of(number) for number in range(count)], region[:])
        found = {}
        for number in range(count):
            if hits[number]:
                version = version_of(number, region.array[number])
                assert version is not None, f"a torn or foreign block was served for key {number}"
                found[number] = version
            else:
                assert (region.array[number] == 0xAB).all(), f"key {number} was missed, and its row written to"
                found[number] = GONE
        return found, store.report, store.stats()["damaged"]


@pytest.mark.parametrize("durability", ["none", "data", "full"])
def test_what_was_acknowledged_outlives_kill_9(durability: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("STORE_SEED", time.time_ns() % 10**6))
    print(f"{durability}: STORE_SEED={seed}")  # noqa: T201
    dice = random.Random(f"{seed} {durability}")
    history = History()
    for number in range(ROUNDS):
        delay = dice.choice((0.0, 0.02, 0.3)) * dice.random()
        lines = killed(tmp_path / "store", durability, dice.getrandbits(30), 2 * TASKS * KEYS * BLOCK, delay)
        for line in lines:
            history.read(line)
        found, report, damaged = asyncio.run(look(tmp_path / "store", dice.choice(("w", "r"))))
        assert not report.clean
        wrong = {n: (version, history.may_be[n]) for n, version in found.items() if version not in history.may_be[n]}
        assert wrong == {}, f"round {number} of seed {seed}: {report}"
        assert (damaged, report.lost_blocks, report.damaged_records, report.damaged_files) == (0, 0, 0, [])
        for key, version in found.items():
            history.found(key, version)
    print(f"{durability}: {history.acknowledged} acknowledged in {ROUNDS} rounds")  # noqa: T201
    assert history.acknowledged > 0


def test_what_is_evicted_is_never_served_as_something_else(tmp_path: Path) -> None:
    """With room for a third of the keys blocks are given out again and again; what is there is whole and no older."""
    seed = int(os.environ.get("STORE_SEED", time.time_ns() % 10**6))
    print(f"STORE_SEED={seed}")  # noqa: T201
    dice = random.Random(f"{seed} evicted")
    history = History()
    budget = TASKS * KEYS * BLOCK // 3
    seen = 0
    for number in range(ROUNDS):
        lines = killed(tmp_path / "store", "none", dice.getrandbits(30), budget, 0.3 * dice.random())
        for line in lines:
            history.read(line)
        found, report, _ = asyncio.run(look(tmp_path / "store", dice.choice(("w", "r"))))
        wrong = {n: v for n, v in found.items() if v != GONE and v not in history.may_be[n]}
        assert wrong == {}, f"round {number} of seed {seed}: {report}"
        seen += sum(version != GONE for version in found.values())
        assert report.blocks * BLOCK <= budget
    assert seen > 0


@pytest.mark.parametrize("share", [3, 2 / 3], ids=["room for all", "blocks given out again"])
async def test_a_reader_beside_a_writer(share: float, tmp_path: Path, loop_name: str) -> None:
    """In another process, while the writer works: what was acknowledged before a get is seen by it, and never half."""
    path, said = tmp_path / "store", tmp_path / "said"
    count = TASKS * KEYS
    budget = int(count * share) * BLOCK
    history = History()
    with said.open("wb") as out, writer(path, "none", 1, budget, stdout=out) as process:
        try:
            served = await asyncio.wait_for(read_beside(path, said, history, evicts=share < 1), 60)
        finally:
            process.kill()
    assert served > 200


async def read_beside(path: Path, said: Path, history: History, *, evicts: bool) -> int:
    """Get random keys until a good many were served; how many."""
    dice = random.Random(5)
    with said.open("rb") as lines:
        while not lines.peek():  # noqa: ASYNC110 - a file tells nobody that it has grown
            await asyncio.sleep(0.01)
        tell(history, lines)
        served = 0
        async with (
            Agent("reader") as agent,
            agent.allocate((16, BLOCK), np.uint8) as region,
            stores.open(path, agent=agent, mode="r") as store,
        ):
            while served < 200 + 4 * ROUNDS * 50:
                numbers = dice.sample(range(TASKS * KEYS), 16)
                tell(history, lines)
                history.begun_since_asked.clear()
                before = {number: set(history.may_be[number]) for number in numbers}
                hits = await store.get([key_of(number) for number in numbers], region[:])
                tell(history, lines)
                for row, number in enumerate(numbers):
                    version = version_of(number, region.array[row]) if hits[row] else GONE
                    assert version is not None, f"a torn or foreign block was served for key {number}"
                    allowed = before[number] | history.begun_since_asked[number] | ({GONE} if evicts else set())
                    assert version in allowed, f"key {number} is {version}, which is none of {allowed}"
                    served += bool(hits[row])
                await asyncio.sleep(0)
            assert store.stats()["damaged"] == 0
        return served


def tell(history: History, lines: io.BufferedReader) -> None:
    """Have the history read what the writer has said since; a line that is not whole yet waits."""
    at = lines.tell()
    text = lines.read()
    whole = text.rfind(b"\n") + 1
    lines.seek(at + whole)
    for line in text[:whole].decode().splitlines():
        history.read(line)


def test_a_whole_block_is_known_and_a_torn_one_too() -> None:
    block = block_of(3, 77)
    assert version_of(3, block) == 77
    assert version_of(4, block) is None
    torn = block.copy()
    torn[2048:] = block_of(3, 78)[2048:]
    assert version_of(3, torn) is None
