"""Entries of a ``config.json``, checked as they are read, and which of them have been read.

What has been read is known so that a reader can be held to account for the rest: an entry that shapes a cache and that
nobody has looked at means that the model is another than the reader thinks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ._errors import KvbenchError

__all__ = ["Fields"]

_MOST_LAYERS = 10_000

#: Names of entries that can change what a layer keeps. Those that begin with a kind of MLP do not.
_SHAPES_CACHES = re.compile(
    r"kv_lora_rank|_head_dim|head_dim_|head_size|d_kv|kv_channels|kv_n_heads|n_kv_heads|query_groups|global_head"
    r"|num_global|swa_|ssm|mamba|rwkv|wkv"
    r"|conv|state_size|linear|lightning|recurrent|hybrid|block_type|(?<!mlp_)layers?_types?$|attn_type|attn_layer"
    r"|full_attn|chunk|window|kv_shared|cla_|use_cla|share_|index_|indexer|compress|per_layer_config|cross_attention"
    r"|is_encoder_decoder|multi_query|num_kv_heads|n_head_kv|sparse_att|yoco|memory"
)


class Fields:
    """The entries of one model, by name.

    Parameters
    ----------
    entries : mapping of str to object
    place : str
        Where they come from, for messages.
    """

    def __init__(self, entries: Mapping[str, Any], place: str) -> None:
        self._entries = entries
        self.place = place
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """An entry as it is, or None."""
        self._read.add(name)
        return self._entries.get(name)

    def has(self, name: str) -> bool:
        """Whether there is such an entry, be it null."""
        return name in self._entries

    def number(self, name: str, *, least: int = 1) -> int:
        """A whole number that has to be there.

        Raises
        ------
        KvbenchError
            It is missing, or it is something else.
        """
        value = self.get(name)
        if value is None:
            raise self.missing(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise KvbenchError(f"{name} is {value!r} in {self.place}; expected a whole number of at least {least}")
        return value

    def missing(self, name: str) -> KvbenchError:
        """What to raise where an entry is needed and not given."""
        return KvbenchError(
            f"{self.place} has no {name}; if the model takes a default of its class, write all entries out, as "
            "transformers does with AutoConfig.from_pretrained(...).to_json_file(path, use_diff=False)"
        )

    def layers(self) -> int:
        """How many layers there are.

        Raises
        ------
        KvbenchError
            It is missing, or no number of layers that a model has.
        """
        count = self.number("num_hidden_layers")
        if count > _MOST_LAYERS:
            raise KvbenchError(f"num_hidden_layers is {count:,} in {self.place}; expected at most {_MOST_LAYERS:,}")
        return count

    def number_or(self, name: str, otherwise: int, *, least: int = 1) -> int:
        """A whole number, or what it is where it is not given."""
        return otherwise if self.get(name) is None else self.number(name, least=least)

    def words(self, name: str, count: int) -> list[str] | None:
        """A list of one word for each layer, or None.

        Raises
        ------
        KvbenchError
            It is something else, or for another number of layers.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value) or len(value) != count:
            raise KvbenchError(f"{name} in {self.place} is not a list of {count} words, one for each layer")
        return value

    def check_that_all_is_read(self, kind: str) -> None:
        """Raise KvbenchError where an entry that can shape a cache has not been looked at."""
        left = [
            name
            for name, value in self._entries.items()
            if value and name not in self._read and _SHAPES_CACHES.search(name)
        ]
        if left:
            raise KvbenchError(
                f"{self.place} is a {kind!r} with {', '.join(sorted(left))}, which can change what a layer keeps "
                "and is not understood here: sizes would be a guess"
            )
