"""Greedy continuations of many prompts by the native engine: what evaluation writes, several times as fast.

An evaluation must not change with the engine that runs it, so the engine is tried out first: it writes a few tokens
after real prompts, and transformers writes them too. Where they differ by more than rounding, or where the native
engine declines the model, :class:`GreedyWriter` says why and its caller goes the way of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels.build import BuildError

from llmcompress.inference.decoder import members_of
from llmcompress.inference.engine import longest
from llmcompress.inference.generate import without_own_settings
from llmcompress.inference.native import NativeEngine, decline, open_engine, recurrent_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# tokens that both ways write after each prompt of a trial, and prompts of one
TRIAL_TOKENS = 12
TRIAL_PROMPTS = 2
# what float32 logits differ by, relative to the largest, where sums are taken in another order
FLOAT32_NOISE = 2e-5
# settings of a checkpoint's generation_config.json that leave greedy decoding as it is
_HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "do_sample",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "max_new_tokens", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
}  # fmt: skip


class GreedyWriter:
    """Greedy continuations of one model, natively where that gives what transformers gives.

    Args:
        model: A causal language model in evaluation mode; its weights must not change while the writer lives.

    Attributes:
        reason: Why the native engine does not write, None if it does or was not needed yet.
        tokens: New tokens that it has written.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.reason: str | None = None
        self.tokens = 0
        self._engine: NativeEngine | None = None

    @property
    def engine(self) -> str:
        """Which engine writes: ``native`` or ``transformers``."""
        return "native" if self._engine is not None and self.reason is None else "transformers"

    def ready(self, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Collection[int]) -> bool:
        """Whether :meth:`write` will write natively; the first call tries the engine out on these prompts."""
        positions = max(map(len, prompts), default=0) + max(new_tokens, TRIAL_TOKENS)
        if self.reason is None:
            self.reason = _too_long(self.model, positions)
        if self.reason is None and self._engine is None and prompts:
            self._open(prompts, ends, positions)
        return self.reason is None

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        ends: Collection[int],
        stopped: Callable[[list[int]], bool] | None = None,
        together: int | None = None,
    ) -> list[list[int]] | None:
        """Continue every prompt with its most likely tokens.

        Args:
            prompts: Token ids, at least one each.
            new_tokens: Longest continuation.
            ends: Ids after which a continuation ends; they belong to it.
            stopped: Told the continuation after each token, says whether to end it there.
            together: Sequences in a step, at most what the engine takes; that by default.

        Returns:
            New token ids of each prompt, or None where the native engine declines: :attr:`reason`.
        """
        if not prompts:
            return []
        if not self.ready(prompts, new_tokens, ends) or self._engine is None:
            return None
        positions = max(map(len, prompts)) + new_tokens
        count = min(len(prompts), together or self._engine.max_batch, self._engine.max_batch)
        self._engine.reserve(positions, count)
        found = continue_greedily(self._engine, prompts, new_tokens, ends, stopped, count)
        self.tokens += sum(map(len, found))
        return found

    def _open(self, prompts: Sequence[Sequence[int]], ends: Collection[int], positions: int) -> None:
        self.reason = decline(self.model)
        if self.reason is None and not recurrent_model(self.model) and members_of(self.model):
            self.reason = "the model is a family, whose prompts belong to members"
        if self.reason is not None:
            return
        # the rounded copy of the head that a single sequence profits from is memory that evaluation did not plan for
        options: dict[str, Any] = {} if recurrent_model(self.model) else {"screen": False}
        try:
            engine = open_engine(self.model, 1, positions, **options)
        except BuildError as error:
            self.reason = str(error).splitlines()[0]
            return
        tried = sorted(set(map(tuple, prompts)), key=len)
        tried = tried[:1] + tried[-1:] if len(tried) > 1 else tried
        self.reason = disagrees(engine, self.model, tried[:TRIAL_PROMPTS], ends)
        self._engine = engine if self.reason is None else None


def _too_long(model: PreTrainedModel, positions: int) -> str | None:
    most = longest(model)
    if most is not None and positions > most:
        return f"{positions} tokens exceed the {most} whose rotary tables the engine has"
    return None


@torch.inference_mode()
def continue_greedily(
    engine: NativeEngine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Collection[int],
    stopped: Callable[[list[int]], bool] | None = None,
    together: int = 1,
) -> list[list[int]]:
    """Continue prompts in the engine's first ``together`` slots; a slot whose sequence ends takes the next prompt.

    Args:
        engine: With room for the longest prompt and ``new_tokens``.
        prompts: Token ids, at least one each.
        new_tokens: Longest continuation.
        ends: Ids after which a continuation ends.
        stopped: Told the continuation after each token, says whether to end it.
        together: Slots.

    Returns:
        New token ids of each prompt.
    """
    found: list[list[int]] = [[] for _ in prompts]
    waiting = iter(range(len(prompts)))
    running: dict[int, int] = {}  # slot → prompt

    def take(prompt: int, token: int) -> bool:
        """Whether the continuation goes on after this token."""
        written = found[prompt]
        written.append(token)
        ended = token in ends or len(written) >= new_tokens
        return not (ended or (stopped is not None and stopped(written)))

    def start(slot: int) -> None:
        for prompt in waiting:
            if take(prompt, int(engine.prompt(slot, prompts[prompt]).argmax())):
                running[slot] = prompt
                return

    for slot in range(together):
        start(slot)
    while running:
        slots = sorted(running)
        tokens = torch.tensor([found[running[slot]][-1] for slot in slots])
        for slot, token in zip(slots, engine.greedy(tokens, slots).tolist()):
            if not take(running[slot], token):
                del running[slot]
                start(slot)
    return found


@torch.inference_mode()
def disagrees(
    engine: NativeEngine, model: PreTrainedModel, prompts: Sequence[Sequence[int]], ends: Collection[int]
) -> str | None:
    """Write a few tokens after each prompt both ways.

    Args:
        engine: With one slot or more.
        model: The model that it was made of.
        prompts: Token ids.
        ends: Ids that end a continuation.

    Returns:
        What differs, None if nothing does. Tokens may differ where transformers' own logits of the two are closer than
        its type can tell apart; what follows such a token is not compared.
    """
    for number, prompt in enumerate(prompts, 1):
        engine.reserve(len(prompt) + TRIAL_TOKENS)
        (native,) = continue_greedily(engine, [prompt], TRIAL_TOKENS, ends)
        written, logits = _by_transformers(model, prompt, ends)
        for place, (one, other) in enumerate(zip(native, written)):
            if one == other:
                continue
            row = logits[place].float()
            behind = float(row[other] - row[one])
            allowed = 2 * max(float(torch.finfo(model.dtype).eps), FLOAT32_NOISE) * float(row.abs().max())
            # written so that a NaN is a difference
            if not behind <= allowed:
                return (
                    f"token {place + 1} after prompt {number} of the trial differs from transformers', whose logit is "
                    f"{behind:.2g} higher"
                )
            break
    return None


def _by_transformers(
    model: Any, prompt: Sequence[int], ends: Collection[int]
) -> tuple[list[int], Sequence[torch.Tensor]]:
    """Tokens and logits ``[V]`` of the slow way."""
    from transformers import GenerationConfig

    # without an end token an impossible one: None would mean the checkpoint's own
    stops = sorted(ends) or [int(model.config.get_text_config().vocab_size)]
    settings = GenerationConfig(
        max_new_tokens=TRIAL_TOKENS, do_sample=False, repetition_penalty=1.0, pad_token_id=stops[0], eos_token_id=stops,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([list(prompt)])
    with without_own_settings(model):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out.sequences[0, ids.shape[1] :].tolist(), [row[0] for row in out.logits]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """Ids after which ``model.generate`` ends a continuation by the checkpoint's own settings.

    Args:
        model: With its generation settings.
        tokenizer: Its end token counts as well. Neither is enough for chats: Gemma's tokenizer ends a text, and only
            the settings name what ends a turn.
    """
    return ends_of(getattr(model, "generation_config", None), tokenizer)


def ends_of(settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """As :func:`end_tokens`, from a checkpoint's generation settings."""
    ends: Any = getattr(settings, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    given = [*listed, None if tokenizer is None else tokenizer.eos_token_id]
    return {int(end) for end in given if end is not None}


def unusual_settings(model: PreTrainedModel) -> str | None:
    """What in a checkpoint's generation settings changes greedy decoding, None if nothing does."""
    given: Any = model.generation_config
    found = set() if given is None else set(given.to_diff_dict()) - _HARMLESS
    return f"the checkpoint's generation settings change {', '.join(sorted(found))}" if found else None
