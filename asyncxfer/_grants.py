"""Who may do what with a region: every peer the same, or each what was granted to it.

Pure rules. How peers are told, and how the rules are enforced, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from ._errors import RegistrationError
from ._memory import Access

__all__ = ["Granted", "Grants"]

Granted: TypeAlias = Mapping[str, Access] | Iterable[str] | None


class Grants:
    """The rules of one region.

    Parameters
    ----------
    granted : mapping of str to access, iterable of str, or None
        Peers by name, with what each may do, or with `access`; None: every peer.
    access : {"r", "w", "rw"}
    readonly : bool
        The memory must not be written, whoever asks.

    Raises
    ------
    RegistrationError
        That makes no sense.
    """

    def __init__(self, granted: Granted, access: Access, *, readonly: bool) -> None:
        if isinstance(granted, (str, bytes)):
            raise RegistrationError(f"grants={granted!r}: expected names, such as [{granted!r}], or a mapping of them")
        self._readonly = readonly
        self._others = access if granted is None else None
        self._named: dict[str, Access | None] = {}
        named = {} if granted is None else granted if isinstance(granted, Mapping) else dict.fromkeys(granted, access)
        for peer, theirs in named.items():
            self.grant(peer, theirs)

    def of(self, peer: str) -> Access | None:
        """What a peer may do; None: it may not even know of the region."""
        return self._named.get(peer, self._others)

    def grant(self, peer: str, access: Access) -> None:
        """Let a peer do so much from now on, neither more nor less."""
        if access not in ("r", "w", "rw"):
            raise RegistrationError(f"access {access!r} for peer {peer!r}; expected 'r', 'w' or 'rw'")
        if not peer:
            raise RegistrationError(f"grants name a peer {peer!r}; expected the name of an agent")
        self._named[peer] = "r" if self._readonly else access

    def revoke(self, peer: str) -> None:
        """Let a peer do nothing from now on."""
        self._named[peer] = None
