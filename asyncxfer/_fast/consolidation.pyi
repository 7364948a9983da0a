"""Matched rows in fewer, larger pieces; the docstrings that the compiled module leaves to its stub."""

from asyncxfer._fast.descriptors import Pairs

def consolidate(pairs: Pairs) -> Pairs:
    """The same bytes to the same places, in as few rows as that takes, in no promised order.

    Lone rows that touch on both sides become one, in whatever order they are given. Dense runs (both strides are the
    length) are lone rows; other runs stay what they are, and come last. An array in which nothing can be joined is
    given back as it is.

    Rows that overlap on the remote side, such as one block that is got into two places of a segment, may keep their
    neighbours apart. Where rows overlap at their destination, which comes last was not said before either.

    Parameters
    ----------
    pairs : (n,) PAIR
        As `descriptors.pair` makes them.
    """
