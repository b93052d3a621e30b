"""Batched sampling with a key-value cache: rows that have ended leave the batch.

Responses of one batch end at very different lengths in self-correction (one trial or four). ``transformers.generate``
carries every row to the end of the longest; here finished rows are dropped from batch and cache, which keeps the
arithmetic proportional to the tokens written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# dropping rows copies the cache: not worth it for a few of many
COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest response, end token included.
        temperature: 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability; 1 is all.
        batch: Prompts decoded together.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    batch: int = 128


@torch.inference_mode()
def sample(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: Sampling, end: int, pad: int, seed: int
) -> list[list[int]]:
    """Continue prompts.

    Args:
        model: A causal language model; left in the mode it is in.
        prompts: Token ids of each.
        settings: How.
        end: Id of the end token.
        pad: Id used for padding; never attended to.
        seed: Of the choices; equal seeds give equal responses on one machine.

    Returns:
        New ids of each prompt; the end token is the last of those that ended.
    """
    found: list[list[int]] = [[] for _ in prompts]
    # prompts of similar length share a batch, so that little padding is computed
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for begin in range(0, len(order), settings.batch):
        rows = order[begin : begin + settings.batch]
        generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + begin) % 2**63)
        for row, ids in zip(rows, _decode(model, [prompts[i] for i in rows], settings, end, pad, generator)):
            found[row] = ids
    return found


def _decode(
    model: Any, prompts: list[Sequence[int]], settings: Sampling, end: int, pad: int, generator: torch.Generator
) -> list[list[int]]:
    from transformers import DynamicCache

    device, width = model.device, max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    position = (mask.cumsum(1) - 1).clamp_min(0)
    ids, mask, position = ids.to(device), mask.to(device), position.to(device)
    cache = DynamicCache(config=model.config)
    found: list[list[int]] = [[] for _ in prompts]
    rows, open_rows = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(settings.max_new_tokens):
        logits = model(
            ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        chosen = _choose(logits, settings, generator)
        for place, row in enumerate(rows):
            if open_rows[place]:
                found[row].append(int(chosen[place]))
        open_rows &= chosen != end
        if not open_rows.any():
            break
        keep = open_rows.nonzero()[:, 0]
        next_position = position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if len(keep) <= COMPACT_BELOW * len(rows):
            cache.batch_select_indices(keep.to(device))
            chosen, open_rows = chosen[keep], open_rows[keep]
            mask, next_position = mask[keep.to(device)], next_position[keep.to(device)]
            rows = [rows[int(i)] for i in keep]
        ids, position = chosen[:, None].to(device), next_position
    return found


def _choose(logits: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row, on the CPU, so that the same seed means the same choice everywhere."""
    logits = logits.float().cpu()
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        # a token stays while the mass before it is below the limit: the first one always does
        ordered = ordered * (ordered.cumsum(-1) - ordered < settings.top_p)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
