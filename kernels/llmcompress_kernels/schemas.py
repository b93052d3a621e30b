"""Every operator's signature in one place, with its shape function and its definition.

Legend: T tokens, k experts per token, E experts, H hidden, I intermediate, N rows, K columns,
G groups per row, b bits, ``words(n, b) = ceil(n*b/32)``.

Packed weights are LSB-first bit streams in int32 along the last dimension; rows are independent.
Scales are fp16 ``[..., N, G]``; zero points are unsigned b-bit streams ``[..., N, words(G, b)]`` or
absent, which means the midpoint ``2**(b-1)``. ``w = scale * (code - zero)``.
The three may come interleaved instead, ``[..., N/16, W, 16]`` for ``[..., N, W]``: see ``reference/group_gemm.py``.

Fast kernels may take the definition's place for what they decline, so it also has a name of its own,
``<op>_definition``, that no kernel ever takes over.

The plain PyTorch definition is registered for every backend (CompositeExplicitAutograd). An
implementation for one backend, registered under that backend's key, takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import operand_shapes
from llmcompress_kernels.reference import bitpack, delta_decode, group_gemm, moe_group_gemm
from llmcompress_kernels.select import Implementation, register

NAMESPACE = "llmcompress"
DENSE_BITS = moe_group_gemm.DENSE_BITS

SCHEMAS = {
    # codes [..., K] uint8 -> [..., words(K, bits)] int32
    "pack": "(Tensor codes, int bits) -> Tensor",
    # packed [..., words(count, bits)] int32 -> [..., count] uint8
    "unpack": "(Tensor packed, int bits, int count) -> Tensor",
    # x [..., K], packed [N, words(K, bits)], scale [N, G], zero [N, words(G, bits)] -> [..., N]
    "group_gemm": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, int bits, int group_size, int in_features, "
        "bool int8=False) -> Tensor"
    ),
    # x [T, H], index [T, k] int64 (E means skip), weights [T, k],
    # gate_up [E, 2I, words(H, bits)] (gate rows first), down [E, H, words(I, bits)], biases [E, 2I], [E, H] -> [T, H]
    "moe_group_gemm": (
        "(Tensor x, Tensor index, Tensor weights, "
        "Tensor gate_up, Tensor? gate_up_scale, Tensor? gate_up_zero, Tensor? gate_up_bias, "
        "int gate_up_bits, int gate_up_group, "
        "Tensor down, Tensor? down_scale, Tensor? down_zero, Tensor? down_bias, int down_bits, int down_group, "
        "int intermediate, str activation, float alpha, float limit, bool int8=False) -> Tensor"
    ),
    # x [T, K]; per node packed [N, words(K, b)], scale [N, G], its rows [V, 2] int64 on the CPU, bits -> [T, N]
    "delta_decode": (
        "(Tensor x, Tensor[] packed, Tensor[] scale, Tensor spans, int[] bits, float[] multiplier, int group_size) "
        "-> Tensor"
    ),
}

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], bitpack.words(codes.shape[-1], bits)), dtype=torch.int32)


def _unpack_fake(packed: Tensor, bits: int, count: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], count), dtype=torch.uint8)


def _group_gemm_fake(x: Tensor, packed: Tensor, *_rest: Any) -> Tensor:
    rows = packed.shape[0] * (1 if packed.dim() == 2 else group_gemm.LANES)
    return x.new_empty((*x.shape[:-1], rows))


def _group_gemm(*arguments: Any) -> Tensor:
    """The definition, asked last: kernels hand on what they decline, so what does not fit is refused here for all."""
    operand_shapes.check_linear(*arguments[:7])
    return group_gemm.group_gemm(*arguments)


def _moe_group_gemm(*arguments: Any) -> Tensor:
    """Likewise."""
    x, index, weights = arguments[:3]
    intermediate, activation = arguments[15:17]
    rows = moe_group_gemm.first_rows(intermediate, activation)
    operand_shapes.check_routed(x, index, weights, arguments[3:9], arguments[9:15], rows, intermediate)
    return moe_group_gemm.moe_group_gemm(*arguments)


def _delta_decode(*arguments: Any) -> Tensor:
    """Likewise."""
    operand_shapes.check_tree(*arguments)
    return delta_decode.delta_decode(*arguments)


def _moe_group_gemm_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _delta_decode_fake(x: Tensor, packed: list[Tensor], *_: object) -> Tensor:
    return x.new_empty((x.shape[0], packed[0].shape[0]))


_DEFINITIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "pack": (bitpack.pack, _pack_fake),
    "unpack": (bitpack.unpack, _unpack_fake),
    "group_gemm": (_group_gemm, _group_gemm_fake),
    "moe_group_gemm": (_moe_group_gemm, _moe_group_gemm_fake),
    "delta_decode": (_delta_decode, _delta_decode_fake),
}

for _name, (_definition, _fake) in _DEFINITIONS.items():
    for _op in (_name, f"{_name}_definition"):
        _LIBRARY.define(f"{_op}{SCHEMAS[_name]}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(_op, _definition, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{_op}", _fake, lib=_LIBRARY)
    register(Implementation(_name, "reference", ("any",)))
