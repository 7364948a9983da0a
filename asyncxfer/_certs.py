"""``asyncxfer certs``: an authority of one's own, and a certificate for each agent.

Owns what such certificates look like and how the files are written; what a certificate means to an agent stands in
`_credentials`. It keeps no record: whatever the authority in the folder has signed is good until it expires.

Keys are ECDSA on P-256, which every build of OpenSSL takes and signs fastest with.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ._credentials import EVERY_AGENT, Certificates, agent_uri
from ._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["add_arguments", "main", "make"]

_CA, _CA_KEY = "ca.pem", "ca-key.pem"
_CA_DAYS = 3650
_DAYS = 365
_EARLIER = timedelta(hours=1)  # clocks of other hosts may be behind
_EVERY_FILE = "every-agent"


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the subcommand."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the files are; the authority in it is reused")
    parser.add_argument("names", nargs="+", metavar="NAME", help="an agent's name; '*' for every agent")
    parser.add_argument(
        "--days", type=int, default=_DAYS, help="how long a certificate is valid (default: %(default)s)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an agent's files; the authority is never replaced"
    )


def main(options: argparse.Namespace) -> int:
    """Make the certificates and say where they belong; 2 when something is in the way."""
    try:
        made = make(options.folder, options.names, days=options.days, force=options.force)
    except ConfigError as error:
        print(f"asyncxfer certs: {error}", file=sys.stderr)
        return 2
    for name, (certificate, key) in made.items():
        whom = "every agent" if name == "*" else f"agent {name!r}"
        files = " ".join(shlex.quote(str(path)) for path in (certificate, key, options.folder / _CA))
        print(f"{whom}: copy to its host, in a way that nobody can read along\n    {files}")
        agent = "..." if name == "*" else f"{name!r}, ..."
        print(f"    Agent({agent}, credentials={_line(certificate, key)})\n")
    authority = shlex.quote(str(options.folder / _CA_KEY))
    print(f"Keep {authority} here, or in a safe: whoever has it can act as any agent.")
    return 0


def make(folder: Path, names: Iterable[str], *, days: int = _DAYS, force: bool = False) -> dict[str, tuple[Path, Path]]:
    """Make a certificate for each of `names`, and an authority where the folder has none.

    Parameters
    ----------
    folder : Path
        Made, for its owner only, where it does not exist.
    names : iterable of str
        Names of agents; ``"*"`` for a certificate that speaks for every agent.
    days : int, days
        How long they are valid.
    force : bool
        Replace the files of an agent that are there already.

    Returns
    -------
    dict of str to (Path, Path)
        By name, the certificate and the key.

    Raises
    ------
    ConfigError
        A name that cannot be one, files that are there already, an authority that is incomplete or ends too early,
        or `cryptography` is not installed.
    """
    _check_installed()
    paths = {name: _paths(folder, name) for name in names}
    _check_paths(paths, force)
    if not 1 <= days <= _CA_DAYS:
        raise ConfigError(f"certificates for {days} days; expected 1 to {_CA_DAYS}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _open_authority(folder, days)
        for name, (certificate, key) in paths.items():
            _issue(authority, name, days, certificate, key)
            Certificates(certificate, key, folder / _CA)  # what agents will do with them
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error}") from error
    return paths


def _line(certificate: Path, key: Path) -> str:
    return f"Certificates({certificate.name!r}, {key.name!r}, {_CA!r})"


def _check_installed() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigError("making certificates needs the package cryptography: pip install 'asyncxfer[tls]'") from error


# ---- files ----------------------------------------------------------------------------------------------------------


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    stem = _EVERY_FILE if name == "*" else name
    if not name or not name.isprintable() or len(name) > 255:
        raise ConfigError(f"{name!r} cannot be an agent's name; expected 1 to 255 printable characters")
    if "/" in name or name.startswith((".", "-")) or stem == "ca" or stem.endswith("-key"):
        raise ConfigError(
            f"{name!r} cannot be the name of its files: it may not contain '/', begin with '.' or '-', end in '-key', "
            "or be 'ca'"
        )
    return folder / f"{stem}.pem", folder / f"{stem}-key.pem"


def _check_paths(paths: dict[str, tuple[Path, Path]], force: bool) -> None:
    files = [path for pair in paths.values() for path in pair]
    if len(set(files)) < len(files):
        raise ConfigError(f"two of the names {', '.join(paths)} would share their files")
    there = [str(path) for path in files if os.path.lexists(path)]
    if there and not force:
        raise ConfigError(f"there already: {', '.join(there)}; --force replaces an agent's files")


def _write(path: Path, contents: bytes, mode: int) -> None:
    """Put a file there whole, never with more permissions than `mode`, not even for a moment."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(contents)
            os.fchmod(fd, mode)
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_pair(certificate: x509.Certificate, path: Path, key: EllipticCurvePrivateKey, key_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(key_path, private, 0o600)
    _write(path, certificate.public_bytes(pem), 0o644)


# ---- certificates ---------------------------------------------------------------------------------------------------


def _open_authority(folder: Path, days: int) -> _Authority:
    """Read the authority of the folder, or make it."""
    path, key_path = folder / _CA, folder / _CA_KEY
    if path.exists() != key_path.exists():
        missing, there = (key_path, path) if path.exists() else (path, key_path)
        raise ConfigError(f"there is {there}, and no {missing}: bring it back, or use another folder")
    if not path.exists():
        return _make_authority(path, key_path)
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    Certificates(path, key_path, path)  # says what is wrong with them, as agents would
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{key_path} is no ECDSA key; expected one that `asyncxfer certs` has made")
    if certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=days):
        raise ConfigError(
            f"{path} ends on {certificate.not_valid_after_utc:%Y-%m-%d}, before {days} days are over; "
            "ask for fewer --days, or use another folder"
        )
    return _Authority(certificate, key)


def _make_authority(path: Path, key_path: Path) -> _Authority:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"asyncxfer authority {secrets.token_hex(4)}")  # two of them in one bundle are told apart by it
    # A day more than any certificate lasts, so that all of them end first.
    extensions = [(x509.BasicConstraints(ca=True, path_length=0), True)]
    certificate = _sign((key, name), key, name, _CA_DAYS + 1, extensions)
    _write_pair(certificate, path, key, key_path)
    return _Authority(certificate, key)


def _issue(authority: _Authority, name: str, days: int, path: Path, key_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    uri = EVERY_AGENT if name == "*" else agent_uri(name)
    extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), False),
    ]
    issuer = authority.key, authority.certificate.subject
    _write_pair(_sign(issuer, key, _name("asyncxfer agent"), days, extensions), path, key, key_path)


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def _sign(
    issuer: tuple[EllipticCurvePrivateKey, x509.Name],
    key: EllipticCurvePrivateKey,
    subject: x509.Name,
    days: int,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.now(UTC)
    issuer_key, issuer_name = issuer
    signs = issuer_key is key
    builder = (
        x509.CertificateBuilder(issuer_name, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA256())
