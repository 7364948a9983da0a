import numpy as np
import numpy.typing as npt

def copy_rows(function: int, rows: npt.NDArray[np.uint64], host: int, stream: int, *, to_device: bool) -> int: ...
