"""Hand a paged KV cache from one host to another, over TCP, and check every block on both.

One script for both sides. On the host that decodes:

    python examples/two_hosts.py serve --listen tcp://10.0.0.2:7000 --secret-file secret

It prints what to type on the host that prefills: `send` and a ticket, which holds the agent's metadata and what the
cache looks like. The sender puts every layer with a notification, gets all of it back in one transfer, and checks it;
the server checks what has arrived, works out by itself what that must be, and ends when the sender has left.

Who may connect is said by a secret that both hosts have (`openssl rand -base64 32 > secret`), or by certificates
(`asyncxfer certs DIR decode-0 prefill-0`, then `--credentials DIR` on both). Both need `pip install asyncxfer[tls]`. On
loopback neither is needed. It exits with a status other than 0 if a single block is wrong.
"""

import argparse
import asyncio
import base64
import binascii
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kv_handoff import BLOCK_TOKENS, MODELS, Job, tag
from numpy.typing import NDArray

from asyncxfer import Agent, Certificates, PreSharedKey, XferError

SERVER, SENDER = "decode-0", "prefill-0"


@dataclass(frozen=True)
class Ticket:
    """What the sender has to know: the server's metadata, and the job that both work on."""

    metadata: bytes
    job: Job

    def __str__(self) -> str:
        plain = {"metadata": base64.b64encode(self.metadata).decode(), "job": asdict(self.job)}
        return base64.urlsafe_b64encode(json.dumps(plain).encode()).decode()

    @classmethod
    def read(cls, text: str) -> "Ticket":
        """Read a ticket, or the file that it is in."""
        try:
            if Path(text).is_file():
                text = Path(text).read_text()
        except OSError:
            pass  # a ticket is too long for the name of a file
        try:
            plain = json.loads(base64.urlsafe_b64decode(text))
            job = Job(tuple(plain["job"]["shape"]), plain["job"]["requests"], plain["job"]["seed"])
            return cls(base64.b64decode(plain["metadata"]), job)
        except (binascii.Error, KeyError, TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"this is no ticket, nor a file with one: {text[:40]!r}...") from error


def agent(name: str, options: argparse.Namespace, **more: Any) -> Agent:
    """An agent that shows what the options say, and asks the same of others."""
    credentials: Certificates | PreSharedKey | None = None
    if options.credentials:
        files = (options.credentials / file for file in (f"{name}.pem", f"{name}-key.pem", "ca.pem"))
        credentials = Certificates(*files)
    elif options.secret_file:
        credentials = PreSharedKey(options.secret_file.read_bytes().strip())
    if options.backend:
        more |= {"backends": [options.backend], "config": {"unix_socket": False}}
    return Agent(name, credentials=credentials, **more)


def differing(some: NDArray[np.float16], others: NDArray[np.float16]) -> int:
    """How many blocks are not the same, bit by bit: to numpy a NaN is not even equal to itself."""
    return int((some.view(np.uint16) != others.view(np.uint16)).any(axis=(1, 2, 3, 4)).sum())


# ---- the host that decodes ----------------------------------------------------------------------------------------


async def serve(options: argparse.Namespace) -> int:
    """Receive every layer of every request; give the number of blocks that are not what they must be."""
    layers, heads, dimension = MODELS[options.model]
    block_bytes = layers * 2 * BLOCK_TOKENS * heads * dimension * 2
    blocks = max(options.memory * 2**20 // block_bytes, options.requests + 1)
    job = Job((layers, blocks, 2, BLOCK_TOKENS, heads, dimension), options.requests, options.seed)
    async with (
        agent(SERVER, options, listen=options.listen) as here,
        here.allocate(job.shape, np.float16, name="kv") as kv,
    ):
        ticket = Ticket(here.metadata(), job)
        print(f"{options.model}: {layers} layers, {blocks} blocks of {BLOCK_TOKENS} tokens. On the other host:\n")
        print(f"    python examples/two_hosts.py send {shared(options)} {announce(ticket, options)}\n", flush=True)
        wrong = 0
        for request, mine in enumerate(job.block_tables("decode")):
            for layer in range(layers):
                await here.expect(tag(request, layer))
                expected = await asyncio.to_thread(job.compute, request, layer, len(mine))
                wrong += differing(kv.array[layer, mine], expected)
        total = layers * sum(map(len, job.block_tables("decode")))
        print(f"{total - wrong} of {total} blocks are what they must be", flush=True)
        await here.expect(b"bye")
        return wrong


def announce(ticket: Ticket, options: argparse.Namespace) -> str:
    """Put the ticket where the sender will find it."""
    if options.ticket is None:
        return str(ticket)
    options.ticket.write_text(str(ticket))
    return shlex.quote(str(options.ticket))


def shared(options: argparse.Namespace) -> str:
    """The options that both sides are given."""
    given = {"--credentials": options.credentials, "--secret-file": options.secret_file}
    words = [f"{option} {shlex.quote(str(path))}" for option, path in given.items() if path]
    return " ".join([*words, *(["--backend", options.backend] if options.backend else [])])


# ---- the host that prefills ---------------------------------------------------------------------------------------


async def send(options: argparse.Namespace) -> int:
    """Put every layer of every request, get all of it back, and give the number of blocks that are not the same."""
    job = options.ticket.job
    async with (
        agent(SENDER, options) as here,
        here.allocate(job.shape, np.float16, name="kv") as kv,
        here.allocate(job.shape, np.float16, name="back") as back,
    ):
        peer = await here.connect(options.ticket.metadata)
        mine, theirs = job.block_tables("prefill"), job.block_tables("decode")
        puts = []
        for request, (blocks, remote) in enumerate(zip(mine, theirs, strict=True)):
            for layer in range(job.shape[0]):
                kv.array[layer, blocks] = await asyncio.to_thread(job.compute, request, layer, len(blocks))
                # Posted here, awaited below: it travels while the next layer is computed.
                put = here.put(kv[layer, blocks], peer["kv"][layer, remote], notify=tag(request, layer))
                puts.append(put)
        start = time.perf_counter()
        done = await asyncio.gather(*puts)
        waited = time.perf_counter() - start
        print(f"layer by layer: {sum(d.nbytes for d in done) / 2**20:.0f} MiB by {done[0].backend}", end=", ")
        print(f"{waited * 1e3:.1f} ms of waiting behind the last one")

        blocks, remote = np.concatenate(mine), np.concatenate(theirs)
        whole = await here.get(back[:, blocks], peer["kv"][:, remote])
        print(
            f"all of it back: {whole.nbytes / 2**20:.0f} MiB in {whole.descriptors} rows by {whole.backend}", end=", "
        )
        print(f"{whole.nbytes / whole.seconds / 1e9:.2f} GB/s")
        wrong = sum(differing(back.array[layer, blocks], kv.array[layer, blocks]) for layer in range(job.shape[0]))
        total = job.shape[0] * len(blocks)
        print(f"{total - wrong} of {total} blocks have come back as they went")
        await peer.notify(b"bye")
        return wrong


def main() -> int:
    """Run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = parser.add_subparsers(dest="side", required=True)
    serving = sides.add_parser("serve", help="the host that decodes")
    where = "this host's address, as others reach it; behind a wildcard: tcp://0.0.0.0:7000?advertise=HOST"
    serving.add_argument("--listen", default="tcp://127.0.0.1:0", metavar="tcp://HOST:PORT", help=where)
    serving.add_argument("--ticket", type=Path, metavar="FILE", help="write it there instead of printing it")
    serving.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    serving.add_argument("--memory", type=int, default=256, metavar="MIB", help="size of the cache (default 256)")
    serving.add_argument("--requests", type=int, default=4)
    serving.add_argument("--seed", type=int, default=0)
    sending = sides.add_parser("send", help="the host that prefills")
    sending.add_argument("ticket", type=Ticket.read, help="what serve printed, or the file that it is in")
    for side in (serving, sending):
        proof = side.add_mutually_exclusive_group()
        proof.add_argument("--credentials", type=Path, metavar="DIR", help="made by `asyncxfer certs`")
        proof.add_argument("--secret-file", type=Path, metavar="FILE", help="16 random bytes or more")
        backend = side.add_mutually_exclusive_group()
        backend.add_argument("--backend", metavar="NAME", help="move the data with it alone: tcp, ucx")
        backend.add_argument(
            "--tcp", action="store_const", const="tcp", dest="backend", help="the same as --backend tcp"
        )
    options = parser.parse_args()
    try:
        return int(asyncio.run((serve if options.side == "serve" else send)(options)) != 0)
    except XferError as error:
        print(f"two_hosts: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
