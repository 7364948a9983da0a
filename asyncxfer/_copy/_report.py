"""What the user sees: a line for each file and object, or a bar, or JSON; and the sum of it at the end.

Failures go to stderr in every form. Names are printed so that they cannot steer a terminal.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, Self

from ._copier import Outcome
from ._names import shown

__all__ = ["Bar", "JsonLines", "Lines", "Report", "Totals", "choose", "human"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human(nbytes: float) -> str:
    """Give a number of bytes in the unit that suits it."""
    for unit in _UNITS[:-1]:
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} {_UNITS[-1]}"


class Totals:
    """How many ended how, and how many bytes were copied, since this was made."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.nbytes = 0
        self._since = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        self.ended[outcome.ended] += 1
        if outcome.ended in ("copied", "would copy"):
            self.nbytes += outcome.nbytes

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._since

    def __str__(self) -> str:
        wanted = "would copy" if self.ended["would copy"] else "copied"
        told = f"{wanted} {self.ended[wanted]:,}, {human(self.nbytes)} in {self.seconds:.1f} s"
        if wanted == "copied":
            told += f" ({human(self.nbytes / max(self.seconds, 1e-3))}/s)"
        rest = {"same": "the same already", "kept": "kept", "failed": "failed"}
        return told + "".join(f"; {self.ended[ended]:,} {word}" for ended, word in rest.items() if self.ended[ended])


class Report(Protocol):
    """What is told of a copy; ``with`` begins and ends it."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, however it went."""

    def found(self, nbytes: int) -> None:
        """Something that is to be copied was found."""

    def moved(self, nbytes: int) -> None:
        """So many bytes more were copied."""

    def ended(self, outcome: Outcome) -> None:
        """One is done."""

    def total(self, totals: Totals) -> None:
        """All are done."""


class Lines:
    """A line for each, as ``cp -v`` has it.

    Parameters
    ----------
    hide : callable
        Takes secrets out of a message.
    quiet : bool
        Failures only.
    """

    def __init__(self, hide: Callable[[str], str], *, quiet: bool) -> None:
        self._hide = hide
        self._quiet = quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()

    def found(self, nbytes: int) -> None:
        """Say nothing."""

    def moved(self, nbytes: int) -> None:
        """Say nothing."""

    def ended(self, outcome: Outcome) -> None:
        """Print it."""
        if outcome.ended == "failed":
            print(failure(outcome, self._hide), file=sys.stderr, flush=True)
        elif not self._quiet:
            print(_line(outcome))

    def total(self, totals: Totals) -> None:
        """Print the sum."""
        if not self._quiet:
            print(totals)


class JsonLines(Lines):
    """An object of JSON a line: each file or object, and then the sum."""

    def ended(self, outcome: Outcome) -> None:
        """Print it; a failure to stderr as well."""
        if outcome.ended == "failed":
            print(failure(outcome, self._hide), file=sys.stderr, flush=True)
        print(json.dumps(asdict(outcome) | {"why": self._hide(outcome.why)}))

    def total(self, totals: Totals) -> None:
        """Print the sum."""
        counts = {ended: totals.ended[ended] for ended in ("copied", "would copy", "kept", "same", "failed")}
        print(json.dumps({"total": counts, "nbytes": totals.nbytes, "seconds": round(totals.seconds, 3)}))


class Bar(Lines):
    """rich's bar over the bytes that were found so far."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__(hide, quiet=False)
        progress: Any = importlib.import_module("rich.progress")
        columns = progress.TextColumn, progress.BarColumn, progress.DownloadColumn
        text, bar, size = columns
        speed, left = progress.TransferSpeedColumn, progress.TimeRemainingColumn
        self._bar = progress.Progress(text("{task.description}"), bar(), size(binary_units=True), speed(), left())
        self._found = 0
        self._files = 0
        self._task = self._bar.add_task("copying", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def found(self, nbytes: int) -> None:
        """Let the bar be that much longer."""
        self._found += nbytes
        self._bar.update(self._task, total=self._found)

    def moved(self, nbytes: int) -> None:
        """Fill it that much."""
        self._bar.advance(self._task, nbytes)

    def ended(self, outcome: Outcome) -> None:
        """Count it, or print above the bar why it failed."""
        self._files += 1
        self._bar.update(self._task, description=f"{self._files:,} done")
        if outcome.ended != "copied":
            self._found -= outcome.nbytes
            self._bar.update(self._task, total=self._found)
        if outcome.ended == "failed":
            self._bar.stop()
            print(failure(outcome, self._hide), file=sys.stderr, flush=True)
            self._bar.start()

    def total(self, totals: Totals) -> None:
        """Print the sum below it."""
        self._bar.stop()
        print(totals)


def _line(outcome: Outcome) -> str:
    names = f"{shown(outcome.source)} -> {shown(outcome.target)}"
    return f"{outcome.ended}: {names} ({human(outcome.nbytes)})"


def failure(outcome: Outcome, hide: Callable[[str], str]) -> str:
    """Say what failed and why."""
    return f"asyncxfer cp: {shown(outcome.source)}: {shown(hide(outcome.why))}"


def choose(*, as_json: bool, quiet: bool, dry_run: bool, hide: Callable[[str], str]) -> Report:
    """Choose the form: JSON, lines, or a bar where there is a terminal and rich."""
    if as_json:
        return JsonLines(hide, quiet=quiet)
    if quiet or dry_run or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines(hide, quiet=quiet)
    return Bar(hide)
