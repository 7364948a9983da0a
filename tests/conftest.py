"""What every test runs under: both event loops, leak assertions, blocking detection, and a summary of skips.

An `async def` test runs twice, as `[asyncio]` and as `[uvloop]`; once with `--one-loop`. A plain test that takes the
fixture `loop_name` does too, and hands the name to the processes it starts.

A test that leaves something behind fails: a file descriptor, a thread (native ones included), a shared mapping, a
child process, an asyncio task, or a live native object. `@pytest.mark.leaks("maps", reason="...")` excuses kinds.
While the loop runs, a blocking call with asyncxfer on the stack fails; `@pytest.mark.blocking("...")` turns that off.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import inspect
import multiprocessing.resource_tracker
import os
import re
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx

pytest_plugins = ["hosts", "stage", "over_ucx", "servers"]  # their fixtures, for all tests

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

# What may block on the loop's thread, each with its reason; (file, function names).
MAY_BLOCK: tuple[tuple[str, frozenset[str]], ...] = (
    # The kernel answers these reads of /proc from memory, in microseconds, once when an agent starts.
    ("asyncxfer/_identity.py", frozenset({"host"})),
    # The threads that it joins have ended their work: all of it was awaited.
    ("asyncxfer/_agent.py", frozenset({"_end"})),
    # Memory, limits and the kernel's rules: /proc and /sys again, once an allocation or a peer.
    ("asyncxfer/_sharing.py", frozenset({"_memory_facts"})),
    ("asyncxfer/backends/shm.py", frozenset({"_refusal"})),
    # Three small files, once, and a library, when credentials are made.
    ("asyncxfer/_credentials.py", frozenset({"__init__", "read", "_derived", "_as_file"})),
    # Which UCX is in this process: /proc again, once an agent.
    ("asyncxfer/backends/_ucx_library.py", frozenset({"load", "_the_only_one"})),
    # The SDK is asked in a thread, on a loop that ends with the question and that carries nothing else.
    ("asyncxfer/backends/_s3_sdk.py", frozenset({"place", "warm_session", "load", "ask"})),
    # What measures us has a lock of its own, which another thread under measurement may hold for a moment.
    ("coverage/collector.py", frozenset({"lock_data"})),
)

# How long something that ends on its own (a thread, a child) may take to do so after its test.
GRACE = 2.0


# ---- event loops --------------------------------------------------------------------------------------------------


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on each loop."""
    return LOOPS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run that has little time take each test once."""
    parser.addoption(
        "--one-loop", action="store_true",
        help="run each test on one of the two event loops, always the same; the contract of backends on both",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--one-loop`, leave half of the tests out that run on both loops."""
    if not config.getoption("--one-loop"):
        return
    twins: dict[str, list[pytest.Item]] = {}
    for item in items:
        if _LOOP.search(item.nodeid) and item.path.name != "test_contract.py":
            twins.setdefault(_LOOP.sub("*", item.nodeid), []).append(item)
    left_out = {twin[zlib.crc32(name.encode()) % 2] for name, twin in twins.items() if len(twin) == len(LOOPS)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


_LOOP = re.compile(rf"(?<=[\[-])({'|'.join(LOOPS)})(?=[-\]])")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise plain tests that ask for `loop_name`; async ones are parametrised by their loop."""
    if "loop_name" in metafunc.fixturenames and not _is_async(metafunc.function):
        metafunc.parametrize("loop_name", list(LOOPS), indirect=True)


@pytest.fixture
def loop_name(request: pytest.FixtureRequest) -> str:
    """`"asyncio"` or `"uvloop"`: the loop of an async test, or the one that a plain test should hand on."""
    if hasattr(request, "param"):
        return str(request.param)
    return "uvloop" if isinstance(request.getfixturevalue("event_loop_in_use"), uvloop.Loop) else "asyncio"


@pytest.fixture
async def event_loop_in_use() -> asyncio.AbstractEventLoop:
    """Give the loop that the test runs on."""
    return asyncio.get_running_loop()


def _is_async(function: object) -> bool:
    function = getattr(function, "hypothesis", function)
    function = getattr(function, "inner_test", function)
    return inspect.iscoroutinefunction(function)


def pytest_collection_finish() -> None:
    """Set aside what imports and collection have made, which every search for leaks would walk through again."""
    gc.collect()
    gc.freeze()


# ---- leaks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What this process holds at one moment, by kind; each entry says enough to be found again."""

    fds: collections.Counter[str]
    threads: collections.Counter[str]
    maps: collections.Counter[str]
    children: collections.Counter[str]
    live: collections.Counter[str]

    @classmethod
    def take(cls) -> Snapshot:
        """Read /proc and the native counters."""
        return cls(_fds(), _threads(), _shared_mappings(), _children(), _live())

    def since(self, before: Snapshot, excused: frozenset[str]) -> list[str]:
        """Describe what is here that was not there before."""
        kinds = [kind for kind in ("fds", "threads", "maps", "children", "live") if kind not in excused]
        return [
            f"{kind}: {count} x {_named(entry) if kind == 'threads' else entry}"
            for kind in kinds
            for entry, count in (getattr(self, kind) - getattr(before, kind)).items()
        ]


def _fds() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        if target == "/dev/null":
            continue  # libuv keeps one for each loop that has opened a stream; it goes with the loop
        # Sockets are counted and not named: uvloop renews its own pair whenever it runs again.
        found["a socket" if target.startswith("socket:") else f"{fd} -> {target}"] += 1
    return found


def _threads() -> collections.Counter[str]:
    """Count by number alone: a thread gives itself its name some time after it has begun."""
    return collections.Counter(os.listdir("/proc/self/task"))


def _named(thread: str) -> str:
    try:
        return f"{thread} ({Path(f'/proc/self/task/{thread}/comm').read_text().strip()})"
    except (FileNotFoundError, ProcessLookupError):
        return thread


def _shared_mappings() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        address, mode, *rest = line.split(maxsplit=5)
        if mode.endswith("s"):
            found[f"{address} {rest[-1].strip()}"] += 1
    return found


def _children() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(f"pid {pid}" for pid in listing.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _live() -> collections.Counter[str]:
    """Live native objects: each module of asyncxfer._fast that has one tells by `live() -> {name: count}`."""
    found: collections.Counter[str] = collections.Counter()
    for name, module in list(sys.modules.items()):
        if name.startswith("asyncxfer._fast"):
            count = getattr(module, "live", None)
            if callable(count):
                counts: Mapping[str, int] | int = count()
                named = counts if isinstance(counts, Mapping) else {"objects": counts}
                found.update({f"{name} {what}": number for what, number in named.items() if number})
    return found


def _excused(request: pytest.FixtureRequest) -> frozenset[str]:
    return frozenset(kind for mark in request.node.iter_markers("leaks") for kind in mark.args)


def _left_behind(before: Snapshot, excused: frozenset[str]) -> list[str]:
    """Compare now with before; what is still on its way out gets a moment."""
    end = time.monotonic() + GRACE
    while True:
        gc.collect()
        left = Snapshot.take().since(before, excused)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.01)


def _report(left: list[str]) -> None:
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind."""
    if _is_async(getattr(request.node, "obj", None)):
        request.getfixturevalue("leaves_nothing_async")
        yield
        return
    gc.collect()
    before = Snapshot.take()
    yield
    _report(_left_behind(before, _excused(request)))


@pytest.fixture
async def leaves_nothing_async(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail an async test that leaves something behind, looking while its loop is still open.

    It is set up before any other fixture of the test and torn down after them, so tasks that a fixture holds
    are gone by then; closing the loop, which would cancel a leaked task in silence, comes later.
    """
    loop = asyncio.get_running_loop()
    excused = _excused(request)
    gc.collect()
    before = Snapshot.take()
    yield
    tasks = await _leaked_tasks() if "tasks" not in excused else []
    await loop.shutdown_default_executor()
    end = loop.time() + GRACE
    while True:
        gc.collect()
        left = tasks + Snapshot.take().since(before, excused)
        if not left or loop.time() > end:
            break
        await asyncio.sleep(0.01)
    _report(left)


async def _leaked_tasks() -> list[str]:
    """Name the tasks that are still there after a few turns of the loop."""
    current = asyncio.current_task()
    for _ in range(5):
        await asyncio.sleep(0)
    return [f"tasks: {task!r}" for task in asyncio.all_tasks() if task is not current and not task.done()]


@pytest.fixture(scope="session", autouse=True)
def _long_lived() -> None:
    """Start what lives as long as the interpreter, so that no single test is blamed for it."""
    multiprocessing.resource_tracker.ensure_running()


# ---- blocking calls -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def blocks_nothing(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """Fail when asyncxfer blocks the thread of a running event loop."""
    if not _is_async(getattr(request.node, "obj", None)) or request.node.get_closest_marker("blocking"):
        yield None
        return
    with blockbuster_ctx("asyncxfer") as detector:
        for function in detector.functions.values():
            for file, names in MAY_BLOCK:
                function.can_block_in(file, names)
        yield detector


# ---- the end of the run -------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was skipped and why, most frequent reason first."""
    reasons: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5d}  {reason}")
