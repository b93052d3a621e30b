"""Layers behind the last one, which predict further tokens and are not part of the causal model."""

from __future__ import annotations

from collections.abc import Callable

from llmcompress.models.families.facts import Facts


def further_layers(key: str) -> Callable[[Facts], tuple[str, ...]]:
    """Patterns of tensors of such layers (layer 61 of DeepSeek-V3), for a family's ``ignored``.

    Args:
        key: Says in the config how many there are; null counts as none.
    """

    def patterns(facts: Facts) -> tuple[str, ...]:
        first, count = facts.size("num_hidden_layers"), 0 if facts.get(key) is None else facts.size(key, at_least=0)
        return tuple(rf"model\.layers\.{index}\." for index in range(first, first + count))

    return patterns
