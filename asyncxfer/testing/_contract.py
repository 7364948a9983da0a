"""The contract of a backend, as a class of tests to be subclassed: its hooks, and the tests of three themes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar

import pytest

from asyncxfer import Agent
from asyncxfer.abc import Backend

from ._ending import Ending
from ._moving import Moving
from ._stage import Stage
from ._target import AgentTarget, Target
from ._telling import Telling

__all__ = ["BackendContract"]


class BackendContract(Moving, Telling, Ending):
    """Tests that every backend passes; subclass it, say what is to be tested, and run pytest.

    Each test sets up an agent and a peer, forces the route under test, and compares every byte with a model. Needs
    pytest-asyncio, in any mode.

    Attributes
    ----------
    route : str
        What the tests force with `backend=`: a backend's name, or ``"name:via"`` for one of its ways. Required.
    shared : bool
        Regions come from `Agent.allocate`, which peers of this host can map; otherwise they are ordinary arrays.
    checksum : bool
        Every transfer is verified at its destination.
    options : mapping of str to object
        What both agents are made with besides: `listen`, `credentials`, `config`.
    skips : mapping of str to str
        Capabilities that the backend has not, and why: ``"cancel"`` (transfers can be ended early), ``"timeout"``
        (and are, when their time is over), ``"revoke"`` (the peer may take a region back, or leave, under them),
        ``"count"`` (the peer can tell what was moved to and from it), ``"notify"`` (and hear of it), ``"grant"`` (and
        say who may do so), ``"leave"`` (and be left).

    Examples
    --------
    ::

        class TestMyBackend(BackendContract):
            route = "mine"

            def backends(self):
                return [MyBackend]
    """

    pytestmark = pytest.mark.asyncio

    route: ClassVar[str] = ""
    shared: ClassVar[bool] = False
    checksum: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {}
    skips: ClassVar[Mapping[str, str]] = {}

    def backends(self) -> Iterable[str | type[Backend] | Backend] | None:
        """Give what both agents are made with; None for all that load."""
        return None

    @contextlib.asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        """Run the other side; a `PeerProcess` for a backend between processes. By default an agent of this one."""
        async with Agent("target", backends=self.backends(), **self.options) as agent:
            yield AgentTarget(agent)

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Stage]:
        """Set up one test."""
        assert self.route, f"{type(self).__name__}.route: expected the name of the backend under test"
        async with (
            self.target() as target,
            Agent("initiator", backends=self.backends(), **self.options) as agent,
        ):
            peer = await agent.connect(target.metadata())
            yield Stage(agent, peer, target, self.route, self.shared, self.checksum)

    def need(self, capability: str) -> None:
        """Skip the test when the backend has not what it is about."""
        if capability in self.skips:
            pytest.skip(f"{self.route} does not {capability}: {self.skips[capability]}")
