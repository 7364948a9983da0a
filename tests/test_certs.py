"""`asyncxfer certs`: what it makes connects, is private, is not overwritten, and OpenSSL finds it in order."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from authority import Authority, shake_hands

from asyncxfer import Certificates, ConfigError, PeerLostError
from asyncxfer.__main__ import main
from asyncxfer._certs import make


def load(folder: Path, name: str) -> Certificates:
    return Certificates(folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")


def der(folder: Path, name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / f"{name}.pem").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_it_prints_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copy what it says to where it says, run the line that it prints."""
    folder = tmp_path / "made here"
    assert main(["certs", str(folder), "prefill-0", "decode 0"]) == 0
    said = capsys.readouterr().out
    prefill, decode = (
        follow(said, name, tmp_path / f"host of {name}", monkeypatch) for name in ("prefill-0", "decode 0")
    )
    shake_hands(prefill.server(), decode.client())
    shake_hands(decode.server(), prefill.client())
    assert f"Keep '{folder}/ca-key.pem'" in said


def follow(said: str, name: str, host: Path, monkeypatch: pytest.MonkeyPatch) -> Certificates:
    """Do for one agent what was said, on its host; gives the credentials."""
    found = re.search(rf"agent '{name}': copy .*\n    (.*)\n    (.*)\n", said)
    assert found
    host.mkdir()
    subprocess.run(["sh", "-c", f"cp -p {found[1]} '{host}'"], check=True, timeout=60)
    monkeypatch.chdir(host)
    given: dict[str, Certificates] = {}
    scope: dict[str, object] = {
        "Agent": lambda agent, _, credentials: given.update({agent: credentials}),
        "Certificates": Certificates,
    }
    eval(found[2], scope)
    return given[name]


def test_they_speak_for_the_agents_that_they_are_made_for(tmp_path: Path) -> None:
    made = make(tmp_path, ["prefill-0", "größe %2A", "*"])
    assert list(made) == ["prefill-0", "größe %2A", "*"]
    assert made["*"] == (tmp_path / "every-agent.pem", tmp_path / "every-agent-key.pem")
    prefill = load(tmp_path, "prefill-0")
    prefill.check_name(der(tmp_path, "prefill-0"), "prefill-0")
    prefill.check_name(der(tmp_path, "größe %2A"), "größe %2A")
    prefill.check_name(der(tmp_path, "every-agent"), "anyone at all")
    with pytest.raises(PeerLostError, match="speaks for 'prefill-0'"):
        prefill.check_name(der(tmp_path, "prefill-0"), "decode-0")


def test_the_authority_is_reused(tmp_path: Path) -> None:
    make(tmp_path, ["a"])
    before = contents(tmp_path)
    make(tmp_path, ["b"], days=5)
    assert {name: text for name, text in contents(tmp_path).items() if name in before} == before
    shake_hands(load(tmp_path, "a").server(), load(tmp_path, "b").client())


def test_nothing_is_overwritten_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, ["a"])
    before = contents(tmp_path)
    assert main(["certs", str(tmp_path), "b", "a"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"there already: {tmp_path}/a.pem, {tmp_path}/a-key.pem; --force" in said.err
    assert contents(tmp_path) == before
    assert main(["certs", str(tmp_path), "a", "--force"]) == 0
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"a.pem", "a-key.pem"}
    load(tmp_path, "a")


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}


def test_keys_are_the_owners_alone(tmp_path: Path) -> None:
    previous = os.umask(0)  # the permissions do not lean on it
    try:
        make(tmp_path / "new", ["a"])
        (tmp_path / "new" / "a-key.pem").chmod(0o666)
        make(tmp_path / "new", ["a"], force=True)
    finally:
        os.umask(previous)
    assert modes(tmp_path / "new") == {"new": 0o700, "ca.pem": 0o644, "ca-key.pem": 0o600, "a.pem": 0o644,
                                       "a-key.pem": 0o600}  # fmt: skip


def test_keys_are_never_open_to_others(tmp_path: Path) -> None:
    """Every file that appears while keys are written is looked at, whatever it is called."""
    loose: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for entry in os.scandir(tmp_path):
                try:
                    text, mode = Path(entry.path).read_bytes(), entry.stat().st_mode
                except FileNotFoundError:
                    continue
                if mode & 0o077 and b"PRIVATE" in text:
                    loose.append(entry.name)

    previous = os.umask(0)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            make(tmp_path, ["a", "b"], force=True)
    finally:
        ended.set()
        watcher.join()
        os.umask(previous)
    assert loose == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "ca.pem", "ca-key.pem", "a.pem", "a-key.pem", "b.pem", "b-key.pem",
    }  # fmt: skip


def test_openssl_finds_nothing_wrong(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command here")
    make(tmp_path, ["a"], days=30)
    for purpose in ("sslserver", "sslclient"):
        command = [openssl, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(tmp_path / "ca.pem")]
        done = subprocess.run(
            [*command, str(tmp_path / "a.pem")], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    text = subprocess.run(
        [openssl, "x509", "-noout", "-text", "-in", tmp_path / "a.pem"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert "URI:asyncxfer:a\n" in text
    for days, expected in ((29, 0), (31, 1)):
        check = [openssl, "x509", "-noout", "-checkend", str(days * 86400), "-in", str(tmp_path / "a.pem")]
        assert subprocess.run(check, capture_output=True, timeout=60, check=False).returncode == expected


BAD_NAMES = ["", "a/b", "../a", ".hidden", "-x", "ca", "x-key", "line\nbreak", "nul\0", "x" * 256]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_one_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        make(tmp_path / "new", ["good", name])
    assert not (tmp_path / "new").exists()


def test_names_that_would_share_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="share their files"):
        make(tmp_path, ["*", "every-agent"])


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_have_a_range(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 3650"):
        make(tmp_path, ["a"], days=days)


def test_what_is_wrong_with_an_authority_is_said(tmp_path: Path) -> None:
    make(tmp_path, ["a"])
    whole = contents(tmp_path)
    for missing in ("ca.pem", "ca-key.pem"):
        (tmp_path / missing).unlink()
        with pytest.raises(ConfigError, match=rf"no \S*/{missing}: bring it back"):
            make(tmp_path, ["b"])
        (tmp_path / missing).write_bytes(whole[missing])
    (tmp_path / "ca-key.pem").write_bytes(whole["a-key.pem"])
    with pytest.raises(ConfigError, match=r"the key .*ca-key.pem' is not that of the certificate"):
        make(tmp_path, ["b"])
    (tmp_path / "ca-key.pem").write_bytes(whole["ca-key.pem"])
    another = Authority()  # valid for ten years less a moment
    (tmp_path / "ca.pem").write_bytes(another.pem)
    (tmp_path / "ca-key.pem").write_bytes(another.key_pem)
    with pytest.raises(ConfigError, match=r"ends on 20\d\d-\d\d-\d\d, before 3650 days are over"):
        make(tmp_path, ["b"], days=3650)
    assert not (tmp_path / "b.pem").exists()


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["certs", str(tmp_path / "file"), "a"]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_it_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['cryptography'] = None; from asyncxfer.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "certs", str(tmp_path), "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'asyncxfer[tls]'" in done.stderr
