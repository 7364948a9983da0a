"""Requests to one store, made as often as is right: what is tried again, when, and what is said where it ends.

Owns the connections, turns, attempts and their deadlines, waits between them, a budget for repetitions, second requests
for small reads, and the remedies: other credentials, another clock, another region. What a store's requests look like
and what its answers mean is the `Dialect`'s; what one request is for, and what is right about its answer, the `Ask`'s.

The budget is of the store: each repetition costs, each success gives a little back, and one that came of repetitions
what they cost. Where most fails, few repetitions are left, and a store in need is not asked five times as much.
Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import enum
import random
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ..._errors import ChecksumError, ObjectError, TransferError, TransferTimeout
from ..._http import Answer, BrokenError, HttpError, LateError, Pool, Progress, UntrustedError
from ._pace import Pace

if TYPE_CHECKING:
    from ..._config import Config

__all__ = ["Act", "Ask", "Attempts", "Dialect", "Header", "Verdict", "spread"]

Header = tuple[bytes, bytes]

_TOKENS = 500.0
_COST = 5.0  # of a repetition
_GAIN = 1.0  # of a success
_SHORTEST, _LONGEST = 0.05, 5.0  # seconds; between them lies the bound of a wait, doubled each time
_HEDGED = 1 << 20  # bytes; how much a read has at most that is asked for twice


# ---- what an answer means -----------------------------------------------------------------------------------------


class Act(enum.Enum):
    """What is to be done about an attempt that did not succeed."""

    AGAIN = enum.auto()
    SLOWER = enum.auto()  # again, and less at a time
    RENEW = enum.auto()  # again, with other credentials
    CLOCK = enum.auto()  # again, by the store's clock
    MOVE = enum.auto()  # again, in another region
    END = enum.auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an attempt did not succeed, and what is to be done.

    Attributes
    ----------
    what, advice : str
        For the message: what happened, and what its reader can do.
    status, code, request_id
        As the store has answered; 0 and empty where it has not.
    after : float or None, seconds
        When the store wants to be asked again.
    region : str
        Where to `Act.MOVE`.
    skew : float, seconds
        By how much the store's clock is ahead, for `Act.CLOCK`.
    moved : bool
        The attempt has brought the matter forward; it does not count.
    kind : type of TransferError
        ObjectError or one of its kind, or ChecksumError.
    cause : Exception or None
    """

    act: Act
    what: str
    advice: str = ""
    status: int = 0
    code: str = ""
    request_id: str = ""
    after: float | None = None
    region: str = ""
    skew: float = 0.0
    moved: bool = False
    kind: type[ObjectError | ChecksumError] = ObjectError
    cause: Exception | None = None


_REMEDIES = frozenset({Act.RENEW, Act.CLOCK, Act.MOVE})


class Ask:
    """One request and the meaning of its answer; it may look different in each attempt.

    Attributes
    ----------
    op, key : str
        For messages: ``get``, ``put``; the object.
    method, path, query : bytes
        The path is that of the object in the bucket, with its slash, percent-encoded.
    headers : list of (bytes, bytes)
        To be signed.
    body : sequence of memoryview or bytes
    into : sequence of memoryview or None
        Where the body of a success goes; None: it is given as bytes.
    size : int, bytes
        How much moves, for the time that it may take.
    era : int
        The dialect's, when it was signed last.
    unsure : bool
        An attempt was made of which it is not known whether it was done.
    """

    __slots__ = ("body", "era", "headers", "into", "key", "method", "op", "path", "query", "size", "unsure")

    def __init__(
        self,
        op: str,
        key: str,
        method: bytes,
        path: bytes,
        query: bytes = b"",
        *,
        headers: list[Header] | None = None,
        body: Sequence[memoryview | bytes] = (),
        into: Sequence[memoryview] | None = None,
        size: int = 0,
    ) -> None:
        self.op = op
        self.key = key
        self.method = method
        self.path = path
        self.query = query
        self.headers: list[Header] = [] if headers is None else headers
        self.body = body
        self.into = into
        self.size = size
        self.era = 0
        self.unsure = False

    async def accept(self, answer: Answer) -> Verdict | None:
        """Take the answer to a success; None: it is all right."""
        return None

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """Look at what the dialect has made of another answer; None: it is success, for this."""
        return verdict

    def broke(self, error: HttpError) -> Verdict | None:
        """Look at an attempt without an answer; None: it is like any other."""
        return None


class Dialect(Protocol):
    """How one store is spoken to.

    Attributes
    ----------
    backend, url : str
        For errors: ``s3``, ``s3://bucket``.
    endpoint : str
        Where requests go now, as `Pool` takes it.
    tls : ssl.SSLContext or None
    era : int
        Grows with each change of credentials or region.
    skew : float, seconds
        By how much the store's clock is ahead of this one.
    """

    backend: str
    url: str
    endpoint: str
    tls: ssl.SSLContext | None
    era: int
    skew: float

    async def sign(self, ask: Ask, host: bytes, deadline: float) -> tuple[bytes, list[Header]]:
        """Give the target and all headers. Raises TimeoutError where the deadline passes, and ObjectError."""

    def judge(self, ask: Ask, answer: Answer) -> Verdict:
        """Say what an answer means that is no success."""

    async def renew(self, era: int) -> None:
        """Get other credentials than those of that era."""

    async def move(self, region: str, era: int) -> None:
        """Go to another region than that of that era."""


# ---- attempts -----------------------------------------------------------------------------------------------------


class Attempts:
    """Makes requests of one store. Made on the loop that uses it.

    Parameters
    ----------
    dialect : Dialect
    config : Config
        Its keys ``object_...``.

    Attributes
    ----------
    most : int
        How often a request is made at most.
    pace : Pace
    tokens : float
        What is left of the budget for repetitions.
    encrypted : bool
        Whether TLS protects what is moved.
    """

    def __init__(self, dialect: Dialect, config: Config) -> None:
        self._dialect = dialect
        self._loop = asyncio.get_running_loop()
        self.most = config.object_attempts
        self._patience = config.object_attempt_timeout
        self._rate = config.object_floor_rate
        self._hedge = config.object_hedge
        self._limit = config.object_concurrency
        self._pools: dict[str, Pool] = {}  # by the endpoint as the dialect writes it
        self._pool = self._pool_at(dialect.endpoint)
        self.pace = Pace(config.object_concurrency)
        self.tokens = _TOKENS

    @property
    def encrypted(self) -> bool:
        """Whether TLS protects what is moved."""
        return self._dialect.endpoint.startswith("https:")

    def describe(self, ask: Ask) -> str:
        """Name a request in messages."""
        return f"{ask.op} of {self._dialect.url}/{ask.key}"

    async def run(self, ask: Ask, deadline: float) -> None:
        """Make a request until it succeeds.

        Raises
        ------
        ObjectError, ChecksumError
            It did not, and is not to be made again.
        TransferTimeout
            The deadline passed, or would before it could be made again.
        """
        verdict = await self._attempt(ask, deadline)
        if verdict is None:
            self.tokens = min(_TOKENS, self.tokens + _GAIN)
        else:
            await self._persist(ask, verdict, deadline)

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()

    # -- again and again

    async def _persist(self, ask: Ask, verdict: Verdict, deadline: float) -> None:
        made, counted, spent = 1, 1, 0.0
        tried: set[Act] = set()
        found: Verdict | None = verdict
        while found is not None:
            verdict = found
            if verdict.act is Act.END or (verdict.act in tried and verdict.act in _REMEDIES):
                raise self.error(ask, verdict, made)
            if self._loop.time() >= deadline:
                raise self._late(ask, verdict, made)
            if verdict.act in _REMEDIES:
                tried.add(verdict.act)
                await self._remedy(ask, verdict, deadline, made)
            else:
                if counted >= self.most and not verdict.moved:
                    raise self.error(ask, verdict, made)
                if self.tokens < _COST:
                    what = f"{verdict.what}, and so much fails that it is not tried again"
                    raise self.error(ask, replace(verdict, what=what), made)
                self.tokens -= _COST
                spent += _COST
                await self._wait(ask, verdict, counted, deadline, made)
                counted += not verdict.moved
            made += 1
            found = await self._attempt(ask, deadline)
        self.tokens = min(_TOKENS, self.tokens + spent + _GAIN)

    async def _wait(self, ask: Ask, verdict: Verdict, counted: int, deadline: float, made: int) -> None:
        """Wait for a random time, and as long as the store wants."""
        bound = min(_LONGEST, _SHORTEST * 2 ** (counted - 1))
        seconds = random.random() * bound  # noqa: S311 - no secret
        if verdict.after is not None:
            seconds += verdict.after
        if self._loop.time() + seconds >= deadline:
            raise self._late(ask, verdict, made)
        await asyncio.sleep(seconds)

    async def _remedy(self, ask: Ask, verdict: Verdict, deadline: float, made: int) -> None:
        dialect = self._dialect
        if verdict.act is Act.CLOCK:
            dialect.skew = verdict.skew
            return
        try:
            async with asyncio.timeout_at(deadline):
                if verdict.act is Act.RENEW:
                    await dialect.renew(ask.era)
                else:
                    await dialect.move(verdict.region, ask.era)
        except TimeoutError:
            raise self._late(ask, verdict, made) from None
        self._pool = self._pool_at(dialect.endpoint)

    # -- once

    async def _attempt(self, ask: Ask, deadline: float) -> Verdict | None:
        pace = self.pace
        if not pace.take():
            try:
                await pace.wait(deadline)
            except TimeoutError:
                return Verdict(Act.AGAIN, f"its turn did not come, {pace.taken} requests were under way before it")
        epoch = pace.epoch
        try:
            answer = await self._request(ask, deadline)
        except HttpError as error:
            ask.unsure = ask.unsure or error.repeated or error.progress is not Progress.NOTHING
            return ask.broke(error) or _broken(error)
        except TimeoutError:
            return Verdict(Act.AGAIN, "there were no credentials in time")
        finally:
            pace.give()
        ask.unsure = ask.unsure or answer.repeated
        if 200 <= answer.status < 300:
            verdict = await ask.accept(answer)
            if verdict is None:
                pace.well()
                return None
            ask.unsure = True
        else:
            ask.unsure = ask.unsure or answer.status >= 500
            verdict = ask.refused(self._dialect.judge(ask, answer), answer)
        if verdict is not None and verdict.act is Act.SLOWER:
            pace.slower(epoch)
        return verdict

    async def _request(self, ask: Ask, deadline: float) -> Answer:
        pool = self._pool
        target, headers = await self._dialect.sign(ask, pool.host, deadline)
        until = min(deadline, self._loop.time() + self._patience + ask.size / self._rate)
        if self._hedge is not None and ask.into is not None and ask.size <= _HEDGED:
            return await self._twice(ask, target, headers, until)
        return await pool.request(
            ask.method, target, headers, body=ask.body, into=ask.into, deadline=until, patience=self._patience
        )

    async def _twice(self, ask: Ask, target: bytes, headers: list[Header], until: float) -> Answer:
        """Ask, and ask again, into other memory, where that takes long; both have ended before bytes are copied."""
        assert ask.into is not None
        first = self._ask(ask, target, headers, ask.into, until)
        tasks = {first}
        hedged = False
        scratch = memoryview(b"")
        try:
            await asyncio.wait(tasks, timeout=self._hedge)
            if not first.done() and self.tokens >= _COST and self.pace.take():
                hedged = True
                self.tokens -= _COST
                scratch = memoryview(bytearray(sum([view.nbytes for view in ask.into])))
                tasks.add(self._ask(ask, target, headers, (scratch,), until))
            answered = await _first_good(tasks, first)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if hedged:
                self.pace.give()
        answer = answered.result()
        if answered is not first and answer.received:
            spread(scratch, ask.into)
        return answer

    def _ask(
        self, ask: Ask, target: bytes, headers: list[Header], into: Sequence[memoryview], until: float
    ) -> asyncio.Task[Answer]:
        pool = self._pool
        return self._loop.create_task(
            pool.request(ask.method, target, headers, into=into, deadline=until, patience=self._patience)
        )

    def _pool_at(self, endpoint: str) -> Pool:
        pool = self._pools.get(endpoint)
        if pool is None:
            pool = Pool(endpoint, limit=self._limit, tls=self._dialect.tls, connect_timeout=self._patience)
            self._pools[endpoint] = pool
        return pool

    # -- what is said

    def error(self, ask: Ask, verdict: Verdict, made: int = 1) -> TransferError:
        """Give the error that a verdict makes after so many attempts."""
        message = self._message(ask, verdict, made)
        url, backend = f"{self._dialect.url}/{ask.key}", self._dialect.backend
        error: TransferError
        if issubclass(verdict.kind, ChecksumError):
            error = verdict.kind(message, backend=backend)
        else:
            error = verdict.kind(
                message,
                url=url,
                status=verdict.status,
                code=verdict.code,
                request_id=verdict.request_id,
                backend=backend,
            )
        error.__cause__ = verdict.cause
        return error

    def _late(self, ask: Ask, verdict: Verdict, made: int) -> TransferTimeout:
        message = self._message(
            ask, replace(verdict, what=f"not done in time; the last that it met: {verdict.what}"), made
        )
        error = TransferTimeout(message, backend=self._dialect.backend)
        error.__cause__ = verdict.cause
        return error

    def _message(self, ask: Ask, verdict: Verdict, made: int) -> str:
        facts = [str(verdict.status)] if verdict.status else []
        facts += [verdict.code] if verdict.code else []
        facts += [f"request id {verdict.request_id}"] if verdict.request_id else []
        facts += [f"{made} attempts"] if made > 1 else []
        told = f" ({', '.join(facts)})" if facts else ""
        advice = f"; {verdict.advice}" if verdict.advice else ""
        return f"{self.describe(ask)}: {verdict.what}{told}{advice}"


def _broken(error: HttpError) -> Verdict:
    """Say what is to be done where no answer came."""
    cause = error.with_traceback(None)
    if isinstance(error, UntrustedError):
        advice = "name the authority that has signed its certificate, or correct the endpoint"
        return Verdict(Act.END, str(error), advice, cause=cause)
    if isinstance(error, BrokenError | LateError):
        advice = "check the endpoint, and whether it can be reached from this host"
        return Verdict(Act.AGAIN, str(error), advice, cause=cause)
    return Verdict(Act.AGAIN, str(error), "check that an object store answers there", cause=cause)


async def _first_good(tasks: set[asyncio.Task[Answer]], first: asyncio.Task[Answer]) -> asyncio.Task[Answer]:
    """Give whoever has an answer that is no failure of the server, else the first: what it has received is in place."""
    left = set(tasks)
    while left:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.exception() is None and task.result().status < 500:
                return task
    return first


def spread(source: memoryview, into: Sequence[memoryview]) -> None:
    """Copy bytes to memory in pieces that has room for just them."""
    at = 0
    for view in into:
        view[:] = source[at : at + view.nbytes]
        at += view.nbytes
