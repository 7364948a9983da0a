"""``region.objects.upload`` of a backend that knows no parts; what others do is in the contract of objects."""

from __future__ import annotations

import pytest
from object_backend import MemBackend

from asyncxfer import Agent, BackendError


async def test_a_backend_may_know_no_parts() -> None:
    async with Agent("a", backends=["local", MemBackend]) as agent, agent.open("mem://bucket", "w") as objects:
        with pytest.raises(BackendError, match="not part by part"):
            async with objects.objects.upload("key"):
                pytest.fail("it began")
