"""Who asks S3 in tests, and where: keys that do not change unless a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

from servers import REGION, Identity

from asyncxfer._config import Config
from asyncxfer.backends._s3_store import Credentials, S3Store

__all__ = ["FAULT_ROUNDS", "FixedAccount", "rounds", "s3_store", "soon"]

#: How often each fault is met: acceptance runs ask for more.
FAULT_ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))


def rounds() -> Iterator[int]:
    """Give the numbers of the rounds that a fault comes."""
    yield from range(FAULT_ROUNDS)


def soon(seconds: float = 60.0) -> float:
    """Give a deadline; one that is no part of the test, where nothing is said."""
    return asyncio.get_running_loop().time() + seconds


class FixedAccount:
    """A bucket by its path, one pair of keys, and what was asked for."""

    def __init__(self, url: str, bucket: str, identity: Identity | None, *, tls: ssl.SSLContext | None = None) -> None:
        self.endpoint = url
        self.path = f"/{bucket}"
        self.region = REGION
        self.tls = tls
        self.keys = None if identity is None else Credentials(identity.access_key, identity.secret_key)
        self.refreshed = 0
        self.moves: list[str] = []

    async def credentials(self, *, refresh: bool = False) -> Credentials | None:
        self.refreshed += refresh
        return self.keys

    async def elsewhere(self, region: str) -> None:
        self.moves.append(region)
        self.region = region


@contextlib.asynccontextmanager
async def s3_store(account: FixedAccount, **config: Any) -> AsyncIterator[S3Store]:
    """A store for the block."""
    store = S3Store(account.path.removeprefix("/"), account, Config(**config))
    try:
        yield store
    finally:
        await store.aclose()
