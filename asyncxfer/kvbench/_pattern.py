"""Traffic as it is described in YAML: steps, each a matrix of bytes that go from rank to rank.

It reads and checks a description, and gives every transfer a place of its own in the memory of both its ranks. Nothing
is moved here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ._errors import KvbenchError
from ._quantities import size

__all__ = ["Step", "Traffic", "Transfer", "read"]

_MOST_RANKS = 256
_MOST_BYTES = 16 << 20
INSTALL = "pip install 'asyncxfer[bench]'"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that one rank puts to another in a step.

    Attributes
    ----------
    number : int
        Of the transfer among all of the traffic.
    source, target : int
        Ranks.
    nbytes : int, bytes
    row : int, bytes
        Length of a row, the last of which may be shorter; rows lie as far apart as they are long. 0: one row.
    source_offset, target_offset : int, bytes
        Where the rows begin in what the source sends from and the target receives into.
    """

    number: int
    source: int
    target: int
    nbytes: int
    row: int
    source_offset: int
    target_offset: int

    @property
    def span(self) -> int:
        """Bytes from the first row to the end of the last, rounded up to whole words."""
        gaps = (-(-self.nbytes // self.row) - 1) * self.row if self.row else 0
        return (self.nbytes + gaps + 7) // 8 * 8


@dataclass(frozen=True, slots=True)
class Step:
    """Transfers that each rank begins at once, when it has done its part of the step before.

    Attributes
    ----------
    name : str
    gap : float, seconds
        That a rank computes before it begins.
    transfers : tuple of Transfer
    """

    name: str
    gap: float
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Steps, and between how many ranks."""

    ranks: int
    steps: tuple[Step, ...]

    @property
    def transfers(self) -> list[Transfer]:
        """Of all steps."""
        return [transfer for step in self.steps for transfer in step.transfers]

    def memory(self, rank: int) -> tuple[int, int]:
        """Bytes that a rank sends from, and receives into."""
        sent = sum(transfer.span for transfer in self.transfers if transfer.source == rank)
        received = sum(transfer.span for transfer in self.transfers if transfer.target == rank)
        return sent, received


class _Pair(msgspec.Struct, forbid_unknown_fields=True):
    source: int = msgspec.field(name="from")
    target: int = msgspec.field(name="to")
    size: str | int


class _Step(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    gap: float = 0.0
    repeat: int = 1
    row: str | int = 0
    matrix: list[list[str | int]] = []
    pairs: list[_Pair] = []


class _Description(msgspec.Struct, forbid_unknown_fields=True):
    steps: list[_Step]
    ranks: int = 0


def read(path: Path) -> Traffic:
    """Read the description at `path`.

    Raises
    ------
    KvbenchError
        It cannot be read, or it makes no sense.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise KvbenchError(f"{path} has more than {_MOST_BYTES:,} bytes")
        described = msgspec.yaml.decode(path.read_bytes(), type=_Description)
    except ImportError as error:
        raise KvbenchError(f"descriptions of traffic need PyYAML, which is not installed; {INSTALL}") from error
    except (OSError, ValueError) as error:
        raise KvbenchError(f"{path} cannot be read: {error}") from error
    ranks = described.ranks or _ranks(described)
    if not described.steps or not 2 <= ranks <= _MOST_RANKS:
        told = f"{path} describes {len(described.steps)} steps between {ranks} ranks"
        raise KvbenchError(f"{told}; expected some, between 2 to {_MOST_RANKS}")
    memory = _Memory(ranks)
    steps = tuple(step for number, given in enumerate(described.steps) for step in memory.place(number, given))
    return Traffic(ranks, steps)


def _ranks(described: _Description) -> int:
    """The most that any step names."""
    named = [len(step.matrix) for step in described.steps]
    named += [1 + max(pair.source, pair.target) for step in described.steps for pair in step.pairs]
    return max(named, default=0)


@dataclass
class _Memory:
    """How far the memory of each rank is taken, while transfers are given their places."""

    ranks: int
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    count: int = 0

    def place(self, number: int, given: _Step) -> Iterator[Step]:
        """A step as it is described, as often as it is repeated."""
        name = given.name or f"step {number}"
        if given.gap < 0 or given.repeat < 1:
            raise KvbenchError(f"{name}: gap is {given.gap} and repeat {given.repeat}; expected at least 0 and 1")
        wanted = list(self._wanted(name, given))
        if not wanted:
            raise KvbenchError(f"{name} moves nothing; give it a matrix, or pairs")
        for time in range(given.repeat):
            placed = tuple(self._transfer(*one, row=size(given.row)) for one in wanted)
            yield Step(name if given.repeat == 1 else f"{name}, {time + 1}", given.gap, placed)

    def _wanted(self, name: str, given: _Step) -> Iterator[tuple[int, int, int]]:
        if given.matrix and (len(given.matrix) != self.ranks or {len(line) for line in given.matrix} != {self.ranks}):
            raise KvbenchError(f"{name}: the matrix does not have {self.ranks} lines of {self.ranks} amounts")
        cells: list[tuple[int, int, Any]] = [
            (source, target, amount) for source, line in enumerate(given.matrix) for target, amount in enumerate(line)
        ]
        cells += [(pair.source, pair.target, pair.size) for pair in given.pairs]
        for source, target, amount in cells:
            nbytes = size(amount)
            if nbytes == 0:
                continue
            if source == target or not 0 <= min(source, target) <= max(source, target) < self.ranks:
                raise KvbenchError(f"{name}: from rank {source} to {target}; expected two of {self.ranks} ranks")
            yield source, target, nbytes

    def _transfer(self, source: int, target: int, nbytes: int, *, row: int) -> Transfer:
        sent, received = self.sent.get(source, 0), self.received.get(target, 0)
        placed = Transfer(self.count, source, target, nbytes, row, sent, received)
        self.count += 1
        self.sent[source], self.received[target] = sent + placed.span, received + placed.span
        return placed
