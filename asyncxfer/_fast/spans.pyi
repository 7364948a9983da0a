from typing import final

import numpy as np
import numpy.typing as npt

from asyncxfer._fast.descriptors import Pairs

@final
class Spans:
    def __new__(
        cls,
        pairs: Pairs,
        bases: npt.NDArray[np.uint64],
        *,
        near: bool,
        same: npt.NDArray[np.uint32] | None = None,
    ) -> Spans: ...
    @property
    def chunks(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[int, int, int]: ...
    def numbers(self, index: int) -> list[int]: ...
    def ends(self) -> npt.NDArray[np.uint64]: ...
    def buffers(self, index: int, start: int, nbytes: int, *, writable: bool) -> list[memoryview]: ...
