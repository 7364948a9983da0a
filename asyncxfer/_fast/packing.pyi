import numpy.typing as npt

__pyx_capi__: dict[str, object]  # what other Cython modules link to

def carry(pairs: npt.ArrayLike, chunk: npt.ArrayLike, sizes: npt.ArrayLike, bases: npt.ArrayLike) -> None: ...
