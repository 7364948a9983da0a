"""Tensors of torch as regions, moved and checked; torch is not a dependency, so these are skipped where it is not."""

from __future__ import annotations

from typing import Any

import pytest

from asyncxfer import Agent


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed; pip install torch")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "int64"])
async def test_tensors_are_moved(torch: Any, dtype: str) -> None:
    source = torch.arange(256).reshape(8, 32).to(getattr(torch, dtype))
    target = torch.zeros_like(source)
    async with Agent("a") as a, Agent("b") as b, a.register(source) as region, b.register(target, name="kv"):
        peer = await a.connect("b")
        assert (peer["kv"].dtype, peer["kv"].shape) == (dtype, (8, 32))
        await a.put(region[::2], peer["kv"][:4])
        assert torch.equal(target[:4].view(torch.uint8), source[::2].contiguous().view(torch.uint8))
        await a.put(region.of([source[1], source[7]]), peer["kv"][4:6])
        assert torch.equal(target[4:6].view(torch.uint8), source[[1, 7]].view(torch.uint8))


async def test_lists_of_tensors_are_one_region(torch: Any) -> None:
    layers = [torch.full((4, 8), float(n)) for n in range(3)]
    copies = [torch.zeros(4, 8) for _ in range(3)]
    async with Agent("a") as agent, agent.register(layers) as here, agent.register(copies) as there:
        assert here.shape == (3, 4, 8)
        await agent.put(here[:, [0, 2]], there[:, 1:3])
    assert all(torch.equal(copy[1:3], layer[[0, 2]]) for copy, layer in zip(copies, layers, strict=True))
    assert not any(copy[0].any() for copy in copies[1:])
