"""The options of ``asyncxfer cp`` and ``asyncxfer ls``, and their exit statuses.

Options are added to a parser that is given; the rest is imported when one of the two is run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from ._options import collect, hide, read_option, read_size

if TYPE_CHECKING:
    from ._report import Report

__all__ = ["add_cp", "add_ls", "run_cp", "run_ls"]

_FAILED, _USAGE, _INTERRUPTED, _ENDED, _NO_READER = 1, 2, 130, 143, 141
_LEAST_MEMORY = 16 << 20


def add_cp(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``asyncxfer cp`` to `parser`."""
    add = parser.add_argument
    place = "a path, or a URL: file://, s3://BUCKET/KEY, az://CONTAINER/KEY, gs://BUCKET/KEY"
    add("source", metavar="SRC", help=place)
    add("target", metavar="DST", help="where to; with a slash at its end, or where it is a directory, into it")
    add("-r", "--recursive", action="store_true", help="all that is in SRC, a directory or prefix, goes into DST")
    add("-j", "--jobs", type=_at_least_one, default=8, metavar="N", help="files and objects at once (default 8)")
    add("--resume", action="store_true", help="do not copy what is there and the same; go on with what was cut off")
    exists = "what becomes of what is at DST already (default replace)"
    add("--if-exists", choices=["replace", "keep", "error"], default="replace", help=exists)
    add("-n", "--dry-run", action="store_true", help="say what would be copied, and write nothing")
    _add_globs(parser, "copy")
    add("--memory", type=_memory, default=256 << 20, metavar="SIZE", help="most that is on its way (default 256MiB)")
    _add_options(parser, "for the clients of both stores")
    for side, where in (("src", "SRC"), ("dst", "DST")):
        told = f"the same for the store of {where} only"
        add(f"--{side}-option", action="append", default=[], type=read_option, metavar="NAME=VALUE", help=told)
    add("-q", "--quiet", action="store_true", help="print failures only")
    add("--json", action="store_true", help="print an object of JSON a line")


def add_ls(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``asyncxfer ls`` to `parser`."""
    add = parser.add_argument
    add("place", metavar="URL", help="a path, or a URL of an object, a prefix or a bucket")
    add("-r", "--recursive", action="store_true", help="all that is below, not one level with directories")
    add("-l", "--long", action="store_true", help="with etag and checksum, as far as the store lists them")
    add("-H", "--human", action="store_true", help="sizes in KiB, MiB, GiB")
    _add_globs(parser, "list")
    _add_options(parser, "for the client of the store")
    add("--json", action="store_true", help="print an object of JSON a line")


def _add_globs(parser: argparse.ArgumentParser, verb: str) -> None:
    add = partial(parser.add_argument, action="append", default=[], metavar="GLOB")
    add("--include", help=f"{verb} only what matches one of these; with a slash in it all of a name below SRC")
    add("--exclude", help=f"do not {verb} what matches one of these")


def _add_options(parser: argparse.ArgumentParser, what: str) -> None:
    told = f"{what}: endpoint_url=..., profile_name=..., as agent.open takes them in options="
    parser.add_argument(
        "-o", "--option", action="append", default=[], type=read_option, metavar="NAME=VALUE", help=told
    )


def run_cp(arguments: argparse.Namespace) -> int:
    """Copy what `arguments` say; the exit status."""
    from . import _report

    ours, theirs = (collect(arguments.option, more) for more in (arguments.src_option, arguments.dst_option))
    clean = partial(hide, options={**ours, **{f"{name}_dst": value for name, value in theirs.items()}})
    form = {"as_json": arguments.json, "quiet": arguments.quiet, "dry_run": arguments.dry_run}
    with _report.choose(**form, hide=clean) as report:
        return _run("cp", _cp(arguments, ours, theirs, report), clean)


async def _cp(arguments: argparse.Namespace, ours: Any, theirs: Any, report: Report) -> int:
    from ._copier import Rules
    from ._cp import Asked, copy
    from ._names import Wanted
    from ._place import UsageError, parse

    source, target = parse(arguments.source), parse(arguments.target)
    if (arguments.src_option and source.local) or (arguments.dst_option and target.local):
        raise UsageError("options are for stores, and this is a file")
    asked = Asked(
        source, target, ours, theirs,
        recursive=arguments.recursive,
        wanted=Wanted(arguments.include, arguments.exclude),
        rules=Rules(arguments.if_exists, arguments.resume, arguments.dry_run),
        at_once=arguments.jobs,
        memory=arguments.memory,
    )  # fmt: skip
    totals = await copy(asked, report)
    report.total(totals)
    return _FAILED if totals.ended["failed"] else 0


def run_ls(arguments: argparse.Namespace) -> int:
    """List what `arguments` say; the exit status."""
    options = collect(arguments.option)
    return _run("ls", _ls(arguments, options), partial(hide, options=options))


async def _ls(arguments: argparse.Namespace, options: Any) -> int:
    from . import _ls
    from ._names import Wanted, shown
    from ._place import parse

    form = _ls.Form(arguments.long, arguments.human, arguments.json)
    wanted = Wanted(arguments.include, arguments.exclude)
    status = 0
    async for line in _ls.lines(parse(arguments.place), options, wanted, recursive=arguments.recursive):
        if line.why:
            print(f"asyncxfer ls: {shown(line.name)}: {line.why}", file=sys.stderr)
            status = _FAILED
        else:
            print(_ls.told(line, form))
    sys.stdout.flush()
    return status


def _run(command: str, work: Coroutine[Any, Any, int], clean: Any) -> int:
    """Run it to its end, or until it is interrupted; then all that is on its way ends first."""
    from asyncxfer import ConfigError, XferError

    from ._place import UsageError

    ended = False

    async def until_told() -> int:
        nonlocal ended
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            nonlocal ended
            ended = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        return await work

    try:
        return asyncio.run(until_told())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"asyncxfer {command}: interrupted", file=sys.stderr)
        return _ENDED if ended else _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is to be said at exit
        return _NO_READER
    except (UsageError, ConfigError) as error:
        print(f"asyncxfer {command}: {clean(str(error))}", file=sys.stderr)
        return _USAGE
    except XferError as error:
        print(f"asyncxfer {command}: {clean(str(error))}", file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"asyncxfer {command}: {clean(error.strerror or str(error))}{where}", file=sys.stderr)
    return _FAILED


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return number


def _memory(text: str) -> int:
    nbytes = read_size(text)
    if nbytes < _LEAST_MEMORY:
        raise argparse.ArgumentTypeError(f"{text!r} is less than {_LEAST_MEMORY >> 20} MiB")
    return nbytes
