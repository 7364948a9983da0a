"""Who asks S3, and where a bucket is, as aiobotocore knows it: the only source of credentials, endpoints and regions.

What may be in files, in the environment, at a metadata service or the output of a program is the SDK's to find, and is
asked of the SDK by its public names, always in a thread and, where it has to be, on an event loop that ends with the
question: nothing of it holds up the loop that moves data. Between two questions an `Account` answers from memory.
Where a bucket is, botocore tells by itself; the rest of aiobotocore, whose import takes twice as long, is left until it
is needed.

Requests, objects and data are not known here. Where what the SDK is set up to do is more than a signed request to one
endpoint (proxies, access points, S3 Express), `Account.limits` says so, and only the SDK's own data path may be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from .._errors import ObjectError, RegistrationError
from ._s3_dialect import Credentials

__all__ = ["Account"]

_INSTALL = "pip install 'asyncxfer[s3]'"
_KEY = "key"  # of an object that nobody asks for
_STYLES = ("auto", "path", "virtual")
_PORTS = {"http": 80, "https": 443}
#: The SDK itself begins to ask for new credentials so many seconds before the old ones expire.
_EARLY = 880.0
_LONGEST = 10 * 365 * 86400.0
#: Credentials that were refused are not asked for again at once: others were refused with the same ones.
_FORCED_AGAIN = 5.0
_NO_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile with the option profile_name, or give the "
    "option 'anonymous': True for a public bucket"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What the caller has said about a bucket; None is left to the SDK."""

    endpoint_url: str | None = None
    region_name: str | None = None
    profile_name: str | None = None
    aws_access_key_id: str | None = None
    aws_secret_access_key: str | None = None
    aws_session_token: str | None = None
    verify: str | bool | None = None
    addressing_style: str | None = None
    anonymous: bool = False

    @classmethod
    def parse(cls, bucket: str, options: Mapping[str, object]) -> Self:
        """Check what was given."""
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in cls.__slots__:
                near = difflib.get_close_matches(name, cls.__slots__, 1)
                meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(cls.__slots__)}"
                raise RegistrationError(f"s3://{bucket}: {name!r} is no option of s3; {meant}")
            values[name] = cls._value(bucket, name, value)
        parsed = cls(**values)
        parsed._agree(bucket)
        return parsed

    @staticmethod
    def _value(bucket: str, name: str, value: object) -> object:
        expected = "text"
        if name == "anonymous":
            expected = "True or False"
            if isinstance(value, bool):
                return value
        elif value is None:
            return None
        elif name == "verify":
            expected = "True, False, or the path of a file of certificates"
            if isinstance(value, bool | str | os.PathLike):
                return value if isinstance(value, bool) else os.fspath(value)
        elif isinstance(value, str) and value:
            if name != "addressing_style" or value in _STYLES:
                return value
            expected = " or ".join(map(repr, _STYLES))
        shown = "what was given" if "secret" in name or "token" in name else repr(value)
        raise RegistrationError(f"s3://{bucket}: option {name}: {shown} will not do; expected {expected}")

    def _agree(self, bucket: str) -> None:
        given = {name for name in self.__slots__ if name.startswith("aws_") and getattr(self, name) is not None}
        if self.anonymous and given:
            raise RegistrationError(
                f"s3://{bucket}: option anonymous: who has {', '.join(sorted(given))} is not; give one"
            )
        missing = {"aws_access_key_id", "aws_secret_access_key"} - given
        if given and missing:
            raise RegistrationError(
                f"s3://{bucket}: option {missing.pop()} is missing; access key and secret key go together"
            )


class _Place(NamedTuple):
    """Where a bucket is."""

    endpoint: str
    path: str
    region: str
    verify: str | bool
    limits: str


class _Obtained(NamedTuple):
    """Credentials, and the object of the SDK that keeps them; seconds until they expire, None where they do not."""

    source: Any
    credentials: Credentials
    lifetime: float | None


@functools.lru_cache(maxsize=4)
def _models(path: str | None) -> Any:
    """Give what reads the SDK's descriptions of services, which takes three quarters of making a client; read once."""
    from botocore.loaders import create_loader

    return create_loader(path)


class _Sdk:
    """The SDK as it is set up for one bucket. All of it blocks, and is called in a thread."""

    def __init__(self, bucket: str, options: _Options) -> None:
        self._bucket = bucket
        self._options = options

    def session(self, region: str | None = None, *, waits: bool = False) -> Any:
        """Make a session, which reads configuration anew: one of botocore, or one that waits on an event loop."""
        if waits:
            from aiobotocore.session import AioSession as Session
        else:
            from botocore.session import Session

        # What the SDK's client believes where nothing else is said, read by the SDK's own rules.
        session = Session(
            session_vars={"requests_ca_bundle": (None, "REQUESTS_CA_BUNDLE", None, None)},
            profile=self._options.profile_name,
        )
        session.register_component("data_loader", _models(session.get_config_variable("data_path")))
        region = region or self._options.region_name
        if region is not None:
            session.set_config_variable("region", region)
        return session

    def config(self, *, waits: bool = False, **more: Any) -> Any:
        """Give the configuration of a client of a session."""
        if waits:
            from aiobotocore.config import AioConfig as Config
        else:
            from botocore.config import Config

        if self._options.addressing_style is not None:
            more["s3"] = {**more.get("s3", {}), "addressing_style": self._options.addressing_style}
        return Config(**more)

    def place(self, region: str | None) -> _Place:
        """Let the SDK make a request, and look where it would go."""
        with self._explained("find out where it is"):
            session = self.session(region)
            limits = self._limits(session)
            # What is not one endpoint with one kind of signature is not asked about: its region will do.
            url, scope = self._request(session, "bucket" if limits else self._bucket)
            parts = urlsplit(url)
            _, _, signed_for, service, _ = scope.split("/")
            netloc = parts.netloc if parts.port is not None else f"{parts.netloc}:{_PORTS[parts.scheme]}"
            return _Place(
                endpoint=f"{parts.scheme}://{netloc}",
                path=parts.path.removesuffix(f"/{_KEY}"),
                region=signed_for,
                verify=self._verify(session),
                limits=limits or _detour(url, service),
            )

    def _mute(self, session: Any, *, waits: bool = False) -> Any:
        """Make a client whose requests are not to be sent."""
        # Nobody has to be believed: reading certificates would take longer than all the rest.
        return session.create_client(
            "s3", endpoint_url=self._options.endpoint_url, aws_access_key_id="nobody", aws_secret_access_key=_KEY,
            config=self.config(waits=waits, signature_version="s3v4", retries={"total_max_attempts": 1}), verify=False,
        )  # fmt: skip

    def _request(self, session: Any, bucket: str) -> tuple[str, str]:
        """Give the URL of a request for an object, and the scope of its signature."""
        with contextlib.closing(self._mute(session)) as s3:
            s3.meta.events.register_first("before-send.s3", _Seen.stop)
            try:
                s3.get_object(Bucket=bucket, Key=_KEY)
            except _Seen as seen:
                return seen.url, seen.scope
        raise AssertionError

    async def _warm(self, session: Any) -> None:
        async with self._mute(session, waits=True) as s3:
            s3.meta.events.register_first("before-send.s3", _Seen.stop)
            with contextlib.suppress(_Seen):
                await s3.get_object(Bucket="bucket", Key=_KEY)

    def _limits(self, session: Any) -> str:
        """Say what of the bucket's name and of the configuration takes more than a signed request to one endpoint."""
        if self._bucket.startswith("arn:"):
            return "an access point is named by an ARN"
        if self._bucket.endswith(("--x-s3", "--xa-s3")):
            return "S3 Express has sessions of its own"
        if _asks(session, "use_accelerate_endpoint"):
            return "the profile asks for S3 Transfer Acceleration"
        if _asks(session, "payload_signing_enabled"):
            return "the profile asks for signed payloads"
        version = _settings(session).get("signature_version", "s3v4")
        if version != "s3v4":
            return f"the profile asks for signatures of version {version}"
        return ""

    def _verify(self, session: Any) -> str | bool:
        """Give the path of the certificates that are believed; False: any is."""
        from botocore.httpsession import get_cert_path

        for verify in (self._options.verify, *map(session.get_config_variable, ("ca_bundle", "requests_ca_bundle"))):
            if verify is False:
                return False
            if verify is not None:
                break
        else:
            verify = True
        return str(get_cert_path(verify))

    def warm_session(self, region: str) -> Any:
        """Make a session that has read all that a client takes."""
        with self._explained("make a client"):
            session = self.session(region, waits=True)
            asyncio.run(self._warm(session))
            return session

    def context(self, verify: str | bool) -> ssl.SSLContext:
        """Make what connections are encrypted by."""
        if isinstance(verify, str):
            try:
                if Path(verify).is_dir():
                    return ssl.create_default_context(capath=verify)
                return ssl.create_default_context(cafile=verify)
            except OSError as error:
                raise RegistrationError(
                    f"s3://{self._bucket}: certificates cannot be read from {verify}: {error}; the option verify, "
                    "AWS_CA_BUNDLE or ca_bundle in the profile says which file"
                ) from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def client(self, session: Any, anonymous: bool, *, connections: int, attempts: int, patience: float) -> Any:
        """Make a client of a session that has read all."""
        from botocore import UNSIGNED

        more: dict[str, Any] = {"signature_version": UNSIGNED} if anonymous else {}
        if not _asks(session, "payload_signing_enabled"):
            more["s3"] = {"payload_signing_enabled": False}
        config = self.config(
            waits=True,
            # Bodies carry checksums that are computed here, and parameters are right.
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
            parameter_validation=False,
            max_pool_connections=connections, connect_timeout=patience, read_timeout=patience,
            retries={"mode": "standard", "total_max_attempts": attempts}, **more,
        )  # fmt: skip
        options = self._options
        return session.create_client("s3", endpoint_url=options.endpoint_url, verify=options.verify, config=config)

    def load(self) -> _Obtained:
        """Search for credentials, as if nobody had before."""
        options = self._options
        if options.aws_access_key_id is not None and options.aws_secret_access_key is not None:
            given = Credentials(options.aws_access_key_id, options.aws_secret_access_key, options.aws_session_token)
            return _Obtained(None, given, None)
        with self._explained("find credentials"):
            session = self.session(waits=True)
            source = asyncio.run(session.get_credentials())
            if source is None:
                raise RegistrationError(f"s3://{self._bucket}: there are no credentials; {_NO_CREDENTIALS}")
            return self.ask(source)

    def ask(self, source: Any) -> _Obtained:
        """Let the SDK refresh credentials, if it finds that it is time."""
        frozen = asyncio.run(source.get_frozen_credentials())
        return _Obtained(source, Credentials(frozen.access_key, frozen.secret_key, frozen.token), _lifetime(source))

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from botocore.exceptions import InvalidRegionError, ProfileNotFound

        try:
            yield
        except RegistrationError:
            raise
        except ProfileNotFound as error:
            advice = "look at the option profile_name, AWS_PROFILE and ~/.aws/config"
            raise RegistrationError(f"s3://{self._bucket}: {error}; {advice}") from error
        except InvalidRegionError as error:
            advice = "look at the option region_name, AWS_DEFAULT_REGION and the profile"
            raise RegistrationError(f"s3://{self._bucket}: {error}; {advice}") from error
        except Exception as error:  # what programs, files and services give to the SDK may be anything
            advice = f"to {what}, the SDK looks at options, environment and ~/.aws/config"
            kind = type(error).__name__
            if what == "find credentials":
                advice += "; 'anonymous': True is for public buckets"
            raise RegistrationError(f"s3://{self._bucket}: cannot {what}: {error} ({kind}); {advice}") from error


def _settings(session: Any) -> Mapping[str, Any]:
    """Give what the profile says about S3."""
    found = session.get_scoped_config().get("s3")
    return found if isinstance(found, Mapping) else {}


def _asks(session: Any, name: str) -> bool:
    return str(_settings(session).get(name)).lower() == "true"


class _Seen(Exception):  # noqa: N818 - it is no error
    """A request that was about to be sent."""

    def __init__(self, url: str, scope: str) -> None:
        super().__init__(url)
        self.url, self.scope = url, scope

    @classmethod
    def stop(cls, request: Any, **_more: object) -> None:
        """Keep the SDK from sending it."""
        authorization = request.headers["Authorization"]
        authorization = authorization.decode() if isinstance(authorization, bytes) else authorization
        raise cls(request.url, authorization.partition("Credential=")[2].partition(",")[0])


def _detour(url: str, service: str) -> str:
    """Say why a request to `url` would not go straight there."""
    from botocore.utils import get_environ_proxies

    if service != "s3":
        return f"requests are signed for {service}"
    if urlsplit(url).scheme in get_environ_proxies(url):
        return "the environment names a proxy"
    return ""


def _lifetime(source: Any) -> float | None:
    """How many seconds are left, by the only question that the SDK answers about it: are there as many as these?"""
    needed = getattr(source, "refresh_needed", None)
    if needed is None or not needed(_LONGEST):
        return None
    low, high = 0.0, _LONGEST
    while high - low > 1 / 16:
        middle = (low + high) / 2
        if needed(middle):
            high = middle
        else:
            low = middle
    return low


class _Lender:
    """The SDK's only source of credentials, for a client that is to have those of an account."""

    def __init__(self, account: Account) -> None:
        self._account = account

    async def load_credentials(self) -> Any:
        """Give what the client asks before each request."""
        from aiobotocore.credentials import AioCredentials
        from botocore.credentials import ReadOnlyCredentials

        account = self._account

        class Lent(AioCredentials):  # type: ignore[misc]
            async def get_frozen_credentials(self) -> Any:
                given = await account.credentials()
                return given and ReadOnlyCredentials(*given)

        return Lent("an account's", "an account's")


class Account:
    """Who asks for one bucket, and where it is; used by one event loop. Made by `open`, ended by `aclose`.

    Attributes
    ----------
    bucket, url : str
        Its name, and as messages have it.
    endpoint : str
        ``https://host:port`` of the bucket.
    path : str
        What stands before ``/key`` in the target of a request, percent-encoded; empty where the host names the bucket.
    region : str
        What requests are signed for.
    tls : ssl.SSLContext or None
        None for http.
    limits : str
        Why only the SDK's own data path may be used; empty where any may.
    """

    def __init__(self, bucket: str, sdk: _Sdk, place: _Place, tls: ssl.SSLContext | None) -> None:
        self.bucket = bucket
        self.url = f"s3://{bucket}"
        self.tls = tls
        self._sdk = sdk
        self._settle(place)
        self._moving = asyncio.Lock()
        self._current: Credentials | None = None
        self._source: Any = None
        self._ask_at = self._ends_at = float("inf")  # by time.monotonic()
        self._searched_at = float("-inf")
        self._renewing: asyncio.Task[Exception | None] | None = None

    @classmethod
    async def open(cls, bucket: str, options: Mapping[str, object]) -> Self:
        """Find out who asks and where the bucket is; nothing is asked of the bucket itself.

        Parameters
        ----------
        bucket : str
            Its name, or the ARN of an access point.
        options : mapping of str to object
            ``endpoint_url``, ``region_name``, ``profile_name``, ``aws_access_key_id``, ``aws_secret_access_key``,
            ``aws_session_token``, ``verify``, ``addressing_style`` and ``anonymous``; the SDK finds the rest.

        Raises
        ------
        RegistrationError
            aiobotocore is not installed, an option is unknown or wrong, or there are no credentials.
        """
        parsed = _Options.parse(bucket, options)
        sdk, place, tls, obtained = await asyncio.to_thread(cls._found, bucket, parsed)
        account = cls(bucket, sdk, place, tls)
        if obtained is not None:
            account._take(obtained)
        return account

    @staticmethod
    def _found(bucket: str, options: _Options) -> tuple[_Sdk, _Place, ssl.SSLContext | None, _Obtained | None]:
        try:
            import botocore.session  # noqa: F401 - all that follows needs it
        except ImportError as error:
            raise RegistrationError(f"s3://{bucket}: aiobotocore cannot be imported: {error}; {_INSTALL}") from error
        sdk = _Sdk(bucket, options)
        place = sdk.place(None)
        tls = sdk.context(place.verify) if place.endpoint.startswith("https:") else None
        return sdk, place, tls, None if options.anonymous else sdk.load()

    def _settle(self, place: _Place) -> None:
        self.endpoint, self.path, self.region, self.limits = place.endpoint, place.path, place.region, place.limits

    async def elsewhere(self, region: str) -> None:
        """Learn that the bucket is in another region: endpoint, path and region are that one's from now on.

        Raises
        ------
        ObjectError
            That is no region.
        """
        async with self._moving:
            if region == self.region:
                return
            try:
                self._settle(await asyncio.to_thread(self._sdk.place, region))
            except RegistrationError as error:
                raise ObjectError(
                    f"{self.url}: the store says that the bucket is in region {region!r}, which is none: {error}",
                    url=self.url, backend="s3",
                ) from error  # fmt: skip

    async def credentials(self, *, refresh: bool = False) -> Credentials | None:
        """Give what to sign with; None for nobody.

        New ones are asked for in time, while the old ones are still given out.

        Parameters
        ----------
        refresh : bool
            The store has refused the last ones: search for others.

        Raises
        ------
        ObjectError
            The old ones have expired, or were refused, and there are no new ones.
        """
        now = time.monotonic()
        if now < self._ask_at and not refresh:
            return self._current
        if self._current is None:
            return None
        if self._renewing is None:
            if refresh and now < self._searched_at + _FORCED_AGAIN:
                return self._current
            self._renewing = asyncio.create_task(self._renew(anew=refresh))
        if now < self._ends_at and not refresh:
            return self._current
        trouble = await asyncio.shield(self._renewing)
        if trouble is not None and (refresh or time.monotonic() >= self._ends_at):
            raise ObjectError(
                f"{self.url}: credentials have expired, and there are no new ones: {trouble} "
                f"({type(trouble).__name__}); look at where they come from",
                url=self.url, code="ExpiredCredentials", backend="s3",
            ) from trouble  # fmt: skip
        return self._current

    async def _renew(self, *, anew: bool) -> Exception | None:
        """Ask the SDK; what goes wrong is for those who cannot do without."""
        try:
            if anew or self._source is None:
                self._take(await asyncio.to_thread(self._sdk.load))
                self._searched_at = time.monotonic()
            else:
                self._take(await asyncio.to_thread(self._sdk.ask, self._source))
        except Exception as error:  # noqa: BLE001 - what programs, files and services give to the SDK may be anything
            now = time.monotonic()
            self._ask_at = now + max(1.0, (self._ends_at - now) / 2)
            return error
        else:
            return None
        finally:
            self._renewing = None

    def _take(self, obtained: _Obtained) -> None:
        if obtained.credentials != self._current:
            self._current = obtained.credentials
        self._source = obtained.source
        now = time.monotonic()
        if obtained.lifetime is None:
            self._ask_at = self._ends_at = float("inf")
        else:
            self._ends_at = now + obtained.lifetime
            self._ask_at = now + max(obtained.lifetime - _EARLY, obtained.lifetime / 2, 1.0)

    async def client(self, *, connections: int, attempts: int, patience: float) -> Any:
        """Make the SDK's client, which asks this account for credentials; an asynchronous context manager.

        Parameters
        ----------
        connections, attempts : int
            As many at most; of each call.
        patience : float, seconds
            How long nothing may come.
        """
        session = await asyncio.to_thread(self._sdk.warm_session, self.region)
        anonymous = self._current is None
        if not anonymous:
            session.register_component("credential_provider", _Lender(self))
        return self._sdk.client(session, anonymous, connections=connections, attempts=attempts, patience=patience)

    async def aclose(self) -> None:
        """Ask for nothing more."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
