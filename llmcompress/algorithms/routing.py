"""How each router family turns logits into experts and weights: the plain twin of the model's own code.

Calibration needs the choice alone, skipping with re-routing needs choice and weights; both are
compared with every family's transformers router in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Phi-MoE takes softmax over the logits within twice this relative distance of the best one
PHI_JITTER = 0.01


@dataclass(frozen=True)
class RouterRule:
    """How a family turns logits into experts and weights.

    Attributes:
        top_k: Experts per token.
        kind: ``softmax_topk``, ``topk_softmax`` (gpt_oss), ``sigmoid_group_topk`` (DeepSeek-V3)
            or ``sparsemixer`` (Phi-MoE).
        renormalizes: Whether the chosen weights are divided by their sum.
        scale: Constant that multiplies the weights.
        correction: float ``[N]`` added to sigmoid or softmax for the choice only.
        groups: Number of expert groups; 1 means no group limit.
        top_groups: Groups a token may choose from.
        jitter: Phi-MoE's jitter, which sets how far its sparse softmax reaches.
        floor: Added to the sum by which weights are divided.
        factors: float ``[N]`` that multiply the weights of experts, None without (Gemma 4).
    """

    top_k: int
    kind: str = "softmax_topk"
    renormalizes: bool = False
    scale: float = 1.0
    correction: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    jitter: float = PHI_JITTER
    floor: float = 1e-20
    factors: Tensor | None = None

    @classmethod
    def of(cls, router: Any, view: Any, top_k: int, correction: Tensor | None = None) -> RouterRule:
        """Read the rule of a transformers router module.

        Args:
            router: The module; ``num_group``, ``topk_group``, ``topk_method``, ``router_jitter_noise`` and
                ``per_expert_scale`` are used where they exist.
            view: The layout's ``RouterView`` (``kind``, ``renormalizes``, ``scale``, ``floor``).
            top_k: Experts per token.
            correction: float ``[N]``, see above.
        """
        sigmoid = view.kind == "sigmoid_group_topk"
        grouped = sigmoid or getattr(router, "topk_method", "greedy") == "group_limited_greedy"
        groups = int(getattr(router, "num_group", 1) or 1) if grouped else 1
        return cls(
            top_k=top_k,
            kind=view.kind,
            renormalizes=view.renormalizes,
            scale=float(view.scale),
            correction=correction,
            groups=groups,
            top_groups=int(getattr(router, "topk_group", 1) or 1) if groups > 1 else 1,
            jitter=float(getattr(router, "router_jitter_noise", PHI_JITTER)),
            floor=float(view.floor),
            factors=getattr(router, "per_expert_scale", None),
        )

    @property
    def conserves(self) -> bool:
        """Whether a token's weights always sum to the same, so that dropping one raises the others."""
        return self.renormalizes or self.kind == "topk_softmax"

    def scores(self, logits: Tensor) -> Tensor:
        """What experts are ranked by, float32 ``[T, N]``; no group limit."""
        # in the order of the logits, which sigmoids of large ones lose
        if self.correction is None and (self.kind != "sigmoid_group_topk" or self.groups == 1):
            return logits.float()
        scores = logits.float().sigmoid() if self.kind == "sigmoid_group_topk" else logits.float().softmax(-1)
        return scores if self.correction is None else scores + self.correction.to(scores)

    def select(self, logits: Tensor, banned: Tensor | None = None) -> Tensor:
        """The experts this router chooses, group limit included.

        Args:
            logits: ``[T, N]``.
            banned: bool ``[T, N]``, experts a token may not use.

        Returns:
            int64 ``[T, k]``, best first.
        """
        if banned is None:
            scores = self.scores(logits)
        else:
            scores = self.scores(logits.float().masked_fill(banned, -math.inf)).masked_fill(banned, -math.inf)
        if self.groups > 1:
            by_group = scores.unflatten(-1, (self.groups, -1))
            sigmoid = self.kind == "sigmoid_group_topk"
            strength = by_group.topk(2, dim=-1).values.sum(-1) if sigmoid else by_group.amax(-1)
            best = strength.topk(self.top_groups, dim=-1).indices
            allowed = torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, best, True)
            scores = by_group.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2)
        return scores.topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, index: Tensor, banned: Tensor | None = None) -> Tensor:
        """The weights this router gives to chosen experts.

        Args:
            logits: ``[T, N]``.
            index: int64 ``[T, k]`` from :meth:`select`.
            banned: bool ``[T, N]``, left out of every softmax.

        Returns:
            float32 ``[T, k]``.
        """
        logits = logits.float() if banned is None else logits.float().masked_fill(banned, -math.inf)
        if self.kind == "sparsemixer":
            return self._sparsemixer(logits, index)
        if self.kind == "topk_softmax":
            return logits.gather(-1, index).softmax(-1)
        dense = logits.sigmoid() if self.kind == "sigmoid_group_topk" else logits.softmax(-1)
        weights = dense.gather(-1, index)
        if self.renormalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + self.floor)
        factors = self.factors_of(index)
        return weights * self.scale if factors is None else weights * self.scale * factors

    def factors_of(self, index: Tensor) -> Tensor | None:
        """Factors ``[T, k]`` of chosen experts, by which their weights are off from shares of one sum; None without."""
        return None if self.factors is None else self.factors.detach().to(index.device)[index]

    def _sparsemixer(self, logits: Tensor, index: Tensor) -> Tensor:
        """Each chosen expert's softmax share among the logits near it, earlier choices left out."""
        weights = []
        for slot in range(index.shape[-1]):
            chosen = index[:, slot : slot + 1]
            best = logits.gather(-1, chosen)
            reach = logits.abs().clamp(min=best)
            near = logits.masked_fill((best - logits) / reach > 2 * self.jitter, -math.inf)
            if slot:
                near = near.scatter(-1, index[:, :slot], -math.inf)
            weights.append(near.softmax(-1).gather(-1, chosen))
        return torch.cat(weights, -1)
