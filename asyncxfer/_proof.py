"""Proofs that one belongs to a session, by its secret, which only the two agents know.

Nothing but arithmetic: what is proven, byte for byte. Who asks for which proof when is decided elsewhere.
"""

from __future__ import annotations

import hmac
import os
import struct

__all__ = [
    "KEY_BYTES",
    "NONCE_BYTES",
    "PROOF_BYTES",
    "SECRET_BYTES",
    "SESSION_BYTES",
    "data",
    "key",
    "matches",
    "resume",
    "session",
]

SESSION_BYTES = 16
SECRET_BYTES = 32
NONCE_BYTES = 16
KEY_BYTES = 16
PROOF_BYTES = 32


def session() -> tuple[bytes, bytes]:
    """Make a session's public number and its secret."""
    return os.urandom(SESSION_BYTES), os.urandom(SECRET_BYTES)


def resume(secret: bytes, session: bytes, attempt: int) -> bytes:
    """What the initiator sends to go on with a session; each attempt has a higher number than any before."""
    return _hmac(secret, b"resume" + session + struct.pack(">Q", attempt))


def data(secret: bytes, side: bytes, nonces: bytes, index: int, backend: str) -> bytes:
    """What one side, ``b"server"`` or ``b"client"``, sends to open a data connection.

    Parameters
    ----------
    secret, side : bytes
    nonces : bytes
        The client's, then the server's.
    index : int
    backend : str
    """
    return _hmac(secret, side + nonces + struct.pack(">H", index) + backend.encode())


def key(secret: bytes, backend: str) -> bytes:
    """What the two sides of a backend know of each other, and nobody else: `PeerInfo.key`, and that of `serve`."""
    return _hmac(secret, b"backend" + backend.encode())[:KEY_BYTES]


def matches(given: bytes, expected: bytes) -> bool:
    """Whether a proof is right, in a time that says nothing of it."""
    return hmac.compare_digest(given, expected)


def _hmac(secret: bytes, message: bytes) -> bytes:
    return hmac.digest(secret, message, "sha256")
