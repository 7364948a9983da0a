"""A cable that takes its time: carries frames between two devices, each after a delay, until it is killed.

A program of its own, which `hosts.Host.delay` starts in the switch as ``python slow_cable.py DEVICE DEVICE SECONDS``,
because not every kernel can delay packets itself. Frames go as the kernel has them, large ones unsegmented and
checksums uncomputed; what the two devices are joined to is not known here.
"""

from __future__ import annotations

import collections
import ctypes
import select
import signal
import socket
import sys
import time

__all__: list[str] = []

_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_FRAME = 1 << 17
#: Bytes on their way in one direction; what comes on top is lost, as in any queue.
_MOST = 64 << 20
_SO_RCVBUFFORCE = 33
_PR_SET_PDEATHSIG = 1


def _open(device: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
    sock.bind((device, _ETH_P_ALL))
    return sock


class _Direction:
    def __init__(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        self.source = source
        self._target = target
        self._delay = delay
        self._held: collections.deque[tuple[float, bytes]] = collections.deque()
        self._nbytes = 0

    def take(self) -> None:
        while True:
            try:
                frame = self.source.recv(_FRAME)
            except BlockingIOError:
                return
            except OSError:  # the device was taken down; it is up again, or this process dies with it
                return
            if self._nbytes + len(frame) <= _MOST:
                self._held.append((time.monotonic() + self._delay, frame))
                self._nbytes += len(frame)

    def give(self) -> float | None:
        """Send what is due; how long until more is."""
        while self._held:
            wait = self._held[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, frame = self._held.popleft()
            self._nbytes -= len(frame)
            try:
                self._target.send(frame)
            except OSError:  # a full queue or a device that is down: lost, as on any cable
                continue
        return None


def main(first: str, second: str, delay: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    one, two = _open(first), _open(second)
    directions = [_Direction(one, two, float(delay)), _Direction(two, one, float(delay))]
    sys.stdout.write("ready\n")
    sys.stdout.close()
    waits: list[float] = []
    while True:
        ready, _, _ = select.select([one, two], [], [], min(waits, default=None))
        for direction in directions:
            if direction.source in ready:
                direction.take()
        waits = [wait for direction in directions if (wait := direction.give()) is not None]


if __name__ == "__main__":
    main(*sys.argv[1:])
