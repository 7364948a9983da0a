from typing import Final, final

import numpy.typing as npt

from asyncxfer._fast.completion import Completion
from asyncxfer._fast.engine import Work
from asyncxfer._fast.link import Link
from asyncxfer._fast.poller import Mailbox
from asyncxfer._fast.tls import Connection

LOST: Final = 1

def live() -> int: ...

@final
class Group:
    def __new__(cls, mailbox: Mailbox, owner: int, link: Link, streams: int) -> Group: ...
    def attach(self, index: int, fd: int, tls: Connection | None = None) -> None: ...
    def up(self) -> list[int]: ...
    def answers(self, index: int) -> int: ...
    def fail(self) -> None: ...
    def close(self) -> None: ...

@final
class NetWork(Work):
    @property
    def group(self) -> Group: ...
    def __init__(
        self,
        group: Group,
        pairs: npt.ArrayLike,
        local_bases: npt.ArrayLike,
        remote_bases: npt.ArrayLike,
        *,
        checked: bool = False,
        **options: object,
    ) -> None: ...

def submit(work: NetWork, completion: Completion, priority: int = 0) -> None: ...
