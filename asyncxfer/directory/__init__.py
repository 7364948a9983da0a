"""Directories: where agents publish how they are reached, and find each other by name.

A directory maps a name to the metadata bytes of the agent that holds it now. It does not look into them.
"""

from __future__ import annotations

from .._errors import ConfigError
from ._base import Directory
from ._inprocess import InProcessDirectory
from ._inprocess import forget_all as forget_agents

__all__ = ["Directory", "InProcessDirectory", "forget_agents", "open_directory"]


def open_directory(address: str | Directory | None) -> Directory:
    """Return the directory for what was given to `Agent`.

    Parameters
    ----------
    address : str, Directory or None
        None: the directory of this process.

    Raises
    ------
    ConfigError
        There is no directory of that kind.
    """
    if address is None:
        return InProcessDirectory()
    if isinstance(address, Directory):
        return address
    raise ConfigError(
        f"directory {address!r} is of no kind that this version has; expected None (agents of this process), or an "
        "object with the methods of asyncxfer.directory.Directory. Between processes, carry `agent.metadata()` over "
        "a channel of your own and give it to `connect`"
    )
