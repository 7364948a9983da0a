"""The program that runs in each process of a pair: one JSON line in, one JSON line out.

It reads commands from its standard input, has its side do them, and answers on what was its
standard output when it began; between commands it sleeps in the loop's own wait. What the systems
themselves print goes to standard error. It ends when its input does, so it cannot outlive the bench.
`run` does that for any side, also of other benchmarks.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._file_side import FileSide
    from ._object_side import ObjectSide
    from ._side import Message, Side

__all__ = ["MAX_LINE", "Answers", "run"]

#: Longest command or answer, in bytes.
MAX_LINE = 1 << 20

_PR_SET_PDEATHSIG = 1


class Answers(Protocol):
    """Whatever does commands."""

    async def answer(self, message: Message) -> Message:
        """Do one command and give its answer."""

    async def close(self) -> None:
        """Leave nothing behind."""


def _side(options: Message) -> Side | FileSide | ObjectSide:
    """The side that this process is; imported here so that neither system sees the other's."""
    if options["over"] == "file":
        return _file_side(options)
    if options["over"] in ("s3", "azure"):
        return _object_side(options)
    if options["system"] == "nixl":
        from ._nixl import NixlSide

        return NixlSide(options["role"], thread=options["nixl_thread"])
    if options["system"] == "stream":
        from ._stream import StreamSide

        return StreamSide(options)
    if options["system"] == "crowd":
        from ._crowd import CrowdSide

        return CrowdSide(options)
    from ._ours import OurSide

    return OurSide(options)


def _file_side(options: Message) -> FileSide:
    if options["system"] == "nixl":
        from ._file_nixl import NixlFileSide

        return NixlFileSide(options["queue"])
    if options["system"] == "kvikio":
        from ._file_kvikio import KvikioFileSide

        return KvikioFileSide()
    from ._file_ours import OurFileSide

    return OurFileSide(options["backend"], options["memory"])


def _object_side(options: Message) -> ObjectSide:
    if options["system"] == "nixl":
        from ._object_nixl import NixlObjectSide

        return NixlObjectSide()
    if options["system"] == "obstore":
        from ._object_obstore import ObstoreSide

        return ObstoreSide()
    if options["system"] == "aiobotocore":
        from ._object_aiobotocore import AiobotocoreSide

        return AiobotocoreSide()
    if options["system"] == "azure-storage-blob":
        from ._object_azure_sdk import AzureSdkSide

        return AzureSdkSide()
    from ._object_ours import OurObjectSide

    return OurObjectSide()


async def _serve(options: Message, make: Callable[[Message], Answers], answers: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=MAX_LINE)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    side = make(options)
    try:
        while line := await commands.readline():
            try:
                answer = await side.answer(json.loads(line))
            except Exception as error:  # noqa: BLE001 - whatever it was, the bench has to hear of it
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        await side.close()
        transport.close()


def run(make: Callable[[Message], Answers]) -> Message:
    """Serve as the side that is made of the first argument, a JSON object, which is given back at the end."""
    # A bench that is killed while this process is stopped could never let it go on.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    options: Message = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loop_factory: Any = None
    if options["uvloop"]:
        loop_factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(options, make, answers))
    return options


def main() -> None:
    """Serve as one side of a pair."""
    options = run(_side)
    if options["system"] == "nixl":
        # Its destructors are known to crash an interpreter that is on its way out.
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
