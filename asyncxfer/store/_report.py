"""What opening a store has found and healed."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Report"]


@dataclass(slots=True)
class Report:
    """What was found when a store was opened, and what had to be given up.

    Attributes
    ----------
    created : bool
        There was none; it was made.
    clean : bool
        Whoever wrote it last had closed it. A reader may find it False because the writer is at work.
    blocks : int
        That it holds.
    torn_bytes : int, bytes
        At the end of the journal, of records that were being written when the writer died. No block of theirs had been
        acknowledged.
    damaged_records : int
        Elsewhere in the journal and the snapshot, with a wrong checksum. What they said is lost.
    damaged_files : list of str
        Snapshots and journals that are missing, or whose head is no longer readable.
    lost_blocks : int
        Whose slab is missing or too short.
    unverifiable_blocks : int
        Written from device memory, hence without a checksum, and not synced before the machine went down.
    over_budget : int
        Blocks that the budget no longer has room for.
    leftovers : list of str
        Files of an interrupted compaction, removed.
    seconds : float, seconds
        That opening took.
    """

    created: bool = False
    clean: bool = True
    blocks: int = 0
    torn_bytes: int = 0
    damaged_records: int = 0
    damaged_files: list[str] = field(default_factory=list)
    lost_blocks: int = 0
    unverifiable_blocks: int = 0
    over_budget: int = 0
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def healed(self) -> bool:
        """Whether anything was found that an orderly end does not leave."""
        return bool(
            self.torn_bytes
            or self.damaged_records
            or self.damaged_files
            or self.lost_blocks
            or self.unverifiable_blocks
            or self.leftovers
        )

    def __str__(self) -> str:
        if self.created:
            return "new store"
        told = [
            f"{self.blocks:,} blocks",
            "closed in order" if self.clean else "not closed by its last writer",
        ]
        counts = [
            (self.torn_bytes, "bytes of unfinished records cut off"),
            (self.damaged_records, "damaged records passed over"),
            (self.lost_blocks, "blocks lost with their slab"),
            (self.unverifiable_blocks, "blocks without checksum dropped: they had not been synced"),
            (self.over_budget, "blocks beyond the budget dropped"),
        ]
        told += [f"{count:,} {what}" for count, what in counts if count]
        told += [f"unreadable or missing: {name}" for name in self.damaged_files]
        told += [f"removed: {name}" for name in self.leftovers]
        return "; ".join(told)
