"""What earlier tokens leave in caches: how much of a prompt is there already, and how transformers' modules take it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# a prefix of fewer tokens costs as much to copy and to look after as to compute
LEAST_PREFIX = 16


def shared_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of a prompt that need not be computed.

    Args:
        held: Token ids that a cache holds, in order.
        prompt: Token ids. Its last one is always computed: the logits after it are wanted.

    Returns:
        How many of its first ones are held; 0 below :data:`LEAST_PREFIX`.
    """
    least, most = LEAST_PREFIX, min(len(held), len(prompt) - 1)
    if most < least or held[:least] != prompt[:least]:
        return 0
    # slices are compared in C: halving is many times as fast as a loop over tokens
    while least < most:
        half = (least + most + 1) // 2
        if held[least:half] == prompt[least:half]:
            least = half
        else:
            most = half - 1
    return least


def arguments(model: PreTrainedModel, cache: Any, positions: Tensor) -> dict[str, Any]:
    """Cache and positions under the names that a model's forward has for them.

    Args:
        model: Of transformers; those with states only know no positions. From 5.24 on a cache is called ``cache``;
            before, ``past_key_values``, or ``cache_params`` where there are states only.
        cache: A transformers cache.
        positions: int64 ``[B, L]``.
    """
    names = inspect.signature(model.forward).parameters
    word = next(word for word in ("cache", "past_key_values", "cache_params") if word in names)
    return {word: cache, **({"position_ids": positions} if "position_ids" in names else {})}
