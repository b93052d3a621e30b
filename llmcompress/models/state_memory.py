"""What serving a model with recurrent states takes, by batch size: weights, states, convolution states. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmcompress.models.layout import ModelLayout
from llmcompress.quant.states import StateSpec, state_bytes, window_bytes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class BatchMemory:
    """Bytes for one batch size; keys and values of attention layers, which grow with length, are left out.

    Attributes:
        batch: Sequences.
        weights: All weights as stored.
        states: States as the policy keeps them, replayed tokens included.
        convolution: Convolution states in the model's type.
        float_states: States in fp32, as transformers keeps them.
    """

    batch: int
    weights: int
    states: int
    convolution: int
    float_states: int

    @property
    def total(self) -> int:
        """Weights and everything that is kept per sequence."""
        return self.weights + self.states + self.convolution


def sequence_bytes(layout: ModelLayout, policy: Mapping[str, Any] | None, item: int) -> tuple[int, int, int]:
    """Bytes of one sequence: states under the policy, convolution states, states in fp32.

    Args:
        layout: The model.
        policy: ``quantization_config.policies.state_cache``, None for float states.
        item: Bytes of a value in the model's type.
    """
    spec = None if policy is None else StateSpec.of(policy)
    widths: Mapping[str, list[int]] = (policy or {}).get("head_bits") or {}
    window = int((policy or {}).get("window", 1))
    states = convolution = floats = 0
    for block in layout.blocks:
        view = block.scan
        if view is None:
            continue
        floats += 4 * view.values
        convolution += item * view.conv_values
        if spec is None:
            states += 4 * view.values
            continue
        for bits in widths.get(view.module, [spec.bits] * view.heads):
            states += state_bytes(spec, view.channels, view.states, bits)
        row = view.heads * view.channels + view.rates + view.groups * view.states
        states += window_bytes(spec, window, row)
    return states, convolution, floats


def memory_table(
    layout: ModelLayout, weights: int, policy: Mapping[str, Any] | None, item: int = 2
) -> list[BatchMemory]:
    """Memory for batch sizes from 1 to 512; nothing for models without states.

    Args:
        layout: The model.
        weights: Bytes of all weights as stored.
        policy: See :func:`sequence_bytes`.
        item: Bytes of a value in the model's type.
    """
    states, convolution, floats = sequence_bytes(layout, policy, item)
    if not floats:
        return []
    return [BatchMemory(n, weights, n * states, n * convolution, n * floats) for n in BATCHES]
