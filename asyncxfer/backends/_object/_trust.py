"""Whose certificates are believed."""

from __future__ import annotations

import ssl
from pathlib import Path

from ..._errors import RegistrationError

__all__ = ["context"]


def context(url: str, verify: str | bool | None) -> ssl.SSLContext:
    """Make what connections are encrypted by: with the authorities of the system, those of a file, or any.

    Raises
    ------
    RegistrationError
        The file cannot be read.
    """
    if verify is False:
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        found.check_hostname = False
        found.verify_mode = ssl.CERT_NONE
        return found
    if not isinstance(verify, str):
        return ssl.create_default_context()
    try:
        if Path(verify).is_dir():
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        raise RegistrationError(
            f"{url}: certificates cannot be read from {verify}: {error}; the option verify says which file"
        ) from error
