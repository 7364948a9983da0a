"""``asyncxfer cp`` and ``ls`` with ``az://`` and ``gs://``: from store to store, cut off and gone on with, listed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from azure_places import ACCOUNT, KEY, Container
from command import asyncxfer, begin, interrupted, options_of, until
from fault_proxy import FaultProxy, Request, Stall
from servers import S3Server, plain_request

MIB = 1 << 20
PIECE = 8 * MIB
LONG = random.Random(8).randbytes(2 * PIECE + 12345)

_numbers = itertools.count()


@dataclass(frozen=True)
class Cloud:
    """A bucket or container of a running server.

    Attributes
    ----------
    url : str
        What is copied to and from.
    server : str
        Where it listens.
    options : dict of str to str
        What says so, for ``-o`` and its like, with ``{}`` where the server is named.
    """

    url: str
    server: str
    options: dict[str, str]

    def told(self, option: str = "-o", server: str = "") -> list[str]:
        """Give the options of the command line."""
        where = server or self.server
        return [word for name, text in self.options.items() for word in (option, f"{name}={text.format(where)}")]


@pytest.fixture(name="az")
def az_fixture(azurite: str) -> Cloud:
    container = Container.make(azurite)
    return Cloud(f"az://{container.name}", azurite, {"account_url": f"{{}}/{ACCOUNT}", "credential": KEY})


@pytest.fixture(name="gs")
def gs_fixture(fake_gcs: str) -> Cloud:
    name = f"cp-{os.getpid()}-{next(_numbers)}"
    said = {"Content-Type": "application/json"}
    answer = plain_request("POST", f"{fake_gcs}/storage/v1/b", headers=said, body=json.dumps({"name": name}).encode())
    assert answer.status == 200, answer
    return Cloud(f"gs://{name}", fake_gcs, {"endpoint_url": "{}", "anonymous": "true"})


@pytest.fixture(name="cloud", params=["az", "gs"])
def cloud_fixture(request: pytest.FixtureRequest) -> Cloud:
    found: Cloud = request.getfixturevalue(request.param)
    return found


def copied(*arguments: object) -> list[str]:
    """How each ended that was to be copied."""
    ran = asyncxfer("cp", "--json", "--resume", *arguments)
    assert ran.returncode == 0, ran.stderr
    return [line["ended"] for line in map(json.loads, ran.stdout.splitlines()) if "source" in line]


def test_a_directory_goes_from_store_to_store_and_comes_back(
    az: Cloud, gs: Cloud, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    """And what is the same by a checksum that both sides can tell is not copied again."""
    files = {"short": b"it", "long.bin": LONG, "sub/ä b": b"c"}
    for name, data in files.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(data)
    s3_options = options_of(s3)
    to_s3 = [word if word != "-o" else "--dst-option" for word in s3_options]
    hops: list[list[object]] = [
        ["-r", *az.told(), tmp_path / "from", f"{az.url}/a"],
        ["-r", *az.told("--src-option"), *gs.told("--dst-option"), f"{az.url}/a", f"{gs.url}/b"],
        ["-r", *gs.told("--src-option"), *to_s3, f"{gs.url}/b", f"s3://{bucket}/c"],
        ["-r", *s3_options, f"s3://{bucket}/c", tmp_path / "to"],
    ]
    for hop in hops:
        assert copied(*hop) == ["copied"] * 3
    for name, data in files.items():
        assert (tmp_path / "to" / name).read_bytes() == data
        found = plain_request("GET", f"{s3.url}/{bucket}/c/{quote(name)}", identity=s3.admin)
        assert found.body == data
    for hop in (hops[0], hops[3], ["-r", *az.told(), f"{az.url}/a", tmp_path / "to"]):
        assert copied(*hop) == ["same"] * 3


def _piece(number: int) -> str:
    return f"bytes={number * PIECE}-"


def _reads(request: Request) -> bool:
    return request.method == "GET" and "range" in request.headers


@contextlib.contextmanager
def stalled_at_the_last_piece(cloud: Cloud) -> Iterator[FaultProxy]:
    last = _piece(len(LONG) // PIECE)
    with FaultProxy(cloud.server) as proxy:
        proxy.always(Stall(after=10), when=lambda r: _reads(r) and r.headers["range"].startswith(last))
        yield proxy


def test_a_download_that_was_cut_off_goes_on(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(LONG)
    assert copied(*cloud.told(), tmp_path / "from", f"{cloud.url}/long") == ["copied"]
    last = len(LONG) // PIECE
    with stalled_at_the_last_piece(cloud) as proxy:
        through = [*cloud.told(server=proxy.url), f"{cloud.url}/long", f"{tmp_path}/to/"]
        process = begin("cp", *through)
        journal = "to/.*.asyncxfer-part.json"
        until(lambda: any(path.read_bytes().count(b"\n") == last + 1 for path in tmp_path.glob(journal)))
        until(lambda: proxy.stalled > 0)
        interrupted(process, signal.SIGKILL)
        assert not (tmp_path / "to/long").exists()
        proxy.go_on()
        proxy.always(None)
        before = len(proxy.requests)
        assert copied(*through) == ["copied"]
        asked = [request.headers["range"] for request in proxy.requests[before:] if _reads(request)]
        assert {text.partition("-")[0] for text in asked} == {_piece(last).partition("-")[0]}
        assert copied(*through) == ["same"]
    assert (tmp_path / "to/long").read_bytes() == LONG


def test_what_is_in_a_store_is_listed(cloud: Cloud, tmp_path: Path) -> None:
    for name in ("a", "b/one", "b/c/deep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert copied("-r", *cloud.told(), tmp_path, f"{cloud.url}/") == ["copied"] * 3
    level = asyncxfer("ls", *cloud.told(), cloud.url)
    assert [line.split()[-1] for line in level.stdout.splitlines()] == ["a", "b/"]
    rows = asyncxfer("ls", "-r", "--json", *cloud.told(), f"{cloud.url}/b")
    found = {row["name"]: row["nbytes"] for row in map(json.loads, rows.stdout.splitlines())}
    assert found == {"one": 5, "c/deep": 8}
    missing = asyncxfer("ls", *cloud.told(), f"{cloud.url}/nothing")
    assert (missing.returncode, f"{cloud.url}/nothing" in missing.stderr) == (1, True)
    assert KEY not in missing.stderr
