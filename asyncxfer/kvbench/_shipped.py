"""Where the configuration of a model comes from: a file, or one of those that come with the package.

Those hold the entries that matter to a cache, as their repository on Hugging Face has them, and its name.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ._config import Model, read
from ._errors import KvbenchError

__all__ = ["load", "names"]

_MOST_BYTES = 4 << 20


def names() -> list[str]:
    """The models that come with the package."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir() if path.name.endswith(".json"))


def load(model: str) -> Model:
    """Read the model of this name, or of this repository, or of the ``config.json`` at this path, or in this folder.

    Raises
    ------
    KvbenchError
        There is none, or it cannot be understood.
    """
    for name in names():
        entries = json.loads(_folder().joinpath(f"{name}.json").read_text())
        repository = entries["_source"]["repository"]
        if model.lower() in (name, repository.lower()):
            return read(entries, name=name, source=f"config.json of {repository}")
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise KvbenchError(f"{model!r} is neither a file nor a model that comes with the package: {', '.join(names())}")
    return read(_entries(path), name=path.parent.name if path.name == "config.json" else path.stem, source=str(path))


def _entries(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise KvbenchError(f"{path} has more than {_MOST_BYTES:,} bytes; is it a config.json?")
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KvbenchError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise KvbenchError(f"{path} does not hold a JSON object")
    return entries


def _folder() -> Any:
    return resources.files(__package__) / "models"
