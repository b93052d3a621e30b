"""Typed reading of ``config.json``: the file's value, or the default transformers would use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcompress.errors import InputError

_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
# what the expert kernels and our modules implement, by the names of transformers' ACT2FN
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
_UNCHANGED = "check that the model folder is complete and the file unchanged"
# more than any model has; of layers and experts, each of which gets names, a damaged file can ask for years of them
_MOST, _MOST_NAMED = 2**31 - 1, 10_000


class Facts:
    """One family's view of a config.

    Args:
        config: ``config.json`` as a dict.
        defaults: Values transformers uses where the file is silent.
        aliases: Other names a key may have in the file (``num_experts`` for ``num_local_experts``).
    """

    def __init__(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._defaults = defaults
        self._aliases = aliases or {}

    def having(self, **values: Any) -> Facts:
        """The same with other values, for layers that differ from the rest."""
        return Facts({**self._config, **values}, self._defaults, self._aliases)

    def get(self, key: str) -> Any:
        """Value of ``key``: from the file, under an alias, or the family's default."""
        if key in self._config:
            return self._config[key]
        alias = self._aliases.get(key)
        if alias is not None and alias in self._config:
            return self._config[alias]
        return self._defaults.get(key)

    def size(self, key: str, at_least: int = 1) -> int:
        """A whole number.

        Raises:
            InputError: The value is missing, not a whole number, below ``at_least``, or beyond any model.
        """
        value = self.get(key)
        most = _MOST_NAMED if key.endswith(("layers", "experts")) else _MOST
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise InputError(
                f"config.json: {key} must be a whole number of at least {at_least}, not {value!r}",
                _UNCHANGED,
            )
        if value > most:
            raise InputError(f"config.json: {key} is {value}, more than {most}", _UNCHANGED)
        return value

    def flag(self, key: str) -> bool:
        """A truth value; null counts as false, as in transformers."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"config.json: {key} must be true or false, not {value!r}")
        return bool(value)

    def optional_size(self, key: str) -> int | None:
        """A whole number or null."""
        return None if self.get(key) is None else self.size(key)

    def number(self, key: str) -> float:
        """A real number.

        Raises:
            InputError: The value is not a number.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def indices(self, key: str) -> frozenset[int]:
        """A list of layer indices; null is the empty list."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise InputError(f"config.json: {key} must be a list of layer indices, not {value!r}")
        return frozenset(value)

    def layer_size(self, key: str, index: int) -> int:
        """A whole number of one layer, where the file may give one for all or a list of them.

        Raises:
            InputError: It is neither, or the list is too short.
        """
        found = self.get(key)
        if not isinstance(found, list):
            return self.size(key)
        value = found[index] if index < len(found) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            alias = self._aliases.get(key)
            named = alias if key not in self._config and alias in self._config else key
            raise InputError(f"config.json: {named} has no number for layer {index}, but {value!r}")
        return value

    def layer_kinds(self, key: str) -> list[str]:
        """A list of layer types, older words replaced by those of transformers 5.

        Raises:
            InputError: It is not a list of words.
        """
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise InputError(f"config.json: {key} must be a list of layer types, not {value!r}")
        return [str(_OLD_KINDS.get(item, item)) for item in value]

    def layer_kind(self, key: str, index: int, known: tuple[str, ...], default: str) -> str:
        """Type of one layer, one of ``known``; ``default`` when the config lists none.

        Raises:
            InputError: The list is shorter than the model, or names another type for this layer.
        """
        if self.get(key) is None:
            return default
        kinds = self.layer_kinds(key)
        if index >= len(kinds):
            raise InputError(f"config.json: {key} lists {len(kinds)} layers, fewer than num_hidden_layers")
        kind = kinds[index]
        if kind not in known:
            raise InputError(f"config.json: {key}[{index}] {kind!r} is not known here", f"known: {', '.join(known)}")
        return kind

    def first_dense(self, index: int) -> bool:
        """Whether a layer is one of the first, which are dense, by ``first_k_dense_replace``."""
        return index < self.size("first_k_dense_replace", at_least=0)

    def dense(self, index: int, otherwise: bool) -> bool:
        """Whether a layer has a dense MLP and no experts, by ``mlp_layer_types``; ``otherwise`` without that list.

        Raises:
            InputError: See :meth:`layer_kind`.
        """
        default = "dense" if otherwise else "sparse"
        return self.layer_kind("mlp_layer_types", index, ("sparse", "dense"), default) == "dense"

    def activation(self, key: str = "hidden_act") -> str:
        """The gate's activation.

        Raises:
            InputError: It is not one that the expert kernels implement.
        """
        value = self.get(key)
        if value not in ACTIVATIONS:
            raise InputError(f"config.json: {key} {value!r} is not supported", f"supported: {', '.join(ACTIVATIONS)}")
        return str(value)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; null means as many as query heads."""
        return self.optional_size("num_key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head; null means hidden size over heads."""
        return self.optional_size("head_dim") or self.hidden // self.heads
