"""An authority that issues whatever certificates a test needs, the wrong ones included."""

from __future__ import annotations

import contextlib
import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from asyncxfer import Certificates
from asyncxfer._credentials import agent_uri

__all__ = ["Authority", "Issued", "shake_hands"]


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM, and the certificate as DER."""

    certificate: bytes
    key: bytes
    der: bytes


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True)
class Authority:
    """A root certificate, valid today."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    name: str = field(default_factory=lambda: f"authority {os.urandom(4).hex()}")

    @property
    def pem(self) -> bytes:
        """The root, for those who trust it."""
        issued = self._sign(self.key.public_key(), self.name, [], (-1, 3650), authority=True)
        return issued.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Its private key."""
        return _pem(self.key)

    def issue(
        self,
        *agents: str,
        names: tuple[x509.GeneralName, ...] = (),
        days: tuple[float, float] = (-1, 1),
        password: bytes | None = None,
    ) -> Issued:
        """Make a certificate for `agents` and other `names`, valid from so many days to so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        spoken = [*names, *(x509.UniformResourceIdentifier(agent_uri(agent)) for agent in agents)]
        made = self._sign(key.public_key(), "agent", spoken, days)
        pem, der = (made.public_bytes(form) for form in (serialization.Encoding.PEM, serialization.Encoding.DER))
        return Issued(pem, _pem(key, password), der)

    def credentials(self, *agents: str) -> Certificates:
        """Issue a certificate for `agents`, ready to be used."""
        issued = self.issue(*agents)
        return Certificates(issued.certificate, issued.key, self.pem)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        subject: str,
        names: list[x509.GeneralName],
        days: tuple[float, float],
        *,
        authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .issuer_name(_name(self.name))
            .subject_name(_name(subject))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Connect two contexts in memory until both sides are through and one byte has gone each way."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)
    for _ in range(4):
        for end in reversed(ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    for writer, reader in (ends, ends[::-1]):
        writer.write(b"!")
        assert reader.read(1) == b"!"
    return ends
