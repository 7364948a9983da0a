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
from ._transfer import Flights, Side, Transfer
from .abc import Backend, Op, Request

if TYPE_CHECKING:
    from ._fast.link import Link

__all__ = ["Notice", "Plan", "match"]


class Plan:
    """A transfer that was checked, matched and routed once, to be made many times: ``await plan()``.

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

    __slots__ = (
        "_backend", "_flights", "_local", "_prepared", "_remote", "_request", "backend", "counter", "descriptors",
        "link", "local", "nbytes", "op", "remote", "route",
    )  # fmt: skip

    def __init__(
        self, backend: Backend, request: Request, *, route: Candidate, local: DescriptorList, remote: DescriptorList,
        flights: Flights, peer: str,
    ) -> None:  # fmt: skip
        self.op = request.op
        self.local = local
        self.remote = remote
        self.nbytes = request.nbytes
        self.descriptors = len(local)
        self.route = route
        self.link = request.link
        self._local = cast(Side, local.region)
        self._remote = cast(Side, remote.region)
        self.backend: str = backend.name
        self._backend = backend
        self._request = request
        self._prepared = backend.prepare(request)
        self._flights = flights
        self.counter = flights.counter(peer, backend.name, request.op)

    @property
    def sides(self) -> tuple[Side, Side]:
        """The two regions."""
        return self._local, self._remote

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
        return f"{self.op} of {self.nbytes:,} bytes {to} {self._remote.name!r} by {self.route.route}"

    def __call__(self, *, notify: bytes | None = None, timeout: float | None = None, priority: int = 0) -> Transfer:
        """Post one transfer.

        Parameters
        ----------
        notify : bytes or None
            Tag that the peer receives once the data is visible there.
        timeout : float or None, seconds
        priority : int
            Above 0 before, below 0 after what is in flight with 0.

        Returns
        -------
        Transfer

        Raises
        ------
        ClosedError
            The agent or a region has been closed.
        PeerLostError
            The peer is gone.
        """
        flights = self._flights
        if flights.closed is not None:
            flights.check_open()
        self._local.check_open()
        self._remote.check_open()
        if notify is not None or timeout is not None:
            flights.check_note(notify, timeout)
            if notify is not None and self.link is None:
                raise DescriptorError("notify= needs a peer; both sides of this transfer belong to this agent")
        transfer = Transfer(self, flights, notify, timeout)
        flights.add(transfer)
        announced = notify is not None and not self._small and not self._backend.carries_notes
        if announced:
            transfer.announce()  # before the data can be there: the two must not overtake each other
        try:
            self._backend.submit(self._prepared, transfer, priority)
        except BaseException as error:
            if announced:
                transfer.abandon(error)  # the receiver is told, too
            flights.discard(transfer)
            raise
        if transfer.inlined:
            transfer._settled_inline()
        return transfer

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
        plan = Plan.__new__(Plan)
        for name in ("op", "route", "link", "backend", "_local", "_remote", "_backend", "_flights", "counter"):
            setattr(plan, name, getattr(self, name))
        plan.local, plan.remote, plan.nbytes, plan.descriptors = local, remote, local.nbytes, len(local)
        plan._request, plan._prepared = request, self._backend.prepare(request)
        return plan


class Notice:
    """What stands for a plan where nothing moves: the connection by which bare notifications go to one peer."""

    op: Op = "put"
    nbytes = 0
    descriptors = 0
    backend = "control"
    sides: tuple[Side, ...] = ()

    def __init__(self, flights: Flights, peer: str, link: Link) -> None:
        self.link: Link | None = link
        self.counter = flights.counter(peer, self.backend, self.op)
        self._flights = flights
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
        self._flights.check_open()
        self._flights.check_note(tag, None)
        transfer = Transfer(self, self._flights, tag, None)
        self._flights.add(transfer)
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
