"""What `import asyncxfer` gives: the public names, under their public name, typed, and cheaply."""

from __future__ import annotations

import importlib.resources
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import asyncxfer
import asyncxfer.abc
from asyncxfer import _errors

# The contract's own names; more may be exported, these have to be.
CONTRACT = {
    "AccessError", "Agent", "BackendError", "ChecksumError", "ClosedError", "DescriptorError", "DescriptorList", "Done",
    "MemoryKind", "MetadataError", "NoRouteError", "Peer", "PeerLostError", "Plan", "Region", "RegistrationError",
    "Transfer", "TransferError", "TransferTimeout", "XferError",
}  # fmt: skip

TYPED_USE = """
import numpy as np
from asyncxfer import {names}

async def use(agent: Agent, peer: Peer, region: Region) -> None:
    transfer = agent.put(region[:, [3, 7]], peer["kv"][:, 0:2], notify=b"tag", timeout=1.0)
    reveal_type(transfer)
    reveal_type(await transfer)
    reveal_type(region[..., 0])
    reveal_type(agent.prepare("get", region[0], peer["kv"][0]))
    async with Agent("a", directory=None) as other, other.register(np.zeros(8), name="kv") as registered:
        reveal_type(other)
        reveal_type(registered)
    reveal_type(await agent.allocate((4, 4), np.float16))
    reveal_type(await agent.connect(agent.metadata()))
    agent.prepare("move", region[0], peer["kv"][0])
"""


def public(name: str) -> object:
    return getattr(asyncxfer, name)


def test_all_is_sorted_complete_and_true() -> None:
    assert list(asyncxfer.__all__) == sorted(asyncxfer.__all__)
    assert set(asyncxfer.__all__) >= CONTRACT | set(_errors.__all__)
    assert [name for name in asyncxfer.__all__ if not hasattr(asyncxfer, name)] == []
    # Whatever else can be reached is a submodule, or private.
    strays = {name for name, value in vars(asyncxfer).items() if not isinstance(value, ModuleType)}
    assert {name for name in strays if not name.startswith("_")} == set(asyncxfer.__all__) - {"__version__"}


@pytest.mark.parametrize("name", asyncxfer.__all__)
def test_tracebacks_and_reprs_show_the_public_name(name: str) -> None:
    value = public(name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert (value.__module__, value.__qualname__) == ("asyncxfer", name)


def test_every_error_is_of_the_tree() -> None:
    for name in _errors.__all__:
        error = public(name)
        assert inspect.isclass(error)
        assert issubclass(error, asyncxfer.XferError)
        assert str(error("said")) == "said"


def test_what_a_backend_author_imports_is_there() -> None:
    assert [name for name in asyncxfer.abc.__all__ if not hasattr(asyncxfer.abc, name)] == []
    assert list(asyncxfer.abc.__all__) == sorted(asyncxfer.abc.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files("asyncxfer").joinpath("py.typed").is_file()


@pytest.mark.slow
def test_a_type_checker_sees_every_public_name(tmp_path: Path) -> None:
    module = tmp_path / "use.py"
    module.write_text(TYPED_USE.format(names=", ".join(name for name in asyncxfer.__all__ if name != "__version__")))
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    checker += ["--cache-dir", str(tmp_path / "cache")]
    # An editable install is found by an import hook, which a type checker does not run.
    environment = {**os.environ, "MYPYPATH": str(Path(asyncxfer.__file__).parent.parent)}
    done = subprocess.run(
        [*checker, module], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    types = re.findall(r'Revealed type is "(.*)"', done.stdout)
    revealed = [name.split(".")[-1].rstrip("]") for name in types]
    assert revealed == [
        "Transfer", "Done", "DescriptorList", "Plan", "Agent", "Region", "Region", "Peer",
    ], done.stdout  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 1, done.stdout  # a misspelt operation is seen, and nothing else is wrong
    assert "move" in errors[0]


IMPORTED = """
import sys
import numpy
before = set(sys.modules)
import asyncxfer
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_it_loads_little() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    packages = set(done.stdout.split())
    # msgspec takes typing_extensions where it finds them; cython_runtime is no file.
    own = {"asyncxfer", "cython_runtime", "msgspec", "numpy", "typing_extensions"}
    outside = {name for name in packages - sys.stdlib_module_names - own if not name.startswith("_")}
    assert outside == set(), "only the base dependencies are imported"
