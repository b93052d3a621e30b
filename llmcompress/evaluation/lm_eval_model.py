"""lm-eval's model class for this project's models; import only where lm-eval is needed.

**Low-bit states**: lm-eval scores a request with one forward pass, in which a float scan never meets the stored state,
so accuracy would be that of float states; here requests run through the recurrence, token by token.
**Expert skipping**: lm-eval fills up the shorter requests of a batch and gives no mask, so padding would count as
prompt and a request's score would depend on its company; here the policy is told where requests end.
**Written answers**: greedy ones come from the native engine where it writes what transformers writes.
**Long requests**: lm-eval cuts their beginning off and says so in a log that nobody sees here; they are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from llmcompress.evaluation.perplexity import refuse_nan
from llmcompress.evaluation.task_facts import LONGEST
from llmcompress.inference.greedy import GreedyWriter, end_tokens, unusual_settings
from llmcompress.nn.mixers import recurrent_evaluation

StateMode = Literal["per_token", "decode_only"]
# arguments of a greedy request that say nothing else
_GREEDY = {"attention_mask", "do_sample", "temperature", "top_p", "top_k", "use_cache"}


class LMEvalModel(HFLM):  # type: ignore[misc]
    """``HFLM`` that stores the state after every token of likelihood passes and writes greedy answers natively.

    Args:
        state_mode: ``per_token``, or ``decode_only``: the state stays in float until the end of a request's context.
        writer: Writer of the model; None leaves all writing to transformers.
        **options: As for ``HFLM``.

    Attributes:
        wrote: What answers were written with so far: ``native``, and reasons why not.
        asked, cut: Requests so far, and those of them that lost their beginning.
    """

    def __init__(
        self, *, state_mode: StateMode = "per_token", writer: GreedyWriter | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.state_mode = state_mode
        self.writer = writer
        self.wrote: set[str] = set()
        self.asked = self.cut = 0
        # input row → tokens of its context
        self._prompts: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        self.asked += len(requests)
        self.cut += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        if self.state_mode == "decode_only" or self._skipping is not None:
            for _, context, continuation in requests:
                row = (context + continuation)[-(self.max_length + 1) :][:-1]
                self._prompts[tuple(row)] = max(1, len(row) + 1 - len(continuation))
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._prompts.clear()

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tokens and mask of questions to be answered, as lm-eval's, and count those that are cut off."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        self.asked += len(strings)
        if left_truncate_len:
            self.cut += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    @property
    def _skipping(self) -> Any:
        """What the model's expert-skipping policy is controlled by, None without one."""
        return getattr(self.model, "llmcompress_skipping", None)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = [self._request(row) for row in inps.tolist()] if self._prompts else []
        prompt: int | Tensor = 1
        if rows and self.state_mode == "decode_only":
            prompt = torch.tensor([prompt for _, prompt in rows])
        ends = nullcontext()
        if rows and self._skipping is not None:
            ends = self._skipping.padded(torch.tensor([length for length, _ in rows]))
        with ends, recurrent_evaluation(self.model, prompt):
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        refuse_nan(logits)
        return logits

    def _request(self, row: list[int]) -> tuple[int, int]:
        """Tokens of the request and of its context in a row that is filled up on the right with zeros."""
        shortest = next((end for end in range(len(row), 0, -1) if row[end - 1] != 0), 0)
        for length in range(len(row), max(1, shortest) - 1, -1):
            prompt = self._prompts.get(tuple(row[:length]))
            if prompt is not None:
                return length, prompt
        return len(row), 1

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        found = None
        if self.writer is not None:
            reason = unusual_settings(self.model) or _not_greedy(generation_kwargs)
            if reason is None:
                found = self._native(self.writer, context, max_length, stop, generation_kwargs["attention_mask"])
                reason = self.writer.reason
            self.wrote.add(reason or "native")
        if found is None:
            found = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return found

    def _native(
        self, writer: GreedyWriter, context: Tensor, max_length: int, stop: list[str], mask: Tensor
    ) -> Tensor | None:
        """Prompts and continuations, filled up on the right as ``generate`` does; None where it declines."""
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, mask)]
        # as lm-eval looks for stop sequences: in the text of as many tokens as they have, and two more
        last = max((len(self.tokenizer.encode(text, add_special_tokens=False)) for text in stop), default=0) + 2

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-last:])
            return any(each in text for each in stop)

        new = max_length - context.shape[1]
        written = writer.write(prompts, new, end_tokens(self.model), stopped, together=len(prompts))
        if written is None:
            return None
        rows = torch.full((len(prompts), max(map(len, written))), int(self.tokenizer.pad_token_id))
        for row, ids in zip(rows, written):
            row[: len(ids)] = torch.tensor(ids)
        return torch.cat([context, rows.to(context)], dim=1)


def written_tokens(tasks: Iterable[Any]) -> int:
    """The most that any of lm-eval's tasks has a model write, in tokens; 0 where all are multiple choice."""
    asked = [dict(task.config.generation_kwargs or {}) for task in tasks if task.OUTPUT_TYPE == "generate_until"]
    return max((int(normalize_gen_kwargs(each)["max_gen_toks"]) for each in asked), default=0)


def request_limit(model: Any, written: int) -> int | None:
    """Tokens of the longest request, with what is written to it: those of the model's config, within what is sensible
    for tasks; None where it names none, which leaves the choice to lm-eval.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(limit), LONGEST + written) if limit else None


def _not_greedy(settings: dict[str, Any]) -> str | None:
    """Why a request needs more than the most likely token, None if it does not."""
    if settings.get("do_sample") or settings.get("temperature"):
        return "answers are sampled"
    more = set(settings) - _GREEDY
    if more:
        return f"the task sets {', '.join(sorted(more))}"
    return None if "attention_mask" in settings else "no attention mask says where prompts begin"
