"""The examples in the README and the documentation run as they are printed."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from servers import REGION, S3Server

ROOT = Path(__file__).parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Left out of a clean environment: settings of ours that the person who runs the tests may have.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCXFER_")}


def blocks(page: str) -> list[str]:
    return PYTHON_BLOCK.findall((ROOT / page).read_text())


def test_the_readme_example_runs(tmp_path: Path) -> None:
    (example,) = blocks("README.md")
    assert len(example.splitlines()) < 45, "the README's example is to be read at a glance"
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert re.search(r"^\w+: 6,291,456 bytes, [\d.]+ GB/s$", done.stdout, re.MULTILINE), done.stdout
    assert "three blocks in every layer: True" in done.stdout


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/files.md", "docs/store.md"])
async def test_the_pages_run_as_typed(page: str) -> None:
    await run_page(page, {})


async def test_the_page_on_objects_runs_but_for_the_address(s3: S3Server, bucket: str) -> None:
    options = {
        "endpoint_url": s3.url, "region_name": REGION, "aws_access_key_id": s3.admin.access_key,
        "aws_secret_access_key": s3.admin.secret_key,
    }  # fmt: skip
    await run_page("docs/objects.md", {"url": f"s3://{bucket}/kv", "options": options}, first=2)


async def run_page(page: str, names: dict[str, object], first: int = 1) -> None:
    """One block after the other in one namespace, with `await` at the top as in `python -m asyncio`."""
    namespace: dict[str, object] = {"__name__": "page", **names}
    async with asyncio.timeout(60):
        for number, block in enumerate(blocks(page)[first - 1 :], start=first):
            code = compile(block, f"{page}, block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, namespace)
            if inspect.isawaitable(result):
                await result


KVBENCH = (ROOT / "docs/kvbench.md").read_text()
SHOWN = dict(re.findall(r"^```console\n\$ asyncxfer (.*?)\n(.*?)^```$", KVBENCH, re.MULTILINE | re.DOTALL))


def test_the_page_on_kvbench_shows_every_subcommand() -> None:
    assert {command.split()[1] for command in SHOWN} == {"kvcache", "plan", "profile", "traffic", "trace"}


@pytest.mark.parametrize("command", SHOWN)
def test_the_page_on_kvbench_shows_what_is_printed(tmp_path: Path, command: str) -> None:
    """Sizes and plans are printed as they stand there; runs run, and print lines that begin as these do."""
    for name, language in (("traffic.yaml", "yaml"), ("trace.jsonl", "json")):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```$", KVBENCH, re.MULTILINE | re.DOTALL)
        (tmp_path / name).write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "asyncxfer", *shlex.split(command)],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed, shown = done.stdout.splitlines(), SHOWN[command].splitlines()
    if command.split()[1] not in ("kvcache", "plan"):
        printed, shown = ([_begin(line) for line in lines] for lines in (printed, shown))
    assert printed == shown


def _begin(line: str) -> str:
    return line.split(maxsplit=1)[0]


def test_the_options_of_kvbench_that_the_page_names_exist() -> None:
    help_texts = [
        subprocess.run(
            [sys.executable, "-m", "asyncxfer", *command, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for command in (["bench"], *(["kvbench", part] for part in ("kvcache", "plan", "profile", "traffic", "trace")))
    ]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", KVBENCH))
    assert {option for option in named if not any(option in text for text in help_texts)} == set()


def test_the_pages_name_what_exists() -> None:
    """Targets of make and options of the command line that the pages mention are there."""
    targets = set(re.findall(r"^([a-z]+):.*?##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        named = set(re.findall(r"(?:`|\$ )make ([a-z]+)", page.read_text()))
        assert named <= targets, f"{page.name} names make targets that do not exist: {sorted(named - targets)}"


@pytest.mark.parametrize("command", ["doctor", "bench", "certs"])
def test_the_options_that_the_pages_name_exist(command: str) -> None:
    page = (ROOT / "docs/cli.md").read_text().partition(f"## asyncxfer {command}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`[^`\n]*?(--[a-z-]+)", page)) - {"--help"}
    arguments = [sys.executable, "-m", "asyncxfer", command, "--help"]
    known = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True).stdout
    assert named
    assert {option for option in named if option not in known} == set()
