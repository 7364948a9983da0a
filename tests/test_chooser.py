"""Which way a transfer takes: what is chosen in a hurry is what the whole explanation would have chosen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncxfer._chooser import quickest, weigh
from asyncxfer.abc import Cost, Offer

COSTS = st.none() | st.builds(Cost, *(st.sampled_from([0.0, 1e-6, 1e-3]),) * 3)
OFFERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.builds(Offer, st.sampled_from(["", "x", "y"]), COSTS)), max_size=6
)
WANTED = st.none() | st.sampled_from(["a", "b", "a:x", "b:y", "nothing"])


@given(rows=st.integers(0, 1000), nbytes=st.integers(0, 10**6), offers=OFFERS, wanted=WANTED)
def test_in_a_hurry_the_same_way_is_chosen(
    rows: int, nbytes: int, offers: list[tuple[str, Offer]], wanted: str | None
) -> None:
    assert quickest(rows, nbytes, offers, wanted) == weigh("put", rows, nbytes, offers, wanted).route
