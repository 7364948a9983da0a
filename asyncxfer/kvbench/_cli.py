"""``asyncxfer kvbench``: its subcommands and their options, and which of them runs.

Options are added to a parser that is given; what a subcommand needs is imported when that one is run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import KvbenchError

if TYPE_CHECKING:
    from ._kvcache import Question
    from ._plan import Plan

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``asyncxfer kvbench`` to `parser`."""
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    kvcache = commands.add_parser("kvcache", help="how large the KV cache of a model is, to the byte")
    _add_model(kvcache)
    kvcache.add_argument("--explain", action="store_true", help="print how the sizes come about")
    kvcache.add_argument("--json", action="store_true", help="print JSON instead of a table")

    plan = commands.add_parser("plan", help="the commands of asyncxfer bench that move a prompt's cache")
    _add_model(plan)
    _add_tiers(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of commands")
    profile = commands.add_parser("profile", help="how long a prompt's cache takes to move, at each tier")
    _add_model(profile)
    _add_tiers(profile)
    profile.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_traffic(commands.add_parser("traffic", help="transfers between several ranks, alone and beside each other"))
    _add_trace(commands.add_parser("trace", help="a trace of requests, replayed against a store"))


def _add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    add = parser.add_argument
    add("--model", required=required, metavar="NAME|PATH", help="a model that comes with the package, or a config.json")
    add("--tp", type=_at_least_one, default=1, help="tensor-parallel ranks (default 1)")
    add("--pp", type=_at_least_one, default=1, help="pipeline stages (default 1)")
    add("--partition", type=_numbers, metavar="N,N,...", help="layers of each stage (default: as vLLM divides them)")
    add("--isl", type=_at_least_one, default=1024, metavar="TOKENS", help="of the prompt (default 1024)")
    add("--page-size", type=_at_least_one, default=16, metavar="TOKENS", help="of a block (default 16)")
    add("--kv-dtype", default="auto", metavar="DTYPE", help="of the cache (default auto: that of the weights)")
    states = "whose layout states of state spaces have (default vllm)"
    add("--states", choices=["vllm", "transformers"], default="vllm", help=states)
    whole = "layers with a sliding window keep all tokens, as in an engine with one allocator for all layers"
    add("--ignore-windows", action="store_true", help=whole)


def _add_tiers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tiers = "where it goes: another process of this host, over TCP, over UCX, a file, objects (default host,tcp,file)"
    add("--tiers", type=_words("host", "tcp", "ucx", "file", "s3"), default=["host", "tcp", "file"], help=tiers)
    layout = "a row is a page of one layer, or of all layers (default: by layer between memories, else by block)"
    add("--layout", choices=["layer", "block"], help=layout)
    add("--op", type=_words("put", "get"), default=["put", "get"], metavar="put,get")
    add("--rounds", type=_at_least_one, default=5, help="timed rounds of each (default 5)")
    add("--folder", metavar="PATH", help="where a file is made (default: the current folder)")
    add("--endpoint", metavar="URL", help="of the objects' store (default: a server that keeps nothing)")
    add("--bucket", metavar="NAME", help="with --endpoint")


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("description", metavar="FILE", help="steps and matrices, in YAML")
    add("--over", choices=["host", "tcp"], default="host", help="what transfers may use (default host: the fastest)")
    add("--rounds", type=_at_least_one, default=5, help="timed rounds of each (default 5)")
    add("--json", action="store_true", help="print JSON instead of a table")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", metavar="FILE", help="lines of JSON: timestamp (ms), input_length, output_length, hash_ids")
    _add_model(parser, required=False)
    add("--block-tokens", type=_at_least_one, default=512, metavar="N", help="of a hash_id (default 512)")
    add("--block-bytes", metavar="SIZE", help="instead of what a block of --model has on one rank")
    add("--store", metavar="PATH|URL", help="where blocks are kept (default: a folder that is removed afterwards)")
    add("--budget", metavar="SIZE", help="of the blocks there (default: none)")
    add("--objects", metavar="URL", help="makes it a store in tiers, with these below the folder")
    add("--memory", default="0", metavar="SIZE", help="of its tier in memory (default 0)")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="for the objects' client")
    add("--speed", type=float, default=1.0, metavar="X", help="times as fast as requests came (default 1)")
    add("--in-flight", type=_at_least_one, default=4, metavar="N", help="requests at once (default 4)")
    add("--buffer", default="256MiB", metavar="SIZE", help="for blocks on their way (default 256MiB)")
    add("--limit", type=_at_least_one, metavar="N", help="only the first N requests")
    add("--json", action="store_true", help="print JSON instead of text")


def main(options: argparse.Namespace) -> int:
    """Run the subcommand that `options` name; 0 if it ran and every byte was right."""
    try:
        return _COMMANDS[options.subcommand](options)
    except KvbenchError as error:
        print(f"asyncxfer kvbench: {error}", file=sys.stderr)
        return 2


def _question(options: argparse.Namespace) -> Question:
    from ._kvcache import Question
    from ._shipped import load
    from ._sizes import Asked, format_of

    model = load(options.model)
    form = format_of(model, kv_dtype=options.kv_dtype, states=options.states, ignore_windows=options.ignore_windows)
    return Question(model, form, Asked(options.tp, options.pp, options.isl, options.page_size, options.partition))


def _kvcache(options: argparse.Namespace) -> int:
    from . import _kvcache as kvcache

    question = _question(options)
    print(kvcache.to_json(question) if options.json else kvcache.to_text(question))
    if options.explain:
        print("\n" + kvcache.explain(question), file=sys.stderr if options.json else sys.stdout)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from . import _plan as plan

    made = _planned(options)
    print(plan.to_json(made) if options.json else plan.to_text(made))
    return 0


def _planned(options: argparse.Namespace) -> Plan:
    from . import _plan as plan

    chosen = plan.Options(
        options.tiers, options.layout, options.op, options.rounds, options.folder, options.endpoint, options.bucket
    )
    return plan.make(_question(options), chosen)


def _profile(options: argparse.Namespace) -> int:
    from . import _profile as profile

    made = _planned(options)
    moved = profile.run(made, _progress)
    print(profile.to_json(made, moved) if options.json else profile.to_text(made, moved))
    return 0 if all(one.verified for one in moved) else 1


def _traffic(options: argparse.Namespace) -> int:
    from . import _traffic as traffic
    from ._pattern import read

    described = read(Path(options.description))
    outcome = asyncio.run(traffic.run(described, over=options.over, rounds=options.rounds, progress=_progress))
    print(traffic.to_json(outcome) if options.json else traffic.to_text(outcome))
    return 1 if outcome.problems else 0


def _trace(options: argparse.Namespace) -> int:
    from . import _trace as trace
    from ._quantities import size
    from ._requests import read

    if options.speed <= 0:
        raise KvbenchError(f"--speed is {options.speed}; expected more than 0")
    block_bytes = size(options.block_bytes) if options.block_bytes is not None else _block_bytes(options)
    chosen = trace.Options(
        block_bytes,
        options.block_tokens,
        place=options.store,
        budget=None if options.budget is None else size(options.budget),
        objects=options.objects,
        memory=size(options.memory),
        client=_client(options.option),
        speed=options.speed,
        in_flight=options.in_flight,
        window=max(1, size(options.buffer) // options.in_flight // max(1, block_bytes)),
    )
    requests = read(Path(options.trace), block_tokens=options.block_tokens, most=options.limit)
    figures = asyncio.run(trace.run(requests, chosen, _progress))
    print(trace.to_json(figures) if options.json else trace.to_text(figures))
    return 1 if figures.wrong else 0


def _block_bytes(options: argparse.Namespace) -> int:
    """Of a block on one rank: the one that keeps most."""
    if options.model is None:
        raise KvbenchError("how large is a block? Give --model, or --block-bytes")
    options.page_size = options.block_tokens
    return _question(options).answer().rank.bytes_per_block


def _client(words: Sequence[str]) -> dict[str, object]:
    """Options as they are typed, ``NAME=VALUE``."""
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise KvbenchError(f"--option {name!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _progress(text: str) -> None:
    print(f"kvbench: {text}", file=sys.stderr, flush=True)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "kvcache": _kvcache,
    "plan": _plan,
    "profile": _profile,
    "traffic": _traffic,
    "trace": _trace,
}


def _words(*known: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return text.split(",")

    return read


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_at_least_one(part) for part in text.split(","))
