"""The model under training with its reference: all weights, or adapters on frozen (possibly packed) ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.nn import lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Policy:
    """A causal language model, the parameters that move, and the policy it started from.

    The reference is always this model as it was when training began, never another one: for adapters the same frozen
    weights with the adapters' first values (a new adapter's first values change nothing), for full weights a copy. A
    model that was quantized is therefore held to its quantized self and not to an original.

    Args:
        model: On its device.
        trainable: Parameter name → parameter; all floating parameters if None.
    """

    def __init__(self, model: PreTrainedModel, trainable: dict[str, nn.Parameter] | None = None) -> None:
        self.model = model.eval()
        self.adapted = trainable is not None
        if trainable is None:
            trainable = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.trainable = trainable
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        self._start = {name: p.detach().clone() for name, p in trainable.items()} if self.adapted else {}
        self._copy: Any = None if self.adapted else copy.deepcopy(model).requires_grad_(False).eval()

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference policy, without gradients."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
            else:
                with lora.switched(self.model, self._start):
                    yield self.model

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, T]`` → ``[B, T, V]``; entry t predicts token t + 1."""
        found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def reference_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The same under the reference."""
        with self.reference() as model:
            found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found
