"""Expert shift of a whole model: which experts changed, and what the change costs.

Hooks on the routers of the dense and the compressed model record both choices for the same tokens.
The forced-routing table (EAC-MoE, arXiv 2508.01625, Table 1) separates the two causes of damage: the
dense model made to use the compressed model's routing shows what the shift alone costs, the
compressed model made to use the dense routing what the weights alone cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.algorithms.expert_shift import ShiftTally, tokens_per_expert
from llmcompress.algorithms.router_calibration import RouterUpdate
from llmcompress.evaluation.batching import automatic_batch
from llmcompress.models.layout import Block, ExpertBank, ModelLayout
from llmcompress.models.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# logits, weights and indices of one router call: [T, N], [T, k], [T, k]
Routing = tuple[Tensor, Tensor, Tensor]
_ROWS = 512


@contextmanager
def recorded(model: nn.Module, banks: list[tuple[Block, ExpertBank]]) -> Iterator[dict[int, Routing]]:
    """Collect each router's latest output by block index."""
    seen: dict[int, Routing] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Routing) -> None:
            seen[index] = output

        return hook

    with _hooked(model, banks, watch):
        yield seen


@contextmanager
def forced_routing(
    model: nn.Module, banks: list[tuple[Block, ExpertBank]], routing: dict[int, Routing]
) -> Iterator[None]:
    """Make a model use recorded weights and indices instead of its routers' own.

    Args:
        model: The model to steer.
        banks: Blocks with their expert banks.
        routing: Block index → routing of the batch that is about to be run; read at call time.
    """

    def steer(index: int) -> Callable[..., Routing]:
        def hook(module: nn.Module, args: Any, output: Routing) -> Routing:
            _, weights, chosen = routing[index]
            return output[0], weights.to(output[1]), chosen.to(output[2].device)

        return hook

    with _hooked(model, banks, steer):
        yield


@contextmanager
def _hooked(
    model: nn.Module, banks: list[tuple[Block, ExpertBank]], hook: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, every router has the forward hook made for its block's index."""
    with ExitStack() as stack:
        for block, bank in banks:
            handle = model.get_submodule(bank.router.module).register_forward_hook(hook(block.index))
            stack.callback(handle.remove)
        yield


def moe_blocks(layout: ModelLayout) -> list[tuple[Block, ExpertBank]]:
    """Blocks that have an expert bank, with it."""
    return [(block, block.bank) for block in layout.blocks if block.bank is not None]


class ShiftRecorder:
    """Router hook of quantizing stages that changes nothing and records expert shift per block."""

    def __init__(self) -> None:
        self._reference: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, block: Block, router: Router, x: Tensor) -> None:
        """Remember what the full-precision stream's router chose on ``x [T, H]``."""
        logits, _, chosen = router(x)
        self._reference[block.index] = (logits.float(), chosen)

    def calibrate(self, block: Block, router: Router, x_hat: Tensor) -> RouterUpdate:
        """Compare with the choice on the quantized stream's ``x_hat [T, H]``; the router stays."""
        assert block.bank is not None
        logits, reference = self._reference.pop(block.index)
        logits_hat, _, chosen = router(x_hat)
        k = block.bank.top_k
        tally = ShiftTally(router.rule(k), cover=(min(block.bank.num_experts, 2 * k),))
        tally.add(reference, chosen, logits, logits_hat.float())
        return RouterUpdate(record={"before": tally.rates()})


@torch.inference_mode()
def measure_shift(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    batch: int | None = None,
) -> list[dict[str, Any]]:
    """Expert-shift rates of every MoE block on text.

    Args:
        dense: The reference model.
        compressed: The model to judge. Policies that skip experts should be detached: a skipped slot
            counts as a changed expert.
        layout: Layout of both.
        tokens: int64 ``[S, L]``.
        batch: Windows per forward pass; automatic when None.

    Returns:
        One row per MoE block: ``block`` and the figures of :class:`ShiftTally`, with ``rank_cover``
        and ``loss_share`` at 2k, and ``tokens_per_expert`` of both models.
    """
    banks = moe_blocks(layout)
    tallies = {
        k.index: ShiftTally(Router(compressed, b.router).rule(b.top_k), cover=(min(b.num_experts, 2 * b.top_k),))
        for k, b in banks
    }
    loads = {k.index: (_zeros(b), _zeros(b)) for k, b in banks}
    for ids in tokens.split(batch or _batch(dense, tokens)):
        with recorded(dense, banks) as reference:
            run_decoder(dense, ids)
        with recorded(compressed, banks) as judged:
            run_decoder(compressed, ids)
        for block, bank in banks:
            logits, _, chosen = reference[block.index]
            logits_hat, _, chosen_hat = (t.to(chosen.device) for t in judged[block.index])
            tallies[block.index].add(chosen, chosen_hat, logits.float(), logits_hat.float())
            for load, choice in zip(loads[block.index], (chosen, chosen_hat)):
                load.add_(tokens_per_expert(choice, bank.num_experts).cpu())
    return [
        {
            "block": block.index,
            "tokens": tallies[block.index].tokens,
            **tallies[block.index].rates(),
            "tokens_per_expert": {
                "dense": loads[block.index][0].tolist(),
                "compressed": loads[block.index][1].tolist(),
            },
        }
        for block, _ in banks
    ]


@dataclass(frozen=True, slots=True)
class RoutingCost:
    """Perplexities of Table 1.

    Attributes:
        dense: Full precision.
        dense_shifted: Full-precision weights with the compressed model's routing.
        compressed_unshifted: Compressed weights with the full-precision routing.
        compressed: The compressed model.
        tokens: Tokens predicted.
    """

    dense: float
    dense_shifted: float
    compressed_unshifted: float
    compressed: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the cost of each cause as a relative increase of perplexity."""
        return {
            "dense": self.dense,
            "dense_shifted": self.dense_shifted,
            "compressed_unshifted": self.compressed_unshifted,
            "compressed": self.compressed,
            "shift_alone": self.dense_shifted / self.dense - 1,
            "weights_alone": self.compressed_unshifted / self.dense - 1,
            "both": self.compressed / self.dense - 1,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def routing_cost(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    batch: int | None = None,
) -> RoutingCost:
    """The forced-routing table: what expert shift costs, and what the weights cost.

    Weights and indices are forced, as in the paper, not only the sets. Every window's first token is
    context only.

    Args:
        dense: The reference model.
        compressed: The compressed model.
        layout: Layout of both.
        tokens: int64 ``[S, L]``.
        batch: Windows per forward pass; automatic when None.
    """
    banks = moe_blocks(layout)
    sums = dict.fromkeys(("dense", "dense_shifted", "compressed_unshifted", "compressed"), 0.0)
    for ids in tokens.split(batch or _batch(dense, tokens)):
        with ExitStack() as stack:
            own = stack.enter_context(recorded(dense, banks))
            other = stack.enter_context(recorded(compressed, banks))
            sums["dense"] += _nll(dense, ids)
            sums["compressed"] += _nll(compressed, ids)
        with forced_routing(dense, banks, other):
            sums["dense_shifted"] += _nll(dense, ids)
        with forced_routing(compressed, banks, own):
            sums["compressed_unshifted"] += _nll(compressed, ids)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return RoutingCost(**{name: math.exp(value / count) for name, value in sums.items()}, tokens=count)


def shift_report(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    batch: int | None = None,
) -> dict[str, Any]:
    """Both diagnostics with skipping policies taken off for the time being: ``expert_shift`` and ``forced_routing``.

    Args:
        dense: The reference model.
        compressed: The compressed model.
        layout: Layout of both.
        tokens: int64 ``[S, L]`` held-out windows.
        batch: Windows per forward pass; automatic when None.
    """
    with without_skipping(compressed, layout):
        return {
            "expert_shift": measure_shift(dense, compressed, layout, tokens, batch),
            "forced_routing": routing_cost(dense, compressed, layout, tokens, batch).to_dict(),
        }


@contextmanager
def without_skipping(model: Any, layout: ModelLayout) -> Iterator[None]:
    """Detach a model's expert-skipping policy and attach it again afterwards."""
    controller = getattr(model, "llmcompress_skipping", None)
    if controller is None:
        yield
        return
    from dataclasses import asdict

    from llmcompress.nn.skipping import attach

    controller.detach()
    try:
        yield
    finally:
        attach(model, layout, asdict(controller.policy))


def _zeros(bank: ExpertBank) -> Tensor:
    return torch.zeros(bank.num_experts, dtype=torch.int64)


def _batch(model: PreTrainedModel, tokens: Tensor) -> int:
    return automatic_batch(tokens.shape[1], int(model.config.get_text_config().vocab_size))


def run_decoder(model: Any, ids: Tensor) -> None:
    """Run the decoder without its head."""
    model.base_model(input_ids=ids.to(model.device), use_cache=False)


def _nll(model: Any, ids: Tensor) -> float:
    """Summed negative log-likelihood of a batch of windows in nats."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    total = 0.0
    for row, target in zip(logits, ids):
        for part, wanted in zip(row[:-1].split(_ROWS), target[1:].split(_ROWS)):
            total += float(nn.functional.cross_entropy(part.float(), wanted, reduction="sum"))
    return total
