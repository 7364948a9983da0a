"""The floor itself: a leak, a blocking call and a skip are seen when they happen (run in a pytest of their own)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import asyncio, mmap, os, socket, subprocess, sys, threading, time
import pytest

kept = []

def test_fd(): kept.append(os.open("/dev/zero", os.O_RDONLY))
def test_thread():
    thread = threading.Thread(target=time.sleep, args=(4,), daemon=True); thread.start()
def test_child(): kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4)"]))
def test_map(): kept.append(mmap.mmap(-1, 4096))
async def test_fd_async(): kept.append(os.open("/dev/zero", os.O_RDONLY))
async def test_socket_async(): kept.append(socket.socket())
async def test_task(): kept.append(asyncio.ensure_future(asyncio.sleep(60)))
@pytest.mark.leaks("fds", reason="excused")
def test_excused(): kept.append(os.open("/dev/zero", os.O_RDONLY))
async def test_executor(): await asyncio.to_thread(int)
async def test_loop(loop_name):
    assert loop_name in type(asyncio.get_running_loop()).__module__
def test_loop_of_a_child(loop_name): assert loop_name in ("asyncio", "uvloop")
async def test_skipped(): pytest.skip("no such card in this machine")
"""


@pytest.fixture
def outcome(pytester: pytest.Pytester) -> pytest.RunResult:
    ours = Path(__file__).with_name("conftest.py").read_text()
    ours = ours.replace("GRACE = 2.0", "GRACE = 0.3")  # nothing here goes away by waiting
    pytester.makeconftest(re.sub(r"pytest_plugins = .*", "", ours))
    pytester.makepyfile(TESTS)
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        asyncio_mode = "auto"
        asyncio_default_fixture_loop_scope = "function"
        filterwarnings = ["error", "ignore::ResourceWarning"]
        markers = ["leaks", "blocking"]
        """
    )
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rA")


@pytest.mark.slow
def test_leaks_are_reported_and_nothing_else_is(outcome: pytest.RunResult) -> None:
    text = outcome.stdout.str()
    leaky = {
        "test_fd": "fds",
        "test_thread": "threads",
        "test_child": "children",
        "test_map": "maps",
        "test_fd_async[asyncio]": "fds",
        "test_fd_async[uvloop]": "fds",
        "test_socket_async[asyncio]": "fds",
        "test_socket_async[uvloop]": "fds",
        "test_task[asyncio]": "tasks",
        "test_task[uvloop]": "tasks",
    }
    for name, kind in leaky.items():
        title, _, report = text.partition(f" ERROR at teardown of {name} ")
        assert title, f"{name} was not found to leak"
        assert re.search(rf"left behind:\n +{kind}: ", report[:400]), (name, kind, report[:400])
    outcome.assert_outcomes(passed=17, errors=len(leaky), skipped=2)
    assert "2  no such card in this machine" in text
