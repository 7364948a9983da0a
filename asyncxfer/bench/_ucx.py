"""What ours and every other system may use in a run over UCX: transports, devices, and who drives UCX.

Ours is told by its configuration, the others by UCX's own environment variables, so that all of them have the same
transports. Nothing here starts a process, loads UCX or knows a case.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._side import Message

__all__ = [
    "DEFAULT_TRANSPORTS",
    "INSTALL",
    "Progress",
    "Ucx",
    "config",
    "environment",
    "installed_versions",
    "is_installed",
]

Progress = Literal["loop", "thread"]

DEFAULT_TRANSPORTS = "tcp,cma,posix"
INSTALL = "pip install 'asyncxfer[ucx-cu12]'"

#: The network devices of every run: UCX's tcp asks nobody who they are, so it stays on this machine.
_DEVICES = "lo"


@dataclass(frozen=True, slots=True)
class Ucx:
    """What a run over UCX covers.

    Attributes
    ----------
    transports : str
        As ``UCX_TLS`` names them.
    progress : sequence of {"loop", "thread"}
        Who drives UCX in ours; with several, each runs, and the first is what ratios are of.
    workers : int
        UCX workers of an agent of ours.
    """

    transports: str = DEFAULT_TRANSPORTS
    progress: Sequence[Progress] = ("loop",)
    workers: int = 1

    def for_ours(self, progress: Progress) -> Message:
        """What a worker of ours has to know of it."""
        return {"transports": self.transports, "workers": self.workers, "progress": progress}

    def for_others(self) -> Message:
        """What a worker of another system has to know of it."""
        return {"transports": self.transports}


def is_installed() -> bool:
    """Whether the package is there that the backend ucx needs."""
    return importlib.util.find_spec("ucxx") is not None


def installed_versions() -> dict[str, str | None]:
    """The versions of ucxx and of the UCX that comes with it, as their packages say."""
    return {name: _version(name) for name in ("ucxx", "libucx")}


def _version(name: str) -> str | None:
    for cuda in ("cu12", "cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(f"{name}-{cuda}")
    return None


def config(options: Message) -> dict[str, Any]:
    """The configuration of an agent of ours that was told `options`."""
    return {
        "ucx_transports": options["transports"],
        "ucx_devices": _DEVICES,
        "ucx_workers": options["workers"],
        "ucx_progress": options["progress"],
    }


def environment(transports: str) -> dict[str, str]:
    """What keeps any program that uses UCX to `transports`."""
    return {"UCX_TLS": transports, "UCX_NET_DEVICES": _DEVICES}
