"""Statistics of weights that several blocks run (Zamba2's shared transformers): second moments over all uses.

A shared weight is quantized once, in the block that uses it first, and what GPTQ should minimise is the sum of its
output errors over every use. Later uses read other inputs than the first (six layers of Zamba2 lie between two), so
statistics of the first alone would spend precision where only that one needs it. The later inputs do not exist yet when
the first block is quantized; therefore the full-precision model runs once before anything is quantized, only to add
them up. They are inputs of the full-precision stream: the price is that these weights do not see the errors of the
layers before them, as other weights do. The sums lie in a file until the stage ends, so that a resumed run goes on
with the same numbers.

Legend: K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.models.layout import Block, LinearGroup, ModelLayout
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.walker import Walker

FILE = "shared_moments.safetensors"


def shared_groups(layout: ModelLayout, plan: Mapping[str, QuantSpec]) -> dict[int, list[LinearGroup]]:
    """Planned linears that several blocks run, by the block they belong to; those that share an input together."""
    found: dict[int, list[LinearGroup]] = {}
    for loan in (block.loan for block in layout.blocks if block.loan is not None):
        lent = {view.name.removesuffix(".weight") for view in loan.tensors}
        groups = [group for sublayer in layout.blocks[loan.block].sublayers for group in sublayer.groups]
        parts = [tuple(view for view in group.linears if view.name in lent and view.name in plan) for group in groups]
        found[loan.block] = [replace(group, linears=part) for group, part in zip(groups, parts) if part]
    return {block: groups for block, groups in found.items() if groups}


@dataclass(frozen=True, slots=True)
class SharedMoments:
    """Sums over all uses.

    Attributes:
        path: File that holds them.
        first: Every shared linear → the linear under whose name the sum of its input lies.
    """

    path: Path
    first: dict[str, str]

    def gram(self, name: str, device: str) -> Gram:
        """The sum of a linear's inputs, ``[1, K, K]``."""
        from safetensors import safe_open

        from llmcompress.algorithms.hessian import Gram

        with safe_open(self.path, framework="pt") as handle:
            total, tokens = (handle.get_tensor(f"{self.first[name]}.{part}") for part in ("total", "tokens"))
        return Gram.of(total.to(device), tokens)


def shared_moments(layout: ModelLayout, plan: Mapping[str, QuantSpec], folder: Path) -> SharedMoments | None:
    """Where the sums of a stage are, or will be; None in models without shared weights."""
    groups = [group for own in shared_groups(layout, plan).values() for group in own]
    first = {view.name: group.linears[0].name for group in groups for view in group.linears}
    return SharedMoments(folder / FILE, first) if first else None


def gather(
    handle: ModelHandle,
    model: PreTrainedModel,
    plan: Mapping[str, QuantSpec],
    walker: Walker,
    hidden: Tensor,
    found: SharedMoments,
) -> None:
    """Run the full-precision blocks up to the last use and write the sums.

    Args:
        handle: The source.
        model: Its skeleton.
        plan: What will be quantized.
        walker: On all tokens, its inputs embedded.
        hidden: ``[S, L, H]`` embedded tokens; overwritten.
        found: Where to write.

    Raises:
        InputError: Activations contain NaN or infinity.
    """
    from llmcompress.algorithms.hessian import Gram
    from llmcompress.durable import durably
    from llmcompress.models.capture import recorded_inputs
    from llmcompress.quant.tensor_writer import write_tensors

    groups = shared_groups(handle.layout, plan)
    moments = {
        group.linears[0].name: walker.new_moments(1, group.linears[0].in_features).shards[0]
        for own in groups.values()
        for group in own
    }
    last = max(block.index for block in handle.layout.blocks if block.loan is not None)
    for block in handle.layout.blocks[: last + 1]:
        own = groups.get(block.index if block.loan is None else block.loan.block, [])
        names = [group.linears[0].name for group in own]

        def seen(position: int, x: Tensor, names: list[str] = names) -> None:
            moments[names[position]].add(x.flatten(0, -2))

        handle.load_block(model, block.index, str(walker.device))
        with recorded_inputs([model.get_submodule(name) for name in names], seen):
            walker.forward(_whole(block), hidden, advance=block.index < last)
        handle.free_block(model, block.index)
    tensors: dict[str, Tensor] = {}
    for name, gram in moments.items():
        assert isinstance(gram, Gram)
        tensors |= {f"{name}.total": gram.total.cpu(), f"{name}.tokens": gram.tokens}
    with durably(found.path) as file:
        write_tensors(file, tensors)


def _whole(block: Block) -> Block:
    """The block with shared modules run as they are, so that each of their linears runs once."""
    sublayers = tuple(
        replace(sublayer, groups=()) if sublayer.writes == "aside" and sublayer.pre_norm is not None else sublayer
        for sublayer in block.sublayers
    )
    return replace(block, sublayers=sublayers)
