"""``asyncxfer kvbench plan``: the commands of ``asyncxfer bench`` that move a prompt's cache at each tier.

A tier is a place that a cache goes to: another process of this host, one that is reached over TCP or UCX, a file,
objects. It runs nothing.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ._rows import Layout, shapes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncxfer.bench._shapes import Shape

    from ._kvcache import Question
    from ._sizes import Stage

__all__ = ["TIERS", "Command", "Options", "Plan", "Tier", "make", "to_json", "to_text"]

Tier = Literal["host", "tcp", "ucx", "file", "s3"]
TIERS: tuple[Tier, ...] = get_args(Tier)

_BLOCK = 4096  # what direct transfers of files take multiples of


@dataclass(frozen=True, slots=True)
class Options:
    """How a prompt is to be moved.

    Attributes
    ----------
    tiers : sequence of Tier
    layout : {"layer", "block"} or None
        None: by layer between memories, by block to and from storage.
    ops : sequence of str
        ``put``, ``get`` or both.
    rounds : int
    folder : str or None
        Where a file is made.
    endpoint, bucket : str or None
        Of objects.
    """

    tiers: Sequence[Tier] = ("host", "tcp", "file")
    layout: Layout | None = None
    ops: Sequence[str] = ("put", "get")
    rounds: int = 5
    folder: str | None = None
    endpoint: str | None = None
    bucket: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One command, for one tier."""

    tier: Tier
    layout: Layout
    shapes: tuple[Shape, ...]
    arguments: tuple[str, ...]

    @property
    def line(self) -> str:
        """As it is typed."""
        return shlex.join(("asyncxfer", *self.arguments))

    @property
    def nbytes(self) -> int:
        """Of the prompt, on this rank."""
        return sum(shape.nbytes for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Plan:
    """The commands for a prompt, and whose part of its cache they move: a rank's of the stage that keeps most."""

    question: Question
    stage: int
    commands: tuple[Command, ...]

    @property
    def title(self) -> str:
        """What they move."""
        asked, model = self.question.asked, self.question.model
        return f"{model.name}, {asked.isl:,} tokens, one rank of stage {self.stage} of TP {asked.tp}, PP {asked.pp}"


def make(question: Question, options: Options) -> Plan:
    """Plan how to move what `question` asks about.

    Raises
    ------
    KvbenchError
        It cannot be divided as asked.
    """
    counted = [of_one.bytes_total for _, of_one in question.answer().stages]
    number = counted.index(max(counted))
    stage = question.answer().stages[number][0]
    return Plan(question, number, tuple(_command(tier, stage, question, options) for tier in options.tiers))


def _command(tier: Tier, stage: Stage, question: Question, options: Options) -> Command:
    layout = options.layout or ("block" if tier in ("file", "s3") else "layer")
    shapes = shapes_of(stage, question.form, question.asked, layout)
    words = ["bench", *([] if tier == "host" else ["--over", tier])]
    words += ["--shapes", ",".join(str(shape) for shape in shapes), "--op", ",".join(options.ops)]
    words += ["--rounds", str(options.rounds), "--warmup", "1"]
    if tier == "host":
        words += ["--memory", "mapped"]
    if tier == "file":
        aligned = all(shape.length % _BLOCK == 0 for shape in shapes)
        words += ["--way", "direct" if aligned else "cached"]
        words += [] if options.folder is None else ["--folder", options.folder]
    if tier == "s3" and options.endpoint is not None:
        words += ["--endpoint", options.endpoint]
        words += [] if options.bucket is None else ["--bucket", options.bucket]
    return Command(tier, layout, tuple(shapes), tuple(words))


def to_text(plan: Plan) -> str:
    """The commands, as they are typed, with a line of comment for each."""
    lines = [f"# {plan.title}"]
    for command in plan.commands:
        rows = ", ".join(f"{shape.count:,} rows of {shape.length:,} B" for shape in command.shapes)
        lines += [f"# {command.tier}: {command.nbytes:,} B by {command.layout}: {rows}", command.line]
    return "\n".join(lines)


def to_json(plan: Plan) -> str:
    """The commands for programs."""
    commands = [
        {
            "tier": command.tier,
            "layout": command.layout,
            "nbytes": command.nbytes,
            "rows": [{"count": shape.count, "length": shape.length} for shape in command.shapes],
            "arguments": ["asyncxfer", *command.arguments],
        }
        for command in plan.commands
    ]
    return json.dumps({"model": plan.question.model.name, "stage": plan.stage, "commands": commands}, indent=2)
