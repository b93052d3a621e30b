"""Mixtures of experts that transformers writes otherwise than the rest, in the form of all others.

Llama 4's routing weights multiply what experts read, not what they write. transformers gives every token to every
expert, times a score that is zero for all but the chosen ones, and its router returns the scores of all. The classes
here compute the same with the chosen experts alone, packed or not, and their router returns logits, weights and experts
as others do. Gemma 4's router returns probabilities in the place of logits; the class here returns logits.

Legend: T tokens, H hidden, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.nn.expert_loop import run_experts

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_scaled_inputs(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run experts on inputs times their weights.

    Args:
        experts: A function of inputs, experts and weights that multiplies outputs, as of other families.
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, k]``, ``E`` marks a skipped slot.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``, the plain sum of what a token's experts write.
    """
    rows = (hidden_states.unsqueeze(1) * top_k_weights.unsqueeze(-1).to(hidden_states)).flatten(0, 1)
    written = experts(rows, top_k_index.reshape(-1, 1), torch.ones_like(rows[:, :1]))
    return written.unflatten(0, tuple(top_k_index.shape)).sum(1)


def adapt_mixtures(model: Any, layout: ModelLayout) -> None:
    """Make routers, experts and mixtures of such a model behave as those of other families, in place.

    Nothing happens to other models. Harmless when repeated.

    Args:
        model: A transformers causal language model of this layout.
        layout: Its layout.
    """
    # Llama 4 names an attribute here that causal models do not have, whether they have experts or not
    if not hasattr(model, model.base_model_prefix) and hasattr(model, "model"):
        model.base_model_prefix = "model"
    for sublayer in (sublayer for block in layout.blocks for sublayer in block.sublayers):
        bank = sublayer.experts
        if bank is None:
            continue
        names = sublayer.module, bank.router.module, bank.module
        if bank.scales_inputs:
            for name, own in zip(names, _llama4()):
                _become(model.get_submodule(name), own)
        elif bank.router.normed:
            _become(model.get_submodule(bank.router.module), _gemma4())


def _become(module: nn.Module, own: type[nn.Module]) -> None:
    """Give a module of transformers' class another forward; packed experts stay what they are."""
    if isinstance(module, own.__bases__[0]):
        module.__class__ = own


@cache
def _gemma4() -> type[nn.Module]:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    class NormedRouter(Gemma4TextRouter):
        """Softmax over all, the best of them divided by their sum, times a factor of each expert."""

        def entered(self, hidden_states: Tensor) -> Tensor:
            """What the matrix reads of ``[T, H]``."""
            return self.norm(hidden_states) * self.scale * self.scalar_root_size

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            """Logits ``[T, E]``, weights ``[T, k]`` and experts int64 ``[T, k]``."""
            logits = self.proj(self.entered(hidden_states))
            weights, index = logits.softmax(-1, dtype=torch.float32).topk(self.config.top_k_experts, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights * self.per_expert_scale[index], index

    return NormedRouter


@cache
def _llama4() -> tuple[type[nn.Module], type[nn.Module], type[nn.Module]]:
    from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts, Llama4TextMoe

    class ScaledMixture(Llama4TextMoe):
        """Shared expert plus routed ones."""

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            """Outputs like the inputs ``[S, L, H]``, and router logits ``[T, E]``."""
            x = hidden_states.reshape(-1, self.hidden_dim)
            logits, weights, index = self.router(x)
            return (self.shared_expert(x) + self.experts(x, index, weights)).view_as(hidden_states), logits

    class ScaledRouter(Llama4Router):
        """Sigmoids of the largest logits."""

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            """Logits ``[T, E]``, weights ``[T, k]`` and experts int64 ``[T, k]``."""
            logits = nn.functional.linear(hidden_states, self.weight, self.bias)
            best, index = logits.topk(self.top_k, dim=-1)
            return logits, best.float().sigmoid().to(logits.dtype), index

    class ScaledExperts(Llama4TextExperts):
        """Stacked experts, of which the chosen ones run."""

        # as transformers marks other experts
        has_gate, has_bias, has_post_expert_norm, is_transposed = True, False, False, True

        def _apply_gate(self, inner: Tensor) -> Tensor:
            gate, up = inner.chunk(2, dim=-1)
            return self.act_fn(gate) * up

        def forward(  # type: ignore[override]
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            """``[T, H]`` for ``[T, H]``, experts ``[T, k]`` and their weights."""

            def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                return run_experts(self, x, index, weights)

            return on_scaled_inputs(run, hidden_states, top_k_index, top_k_weights)

    return ScaledMixture, ScaledRouter, ScaledExperts
