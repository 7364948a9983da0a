"""``asyncxfer bench``: its options, and which run they ask for.

Options are added to a parser that is given, so that the command line costs nothing but argparse
until a benchmark is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

from . import _ucx
from ._shapes import DEFAULT_SHAPES, UCX_SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._compare import Options, Over

__all__ = ["add_arguments", "main"]

_Item = TypeVar("_Item")

_OBJECTS = ("s3", "azure")
#: What some options are for.
_PLACES = {"way": ["file"], "folder": ["file"], "backend": ["file"], "endpoint": [*_OBJECTS], "bucket": [*_OBJECTS]}
_UCX_OPTIONS = ("transports", "ucx_progress", "ucx_workers")
_BLOCK = 4096
_BUCKET = "asyncxfer-bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``asyncxfer bench`` to `parser`."""
    add = parser.add_argument
    add("--peer", choices=["none", "nixl"], default="none", help="what to run beside, interleaved")
    shapes = _list_of(Shape.parse)
    add("--shapes", type=shapes, metavar="NxSIZE,...", help="rows and their size: 16384x4KiB,20000x4KiB/contiguous,...")
    memories = _list_of(_one_of("mapped", "ordinary"))
    add(
        "--memory",
        type=memories,
        metavar="mapped,ordinary",
        help="default: both; over TCP and UCX ordinary, over a file mapped",
    )
    add("--op", type=_list_of(_one_of("put", "get")), default=["put", "get"], metavar="put,get")
    lists = "prepared: before the clock starts (default); unprepared: lists are made and checked for every transfer"
    add("--lists", type=_list_of(_one_of("prepared", "unprepared")), default=["prepared"], metavar="...", help=lists)
    add("--rounds", type=_at_least_one, default=20, help="timed rounds a case (default 20)")
    add("--warmup", type=_at_least_one, default=3, help="rounds before those (default 3)")
    add("--seed", type=int, default=0, help="of the remote order and of the bytes")
    add("--uvloop", action="store_true", help="run ours on uvloop")
    add("--json", action="store_true", help="print JSON instead of a table")
    thread = "NIXL's progress thread: on (its own default; spins on a core a process), off (its sides are polled every "
    thread += "millisecond), spin (off, and polled without pause); with several, each runs, and the fastest counts"
    threads = _list_of(_one_of("on", "off", "spin"))
    add("--nixl-progress-thread", type=threads, default=["on"], metavar="on,off,spin", help=thread)
    over = "what systems may use: whatever is fastest on one host (default); TCP, beside a plain socket and iperf3; or "
    over += "UCX, beside ucx_perftest; or a file; or objects of S3 or Azure"
    add("--over", choices=["host", "tcp", "ucx", "file", *_OBJECTS], help=over)
    ways = _list_of(_one_of("cached", "direct"))
    add(
        "--way", type=ways, metavar="cached,direct", help="over a file: through the page cache, past it (default: both)"
    )
    add("--folder", metavar="PATH", help="over a file: where it is made (default: the current folder)")
    add("--backend", metavar="NAME", help="over a file: which of our backends moves (default: the one that is chosen)")
    endpoint = "over S3 and Azure: what to measure against (default: a server that keeps nothing), by the credentials "
    endpoint += "that the SDK finds; of Azure the URL of an account whose key AZURE_STORAGE_CONNECTION_STRING has"
    add("--endpoint", metavar="URL", help=endpoint)
    bucket = f"bucket or container of an --endpoint; made if it is not there (default {_BUCKET})"
    add("--bucket", metavar="NAME", help=bucket)
    transports = f"over UCX: which of its transports everybody may use, as UCX_TLS (default {_ucx.DEFAULT_TRANSPORTS})"
    add("--transports", metavar="UCX_TLS", help=transports)
    driven = "over UCX: who drives it in ours; with several, each runs, and ratios are of the first (default loop)"
    add("--ucx-progress", type=_list_of(_one_of("loop", "thread")), metavar="loop,thread", help=driven)
    add("--ucx-workers", type=_at_least_one, metavar="N", help="over UCX: workers of an agent of ours (default 1)")
    veth = "over TCP: on loopback, or between two network namespaces joined by a veth, which needs root"
    add("--link", choices=["loopback", "veth"], default="loopback", help=veth)
    add("--mtu", type=_at_least_one, default=1500, metavar="BYTES", help="of the veth (default 1500)")
    tls = "over TCP: ours encrypts, beside ours in plain and `ssl`; over S3 and Azure: https"
    add("--tls", action="store_true", help=tls)
    add("--checksum", action="store_true", help="ours checks every row, beside ours without")
    modes = parser.add_mutually_exclusive_group()
    told = "instead: how soon a receiver knows of a put; on one host and over TCP, or what --over says"
    modes.add_argument("--notify", action="store_true", help=told)
    posts = "instead: how long the call takes that posts, a row, and until the transfer is done"
    modes.add_argument("--post", action="store_true", help=posts)
    rest = "instead: the CPU time of ours in SECONDS in which nothing happens, without and with --peers connected"
    modes.add_argument("--idle", type=float, metavar="SECONDS", help=rest)
    late = "instead: how late the loop is in SECONDS without and with transfers back to back"
    modes.add_argument("--stall", type=float, metavar="SECONDS", help=late)
    many = "instead: this many small transfers at once, and the memory they keep"
    modes.add_argument("--in-flight", type=_at_least_one, metavar="TRANSFERS", help=many)
    add("--peers", type=_at_least_one, default=50, metavar="N", help="with --idle: initiators (default 50)")


def main(arguments: argparse.Namespace) -> int:
    """Run what `arguments` ask for and print it; 0 if it ran and every byte was right."""
    missing = _senseless(arguments) or _missing(arguments)
    if missing:
        print(f"asyncxfer bench: {missing}", file=sys.stderr)
        return 2
    from ._pair import BenchError

    try:
        with contextlib.ExitStack() as stack:
            if arguments.over in _OBJECTS:
                mode, results, table, told = _run_over_objects(arguments)
            elif arguments.over == "file":
                mode, results, table, told = _run_over_file(arguments)
            else:
                options = _options(arguments, stack)
                mode, results, table = asyncio.run(_run(arguments, options))
                told = _told(arguments, options)
    except BenchError as error:
        print(f"asyncxfer bench: {error}", file=sys.stderr)
        return 1
    from . import _report

    plain = [_report.to_plain(result) for result in results]
    if arguments.json:
        head = {"mode": mode, "seed": arguments.seed, "machine": _report.machine()}
        head |= {"versions": _versions(arguments), "uvloop": arguments.uvloop}
        head |= {"rounds": arguments.rounds, "over": arguments.over or "host", **told}
        print(json.dumps(head | {"results": plain}, indent=2))
    else:
        _report.show(table(results))
    return 0 if all(_verified(result) for result in plain) else 1


def _told(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What was asked for, as JSON says it, but for a file."""
    told = {"nixl_progress_thread": arguments.nixl_progress_thread, "link": options.place.link}
    told |= {"tls": arguments.tls, "checksum": arguments.checksum}
    return told | {"ucx": dataclasses.asdict(options.ucx) if options.over == "ucx" else None}


def _run_over_file(arguments: argparse.Namespace) -> tuple[str, Sequence[Any], Callable[..., Any], dict[str, Any]]:
    from . import _file, _report
    from ._file_cases import FILE_SHAPES

    options = _file.FileOptions(
        shapes=arguments.shapes or FILE_SHAPES,
        ways=arguments.way or ("cached", "direct"),
        ops=arguments.op,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        uvloop=arguments.uvloop,
        nixl=arguments.peer == "nixl",
        rivals=arguments.stall is None,
        folder=arguments.folder,
        backend=arguments.backend,
        memory=(arguments.memory or ["mapped"])[0],
    )
    told = {"folder": options.folder, "backend": options.backend, "memory": options.memory}
    if arguments.stall is not None:
        stalls = asyncio.run(_file.stall_files(options, _progress, seconds=arguments.stall))
        return "stall", stalls, _report.stall_table, told
    return "compare", asyncio.run(_file.compare_files(options, _progress)), _report.file_table, told


def _run_over_objects(arguments: argparse.Namespace) -> tuple[str, Sequence[Any], Callable[..., Any], dict[str, Any]]:
    from . import _objects, _report
    from ._object_cases import OBJECT_SHAPES

    options = _objects.ObjectOptions(
        cloud=arguments.over,
        shapes=arguments.shapes or OBJECT_SHAPES,
        ops=arguments.op,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        uvloop=arguments.uvloop,
        nixl=arguments.peer == "nixl",
        rivals=arguments.stall is None,
        tls=arguments.tls,
        endpoint=arguments.endpoint,
        bucket=arguments.bucket or _BUCKET,
    )
    told = {"endpoint": options.endpoint, "link": options.link}
    if arguments.stall is not None:
        stalls = asyncio.run(_objects.stall_objects(options, _progress, seconds=arguments.stall))
        return "stall", stalls, _report.stall_table, told
    return "compare", asyncio.run(_objects.compare_objects(options, _progress)), _report.object_table, told


def _options(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Options:
    """What `arguments` ask for; `stack` ends what was made for it."""
    from . import _compare, _iperf, _loop, _perftest, _place, _post

    over_ucx = arguments.over == "ucx"
    shapes: Sequence[Shape] = UCX_SHAPES if over_ucx else DEFAULT_SHAPES
    if arguments.stall is not None:
        shapes = DEFAULT_SHAPES[:1]
    elif arguments.in_flight is not None:
        shapes = _loop.FLOOD_SHAPES
    elif arguments.post:
        shapes = _post.POST_SHAPES
    over_tcp = arguments.over == "tcp"
    apart = over_tcp or over_ucx
    iperf = over_tcp and _iperf.is_installed()
    if over_tcp and not iperf:
        _progress(f"without iperf3, which is not installed; {_iperf.INSTALL}")
    perftest = over_ucx and _perftest.program() is not None
    if over_ucx and not perftest:
        _progress(f"without ucx_perftest, which is not installed; {_perftest.INSTALL}")
    return _compare.Options(
        shapes=arguments.shapes or shapes,
        memories=arguments.memory or (["ordinary"] if apart or arguments.notify else ["mapped", "ordinary"]),
        ops=arguments.op,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        uvloop=arguments.uvloop,
        nixl=arguments.nixl_progress_thread if arguments.peer == "nixl" else [],
        over=arguments.over or "host",
        place=stack.enter_context(_place.veth(arguments.mtu)) if arguments.link == "veth" else _place.LOOPBACK,
        certificates=_certificates(stack) if arguments.tls else None,
        checksum=arguments.checksum,
        iperf=iperf,
        ucx=_ucx.Ucx(
            transports=arguments.transports or _ucx.DEFAULT_TRANSPORTS,
            progress=arguments.ucx_progress or ["loop"],
            workers=arguments.ucx_workers or 1,
        ),
        perftest=perftest,
        prepared=[lists == "prepared" for lists in arguments.lists],
    )


def _certificates(stack: contextlib.ExitStack) -> str:
    """Make a folder with those of both sides."""
    from ._pair import BenchError

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncxfer-bench-"))
    command = [sys.executable, "-m", "asyncxfer", "certs", folder, "initiator", "target"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise BenchError(f"asyncxfer certs: {ran.stderr.strip()}")
    return folder


async def _run(arguments: argparse.Namespace, options: Options) -> tuple[str, Sequence[Any], Callable[..., Any]]:
    from . import _compare, _idle, _loop, _notify, _post, _report

    if arguments.idle is not None:
        idles = await _idle.idle(options, _progress, seconds=arguments.idle, peers=arguments.peers)
        return "idle", idles, _report.idle_table
    if arguments.post:
        return "post", await _post.post(options, _progress), _report.post_table
    if arguments.stall is not None:
        stalls = await _loop.stall(options, _progress, seconds=arguments.stall)
        return "stall", stalls, _report.stall_table
    if arguments.in_flight is not None:
        floods = await _loop.flood(options, _progress, transfers=arguments.in_flight)
        return "in-flight", floods, _report.flood_table
    if arguments.notify:
        overs: list[Over] = [arguments.over] if arguments.over else ["host", "tcp"]
        return "notify", await _notify.notify(options, _progress, overs=overs), _report.notify_table
    lines = await _compare.compare(options, _progress)
    if options.over == "ucx":
        return "compare", lines, _report.ucx_table
    shown_apart = options.over == "tcp" or options.checksum or len(options.nixl) > 1
    return "compare", lines, _report.network_table if shown_apart else _report.line_table


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _senseless(arguments: argparse.Namespace) -> str:
    """What does not go together; or nothing."""
    over = arguments.over
    if over != "tcp" and arguments.link == "veth":
        return "--link veth is for --over tcp"
    if over not in ("tcp", *_OBJECTS) and arguments.tls:
        return "--tls is for --over tcp, --over s3 and --over azure"
    for option, where in _PLACES.items():
        if over not in where and getattr(arguments, option) is not None:
            return f"--{option} is for {' and '.join(f'--over {place}' for place in where)}"
    if over in _OBJECTS:
        return _senseless_over_objects(arguments)
    if over == "file":
        return _senseless_over_file(arguments)
    if arguments.over == "ucx" and arguments.checksum:
        return "--checksum is not for --over ucx, whose backend computes none"
    if arguments.over != "ucx":
        for option, given in _ucx_options(arguments).items():
            if given is not None:
                return f"{option} is for --over ucx"
    if "unprepared" in arguments.lists and (arguments.post or arguments.notify or arguments.in_flight):
        return "--lists unprepared is for the comparison and --stall"
    return ""


def _senseless_over_one(arguments: argparse.Namespace) -> str:
    """What goes with nothing that has one process a system."""
    for option in ("notify", "post", "idle", "in_flight", "checksum", *_UCX_OPTIONS):
        if getattr(arguments, option):
            return f"--{option.replace('_', '-')} is not for --over {arguments.over}"
    if "unprepared" in arguments.lists:
        return f"--lists unprepared is not for --over {arguments.over}"
    if any(shape.one for shape in arguments.shapes or []):
        return f"one row many times is not for --over {arguments.over}"
    return ""


def _senseless_over_objects(arguments: argparse.Namespace) -> str:
    if arguments.memory is not None:
        return f"--memory is not for --over {arguments.over}"
    if any(shape.contiguous for shape in arguments.shapes or []):
        return f"each row is an object over {arguments.over}, so that none are contiguous"
    if arguments.endpoint is None and arguments.bucket is not None:
        return "--bucket is for --endpoint"
    if arguments.endpoint is not None and not arguments.endpoint.startswith(("http://", "https://")):
        return f"--endpoint is a URL such as http://127.0.0.1:8333, not {arguments.endpoint!r}"
    if arguments.endpoint is not None and arguments.tls:
        return "--tls is for a server that keeps nothing; an --endpoint speaks what its URL says"
    return _senseless_over_one(arguments)


def _senseless_over_file(arguments: argparse.Namespace) -> str:
    senseless = _senseless_over_one(arguments)
    if senseless:
        return senseless
    if len(arguments.memory or []) > 1:
        return "one kind of --memory at a time over a file"
    if "direct" in (arguments.way or ["direct"]):
        for shape in arguments.shapes or []:
            if shape.length % _BLOCK:
                return (
                    f"direct transfers take rows of whole blocks of {_BLOCK} bytes, not {shape}; or take --way cached"
                )
    return ""


def _ucx_options(arguments: argparse.Namespace) -> dict[str, object]:
    return {f"--{option.replace('_', '-')}": getattr(arguments, option) for option in _UCX_OPTIONS}


def _missing(arguments: argparse.Namespace) -> str:
    """What is asked for and not installed, with the line that installs it; or nothing."""
    from . import _nixl

    if arguments.uvloop and importlib.util.find_spec("uvloop") is None:
        return "--uvloop needs uvloop, which is not installed; pip install uvloop"
    if arguments.peer == "nixl" and _nixl.installed_version() is None:
        return f"--peer nixl needs NIXL, which is not installed; {_nixl.INSTALL}"
    if arguments.over in _OBJECTS:
        return _missing_over_objects(arguments.over)
    if arguments.over == "ucx" and not _ucx.is_installed():
        return f"--over ucx needs ucxx, which is not installed; {_ucx.INSTALL}"
    return ""


def _missing_over_objects(cloud: str) -> str:
    library = {"s3": "aiobotocore", "azure": "azure-storage-blob"}[cloud]
    try:
        found = importlib.util.find_spec({"s3": "aiobotocore", "azure": "azure.storage.blob"}[cloud])
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"--over {cloud} needs {library}, which is not installed; pip install 'asyncxfer[{cloud}]'"
    return ""


def _versions(arguments: argparse.Namespace) -> dict[str, str | None]:
    import asyncxfer

    from . import _nixl

    nixl = _nixl.installed_version() if arguments.peer == "nixl" else None
    ucx = _ucx.installed_versions() if arguments.over == "ucx" else {}
    return {"asyncxfer": asyncxfer.__version__, "nixl": nixl, **ucx}


def _verified(result: dict[str, Any]) -> bool:
    systems = [result["ours"], *result["rivals"].values()] if "ours" in result else [result]
    return all(system.get("verified", True) for system in systems)  # an idle one has moved nothing


def _list_of(read: Callable[[str], _Item]) -> Callable[[str], list[_Item]]:
    def read_all(text: str) -> list[_Item]:
        try:
            return [read(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_all


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return read


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return number
