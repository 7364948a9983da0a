"""An ASGI server whose handler awaits `agent.get` from another process, while it serves others.

A second process holds the pages. A request for one is answered by reading it straight from that process's memory:
no message to it, no thread, and no other request waits meanwhile.

    python examples/async_server.py --port 8000
    curl -s http://127.0.0.1:8000/pages/17 | head -c 16

Needs `pip install asyncxfer[server]` (starlette, uvicorn).
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import socket
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import TypedDict

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncxfer import Agent, Region, RemoteRegion

PAGES, PAGE_BYTES = 1024, 64 * 1024
SLOTS = 32  # requests that can hold a page at once; the next ones wait their turn


class State(TypedDict):
    """What every handler finds in `request.state`."""

    agent: Agent
    pages: RemoteRegion  # (page, byte), in the other process
    slots: Region  # (slot, byte), where pages land here
    free: asyncio.Queue[int]


# ---- the process that holds the pages -----------------------------------------------------------------------------


async def hold_pages(pipe: Connection) -> None:
    """Make the pages readable until the server goes away."""
    async with Agent("pages") as agent, agent.allocate((PAGES, PAGE_BYTES), np.uint8, name="pages") as region:
        region.array[:] = np.arange(PAGES, dtype=np.uint16)[:, None] % 251  # a page holds its own number
        pipe.send_bytes(agent.metadata())
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv_bytes)


def pages_process(pipe: Connection) -> None:
    """Be the process that holds the pages."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(hold_pages(pipe))


@contextlib.asynccontextmanager
async def pages_running() -> AsyncIterator[bytes]:
    """Start that process, and end it afterwards; gives its agent's metadata."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=pages_process, args=(there,), name="pages", daemon=True)
    child.start()
    there.close()
    try:
        yield await asyncio.to_thread(here.recv_bytes)
    finally:
        here.close()
        await asyncio.to_thread(child.join, 10)


# ---- the server ---------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[State]:
    """One agent, one connection and one region of landing slots for as long as the server runs."""
    async with (
        pages_running() as metadata,
        Agent("server") as agent,
        agent.allocate((SLOTS, PAGE_BYTES), np.uint8, name="slots") as slots,
    ):
        peer = await agent.connect(metadata)
        free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(SLOTS):
            free.put_nowait(slot)
        yield State(agent=agent, pages=peer["pages"], slots=slots, free=free)


async def get_page(request: Request) -> Response:
    """Answer with one page, read from the other process."""
    page = request.path_params["page"]
    if page >= PAGES:
        raise HTTPException(404, f"there are {PAGES} pages, numbered from 0; {page} is none of them")
    state = request.state
    slot = await state.free.get()
    try:
        done = await state.agent.get(state.slots[slot], state.pages[page], timeout=5)
        content = state.slots.array[slot].tobytes()
    finally:
        state.free.put_nowait(slot)
    timing = f"{done.backend};dur={done.seconds * 1e3:.4f}"
    return Response(content, media_type="application/octet-stream", headers={"server-timing": timing})


async def get_health(request: Request) -> Response:
    """Answer at once, whatever else is under way."""
    return JSONResponse({"free_slots": request.state.free.qsize()})


app = Starlette(routes=[Route("/pages/{page:int}", get_page), Route("/health", get_health)], lifespan=lifespan)


def main() -> None:
    """Serve on loopback until interrupted."""
    parser = argparse.ArgumentParser(description="Serve pages that another process holds.")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", options.port)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(server.serve(sockets=[listening]))


if __name__ == "__main__":
    main()
