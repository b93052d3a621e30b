"""Expert preference of a whole model on several texts: counts from its routers, similarities between the texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.algorithms.expert_preference import by_layer, preference, similarities, similarity
from llmcompress.algorithms.expert_shift import tokens_per_expert
from llmcompress.evaluation.batching import automatic_batch
from llmcompress.evaluation.expert_shift import moe_blocks, recorded, run_decoder, without_skipping

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout

Counts = list[Tensor]


@dataclass(frozen=True, slots=True)
class TextPreference:
    """What the routers did on one text.

    Attributes:
        tokens: Tokens that were routed.
        halves: Counts ``[N]`` per MoE block of the even and of the odd windows.
    """

    tokens: int
    halves: tuple[Counts, Counts]

    @property
    def counts(self) -> Counts:
        """Both halves together."""
        return [even + odd for even, odd in zip(*self.halves)]

    @property
    def own(self) -> float:
        """Similarity of the two halves: what a text of this kind and length reaches at best. 0 for one window."""
        return similarity(*(preference(half) for half in self.halves))


@torch.inference_mode()
def count_choices(model: Any, layout: ModelLayout, windows: Tensor) -> TextPreference:
    """Count how often each router chose each expert; a policy that skips experts is taken off meanwhile.

    Args:
        model: A mixture of experts.
        layout: Its layout.
        windows: int64 ``[S, L]``, without padding.
    """
    banks = moe_blocks(layout)
    halves: tuple[Counts, Counts] = tuple(  # type: ignore[assignment]
        [torch.zeros(bank.num_experts, dtype=torch.int64) for _, bank in banks] for _ in range(2)
    )
    size = automatic_batch(windows.shape[1], int(model.config.get_text_config().vocab_size))
    with without_skipping(model, layout):
        for half, own in zip(halves, (windows[::2], windows[1::2])):
            for ids in own.split(size) if len(own) else ():
                with recorded(model, banks) as seen:
                    run_decoder(model, ids)
                for total, (block, bank) in zip(half, banks):
                    total.add_(tokens_per_expert(seen[block.index][2], bank.num_experts).cpu())
    return TextPreference(windows.numel(), halves)


def preference_report(
    model: Any, layout: ModelLayout, texts: Mapping[str, Tensor], tell: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """How alike texts use the experts.

    Args:
        model: A mixture of experts.
        layout: Its layout.
        texts: Windows ``[S, L]`` by name.
        tell: Receives a line per text.

    Returns:
        JSON data: ``texts``, one row each with ``name``, ``windows``, ``tokens`` and ``own`` (its even windows beside
        its odd ones, None for one window); ``similarity``, M × M; ``layers``, a row per MoE block with ``block``, the
        lowest similarity of two texts there (``lowest``, None for one text) and ``unused``, by text how many experts
        were never chosen.
    """
    found = {}
    for name, windows in texts.items():
        found[name] = count_choices(model, layout, windows)
        tell(f"{name}: {found[name].tokens} tokens routed")
    counts = [text.counts for text in found.values()]
    pairs = [by_layer(a, b) for i, a in enumerate(counts) for b in counts[:i]]
    layers = [
        {
            "block": block.index,
            "lowest": min((pair[number] for pair in pairs), default=None),
            "unused": {name: int((own[number] == 0).sum()) for name, own in zip(found, counts)},
        }
        for number, (block, _) in enumerate(moe_blocks(layout))
    ]
    rows = [
        {"name": name, "windows": len(texts[name]), "tokens": text.tokens,
         "own": text.own if len(texts[name]) > 1 else None}
        for name, text in found.items()
    ]  # fmt: skip
    return {"texts": rows, "similarity": similarities(counts), "layers": layers}
