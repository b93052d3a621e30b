"""Other ways to store several fine-tunes, in the same harness: same models, same texts, same rounded embeddings.

* ``gptq-2``, ``gptq-3``, ``gptq-4``: each member on its own, with this project's GPTQ (asymmetric, the family's group
  size or one of their own, as many sweeps as asked for), calibrated like the tree's leaves on the member's own windows.
* ``bitdelta`` (Liu et al., NeurIPS 2024): 16-bit base, one sign per weight and one scale per matrix, the mean of
  ``|Δ|``; without its distillation of the scales. ``bitdelta-4``: the same on a 4-bit GPTQ base.
* ``low_rank``: 16-bit base and a truncated SVD of each difference in fp16, as large as one bit per weight.
* ``rtvq`` (ICCV 2025): 16-bit base, the mean difference at 3 bits and what is left of each at 2 bits, per-tensor
  ranges, the second level taken from the first one's error.

Bits count what is stored for the linear weights, shared parts divided by the number of members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.algorithms.gptq import GptqOptions, solve
from llmcompress.models.member_stream import MemberStream
from llmcompress.models.visitor import DenseVisitor
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import LinearGroup
    from llmcompress.stages.state import FamilyState, RunContext

RTVQ_BASE, RTVQ_OFFSET = 3, 2


class Baselines:
    """Weights of members by other methods, and what they take.

    Args:
        state: The family, with the windows its members were calibrated on.
        ctx: The run.
        group_size: Columns per scale of GPTQ; the family's when None.
        sweeps: Rounds of coordinate descent after GPTQ.
    """

    def __init__(self, state: FamilyState, ctx: RunContext, group_size: int | None = None, sweeps: int = 0) -> None:
        self.state, self.ctx, self.sweeps = state, ctx, sweeps
        self.group_size = group_size or state.plan.group_size
        self._base: dict[str, Tensor] = {}

    def weights(self, method: str, name: str) -> Mapping[str, Tensor]:
        """Linear weights of one member by one method; weight name → ``[N, K]`` fp32."""
        if method.startswith("gptq-"):
            return independent(self.state, self.ctx, name, int(method[-1]), self.group_size, self.sweeps)
        family, found = self.state.family, {}
        for linear in self.state.plan.linears:
            base, own = self._weight(family.base, linear), self._weight(family.members[name], linear)
            if method == "bitdelta":
                found[linear] = base + sign_delta(own - base)
            elif method == "bitdelta-4":
                rounded = self._rounded_base(linear)
                found[linear] = rounded + sign_delta(own - rounded)
            elif method == "low_rank":
                found[linear] = base + low_rank(own - base, rank_of(base.shape))
            else:
                deltas = torch.stack([self._weight(handle, linear) - base for handle in family.members.values()])
                found[linear] = base + two_levels(deltas, RTVQ_BASE, RTVQ_OFFSET)[list(family.members).index(name)]
        return found

    def _weight(self, handle: ModelHandle, linear: str) -> Tensor:
        return handle.checkpoint.tensor(f"{linear}.weight").to(self.ctx.device, torch.float32)

    def bits(self, method: str) -> float:
        """Stored bits per linear weight and member."""
        plan, members = self.state.plan, len(self.state.plan.order)
        total = 0.0
        for rows, columns in plan.shapes.values():
            count = rows * columns
            packed = 8 * int_group.nbytes((rows, columns), QuantSpec(4, self.group_size))
            if method.startswith("gptq-"):
                total += 8 * int_group.nbytes((rows, columns), QuantSpec(int(method[-1]), self.group_size))
            elif method == "bitdelta":
                total += 16 * count / members + count + 32
            elif method == "bitdelta-4":
                total += packed / members + count + 32
            elif method == "low_rank":
                total += 16 * count / members + 16 * rank_of((rows, columns)) * (rows + columns)
            else:
                total += (16 + RTVQ_BASE) * count / members + RTVQ_OFFSET * count + 64 * (1 + 1 / members)
        return total / plan.weights

    def _rounded_base(self, linear: str) -> Tensor:
        """The base's weight by 4-bit GPTQ on the first member's windows; all of them are made at once."""
        if not self._base:
            first = next(iter(self.state.family.members))
            self._base = dict(independent(self.state, self.ctx, first, 4, self.group_size, self.sweeps, base=True))
        return self._base[linear]


def sign_delta(delta: Tensor) -> Tensor:
    """BitDelta's start: ``mean |Δ| · sign Δ``, zero counted as positive."""
    ones = torch.ones_like(delta)
    return torch.where(delta >= 0, ones, -ones) * delta.abs().mean()


def rank_of(shape: Sequence[int]) -> int:
    """Rank at which fp16 factors of a matrix take one bit per weight, at least 1."""
    rows, columns = shape
    return max(1, rows * columns // (16 * (rows + columns)))


def low_rank(delta: Tensor, rank: int) -> Tensor:
    """Best approximation of a rank, factors rounded to fp16."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:rank].sqrt()
    a, b = (left[:, :rank] * root).half().float(), (root[:, None] * right[:rank]).half().float()
    return a @ b


def min_max(values: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding with one range for the whole tensor, as TVQ and RTVQ do."""
    low, high = values.min(), values.max()
    step = (high - low).clamp(min=torch.finfo(values.dtype).tiny) / ((1 << bits) - 1)
    return ((values - low) / step).round() * step + low


def two_levels(deltas: Tensor, base_bits: int, offset_bits: int) -> Tensor:
    """RTVQ: the mean of task vectors, and each one's offset from the rounded mean; ``[M, N, K]``."""
    shared = min_max(deltas.mean(0), base_bits)
    return torch.stack([shared + min_max(delta - shared, offset_bits) for delta in deltas])


class _Independent(DenseVisitor):
    """Visitor that quantizes one member on its own."""

    def __init__(self, stream: MemberStream, handle: Any, spec: QuantSpec, sweeps: int) -> None:
        self.stream, self.handle, self.spec = stream, handle, spec
        self.options = GptqOptions(act_order="groups", refit=True, sweeps=sweeps)
        self.found: dict[str, Tensor] = {}

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Quantize the group in one solve and put the result in place."""
        assert gram is not None
        tensors = [self.handle.checkpoint.tensor(f"{v.name}.weight").to(torch.float32) for v in group.linears]
        stacked = torch.cat(tensors)[None].to(gram.total.device)
        quantized = solve(stacked, gram.hessian(), self.spec, self.options).quantized[0]
        for view, part in zip(group.linears, quantized.split([t.shape[0] for t in tensors])):
            self.found[view.name] = part
            place = self.stream.model.get_parameter(f"{view.name}.weight")
            place.data.copy_(part.to(place))


def independent(
    state: FamilyState, ctx: RunContext, name: str, bits: int, group_size: int, sweeps: int = 0, base: bool = False
) -> Mapping[str, Tensor]:
    """One member (or the base) by this project's GPTQ alone, block after block on its own activations."""
    tokens = state.calibration[name].tokens
    handle = state.family.base if base else state.family.members[name]
    stream = MemberStream(handle, tokens, ctx.device, ctx.dtype, ctx.seed)
    found: dict[str, Tensor] = {}
    for block in state.family.layout.blocks:
        stream.load(block)
        visitor = _Independent(stream, stream.handle, QuantSpec(bits, group_size), sweeps)
        stream.walker.forward(block, stream.hidden, visitor)
        stream.free(block)
        found |= visitor.found
    return found
