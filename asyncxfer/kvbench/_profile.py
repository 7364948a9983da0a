"""``asyncxfer kvbench profile``: how long a prompt's cache takes to move at each tier.

It runs what `_plan` has planned, one command after the other, each a program of its own, and adds up what they report.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._errors import KvbenchError
from ._plan import Command, Plan

__all__ = ["Moved", "moved", "run", "to_json", "to_text"]


@dataclass(frozen=True, slots=True)
class Moved:
    """One prompt, moved at one tier in one direction.

    Attributes
    ----------
    tier, op, backend : str
    rows : int
    nbytes : int, bytes
    seconds : float, seconds
        Median; of rows of several lengths the sum of their medians.
    verified : bool
        Whether every byte was right afterwards.
    """

    tier: str
    op: str
    backend: str
    rows: int
    nbytes: int
    seconds: float
    verified: bool

    @property
    def gigabytes_per_second(self) -> float:
        """What that comes to."""
        return self.nbytes / self.seconds / 1e9


def run(plan: Plan, progress: Callable[[str], None]) -> list[Moved]:
    """Run the commands of `plan`.

    Raises
    ------
    KvbenchError
        One of them fails.
    """
    found: list[Moved] = []
    for command in plan.commands:
        progress(command.line)
        found.extend(moved(command, _results(command)))
    return found


def _results(command: Command) -> list[dict[str, Any]]:
    arguments = [sys.executable, "-m", "asyncxfer", *command.arguments, "--json"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if not ran.stdout:
        raise KvbenchError(f"{command.line}: {ran.stderr.strip() or f'ended with status {ran.returncode}'}")
    results: list[dict[str, Any]] = json.loads(ran.stdout)["results"]
    return results


def moved(command: Command, results: Sequence[Mapping[str, Any]]) -> Iterator[Moved]:
    """What the results of a command come to, for each direction."""
    for op in dict.fromkeys(result["op"] for result in results):
        ours = [result["ours"] for result in results if result["op"] == op]
        yield Moved(
            command.tier,
            op,
            "+".join(dict.fromkeys(system["backend"] for system in ours)),
            sum(shape.count for shape in command.shapes),
            command.nbytes,
            sum(system["seconds"] for system in ours),
            all(system["verified"] for system in ours),
        )


def to_text(plan: Plan, prompts: Sequence[Moved]) -> str:
    """A line for each tier and direction."""
    lines = [
        plan.title,
        f"{'tier':6} {'op':4} {'by':8} {'rows':>8} {'bytes':>16} {'ms a prompt':>12} {'GB/s':>7}  bytes",
    ]
    for one in prompts:
        figures = f"{one.rows:>8,} {one.nbytes:>16,} {one.seconds * 1e3:>12.3f} {one.gigabytes_per_second:>7.2f}"
        verdict = "verified" if one.verified else "WRONG"
        lines.append(f"{one.tier:6} {one.op:4} {one.backend:8} {figures}  {verdict}")
    return "\n".join(lines)


def to_json(plan: Plan, prompts: Sequence[Moved]) -> str:
    """The same for programs."""
    asked = plan.question.asked
    head = {"model": plan.question.model.name, "isl": asked.isl, "tp": asked.tp, "pp": asked.pp, "stage": plan.stage}
    results = [{**dataclasses.asdict(one), "gigabytes_per_second": one.gigabytes_per_second} for one in prompts]
    return json.dumps({**head, "results": results}, indent=2)
