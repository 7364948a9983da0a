"""Plans: transfers that were checked, matched and routed, ready to be posted once or many times.

How bytes move is the backend's business, which backend the chooser's, and what becomes of a posted one the transfer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from ._chooser import Candidate
from ._descriptors import DescriptorList
from ._errors import DescriptorError
from ._fast import descriptors as _rows
from ._fast.posting import Counter, Posted, Poster, Usable
from ._transfer import Flights, Transfer
from .abc import Backend, Request

if TYPE_CHECKING:
    from ._fast.link import Link

__all__ = ["Notice", "Plan", "match"]


class Plan(Poster):
    """A transfer that was checked, matched and routed once, to be made many times: ``await plan()``.

    ``plan(*, notify=None, timeout=None, priority=0)`` posts one transfer and gives its `Transfer`. `notify`, bytes, is
    the tag that the peer receives once the data is visible there; `timeout` is in seconds; `priority` above 0 goes
    before, below 0 after what is in flight with 0. It raises ClosedError when the agent or a region has been closed,
    and PeerLostError when the peer is gone.

    Attributes
    ----------
    op : "put" or "get"
    local, remote : DescriptorList
    nbytes : int, bytes
    descriptors : int
        Rows of the local list.
    backend : str
        The one that carries it.
    """

    __slots__ = ("_backend", "_prepared", "_request", "local", "remote", "route")

    def __init__(
        self, backend: Backend, request: Request, *, route: Candidate, local: DescriptorList, remote: DescriptorList,
        flights: Flights, counter: Counter,
    ) -> None:  # fmt: skip
        super().__init__(
            flights, request.op, nbytes=request.nbytes, descriptors=len(local), backend=backend.name, counter=counter,
            sides=(cast(Usable, local.region), cast(Usable, remote.region)), link=request.link,
        )  # fmt: skip
        self.local = local
        self.remote = remote
        self.route = route
        self._backend = backend
        self._request = request
        self._prepared: object = backend.prepare(request)
        self.arm(self._prepared)

    def row_ends(self) -> npt.NDArray[np.uint64]:
        """Where in the stream each row of the local list ends: (descriptors,) uint64, bytes."""
        return _rows.row_ends(self.local.runs)

    @property
    def _small(self) -> bool:
        """Whether it ends within the call that posts it."""
        return getattr(self._prepared, "small", False)

    def chunk_ends(self) -> npt.NDArray[np.uint64]:
        """Where in the stream each chunk of which progress is known ends: (chunks,) uint64, bytes."""
        ends: Callable[[], npt.NDArray[np.uint64]] | None = getattr(self._prepared, "ends", None)
        return _NO_ROWS if ends is None else ends()

    def __repr__(self) -> str:
        return f"<Plan: {self}>"

    def __str__(self) -> str:
        to = "to" if self.op == "put" else "from"
        return f"{self.op} of {self.nbytes:,} bytes {to} {self.sides[1].name!r} by {self.route.route}"

    if TYPE_CHECKING:

        def __call__(self, *, notify: bytes | None = None, timeout: float | None = None, priority: int = 0) -> Transfer:
            """Post one transfer; see the class."""

    def _check(self, notify: bytes | None, timeout: float | None) -> None:
        self.flights.check_note(notify, timeout)
        if notify is not None and self.link is None:
            raise DescriptorError("notify= needs a peer; both sides of this transfer belong to this agent")

    def _refuse(self) -> None:
        """Say what has been closed: agent or region, or the peer is gone."""
        self.flights.check_open()
        for side in self.sides:
            side.check_open()

    def _post(self, transfer: Transfer, notify: bytes | None, priority: int) -> None:
        """Have the backend carry a transfer that was not done at once, and is held by now."""
        announced = notify is not None and not self._small and not self._backend.carries_notes
        if announced:
            transfer.announce()  # before the data can be there: the two must not overtake each other
        try:
            self._backend.submit(self._prepared, transfer, priority)
        except BaseException as error:
            if announced:
                transfer.abandon(error)  # the receiver is told, too
            self.flights.discard(transfer)
            raise
        if transfer.inlined:
            transfer._settled_inline()

    def select(self, local_rows: npt.ArrayLike, remote_rows: npt.ArrayLike) -> Plan:
        """Return a plan for some of the rows, by their numbers in the two lists, without routing again.

        Parameters
        ----------
        local_rows, remote_rows : (n,), (m,) int
            In the order in which they are to be matched; byte totals must agree.

        Raises
        ------
        DescriptorError
            A number is out of range, or the totals differ.
        """
        local, remote = self.local.select(np.asarray(local_rows)), self.remote.select(np.asarray(remote_rows))
        pairs = match(local, remote)
        rows = int(pairs["count"].sum())
        request = replace(self._request, pairs=pairs, nbytes=local.nbytes, rows=rows)
        return Plan(
            self._backend, request, route=self.route, local=local, remote=remote, flights=self.flights,
            counter=self.counter,
        )  # fmt: skip


class Notice(Posted):
    """What stands for a plan where nothing moves: the connection by which bare notifications go to one peer."""

    __slots__ = ("_peer",)

    def __init__(self, flights: Flights, peer: str, link: Link) -> None:
        super().__init__(
            flights, "put", nbytes=0, descriptors=0, backend="control", sides=(), link=link,
            counter=flights.counter(peer, "control", "put"),
        )  # fmt: skip
        self._peer = peer

    def __str__(self) -> str:
        return f"notification to {self._peer!r}"

    def row_ends(self) -> npt.NDArray[np.uint64]:
        """Nothing."""
        return _NO_ROWS

    def chunk_ends(self) -> npt.NDArray[np.uint64]:
        """Nothing."""
        return _NO_ROWS

    def send(self, tag: bytes) -> Transfer:
        """Post one notification."""
        flights: Flights = self.flights
        flights.check_open()
        flights.check_note(tag, None)
        transfer = Transfer(self, tag)
        flights.add(transfer)
        transfer.end_now()
        if transfer.inlined:
            transfer._settled_inline()
        return transfer


_NO_ROWS: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)


def match(local: DescriptorList, remote: DescriptorList) -> npt.NDArray[np.void]:
    """Match two lists row by row, merged where both sides are contiguous: (n,) PAIR.

    Raises
    ------
    DescriptorError
        Their byte totals differ.
    """
    if local.nbytes != remote.nbytes:
        raise DescriptorError(
            f"the local list has {local.nbytes:,} bytes in {len(local):,} rows, the remote list {remote.nbytes:,} "
            f"bytes in {len(remote):,} rows; the totals must agree"
        )
    return _rows.pair(local.runs, remote.runs, merge=True)
