"""The second process of a contract test: an agent that does what comes in over a pipe, one thing after the other.

Started by `PeerProcess` as ``python -m asyncxfer.testing._serve TOLD``, a JSON object of its parameters.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from asyncxfer import Agent, PreSharedKey
from asyncxfer.testing._target import AgentTarget
from asyncxfer.testing._wire import receive, send


async def serve(make: Callable[[], Agent], commands: IO[bytes], answers: IO[bytes]) -> None:
    """Do what comes in, until the pipe is closed."""
    while True:
        async with make() as agent:
            target = AgentTarget(agent)
            await asyncio.to_thread(send, answers, {}, target.metadata())
            while True:
                try:
                    head, body = await asyncio.to_thread(receive, commands)
                except EOFError:
                    return
                if head["call"] == "renew":
                    break
                reply, data = await _answer(target, head, body)
                await asyncio.to_thread(send, answers, reply, data)


async def _answer(target: AgentTarget, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    arguments: list[Any] = [*head["args"], body] if head["body"] == "last" else [*head["args"]]
    if head["body"] == "first":
        arguments.insert(0, body)
    try:
        result = await getattr(target, head["call"])(*arguments, **head["named"])
    except Exception as error:  # noqa: BLE001 - it is the test that finds out what went wrong
        return {"error": type(error).__name__, "text": str(error)}, b""
    return ({}, result) if isinstance(result, bytes) else ({"result": result}, b"")


def backend(spec: str) -> Any:
    """A backend by name, or the class that ``module:Class`` names."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name) if name else spec


async def main(told: dict[str, Any]) -> None:
    """Run the agent."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints goes where a person sees it
    specs: list[str] | None = told["backends"]
    options = {
        "backends": None if specs is None else [backend(spec) for spec in specs],
        "listen": told["listen"],
        "config": told["config"],
        "credentials": None if told["secret"] is None else PreSharedKey(told["secret"]),
    }
    await serve(lambda: Agent(told["name"], **options), os.fdopen(os.dup(0), "rb"), answers)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
