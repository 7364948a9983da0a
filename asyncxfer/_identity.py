"""Who this is: the host, the process, and which start of an agent; how others tell a restart from a reconnect."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

__all__ = ["after_fork", "host", "next_generation", "process"]

_process = os.urandom(16)
_last_generation = 0


def process() -> bytes:
    """Random, and the same as long as this process lives: 16 bytes."""
    return _process


def host() -> bytes:
    """The same for all processes of one booted kernel: 16 bytes."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def next_generation() -> int:
    """Larger than any before: the clock in nanoseconds, or one more where it stood still."""
    global _last_generation
    _last_generation = max(time.time_ns(), _last_generation + 1)
    return _last_generation


def after_fork() -> None:
    """In a child: another process."""
    global _process
    _process = os.urandom(16)
