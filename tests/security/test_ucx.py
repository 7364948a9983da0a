"""What liars get from an agent that is reached over UCX: nothing is written, nothing is stored, and it goes on.

A liar is a raw client of UCX in another process: it has an endpoint to a worker of the agent, as anyone has who reaches
UCX's transport, and sends active messages that no agent would. Some know the key of a session. Who may simply put is
none of this: UCX's tcp asks nobody, which is why it stays on `lo` (see docs/rdma.md).
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from over_ucx import BACKENDS, config, needs_ucx
from stage import within

from asyncxfer import Agent, BackendError, Peer, Region, TransferError
from asyncxfer.abc import MemoryKind, Segment
from asyncxfer.backends.ucx import _unpack

pytestmark = [needs_ucx, pytest.mark.blocking("the test waits for a process of its own")]

HELLO, NOTE, PUT, GET, RELEASE = 1, 3, 5, 6, 8
NBYTES = 1 << 16
Message = tuple[int, int, bytes, bytes]

LIAR = """
    import ctypes, json, sys, time
    import ucxx._lib.libucxx as ucxx

    given = json.load(sys.stdin)
    ucp = ctypes.CDLL("libucp.so.0")
    ucp.ucp_am_send_nbx.restype = ctypes.c_void_p
    ucp.ucp_am_send_nbx.argtypes = [
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    context = ucxx.UCXContext({"TLS": "tcp", "NET_DEVICES": "lo", "RNDV_THRESH": "inf"},
                              (ucxx.Feature.RMA, ucxx.Feature.AM, ucxx.Feature.WAKEUP))
    worker = ucxx.UCXWorker(context, False, False)
    address = ucxx.UCXAddress.create_from_buffer(bytes.fromhex(given["address"]))
    endpoint = worker.create_endpoint_from_worker_address(address, True)
    param = (ctypes.c_uint64 * 32)()
    kept = []
    for id, reply, head, data in given["messages"]:
        ctypes.memset(param, 0, ctypes.sizeof(param))
        # A mask with flags; flags: eager, the head copied, and an endpoint to answer to.
        ctypes.cast(param, ctypes.POINTER(ctypes.c_uint32))[0] = 1 << 4
        ctypes.cast(param, ctypes.POINTER(ctypes.c_uint32))[1] = 2 | 8 | reply
        head, data = bytes.fromhex(head), bytes.fromhex(data)
        kept.append((head, data))
        sent = ucp.ucp_am_send_nbx(endpoint.handle, id, head, len(head), data, len(data), ctypes.addressof(param))
        assert sent is None or sent < 2**64 - 100, sent
        worker.progress()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        worker.progress()
    print("sent", len(kept))
"""


class Victim:
    """Agents "a" and "b" of this process; b has a region of ones, and a is a proper initiator."""

    def __init__(self, a: Agent, b: Agent, peer: Peer, region: Region, memory: Any) -> None:
        self.a, self.b, self.peer, self.region, self.memory = a, b, peer, region, memory

    @property
    def key(self) -> bytes:
        """Of the session of a at b."""
        (endpoint,) = (e for e in backend_of(self.a)._readers.values())
        return bytes(endpoint.__self__._info.key)

    async def lie(self, messages: list[Message]) -> None:
        """Have another process send these: the id, whether an answer is wanted, head and data."""
        address = _unpack(backend_of(self.b).address(), most=16, longest=1 << 14)[0][0]
        given = {
            "address": address.hex(),
            "messages": [(number, reply, head.hex(), data.hex()) for number, reply, head, data in messages],
        }
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", textwrap.dedent(LIAR)], input=json.dumps(given), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert f"sent {len(messages)}" in ran.stdout.splitlines()  # among UCX's warnings

    async def prove(self) -> None:
        """Nothing was written or stored, and what a is entitled to still works."""
        assert (self.memory == 1).all(), "written to by a liar"
        async with within():
            mine = np.full(NBYTES, 5, np.uint8)
            async with self.a.register(mine) as region:
                await self.a.put(region.bytes[:], self.peer["kv"].bytes[:], notify=b"proper")
                note = await anext(aiter(self.b.notifications()))
                assert note.tag == b"proper", "a liar's notification was stored"
        assert (self.memory == 5).all()


def backend_of(agent: Agent) -> Any:
    return agent._live.backends["ucx"]  # type: ignore[union-attr]


def head(
    key: bytes, kind: int, *, seq: int = 1, slot: int = 0, epoch: int = 1, count: int = 0, what: int = 0, lane: int = 0,
    version: int = 1,
) -> bytes:  # fmt: skip
    numbers = b"".join(number.to_bytes(4, "little") for number in (slot, epoch, count))
    return key + seq.to_bytes(8, "little") + numbers + bytes((kind, what, lane, version))


def row(offset: int, nbytes: int, segment: int = 0) -> bytes:
    return offset.to_bytes(8, "little") + nbytes.to_bytes(4, "little") + segment.to_bytes(4, "little")


def put(key: bytes, slot: int, epoch: int, rows: list[bytes], data: bytes, **more: Any) -> Message:
    more = {"count": len(rows)} | more
    return 16, 1, head(key, PUT, slot=slot, epoch=epoch, **more), b"".join(rows) + data


@pytest.fixture
async def victim() -> Any:
    async with (
        Agent("a", backends=BACKENDS, config=config("tcp")) as a,
        Agent("b", backends=BACKENDS, config=config("tcp")) as b,
    ):
        memory = np.ones(NBYTES, np.uint8)
        region = await b.register(memory, name="kv")
        made = Victim(a, b, await a.connect("b"), region, memory)
        await made.peer.region("kv", timeout=5)
        yield made
        vars(made).clear()


async def test_without_the_key_of_a_session(victim: Victim) -> None:
    slot, epoch, draw = victim.region.slot, victim.region.epoch, random.Random(1)
    keys = [bytes(16), draw.randbytes(16), bytes((victim.key[0] ^ 1,)) + victim.key[1:]]
    ones = bytes([9]) * 64
    messages = [put(key, slot, epoch, [row(0, 64)], ones) for key in keys]
    messages += [(16, 1, head(key, NOTE, what=ord("N")), b"a lie") for key in keys]
    messages += [
        (16, 1, head(key, kind, seq=seq), b"") for key in keys for kind in range(16) for seq in (0, 1, 1 << 63)
    ]
    await victim.lie(messages)
    await victim.prove()


async def test_with_the_key_and_lies(victim: Victim) -> None:
    """Who knows the key is an initiator, and gets no further than one."""
    key, slot, epoch = victim.key, victim.region.slot, victim.region.epoch
    nine = bytes([9]) * 64
    beyond = [
        row(NBYTES, 64), row(NBYTES - 63, 64), row(1 << 63, 64), row((1 << 64) - 32, 64), row(0, 64, 1),
        row(0, 64, 0xFFFFFFFF), row(0, 0xFFFFFFFF), row((1 << 64) - 1, 1),
    ]  # fmt: skip
    messages = [put(key, slot, epoch, [bad], nine) for bad in beyond]
    messages += [put(key, slot, epoch, [row(0, 64), bad], nine * 2) for bad in beyond]  # not even the good one
    messages += [put(key, slot, epoch + d, [row(0, 64)], nine) for d in (-1, 1, 1000)]
    messages += [put(key, number, epoch, [row(0, 64)], nine) for number in (slot + 1, 4095, 4096, 1 << 31, 0xFFFFFFFF)]
    messages += [put(key, slot, epoch, [row(0, 64)], nine, count=n) for n in (0, 2, 1024, 1025, 0xFFFFFFFF)]
    messages += [put(key, slot, epoch, [row(0, 64)], nine[:n]) for n in (0, 1, 63)]  # too few bytes
    messages += [put(key, slot, epoch, [row(0, 64)], nine * 2)]  # and too many
    messages += [put(key, slot, epoch, [row(0, 64)], nine, version=v) for v in (0, 2, 255)]
    messages += [put(key, slot, epoch, [row(0, 64)], nine, lane=lane) for lane in (16, 255)]
    get = head(key, GET, slot=slot, epoch=epoch, count=1)
    messages += [(16, 1, get, bad) for bad in beyond] + [(16, 0, get, row(0, 64)), (16, 1, get, b"short")]
    messages += [(16, 1, get[:-n], row(0, 64)) for n in (1, 8, 39)] + [
        (16, 1, get + b"\0", row(0, 64)),
        (16, 1, b"", b""),
    ]
    await victim.lie(messages)
    await victim.prove()


@pytest.mark.parametrize(("access", "op"), [("r", "put"), ("w", "get")])
async def test_an_initiator_that_ignores_what_it_may_do(victim: Victim, access: Any, op: str) -> None:
    """The target looks for itself what was granted, whatever the initiator believes."""
    theirs, mine = np.full(NBYTES, 3, np.uint8), np.full(NBYTES, 9, np.uint8)
    async with victim.b.register(theirs, name="guarded", access=access), victim.a.register(mine) as region:
        remote = await victim.peer.region("guarded", timeout=5)
        remote.access = "rw"
        move = victim.a.put if op == "put" else victim.a.get
        async with within():
            with pytest.raises(TransferError, match="refused by the peer"):
                await move(region.bytes[:], remote.bytes[:], backend="ucx")
    assert (theirs == 3).all()
    assert (mine == 9).all()
    await victim.prove()


async def test_lies_in_notifications(victim: Victim) -> None:
    """Notes out of order, far ahead, too long; words about regions that are not the sender's; UCXX's own messages."""
    key = victim.key
    # Lane 7 is none of the proper initiator's, so that its own notes keep their numbers.
    messages = [
        (16, 1, head(key, NOTE, seq=seq, what=ord("N"), lane=7), b"a lie")
        for seq in (0, 2, 3, 1 << 32, (1 << 64) - 1)
    ]  # fmt: skip
    messages += [(16, 1, head(key, NOTE, seq=1, what=ord("N"), lane=7), bytes(32769))]
    messages += [(16, 1, head(key, RELEASE, seq=seq), b"") for seq in (0, 1, 2, 1 << 63)]
    messages += [(0, 1, bytes(n), bytes(100)) for n in (0, 8, 32)] * 20
    messages += [(number, 1, bytes(40), b"nobody's") for number in (1, 15, 17, 1000)]
    await victim.lie(messages)
    await victim.prove()


# ---- what comes over the control connection -----------------------------------------------------------------------


def test_parts_that_make_no_sense_raise() -> None:
    draw = random.Random(7)

    good = (2).to_bytes(2, "big") + (3).to_bytes(4, "big") + b"abc" + (0).to_bytes(4, "big") + b"rest"
    assert _unpack(good, most=2, longest=3) == ([b"abc", b""], b"rest")
    for _ in range(20000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.getrandbits(8)
        del data[draw.randint(0, len(data)) :]
        try:
            parts, rest = _unpack(bytes(data), most=2, longest=3)
        except (ValueError, struct.error):
            continue
        assert len(parts) <= 2
        assert all(len(part) <= 3 for part in parts)
        assert sum(map(len, parts)) + len(rest) + 2 + 4 * len(parts) == len(data)


async def test_exports_that_make_no_sense_are_refused(victim: Victim) -> None:
    """Whatever a peer gives as the keys of a region: a reason, and never a crash of UCX."""
    (endpoint,) = (reader.__self__ for reader in backend_of(victim.a)._readers.values())
    export = victim.region.exports["ucx"]
    draw = random.Random(3)
    segments = (Segment(0, NBYTES),)
    for cut in [0, 1, 2, 5, 6, 7, len(export) // 2, len(export) - 1]:
        with pytest.raises(BackendError):
            endpoint.attach(MemoryKind.DRAM, segments, [None], export[:cut])
    for _ in range(300):
        data = bytearray(export)
        data[draw.randrange(2)] = draw.getrandbits(8)
        data[draw.randrange(2, 6)] = draw.getrandbits(8)
        with pytest.raises(BackendError):
            endpoint.attach(MemoryKind.DRAM, segments, [None], bytes(data))
    await victim.prove()


async def test_addresses_that_make_no_sense_are_refused(victim: Victim) -> None:
    (endpoint,) = (reader.__self__ for reader in backend_of(victim.a)._readers.values())
    for address in (b"", b"\0\0", b"\0", b"\xff\xff", b"\0\1\xff\xff\xff\xff", b"\0\1\0\0\0\5abcd"):
        with pytest.raises(BackendError):
            await backend_of(victim.a).connect(replace(endpoint._info, address=address))
    await victim.prove()
