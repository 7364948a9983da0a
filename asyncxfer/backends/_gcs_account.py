"""Who asks Google Cloud Storage, and where it is, as google-auth knows it.

Where credentials are found and how tokens are got is google-auth's to know; it is asked by its public names, and in a
thread. Requests and objects are not known here.
"""

from __future__ import annotations

import asyncio
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from .._errors import ObjectError, RegistrationError
from ._object._trust import context

__all__ = ["INSTALL", "Bearer", "GcsAccount"]

INSTALL = "pip install 'asyncxfer[gcs]'"
_ENDPOINT = "https://storage.googleapis.com"
#: Where Google's own clients look for an emulator, which nobody needs credentials for.
_EMULATOR = "STORAGE_EMULATOR_HOST"
_SCOPES = ("https://www.googleapis.com/auth/devstorage.full_control",)
_HIDDEN = frozenset({"token", "credentials"})
_HOW = (
    "run 'gcloud auth application-default login', set GOOGLE_APPLICATION_CREDENTIALS, give one of the options "
    "service_file, token and credentials, or 'anonymous': True for a public bucket"
)


class Bearer(NamedTuple):
    """What is sent with every request: a token, and the project that pays, where it is another."""

    token: bytes
    project: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What the caller has said about a bucket."""

    endpoint_url: str | None = None
    project: str | None = None
    token: str | None = None
    service_file: str | None = None
    credentials: Any = None
    verify: str | bool | None = None
    anonymous: bool = False

    @classmethod
    def parse(cls, url: str, options: Mapping[str, object]) -> Self:
        """Check what was given."""
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name not in cls.__slots__:
                near = difflib.get_close_matches(name, cls.__slots__, 1)
                meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(cls.__slots__)}"
                raise RegistrationError(f"{url}: {name!r} is no option of gcs; {meant}")
            if value is not None:
                expected = cls._expected(name, value)
                if expected:
                    shown = "what was given" if name in _HIDDEN else repr(value)
                    raise RegistrationError(f"{url}: option {name}: {shown} will not do; expected {expected}")
                given[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        sources = [name for name in ("token", "service_file", "credentials", "anonymous") if given.get(name)]
        if len(sources) > 1:
            raise RegistrationError(f"{url}: options {' and '.join(sources)}: each says who asks; give one")
        return cls(**given)

    @staticmethod
    def _expected(name: str, value: object) -> str:
        """Say what an option has to be which is something else."""
        if name == "anonymous":
            return "" if isinstance(value, bool) else "True or False"
        if name == "verify":
            return "" if isinstance(value, bool | str) else "True, False, or the path of a file of certificates"
        if name == "credentials":
            return "" if hasattr(value, "refresh") and hasattr(value, "valid") else "credentials of google.auth"
        if name == "endpoint_url" and isinstance(value, str):
            parts = urlsplit(value)
            return "" if parts.scheme in ("http", "https") and parts.netloc else "'https://HOST'"
        if name == "service_file" and isinstance(value, os.PathLike):
            return ""
        return "" if isinstance(value, str) and value else "text"


class GcsAccount:
    """A bucket, and what gives access to it. `open` makes one.

    Attributes
    ----------
    url, bucket : str
    endpoint : str
        ``https://HOST:PORT``.
    path : str
        What precedes that of the API.
    tls : ssl.SSLContext or None
    renewable : bool
        Another token may be had when this is refused.
    """

    def __init__(self, url: str, bucket: str, options: _Options, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.url = url
        self.bucket = bucket
        self.endpoint = f"{parts.scheme}://{parts.netloc}"
        self.path = parts.path.rstrip("/")
        self.tls = context(url, options.verify) if parts.scheme == "https" else None
        self.renewable = False
        self._project = options.project or ""
        self._token = options.token
        self._credentials: Any = None

    @classmethod
    async def open(cls, bucket: str, options: Mapping[str, object]) -> GcsAccount:
        """Find out who asks.

        Raises
        ------
        RegistrationError
            Nobody is found.
        """
        url = f"gs://{bucket}"
        parsed = _Options.parse(url, options)
        return await asyncio.to_thread(cls._open, url, bucket, parsed)

    @classmethod
    def _open(cls, url: str, bucket: str, options: _Options) -> GcsAccount:
        emulator = os.environ.get(_EMULATOR, "")
        if emulator and "://" not in emulator:
            emulator = f"http://{emulator}"
        account = cls(url, bucket, options, options.endpoint_url or emulator or _ENDPOINT)
        emulated = options.endpoint_url is None and bool(emulator)
        if options.token is None and not options.anonymous:
            if options.credentials is not None:
                account._credentials = options.credentials
            elif options.service_file is not None:
                account._credentials = _from_file(url, Path(options.service_file))
            elif not emulated:
                account._credentials = _found(url)
            account.renewable = account._credentials is not None
        return account

    async def grant(self, *, refresh: bool = False) -> Bearer | None:
        """Give what is valid now; None: nothing is sent.

        Raises
        ------
        ObjectError
            There is no token any more.
        """
        if self._credentials is None:
            return None if self._token is None else Bearer(self._token.encode(), self._project.encode())
        return await asyncio.to_thread(self._refreshed, refresh)

    def _refreshed(self, refresh: bool) -> Bearer:
        import requests
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        credentials = self._credentials
        try:
            if refresh or not credentials.valid:
                with requests.Session() as session:
                    credentials.refresh(Request(session=session))
        except GoogleAuthError as error:
            raise ObjectError(
                f"{self.url}: there is no token any more: {_first_line(error)}; {_HOW}", url=self.url, backend="gcs"
            ) from error
        project = self._project or getattr(credentials, "quota_project_id", None) or ""
        return Bearer((credentials.token or "").encode(), project.encode())


def _from_file(url: str, path: Path) -> Any:
    """Give the credentials of a service account."""
    from google.auth.exceptions import GoogleAuthError
    from google.oauth2 import service_account

    try:
        return service_account.Credentials.from_service_account_file(str(path), scopes=_SCOPES)
    except (OSError, ValueError, GoogleAuthError) as error:
        raise RegistrationError(
            f"{url}: option service_file: {_first_line(error)}; expected the file in JSON that was made for the key of "
            "a service account"
        ) from error


def _found(url: str) -> Any:
    """Let google-auth look for credentials."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    try:
        return google.auth.default(scopes=_SCOPES)[0]
    except GoogleAuthError as error:
        raise RegistrationError(f"{url}: no credentials were found: {_first_line(error)}; {_HOW}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
