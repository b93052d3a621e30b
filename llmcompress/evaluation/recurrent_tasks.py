"""lm-eval's model class for models with low-bit states: requests run through the recurrence, token by token.

lm-eval scores a request with one forward pass, in which a float scan never meets the stored state; accuracy
would be that of float states. Import only where lm-eval is needed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmcompress.nn.mixers import recurrent_evaluation

StateMode = Literal["per_token", "decode_only"]


class RecurrentLM(HFLM):  # type: ignore[misc]
    """``HFLM`` whose likelihood passes store the state after every token.

    Args:
        state_mode: ``per_token``, or ``decode_only``: the state stays in float until the end of a request's context.
        **options: As for ``HFLM``.
    """

    def __init__(self, *, state_mode: StateMode = "per_token", **options: Any) -> None:
        super().__init__(**options)
        self.state_mode = state_mode
        # input row → tokens of its context
        self._prompts: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        if self.state_mode == "decode_only":
            for _, context, continuation in requests:
                row = (context + continuation)[-(self.max_length + 1) :][:-1]
                self._prompts[tuple(row)] = max(1, len(row) + 1 - len(continuation))
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._prompts.clear()

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with recurrent_evaluation(self.model, self._prompt(inps)):
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _prompt(self, inps: Tensor) -> int | Tensor:
        """Context length of every row; rows are padded on the right."""
        if not self._prompts:
            return 1
        lengths = sorted({len(row) for row in self._prompts}, reverse=True)
        found = []
        for row in inps.tolist():
            known = (self._prompts.get(tuple(row[:length])) for length in lengths)
            found.append(next((prompt for prompt in known if prompt is not None), 1))
        return torch.tensor(found)
