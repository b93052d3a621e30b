"""Linears and norms of a model as the native decode step reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import matrix
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor, nn

from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.tree_linear import PerMember, TreeLinear
from llmcompress.quant.codecs.int_group import PACKED, SCALE, ZERO

_ALL = slice(None)


def parts(module: Any) -> list[Any]:
    """A module, or those of the members of a family that stand in its place."""
    return list(module.parts) if isinstance(module, PerMember) else [module]


def norm_of(module: Any, name: str = "weight", adds_one: bool = False) -> Any:
    """A norm's weights or biases float32 ``[H]``, or ``[M, H]`` of a family; None where there are none.

    Args:
        module: The norm.
        name: Which of its tensors.
        adds_one: It multiplies by one more than it holds.
    """
    given = [getattr(part, name, None) for part in parts(module)]
    rows = [row.detach().float() + float(adds_one) for row in given if row is not None]
    if not rows:
        return None
    return torch.stack(rows).contiguous() if isinstance(module, PerMember) else rows[0].contiguous()


def ones_of(size: int, members: Sequence[str] = ()) -> Tensor:
    """Weights of a norm that has none, float32 ``[H]``, or ``[M, H]``, for a step reads a row of each member."""
    return torch.ones(*([len(members)] if members else []), size)


def linear_matrix(module: nn.Module, members: Sequence[str] = (), rows: slice | Tensor = _ALL) -> matrix.Matrix:
    """A linear, or some of its rows, as a step reads it: dense, packed, or a tree's nodes for these members."""
    if isinstance(module, TreeLinear):
        assert isinstance(rows, slice)
        return _tree(module, members, rows)
    bias: Any = None if module.bias is None else module.bias[rows]  # type: ignore[index]
    if not isinstance(module, PackedLinear):
        weight: Any = module.weight
        return matrix.dense(weight.detach()[rows], bias)
    module.prepare()
    return packed_matrix(module, rows, bias)


def linear_parts(module: nn.Module, sizes: Sequence[int], members: Sequence[str] = ()) -> list[matrix.Matrix]:
    """A linear of several whose rows follow each other, so many of each."""
    ends = list(accumulate(sizes))
    return [linear_matrix(module, members, slice(end - size, end)) for size, end in zip(sizes, ends)]


def _tree(module: TreeLinear, members: Sequence[str], rows: slice) -> matrix.Matrix:
    """Nodes with a bit for each member; without a family those on one model's path."""
    module.prepare()
    first, count = _span(rows, module.out_features)
    assert first % LANES == 0
    blocks = slice(first // LANES, (first + count) // LANES)
    planes = [replace(p, words=p.words[blocks], scale=p.scale[blocks]) for p in module.planes]
    names = list(members) or [next(iter(sorted(frozenset.intersection(*module.members))))]
    below = [sum(1 << i for i, name in enumerate(names) if name in module.members[p.node]) for p in planes]
    bias = torch.stack([module.biases[name].float()[rows] for name in names]) if module.biases else None
    return matrix.of_tree(planes, below, count, module.in_features, module.group_size, bias)


def packed_matrix(side: PackedTensors, rows: slice | Tensor, bias: Tensor | None = None) -> matrix.Matrix:
    """Some rows of a packed weight, shared where they follow each other interleaved already, and copied elsewhere."""
    tensors: dict[str, Any] = {key: side._buffers.get(key) for key in (PACKED, SCALE, ZERO)}
    if isinstance(rows, slice) and side.interleaved and all((end or 0) % LANES == 0 for end in (rows.start, rows.stop)):
        blocks = slice(*(None if end is None else end // LANES for end in (rows.start, rows.stop)))
        interleaved, parts = True, [None if t is None else t[..., blocks, :, :] for t in tensors.values()]
    else:
        stored = side.packed_weight().tensors
        interleaved, parts = False, [None if t is None else t[..., rows, :] for t in map(stored.get, tensors)]
    words, scale, zero = parts
    assert words is not None
    assert scale is not None
    sizes = (side.spec.bits, side.columns_per_group, side.shape[-1])
    found = matrix.packed(words, scale, zero, *sizes, bias, interleaved)
    return replace(found, input_bytes=native.INT8_PLANES) if getattr(side, "int8_activations", False) else found


def _span(rows: slice, count: int) -> tuple[int, int]:
    first, last, _ = rows.indices(count)
    return first, last - first


def centres(module: Any) -> bool:
    """Whether a norm takes the mean away, also without biases; of Cohere's the class's name alone tells."""
    part = parts(module)[0]
    return isinstance(part, nn.LayerNorm) or type(part).__name__.endswith("LayerNorm")
