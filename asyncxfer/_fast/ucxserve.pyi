from collections.abc import Sequence
from typing import final

import numpy.typing as npt

from asyncxfer._fast.link import GatePage
from asyncxfer._fast.poller import Mailbox
from asyncxfer._fast.ucxport import Port

def live() -> int: ...

@final
class UcxSession:
    @property
    def joined(self) -> bool: ...
    def __new__(
        cls, ports: Sequence[Port], mailbox: Mailbox, owner: int, page: GatePage, key: bytes, *, remote: bool
    ) -> UcxSession: ...
    def close(self) -> None: ...
    def go_on(self) -> None: ...
    def hold(self) -> None: ...
    def open(
        self,
        slot: int,
        epoch: int,
        number: int,
        bases: npt.ArrayLike,
        sizes: npt.ArrayLike,
        *,
        readable: bool,
        writable: bool,
    ) -> None: ...
    def shut(self, slot: int) -> None: ...
