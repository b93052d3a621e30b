"""How large a model is and what work on it costs, from its layout alone. Torch-free; used by estimates.

Legend: E experts, N rows, K columns, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from llmcompress.models.layout import Block, LinearGroup, ModelLayout
from llmcompress.quant import embeddings
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from llmcompress.models.quantization_config import Policies

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HESSIAN_BYTES = 4  # fp32

# types and those that hold all of their values
_HELD_BY = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32"), "float16": ("float16", "float32")}

Plan = Mapping[str, QuantSpec]


@dataclass(frozen=True, slots=True)
class AverageBits:
    """Bits per weight under a plan.

    Attributes:
        codes: The papers' convention: code bits over all parameters of the decoder layers, dense ones (routers,
            norms) at checkpoint precision; embedding, head, scales and zero points are left out.
        stored: Everything that is stored, over all parameters of the model.
        weights: Codes, scales and zero points, over the quantized weights alone.
    """

    codes: float
    stored: float
    weights: float


def block_kept(block: Block) -> int:
    """Parameters of a block that are never quantized."""
    return sum(prod(view.shape) for view in block.kept)


def block_quantizable(block: Block) -> int:
    """Parameters of a block that rules may quantize."""
    total = sum(linear.out_features * linear.in_features for linear in block.linears())
    bank = block.bank
    if bank is not None:
        total += sum(prod(bank.shape(name)) for name in bank.names)
    return total


def recorded_width(block: Block, plan: Plan) -> int:
    """Inputs per token of a block's planned linears, those of linears that share them counted once."""
    groups = (group for sublayer in block.sublayers for group in sublayer.groups)
    return sum(g.linears[0].in_features for g in groups if any(linear.name in plan for linear in g.linears))


def block_parameters(block: Block) -> int:
    """Parameters of one decoder layer."""
    return block_kept(block) + block_quantizable(block)


def largest_block(layout: ModelLayout) -> int:
    """Parameters in memory with the largest decoder layer, borrowed ones too."""
    return max((block_parameters(block) + borrowed_parameters(block) for block in layout.blocks), default=0)


def borrowed_parameters(block: Block) -> int:
    """Parameters of another decoder layer that this one uses as well."""
    return 0 if block.loan is None else sum(prod(view.shape) for view in block.loan.tensors)


def outside_parameters(layout: ModelLayout) -> int:
    """Parameters outside the decoder layers: embedding, final norm, untied head."""
    return sum(prod(view.shape) for view in layout.outside)


def parameters(layout: ModelLayout) -> int:
    """Parameters of the whole model; a tied head counts once."""
    return outside_parameters(layout) + sum(block_parameters(block) for block in layout.blocks)


def active_parameters(layout: ModelLayout) -> int:
    """Parameters of the decoder layers and the head that one token meets, shared ones as often as they are used."""
    total = layout.vocab * layout.hidden
    for block in layout.blocks:
        total += block_parameters(block) + borrowed_parameters(block)
        bank = block.bank
        if bank is not None:
            experts = sum(prod(bank.shape(name)) for name in bank.names)
            total -= experts * (bank.num_experts - bank.top_k) // bank.num_experts
    return total


def packed_bytes(layout: ModelLayout, plan: Plan) -> int:
    """Bytes of codes, scales and zero points of everything in ``plan``."""
    sizes = ((shape, plan.get(name)) for name, _, shape, _ in layout.quantizable())
    return sum(codec(spec.codec).nbytes(shape, spec) for shape, spec in sizes if spec is not None)


def packed_block_bytes(block: Block, plan: Plan) -> int:
    """Bytes of one decoder layer's packed weights."""
    shapes: dict[str, tuple[int, ...]] = {
        linear.name: (linear.out_features, linear.in_features) for linear in block.linears()
    }
    bank = block.bank
    if bank is not None:
        shapes |= {name: bank.shape(name) for name in bank.names}
    return sum(codec(plan[name].codec).nbytes(shape, plan[name]) for name, shape in shapes.items() if name in plan)


def quantized_parameters(layout: ModelLayout, plan: Plan) -> int:
    """Number of weights that ``plan`` quantizes."""
    return sum(prod(shape) for name, _, shape, _ in layout.quantizable() if name in plan)


def dense_parameters(layout: ModelLayout, plan: Plan) -> int:
    """Number of parameters that stay dense under ``plan``."""
    return parameters(layout) - quantized_parameters(layout, plan)


def model_bytes(layout: ModelLayout, plan: Plan, weight_bytes: int, policies: Policies | None = None) -> int:
    """Bytes of the weights after compression; with an empty plan, of the dense model.

    Args:
        layout: The model.
        plan: What is quantized and how.
        weight_bytes: Bytes of a parameter that stays dense.
        policies: Run-time policies by name; of these ``embeddings`` alone changes sizes.
    """
    total = dense_parameters(layout, plan) * weight_bytes + packed_bytes(layout, plan)
    rounded = (policies or {}).get(embeddings.EMBEDDINGS)
    if rounded is not None:
        total += embeddings.packed_bytes(layout, rounded) - embeddings.parameters(layout) * weight_bytes
    return total


def average_bits(layout: ModelLayout, plan: Plan, weight_bytes: int, policies: Policies | None = None) -> AverageBits:
    """Average bits by the papers' convention and all-in.

    Args:
        layout: The model.
        plan: What is quantized and how.
        weight_bytes: Bytes of a parameter that stays dense.
        policies: See :func:`model_bytes`.
    """
    inside = sum(block_parameters(block) for block in layout.blocks)
    chosen = [(prod(shape), shape[-1], plan[name]) for name, _, shape, _ in layout.quantizable() if name in plan]
    quantized = sum(number for number, _, _ in chosen)
    codes = (inside - quantized) * 8 * weight_bytes
    for number, columns, spec in chosen:
        # rows that stay dense beside a matrix's codes are stored in fp16
        codes += (number - spec.dense_rows * columns) * spec.bits + spec.dense_rows * columns * 16
    return AverageBits(
        codes=codes / max(inside, 1),
        stored=8 * model_bytes(layout, plan, weight_bytes, policies) / max(parameters(layout), 1),
        weights=8 * packed_bytes(layout, plan) / quantized if quantized else 0.0,
    )


def stream_bytes(layout: ModelLayout, samples: int, length: int, item_bytes: int) -> int:
    """Bytes of one stream of hidden states ``[samples, length, H]``."""
    return samples * length * layout.hidden * item_bytes


def group_hessian_bytes(group: LinearGroup) -> int:
    """Bytes of the Hessian that the linears of a group share."""
    return group.linears[0].in_features ** 2 * HESSIAN_BYTES


def forward_flops(layout: ModelLayout, tokens: int, length: int) -> float:
    """Multiply-adds, times two, of a forward pass without the head.

    Args:
        layout: The model.
        tokens: Number of tokens in all windows.
        length: Tokens in a window; attention over it costs ``2 T L`` per unit of attention width and half of
            that is masked.
    """
    weights = active_parameters(layout) - layout.vocab * layout.hidden
    width = sum(
        group.linears[0].in_features
        for block in layout.blocks
        for sublayer in block.sublayers
        if sublayer.kind == "attention"
        for group in sublayer.groups
        if group.position == "last"
    )
    return 2.0 * tokens * weights + 2.0 * tokens * length * width


def hessian_flops(layout: ModelLayout, plan: Plan, tokens: int) -> float:
    """Work of accumulating ``XᵀX`` for everything in ``plan``; experts share the tokens by top-k."""
    total = 0.0
    for block in layout.blocks:
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                if any(linear.name in plan for linear in group.linears):
                    total += 2.0 * tokens * group.linears[0].in_features ** 2
        bank = block.bank
        if bank is not None:
            routed = tokens * bank.top_k
            total += 2.0 * routed * bank.hidden**2 if bank.gate_up in plan else 0.0
            total += 2.0 * routed * bank.intermediate**2 if bank.down in plan else 0.0
    return total


def solve_flops(layout: ModelLayout, plan: Plan) -> float:
    """Work of GPTQ's solver: inverse Cholesky (about ``K³``) per Hessian and updates of ``N K²`` per weight."""
    total = 0.0
    for block in layout.blocks:
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                rows = sum(linear.out_features for linear in group.linears if linear.name in plan)
                columns = group.linears[0].in_features
                total += (columns**3 + rows * columns**2) if rows else 0.0
        bank = block.bank
        for name in bank.names if bank is not None else ():
            if bank is not None and name in plan:
                experts, rows, columns = bank.shape(name)
                total += experts * (columns**3 + rows * columns**2)
    return total


def checkpoint_dtype(config: Mapping[str, object], asked: str = "auto") -> str:
    """Data type name of a model's weights.

    Args:
        config: Its ``config.json``.
        asked: The recipe's ``model.dtype``; ``auto`` is what the config says, float32 when it says nothing.
    """
    if asked != "auto":
        return asked
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return found if found in DTYPE_BYTES else "float32"


def held_exactly(stored: str, computed: str) -> bool:
    """Whether a data type holds all values of another, by name."""
    return computed in _HELD_BY.get(stored, ())
