"""Who an agent is to other hosts, and whom it believes: certificates, or a secret that all agents share.

Owns what is loaded, checked and handed to TLS, for the `ssl` module and, as PEM, for native code; and the rule by which
a certificate speaks for an agent. It does not know connections, nor who asks.

A certificate speaks for the agents that its subjectAltName lists, as the URI ``asyncxfer:NAME`` (percent-encoded) or
as a dNSName that equals the name; ``asyncxfer:*`` speaks for all. The names are read from the DER here, because `ssl`
decodes certificates of its own connections only, and the peers of native TLS have none there.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ._errors import ConfigError, PeerLostError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

__all__ = ["EVERY_AGENT", "Certificates", "Credentials", "PreSharedKey", "agent_uri"]

_SCHEME = "asyncxfer:"
EVERY_AGENT = "asyncxfer:*"  # an agent whose name is an asterisk is asyncxfer:%2A
_PEM_BYTES = 1 << 20
_PEM_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_SECRET_BYTES = 16


def agent_uri(agent: str) -> str:
    """Give the URI by which a certificate speaks for an agent."""
    return _SCHEME + quote(agent, safe="")


# ---- what a certificate says ----------------------------------------------------------------------------------------

# DER tags, and the one extension that is read.
_INTEGER, _OCTETS, _OID, _UTC_TIME, _TIME, _SEQUENCE = 0x02, 0x04, 0x06, 0x17, 0x18, 0x30
_BOOLEAN, _VERSION, _EXTENSIONS, _DNS_NAME, _URI = 0x01, 0xA0, 0xA3, 0x82, 0x86
_SUBJECT_ALT_NAME = bytes((0x55, 0x1D, 0x11))


@dataclass(frozen=True, slots=True)
class _Certificate:
    """The parts of an X.509 certificate that are used here."""

    begins: datetime
    ends: datetime
    names: tuple[str, ...]  # dNSNames as they are, URIs with their scheme

    @classmethod
    def read(cls, der: bytes) -> _Certificate:
        """Decode it, or raise ValueError. It is not verified: OpenSSL does that."""
        ((_, certificate),) = _elements(der, _SEQUENCE)
        fields = _elements(_elements(certificate)[0][1])
        if fields and fields[0][0] == _VERSION:
            del fields[0]
        if [tag for tag, _ in fields[:6]] != [_INTEGER, *[_SEQUENCE] * 5]:
            raise ValueError("the fields of the certificate are not those of X.509")
        begins, ends = (_time(tag, text) for tag, text in _elements(fields[3][1]))
        extensions = [content for tag, content in fields[6:] if tag == _EXTENSIONS]
        return cls(begins, ends, _alternative_names(extensions))

    def speaks_for(self, agent: str) -> bool:
        """Whether an agent of this name may show it."""
        return any(name == EVERY_AGENT or _agent_of(name) == agent for name in self.names)

    def __str__(self) -> str:
        spoken = ["every agent" if name == EVERY_AGENT else repr(_agent_of(name)) for name in self.names]
        return ", ".join(spoken) or "no agent"


def _agent_of(name: str) -> str:
    return unquote(name.removeprefix(_SCHEME), errors="replace") if name.startswith(_SCHEME) else name


def _elements(data: bytes, *expected: int) -> list[tuple[int, bytes]]:
    """Split DER into (tag, content), all of it; with `expected`, the tags have to be these."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        head = data[at : at + 6]
        if len(head) < 2 or head[0] & 0x1F == 0x1F:
            raise ValueError("DER with a tag that is cut off or too long")
        size, at = head[1], at + 2
        if size >= 0x80:
            more = size - 0x80
            size = int.from_bytes(head[2 : 2 + more], "big")
            if not 1 <= more <= 4 or len(head) < 2 + more or size < 0x80 or size >> (8 * (more - 1)) == 0:
                raise ValueError("DER with a length that is not minimal and definite")
            at += more
        if size > len(data) - at:
            raise ValueError("DER that is cut off")
        found.append((head[0], data[at : at + size]))
        at += size
    if expected and tuple(tag for tag, _ in found) != expected:
        raise ValueError("DER with other elements than expected")
    return found


def _time(tag: int, text: bytes) -> datetime:
    digits = text.decode("ascii")
    if tag == _UTC_TIME:  # RFC 5280, 4.1.2.5.1: two digits of the year, from 1950
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    elif tag != _TIME:
        raise ValueError("a date of another kind than X.509 has")
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _alternative_names(extensions: list[bytes]) -> tuple[str, ...]:
    found = []
    for content in extensions:
        ((_, listed),) = _elements(content, _SEQUENCE)
        for _, extension in _elements(listed):
            parts = [part for part in _elements(extension) if part[0] != _BOOLEAN]
            if [tag for tag, _ in parts] != [_OID, _OCTETS]:
                raise ValueError("an extension of another form than X.509 has")
            if parts[0][1] == _SUBJECT_ALT_NAME:
                found.append(parts[1][1])
    if len(found) > 1:
        raise ValueError("more than one subjectAltName")
    names = [_elements(names, _SEQUENCE)[0][1] for names in found]
    of_use = [(tag, text.decode("ascii")) for content in names for tag, text in _elements(content)
              if tag in (_DNS_NAME, _URI)]  # fmt: skip
    # A URI of another scheme names something else, and so does a dNSName that looks like a URI of ours.
    return tuple(text for tag, text in of_use if (tag == _URI) == text.startswith(_SCHEME))


# ---- credentials ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """A file of PEM, or bytes of it, with words for messages that do not show what is inside."""

    label: str
    text: bytes

    @classmethod
    def read(cls, what: str, given: str | os.PathLike[str] | bytes) -> _Source:
        if isinstance(given, bytes):
            return cls(f"the {what} (given as bytes)", given)
        if "-----BEGIN" in os.fspath(given):
            raise ConfigError(f"the {what} is PEM in a str; expected a path, or the PEM as bytes")
        label = f"the {what} {os.fspath(given)!r}"
        try:
            with Path(given).open("rb") as file:
                text = file.read(_PEM_BYTES + 1)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{label} cannot be read: {error}") from error
        if len(text) > _PEM_BYTES:
            raise ConfigError(f"{label} is larger than {_PEM_BYTES:,} bytes; expected a file of PEM")
        return cls(label, text)

    def certificates(self) -> list[tuple[bytes, _Certificate]]:
        """Decode every certificate in it, with its DER; there is one at least."""
        try:
            encoded = [b"".join(body.split()) for body in _PEM_CERTIFICATE.findall(self.text)]
            ders = [base64.b64decode(body, validate=True) for body in encoded]
            found = [(der, _Certificate.read(der)) for der in ders]
        except (ValueError, IndexError, binascii.Error) as error:
            raise ConfigError(f"{self.label} holds a certificate that cannot be read: {error}") from error
        if not found:
            raise ConfigError(f"{self.label} holds no PEM certificate")
        return found


class Credentials:
    """Base of what proves to other agents who this one is: `Certificates` and `PreSharedKey`.

    Both sides of a connection show a certificate and verify the other's; nothing older than TLS 1.3 is spoken.
    """

    __slots__ = ("_client", "_pem", "_server", "_speaks_for")

    def __init__(self, certificate: _Source, key: _Source, authorities: _Source) -> None:
        chain, trusted = certificate.certificates(), authorities.certificates()
        _check_dates(certificate, [found for _, found in chain])
        now = datetime.now(UTC)
        if not any(found.begins <= now <= found.ends for _, found in trusted):
            _check_dates(authorities, [found for _, found in trusted])
        self._speaks_for = str(chain[0][1])
        self._pem = _pem(der for der, _ in chain), key.text, _pem(der for der, _ in trusted)
        self._server, self._client = self._contexts(certificate, key, authorities)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {self._speaks_for}>"

    def server(self) -> ssl.SSLContext:
        """Give the context for connections that this agent accepts."""
        return self._server

    def client(self) -> ssl.SSLContext:
        """Give the context for connections that this agent makes. It checks no host name: agents have names."""
        return self._client

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Give the certificate with its chain, the key and the authorities, for native code."""
        return self._pem

    def check_name(self, certificate: bytes, agent: str) -> None:
        """Check that a certificate which TLS has verified speaks for an agent.

        Parameters
        ----------
        certificate : bytes
            The peer's certificate, in DER.
        agent : str
            The name that the peer goes by.

        Raises
        ------
        PeerLostError
            It does not; the message names the agent and those that it speaks for.
        """
        try:
            found = _Certificate.read(certificate)
        except (ValueError, IndexError) as error:
            raise PeerLostError(f"the certificate shown for agent {agent!r} cannot be read: {error}") from error
        if not found.speaks_for(agent):
            raise PeerLostError(
                f"the certificate shown for agent {agent!r} speaks for {found}; it needs the subjectAltName "
                f"URI:{agent_uri(agent)} (`asyncxfer certs` makes such certificates)"
            )

    def _contexts(
        self, certificate: _Source, key: _Source, authorities: _Source
    ) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        import ssl

        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server.num_tickets = 0
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(cadata=self._pem[2].decode("ascii"))
            except ssl.SSLError as error:
                raise ConfigError(f"{authorities.label} cannot be used: {error}") from error
            with _as_file(self._pem[0] + self._pem[1]) as path:
                try:
                    context.load_cert_chain(path, password=_refuse_password(key))
                except ssl.SSLError as error:
                    raise ConfigError(_why_not(error.reason, certificate, key)) from error
        return server, client


class Certificates(Credentials):
    """A certificate for each agent, from an authority that all of them trust.

    Protects from whoever has no certificate of the authorities, and each agent from the others: one that holds the
    certificate of ``decode-0`` cannot act as ``prefill-0``. Whoever can read an agent's key can act as that agent.
    ``asyncxfer certs`` makes an authority and certificates; any other that fills the subjectAltName does as well.

    Parameters
    ----------
    certificate : path or bytes, PEM
        This agent's certificate, and behind it those between it and the authority. Its subjectAltName lists the
        agents that it speaks for: URI ``asyncxfer:NAME`` with the name percent-encoded, or a dNSName that equals the
        name. ``asyncxfer:*`` speaks for every agent.
    key : path or bytes, PEM
        Its private key, not encrypted.
    authorities : path or bytes, PEM
        The certificates that a peer's certificate has to lead to.

    Raises
    ------
    ConfigError
        A file cannot be read, holds something else, has expired, or the key is that of another certificate.
    """

    __slots__ = ()

    def __init__(
        self,
        certificate: str | os.PathLike[str] | bytes,
        key: str | os.PathLike[str] | bytes,
        authorities: str | os.PathLike[str] | bytes,
    ) -> None:
        super().__init__(
            _Source.read("certificate", certificate), _Source.read("key", key), _Source.read("authorities", authorities)
        )


class PreSharedKey(Credentials):
    """One secret that every agent knows, and nobody else.

    Protects from whoever does not know the secret: strangers can neither connect, nor listen in, nor read later what
    they recorded, should the secret leak. It does not protect agents from one another: each can act under any name;
    use `Certificates` for that.

    The secret has to be random, ``secrets.token_bytes(32)``, and no password: everybody who connects is shown a
    certificate that is derived from it, and can try guesses against that certificate without asking anyone.

    Needs the package `cryptography`: ``pip install 'asyncxfer[tls]'``.

    Parameters
    ----------
    secret : bytes or str
        At least 16 bytes; a str counts in UTF-8.

    Raises
    ------
    ConfigError
        The secret is too short, or `cryptography` is not installed.

    References
    ----------
    RFC 5869, HMAC-based Extract-and-Expand Key Derivation Function (HKDF). RFC 8410, Ed25519 in X.509.
    """

    __slots__ = ()

    def __init__(self, secret: bytes | str) -> None:
        raw = secret.encode() if isinstance(secret, str) else bytes(secret)
        if len(raw) < _SECRET_BYTES:
            raise ConfigError(
                f"the pre-shared key has {len(raw)} bytes; expected at least {_SECRET_BYTES} random ones, "
                "such as secrets.token_bytes(32)"
            )
        certificate, key = _derived(raw)
        own = _Source("the certificate derived from the pre-shared key", certificate)
        super().__init__(own, _Source("the key derived from the pre-shared key", key), own)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _derived(secret: bytes) -> tuple[bytes, bytes]:
    """Make the certificate and the key, as PEM, that everybody who knows `secret` makes byte for byte."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        from cryptography.x509.oid import NameOID
    except ImportError as error:
        raise ConfigError("PreSharedKey needs the package cryptography: pip install 'asyncxfer[tls]'") from error
    seed = HKDF(hashes.SHA256(), length=32, salt=None, info=b"asyncxfer pre-shared key 1, ed25519").derive(secret)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asyncxfer pre-shared key")])
    use: dict[str, Any] = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key(), serial_number=1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **use), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(EVERY_AGENT)]), critical=False)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _check_dates(source: _Source, certificates: list[_Certificate]) -> None:
    now = datetime.now(UTC)
    for found in certificates:
        if now > found.ends:
            raise ConfigError(f"{source.label} expired on {found.ends:%Y-%m-%d %H:%M:%S} UTC")
        if now < found.begins:
            raise ConfigError(f"{source.label} is valid from {found.begins:%Y-%m-%d %H:%M:%S} UTC on, which is to come")


def _pem(ders: Iterator[bytes]) -> bytes:
    import ssl

    return "".join(ssl.DER_cert_to_PEM_cert(der) for der in ders).encode("ascii")


@contextlib.contextmanager
def _as_file(contents: bytes) -> Iterator[str]:
    """Give `contents` a path, which `ssl` asks for, without a copy on any disk."""
    fd = os.memfd_create("asyncxfer-credentials", os.MFD_CLOEXEC)
    with open(fd, "wb", buffering=0) as file:
        file.write(contents)
        yield f"/proc/self/fd/{fd}"


def _refuse_password(key: _Source) -> Any:
    def refuse() -> bytes:
        raise ConfigError(f"{key.label} is encrypted; decrypt it first, with `openssl pkey` for instance")

    return refuse


def _why_not(reason: str | None, certificate: _Source, key: _Source) -> str:
    if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
        return f"{key.label} is not that of {certificate.label}"
    words = (reason or "not PEM of a private key").replace("_", " ").lower()
    if b"PRIVATE KEY-----" not in key.text:
        return f"{key.label} holds no PEM private key"
    return f"{certificate.label} with {key.label} cannot be used: {words}"
