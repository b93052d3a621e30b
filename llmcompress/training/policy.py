"""The model under training with its reference: all weights, or adapters on frozen (possibly packed) ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from llmcompress.distributed.world import ALONE, World
from llmcompress.errors import UsageError
from llmcompress.evaluation.sampling import sample
from llmcompress.nn import lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.training.vllm_writer import VllmWriter

# prompts, how, end token, padding, seed, processes → responses; see llmcompress.evaluation.sampling.sample
Write = Callable[..., list[list[int]]]


def recompute_blocks(model: nn.Module) -> None:
    """Let every block compute its inside again in the backward pass (Chen et al., arXiv 1604.06174).

    transformers' own switch asks for training mode, which would turn dropout on.

    Raises:
        UsageError: The model has no blocks that transformers would do it for.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"recompute: {type(model).__name__} has no blocks that can be computed again", "recompute: false"
        )
    for block in blocks:
        block.forward = partial(_again, block.forward)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class Policy:
    """A causal language model, the parameters that move, and the policy it started from.

    The reference is always this model as it was when training began, never another one: for adapters the same frozen
    weights with the adapters' first values (a new adapter's first values change nothing), for full weights a copy. A
    model that was quantized is therefore held to its quantized self and not to an original.

    Args:
        model: On its device.
        trainable: Parameter name → parameter; all floating parameters if None.
        compute: Type of matrix products where it is not the parameters': weights that are trained stay in float32,
            because updates of a fine-tuning are smaller than the steps of a 16-bit type.
        world: The processes that train together; each holds the whole model.
        recompute: Keep of each block what goes into it and compute the rest again in the backward pass: less memory for
            a third more arithmetic, and the same gradients.

    Attributes:
        sampler: Who writes its responses instead of our own decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: dict[str, nn.Parameter] | None = None,
        compute: torch.dtype = torch.float32,
        world: World = ALONE,
        recompute: bool = False,
    ) -> None:
        self.world = world
        self.sampler: VllmWriter | None = None
        self.model = model.eval()
        self.compute = compute
        self.adapted = trainable is not None
        if trainable is None:
            trainable = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.trainable = trainable
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        self._start = {name: p.detach().clone() for name, p in trainable.items()} if self.adapted else {}
        self._copy: Any = None
        if not self.adapted:
            frozen: Any = copy.deepcopy(model).requires_grad_(False)
            self._copy = frozen.to(compute).eval()
        self._writer: Any = None
        if recompute:
            # the copies above keep their forward: no gradient passes through them
            recompute_blocks(model)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Matrix products in the compute type inside the ``with`` block."""
        if self.compute == torch.float32:
            yield
            return
        device = next(iter(self.trainable.values())).device.type
        with torch.autocast(device, dtype=self.compute):
            yield

    @contextmanager
    def writer(self) -> Iterator[Any]:
        """The policy for writing responses, without gradients.

        Trained weights in float32 would be converted for every token: where the products are of another type, a copy
        in that type is written from them here, once a round of sampling, always at the same addresses.
        """
        if self._copy is None or self.compute == torch.float32:
            with torch.no_grad(), self.precision():
                yield self.model
            return
        if self._writer is None:
            self._writer = copy.deepcopy(self._copy)
        with torch.no_grad():
            for own, copied in zip(self.model.parameters(), self._writer.parameters(), strict=True):
                copied.copy_(own)
            yield self._writer

    @contextmanager
    def responding(self, start: bool = False) -> Iterator[Write]:
        """What writes responses of the policy.

        Args:
            start: Of the policy as it was when training began, and still is: nothing is trained yet.
        """
        if self.sampler is not None:
            with self.sampler.awake() as write:
                yield write
            return
        with self.reference() if start else self.writer() as model:
            yield partial(sample, model)

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
        with self.precision():
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def reference_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The same under the reference."""
        with self.precision(), self.reference() as model:
            found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found
