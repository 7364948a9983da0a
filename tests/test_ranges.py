"""The cache of registrations, against a machine whose pages are freed as soon as nobody holds them."""

from __future__ import annotations

import mmap
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from asyncxfer.abc import RegistrationError
from asyncxfer.backends._ranges import HOST, RangeCache

PAGE = mmap.PAGESIZE


@dataclass(eq=False)
class Handle:
    """What a device knows: which pages it was shown, and what stood in each."""

    pages: dict[int, int]
    kind: str
    users: int = 0


@dataclass
class Device:
    """Maps memory of one page size, of which it knows who holds what.

    Attributes
    ----------
    holders : Counter
        By kind and page.
    lives : Counter
        How often a page was freed: what stands there is something else each time.
    frail : set
        Pages that cannot be mapped together with the one below.
    """

    holders: Counter[tuple[str, int]] = field(default_factory=Counter)
    lives: Counter[tuple[str, int]] = field(default_factory=Counter)
    frail: set[int] = field(default_factory=set)
    mapped: set[Handle] = field(default_factory=set)
    made: int = 0
    nbytes: int = 0

    def pages(self, address: int, nbytes: int, kind: str) -> range:
        size = PAGE if kind == HOST else 1
        return range(address // size, -(-(address + nbytes) // size))

    def map(self, address: int, nbytes: int, kind: str) -> Handle:
        pages = self.pages(address, nbytes, kind)
        if kind == HOST:
            assert (address % PAGE, nbytes % PAGE) == (0, 0)
        assert all(self.holders[kind, page] for page in pages), "memory that nobody asked for"
        if self.frail.intersection(pages[1:]):
            raise RegistrationError("two makes of memory")
        handle = Handle({page: self.lives[kind, page] for page in pages}, kind)
        self.mapped.add(handle)
        self.made, self.nbytes = self.made + 1, self.nbytes + nbytes
        return handle

    def unmap(self, handle: Handle) -> None:
        assert handle.users == 0
        self.mapped.remove(handle)


class Held:
    """A range, and what was asked for."""

    def __init__(self, device: Device, cache: RangeCache[Handle], address: int, nbytes: int, kind: str) -> None:
        self.device, self.cache, self.kind = device, cache, kind
        self.pages = device.pages(address, nbytes, kind)
        device.holders.update((kind, page) for page in self.pages)
        try:
            self.range = cache.acquire(address, nbytes, kind)
        except RegistrationError:
            self.forget()
            raise
        self.range.handle.users += 1
        assert self.range.address <= address
        assert self.range.address + self.range.nbytes >= address + nbytes
        self.check()

    def check(self) -> None:
        """It is mapped, and the device knows what stands there now."""
        handle = self.range.handle
        assert handle in self.device.mapped
        assert handle.kind == self.kind
        assert all(handle.pages[page] == self.device.lives[self.kind, page] for page in self.pages)

    def release(self) -> None:
        self.range.handle.users -= 1
        self.cache.release(self.range)
        self.forget()

    def forget(self) -> None:
        for page in self.pages:
            self.device.holders[self.kind, page] -= 1
            if not self.device.holders[self.kind, page]:
                self.device.lives[self.kind, page] += 1


class Caching(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.cache = RangeCache(self.device.map, self.device.unmap)
        self.all: list[Held] = []

    def _acquire(self, address: int, nbytes: int, kind: str) -> Held | None:
        alone = self.device.pages(address, nbytes, kind)
        try:
            held = Held(self.device, self.cache, address, nbytes, kind)
        except RegistrationError:
            assert self.device.frail.intersection(alone[1:]), "it could have been mapped alone"
            return None
        self.all.append(held)
        return held

    @rule(target=held, first=st.integers(0, 12), pages=st.integers(1, 6), inset=st.sampled_from([0, 0, 1, 100]))
    def of_the_host(self, first: int, pages: int, inset: int) -> Held | None:
        return self._acquire(first * PAGE + inset, pages * PAGE - 2 * inset, HOST)

    @rule(target=held, first=st.integers(0, 12), nbytes=st.integers(1, 6), kind=st.sampled_from(["cuda:0", "cuda:1"]))
    def of_a_gpu(self, first: int, nbytes: int, kind: str) -> Held | None:
        return self._acquire(first, nbytes, kind)

    @rule(which=consumes(held))
    def release(self, which: Held | None) -> None:
        if which is not None:
            self.all.remove(which)
            which.release()

    @precondition(lambda self: not self.all)
    @rule(frail=st.sets(st.integers(1, 12), max_size=2))
    def other_makes(self, frail: set[int]) -> None:
        self.device.frail = frail

    @invariant()
    def all_that_is_held_is_mapped_and_nothing_else(self) -> None:
        for held in self.all:
            held.check()
        assert self.device.mapped == {held.range.handle for held in self.all}
        assert len(self.cache) == len(self.all)

    def teardown(self) -> None:
        for held in self.all:
            held.release()
        self.cache.close()
        assert not self.device.mapped
        for space in self.cache._spaces.values():
            assert not space.holders._bounds  # its books do not grow with what has been


TestCaching = Caching.TestCase
TestCaching.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---- what is shared, and what is mapped ---------------------------------------------------------------------------


class Bench:
    def __init__(self) -> None:
        self.device = Device()
        self.cache = RangeCache(self.device.map, self.device.unmap)

    def acquire(self, address: int, nbytes: int, kind: str = HOST) -> Held:
        return Held(self.device, self.cache, address, nbytes, kind)


def place(held: Held) -> tuple[int, int]:
    return held.range.address, held.range.nbytes


def test_what_is_covered_is_shared() -> None:
    bench = Bench()
    whole = bench.acquire(0, 8 * PAGE)
    parts = [bench.acquire(n * PAGE + 5, 100) for n in range(8)]
    assert {part.range.handle for part in parts} == {whole.range.handle}
    assert bench.device.made == 1
    whole.release()
    assert len(bench.device.mapped) == 1  # the parts hold it


def test_two_in_one_page_share_it() -> None:
    bench = Bench()
    first, second = bench.acquire(100, 8), bench.acquire(3000, 8)
    assert place(first) == (0, PAGE)
    assert first.range.handle is second.range.handle


def test_neighbours_are_mapped_as_one_while_the_old_stays_for_its_holder() -> None:
    bench = Bench()
    first = bench.acquire(0, PAGE)
    second = bench.acquire(PAGE, PAGE)
    assert (place(first), place(second)) == ((0, PAGE), (0, 2 * PAGE))
    assert len(bench.device.mapped) == 2
    third = bench.acquire(0, PAGE)
    assert third.range.handle is second.range.handle  # the larger is found from now on
    first.release()
    assert bench.device.mapped == {second.range.handle}


def test_what_lies_between_is_not_mapped() -> None:
    bench = Bench()
    first, second = bench.acquire(0, PAGE), bench.acquire(2 * PAGE, PAGE)
    assert (place(first), place(second)) == ((0, PAGE), (2 * PAGE, PAGE))
    gap = bench.acquire(PAGE, PAGE)
    assert place(gap) == (0, 3 * PAGE)


def test_device_memory_is_not_rounded() -> None:
    bench = Bench()
    assert place(bench.acquire(100, 7, "cuda:0")) == (100, 7)
    assert place(bench.acquire(107, 7, "cuda:0")) == (100, 14)
    assert place(bench.acquire(114, 7, "cuda:1")) == (114, 7)


def test_memory_that_was_given_up_is_mapped_anew() -> None:
    bench = Bench()
    first = bench.acquire(0, PAGE)
    second = bench.acquire(PAGE, PAGE)  # with a range over both
    first.release()  # what stands there from now on the range over both does not know
    again = bench.acquire(0, PAGE)
    assert again.range.handle is not second.range.handle
    assert second.range.handle in bench.device.mapped


def test_many_neighbours_are_not_all_mapped_again_for_each() -> None:
    bench = Bench()
    held = [bench.acquire(n * PAGE, PAGE) for n in range(256)]
    assert len(held) == 256
    assert bench.device.nbytes <= 9 * 256 * PAGE  # log2(256) + 1 times each


def test_what_cannot_be_mapped_with_its_neighbour_is_mapped_alone() -> None:
    bench = Bench()
    bench.device.frail = {1}
    first, second = bench.acquire(0, PAGE), bench.acquire(PAGE, PAGE)
    assert (place(first), place(second)) == ((0, PAGE), (PAGE, PAGE))


def test_a_refusal_leaves_nothing_behind() -> None:
    bench = Bench()
    bench.device.frail = {1}
    with pytest.raises(RegistrationError, match="two makes"):
        bench.acquire(0, 2 * PAGE)
    bench.cache.close()
    assert not bench.device.mapped
    bench.device.frail = set()
    assert place(bench.acquire(0, 2 * PAGE)) == (0, 2 * PAGE)


def test_misuse_is_told() -> None:
    bench = Bench()
    held = bench.acquire(0, 1)
    with pytest.raises(ValueError, match="expected at least 1"):
        bench.cache.acquire(0, 0, HOST)
    with pytest.raises(AssertionError, match="1 ranges are still held"):
        bench.cache.close()
    held.release()
    with pytest.raises(ValueError, match="released before"):
        bench.cache.release(held.range)
    bench.cache.close()
