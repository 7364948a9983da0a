"""Configuration: one frozen object, checked when it is made.

Owns every tunable of the package, its default and its range, and is the only module that reads
``os.environ`` (variables ``ASYNCXFER_<KEY>``, below whatever the caller gives explicitly). A key that does
not exist raises, in a mapping and in the environment alike, because a misspelt key that is ignored is a
setting that silently does nothing. It does not know what any part of the package does with a value.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, get_args, get_origin, get_type_hints

from ._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Config"]

_PREFIX = "ASYNCXFER_"
_BUILD_PREFIX = "ASYNCXFER_BUILD_"  # read by setup.py, never here
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_KIB, _MIB, _GIB, _TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class _Range(NamedTuple):
    """The closed range that a number has to lie in, and what it counts."""

    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        return f"from {self.low:,} to {self.high:,} {self.unit}"

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int | float) and math.isfinite(number) and self.low <= number <= self.high


class _Words(NamedTuple):
    """The words of which a text has to be one."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return " or ".join(map(repr, self.words))

    def __contains__(self, text: object) -> bool:
        return text in self.words


class _Length(NamedTuple):
    """How long a text may be; it is one printable line, and not empty."""

    characters: int

    def __str__(self) -> str:
        return f"of 1 to {self.characters:,} printable characters"

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and bool(text.strip()) and len(text) <= self.characters and text.isprintable()


_Limits: TypeAlias = _Range | _Words | _Length
_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class _Key(NamedTuple):
    """What a field's annotation says about it: its type, whether it may be None, and its limits."""

    type: type
    optional: bool
    limits: _Limits | None

    @property
    def expected(self) -> str:
        """The accepted values in words, for error messages."""
        if self.limits is None:
            text = _NOUNS[self.type]
        elif isinstance(self.limits, _Words):
            text = str(self.limits)
        else:
            text = f"{_NOUNS[self.type]} {self.limits}"
        return f"{text}, or None to let asyncxfer choose" if self.optional else text

    def check(self, value: object) -> Any:
        """Return `value` in this key's own type, or raise ValueError or TypeError."""
        if value is None and self.optional:
            return None
        value = self._typed(value)
        if self.limits is not None and value not in self.limits:
            raise ValueError
        return value

    def _typed(self, value: object) -> Any:
        if self.type in (bool, str):
            if not isinstance(value, self.type):
                raise TypeError
            return value
        if isinstance(value, bool) or not isinstance(value, Real):  # True is 1 to Python, and a mistake here
            raise TypeError
        return operator.index(value) if self.type is int else float(value)  # type: ignore[arg-type]

    def parse(self, text: str) -> Any:
        """Return what the environment variable's `text` stands for, or raise ValueError."""
        given = text.strip()
        text = given.lower()
        if self.optional and text in ("none", "auto"):
            return None
        if self.type is bool:
            if text not in _WORDS:
                raise ValueError
            return _WORDS[text]
        if self.type is str:
            return text if isinstance(self.limits, _Words) else given
        return int(text, 0) if self.type is int else float(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of an agent; immutable, and valid once it exists.

    Parameters
    ----------
    copy_threads : int or None, threads
        Threads of the copy engine. None chooses from the cores this process may run on, and the kernel.
    inline_bytes : int, bytes
        A transfer of at most this many bytes may be copied by the calling thread itself.
    inline_rows : int, rows
        A transfer of at most this many rows may be copied by the calling thread itself.
    chunk_bytes : int, bytes
        Size of the pieces that copy threads share out among themselves.
    chunk_rows : int, rows
        Rows at most in one such piece, and in one system call.
    nontemporal_bytes : int or None, bytes
        Rows from this size on are written past the cache. None chooses from the cache's size.
    network_threads : int or None, threads
        Threads that move data over TCP. None chooses from the cores this process may run on.
    tcp_streams : int or None, connections
        Data connections to each peer. None: as many as there are threads, and two at least.
    connect_timeout : float, seconds
        Longest that `Agent.connect` takes when the call gives no timeout.
    handshake_timeout : float, seconds
        Longest that a peer may take to answer once it accepted the connection.
    close_timeout : float, seconds
        Longest that a peer's goodbye is waited for when an agent closes.
    suspect_after : float, seconds
        How long a peer may be silent before its state is "suspect".
    lost_after : float, seconds
        How long a peer on a network may stay unheard, once its connection broke, before its state is "lost". Where the
        connection was ended, not timed out, and the peer is to dial, `suspect_after` is enough if that is shorter.
    unix_socket : bool
        Be reached, and reach agents of this host, over a Unix socket. Without it they talk over TCP.
    open_listener : bool
        Listen beyond this host without credentials: anyone who can connect is let in.
    encrypt_data : bool
        With credentials, encrypt the connections that carry data also; control is always encrypted then.
    notification_bytes : int, bytes
        Largest tag that a notification may carry.
    backlog_bytes : int, bytes
        Notifications kept for a receiver that does not read them.
    prefault : bool
        Touch every page of a region when it is registered, so that no transfer pays for it.
    ucx_transports : str or None
        Transports that UCX may use, as ``UCX_TLS`` names them: ``"rc,cuda"``, ``"tcp,cma,posix"``. None: all but tcp,
        and the backend only where one of them reaches another host or GPU.
    ucx_devices : str or None
        Network devices that UCX may use, as ``UCX_NET_DEVICES`` names them: ``"mlx5_0:1"``. None: all, but only ``lo``
        where tcp is among the transports.
    ucx_library : str or None
        Folder, or path of its libucp, of another build of UCX than the one that comes with ucxx.
    ucx_workers : int, workers
        UCX workers of an agent; each has its own connection to each peer.
    ucx_progress : {"loop", "thread"}
        Who drives UCX: the agent's event loop, or a thread beside it.
    ucx_keepalive : float, seconds
        How often UCX asks whether a peer still lives.
    object_timeout : float, seconds
        Longest that a request to an object store takes when no call gives a timeout: all attempts together.
    object_attempt_timeout : float, seconds
        An attempt that has not moved a byte for so long is given up; all of it may take that long besides the time that
        its bytes take at `object_floor_rate`.
    object_floor_rate : int, bytes per second
        How fast the bytes of an attempt have to move.
    object_attempts : int, attempts
        How often a request to an object store is made at most.
    object_concurrency : int, requests
        Requests under way in one bucket at most; fewer while the store says that it is asked too much.
    object_multipart_bytes : int, bytes
        What is longer goes to and from an object store in parts, several at a time.
    object_part_bytes : int, bytes
        Size of these parts.
    object_staging_bytes : int, bytes
        Pinned host memory, of each backend for objects, by way of which GPU memory goes to and from them. It is taken
        with the first such transfer.
    object_hedge : float or None, seconds
        A second request for a small object when the first has not answered by then. None: never.

    Raises
    ------
    ConfigError
        A value has the wrong type or lies outside its range.
    """

    copy_threads: Annotated[int | None, _Range(1, 256, "threads")] = None
    inline_bytes: Annotated[int, _Range(0, 64 * _MIB, "bytes")] = 32 * _KIB
    inline_rows: Annotated[int, _Range(0, _MIB, "rows")] = 32
    chunk_bytes: Annotated[int, _Range(4 * _KIB, _GIB, "bytes")] = _MIB
    chunk_rows: Annotated[int, _Range(1, _MIB, "rows")] = 1024
    nontemporal_bytes: Annotated[int | None, _Range(0, _TIB, "bytes")] = None
    network_threads: Annotated[int | None, _Range(1, 64, "threads")] = None
    tcp_streams: Annotated[int | None, _Range(1, 16, "connections")] = None
    connect_timeout: Annotated[float, _Range(0.001, 3600.0, "seconds")] = 10.0
    handshake_timeout: Annotated[float, _Range(0.001, 3600.0, "seconds")] = 1.5
    close_timeout: Annotated[float, _Range(0.0, 3600.0, "seconds")] = 1.0
    suspect_after: Annotated[float, _Range(0.1, 3600.0, "seconds")] = 3.0
    lost_after: Annotated[float, _Range(0.1, 3600.0, "seconds")] = 10.0
    unix_socket: bool = True
    open_listener: bool = False
    encrypt_data: bool = True
    notification_bytes: Annotated[int, _Range(1, 32 * _KIB, "bytes")] = 32 * _KIB
    backlog_bytes: Annotated[int, _Range(64 * _KIB, _TIB, "bytes")] = 64 * _MIB
    prefault: bool = False
    ucx_transports: Annotated[str | None, _Length(1024)] = None
    ucx_devices: Annotated[str | None, _Length(1024)] = None
    ucx_library: Annotated[str | None, _Length(4096)] = None
    ucx_workers: Annotated[int, _Range(1, 16, "workers")] = 1
    ucx_progress: Literal["loop", "thread"] = "loop"
    ucx_keepalive: Annotated[float, _Range(0.1, 3600.0, "seconds")] = 1.0
    object_timeout: Annotated[float, _Range(0.001, 86400.0, "seconds")] = 60.0
    object_attempt_timeout: Annotated[float, _Range(0.001, 3600.0, "seconds")] = 10.0
    object_floor_rate: Annotated[int, _Range(_KIB, _TIB, "bytes per second")] = _MIB
    object_attempts: Annotated[int, _Range(1, 100, "attempts")] = 5
    object_concurrency: Annotated[int, _Range(1, 4096, "requests")] = 64
    object_multipart_bytes: Annotated[int, _Range(5 * _MIB, 5 * _GIB, "bytes")] = 32 * _MIB
    object_part_bytes: Annotated[int, _Range(5 * _MIB, 5 * _GIB, "bytes")] = 8 * _MIB
    object_staging_bytes: Annotated[int, _Range(10 * _MIB, _TIB, "bytes")] = 64 * _MIB
    object_hedge: Annotated[float | None, _Range(0.0, 3600.0, "seconds")] = None

    def __post_init__(self) -> None:
        for name, key in _KEYS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, key.check(value))
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(f"configuration key {name!r} is {value!r}; expected {key.expected}") from None

    @classmethod
    def load(cls, source: Config | Mapping[str, object] | None = None) -> Config:
        """Return the configuration that `source` and the environment make together.

        Parameters
        ----------
        source : Config, mapping or None
            A Config is complete and returned as it is. A mapping's keys win over the variables
            ``ASYNCXFER_<KEY>``, and these over the defaults. An empty variable counts as not set.

        Returns
        -------
        Config

        Raises
        ------
        ConfigError
            An unknown key, or a value that is malformed or outside its range.
        """
        if isinstance(source, Config):
            return source
        given: dict[str, Any] = {} if source is None else dict(source)
        _refuse_unknown(given, _KEYS, what="configuration key")
        return cls(**{**_from_environment(os.environ), **given})


def _read_keys(cls: type[Config]) -> dict[str, _Key]:
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, _Key] = {}
    for field in fields(cls):
        hint, limits = hints[field.name], None
        if get_origin(hint) is Annotated:
            hint, limits = get_args(hint)
        elif get_origin(hint) is Literal:
            hint, limits = str, _Words(get_args(hint))
        options = get_args(hint) or (hint,)
        keys[field.name] = _Key(options[0], type(None) in options, limits)
    return keys


_KEYS = _read_keys(Config)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    set_here = {
        name: text
        for name, text in environ.items()
        if name.startswith(_PREFIX) and not name.startswith(_BUILD_PREFIX) and text.strip()
    }
    _refuse_unknown(set_here, [_PREFIX + name.upper() for name in _KEYS], what="environment variable")
    values: dict[str, Any] = {}
    for variable, text in set_here.items():
        name = variable.removeprefix(_PREFIX).lower()
        try:
            values[name] = _KEYS[name].parse(text)
        except ValueError:
            expected = _KEYS[name].expected
            raise ConfigError(f"environment variable {variable} is {text!r}; expected {expected}") from None
    return values


def _refuse_unknown(given: Iterable[object], known: Iterable[str], *, what: str) -> None:
    names = list(known)
    for key in given:
        if key in names:
            continue
        close = difflib.get_close_matches(str(key), names, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(names)}"
        raise ConfigError(f"there is no {what} {key!r}; {advice}")
