"""The files are the pipeline, in order: imports point one way along it.

import-linter checks the layers of the Python modules (the contracts stand in pyproject.toml). What it cannot see is
read here: the Cython sources, and rules about who may use what instead of who lies below whom.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncxfer"


class Rule(NamedTuple):
    """What the sources under a folder may import of asyncxfer: these modules, or anything inside these packages."""

    modules: frozenset[str]
    packages: frozenset[str]


RULES = {
    "asyncxfer/_fast": Rule(frozenset({"asyncxfer._errors", "asyncxfer._done"}), frozenset({"asyncxfer._fast"})),
    # Besides abc, the errors and the native core: the type of what a backend is configured with, the HTTP client and
    # its signatures for object stores, what backends of one kind share, and parts of one backend. Backends do not know
    # each other.
    "asyncxfer/backends": Rule(
        frozenset(f"asyncxfer.{part}" for part in ("abc", "_errors", "_config", "_http", "_sigv4"))
        | {
            f"asyncxfer.backends.{part}"
            for part in (
                "_engine",
                "_ranges",
                "_cuda",
                "_ucx_library",
                "_alias",
                "_kvikio_library",
                "_s3_dialect",
                "_s3_sdk",
                "_s3_sdk_store",
                "_s3_store",
                "_azure_account",
                "_azure_dialect",
                "_azure_store",
                "_gcs_account",
                "_gcs_dialect",
                "_gcs_store",
            )
        },
        frozenset({"asyncxfer._fast", "asyncxfer.backends._object"}),
    ),
    # The public names, and the checksums that stores have.
    "asyncxfer/_copy": Rule(
        frozenset({"asyncxfer", "asyncxfer.abc", "asyncxfer._fast.crc32c", "asyncxfer._fast.crc64"}),
        frozenset({"asyncxfer._copy"}),
    ),
    "asyncxfer/bench": Rule(frozenset({"asyncxfer"}), frozenset({"asyncxfer.bench"})),
    # The public names, the store, and the benchmarks of transfers, which it plans and runs.
    "asyncxfer/kvbench": Rule(
        frozenset({"asyncxfer"}), frozenset({"asyncxfer.kvbench", "asyncxfer.bench", "asyncxfer.store"})
    ),
    # The public names, and its own native index.
    "asyncxfer/store": Rule(
        frozenset({"asyncxfer"} | {f"asyncxfer._fast.{part}" for part in ("blockindex", "blockrows", "crc32c")}),
        frozenset({"asyncxfer.store"}),
    ),
    "asyncxfer/connectors": Rule(frozenset({"asyncxfer"}), frozenset({"asyncxfer.connectors"})),
    "asyncxfer/testing": Rule(frozenset({"asyncxfer", "asyncxfer.abc"}), frozenset({"asyncxfer.testing"})),
    "examples": Rule(frozenset({"asyncxfer"}), frozenset({"asyncxfer.store"})),
}
SUFFIXES = frozenset({".py", ".pyi", ".pyx", ".pxd", ".pxi"})
CYTHON_FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE)
CYTHON_IMPORT = re.compile(r"^[ \t]*c?import[ \t]+([^\n#]*)", re.MULTILINE)


def imports(path: Path, *, root: Path = ROOT) -> Iterator[str]:
    """Yield the absolute names that a Python or Cython source imports, `from a import b` as ``a.b``."""
    package = path.relative_to(root).parent.parts
    found = _python_imports(path) if path.suffix in (".py", ".pyi") else _cython_imports(path)
    for level, module, name in found:
        base = (".".join(package[: len(package) - level + 1]),) if level else ()
        yield ".".join(part for part in (*base, module, name) if part)


def _python_imports(path: Path) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def _cython_imports(path: Path) -> Iterator[tuple[int, str, str]]:
    text = path.read_text()
    for module, names in CYTHON_FROM.findall(text):
        level = len(module) - len(module.lstrip("."))
        for name in names.strip("() \n").split(","):
            yield level, module[level:], name.split()[0] if name.split() else ""
    for names in CYTHON_IMPORT.findall(text):
        yield from ((0, name.split()[0], "") for name in names.split(",") if name.strip())


def own(name: str, known: frozenset[str]) -> str:
    """Give the module of asyncxfer that an imported name lies in: ``asyncxfer.abc`` for ``asyncxfer.abc.Backend``."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def known_modules() -> frozenset[str]:
    found = set()
    for path in PACKAGE.rglob("*"):
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return frozenset(found)


def trespasses(folder: Path, rule: Rule, *, root: Path = ROOT) -> list[str]:
    """List the imports under `folder` that its rule does not allow."""
    known = known_modules()
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        for name in imports(path, root=root):
            module = own(name, known)
            if module.split(".")[0] != "asyncxfer" or module in rule.modules:
                continue
            if not any(module == package or module.startswith(package + ".") for package in rule.packages):
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


@pytest.mark.parametrize("folder", RULES)
def test_imports_keep_to_the_rule(folder: str) -> None:
    if not (ROOT / folder).is_dir():
        pytest.skip(f"{folder}/ does not exist yet")
    assert trespasses(ROOT / folder, RULES[folder]) == []


def test_the_core_does_not_import_the_public_package() -> None:
    """It would close a circle that import-linter is told to overlook."""
    outer = {"__init__", "__main__", "_copy", "_doctor", "bench", "connectors", "kvbench", "store", "testing"}
    known = known_modules()
    found = [
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).with_suffix("").parts[0] not in outer
        and any(own(name, known) == "asyncxfer" for name in imports(path))
    ]
    assert found == []


def test_the_errors_import_nothing_of_the_package() -> None:
    assert [name for name in imports(PACKAGE / "_errors.py") if name.startswith("asyncxfer")] == []


def test_only_the_configuration_reads_the_environment() -> None:
    # The bench hands an environment to the NIXL it starts, which is the environment of another program. The loader of
    # UCX takes back the variables that ucxx sets while it is imported.
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)\b|from os import .*\b(environ|getenv)\b", path.read_text())
    }
    assert {path for path in readers if not path.startswith("asyncxfer/bench/")} == {
        "asyncxfer/_config.py",
        "asyncxfer/backends/_gcs_account.py",  # where Google's clients look for an emulator
        "asyncxfer/backends/_ucx_library.py",
    }


def test_the_scan_sees_what_it_should(tmp_path: Path) -> None:
    """The rules are worth as much as the reading of the sources: show it both ways of every language."""
    folder = tmp_path / "asyncxfer" / "_fast"
    folder.mkdir(parents=True)
    (folder / "a.pyx").write_text(
        "from libc.stdint cimport uint64_t\n"
        "from asyncxfer._agent import Agent\n"
        "cimport asyncxfer._fast.native as native, asyncxfer.abc\n"
        "from asyncxfer._fast.native cimport (axf_link,\n    axf_more)\n"
        "from .. import _config\n"
    )
    (folder / "b.py").write_text("from __future__ import annotations\nfrom .. import abc\nimport asyncxfer.abc\n")
    assert trespasses(folder, RULES["asyncxfer/_fast"], root=tmp_path) == [
        "asyncxfer/_fast/a.pyx imports asyncxfer._agent.Agent",
        "asyncxfer/_fast/a.pyx imports asyncxfer._config",
        "asyncxfer/_fast/a.pyx imports asyncxfer.abc",
        "asyncxfer/_fast/b.py imports asyncxfer.abc",
        "asyncxfer/_fast/b.py imports asyncxfer.abc",
    ]


@pytest.mark.slow
def test_import_linter_keeps_the_contracts() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
