"""``asyncxfer bench``: its options, and which run they ask for.

Options are added to a parser that is given, so that the command line costs nothing but argparse
until a benchmark is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from ._shapes import DEFAULT_SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["add_arguments", "main"]

_Item = TypeVar("_Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``asyncxfer bench`` to `parser`."""
    add = parser.add_argument
    add("--peer", choices=["none", "nixl"], default="none", help="what to run beside, interleaved")
    shapes = _list_of(Shape.parse)
    add("--shapes", type=shapes, metavar="NxSIZE,...", help="rows and their size: 16384x4KiB,...")
    memories = _list_of(_one_of("mapped", "ordinary"))
    add("--memory", type=memories, default=["mapped", "ordinary"], metavar="mapped,ordinary")
    add("--op", type=_list_of(_one_of("put", "get")), default=["put", "get"], metavar="put,get")
    add("--rounds", type=_at_least_one, default=20, help="timed rounds a case (default 20)")
    add("--warmup", type=_at_least_one, default=3, help="rounds before those (default 3)")
    add("--seed", type=int, default=0, help="of the remote order and of the bytes")
    add("--uvloop", action="store_true", help="run ours on uvloop")
    add("--json", action="store_true", help="print JSON instead of a table")
    thread = "NIXL's progress thread; its own default, on, spins on a core a process"
    add("--nixl-progress-thread", choices=["on", "off"], default="on", help=thread)
    modes = parser.add_mutually_exclusive_group()
    late = "instead: how late the loop is in SECONDS without and with transfers back to back"
    modes.add_argument("--stall", type=float, metavar="SECONDS", help=late)
    many = "instead: this many small transfers at once, and the memory they keep"
    modes.add_argument("--in-flight", type=_at_least_one, metavar="TRANSFERS", help=many)


def main(arguments: argparse.Namespace) -> int:
    """Run what `arguments` ask for and print it; 0 if it ran and every byte was right."""
    missing = _missing(arguments)
    if missing:
        print(f"asyncxfer bench: {missing}", file=sys.stderr)
        return 2
    from ._pair import BenchError

    try:
        mode, results, table = asyncio.run(_run(arguments))
    except BenchError as error:
        print(f"asyncxfer bench: {error}", file=sys.stderr)
        return 1
    from . import _report

    plain = [_report.to_plain(result) for result in results]
    if arguments.json:
        head = {"mode": mode, "seed": arguments.seed, "machine": _report.machine()}
        head |= {"versions": _versions(arguments), "uvloop": arguments.uvloop}
        head |= {"rounds": arguments.rounds, "nixl_progress_thread": arguments.nixl_progress_thread}
        print(json.dumps(head | {"results": plain}, indent=2))
    else:
        _report.show(table(results))
    return 0 if all(_verified(result) for result in plain) else 1


async def _run(arguments: argparse.Namespace) -> tuple[str, Sequence[Any], Callable[..., Any]]:
    from . import _compare, _loop, _report

    shapes: Sequence[Shape] = DEFAULT_SHAPES
    if arguments.stall is not None:
        shapes = DEFAULT_SHAPES[:1]
    elif arguments.in_flight is not None:
        shapes = _loop.FLOOD_SHAPES
    options = _compare.Options(
        shapes=arguments.shapes or shapes,
        memories=arguments.memory,
        ops=arguments.op,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        uvloop=arguments.uvloop,
        nixl=arguments.peer == "nixl",
        nixl_progress_thread=arguments.nixl_progress_thread == "on",
    )
    if arguments.stall is not None:
        stalls = await _loop.stall(options, _progress, seconds=arguments.stall)
        return "stall", stalls, _report.stall_table
    if arguments.in_flight is not None:
        floods = await _loop.flood(options, _progress, transfers=arguments.in_flight)
        return "in-flight", floods, _report.flood_table
    return "compare", await _compare.compare(options, _progress), _report.line_table


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _missing(arguments: argparse.Namespace) -> str:
    """What is asked for and not installed, with the line that installs it; or nothing."""
    from . import _nixl

    if arguments.uvloop and importlib.util.find_spec("uvloop") is None:
        return "--uvloop needs uvloop, which is not installed; pip install uvloop"
    if arguments.peer == "nixl" and _nixl.installed_version() is None:
        return f"--peer nixl needs NIXL, which is not installed; {_nixl.INSTALL}"
    return ""


def _versions(arguments: argparse.Namespace) -> dict[str, str | None]:
    import asyncxfer

    from . import _nixl

    nixl = _nixl.installed_version() if arguments.peer == "nixl" else None
    return {"asyncxfer": asyncxfer.__version__, "nixl": nixl}


def _verified(result: dict[str, Any]) -> bool:
    systems = [result["ours"], result["nixl"]] if "ours" in result else [result]
    return all(system["verified"] for system in systems if system is not None)


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
