from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from asyncxfer._fast.completion import Prepared

class _Owner(Protocol):
    def too_short(self, offset: int, expected: int, found: int) -> BaseException: ...
    def failed(
        self, op: Literal["read", "write", "sync"], errno: int, *, offset: int = 0, nbytes: int = 0
    ) -> BaseException: ...

def live() -> int: ...

@disjoint_base
class OpenFile:
    owner: _Owner
    def __init__(
        self,
        owner: _Owner,
        fd: int,
        direct_fd: int,
        *,
        alignment: int,
        memory_alignment: int,
        durability: Literal["none", "data", "full"],
        emulated: bool | None = None,
    ) -> None: ...
    def close_view(self) -> None: ...

@disjoint_base
class FileWork(Prepared):
    def __init__(
        self,
        pairs: npt.NDArray[np.void],
        bases: npt.ArrayLike,
        file: OpenFile,
        *,
        local: bool,
        write: bool,
        request_bytes: int = ...,
        request_rows: int = 1024,
        inline_bytes: int = 0,
        inline_rows: int = 0,
        ring: bool = False,
        keep: object = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def requests(self) -> tuple[int, int]: ...
    def ends(self) -> npt.NDArray[np.uint64]: ...
    def failure(self, trouble: int, error: int, offset: int, expected: int, found: int) -> BaseException: ...
