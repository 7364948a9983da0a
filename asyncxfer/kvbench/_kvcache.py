"""``asyncxfer kvbench kvcache``: the sizes, as text or JSON, and how they come about."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from ._config import Model
from ._layers import Cache, Format
from ._sizes import Asked, Count, Sizes, Stage, sizes

__all__ = ["Question", "explain", "to_json", "to_text"]

_TITLES = {
    "bytes_per_token": "bytes a token",
    "bytes_per_token_past_windows": "  past the windows",
    "bytes_per_block": "bytes a block",
    "bytes_of_state": "bytes of state",
    "bytes_total": "bytes in all",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A model, the format of its cache, and what is asked of it."""

    model: Model
    form: Format
    asked: Asked

    def answer(self) -> Count:
        """What it comes to.

        Raises
        ------
        KvbenchError
            It cannot be divided as asked.
        """
        return sizes(self.model, self.form, self.asked)


def to_json(question: Question) -> str:
    """The sizes for programs."""
    asked, count = question.asked, question.answer()
    head = {
        "model": question.model.name,
        "source": question.model.source,
        "layers": len(question.model.layers),
        "tp": asked.tp,
        "pp": asked.pp,
        "isl": asked.isl,
        "page_size": asked.page_size,
        "kv_dtype": question.form.kv_dtype,
        "blocks": -(-asked.isl // asked.page_size),
    }
    parts = {"rank": count.rank, "all": count.all, "distinct": count.distinct}
    found = {name: {part: getattr(of, name) for part, of in parts.items()} for name in Sizes.__slots__}
    divided = [
        {
            "first_layer": stage.first,
            "layers": len(stage.layers),
            **dict(zip(Sizes.__slots__, of.values(), strict=True)),
        }
        for stage, of in count.stages
    ]
    return json.dumps({**head, **found, "stages": divided}, indent=2)


def to_text(question: Question) -> str:
    """The sizes for people."""
    asked, count = question.asked, question.answer()
    head = f"{question.model.name}: {len(question.model.layers)} layers, cache in {question.form.kv_dtype}, "
    head += f"{asked.isl:,} tokens in blocks of {asked.page_size}, TP {asked.tp}, PP {asked.pp}"
    lines = [
        head,
        f"{'':20} {'one rank':>18} {'all ranks':>18} {'without copies':>18}",
    ]
    for name, title in _TITLES.items():
        values = [getattr(of, name) for of in (count.rank, count.all, count.distinct)]
        windows = name != "bytes_per_token_past_windows" or values[0] != count.rank.bytes_per_token
        if windows and (name != "bytes_of_state" or values[2]):
            lines.append(f"{title:20} " + " ".join(f"{value:>18,}" for value in values))
    if asked.pp > 1:
        lines.append("One rank: the largest, of each size. Layers of the stages: " + _partition(count))
    return "\n".join(lines)


def _partition(count: Count) -> str:
    return ", ".join(str(len(stage.layers)) for stage, _ in count.stages)


def explain(question: Question) -> str:
    """How the sizes of one rank come about, for each stage."""
    model, form, asked, count = question.model, question.form, question.asked, question.answer()
    lines = [f"From {model.source}:", *(f"- {note}" for note in model.notes)]
    for number, (stage, of_one) in enumerate(count.stages):
        where = f" of stage {number}" if asked.pp > 1 else ""
        lines.append(f"\nOne rank{where}, layers {stage.first} to {stage.end - 1}:")
        lines.extend(_explain_stage(stage, form, asked))
        token, block = of_one.bytes_per_token, of_one.bytes_per_block
        lines.append(f"  sum: {token:,} B a token, x {asked.page_size} = {block:,} B a block")
        lines.append(f"  in all: {of_one.bytes_total:,} B for {asked.isl:,} tokens")
    copies = " (some heads or latents are on several ranks)" if count.all != count.distinct else ""
    lines.append(f"\nAll {asked.tp * asked.pp} ranks: {count.all.bytes_total:,} B{copies}")
    return "\n".join(lines)


def _explain_stage(stage: Stage, form: Format, asked: Asked) -> Iterator[str]:
    numbered = [(cache, number) for number, layer in enumerate(stage.layers, stage.first) for cache in layer]
    for cache, group in itertools.groupby(sorted(numbered, key=lambda pair: repr(pair[0])), key=lambda pair: pair[0]):
        numbers = [number for _, number in group]
        kept = _kept(cache, form, asked)
        yield f"  {_ranges(numbers)} ({len(numbers)}): {cache.name}: {cache.derive(asked.tp, form)}{kept}"
    idle = [number for number, layer in enumerate(stage.layers, stage.first) if not layer]
    if idle:
        yield f"  {_ranges(idle)} ({len(idle)}): keeps nothing"


def _kept(cache: Cache, form: Format, asked: Asked) -> str:
    """How many pages a layer keeps, where it keeps tokens."""
    pages = cache.pages(asked.isl, asked.page_size, form)
    return f"; {pages:,} pages of {asked.page_size}" if pages else ""


def _ranges(numbers: list[int]) -> str:
    """Numbers of layers, those that follow one another as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(words)
