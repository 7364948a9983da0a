from typing import Final

from typing_extensions import Buffer

WIDTHS: Final[tuple[int, ...]]

def crc64nvme(data: Buffer, crc: int = 0, *, width: int = ...) -> int: ...
def combine(crc1: int, crc2: int, nbytes2: int) -> int: ...
