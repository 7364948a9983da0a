"""``asyncxfer cp``: a process of its own, between files and SeaweedFS, also through a proxy that does harm."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Ran, asyncxfer, begin, interrupted, options_of, until
from fault_proxy import FaultProxy, Flip, Reply, Request, Stall, StallUpload, Truncate
from servers import S3Server, plain_request

MIB = 1 << 20
PIECE = 8 * MIB
LONG = random.Random(6).randbytes(2 * PIECE + 12345)
TREE = {"a.bin": b"alpha" * 1000, "empty": b"", "sub/b.txt": b"beta", "sub/deep/c.txt": b"gamma", "long.bin": LONG}


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcomes(ran: Ran) -> dict[str, str]:
    """From ``--json``: how each ended, by the last part of its name."""
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return {os.path.basename(line["source"]): line["ended"] for line in lines if "source" in line}


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.url) as started:
        yield started


@pytest.fixture
def objects(s3: S3Server, bucket: str) -> Objects:
    return Objects(s3, bucket)


class Objects:
    """A bucket, asked by nobody's client but botocore's signatures."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self._server = server
        self.bucket = bucket
        self.options = options_of(server)
        self.url = f"s3://{bucket}"

    def ask(self, method: str, what: str, body: bytes = b"") -> bytes:
        answer = plain_request(
            method, f"{self._server.url}/{self.bucket}{what}", identity=self._server.admin, body=body
        )
        assert answer.status in (200, 404), answer
        return answer.body if answer.status == 200 else b"nothing"

    def through(self, proxy: FaultProxy) -> list[str]:
        return options_of(self._server, proxy.url)


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_file_goes_to_a_name_and_into_a_directory(tmp_path: Path) -> None:
    source = make(tmp_path, {"from": LONG}) / "from"
    source.chmod(0o750)
    ran = asyncxfer("cp", source, tmp_path / "to")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "to").stat().st_mode & 0o777 == 0o750
    (tmp_path / "there").mkdir()
    assert asyncxfer("cp", source, tmp_path / "there").returncode == 0
    assert asyncxfer("cp", f"file://{source}", f"{tmp_path}/new/").returncode == 0
    assert held(tmp_path) == dict.fromkeys(("from", "to", "there/from", "new/from"), LONG)


def test_a_directory_goes_into_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    """Slashes at the end and whether the destination exists change nothing: what is in one is then in the other."""
    make(tmp_path / "from", TREE)
    make(tmp_path / "to", {"other": b"stays", "a.bin": b"old"})
    refused = asyncxfer("cp", tmp_path / "from", tmp_path / "to")
    assert refused.returncode == 2
    assert "--recursive" in refused.stderr
    assert asyncxfer("cp", "-r", tmp_path / "from", tmp_path / "to").returncode == 0
    assert asyncxfer("cp", "-r", f"{tmp_path}/from/", f"{tmp_path}/new/").returncode == 0
    assert held(tmp_path / "to") == TREE | {"other": b"stays"}
    assert held(tmp_path / "new") == TREE


def test_globs_choose(tmp_path: Path) -> None:
    make(tmp_path / "from", TREE)
    chosen = ["--include", "*.txt", "--include", "empty", "--exclude", "sub/deep/*"]
    assert asyncxfer("cp", "-r", *chosen, tmp_path / "from", tmp_path / "to").returncode == 0
    assert set(held(tmp_path / "to")) == {"empty", "sub/b.txt"}


def test_what_is_there_is_kept_or_is_an_error_or_is_only_talked_about(tmp_path: Path) -> None:
    make(tmp_path / "from", {"a": b"new", "b": b"new"})
    make(tmp_path / "to", {"a": b"old"})
    pair = tmp_path / "from", tmp_path / "to"
    assert outcomes(asyncxfer("cp", "-rn", "--json", *pair)) == {"a": "would copy", "b": "would copy"}
    assert held(tmp_path / "to") == {"a": b"old"}
    failed = asyncxfer("cp", "-r", "--json", "--if-exists", "error", *pair)
    assert (failed.returncode, outcomes(failed)) == (1, {"a": "failed", "b": "copied"})
    assert f"{tmp_path}/from/a: there is one already" in failed.stderr
    kept = asyncxfer("cp", "-r", "--json", "--if-exists", "keep", *pair)
    assert (kept.returncode, outcomes(kept)) == (0, {"a": "kept", "b": "kept"})
    assert held(tmp_path / "to") == {"a": b"old", "b": b"new"}


def test_links_to_files_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    make(tmp_path / "from", {"sub/file": b"it"})
    (tmp_path / "from/link").symlink_to("sub/file")
    (tmp_path / "from/sub/round").symlink_to("..")
    (tmp_path / "from/lost").symlink_to("nowhere")
    os.mkfifo(tmp_path / "from/pipe")
    ran = asyncxfer("cp", "-r", tmp_path / "from", tmp_path / "to")
    assert ran.returncode == 1
    assert held(tmp_path / "to") == {"sub/file": b"it", "link": b"it"}
    assert not (tmp_path / "to/link").is_symlink()
    told = sorted(line.rpartition("/")[2] for line in ran.stderr.splitlines())
    assert told == [
        "lost: No such file or directory", "pipe: it is neither a file nor a directory",
        "round: it is a link to a directory that it is in",
    ]  # fmt: skip


def test_a_link_does_not_lead_out_of_the_destination(tmp_path: Path) -> None:
    make(tmp_path / "from", {"sub/file": b"it"})
    (tmp_path / "outside").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to/sub").symlink_to(tmp_path / "outside")
    ran = asyncxfer("cp", "-r", tmp_path / "from", tmp_path / "to")
    assert ran.returncode == 1
    assert "leads out" in ran.stderr
    assert held(tmp_path / "outside") == {}


def test_nothing_is_copied_into_or_onto_itself(tmp_path: Path) -> None:
    make(tmp_path, TREE)
    assert asyncxfer("cp", "-r", tmp_path, tmp_path / "sub/copy").returncode == 2
    onto = asyncxfer("cp", tmp_path / "a.bin", tmp_path / "sub/../a.bin")
    assert (onto.returncode, "are the same" in onto.stderr) == (1, True)
    assert held(tmp_path) == TREE


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nowhere", "to"], 1, "No such file"),
        (["s3:///key", "to"], 2, "names no bucket"),
        (["s3://user:hunter2@bucket/key", "to"], 2, "credentials"),
        (["-o", "hunter2", "from", "to"], 2, "NAME=VALUE"),
        (["--memory", "1KiB", "from", "to"], 2, "16 MiB"),
        (["--src-option", "region_name=x", "from", "to"], 2, "options are for stores"),
        (["-o", "aws_secret_access_key=hunter2", "-o", "nonsense=hunter2", "s3://bucket/key", "to"], 1, "nonsense"),
    ],
)
def test_what_cannot_be_done_is_told_by_status_and_reason(arguments: list[str], status: int, says: str) -> None:
    ran = asyncxfer("cp", *arguments)
    assert (ran.returncode, says in ran.stderr) == (status, True), ran.stderr
    assert "hunter2" not in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="rich is not installed: pip install 'asyncxfer[bench]'")
    make(tmp_path, {"from": LONG})
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "asyncxfer", "cp", f"{tmp_path}/from", f"{tmp_path}/to"]
    with open(ours, "rb", buffering=0) as terminal:
        ran = subprocess.Popen(command, stdout=its, env={**os.environ, "TERM": "xterm"})
        os.close(its)
        pieces = []
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while piece := terminal.read(4096):
                pieces.append(piece)
        assert ran.wait(60) == 0
    shown = b"".join(pieces).decode()
    assert "1 done" in shown
    assert "copied 1, 16.0 MiB" in shown


# ---- stores -------------------------------------------------------------------------------------------------------


def test_a_directory_goes_to_a_store_and_comes_back(objects: Objects, tmp_path: Path) -> None:
    """And what is the same is copied neither way again."""
    here, there = make(tmp_path / "from", TREE), f"{objects.url}/some/where"
    up = asyncxfer("cp", "-r", *objects.options, here, there)
    assert (up.returncode, up.stderr) == (0, "")
    assert objects.ask("GET", "/some/where/sub/deep/c.txt") == b"gamma"
    assert objects.ask("GET", "/some/where/long.bin") == LONG
    back = asyncxfer("cp", "-r", *objects.options, f"{there}/", tmp_path / "to")
    assert (back.returncode, held(tmp_path / "to")) == (0, TREE)
    same = dict.fromkeys(map(os.path.basename, TREE), "same")
    (here / "a.bin").write_bytes(b"ALPHA" * 1000)
    again = ["cp", "-r", "--resume", "--json", *objects.options]
    assert outcomes(asyncxfer(*again, here, there)) == same | {"a.bin": "copied"}
    assert outcomes(asyncxfer(*again, there, tmp_path / "to")) == same | {"a.bin": "copied"}
    assert held(tmp_path / "to") == TREE | {"a.bin": b"ALPHA" * 1000}


def test_one_object_goes_to_a_name_and_below_a_prefix(objects: Objects, tmp_path: Path) -> None:
    file = make(tmp_path, {"file": b"it"}) / "file"
    for target in ("name", "below/"):
        assert asyncxfer("cp", *objects.options, file, f"{objects.url}/{target}").returncode == 0
    assert [objects.ask("GET", f"/{key}") for key in ("name", "below/file")] == [b"it"] * 2
    refused = asyncxfer("cp", *objects.options, f"{objects.url}/below", tmp_path)
    assert (refused.returncode, "--recursive" in refused.stderr) == (2, True)
    missing = asyncxfer("cp", *objects.options, f"{objects.url}/missing", tmp_path)
    assert (missing.returncode, f"{objects.url}/missing" in missing.stderr) == (1, True)
    assert held(tmp_path) == {"file": b"it"}


def test_within_a_bucket_its_store_copies(objects: Objects, proxy: FaultProxy) -> None:
    objects.ask("PUT", "/from/long", LONG)
    objects.ask("PUT", "/from/sub/short", b"it")
    ran = asyncxfer("cp", "-r", *objects.through(proxy), f"{objects.url}/from", f"{objects.url}/to")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (objects.ask("GET", "/to/long"), objects.ask("GET", "/to/sub/short")) == (LONG, b"it")
    assert not [r for r in proxy.requests if r.method == "GET" and "list-type" not in r.target]
    inside = asyncxfer("cp", "-r", *objects.options, f"{objects.url}/from", f"{objects.url}/from/more")
    assert inside.returncode == 2


def test_between_buckets_memory_is_bounded(s3: S3Server, objects: Objects) -> None:
    """An object of four times the memory goes through it."""
    size = 64 * MIB
    objects.ask("PUT", "/long", LONG * (size // len(LONG)))
    objects.ask("PUT", "/short", b"it")
    with s3.bucket() as other:
        peaks = []
        for key in ("short", "long"):
            process = begin("cp", "--memory", "16MiB", *objects.options, f"{objects.url}/{key}", f"s3://{other}")
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            process.communicate()
            assert process.returncode == 0
            peaks.append(used.ru_maxrss * 1024)
        there = Objects(s3, other)
        assert there.ask("GET", "/long") == LONG * (size // len(LONG))
        for key in ("long", "short"):
            plain_request("DELETE", f"{s3.url}/{other}/{key}", identity=s3.admin)
    assert peaks[1] - peaks[0] < 48 * MIB


def test_names_that_lead_out_are_refused(objects: Objects, proxy: FaultProxy, tmp_path: Path) -> None:
    names = ["../evil", "sub/../../evil", "/evil", "sub//evil", "a/./evil", "good"]
    objects.ask("PUT", "/p/good", b"it")
    rows = "".join(
        f"<Contents><Key>p/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;0d149b90e7394297301c90191ae775f0&quot;</ETag><Size>2</Size></Contents>"
        for name in names
    )
    head = "<Name>b</Name><Prefix>p/</Prefix><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    body = f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult>{head}{rows}</ListBucketResult>".encode()
    proxy.always(Reply(200, body, {"Content-Type": "application/xml"}), when=lambda r: "list-type=2" in r.target)
    ran = asyncxfer("cp", "-r", *objects.through(proxy), f"{objects.url}/p/", tmp_path / "a/b")
    assert ran.returncode == 1
    assert held(tmp_path) == {"a/b/good": b"it"}
    assert len(ran.stderr.splitlines()) == len(names) - 1


# ---- faults -------------------------------------------------------------------------------------------------------


def _body(request: Request) -> bool:
    return request.method == "GET" and "list-type" not in request.target


def _piece(number: int) -> str:
    return f"bytes={number * PIECE}-"


def test_a_body_that_breaks_and_a_store_that_is_busy_do_no_harm(
    objects: Objects, proxy: FaultProxy, tmp_path: Path
) -> None:
    objects.ask("PUT", "/long", LONG)
    proxy.next(Truncate(100_000), Reply(503, headers={"Retry-After": "0"}), when=_body)
    ran = asyncxfer("cp", *objects.through(proxy), f"{objects.url}/long", tmp_path)
    assert (ran.returncode, held(tmp_path)) == (0, {"long": LONG})


def test_what_arrives_damaged_is_not_there(objects: Objects, proxy: FaultProxy, tmp_path: Path) -> None:
    """The store's checksum is of all of it, so that a flipped byte of a piece is seen at the end."""
    source = make(tmp_path / "from", {"long": LONG}) / "long"
    assert asyncxfer("cp", *objects.options, source, f"{objects.url}/").returncode == 0
    proxy.always(Flip(1000), when=lambda r: _body(r) and r.headers.get("range", "").startswith(_piece(1)))
    ran = asyncxfer("cp", *objects.through(proxy), f"{objects.url}/long", tmp_path / "to/long")
    assert ran.returncode == 1
    assert f"{objects.url}/long: " in ran.stderr
    assert held(tmp_path / "to") == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_file_that_was_cut_off_goes_on(
    objects: Objects, proxy: FaultProxy, tmp_path: Path, number: signal.Signals
) -> None:
    objects.ask("PUT", "/long", LONG)
    last = len(LONG) // PIECE
    proxy.always(Stall(after=10), when=lambda r: _body(r) and r.headers.get("range", "").startswith(_piece(last)))
    command = ["cp", *objects.through(proxy), f"{objects.url}/long", tmp_path / "to/"]
    process = begin(*command[:-1], f"{command[-1]}/")
    journal = "*.asyncxfer-part.json"
    until(lambda: any(path.read_bytes().count(b"\n") == last + 1 for path in tmp_path.glob(f"to/.{journal}")))
    until(lambda: proxy.stalled > 0)
    ended = interrupted(process, number)
    assert ended.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not (tmp_path / "to/long").exists()
    proxy.go_on()
    proxy.always(None)
    before = len(proxy.requests)
    resumed = asyncxfer("cp", "--resume", *objects.through(proxy), f"{objects.url}/long", tmp_path / "to/long")
    assert (resumed.returncode, held(tmp_path / "to")) == (0, {"long": LONG})
    ranges = {r.headers["range"].split("-")[0] + "-" for r in proxy.requests[before:] if _body(r)}
    assert ranges == {_piece(last)}


def test_a_source_that_changed_is_copied_from_its_start(objects: Objects, proxy: FaultProxy, tmp_path: Path) -> None:
    objects.ask("PUT", "/long", LONG)
    proxy.always(Stall(after=10), when=lambda r: _body(r) and r.headers.get("range", "").startswith(_piece(2)))
    process = begin("cp", *objects.through(proxy), f"{objects.url}/long", tmp_path)
    until(lambda: any(path.read_bytes().count(b"\n") == 3 for path in tmp_path.glob(".*.asyncxfer-part.json")))
    interrupted(process, signal.SIGKILL)
    proxy.go_on()
    proxy.always(None)
    objects.ask("PUT", "/long", LONG[::-1])
    assert asyncxfer("cp", "--resume", *objects.options, f"{objects.url}/long", tmp_path).returncode == 0
    assert held(tmp_path) == {"long": LONG[::-1]}


def test_an_interrupted_upload_leaves_nothing(objects: Objects, proxy: FaultProxy, tmp_path: Path) -> None:
    source = make(tmp_path, {"long": LONG}) / "long"
    proxy.next(StallUpload(1000), when=lambda r: "partNumber=2" in r.target)
    process = begin("cp", *objects.through(proxy), source, f"{objects.url}/long")
    until(lambda: proxy.stalled > 0)
    assert b"<UploadId>" in objects.ask("GET", "?uploads=")
    ended = interrupted(process, signal.SIGINT)
    assert (ended.returncode, "interrupted" in ended.stderr) == (130, True)
    assert objects.ask("GET", "/long") == b"nothing"
    assert b"<UploadId>" not in objects.ask("GET", "?uploads=")
