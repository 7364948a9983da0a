"""Public docstrings are numpydoc, complete and well-formed: numpydoc's own validation over every public name."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import validate

import asyncxfer
import asyncxfer.abc
import asyncxfer.store

SETTINGS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["numpydoc_validation"]
LEFT_OUT = frozenset(SETTINGS["checks"]) - {"all"}
MODULES = ("asyncxfer", "asyncxfer.abc", "asyncxfer.store")
# What the agent's own parts call on one another: no underscore, and no part of the public API either.
INTERNAL = {
    "asyncxfer.Agent.on_joined",
    "asyncxfer.Agent.on_left",
    "asyncxfer.Agent.on_note",
    "asyncxfer.Peer.check_joined",
    "asyncxfer.Region.check_open",
    "asyncxfer.RemoteRegion.check_open",
    # What a tiered store calls on its tiers.
    "asyncxfer.store.DiskStore.delete_packed",
    "asyncxfer.store.DiskStore.get_packed",
    "asyncxfer.store.DiskStore.identity",
    "asyncxfer.store.DiskStore.in_thread",
    "asyncxfer.store.DiskStore.index",
    "asyncxfer.store.DiskStore.open",
    "asyncxfer.store.DiskStore.pin_packed",
    "asyncxfer.store.DiskStore.put_packed",
    "asyncxfer.store.ObjectStore.open",
    "asyncxfer.store.ObjectStore.receive",
    "asyncxfer.store.ObjectStore.send",
    "asyncxfer.store.TieredStore.open",
    "asyncxfer.store.TierCounters.add",
}


def public_names() -> Iterator[str]:
    """Yield the public classes and functions, and the public members that a class defines itself."""
    seen: set[object] = set()
    for module in MODULES:
        owner = sys.modules[module]
        for name in owner.__all__:
            value = getattr(owner, name)
            if value in seen or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(value)
            yield f"{module}.{name}"
            if inspect.isclass(value):
                yield from (f"{module}.{name}.{member}" for member in members(value))


def members(cls: type) -> Iterator[str]:
    """Yield the public methods and properties that a class defines itself; a compiled class counts as a whole."""
    for name, value in vars(cls).items():
        value = inspect.unwrap(value.__func__) if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield name


def validated(name: str) -> list[tuple[str, str]]:
    """Give numpydoc's findings, less those that the house does not mind."""
    found = validate(name)
    assert found["docstring"], "there is no docstring"
    value = resolve(name)
    named = [p for p in signature_of(value) if p not in ("self", "cls")]
    # A dataclass lists Attributes, and one or two parameters are told in the summary.
    text = inspect.getdoc(value) or ""
    brief = inspect.isclass(value) or (len(named) <= 2 and "Parameters\n" not in text)
    # "As in `put`" sends the reader to where the parameters are told.
    tolerated = {"PR01", "PR04"} if re.search(r"\b[Aa]s in `", text) else {"PR01"} if brief else set()
    return [(code, message) for code, message in found["errors"] if code not in LEFT_OUT | tolerated]


def resolve(name: str) -> Any:
    module = next(module for module in reversed(MODULES) if name.startswith(module + "."))
    return operator.attrgetter(name.removeprefix(module + "."))(sys.modules[module])


def signature_of(value: object) -> list[str]:
    return list(inspect.signature(value).parameters) if inspect.isroutine(value) else []


def raised_here(function: object) -> set[str]:
    """Name the exceptions of ours that a function raises itself, as far as its source shows."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    names = (exc.func.id for exc in raised if isinstance(exc, ast.Call) and isinstance(exc.func, ast.Name))
    return {name for name in names if name in (*asyncxfer.__all__, *asyncxfer.store.__all__)}


@pytest.mark.parametrize("name", sorted(set(public_names()) - INTERNAL))
def test_the_docstring_is_complete(name: str) -> None:
    assert [f"{code}: {text}" for code, text in validated(name)] == []


@pytest.mark.parametrize("name", sorted(set(public_names()) - INTERNAL))
def test_what_is_raised_is_documented(name: str) -> None:
    value = resolve(name)
    function = value.fget if isinstance(value, property) else value
    if inspect.isroutine(function):
        documented = {entry.type for entry in NumpyDocString(inspect.getdoc(value) or "")["Raises"]}
        assert raised_here(function) - {part for text in documented for part in re.split(r"\W+", text)} == set()
