"""``asyncxfer kvbench traffic``: what transfers take beside others, against what they take alone.

Each transfer is moved by itself first; then all ranks go through all steps at the same time. It commands ranks and puts
their figures side by side.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ._pattern import Step, Traffic, Transfer
from ._ranks import Ranks

__all__ = ["Latency", "Outcome", "run", "to_json", "to_text"]


@dataclass(frozen=True, slots=True)
class Latency:
    """One transfer.

    Attributes
    ----------
    step : str
    source, target : int
    nbytes : int, bytes
    isolated : float, seconds
        Median, with nothing else going on.
    contended : float, seconds
        Median, with all steps going on.
    """

    step: str
    source: int
    target: int
    nbytes: int
    isolated: float
    contended: float

    @property
    def slowdown(self) -> float:
        """How many times as long it takes beside others."""
        return self.contended / self.isolated


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of all transfers, and what was wrong with their bytes."""

    latencies: tuple[Latency, ...]
    problems: tuple[str, ...]


async def run(traffic: Traffic, *, over: str, rounds: int, progress: Callable[[str], None]) -> Outcome:
    """Move `traffic`.

    Parameters
    ----------
    traffic : Traffic
    over : {"host", "tcp"}
    rounds : int
        Times that each transfer is moved alone, and that all steps are gone through.
    progress : callable

    Raises
    ------
    KvbenchError
        A rank fails.
    """
    alone: dict[int, float] = {}
    async with Ranks.start(traffic, over) as ranks:
        await ranks.together(traffic.steps)  # connections are made, routes are known
        for transfer in traffic.transfers:
            progress(f"rank {transfer.source} to {transfer.target} by itself, {transfer.nbytes:,} bytes")
            step = Step("", 0.0, (transfer,))
            times = [await ranks.together([step]) for _ in range(rounds)]
            alone[transfer.number] = statistics.median(seconds[transfer.number] for seconds in times)
        await ranks.fill()
        times = []
        for number in range(rounds):
            progress(f"all steps, round {number + 1} of {rounds}")
            times.append(await ranks.together(traffic.steps))
        problems = await ranks.problems()
    latencies = [
        _latency(step, transfer, alone[transfer.number], [seconds[transfer.number] for seconds in times])
        for step in traffic.steps
        for transfer in step.transfers
    ]
    return Outcome(tuple(latencies), tuple(problems))


def _latency(step: Step, transfer: Transfer, alone: float, beside: list[float]) -> Latency:
    return Latency(step.name, transfer.source, transfer.target, transfer.nbytes, alone, statistics.median(beside))


def to_text(outcome: Outcome) -> str:
    """A line for each transfer, and one for each step."""
    lines = [f"{'step':24} {'from':>4} {'to':>4} {'bytes':>16} {'isolated ms':>12} {'contended ms':>13} {'x':>6}"]
    steps: dict[str, list[Latency]] = {}
    for one in outcome.latencies:
        steps.setdefault(one.step, []).append(one)
        lines.append(
            f"{one.step:24.24} {one.source:>4} {one.target:>4} {one.nbytes:>16,} {one.isolated * 1e3:>12.3f} "
            f"{one.contended * 1e3:>13.3f} {one.slowdown:>6.2f}"
        )
    for name, those in steps.items():
        slowest, alone = max(one.contended for one in those), max(one.isolated for one in those)
        nbytes = sum(one.nbytes for one in those)
        lines.append(
            f"{name:24.24} {'all':>9} {nbytes:>16,} {alone * 1e3:>12.3f} {slowest * 1e3:>13.3f} {slowest / alone:>6.2f}"
        )
    lines.append("Medians. All of a step: the slowest of its transfers. " + ("; ".join(outcome.problems) or "verified"))
    return "\n".join(lines)


def to_json(outcome: Outcome) -> str:
    """The same for programs."""
    latencies = [{**dataclasses.asdict(one), "slowdown": one.slowdown} for one in outcome.latencies]
    told = {"transfers": latencies, "verified": not outcome.problems, "problems": list(outcome.problems)}
    return json.dumps(told, indent=2)
