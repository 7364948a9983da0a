"""The backend `kvikio` as processes meet it: over a stub of the CUDA driver, without a driver, without the package.

What runs over the stub stands in `kvikio_suite.py`; with a GPU, `gpu/test_gpu_kvikio.py` does the same for real.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import textwrap
from pathlib import Path

import cuda_stub
import numpy as np
import pytest

from asyncxfer._fast.descriptors import PAIR
from asyncxfer.abc import Request
from asyncxfer.backends.kvikio import _Work

HERE = Path(__file__).parent

needs_kvikio = pytest.mark.skipif(
    importlib.util.find_spec("kvikio") is None, reason="KvikIO is not installed (`make test` installs it)"
)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A libcuda.so.1 that knows no GPU but what it is told of."""
    return cuda_stub.build(tmp_path_factory.mktemp("stub"))


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in which KvikIO goes by its own means and not by libcufile's."""
    settings = {"KVIKIO_COMPAT_MODE": "ON", "KVIKIO_NTHREADS": "4"}
    return cuda_stub.run(*arguments, **(settings | variables))


def script(code: str, *arguments: str) -> str:
    """What a script prints; it ends well and writes nothing to stderr."""
    done = run("-W", "error", "-c", textwrap.dedent(code), *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@needs_kvikio
@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["not TestContract", "TestContract"])
def test_over_the_stub(stub: str, part: str, pytestconfig: pytest.Config) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-k", part]
    if part != "TestContract" and pytestconfig.getoption("--one-loop"):
        options.append("--one-loop")
    done = run("-m", "pytest", str(HERE / "kvikio_suite.py"), *options, LIBCUDA_STUB=stub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("piece_bytes", [4096, 3 * 4096])
def test_rows_are_cut_where_a_page_of_the_file_begins(piece_bytes: int) -> None:
    pairs = np.zeros(100, PAIR)
    random = np.random.default_rng(piece_bytes)
    pairs["local"], pairs["remote"] = random.integers(0, 1 << 30, (2, 100))
    pairs["length"] = random.integers(0, 50_000, 100)
    pairs["local_stride"], pairs["remote_stride"] = random.integers(-(1 << 20), 1 << 20, (2, 100))
    pairs["count"] = random.integers(1, 4, 100)
    request = Request("get", "", None, None, pairs, 0, 0)  # type: ignore[arg-type]
    pieces = iter(_Work(request, None, None, False, piece_bytes).pieces())  # type: ignore[arg-type]
    for local, remote, length, local_stride, remote_stride, count, *_ in pairs.tolist():
        for row in range(count):
            at, offset, left = local + row * local_stride, remote + row * remote_stride, length
            while left:
                piece = next(pieces)
                assert (piece.at, piece.offset) == (at, offset)
                assert 0 < piece.nbytes <= min(piece_bytes, left)
                at, offset, left = at + piece.nbytes, offset + piece.nbytes, left - piece.nbytes
                assert left == 0 or offset % 4096 == 0
    assert next(pieces, None) is None


def test_without_the_package() -> None:
    told = script("""
        import sys
        sys.modules["kvikio"] = None  # as if it were not installed
        from asyncxfer._config import Config
        from asyncxfer._errors import BackendError
        from asyncxfer.backends.kvikio import KvikioBackend
        try:
            KvikioBackend.examine(Config())
        except BackendError as error:
            print(error)
        print(next(iter(KvikioBackend.details(Config()))))
        """)
    assert told.count("pip install 'asyncxfer[kvikio-cu12]'") == 2, told


@needs_kvikio
def test_without_a_driver_it_stands_aside() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has NVIDIA's driver")
    told = script("""
        import asyncio
        from pathlib import Path
        from asyncxfer import Agent, BackendError

        async def main():
            async with Agent("a") as agent:
                print("kvikio" in agent.stats()["backends"], "libcufile" in Path("/proc/self/maps").read_text())
            try:
                async with Agent("b", backends=["kvikio"]):
                    pass
            except BackendError as error:
                print(error)

        asyncio.run(main())
        """).splitlines()
    assert told[0] == "False False", "it was made, or KvikIO was loaded for nothing"
    assert "libcuda.so.1" in told[1]


@needs_kvikio
def test_what_doctor_says_of_it(stub: str) -> None:
    told = script(
        """
        import ctypes, sys
        ctypes.CDLL(sys.argv[1])
        from asyncxfer.__main__ import main
        sys.exit(main(["doctor", "--json"]))
        """,
        stub,
    )
    findings = [finding for finding in json.loads(told) if "kvikio" in (finding["area"], finding["name"])]
    states = {finding["name"]: (finding["ok"], finding["detail"]) for finding in findings}
    assert states["kvikio"][0]
    assert "compatibility mode" in states["kvikio"][1]
    assert states["CUDA driver"] == (True, "libcuda.so.1, for CUDA 12.4")
    assert states["GPUDirect"][0] is False
    assert "num_threads 4" in states["settings"][1]
    assert set(states) >= {"package", "libcufile", "nvidia-fs", "udev", "cufile.json"}


@needs_kvikio
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_of_a_fork_leaves_the_parent_unharmed(stub: str, tmp_path: Path) -> None:
    told = script(
        """
        import asyncio, ctypes, os, sys
        from pathlib import Path
        ctypes.CDLL(sys.argv[1])
        from asyncxfer import Agent, ClosedError

        async def main():
            array = bytearray(1 << 20)
            async with Agent("a") as agent, agent.register(array) as memory:
                async with agent.open(sys.argv[2], "w", size=1 << 20) as file:
                    await agent.put(memory[:], file[:], backend="kvikio")
                    child = os.fork()
                    if child == 0:
                        try:
                            agent.put(memory[:], file[:], backend="kvikio")
                        except ClosedError:
                            print("closed in the child", flush=True)
                        os._exit(0)
                    assert os.waitpid(child, 0)[1] == 0
                    array[:5] = b"later"
                    await agent.put(memory[:], file[:], backend="kvikio")
            print(Path(sys.argv[2]).read_bytes()[:5])

        asyncio.run(main())
        """,
        stub,
        str(tmp_path / "file"),
    )
    assert told.splitlines() == ["closed in the child", "b'later'"]


BROKEN = """
import asyncio
from asyncxfer import Agent
from asyncxfer.abc import BackendError
from asyncxfer.backends import _kvikio_library

async def start():
    async with Agent("a"):
        return "started"

try:
    _kvikio_library._package()
except BackendError as error:
    print(error)
print(asyncio.run(start()))
"""


def test_a_package_that_does_not_load_is_explained_and_not_fatal(tmp_path: Path, stub: str) -> None:
    """Its loader has an exception of its own for libraries that are missing."""
    package = tmp_path / "kvikio"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("Failure finding libcufile.so.0")\n')
    paths = {"PYTHONPATH": f"{tmp_path}:{HERE.parent}", "LD_LIBRARY_PATH": str(Path(stub).parent)}
    done = run("-c", BROKEN, **paths)
    assert done.returncode == 0, done.stderr
    told, started = done.stdout.splitlines()
    assert told.startswith("KvikIO does not load: Failure finding libcufile.so.0; pip install")
    assert started == "started"
