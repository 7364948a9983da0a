"""Which UCX is loaded, what that leaves alone, what is refused, and what a context is made with.

UCX is loaded once in a process, so what is loaded is tested in processes of its own. `UCX_OTHER_BUILD` names the folder
of another build than the wheel's, such as that of an unpacked libucx wheel of another version.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from asyncxfer._config import Config
from asyncxfer._errors import BackendError, ConfigError
from asyncxfer.backends import _ucx_library as ucx
from asyncxfer.backends._alias import load_as

needs_ucxx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed (pip install 'asyncxfer[ucx-cu12]')"
)

HAS_RDMA = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())

PROLOGUE = """
import importlib.util, json, os, sys
from pathlib import Path
from asyncxfer._config import Config
from asyncxfer._errors import BackendError
from asyncxfer.backends import _ucx_library as ucx

def loaded():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "/libuc" in line})

def tell(**what):
    print(json.dumps(what), flush=True)
"""


def run(code: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """Run code in a process of its own; what it tells, and what it writes to stderr."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("ASYNCXFER_", "UCX_", "RAPIDS_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(code), *arguments],
        env=clean | (environment or {}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told, done.stderr


@pytest.fixture
def other_build() -> str:
    where = os.environ.get("UCX_OTHER_BUILD", "")
    if not where:
        pytest.skip("UCX_OTHER_BUILD does not name the folder of another build of UCX")
    return where


def inside_nixl() -> str:
    """Folder of the UCX in the nixl wheel; its files have names of their own."""
    spec = importlib.util.find_spec("nixl_cu12")
    found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.parent.glob("nixl_cu1?.libs"))
    if not found:
        pytest.skip("nixl is not installed (`make bench` does it)")
    return str(found[0])


# ---- loading ------------------------------------------------------------------------------------------------------

OTHER = "ctypes.CDLL(str(next(Path(sys.argv[1]).glob('libucp-*'))))"  # what NIXL does
LOAD = """
before = dict(os.environ)
config = Config(ucx_transports="tcp,cma,posix", ucx_library=sys.argv[1] or None)
library = ucx.load(config)
caught = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("SigCgt"))
info = ucx.take(config).context.info
tell(
    path=library.path, version=library.version, origin=library.origin, ucxx=library.ucxx_version, loaded=loaded(),
    same=ucx.load(config) == library == ucx.load(Config()), untouched=dict(os.environ) == before,
    found=ucx.check(info, config, library), components=ucx.components(info), caught=int(caught, 16),
)
"""
TEST_RESOURCES = [["cma", "memory"], ["posix", "memory"], ["tcp", "lo"]]


def names(paths: list[str], folder: str | Path) -> bool:
    """Whether all that is UCX's own, and not ucxx's, lies under a folder."""
    own = [path for path in paths if not Path(path).name.startswith("libucxx")]
    return len(own) >= 4 and all(Path(path).is_relative_to(folder) for path in own)


@needs_ucxx
def test_the_wheel_is_loaded_and_nothing_else_is_changed() -> None:
    told, errors = run(LOAD, "")
    spec = importlib.util.find_spec("libucx")
    assert spec is not None
    assert spec.origin is not None
    assert names(told["loaded"], Path(spec.origin).parent)
    assert told["path"] in told["loaded"]
    assert told["origin"] == "a libucx wheel"
    assert told["version"].count(".") == 2
    assert sorted(told["found"]) == TEST_RESOURCES
    assert told["same"]
    assert told["untouched"]
    assert not told["caught"] >> (signal.SIGHUP - 1) & 1, "UCX has taken SIGHUP"
    assert errors == ""


@needs_ucxx
def test_another_build_is_loaded_in_place_of_the_wheel(other_build: str) -> None:
    told, errors = run(LOAD, other_build)
    assert names(told["loaded"], other_build), told["loaded"]
    assert Path(told["path"]).is_relative_to(other_build)
    assert sorted(told["found"]) == TEST_RESOURCES, "the build's own modules (cma) were not found"
    assert (told["same"], told["untouched"], errors) == (True, True, "")


@needs_ucxx
def test_the_build_inside_the_nixl_wheel_is_loaded_under_the_usual_name() -> None:
    told, errors = run(LOAD, inside_nixl())
    assert names(told["loaded"], inside_nixl()), told["loaded"]
    assert told["origin"] == "inside the nixl wheel"
    assert "ib" in told["components"], "the build that has verbs was expected"
    assert sorted(told["found"]) == TEST_RESOURCES
    assert (told["same"], told["untouched"], errors) == (True, True, "")


@needs_ucxx
def test_what_is_in_the_process_is_used() -> None:
    """NIXL's UCX was loaded first: it serves both."""
    told, _ = run(f"import ctypes; {OTHER}; tell(origin=ucx.load(Config()).origin, loaded=loaded())", inside_nixl())
    assert told["origin"] == "inside the nixl wheel"
    assert names(told["loaded"], inside_nixl()), told["loaded"]


@needs_ucxx
@pytest.mark.parametrize("wish", ["", "the wheel"])
def test_the_wheel_that_another_package_has_loaded_is_used(wish: str) -> None:
    code = """
    import libucx
    libucx.load_library()
    library = ucx.load(Config(ucx_library=str(Path(libucx.__file__).parent) if sys.argv[1] else None))
    tell(loaded=loaded(), path=library.path, folder=str(Path(libucx.__file__).parent), version=library.version)
    """
    told, _ = run(code, wish)
    assert names(told["loaded"], told["folder"]), told["loaded"]
    assert Path(told["path"]).is_relative_to(told["folder"])


@needs_ucxx
def test_the_users_own_settings_of_ucx_stay() -> None:
    code = """
    before = dict(os.environ)
    ucx.load(Config())
    tell(untouched=dict(os.environ) == before)
    """
    mine = {"UCX_MEMTYPE_CACHE": "y", "UCX_RC_TIMEOUT": "500ms"}
    assert run(code, environment=mine)[0] == {"untouched": True}


REFUSED = """
import ctypes
try:
    {before}
    library = ucx.load(Config(ucx_library={wish}))
    {after}
    ucx.load(Config())
except BackendError as error:
    tell(error=str(error))
"""


@needs_ucxx
def test_a_second_build_in_the_process_is_refused() -> None:
    told, _ = run(REFUSED.format(before="", wish="None", after=OTHER), inside_nixl())
    assert "two builds of UCX are in this process" in told["error"]
    assert "libucx/lib/" in told["error"]
    assert inside_nixl() in told["error"]


@needs_ucxx
def test_another_wish_than_what_is_loaded_is_refused() -> None:
    spec = importlib.util.find_spec("libucx")
    assert spec is not None
    assert spec.origin is not None
    wish = str(Path(spec.origin).parent)
    told, _ = run(REFUSED.format(before=OTHER, wish=repr(wish), after=""), inside_nixl())
    assert f"ucx_library is {wish!r}" in told["error"]
    assert "another UCX loaded" in told["error"]


@needs_ucxx
def test_a_folder_without_a_build_is_refused(tmp_path: Path) -> None:
    told, _ = run(REFUSED.format(before="", wish=repr(str(tmp_path)), after=""))
    assert told["error"].startswith(f"ucx_library is {str(tmp_path)!r}: libucm, libucs")


@needs_ucxx
def test_files_that_are_no_libraries_are_refused_by_name(tmp_path: Path) -> None:
    for part in ("libucm", "libucs", "libuct", "libucp"):
        (tmp_path / f"{part}.so.0").write_text("a script of a linker\n")
    told, _ = run(REFUSED.format(before="", wish=repr(str(tmp_path)), after=""))
    assert f"UCX does not load from {tmp_path}/libucp.so.0" in told["error"]
    assert "is not a shared library" in told["error"]


def test_without_ucxx_the_install_line_is_named() -> None:
    code = """
    sys.modules["ucxx"] = None  # to Python, what is not installed
    errors = []
    for call in (ucx.load, ucx.examine):
        try:
            call(Config(ucx_transports="tcp"))
        except BackendError as error:
            errors.append(str(error))
    tell(errors=errors, loaded=loaded())
    """
    told, _ = run(code)
    assert told["errors"] == ["ucxx is not installed: pip install 'asyncxfer[ucx-cu12]' (or ucx-cu13 with CUDA 13)"] * 2
    assert told["loaded"] == []


def test_an_alias_gives_the_symbols_of_what_it_is_made_from(tmp_path: Path) -> None:
    files = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()]
    load_as(
        "libaxf-test.so.1", [next(path for path in files if path.name == name) for name in ("libc.so.6", "libm.so.6")]
    )
    alias = ctypes.CDLL("libaxf-test.so.1", os.RTLD_NOLOAD | os.RTLD_NOW)
    alias.cos.restype = ctypes.c_double
    assert alias.cos(ctypes.c_double(0)) == 1.0
    assert alias.getpid() == os.getpid()
    short = tmp_path / "short.so"
    short.write_bytes(b"\x7fELF")
    with pytest.raises(OSError, match="not a shared library"):
        load_as("libaxf-test.so.2", [short])


@needs_ucxx
def test_a_child_of_a_process_that_uses_ucx_is_told_so() -> None:
    code = """
    config = Config(ucx_transports="tcp,cma,posix")
    ucx.examine(config)
    if not (pid := os.fork()):
        try:
            ucx.take(config)
        except BackendError as error:
            tell(error=str(error))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ucx.take(config)  # the parent goes on
    """
    told, _ = run(code)
    assert told["error"].startswith("UCX was started before this process was forked")


# ---- what a context is made with ----------------------------------------------------------------------------------

ALWAYS = {"RNDV_THRESH": "inf", "KEEPALIVE_INTERVAL": "1s"}
TCP = {"ZCOPY_THRESH": "8k"}


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        ({}, {"TLS": "^tcp"}),
        ({"ucx_devices": "mlx5_0:1"}, {"TLS": "^tcp", "NET_DEVICES": "mlx5_0:1"}),
        ({"ucx_transports": "rc,cuda"}, {"TLS": "rc,cuda"}),
        ({"ucx_transports": "tcp,cma,posix"}, {"TLS": "tcp,cma,posix", "NET_DEVICES": "lo", **TCP}),
        ({"ucx_transports": "cma, tcp:aux"}, {"TLS": "cma, tcp:aux", "NET_DEVICES": "lo", **TCP}),
        ({"ucx_transports": "^tcp,cma"}, {"TLS": "^tcp,cma"}),
        ({"ucx_transports": "tcp", "ucx_devices": "lo"}, {"TLS": "tcp", "NET_DEVICES": "lo", **TCP}),
        (
            {"ucx_transports": "tcp", "ucx_devices": "eth0", "open_listener": True},
            {"TLS": "tcp", "NET_DEVICES": "eth0", **TCP},
        ),
        ({"ucx_keepalive": 0.25}, {"TLS": "^tcp", "KEEPALIVE_INTERVAL": "0.25s"}),
    ],
)
def test_options(keys: dict[str, Any], chosen: dict[str, str]) -> None:
    assert ucx.options(Config(**keys)) == ALWAYS | chosen


@pytest.mark.parametrize("transports", ["tcp", "cma,tcp", "\\tcp", "tcp:aux,cma"])
@pytest.mark.parametrize("devices", ["eth0", "lo,eth0", "all", "^lo", "eth[0-9]", "eth0:1", "../lo:1", "mlx5_0:1"])
def test_tcp_beyond_this_host_needs_an_open_listener(transports: str, devices: str) -> None:
    with pytest.raises(ConfigError, match=r"UCX's tcp would listen on .*open_listener=True"):
        ucx.options(Config(ucx_transports=transports, ucx_devices=devices))


@pytest.mark.parametrize("transports", ["rc,tcp", "tcp,rc_mlx5", "srd,tcp", "all", "^cma", "ib,tcp"])
def test_tcp_beside_rdma_needs_its_devices_named(transports: str) -> None:
    with pytest.raises(ConfigError, match="ucx_devices has to name the devices"):
        ucx.options(Config(ucx_transports=transports, open_listener=True))


INFO = """#
# UCP context
#
#     component 0  :  self
#     component 1  :  tcp
#     component 5  :  ib
#
#            md 0  :  component 0  self
#            md 5  :  component 5  mlx5_0
#
#      resource 0  :  md 1  dev 1  flags -- tcp/lo
#      resource 1  :  md 5  dev 2  flags -- rc_mlx5/mlx5_0:1
#      resource 2  :  md 5  dev 2  flags -s ud_mlx5/mlx5_0:1
#
"""
LIBRARY = ucx.Library("/opt/ucx/lib/libucp.so.0", "1.21.0", "/opt/ucx/lib", "0.52.0")


def test_resources_and_components_are_read_from_what_ucx_prints() -> None:
    assert ucx.resources(INFO) == [("tcp", "lo"), ("rc_mlx5", "mlx5_0:1"), ("ud_mlx5", "mlx5_0:1")]
    assert [each.is_rdma for each in ucx.resources(INFO)] == [False, True, True]
    assert ucx.components(INFO) == ["self", "tcp", "ib"]
    assert ucx.resources("") == []


def test_what_a_context_offers_is_checked() -> None:
    assert len(ucx.check(INFO, Config(), LIBRARY)) == 3
    elsewhere = INFO.replace("tcp/lo", "tcp/eth0")
    with pytest.raises(BackendError, match="would listen on eth0"):
        ucx.check(elsewhere, Config(), LIBRARY)
    assert len(ucx.check(elsewhere, Config(open_listener=True), LIBRARY)) == 3
    bare = INFO[: INFO.index("#      resource")] + "#      resource 0  :  md 0  dev 0  flags -- cma/memory\n"
    with pytest.raises(BackendError, match=r"'cma', and this UCX 1.21.0 .* has cma on memory.*add rc, dc"):
        ucx.check(bare, Config(ucx_transports="cma"), LIBRARY)
    with pytest.raises(BackendError, match=r"no transport for RDMA: no device can be used"):
        ucx.check(bare, Config(), LIBRARY)
    with pytest.raises(BackendError, match=r"built without verbs.*docs/rdma.md"):
        ucx.check(bare.replace("  ib", "  cma"), Config(), LIBRARY)


# ---- agents and doctor --------------------------------------------------------------------------------------------


@needs_ucxx
@pytest.mark.skipif(HAS_RDMA, reason="this machine has RDMA devices")
def test_what_ucx_cannot_do_here_is_said() -> None:
    code = """
    errors = []
    for transports in ("rc", "cma"):
        try:
            ucx.examine(Config(ucx_transports=transports))
        except BackendError as error:
            errors.append(str(error))
    tell(errors=errors)
    """
    told, errors = run(code)
    rc, cma = told["errors"]
    assert "ucx_transports='rc'" in rc
    assert "asyncxfer doctor" in rc
    assert "add rc, dc, ud or srd" in cma
    assert "transport 'rc' is not available" in errors, "UCX's own words are to be seen"


@needs_ucxx
def test_findings_name_the_build_and_what_is_in_it() -> None:
    told, _ = run("tell(found=list(ucx.findings(Config())))")
    found = {name: (ok, detail) for name, ok, detail in told["found"]}
    assert list(found) == ["library", "transports", "verbs", "CUDA", "GDR"]
    assert found["library"][0]
    assert "UCX 1." in found["library"][1]
    assert "tcp on lo" in found["transports"][1]
    if "libucx wheel" in found["library"][1]:
        assert found["verbs"] == (False, "not in this build")


@needs_ucxx
def test_a_mix_is_among_the_findings() -> None:
    code = f"import ctypes; ucx.load(Config()); {OTHER}; tell(found=list(ucx.findings(Config())))"
    told, _ = run(code, inside_nixl())
    ((name, ok, detail),) = told["found"]
    assert (name, ok) == ("library", False)
    assert "two builds of UCX" in detail


@pytest.mark.skipif(HAS_RDMA, reason="this machine has RDMA devices")
def test_without_rdma_devices_the_reason_is_given_before_ucx_is_loaded() -> None:
    code = """
    try:
        ucx.examine(Config())
    except BackendError as error:
        tell(error=str(error), loaded=loaded(), imported="ucxx" in sys.modules)
    """
    told, _ = run(code)
    assert "there is no RDMA device" in told["error"] or "ucxx is not installed" in told["error"]
    assert (told["loaded"], told["imported"]) == ([], False)


@needs_ucxx
def test_doctor_prints_what_was_found() -> None:
    command = [sys.executable, "-m", "asyncxfer", "doctor", "--json"]
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("ASYNCXFER_", "UCX_"))}
    asked = clean | {"ASYNCXFER_UCX_TRANSPORTS": "tcp,cma,posix"}
    done = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=100, check=True)
    found = {(each["area"], each["name"]): each for each in json.loads(done.stdout)}
    assert found["backend", "ucx"]["ok"], found["backend", "ucx"]
    assert "tcp on lo; posix, cma on memory" in found["backend", "ucx"]["detail"]
    assert [name for area, name in found if area == "ucx"] == ["library", "transports", "verbs", "CUDA", "GDR"]
    refused = clean | {"ASYNCXFER_UCX_TRANSPORTS": "tcp", "ASYNCXFER_UCX_DEVICES": "all"}
    done = subprocess.run(command, env=refused, capture_output=True, text=True, timeout=100, check=True)
    found = {(each["area"], each["name"]): each for each in json.loads(done.stdout)}
    assert not found["backend", "ucx"]["ok"]
    assert "open_listener=True" in found["backend", "ucx"]["detail"]
