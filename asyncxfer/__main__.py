"""The command line, ``asyncxfer`` or ``python -m asyncxfer``: cp, ls, doctor, bench, kvbench and certs.

It knows the names of the subcommands and their options; what a subcommand needs is imported when
that one is run.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import _certs
from ._copy import _cli as _copy
from .bench import _cli
from .kvbench import _cli as _kvbench

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments`, or the process's own, name; give its exit status."""
    parser = argparse.ArgumentParser(prog="asyncxfer", description="Bytes between places, as awaitables.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _copy.add_cp(commands.add_parser("cp", help="copy files and objects, from any URL to any URL"))
    _copy.add_ls(commands.add_parser("ls", help="list files and objects"))
    doctor = commands.add_parser("doctor", help="what loads on this machine, what does not, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench = commands.add_parser("bench", help="measure transfers between two processes")
    _cli.add_arguments(bench)
    _kvbench.add_arguments(commands.add_parser("kvbench", help="the KV cache of a model: its size, and moving it"))
    certs = commands.add_parser("certs", help="make certificates for agents, and an authority that signs them")
    _certs.add_arguments(certs)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return _cli.main(options)
    if options.command == "kvbench":
        return _kvbench.main(options)
    if options.command == "certs":
        return _certs.main(options)
    if options.command in ("cp", "ls"):
        return (_copy.run_cp if options.command == "cp" else _copy.run_ls)(options)
    from ._doctor import main as run_doctor

    return run_doctor(options)


if __name__ == "__main__":
    sys.exit(main())
