"""``asyncxfer kvbench trace``: how much of a trace of requests a store serves, and how fast.

It opens the store that is asked for, lets `_replay` do its work, and puts what became of the requests into figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from asyncxfer import Agent, XferError, store
from asyncxfer.store import Store

from ._errors import KvbenchError
from ._quantities import percentiles
from ._replay import Replay, Served
from ._requests import Request, reusable

__all__ = ["Figures", "Options", "run", "to_json", "to_text"]

_WORD = 8


@dataclass(frozen=True, slots=True)
class Options:
    """A store, and how requests come.

    Attributes
    ----------
    block_bytes : int, bytes
    block_tokens : int
    place : str or None
        A directory or the URL of objects; None: a directory that is removed afterwards.
    budget : int or None, bytes
        Of what is kept there.
    objects : str or None
        A URL that makes the store one in tiers.
    memory : int, bytes
        Of its first tier.
    client : mapping of str to object
        Options for the client of the object store.
    speed : float
        Times as fast as they came.
    in_flight, window : int
        Requests at once, and blocks that each loads or stores in one call.
    """

    block_bytes: int
    block_tokens: int = 512
    place: str | None = None
    budget: int | None = None
    objects: str | None = None
    memory: int = 0
    client: Mapping[str, object] = field(default_factory=dict)
    speed: float = 1.0
    in_flight: int = 8
    window: int = 16


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a whole trace.

    Attributes
    ----------
    requests, blocks, tokens : int
    hits, hit_tokens : int
        Blocks and tokens of prefixes that the store had.
    reusable : int
        Blocks of prefixes that a store without a budget would have had, if no request overtook another.
    hit_rate : float
        Of the blocks.
    loaded_bytes, stored_bytes : int, bytes
    tiers : dict of str to int
        Blocks that came from each tier of a store in tiers.
    loading_ms : dict of str to float, milliseconds
        Percentiles of the time that requests with a hit spent on loading.
    waiting_ms : dict of str to float, milliseconds
        Of the time that all requests waited for room in the buffer before that.
    wrong : int
        Blocks that were not what they must be.
    """

    requests: int
    blocks: int
    tokens: int
    hits: int
    hit_tokens: int
    reusable: int
    hit_rate: float
    loaded_bytes: int
    stored_bytes: int
    tiers: dict[str, int]
    loading_ms: dict[str, float]
    waiting_ms: dict[str, float]
    wrong: int


async def run(requests: Sequence[Request], options: Options, progress: Callable[[str], None]) -> Figures:
    """Replay `requests`.

    Raises
    ------
    KvbenchError
        The store cannot be opened, or fails.
    """
    if options.block_bytes < _WORD or options.block_bytes % _WORD:
        raise KvbenchError(f"a block has {options.block_bytes} bytes; expected a multiple of {_WORD}")
    every = max(1, len(requests) // 10)

    def told(number: int) -> None:
        if number % every == 0:
            progress(f"{number:,} of {len(requests):,} requests")

    shape = (options.in_flight, options.window, options.block_bytes)
    try:
        async with (
            Agent("kvbench-trace") as agent,
            _opened(agent, options) as opened,
            agent.allocate(shape, np.uint8) as region,
        ):
            replay = Replay(opened, region, options.block_tokens)
            served = await replay.run(requests, speed=options.speed, progress=told)
    except (XferError, OSError, ExceptionGroup) as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, XferError | OSError):
            raise
        raise KvbenchError(f"{type(first).__name__}: {first}") from error
    return _figures(requests, served, replay, options)


@asynccontextmanager
async def _opened(agent: Agent, options: Options) -> AsyncIterator[Store]:
    with contextlib.ExitStack() as stack:
        place = options.place or stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncxfer-kvbench-"))
        if options.objects is None:
            async with store.open(
                place, agent=agent, block_bytes=options.block_bytes, budget=options.budget, options=options.client
            ) as opened:
                yield opened
            return
        tiered = store.tiered(
            agent=agent,
            memory=options.memory,
            disk=place,
            objects=options.objects,
            block_bytes=options.block_bytes,
            disk_budget=options.budget,
            options=options.client,
        )
        async with tiered as in_tiers:
            yield in_tiers


def _figures(requests: Sequence[Request], served: Sequence[Served], replay: Replay, options: Options) -> Figures:
    blocks, hits = sum(one.blocks for one in served), sum(one.hits for one in served)
    tiers = {tier.name.lower(): count for tier, count in sorted(replay.tiers.items())} if options.objects else {}
    return Figures(
        requests=len(served),
        blocks=blocks,
        tokens=sum(request.input_length for request in requests),
        hits=hits,
        hit_tokens=sum(one.hit_tokens for one in served),
        reusable=reusable(requests),
        hit_rate=hits / blocks,
        loaded_bytes=hits * options.block_bytes,
        stored_bytes=(blocks - hits) * options.block_bytes,
        tiers=tiers,
        loading_ms=percentiles([one.loading * 1e3 for one in served if one.hits]),
        waiting_ms=percentiles([one.waited * 1e3 for one in served]),
        wrong=replay.wrong,
    )


def to_text(figures: Figures) -> str:
    """The figures for people."""
    best = figures.reusable / figures.blocks
    tokens = f"{figures.hit_tokens:,} of {figures.tokens:,} tokens"
    lines = [
        f"{figures.requests:,} requests: {figures.hits:,} of {figures.blocks:,} blocks were there, {tokens}",
        f"hit rate {figures.hit_rate:.3f}; a store that keeps everything: {best:.3f}",
        f"loaded {figures.loaded_bytes:,} B, stored {figures.stored_bytes:,} B",
        "loading KV, of requests with hits: " + _milliseconds(figures.loading_ms),
        "waiting for room before that, of all: " + _milliseconds(figures.waiting_ms),
        f"{figures.wrong} blocks were wrong" if figures.wrong else "every block that was loaded: verified",
    ]
    if figures.tiers:
        found = ", ".join(f"{count:,} from {tier}" for tier, count in figures.tiers.items())
        lines.insert(2, f"blocks by tier: {found}")
    return "\n".join(lines)


def _milliseconds(of: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} ms" for name, value in of.items())


def to_json(figures: Figures) -> str:
    """The same for programs."""
    return json.dumps(dataclasses.asdict(figures), indent=2)
