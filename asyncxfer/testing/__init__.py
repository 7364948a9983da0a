"""What authors of backends test theirs with: the contract suite, and a peer in a second process.

``BackendContract`` is a class of pytest tests that an implementation subclasses and thereby passes or fails,
``FileContract`` one for backends that move to and from files, ``ObjectContract`` for objects of a store; they need
pytest and pytest-asyncio, which are looked for when it is asked for and not before. ``PeerProcess`` and ``AgentTarget``
need nothing but asyncxfer. Nothing here knows any backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._process import PeerProcess
from ._target import AgentTarget, Target

if TYPE_CHECKING:
    from ._contract import BackendContract
    from ._files import FileContract, FileTarget
    from ._objects import ObjectContract, ObjectTarget
    from ._stage import Selection, Sides, Stage

__all__ = [
    "AgentTarget", "BackendContract", "FileContract", "FileTarget", "ObjectContract", "ObjectTarget", "PeerProcess",
    "Selection", "Sides", "Stage", "Target",
]  # fmt: skip

_SUITE = ("_stage", "_moving", "_telling", "_ending", "_contract", "_files", "_objects")
_HOMES = {
    "BackendContract": "_contract", "FileContract": "_files", "FileTarget": "_files",
    "ObjectContract": "_objects", "ObjectTarget": "_objects",
    "Selection": "_stage", "Sides": "_stage", "Stage": "_stage",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import the suite when it is asked for.

    Raises
    ------
    ImportError
        pytest or pytest-asyncio is missing.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import pytest
        import pytest_asyncio  # noqa: F401 - what runs the tests, all of which are coroutines
    except ImportError as error:
        raise ImportError(
            f"asyncxfer.testing.{name} needs {error.name}, which is not installed; "
            "`python -m pip install pytest pytest-asyncio` installs it"
        ) from error
    pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _SUITE))
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
