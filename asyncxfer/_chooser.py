"""Which way a transfer takes: the least predicted time among all offers.

A pure function of the offers of the backends and the size of the transfer; it knows no agent, peer or region.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ._errors import NoRouteError
from .abc import Offer, Op

__all__ = ["Candidate", "Explanation", "choose", "quickest", "weigh"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One offer, with what it would take.

    Attributes
    ----------
    backend : str
    via : str
        Which of the backend's ways; empty where it has one.
    seconds : float or None
        Predicted time; None when it cannot carry the transfer.
    reason : str
        Why it was or was not taken.
    taken : bool
    """

    backend: str
    via: str
    seconds: float | None
    reason: str
    taken: bool = False

    @property
    def route(self) -> str:
        """Backend and way in one word, as `backend=` accepts it."""
        return f"{self.backend}:{self.via}" if self.via else self.backend


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every candidate for a transfer; `str` of it is a table.

    Attributes
    ----------
    op : "put" or "get"
    nbytes, rows : int
        Size of the transfer after matching and merging.
    candidates : tuple of Candidate
        The taken one first, then by predicted time, then those that cannot.
    """

    op: Op
    nbytes: int
    rows: int
    candidates: tuple[Candidate, ...]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    @property
    def route(self) -> Candidate | None:
        """The candidate that is taken; None where nothing can carry the transfer."""
        return next((c for c in self.candidates if c.taken), None)

    def __str__(self) -> str:
        lines = [f"{self.op} of {self.nbytes:,} bytes in {self.rows:,} rows"]
        for c in self.candidates:
            cost = "-" if c.seconds is None else f"{c.seconds * 1e6:,.1f} us"
            lines.append(f"  {'->' if c.taken else '  '} {c.route:<12} {cost:>14}  {c.reason}")
        return "\n".join(lines)


def weigh(
    op: Op, rows: int, nbytes: int, offers: Iterable[tuple[str, Offer]], wanted: str | None = None
) -> Explanation:
    """Rank what the backends offer.

    Parameters
    ----------
    rows, nbytes : int
        Size of the transfer.
    offers : iterable of (backend name, Offer)
    wanted : str or None
        A backend, or ``"backend:via"``, that the caller insists on.
    """
    able: list[Candidate] = []
    unable: list[Candidate] = []
    for backend, offer in offers:
        seconds = None if offer.cost is None else offer.cost.predict(rows, nbytes)
        candidate = Candidate(backend, offer.via, seconds, offer.reason)
        if wanted is not None and wanted not in (backend, candidate.route):
            unable.append(Candidate(backend, offer.via, seconds, f"backend={wanted!r} was asked for"))
        elif seconds is None:
            unable.append(candidate)
        else:
            able.append(candidate)
    able.sort(key=lambda c: c.seconds or 0.0)
    ranked = [
        Candidate(c.backend, c.via, c.seconds, "least predicted time" if i == 0 else "slower", taken=i == 0)
        for i, c in enumerate(able)
    ]
    return Explanation(op, nbytes, rows, (*ranked, *unable))


def quickest(
    rows: int, nbytes: int, offers: Iterable[tuple[str, Offer]], wanted: str | None = None
) -> Candidate | None:
    """Give the candidate that `weigh` would take, and spare the words on the others; None where there is none.

    Parameters
    ----------
    rows, nbytes : int
        Size of the transfer.
    offers : iterable of (backend name, Offer)
    wanted : str or None
        A backend, or ``"backend:via"``, that the caller insists on.
    """
    best: tuple[str, Offer] | None = None
    least = 0.0
    for backend, offer in offers:
        if offer.cost is None or (wanted is not None and wanted not in (backend, f"{backend}:{offer.via}")):
            continue
        seconds = offer.cost.predict(rows, nbytes)
        if best is None or seconds < least:
            best, least = (backend, offer), seconds
    return None if best is None else Candidate(best[0], best[1].via, least, "least predicted time", taken=True)


def choose(explanation: Explanation) -> Candidate:
    """Return the candidate that is taken.

    Raises
    ------
    NoRouteError
        There is none; `reasons` has every candidate's.
    """
    route = explanation.route
    if route is not None:
        return route
    reasons = {c.route: c.reason for c in explanation.candidates}
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "no backend is loaded"
    raise NoRouteError(f"no backend can carry this {explanation.op} ({told})", reasons=reasons)
