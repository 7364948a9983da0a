import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from asyncxfer._fast.completion import Completion, Prepared
from asyncxfer._fast.link import Link

__pyx_capi__: dict[str, object]  # what other Cython modules link to

def acquire(threads: int) -> None: ...
def release() -> None: ...
def after_fork() -> None: ...
def guard() -> None: ...
def threads() -> int: ...
def submit(work: Work, completion: Completion, priority: int = 0) -> None: ...

@disjoint_base
class Work(Prepared):
    def __init__(
        self,
        pairs: npt.NDArray[np.void],
        local_bases: npt.ArrayLike,
        remote_bases: npt.ArrayLike,
        *,
        put: bool,
        attach: bool = False,
        link: Link | None = None,
        slot: int = 0,
        epoch: int = 0,
        chunk_bytes: int = ...,
        chunk_rows: int = 1024,
        small_bytes: int = 0,
        small_rows: int = 0,
        stream_bytes: int = 0,
        keep: object = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def small(self) -> bool: ...
    def ends(self) -> npt.NDArray[np.uint64]: ...
