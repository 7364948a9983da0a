"""Rows taken as blocks of equal size; the docstrings that the compiled module leaves to its stub."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from asyncxfer._fast.descriptors import Runs

Int64s: TypeAlias = npt.NDArray[np.int64]
Uint32s: TypeAlias = npt.NDArray[np.uint32]
Uint64s: TypeAlias = npt.NDArray[np.uint64]

def pick(runs: Runs, block_bytes: int, blocks: Int64s) -> Runs:
    """Give the rows of some blocks, in the order in which they are named.

    Raises
    ------
    IndexError
        There is no such block.
    """

def slots(blocks: Int64s, block_bytes: int, slab_blocks: int) -> Runs:
    """Give the rows of blocks in their slabs, of `slab_blocks` blocks each: one row a block.

    Raises
    ------
    IndexError
        A number is negative.
    """

def checksums(runs: Runs, addresses: Uint64s, block_bytes: int) -> Uint32s:
    """Give the CRC32C of each block, read where the rows lie: segment k of them begins at the k-th address.

    Raises
    ------
    IndexError
        A row names a segment that has no address.
    ValueError
        The rows are no whole number of blocks.
    """
