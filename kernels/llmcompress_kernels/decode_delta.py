"""What a layer of the decode step with the gated delta rule has beside its projections, and what it keeps of sequences.

The definition is :func:`~llmcompress_kernels.reference.delta.gated_delta_mix`; ``csrc/cpu/decode/delta.h`` computes it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmcompress_kernels import pages
from llmcompress_kernels.reference.group_gemm import LANES

# as in decode.h
MAX_TAPS = 8
# value heads of a key head with states in low bits: DELTA_TOKENS there
MOST_SHARED = 64


class DeltaStruct(ctypes.Structure):
    """``Delta`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dt_bias", "decay", "gain")),
        *((name, ctypes.c_int32) for name in ("heads", "key_heads", "key_dim", "value_dim", "grouped")),
        *((name, ctypes.c_float) for name in ("most", "epsilon")),
    )


@dataclass(frozen=True, slots=True)
class DeltaSizes:
    """Of the delta rules of a model, the same in all layers.

    Attributes:
        heads: Heads of values; each has a state ``[K, V]``.
        key_heads: Heads of queries and keys, each for ``heads / key_heads`` neighbours.
        key_dim: K.
        value_dim: V, a multiple of 16.
    """

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """C, of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    def decline(self, taps: int, low: bool = False) -> str | None:
        """Why the step does not take such a rule, None if it does.

        Args:
            taps: Tokens of the convolution before it.
            low: Whether states are kept in low bits.
        """
        if self.value_dim % LANES != 0:
            return f"value heads of {self.value_dim} columns are no multiple of {LANES}"
        if self.heads % self.key_heads != 0:
            return f"{self.heads} value heads do not share {self.key_heads} key heads evenly"
        if low and self.heads > MOST_SHARED * self.key_heads:
            return f"{self.heads // self.key_heads} value heads share a key head, more than {MOST_SHARED}"
        return None if 2 <= taps <= MAX_TAPS else f"a convolution over {taps} tokens is not among 2 to {MAX_TAPS}"


@dataclass(frozen=True, slots=True)
class StateCodec:
    """How states are kept between tokens of steps, instead of in float: by DSQ, as ``dsq_delta_update`` does.

    Attributes:
        bits: 4 or 8.
        window: Tokens between two roundings.
        refit: As in :func:`llmcompress_kernels.state.dsq_state_update`.
        dither: As there.
    """

    bits: int
    window: int = 1
    refit: bool = False
    dither: bool = False


@dataclass(frozen=True, eq=False)
class Delta:
    """What a layer with the gated delta rule has beside its projections and its convolution.

    Attributes:
        sizes: Sizes of the rule.
        dt_bias: float32 ``[heads]``.
        decay: float32 ``[heads]``, negative.
        gain: float32 ``[V]``, weight of the gated norm.
        grouped: Whether the projection has a key head's query, key, values and gates side by side (Qwen3-Next), instead
            of all queries, all keys and all values, with gates apart.
        codec: How its states are kept, the same in all layers; None for float32.
        fixed: fp16 ``[heads, V]`` calibrated channel scale of the codec, or None.
        most: Bound of step sizes: 2 where eigenvalues of what multiplies states may be negative (OLMo Hybrid, arXiv
            2411.12537).
        epsilon: Epsilon of the gated norm.
    """

    sizes: DeltaSizes
    dt_bias: Tensor
    decay: Tensor
    gain: Tensor
    grouped: bool
    codec: StateCodec | None = None
    fixed: Tensor | None = None
    most: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        shapes = ((self.sizes.heads,), (self.sizes.heads,), (self.sizes.value_dim,))
        for tensor, shape in zip((self.dt_bias, self.decay, self.gain), shapes):
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"a delta rule wants float32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")

    @cached_property
    def struct(self) -> DeltaStruct:
        """As C++ reads it for as long as this object lives."""
        given, sizes = (self.dt_bias, self.decay, self.gain), self.sizes
        numbers = (sizes.heads, sizes.key_heads, sizes.key_dim, sizes.value_dim, int(self.grouped))
        return DeltaStruct(*(tensor.data_ptr() for tensor in given), *numbers, self.most, self.epsilon)


def zero_states(sizes: DeltaSizes | None, layers: int, slots: int) -> Tensor:
    """States of sequences, float32 ``[layers, slots, heads, V / 16, K, 16]``; nothing without delta rules."""
    if sizes is None:
        return torch.zeros(0, slots)
    return pages.zeros((layers, slots, sizes.heads, sizes.value_dim // LANES, sizes.key_dim, LANES), torch.float32)


def blocked(state: Tensor) -> Tensor:
    """States ``[..., K, V]`` in the step's order ``[..., V / 16, K, 16]``."""
    return state.unflatten(-1, (-1, LANES)).transpose(-3, -2)
