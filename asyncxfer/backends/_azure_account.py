"""Who asks Azure, and where a container is, as azure-storage-blob and azure-identity know them.

Connection strings, URLs and kinds of credentials are the SDK's to understand, tokens azure-identity's to get and to
keep; they are asked by their public names, and in a thread. Requests and blobs are not known here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import difflib
import importlib.util
import inspect
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from .._errors import ObjectError, RegistrationError
from ._object._trust import context

__all__ = ["INSTALL", "AzureAccount", "Bearer", "Grant", "Sas", "SharedKey"]

INSTALL = "pip install 'asyncxfer[azure]'"
_API_VERSION = "2023-11-03"
_SCOPE = "https://storage.azure.com/.default"
_HIDDEN = frozenset({"connection_string", "credential"})
_HOW = (
    "give the option credential (an account key, a SAS token, or a credential of azure.identity), or 'anonymous': True "
    "for a public container"
)


class SharedKey(NamedTuple):
    """Requests are signed by the key of the account."""

    account: str
    key: bytes


class Sas(NamedTuple):
    """A shared access signature is added to every URL."""

    query: bytes


class Bearer(NamedTuple):
    """A token is sent with every request."""

    token: bytes


Grant = SharedKey | Sas | Bearer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What the caller has said about a container."""

    account_url: str | None = None
    connection_string: str | None = None
    credential: Any = None
    api_version: str = _API_VERSION
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
                raise RegistrationError(f"{url}: {name!r} is no option of azure; {meant}")
            if value is not None:
                expected = cls._expected(name, value)
                if expected:
                    shown = "what was given" if name in _HIDDEN else repr(value)
                    raise RegistrationError(f"{url}: option {name}: {shown} will not do; expected {expected}")
                given[name] = value
        parsed = cls(**given)
        if (parsed.account_url is None) == (parsed.connection_string is None):
            raise RegistrationError(
                f"{url}: where the account is has to be said once: give the option account_url, as "
                "'https://ACCOUNT.blob.core.windows.net', or connection_string"
            )
        if parsed.anonymous and parsed.credential is not None:
            raise RegistrationError(f"{url}: option anonymous: who has a credential is not; give one")
        return parsed

    @staticmethod
    def _expected(name: str, value: object) -> str:
        """Say what an option has to be which is something else."""
        if name == "anonymous":
            return "" if isinstance(value, bool) else "True or False"
        if name == "verify":
            return "" if isinstance(value, bool | str) else "True, False, or the path of a file of certificates"
        if name != "credential":
            return "" if isinstance(value, str) and value else "text"
        if inspect.iscoroutinefunction(getattr(value, "get_token", None)):
            return "a credential of azure.identity, not of azure.identity.aio: that belongs to an event loop"
        if (isinstance(value, str) and value) or any(
            hasattr(value, name) for name in ("get_token", "named_key", "signature")
        ):
            return ""
        return "an account key, a SAS token, or a credential of azure.core or azure.identity"


class AzureAccount:
    """A container, and what gives access to it. `open` makes one.

    Attributes
    ----------
    url : str
        For messages.
    endpoint : str
        ``https://HOST:PORT``.
    path : str
        Of the container.
    tls : ssl.SSLContext or None
    api_version : str
    renewable : bool
        Other credentials may be had when these are refused.
    """

    def __init__(self, url: str, where: str, options: _Options, credential: Any, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(where)
        self.url = url
        self.endpoint = f"{parts.scheme}://{parts.netloc}"
        self.path = parts.path.rstrip("/")
        self.tls = tls
        self.api_version = options.api_version
        self._credential = credential
        self._sas = parts.query
        self.renewable = hasattr(credential, "get_token") or hasattr(credential, "signature")
        self._mine: Any = None  # a credential that was made here

    @classmethod
    async def open(cls, container: str, options: Mapping[str, object]) -> AzureAccount:
        """Have the SDK understand what was given, and find a credential where none was.

        Raises
        ------
        RegistrationError
            It cannot.
        """
        url = f"az://{container}"
        parsed = _Options.parse(url, options)
        return await asyncio.to_thread(cls._open, url, container, parsed)

    @classmethod
    def _open(cls, url: str, container: str, options: _Options) -> AzureAccount:
        where, credential = _understood(url, container, options)
        tls = context(url, options.verify) if where.startswith("https:") else None
        account = cls(url, where, options, credential, tls)
        if credential is None and not account._sas and not options.anonymous:
            if tls is None:
                raise RegistrationError(f"{url}: no credentials were given, and tokens go over https only; {_HOW}")
            account._search()
        return account

    def _search(self) -> None:
        """Let azure-identity find a credential."""
        if importlib.util.find_spec("azure.identity") is None:
            raise RegistrationError(f"{self.url}: no credentials were given; {_HOW}, or let them be found: {INSTALL}")
        from azure.core.exceptions import AzureError
        from azure.identity import DefaultAzureCredential

        self._credential = self._mine = DefaultAzureCredential()
        self.renewable = True
        try:
            self._mine.get_token(_SCOPE)
        except AzureError as error:
            self._mine.close()
            raise RegistrationError(f"{self.url}: no credentials were found: {_first_line(error)}; {_HOW}") from error

    async def grant(self) -> Grant | None:
        """Give what gives access now; None: nothing is needed.

        Raises
        ------
        ObjectError
            There is none any more.
        """
        credential = self._credential
        if hasattr(credential, "get_token"):
            return await asyncio.to_thread(self._token)
        if hasattr(credential, "signature"):
            return Sas(credential.signature.lstrip("?").encode())
        if credential is not None:
            return _key_of(self.url, credential)
        return Sas(self._sas.encode()) if self._sas else None

    def _token(self) -> Bearer:
        from azure.core.exceptions import AzureError

        try:
            return Bearer(self._credential.get_token(_SCOPE).token.encode())
        except AzureError as error:
            raise ObjectError(
                f"{self.url}: there is no token any more: {_first_line(error)}; see that the credential can get one",
                url=self.url, backend="azure",
            ) from error  # fmt: skip

    async def aclose(self) -> None:
        """Close the credential that was found."""
        if self._mine is not None:
            await asyncio.to_thread(self._mine.close)


class _NamedKey(NamedTuple):
    """An account and its key."""

    account_name: str
    account_key: str


def _understood(url: str, container: str, options: _Options) -> tuple[str, Any]:
    """Give the URL of the container, perhaps with a SAS, and a credential, as the SDK understands what was given."""
    from azure.storage.blob import ContainerClient

    with _explained(url):
        if options.connection_string is not None:
            client = ContainerClient.from_connection_string(
                options.connection_string, container, credential=options.credential
            )
        else:
            client = ContainerClient(options.account_url, container, credential=options.credential)
        with contextlib.closing(client):
            where, credential = client.url, client.credential
            if options.anonymous:
                return where.partition("?")[0], None
            if hasattr(credential, "account_key"):
                credential = _NamedKey(credential.account_name, credential.account_key)
                _key_of(url, credential)
    return where, credential


def _key_of(url: str, credential: Any) -> SharedKey:
    """Give the key that requests are signed with; credentials of the SDK's own may change it."""
    account, key = getattr(credential, "named_key", credential)
    try:
        return SharedKey(account, base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        raise RegistrationError(f"{url}: the account key is not in base64; copy it again, all of it") from None


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Say what to do where the SDK refuses."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except (ValueError, TypeError, AzureError) as error:
        raise RegistrationError(
            f"{url}: {_first_line(error)}; correct the option account_url, connection_string or credential"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
