"""A model's ``config.json`` read into layers, by the rules of the family that its ``model_type`` names.

Which family is read by whom stands here; the rules themselves are in ``_attention`` and ``_states``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import _attention, _states
from ._attention import Notes
from ._errors import KvbenchError
from ._fields import Fields
from ._layers import DTYPES, Layer

__all__ = ["Model", "read"]


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model matters to its cache.

    Attributes
    ----------
    name : str
    source : str
        Where its configuration comes from.
    layers : tuple of Layer
    dtype : str or None
        Of the weights, where it is said.
    state_dtype : str or None
        Of what state spaces carry on, where it is said.
    notes : tuple of str
        How entries were understood that leave room for it.
    """

    name: str
    source: str
    layers: tuple[Layer, ...]
    dtype: str | None
    state_dtype: str | None
    notes: tuple[str, ...]


Reader = Callable[[Fields, str, Notes], list[Layer]]

_OF_ATTENTION: dict[str, Reader] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"), _attention.latent),
    "gemma3n_text": _attention.gemma3n,
}
_OF_STATES: dict[str, Reader] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), _states.mamba),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _states.qwen3_next),
    "mamba2": _states.mamba2,
    "jamba": _states.jamba,
    "bamba": _states.bamba,
    "granitemoehybrid": _states.granite,
    "falcon_h1": _states.falcon_h1,
    "nemotron_h": _states.nemotron_h,
    "lfm2": _states.lfm2,
}


def read(entries: Mapping[str, Any], *, name: str, source: str) -> Model:
    """Read the entries of a ``config.json``.

    Parameters
    ----------
    entries : mapping of str to object
    name : str
    source : str
        Where they come from, for messages.

    Raises
    ------
    KvbenchError
        Something is missing, or not understood.
    """
    inner = entries.get("text_config")
    notes: Notes = []
    if isinstance(inner, Mapping):
        notes.append("text_config: of a model with several parts, that of its text counts")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else entries
    family = text.get("model_type") or entries.get("model_type")
    if not isinstance(family, str):
        raise KvbenchError(f"{source} has no model_type; is it the config.json of a model?")
    fields = Fields(text, source)
    if family in _OF_STATES:
        layers = _OF_STATES[family](fields, family, notes)
    else:
        layers = _OF_ATTENTION.get(family, _attention.plain)(fields, family, notes)
        fields.check_that_all_is_read(family)
    dtypes = [part.get(key) for part in (text, entries) for key in ("dtype", "torch_dtype")]
    states = [text.get(key) for key in ("mamba_ssm_cache_dtype", "mamba_ssm_dtype")]
    return Model(name, source, tuple(layers), _known(dtypes), _known(states), tuple(notes))


def _known(dtypes: list[Any]) -> str | None:
    """The first that is said, if it is one that caches have."""
    said = next((dtype for dtype in dtypes if dtype is not None), None)
    return said if isinstance(said, str) and said in DTYPES else None
