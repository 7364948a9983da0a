"""The hosts that tests use: each fault does what it is said to do, shown with plain sockets, and nothing is left."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts as hosts_module
import pytest
from hosts import Host, Hosts, missing
from peers import Process, Server
from stage import Cast

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
Ends = tuple[socket.socket, socket.socket]
DATA = bytes(range(256)) * (4 << 12)  # 4 MiB


def address(host: Host, family: int = socket.AF_INET) -> str:
    return host.ipv4 if family == socket.AF_INET else host.ipv6


@contextlib.contextmanager
def connected(client: Host, server: Host, family: int = socket.AF_INET) -> Iterator[Ends]:
    """Both ends of a TCP connection between two hosts."""
    with server.socket(family) as listener, client.socket(family) as near:
        listener.bind((address(server, family), 0))
        listener.listen()
        listener.settimeout(10)
        near.settimeout(10)
        near.connect(listener.getsockname()[:2])
        far, _ = listener.accept()
        with far:
            far.settimeout(10)
            yield near, far


@contextlib.contextmanager
def datagrams(client: Host, server: Host) -> Iterator[Ends]:
    """A socket that sends datagrams to another on another host, once a first one has come through."""
    with server.socket(kind=socket.SOCK_DGRAM) as far, client.socket(kind=socket.SOCK_DGRAM) as near:
        far.bind((server.ipv4, 0))
        far.settimeout(10)
        near.connect(far.getsockname())
        near.send(b"first")
        assert far.recv(100) == b"first"
        yield near, far


def carry(near: socket.socket, far: socket.socket, data: bytes) -> None:
    """Send `data`, and see that it arrives as it was."""
    near.setblocking(False)
    sent, got = 0, bytearray()
    while len(got) < len(data):
        readable, writable, _ = select.select([far], [near] if sent < len(data) else [], [], 10)
        assert readable or writable, f"{len(got)} bytes have arrived, then none for 10 s"
        if writable:
            sent += near.send(data[sent : sent + (1 << 20)])
        if readable:
            got += far.recv(1 << 20)
    assert got == data


def count(far: socket.socket, last: bytes) -> int:
    """How many datagrams come before `last`."""
    number = 0
    while far.recv(100) != last:
        number += 1
    return number


# ---- the network --------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_every_host_reaches_every_other(hosts: Hosts, family: int) -> None:
    everyone = [hosts.here, *hosts]
    assert len({address(host, family) for host in everyone}) == 4
    for client in everyone:
        for server in everyone:
            with connected(client, server, family) as (near, far):
                assert ipaddress.ip_address(near.getsockname()[0]) == ipaddress.ip_address(address(client, family))
                carry(near, far, b"hello")


def test_networks_are_apart(hosts: Hosts) -> None:
    with Hosts(1) as others:
        assert others.here.ipv4 != hosts.here.ipv4
        with others[0].socket() as sock, pytest.raises(OSError, match="unreachable"):
            sock.connect((hosts[0].ipv4, 1))


def test_a_program_runs_on_a_host(hosts: Hosts) -> None:
    shown = subprocess.run(hosts[1].run("ip", "-brief", "addr"), capture_output=True, text=True, check=True).stdout
    assert hosts[1].ipv4 in shown
    assert hosts[0].ipv4 not in shown
    assert hosts.here.run("true") == ("true",)


def test_a_socket_on_a_host_leaves_this_thread_where_it_is(hosts: Hosts) -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with hosts[0].socket() as sock:
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
        with pytest.raises(OSError, match="Cannot assign"):
            sock.bind((hosts.here.ipv4, 0))


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
def test_loss_both_ways(hosts: Hosts, slow: bool) -> None:
    a, b = hosts
    if slow:
        a.delay(1)
    for client, server in ((a, b), (b, a)):
        with datagrams(client, server) as (near, far):
            a.loss(50)
            got = 0
            for _ in range(100):
                near.send(b"maybe")
                while select.select([far], [], [], 0.005 if slow else 0)[0]:
                    got += far.recv(100) == b"maybe"
            assert 15 < got < 85
            a.loss(0)
            for _ in range(100):
                near.send(b"surely")
            near.send(b"last")
            assert count(far, b"last") >= 100


@FAMILIES
def test_tcp_survives_loss(hosts: Hosts, family: int) -> None:
    with connected(hosts[0], hosts[1], family) as (near, far):
        hosts[1].loss(2)
        carry(near, far, DATA)


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
def test_partition_and_heal(hosts: Hosts, slow: bool) -> None:
    a, b = hosts
    if slow:
        a.delay(1)
    with datagrams(a, b) as (near, far), datagrams(b, a) as (back, front), connected(a, b) as (client, server):
        with datagrams(hosts.here, b) as (other, aside):
            a.partition()
            near.send(b"lost")
            back.send(b"lost")
            client.send(b"kept")
            other.send(b"others are not concerned")
            assert aside.recv(100) == b"others are not concerned"
        if slow:
            time.sleep(0.05)  # a partition that a datagram outlives on a slow cable does not stop it
        a.heal()
        near.send(b"heard")
        back.send(b"heard")
        assert (far.recv(100), front.recv(100)) == (b"heard", b"heard")
        assert server.recv(100) == b"kept"  # TCP tried again


def test_healing_leaves_other_faults(hosts: Hosts) -> None:
    with datagrams(*hosts) as (near, far):
        hosts[1].loss(50)
        hosts[1].partition()
        hosts[1].heal()
        for _ in range(200):
            near.send(b"maybe")
        hosts[1].loss(0)
        near.send(b"last")
        assert 40 < count(far, b"last") < 160


def test_cut_and_mend(hosts: Hosts) -> None:
    a, b = hosts

    def carrier() -> bool:
        shown = subprocess.run(a.run("ip", "link", "show", "eth0"), capture_output=True, text=True, check=True).stdout
        return "NO-CARRIER" not in shown

    with datagrams(a, b) as (near, far), connected(a, b, socket.AF_INET6) as (client, server):
        assert carrier()
        a.cut()
        assert not carrier()
        near.send(b"kept until the carrier is back, or lost")
        client.send(b"kept")
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)
        a.mend()
        assert carrier()
        assert server.recv(100) == b"kept"


def test_mtu(hosts: Hosts) -> None:
    def segment() -> int:
        with connected(*hosts) as (near, far):
            carry(near, far, DATA)
            return near.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    assert 1400 < segment() < 1500
    for host in hosts:
        host.mtu(9000)
    assert 8900 < segment() < 9000
    hosts[1].mtu(1280)
    assert 1200 < segment() < 1280


def test_delay_both_ways(hosts: Hosts) -> None:
    a, b = hosts
    a.delay(20)
    with connected(a, b) as (near, far):
        start = time.monotonic()
        carry(near, far, b"there")
        carry(far, near, b"and back")
        assert time.monotonic() - start >= 0.04
        carry(near, far, DATA)
    a.delay(0)
    with connected(a, b, socket.AF_INET6) as (near, far):
        carry(near, far, DATA)
    with connected(b, hosts.here) as (near, far):
        hosts.here.delay(1)  # under a connection
        carry(near, far, DATA)


def test_limit(hosts: Hosts) -> None:
    a, b = hosts
    a.limit(16)
    with connected(a, b) as (near, far):
        start = time.monotonic()
        carry(near, far, DATA[: 1 << 20])
        assert time.monotonic() - start >= 0.3  # half a second, less the burst that it begins with
        a.limit(0)
        carry(near, far, DATA)


# ---- processes ----------------------------------------------------------------------------------------------------


async def test_a_process_lives_on_a_host_and_hears_through_any_fault(cast: Cast, hosts: Hosts) -> None:
    process = cast.spawn(hosts[0])
    hosts[0].partition()
    hosts[0].cut()
    metadata = await process.call("start", "there", {"suspect_after": 5.0}, backends=["shm"])
    assert b"there" in metadata
    assert hosts[0].namespace is not None
    assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(Path("/run/netns", hosts[0].namespace)).st_ino
    await process.call("region", "far", "mapped", (4, 1024), seed=2)
    assert await process.call("matches", "far", 2)


async def test_a_host_that_is_gone_is_told(server: Server, hosts: Hosts) -> None:
    gone = Host("axf-none", "eth0", "", "", switch="", port="")
    process = Process(server, "asyncio", gone)
    with pytest.raises(ConnectionError):
        await process.call("start", "there")
    await process.release()


# ---- what is left -------------------------------------------------------------------------------------------------


def test_nothing_is_left() -> None:
    if reason := missing():
        pytest.skip(reason)
    with Hosts() as hosts:
        hosts[0].delay(1)
        hosts.here.delay(1)
        mine = f"axf-{os.getpid()}-"
        assert any(name.startswith(mine) for name in os.listdir("/run/netns"))
        device = hosts.here.device
    assert not any(name.startswith(mine) for name in os.listdir("/run/netns"))
    assert device not in [name for _, name in socket.if_nameindex()]


def test_what_a_killed_run_left_is_removed() -> None:
    if reason := missing():
        pytest.skip(reason)
    program = """if True:
        import os, signal, hosts
        hosts.Hosts().__enter__()
        print(*[name for name in os.listdir("/run/netns") if name.startswith(f"axf-{os.getpid()}-")], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(hosts_module.__file__).parent,
        stdout=subprocess.PIPE, text=True, timeout=20, check=False,
    )  # fmt: skip
    theirs = set(ran.stdout.split())
    assert (ran.returncode, len(theirs)) == (-signal.SIGKILL, 3)
    with Hosts(1):
        assert theirs.isdisjoint(os.listdir("/run/netns"))


@pytest.mark.parametrize(
    ("lacks", "says"), [("root", "need root"), ("tools", "apt-get install iproute2"), ("rights", "cannot be made here")]
)
def test_why_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: str, says: str) -> None:
    if lacks == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    elif os.geteuid() != 0:
        pytest.skip("what root may lack is seen by root only")
    else:
        if lacks == "rights":
            for tool in ("ip", "tc"):
                (tmp_path / tool).write_text("#!/bin/sh\necho no >&2\nexit 1\n")
                (tmp_path / tool).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    assert says in missing.__wrapped__()
