"""What a layer of the decode step with the gated delta rule has beside its projections, and what it keeps of sequences.

Kimi Delta Attention, whose decays differ along a key, and lightning attention are described alike. The definitions are
in :mod:`~llmcompress_kernels.reference.delta`; ``csrc/cpu/decode/delta.h`` computes them.
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
# of Rule and Order in decode.h
RULES = {"gated": 0, "columns": 1, "lightning": 2}
ORDERS = {"apart": 0, "with_gates": 1, "without_gates": 2, "split": 3}
# value heads of a key head with states in low bits: DELTA_TOKENS there
MOST_SHARED = 64


class DeltaStruct(ctypes.Structure):
    """``Delta`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dt_bias", "decay", "gain")),
        *((name, ctypes.c_int32) for name in ("heads", "key_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int32) for name in ("rule", "order", "sigmoid", "whole")),
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

    def decline(self, taps: int | None, low: bool = False) -> str | None:
        """Why the step does not take such a rule, None if it does.

        Args:
            taps: Tokens of the convolution before it, None without one.
            low: Whether states are kept in low bits.
        """
        if self.value_dim % LANES != 0:
            return f"value heads of {self.value_dim} columns are no multiple of {LANES}"
        if self.heads % self.key_heads != 0:
            return f"{self.heads} value heads do not share {self.key_heads} key heads evenly"
        if low and self.heads > MOST_SHARED * self.key_heads:
            return f"{self.heads // self.key_heads} value heads share a key head, more than {MOST_SHARED}"
        return (
            None
            if taps is None or 2 <= taps <= MAX_TAPS
            else f"a convolution over {taps} tokens is not among 2 to {MAX_TAPS}"
        )


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
    """What a layer with the gated delta rule or lightning attention has beside its projections and its convolution.

    Attributes:
        sizes: Sizes of the rule.
        dt_bias: float32 ``[heads]``, ``[heads K]`` of decays along a key, None of lightning attention.
        decay: float32 ``[heads]``, negative; of lightning attention the logarithm of what a state is multiplied by.
        gain: float32 ``[V]``, weight of the gated norm; ``[heads V]`` of one over all heads together.
        order: ``with_gates``: the projection has a key head's query, key, values and gates side by side (Qwen3-Next);
            ``without_gates``: likewise, with gates apart (MiniMax-01); ``apart``: all queries, all keys, all values;
            ``split``: three projections have these (OLMo Hybrid, Kimi-Linear).
        codec: How its states are kept, the same in all layers; None for float32.
        fixed: fp16 ``[heads, V]`` calibrated channel scale of the codec, or None.
        most: Bound of step sizes: 2 where eigenvalues of what multiplies states may be negative (OLMo Hybrid, arXiv
            2411.12537).
        epsilon: Epsilon of the gated norm.
        rule: ``gated``; ``columns`` with a decay for each column of a key (Kimi Delta Attention, arXiv 2510.26692);
            ``lightning``, which decays by constants and takes whole values (arXiv 2401.04658).
        sigmoid: Gates open by a sigmoid, not by silu.
        whole: The gated norm goes over all heads together; its gates open by a sigmoid.

    Raises:
        ValueError: A tensor has another shape or type than its rule reads, or low bits are asked of another rule than
            ``gated``.
    """

    sizes: DeltaSizes
    dt_bias: Tensor | None
    decay: Tensor
    gain: Tensor
    order: str
    codec: StateCodec | None = None
    fixed: Tensor | None = None
    most: float = 1.0
    epsilon: float = 1e-6
    rule: str = "gated"
    sigmoid: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        heads, columns = self.sizes.heads, self.rule == "columns"
        if self.codec is not None and self.rule != "gated":
            raise ValueError(f"states of rule {self.rule} are not kept in low bits")
        if columns and self.sizes.key_heads != heads:
            raise ValueError(
                f"decays along a key want a key head for each of {heads} heads, not {self.sizes.key_heads}"
            )
        if (self.dt_bias is None) != (self.rule == "lightning"):
            raise ValueError("biases of decays belong to delta rules, and to all of them")
        wide = self.sizes.value_dim * (heads if self.whole else 1)
        shapes = ((heads * (self.sizes.key_dim if columns else 1),), (heads,), (wide,))
        for tensor, shape in zip((self.dt_bias, self.decay, self.gain), shapes):
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"a delta rule wants float32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")

    @cached_property
    def struct(self) -> DeltaStruct:
        """As C++ reads it for as long as this object lives."""
        given, sizes = (self.dt_bias, self.decay, self.gain), self.sizes
        numbers = (sizes.heads, sizes.key_heads, sizes.key_dim, sizes.value_dim)
        return DeltaStruct(
            *(None if tensor is None else tensor.data_ptr() for tensor in given), *numbers, RULES[self.rule],
            ORDERS[self.order], int(self.sigmoid), int(self.whole), self.most, self.epsilon,
        )  # fmt: skip


def zero_states(sizes: DeltaSizes | None, layers: int, slots: int) -> Tensor:
    """States of sequences, float32 ``[layers, slots, heads, V / 16, K, 16]``; nothing without delta rules."""
    if sizes is None:
        return torch.zeros(0, slots)
    return pages.zeros((layers, slots, sizes.heads, sizes.value_dim // LANES, sizes.key_dim, LANES), torch.float32)


def blocked(state: Tensor) -> Tensor:
    """States ``[..., K, V]`` in the step's order ``[..., V / 16, K, 16]``."""
    return state.unflatten(-1, (-1, LANES)).transpose(-3, -2)
