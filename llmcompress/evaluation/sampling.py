"""Batched sampling with a key-value cache: rows that have ended leave the batch.

Responses of one batch end at very different lengths in self-correction (one trial or four). ``transformers.generate``
carries every row to the end of the longest; here finished rows are dropped from batch and cache, which keeps the
arithmetic proportional to the tokens written. On a GPU, where not arithmetic but the host's launches take the time,
batches of one shape are replayed instead (:mod:`~llmcompress.evaluation.static_decoding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.distributed.world import ALONE, World
from llmcompress.evaluation.static_decoding import decoder_of, supports
from llmcompress.inference.caches import empty_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.inference.greedy import GreedyWriter

# dropping rows copies the cache: not worth it for a few of many
COMPACT_BELOW = 0.75
# sequences in a step of the native engine
NATIVE_ROWS = 8


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


def why_batched(model: PreTrainedModel, settings: Sampling) -> str | None:
    """Why responses are decoded through transformers' modules, None if the native engine may be asked.

    A step of the native engine reads all weights for at most eight sequences. With packed weights, whose products limit
    large batches as well, that is no loss; a dense model's modules read them once for the whole batch.
    """
    from llmcompress.nn.packed import PackedTensors

    if settings.temperature != 0:
        return "responses are sampled"
    if settings.batch > NATIVE_ROWS and not any(isinstance(module, PackedTensors) for module in model.modules()):
        return f"a dense model's batches of {settings.batch} are faster in transformers' modules"
    return None


def sample(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: Sampling, end: int, pad: int, seed: int,
    world: World = ALONE, writer: GreedyWriter | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue prompts.

    Args:
        model: A causal language model; left in the mode it is in.
        prompts: Token ids of each.
        settings: How to sample.
        end: Id of the end token.
        pad: Id used for padding; never attended to.
        seed: Seed of the choices, made on the model's device; equal seeds give equal responses on one machine.
        world: The processes that share the work. A batch is written by one of them, so that the responses do not
            depend on how many there are; fewer batches than processes leave some idle.
        writer: Lets the native engine write greedy responses where it writes what the modules write.

    Returns:
        New ids of each prompt; the end token is the last of those that ended.
    """
    found: list[list[int]] = [[] for _ in prompts]
    device = model.device
    static = device.type == "cuda" and supports(model)
    # tried out on all prompts, so that every process comes to the same verdict
    asked = writer is not None and why_batched(model, settings) is None
    native = writer if asked and writer is not None and writer.ready(prompts, settings.max_new_tokens, {end}) else None
    # prompts of similar length share a batch, so that little padding is computed
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = [order[begin : begin + settings.batch] for begin in range(0, len(order), settings.batch)]

    @torch.inference_mode()
    def write(number: int) -> list[list[int]]:
        rows, begin = batches[number], number * settings.batch
        generator = torch.Generator(device=device).manual_seed((seed * 1_000_003 + begin) % 2**63)
        part = [prompts[i] for i in rows]
        written = native.write(part, settings.max_new_tokens, {end}) if native is not None else None
        if written is not None:
            return written
        if static:
            decoder = decoder_of(
                model, min(settings.batch, len(prompts)), len(prompts[order[-1]]), settings.max_new_tokens
            )
            return decoder.decode(model, part, end, pad, partial(_choose, settings=settings, generator=generator))
        return _decode(model, part, settings, end, pad, generator)

    for rows, written in zip(batches, world.spread(len(batches), write)):
        for row, ids in zip(rows, written):
            found[row] = ids
    return found


def _decode(
    model: Any, prompts: list[Sequence[int]], settings: Sampling, end: int, pad: int, generator: torch.Generator
) -> list[list[int]]:
    device, width = model.device, max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    position = (mask.cumsum(1) - 1).clamp_min(0)
    ids, mask, position = ids.to(device), mask.to(device), position.to(device)
    cache = empty_cache(model)
    written = torch.full((len(prompts), settings.max_new_tokens), -1, dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts), device=device)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(settings.max_new_tokens):
        logits = model(
            ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        chosen = _choose(logits, settings, generator)
        written[rows, step] = chosen.masked_fill(~open_rows, -1)
        open_rows &= chosen != end
        if not open_rows.any():
            break
        keep = open_rows.nonzero()[:, 0]
        next_position = position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if len(keep) <= COMPACT_BELOW * len(rows):
            cache.batch_select_indices(keep)
            rows, chosen, open_rows = rows[keep], chosen[keep], open_rows[keep]
            mask, next_position = mask[keep], next_position[keep]
        ids, position = chosen[:, None], next_position
    return [[token for token in row if token >= 0] for row in written.tolist()]


def _choose(logits: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row ``[B]``, where the logits ``[B, V]`` are: moving them costs more than the model."""
    logits = logits.float()
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        # a token stays while the mass before it is below the limit: the first one always does
        ordered = ordered * (ordered.cumsum(-1) - ordered < settings.top_p)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
