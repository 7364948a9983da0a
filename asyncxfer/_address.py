"""Addresses of agents on a network: ``tcp://HOST:PORT``, and what ``?advertise=`` says of how others see them.

It takes text apart and puts it together. Sockets, names' addresses and who may listen where are not known here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from ._errors import ConfigError

__all__ = ["Address", "Listening", "is_loopback", "listening", "parse"]

_SCHEME = "tcp://"
_ADVERTISE = "advertise="
_FORM = "expected 'tcp://HOST:PORT', an IPv6 address in brackets, port 0 for any free one"


class Address(NamedTuple):
    """One end on a network.

    Attributes
    ----------
    host : str
        A name or an address, without brackets.
    port : int
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{_SCHEME}{host}:{self.port}"


class Listening(NamedTuple):
    """Where to listen, and how others see that place.

    Attributes
    ----------
    bind : Address
    host : str
        What others connect to; empty: the address that was bound.
    port : int
        Likewise; 0: the port that was bound.
    """

    bind: Address
    host: str = ""
    port: int = 0

    def seen(self, bound: Address) -> Address:
        """What to tell others, once `bind` has become this address."""
        return Address(self.host or bound.host, self.port or bound.port)


def parse(text: str) -> Address:
    """Take ``tcp://HOST:PORT`` apart.

    Raises
    ------
    ConfigError
        It is something else.
    """
    if not text.startswith(_SCHEME):
        raise ConfigError(f"address {text!r}: {_FORM}")
    return _host_and_port(text.removeprefix(_SCHEME), text)


def listening(given: str | Sequence[str] | None) -> tuple[Listening, ...]:
    """Take apart what an agent was told to listen on.

    Raises
    ------
    ConfigError
        An address is malformed, or a wildcard that does not say how others reach it.
    """
    texts = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    return tuple(_listening(text) for text in texts)


def _listening(text: object) -> Listening:
    if not isinstance(text, str):
        raise ConfigError(f"listen has {text!r}; {_FORM}")
    address, _, query = text.partition("?")
    bind = parse(address)
    if not query:
        if _is_wildcard(bind.host):
            raise ConfigError(
                f"listen address {text!r} takes connections on every interface and names none that others could "
                f"connect to; add ?advertise=HOST or ?advertise=HOST:PORT, such as '{address}?advertise=node-1'"
            )
        return Listening(bind)
    if not query.startswith(_ADVERTISE):
        raise ConfigError(f"listen address {text!r}: after '?' expected 'advertise=HOST' or 'advertise=HOST:PORT'")
    seen = query.removeprefix(_ADVERTISE)
    bare = seen.endswith("]") if seen.startswith("[") else ":" not in seen
    host, port = _host_and_port(f"{seen}:0" if bare else seen, text)
    if _is_wildcard(host):
        raise ConfigError(f"listen address {text!r} advertises a wildcard; expected a host that others can connect to")
    return Listening(bind, host, port)


def _host_and_port(text: str, whole: str) -> Address:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        good = ":" in host
    else:
        good = ":" not in host
    if not (good and colon and host and len(host) <= 255 and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"address {whole!r}: {_FORM}")
    if not host.isascii() or not host.isprintable() or any(c in host for c in " /?#@"):
        raise ConfigError(f"address {whole!r}: {host!r} is no host; {_FORM}")
    return Address(host, int(port))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether an address, not a name, is reached from its own host only."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
