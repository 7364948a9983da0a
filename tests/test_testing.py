"""What is shipped to authors of backends: it imports little, explains what it misses, and its second process is one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import asyncxfer.testing
from asyncxfer import Agent, BackendError, PeerState, RegistrationError, TransferTimeout
from asyncxfer.testing import PeerProcess

WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
import asyncxfer.testing
print(asyncxfer.testing.PeerProcess.__name__)
try:
    asyncxfer.testing.BackendContract
except ImportError as error:
    print(error)
"""


def test_the_suite_says_what_it_misses_and_only_when_it_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True, timeout=60, check=True
    )
    name, message = done.stdout.splitlines()
    assert name == "PeerProcess"
    assert message.startswith("asyncxfer.testing.BackendContract needs pytest, which is not installed; ")
    assert message.endswith("`python -m pip install pytest pytest-asyncio` installs it")


def test_every_public_name_is_there() -> None:
    assert all(hasattr(asyncxfer.testing, name) for name in asyncxfer.testing.__all__)
    with pytest.raises(AttributeError, match=r"'asyncxfer.testing' has no attribute 'nothing'"):
        asyncxfer.testing.nothing  # noqa: B018


async def test_a_peer_in_another_process() -> None:
    async with PeerProcess("there", config={"notification_bytes": 100}) as process, Agent("here") as agent:
        peer = await agent.connect(process.metadata())
        assert (peer.name, peer.info.pid) == ("there", process.pid)
        await process.open("kv", (2, 4))
        await process.write("kv", b"12345678")
        assert await process.read("kv") == b"12345678"
        with pytest.raises(RegistrationError, match=r"in the second process: .*'kv' already"):
            await process.open("kv", (2, 4))
        with pytest.raises(TransferTimeout, match="in the second process"):
            await process.expect(b"tag", timeout=0.01)
        await peer.notify(b"tag")
        assert await process.expect(b"tag", then_read="kv", timeout=30) == b"12345678"
        assert (await process.stats())["regions"] == 1
        await process.renew()
        assert (await agent.connect(process.metadata())).regions == {}


async def test_a_process_that_is_killed_is_cleaned_up() -> None:
    async with PeerProcess() as process, Agent("here") as agent:
        events = agent.events()
        await agent.connect(process.metadata())
        process.send_signal(signal.SIGKILL)
        assert [(await anext(events)).state for _ in range(2)] == [PeerState.JOINED, PeerState.LOST]
        with pytest.raises(BackendError, match="the second process ended before it answered 'read'"):
            await process.read("kv")


async def test_a_process_that_does_not_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="the second process did not start an agent"):
        async with PeerProcess(backends=["no_such_module:Backend"]):
            pass
    assert "no_such_module" in capfd.readouterr().err
