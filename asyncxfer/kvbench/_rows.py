"""What one rank keeps of a prompt, as rows of a transfer: how many of which length.

It knows layers and pages, and the shapes that benchmarks of transfers take; nothing is moved here.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from asyncxfer.bench._shapes import Shape

from ._layers import Format
from ._sizes import Asked, Stage

__all__ = ["Layout", "shapes_of"]

Layout = Literal["layer", "block"]


def shapes_of(stage: Stage, form: Format, asked: Asked, layout: Layout) -> list[Shape]:
    """The rows of a prompt on one rank of a stage, largest first.

    Parameters
    ----------
    stage : Stage
    form : Format
    asked : Asked
    layout : {"layer", "block"}
        How the cache lies in memory. By layer, a row is a page of one layer, as engines allocate them. By block, it is
        a page of all layers that keep the same pages, as stores like them. States are a row a layer, or one for all.
    """
    lengths: Counter[int] = Counter()
    together: Counter[int] = Counter()
    states = 0
    for cache in stage.caches:
        pages = cache.pages(asked.isl, asked.page_size, form)
        page_bytes = asked.page_size * cache.token_bytes(asked.tp, form)
        state = cache.state_bytes(asked.tp, form)
        lengths[page_bytes] += pages
        lengths[state] += 1
        together[pages] += page_bytes
        states += state
    if layout == "block":
        lengths = Counter()
        for pages, length in together.items():
            lengths[length] += pages
        lengths[states] += 1
    return [Shape(rows, length) for length, rows in sorted(lengths.items(), reverse=True) if rows and length]
