"""Hosts for tests: network namespaces on one switch, whose cables lose, delay, break and mend at a word.

Every host has a cable to the switch, which is a namespace too; so has this process, whose own namespace is left as it
is but for the end of that cable. Hosts run no code of ours: a test runs programs on them, opens sockets on them from
here, or has a `peers.Process` live on one. Root and Debian's iproute2 are needed; `missing` says what is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import slow_cable

__all__ = ["Host", "Hosts", "enter", "hosts_fixture", "missing"]

_NAMESPACES = Path("/run/netns")
_PREFIX = "axf-"
_CLONE_NEWNET = 0x40000000
_SUBNETS = 200
# What the switch runs for a packet, as `tc` takes classic BPF: how many instructions, and each as code, two jumps and a
# number. It passes a packet (0) or drops it (2), in the third case where a random word is below a number.
_LET_PASS = "1,6 0 0 0"
_DROP = "1,6 0 0 2"
_DROP_SOME = "4,32 0 0 4294963256,53 0 1 {},6 0 0 0,6 0 0 2"

_count = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: str) -> None:
    """Take the calling thread, and what it starts from now on, into a network namespace."""
    fd = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_namespace(fd)
    finally:
        os.close(fd)


def _set_namespace(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def _do(*command: str, lines: Sequence[str] = ()) -> None:
    """Run a tool of iproute2, with commands on its standard input if there are any.

    Raises
    ------
    RuntimeError
        It failed; with what it said.
    """
    text = "".join(f"{line}\n" for line in lines)
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr.strip()}; standard input: {lines}")


def _in(namespace: str | None) -> tuple[str, ...]:
    return () if namespace is None else ("-n", namespace)


@functools.cache
def missing() -> str:
    """Why there can be no hosts here, found by making some; or nothing."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"hosts need {' and '.join(absent)}: apt-get install iproute2"
    try:
        with Hosts(1) as hosts:
            hosts[0].loss(1)
            hosts[0].limit(1000)
            hosts[0].delay(1)
    except RuntimeError as error:
        return f"hosts cannot be made here: {error}"
    return ""


class Host:
    """One end of a cable to the switch, and the namespace it is in.

    What is done to a cable is done to it both ways: a delay of 10 ms adds 20 ms to a round trip.

    Attributes
    ----------
    namespace : str or None
        None for the namespace of this process.
    device, port : str
        The cable's end here and in the switch.
    ipv4, ipv6 : str
        Addresses.
    """

    def __init__(self, namespace: str | None, device: str, ipv4: str, ipv6: str, *, switch: str, port: str) -> None:
        self.namespace = namespace
        self.device = device
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self._switch = switch
        self.port = port
        self._loss = 0.0
        self._parted = False
        self._limited = False
        self._slow: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Host {self.namespace or 'here'} {self.ipv4} {self.ipv6}>"

    def run(self, *command: str) -> tuple[str, ...]:
        """`command` as it has to be started to run on this host."""
        return command if self.namespace is None else ("ip", "netns", "exec", self.namespace, *command)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Open a socket of this process on this host."""
        if self.namespace is None:
            return socket.socket(family, kind)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(self.namespace)
            try:
                return socket.socket(family, kind)
            finally:
                _set_namespace(home)
        finally:
            os.close(home)

    # -- its cable

    def loss(self, percent: float) -> None:
        """Lose this share of the packets, drawn by lot; 0 loses none."""
        self._loss = percent
        self._lose()

    def partition(self) -> None:
        """Lose every packet in silence, until `heal`."""
        self._parted = True
        self._lose()

    def heal(self) -> None:
        """End a partition; other faults stay."""
        self._parted = False
        self._lose()

    def _lose(self) -> None:
        """Have the switch judge every packet of this cable, coming and going."""
        percent = 100.0 if self._parted else self._loss
        program = _LET_PASS
        if percent > 0:
            program = _DROP if percent >= 100 else _DROP_SOME.format(int(percent / 100 * 2**32))
        judge = f'prio 1 handle 1 bpf da bytecode "{program}"'
        lines = [f"qdisc replace dev {self._plug} clsact"]
        lines += [f"filter replace dev {self._plug} {way} {judge}" for way in ("ingress", "egress")]
        _do("tc", *_in(self._switch), "-batch", "-", lines=lines)

    @property
    def _plug(self) -> str:
        """The device that the bridge has of this cable."""
        return self.port if self._slow is None else f"{self.port}-y"

    def limit(self, megabits: float) -> None:
        """Carry no more than this in a second; 0 is no limit."""
        for namespace, device in ((self.namespace, self.device), (self._switch, self.port)):
            line = f"qdisc del dev {device} root"
            if megabits:
                line = f"qdisc replace dev {device} root tbf rate {megabits}mbit burst 128kb latency 200ms"
            elif not self._limited:
                return
            _do("tc", *_in(namespace), "-batch", "-", lines=[line])
        self._limited = bool(megabits)

    def delay(self, milliseconds: float) -> None:
        """Hold each packet back for so long; 0 holds none back. What is under way at the change is lost."""
        if self._slow is not None:
            self.unplug()
            lines = [f"link delete {self.port}-x", f"link set {self.port} master bridge"]
            _do("ip", "-n", self._switch, "-batch", "-", lines=lines)
        if milliseconds:
            lines = [f"link set {self.port} nomaster"]
            lines += [f"link add {self.port}-x mtu 65535 type veth peer name {self.port}-y mtu 65535"]
            lines += [f"link set {self.port}-x up", f"link set {self.port}-y master bridge up"]
            _do("ip", "-n", self._switch, "-batch", "-", lines=lines)
            program = (sys.executable, slow_cable.__file__, self.port, f"{self.port}-x", str(milliseconds / 1e3))
            command = ("ip", "netns", "exec", self._switch, *program)
            self._slow = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert self._slow.stdout is not None
            if not self._slow.stdout.readline():
                raise RuntimeError(f"{' '.join(command)} did not start; its error is above")
        self._lose()

    def mtu(self, nbytes: int) -> None:
        """Set the largest packet of the cable."""
        for namespace, device in ((self.namespace, self.device), (self._switch, self.port)):
            _do("ip", *_in(namespace), "link", "set", device, "mtu", str(nbytes))

    def unplug(self) -> None:
        """End what runs for this cable, before its devices go."""
        if self._slow is not None:
            with self._slow as process:
                process.kill()
            self._slow = None

    def cut(self) -> None:
        """Pull the cable out of the switch; the host sees that it has no carrier."""
        _do("ip", "-n", self._switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _do("ip", "-n", self._switch, "link", "set", self.port, "up")


class Hosts:
    """`count` hosts on a switch, and this process's own cable to it, for as long as the ``with`` block runs.

    Attributes
    ----------
    here : Host
        This process's end; its addresses can be listened on and connected to from every host.
    """

    here: Host

    def __init__(self, count: int = 2) -> None:
        self._name = f"{_PREFIX}{os.getpid()}-{next(_count)}"
        self._switch = f"{self._name}-switch"
        self._hosts: list[Host] = []
        self._wanted = count

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def __enter__(self) -> Self:
        _remove_what_the_dead_left()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        names = [f"{self._name}-{number}" for number in range(self._wanted)]
        _do("ip", "-batch", "-", lines=[f"netns add {name}" for name in (self._switch, *names)])
        device, subnet = self._plug_in()
        self.here = self._host(None, device, "port", subnet, 1)
        self._hosts = [self._host(name, "eth0", f"port{k}", subnet, k + 2) for k, name in enumerate(names)]
        lines = ["link add bridge type bridge stp_state 0 mcast_snooping 0", "link set bridge up"]
        lines += [f"link add {host.port} type veth peer name eth0 netns {host.namespace}" for host in self._hosts]
        lines += [f"link set {host.port} master bridge up" for host in (self.here, *self._hosts)]
        _do("ip", "-n", self._switch, "-batch", "-", lines=lines)
        for host in (self.here, *self._hosts):
            lines = [] if host is self.here else ["link set lo up"]
            lines += [f"addr add {host.ipv4}/24 dev {host.device}", f"addr add {host.ipv6}/64 dev {host.device} nodad"]
            _do("ip", *_in(host.namespace), "-batch", "-", lines=[*lines, f"link set {host.device} up"])

    def _plug_in(self) -> tuple[str, int]:
        """Make this process's cable: its device, and a subnet that is its own because the device is named after it."""
        for subnet in range(_SUBNETS):
            device = f"{_PREFIX}{subnet}"
            if device in (name for _, name in socket.if_nameindex()):
                continue
            try:
                _do("ip", "link", "add", device, "type", "veth", "peer", "name", "port", "netns", self._switch)
            except RuntimeError:
                if device in (name for _, name in socket.if_nameindex()):
                    continue  # another process was faster
                raise
            return device, subnet
        raise RuntimeError(f"all of 10.77.0.0/24 to 10.77.{_SUBNETS - 1}.0/24 are taken; see `ip link`")

    def _host(self, namespace: str | None, device: str, port: str, subnet: int, number: int) -> Host:
        ipv4, ipv6 = f"10.77.{subnet}.{number}", f"fd77:0:0:{subnet:x}::{number:x}"
        return Host(namespace, device, ipv4, ipv6, switch=self._switch, port=port)

    def _remove(self) -> None:
        for host in self._hosts:
            host.unplug()
        if hasattr(self, "here"):
            self.here.unplug()
            # The kernel takes its time with a namespace; the device, which others count, is gone at once.
            _do("ip", "link", "delete", self.here.device)
            del self.here
        self._hosts = []
        _remove(name for name in _made() if name.startswith(f"{self._name}-"))


def _made() -> list[str]:
    return [path.name for path in _NAMESPACES.glob(f"{_PREFIX}*")]


def _remove(names: Iterable[str]) -> None:
    for name in names:
        # Two runs that begin at once may both remove what a third has left.
        with contextlib.suppress(RuntimeError):
            _do("ip", "netns", "delete", name)


def _remove_what_the_dead_left() -> None:
    """Remove the hosts of test runs that were killed; their names tell whose they were."""
    _remove(name for name in _made() if not Path("/proc", name.split("-")[1]).exists())


@pytest.fixture(name="hosts")
def hosts_fixture(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts, or as many as the test's indirect parameter says."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(getattr(request, "param", 2)) as hosts:
        yield hosts
