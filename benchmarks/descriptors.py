"""What descriptor lists cost, in nanoseconds a row: ``python benchmarks/descriptors.py [rows]``.

Every figure is the best of several runs and includes allocating the result. "Scattered" blocks come in random
order, so that nothing merges; "in order" everything does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from asyncxfer._descriptors import DescriptorList, Indexable, Layout
from asyncxfer._fast import descriptors as fast

LAYERS, BLOCK = 32, 4096
REPEATS = 9


class Region(Indexable):
    def __init__(self, layout: Layout) -> None:
        self.layout = layout


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report(name: str, rows: int, call: Callable[[], object], target: float | None = None) -> None:
    cost = best(call) / rows * 1e9
    goal = "" if target is None else f"   target {target:g}: {'met' if cost <= target else 'MISSED'}"
    print(f"{name:<44}{cost:8.2f} ns a row{goal}")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    blocks = rows // LAYERS
    rows = blocks * LAYERS
    region = Region(Layout.of((LAYERS, blocks, BLOCK // 2), 2))
    scattered = np.random.default_rng(0).permutation(blocks)
    mixed, in_order = region[:, scattered], region[:, np.arange(blocks)]
    table = mixed.rows()
    shuffled = DescriptorList(region, fast.select(mixed.runs, np.random.default_rng(1).permutation(rows)))

    print(f"{rows:,} rows of {BLOCK} bytes\n")
    report("region[:, ids]", rows, lambda: region[:, scattered], 10)
    report("region.rows(table), checked", rows, lambda: region.rows(table), 10)
    report("merge, in order", rows, lambda: fast.merge(in_order.runs), 5)
    report("merge, scattered", rows, lambda: fast.merge(mixed.runs), 5)
    report("pair and merge, in order", rows, lambda: fast.pair(in_order.runs, in_order.runs), 5)
    report("pair and merge, scattered", rows, lambda: fast.pair(mixed.runs, in_order.runs))
    report("check", rows, lambda: fast.check(mixed.runs, region.layout.sizes))
    report("measure", rows, lambda: fast.measure(mixed.runs))
    report("fold, in order", rows, lambda: fast.fold(in_order.runs))
    report("fold, scattered", rows, lambda: fast.fold(mixed.runs))
    report("split in four", rows, lambda: fast.split(mixed.runs, BLOCK // 4))
    report("select, in order", rows, lambda: fast.select(mixed.runs, np.arange(rows)))
    report("sort, in order", rows, lambda: fast.sort(in_order.runs))
    report("sort, shuffled", rows, lambda: fast.sort(shuffled.runs))

    print("\nshort lists, a call")
    ids, one = np.array([3, 7, 9]), region[0, 0]
    calls: list[tuple[str, Callable[[], object]]] = [
        ("region[:, three ids]", lambda: region[:, ids]),
        ("region[layer, block]", lambda: region[3, 7]),
        ("region.bytes[a:b]", lambda: region.bytes[0:4096]),
        ("pair of one row", lambda: fast.pair(one.runs, one.runs)),
    ]
    for name, call in calls:
        print(f"{name:<44}{best(lambda call=call: [call() for _ in range(1000)]) * 1e3:8.2f} µs")  # type: ignore[misc]


if __name__ == "__main__":
    main()
