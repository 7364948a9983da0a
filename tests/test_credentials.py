"""Credentials: what is refused when they are made, who can connect with them, and for whom a certificate speaks."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from authority import Authority, shake_hands
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer import Certificates, ConfigError, PeerLostError, PreSharedKey
from asyncxfer._credentials import Credentials, agent_uri

AUTHORITY = Authority()
SECRET = b"sixteen bytes or more"


def shown(credentials: Credentials) -> bytes:
    return ssl.PEM_cert_to_DER_cert(credentials.pem()[0].decode())


# ---- who can connect ----------------------------------------------------------------------------------------------


def test_certificates_of_one_authority_connect_and_know_each_other() -> None:
    prefill, decode = AUTHORITY.credentials("prefill-0"), AUTHORITY.credentials("decode-0")
    server, client = shake_hands(prefill.server(), decode.client())
    assert server.version() == client.version() == "TLSv1.3"
    assert server.getpeercert(binary_form=True) == shown(decode)
    assert client.getpeercert(binary_form=True) == shown(prefill)


def test_a_shared_secret_connects_and_another_does_not() -> None:
    shake_hands(PreSharedKey(SECRET).server(), PreSharedKey(SECRET.decode()).client())
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate verify failed"):
        shake_hands(PreSharedKey(SECRET).server(), PreSharedKey(SECRET + b"!").client())


def test_strangers_do_not_connect() -> None:
    ours, theirs = AUTHORITY.credentials("*"), Authority().credentials("*")
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    for client in (theirs.client(), bare, PreSharedKey(SECRET).client()):
        with pytest.raises(ssl.SSLError):
            shake_hands(ours.server(), client)
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate verify failed"):
        shake_hands(theirs.server(), ours.client())


def test_nothing_older_than_tls_1_3_is_spoken() -> None:
    ours = AUTHORITY.credentials("a")
    old = AUTHORITY.credentials("b").client()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)version|protocol"):
        shake_hands(ours.server(), old)


def test_what_the_secret_gives_is_the_same_everywhere_and_for_ever() -> None:
    """Agents with other versions of everything have to derive it too, byte for byte."""
    certificate, key, authorities = PreSharedKey(b"0123456789abcdef").pem()
    assert certificate == authorities
    assert hashlib.sha256(certificate).hexdigest() == (
        "5af91f20f77996e8ef9d1af4d96ebf624cb0db6deab44eead1ed7804e1691f08"
    )
    assert key == PreSharedKey("0123456789abcdef").pem()[1]


# ---- for whom a certificate speaks ----------------------------------------------------------------------------------


def test_a_certificate_speaks_for_the_agents_that_it_names() -> None:
    names = (x509.DNSName("node-7"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    issued = AUTHORITY.issue("prefill-0", "a/b ü%", names=names)
    credentials = Certificates(issued.certificate, issued.key, AUTHORITY.pem)
    for agent in ("prefill-0", "a/b ü%", "node-7"):
        credentials.check_name(issued.der, agent)
    for agent in ("prefill-1", "node-77", "", "*", "127.0.0.1", "asyncxfer:prefill-0", "a/b ü"):
        with pytest.raises(PeerLostError) as caught:
            credentials.check_name(issued.der, agent)
        assert f"agent {agent!r} speaks for 'node-7', 'prefill-0', 'a/b ü%'" in str(caught.value)


def test_one_for_every_agent_and_one_for_an_agent_called_asterisk() -> None:
    credentials = AUTHORITY.credentials("*")
    every = AUTHORITY.issue(names=(x509.UniformResourceIdentifier("asyncxfer:*"),))
    credentials.check_name(every.der, "anyone")
    credentials.check_name(shown(PreSharedKey(SECRET)), "anyone")
    credentials.check_name(AUTHORITY.issue("*").der, "*")
    with pytest.raises(PeerLostError, match=r"'anyone' speaks for '\*'"):
        credentials.check_name(AUTHORITY.issue("*").der, "anyone")


@pytest.mark.parametrize("name", [
    x509.DNSName("*"), x509.DNSName("asyncxfer:*"), x509.DNSName("asyncxfer:a"), x509.UniformResourceIdentifier("a"),
    x509.UniformResourceIdentifier("other:a"), x509.UniformResourceIdentifier("ASYNCXFER:a"), x509.RFC822Name("a"),
])  # fmt: skip
def test_other_kinds_of_name_speak_for_nobody(name: x509.GeneralName) -> None:
    der = AUTHORITY.issue(names=(name,)).der
    with pytest.raises(PeerLostError):
        AUTHORITY.credentials("x").check_name(der, "a")


def test_a_certificate_without_names_speaks_for_nobody() -> None:
    with pytest.raises(PeerLostError, match="'a' speaks for no agent"):
        AUTHORITY.credentials("x").check_name(AUTHORITY.issue().der, "a")


@given(agents=st.lists(st.text(min_size=1, max_size=40).filter(str.isprintable), min_size=1, max_size=5))
def test_every_name_that_an_agent_can_have_survives(agents: list[str]) -> None:
    credentials, der = EVERYBODY, AUTHORITY.issue(*agents).der
    for agent in agents:
        credentials.check_name(der, agent)


EVERYBODY = AUTHORITY.credentials("x")
SAMPLE = AUTHORITY.issue("victim", names=(x509.DNSName("other"),)).der


@given(at=st.integers(0, len(SAMPLE) - 1), by=st.binary(max_size=6), cut=st.integers(0, 6))
def test_a_certificate_that_is_damaged_is_refused_or_read(at: int, by: bytes, cut: int) -> None:
    """Whatever the bytes are: the only outcomes are an answer and PeerLostError."""
    with contextlib.suppress(PeerLostError):
        EVERYBODY.check_name(SAMPLE[:at] + by + SAMPLE[at + cut :], "victim")


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x80", b"\x30\x84\xff\xff\xff\xff", b"\x30\x00", SAMPLE + b"\0",
                                 SAMPLE[:-1], b"\x30\x03\x30\x01\x30", b"\x1f" * 50])  # fmt: skip
def test_what_is_no_certificate_is_said_to_be_none(der: bytes) -> None:
    with pytest.raises(PeerLostError, match="'victim' cannot be read"):
        EVERYBODY.check_name(der, "victim")


# ---- what is refused when they are made -----------------------------------------------------------------------------


def test_files_are_read_from_paths(tmp_path: Path) -> None:
    issued = AUTHORITY.issue("a")
    for name, text in (("a.pem", issued.certificate), ("key.pem", issued.key), ("ca.pem", AUTHORITY.pem)):
        (tmp_path / name).write_bytes(b"# comments, caf\xc3\xa9\n" + text)
    made = Certificates(tmp_path / "a.pem", str(tmp_path / "key.pem"), tmp_path / "ca.pem")
    shake_hands(made.server(), made.client())


def test_bad_files_are_named(tmp_path: Path) -> None:
    issued, other = AUTHORITY.issue("a"), AUTHORITY.issue("b")
    good = [issued.certificate, issued.key, AUTHORITY.pem]
    missing = tmp_path / "missing.pem"
    for place, what in enumerate(("certificate", "key", "authorities")):
        with pytest.raises(ConfigError, match=rf"the {what} '.*missing\.pem' cannot be read: .*No such file"):
            Certificates(*[missing if place == at else text for at, text in enumerate(good)])
        with pytest.raises(ConfigError, match=rf"the {what} \(given as bytes\) holds no PEM"):
            Certificates(*[b"nothing" if place == at else text for at, text in enumerate(good)])
    with pytest.raises(ConfigError, match=r"the key \(given as bytes\) is not that of the certificate"):
        Certificates(issued.certificate, other.key, AUTHORITY.pem)
    locked = AUTHORITY.issue("a", password=b"secret")
    with pytest.raises(ConfigError, match=r"the key \(given as bytes\) is encrypted"):
        Certificates(locked.certificate, locked.key, AUTHORITY.pem)
    with pytest.raises(ConfigError, match="cannot be used"):
        Certificates(issued.certificate, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", good[2])
    for body in (b"!!!!", b"AAAA", b""):
        damaged = b"-----BEGIN CERTIFICATE-----\n" + body + b"\n-----END CERTIFICATE-----\n"
        with pytest.raises(ConfigError, match=r"the authorities .* holds a certificate that cannot be read"):
            Certificates(issued.certificate, issued.key, damaged)
    (tmp_path / "huge.pem").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1,048,576 bytes"):
        Certificates(tmp_path / "huge.pem", issued.key, AUTHORITY.pem)


def test_dates_are_looked_at() -> None:
    for days, words in (((-9, -1), "the certificate .* expired on 20"), ((1, 9), "valid from 20.* to come")):
        issued = AUTHORITY.issue("a", days=days)
        with pytest.raises(ConfigError, match=words):
            Certificates(issued.certificate, issued.key, AUTHORITY.pem)
    issued, expired = AUTHORITY.issue("a"), AUTHORITY.issue(days=(-9, -1)).certificate
    with pytest.raises(ConfigError, match=r"the authorities .* expired"):
        Certificates(issued.certificate, issued.key, expired)
    Certificates(issued.certificate, issued.key, expired + AUTHORITY.pem)  # a bundle keeps what it once had


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    issued = AUTHORITY.issue("prefill-0")
    made = Certificates(issued.certificate, issued.key, AUTHORITY.pem)
    assert repr(made) == "<Certificates for 'prefill-0'>"
    assert repr(PreSharedKey(SECRET)) == "<PreSharedKey>"
    with pytest.raises(ConfigError) as caught:
        Certificates(issued.certificate, issued.key.decode(), AUTHORITY.pem)
    assert "as bytes" in str(caught.value)
    with pytest.raises(ConfigError) as short:
        PreSharedKey("hush hush")
    for error in (caught.value, short.value):
        assert issued.key.split()[5].decode() not in str(error)
        assert "hush" not in str(error)
    assert "has 9 bytes; expected at least 16" in str(short.value)


WITHOUT = """
import sys
sys.modules["cryptography"] = None
from asyncxfer import Certificates, ConfigError, PreSharedKey
try:
    PreSharedKey("0123456789abcdef")
except ConfigError as error:
    print(error)
Certificates(*sys.argv[1:4]).check_name(bytes.fromhex(sys.argv[4]), "a")
"""


def test_certificates_need_no_other_package(tmp_path: Path) -> None:
    issued = AUTHORITY.issue("a")
    paths = [tmp_path / name for name in ("a.pem", "key.pem", "ca.pem")]
    for path, text in zip(paths, (issued.certificate, issued.key, AUTHORITY.pem), strict=True):
        path.write_bytes(text)
    command = [sys.executable, "-c", WITHOUT, *map(str, paths), issued.der.hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'asyncxfer[tls]'" in done.stdout


def test_the_uri_of_an_agent() -> None:
    assert agent_uri("prefill 0/ü") == "asyncxfer:prefill%200%2F%C3%BC"
