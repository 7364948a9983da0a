"""Whether two things are the same by their size and a checksum, where that is known without copying one of them."""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable

from asyncxfer import Agent, ObjectInfo
from asyncxfer._fast.crc32c import crc32c
from asyncxfer._fast.crc64 import crc64nvme

from ._staging import SLOT, Lent, Staging

__all__ = ["encoded", "has_crc", "same_as_file", "same_files", "same_objects", "stated"]

_MD5 = re.compile(r'"?([0-9a-fA-F]{32})"?')  # etag of an object that was written at once, in most stores


def encoded(crc: int) -> str:
    """A CRC64NVME as stores state it."""
    return f"crc64nvme:{b64encode(crc.to_bytes(8, 'big')).decode()}"


def stated(info: ObjectInfo | None) -> str | None:
    """The CRC64NVME that a store states of an object; None where it does not."""
    checksum = info.checksum if info is not None else None
    return checksum if checksum is not None and checksum.startswith("crc64nvme:") else None


def has_crc(info: ObjectInfo) -> bool:
    """Whether this states a CRC; what a list states may be less than what its store knows of an object."""
    return (info.checksum or "").startswith(("crc64nvme:", "crc32c:"))


def same_objects(one: ObjectInfo, other: ObjectInfo) -> bool:
    """Whether stores say that two objects are the same; False where they do not say."""
    if one.nbytes != other.nbytes:
        return False
    if one.checksum is not None and other.checksum is not None:
        kinds = one.checksum.partition(":")[0], other.checksum.partition(":")[0]
        if kinds[0] == kinds[1]:
            return one.checksum == other.checksum
    mine, theirs = _MD5.fullmatch(one.etag), _MD5.fullmatch(other.etag)
    return mine is not None and theirs is not None and mine[1].lower() == theirs[1].lower()


async def same_as_file(info: ObjectInfo, path: str, agent: Agent, staging: Staging) -> bool:
    """Whether an object is what a file of the same size holds; False where its store does not say."""
    kind, _, value = (info.checksum or "").partition(":")
    if kind == "crc64nvme":
        return info.checksum == encoded(await _crc(crc64nvme, path, agent, staging))
    if kind == "crc32c":
        return value == b64encode((await _crc(crc32c, path, agent, staging)).to_bytes(4, "big")).decode()
    etag = _MD5.fullmatch(info.etag)
    md5 = b64decode(value).hex() if kind == "md5" else etag[1].lower() if etag is not None else ""
    if not md5:
        return False
    digest = hashlib.md5(usedforsecurity=False)
    async for lent in _pieces(path, agent, staging):
        for view in lent.views():
            digest.update(view)
    return digest.hexdigest() == md5


async def same_files(one: str, other: str, agent: Agent, staging: Staging) -> bool:
    """Whether two files of the same size hold the same."""
    crc = await _crc(crc64nvme, one, agent, staging)
    return crc == await _crc(crc64nvme, other, agent, staging)


async def _crc(sum_: Callable[..., int], path: str, agent: Agent, staging: Staging) -> int:
    crc = 0
    async for lent in _pieces(path, agent, staging):
        for view in lent.views():
            crc = sum_(view, crc)
    return crc


async def _pieces(path: str, agent: Agent, staging: Staging) -> AsyncIterator[Lent]:
    """What is in a file, piece by piece."""
    async with agent.open(path) as file:
        for start in range(0, file.nbytes, SLOT):
            nbytes = min(SLOT, file.nbytes - start)
            async with staging.lend(nbytes) as lent:
                await agent.get(lent.rows, file.bytes[start : start + nbytes])
                yield lent
