"""The command line as a user runs it: in a process of its own, with a store where its options say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from servers import REGION, S3Server

__all__ = ["Ran", "asyncxfer", "begin", "interrupted", "options_of", "until"]

_ROOT = Path(__file__).parent.parent
_SECONDS = 60.0
Ran = subprocess.CompletedProcess[str]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "AWS_EC2_METADATA_DISABLED": "true", "TZ": "UTC"}


def _command(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", "asyncxfer", *map(str, arguments)]


def asyncxfer(*arguments: object, cwd: Path | None = None) -> Ran:
    """Run it to its end."""
    return subprocess.run(
        _command(arguments), env=_environment(), cwd=cwd, capture_output=True, text=True, timeout=_SECONDS, check=False
    )


def begin(*arguments: object) -> subprocess.Popen[str]:
    """Start it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(_command(arguments), env=_environment(), stdout=pipe, stderr=pipe, text=True)


def interrupted(process: subprocess.Popen[str], number: signal.Signals) -> Ran:
    """Send it a signal, and wait for its end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=_SECONDS)
    return Ran(process.args, process.returncode, out, err)


def options_of(s3: S3Server, url: str | None = None) -> list[str]:
    """What names a server, or a proxy before it, and who asks."""
    named = {
        "endpoint_url": url or s3.url, "addressing_style": "path", "region_name": REGION,
        "aws_access_key_id": s3.admin.access_key, "aws_secret_access_key": s3.admin.secret_key,
    }  # fmt: skip
    return [word for name, value in named.items() for word in ("-o", f"{name}={value}")]


def until(happened: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + _SECONDS
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
