"""PESF at run time: hooks that take rarely used experts out of a loaded model's routing.

A pre-hook on the base model learns the attention mask, one on each MoE block learns batch and
length, and a forward hook on each router rewrites ``(logits, weights, indices)``. A skipped slot
carries weight 0 and the index ``E``; :class:`~llmcompress.nn.experts.PackedExperts` computes nothing
for it, and dense transformers experts are switched to :func:`sentinel_experts_forward`, which does
the same.

The key-value cache of a prompt is produced by the thinned layers, so the tokens generated after it
depend on the policy even with ``decode: off``. With chunked prefill each chunk is counted alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.algorithms.expert_skipping import (
    Drop,
    SkipOptions,
    drop_weakest,
    expert_counts,
    rarely_used,
    shortest_useful,
    skip_experts,
)
from llmcompress.algorithms.routing import RouterRule
from llmcompress.errors import InputError
from llmcompress.models.layout import ExpertBank, ModelLayout
from llmcompress.models.router import Router
from llmcompress.nn.expert_loop import run_experts

IMPLEMENTATION = "llmcompress"
COUNTERS = ("slots", "slots_dropped", "experts_used", "experts_skipped", "tokens", "tokens_without_expert")


@dataclass(frozen=True)
class SkippingPolicy:
    """The saved form of the ``pesf`` recipe section; see ``stages/pesf.py`` for the meaning of each field."""

    method: str = "pesf"
    alpha: float = 0.3
    scope: str = "sequence"
    fallback: str = "none"
    keep_top1: bool = False
    renormalize: str = "auto"
    decode: str = "off"
    min_len: int | str = "auto"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SkippingPolicy:
        """Read a saved policy.

        Raises:
            InputError: A field is unknown or a value is outside what this version understands.
        """
        allowed = {
            "method": ("pesf", "top_k_minus_one"),
            "scope": ("sequence", "batch"),
            "fallback": ("none", "reroute"),
            "renormalize": ("auto", "yes", "no"),
            "decode": ("off", "sticky"),
        }
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        wrong = [f"{key}={data[key]!r}" for key, words in allowed.items() if key in data and data[key] not in words]
        if unknown or wrong:
            raise InputError(
                f"quantization_config.policies.pesf: not understood: {', '.join(unknown + wrong)}",
                "the model was saved by another version of llmcompress: upgrade, or remove the policy",
            )
        policy = cls(**data)
        if not 0 < policy.alpha <= 1:
            raise InputError(f"quantization_config.policies.pesf.alpha: {policy.alpha} is not in (0, 1]")
        return policy


def sentinel_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts function of transformers that computes nothing for slots with index ``E``.

    Without such a slot it hands over to the implementation that was active before, so that a policy
    that does not act changes no bit.

    Args:
        self: A transformers experts module (decorated with ``use_experts_implementation``).
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, k]``, ``E`` marks a skipped slot.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``; zero rows for tokens without an expert.
    """
    flags: Any = self
    if not bool((top_k_index >= flags.num_experts).any()):
        return _previous(flags)(flags, hidden_states, top_k_index, top_k_weights)
    return run_experts(flags, hidden_states, top_k_index, top_k_weights)


def _previous(experts: Any) -> Any:
    """The experts function that was active before the policy was attached."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = getattr(experts, "llmcompress_previous", None)
    return ALL_EXPERTS_FUNCTIONS.get(name, type(experts).forward.__wrapped__)


def register_experts_function() -> None:
    """Make ``experts_implementation="llmcompress"`` known to transformers; harmless when repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sentinel_experts_forward)


@dataclass
class _LayerState:
    """One MoE block under the policy."""

    bank: ExpertBank
    rule: RouterRule
    shape: tuple[int, int] = (1, 1)
    counters: dict[str, Tensor | int] = field(default_factory=dict)
    sticky: Tensor | None = None

    def count(self, **values: Tensor | int) -> None:
        """Add to the counters without waiting for the device."""
        for name, value in values.items():
            self.counters[name] = self.counters.get(name, 0) + value


class SkippingController:
    """The attached policy: owns the hooks, the counters and the way back.

    Made by :func:`attach`; ``model.llmcompress_skipping`` refers to it while it is attached.
    """

    def __init__(self, model: Any, layout: ModelLayout, policy: SkippingPolicy) -> None:
        self.policy = policy
        self.seconds = 0.0
        self.calls = {"prefill": 0, "short": 0, "decode": 0}
        self._model = model
        self._mask: Tensor | None = None
        self._lengths: Tensor | None = None
        self._phase = "prefill"
        # by number of the block
        self._layers: dict[int, _LayerState] = {}
        self._handles: list[Any] = [model.base_model.register_forward_pre_hook(self._enter_model, with_kwargs=True)]
        for number, block in enumerate(layout.blocks):
            for sublayer in block.sublayers:
                if sublayer.experts is not None:
                    self._layers[number] = self._hook_layer(sublayer.module, sublayer.experts)
        self._implementation = model.config._experts_implementation
        self._use_sentinel_experts()

    def _hook_layer(self, block: str, bank: ExpertBank) -> _LayerState:
        router = Router(self._model, bank.router)
        layer = _LayerState(bank, router.rule(bank.top_k))

        def enter(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            layer.shape = (hidden.shape[0], hidden.shape[1])

        def rewrite(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            return self._rewrite(layer, *output)

        self._handles.append(self._model.get_submodule(block).register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(router.module.register_forward_hook(rewrite))
        return layer

    def _use_sentinel_experts(self) -> None:
        """Switch dense transformers experts to the function that knows the sentinel."""
        # those whose inputs are scaled know it
        if all(layer.bank.scales_inputs for layer in self._layers.values()):
            return
        register_experts_function()
        for layer in self._layers.values():
            experts = self._model.get_submodule(layer.bank.module)
            if hasattr(experts, "is_transposed"):
                experts.llmcompress_previous = self._implementation
        if self._implementation != IMPLEMENTATION:
            self._model.set_experts_implementation(IMPLEMENTATION)

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the phase and which positions are padding."""
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0]
        batch, length = tokens.shape[:2]
        self.enter(length)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        usable = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= length
        self._mask = mask[:, -length:].bool() if usable and isinstance(mask, Tensor) else None
        if self._mask is None and self._lengths is not None and len(self._lengths) == batch:
            self._mask = torch.arange(length) < self._lengths[:, None]

    def enter(self, length: int) -> None:
        """Note and count what kind of pass begins, over this many positions; the model's modules do it themselves."""
        self._phase = "prefill" if length > 1 else "decode"
        if self._phase == "decode":
            self.calls["decode"] += 1
        elif self.policy.method == "pesf" and not self.acts_on(length):
            self.calls["short"] += 1
        else:
            self.calls["prefill"] += 1

    def acts_on(self, length: int) -> bool:
        """Whether the policy looks at a prompt of this many tokens at all."""
        return length >= max(2, self._min_len())

    def prompt(self, length: int) -> Callable[[int, Tensor, Tensor, Tensor], None] | None:
        """The policy for one prompt that does not go through the model's modules.

        Args:
            length: Its tokens, one sequence without padding.

        Returns:
            A function of the block's number, router logits ``[T, E]``, weights ``[T, k]`` and experts int32 ``[T, k]``,
            that changes the last two in place: experts ascending, ``E`` in empty slots. None where the policy does not
            look at the prompt. Statistics count it in any case.
        """
        self._mask = None
        self.enter(length)
        if not self.acts_on(length):
            return None

        def reroute(block: int, logits: Tensor, weights: Tensor, index: Tensor) -> None:
            layer = self._layers[block]
            layer.shape = (1, length)
            # in the order of the modules' routers, which decides among equal weights (sparsemixer's are often 1)
            chosen = index.long()
            order = logits.gather(-1, chosen).argsort(dim=-1, descending=True, stable=True)
            _, shares, chosen = self._rewrite(layer, logits, weights.gather(-1, order), chosen.gather(-1, order))
            experts, order = chosen.sort(dim=-1)
            index.copy_(experts)
            weights.copy_(shares.gather(-1, order))

        return reroute

    @contextmanager
    def padded(self, lengths: Tensor) -> Iterator[None]:
        """Inside, rows of passes without an attention mask end after this many tokens, with padding behind.

        Causal attention needs no mask for that, and counting experts does.

        Args:
            lengths: int64 ``[B]``, on the CPU.
        """
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def _min_len(self) -> int:
        """Shortest prompt the policy looks at."""
        if isinstance(self.policy.min_len, int):
            return self.policy.min_len
        if self.policy.method == "top_k_minus_one":
            return 2
        banks = [layer.bank for layer in self._layers.values()]
        return min(shortest_useful(self.policy.alpha, bank.top_k, bank.num_experts) for bank in banks) + 1

    def _rewrite(self, layer: _LayerState, logits: Tensor, weights: Tensor, index: Tensor) -> Any:
        began = time.perf_counter()
        drop = self._decide(layer, logits, weights, index)
        self.seconds += time.perf_counter() - began
        return (logits, weights, index) if drop is None else (logits, drop.weights, drop.index)

    def _decide(self, layer: _LayerState, logits: Tensor, weights: Tensor, index: Tensor) -> Drop | None:
        """Apply the policy to one layer's routing; None means that nothing changes."""
        policy, bank = self.policy, layer.bank
        batch, length = layer.shape
        if self._phase == "decode" and policy.decode == "off":
            return None
        options = self._options(layer)
        valid = torch.ones(batch * length, dtype=torch.bool, device=index.device)
        if self._mask is not None and self._mask.shape == (batch, length):
            valid = self._mask.reshape(-1).to(index.device)
        if policy.method == "top_k_minus_one":
            if self._phase == "prefill" and not self.acts_on(length):
                return None
            drop = drop_weakest(weights, index, bank.num_experts, options, layer.rule.factors_of(index))
            self._count(layer, index, drop, valid)
            return drop
        banned = self._banned(layer, index, valid)
        if banned is None:
            return None
        drop = skip_experts(logits, weights, index, banned, layer.rule, options)
        self._count(layer, index, drop, valid)
        return drop

    def _banned(self, layer: _LayerState, index: Tensor, valid: Tensor) -> Tensor | None:
        """Experts skipped for each token, bool ``[T, E]``, or None where nothing can be."""
        policy, bank = self.policy, layer.bank
        batch, length = layer.shape
        groups = batch if policy.scope == "sequence" else 1
        group = torch.zeros(batch * length, dtype=torch.int64, device=index.device)
        if groups > 1:
            group = torch.arange(batch, device=index.device).repeat_interleave(length)
        if self._phase == "decode":
            sticky = layer.sticky
            if sticky is None or sticky.shape[0] not in (groups, batch):
                return None
            # sequences whose prompts came at different times have decisions of their own in any scope
            return sticky[group] if sticky.shape[0] == groups else sticky.repeat_interleave(length, 0)
        layer.sticky = None
        if not self.acts_on(length):
            return None
        counts = expert_counts(index, valid, group, groups, bank.num_experts)
        lengths = torch.zeros(groups, dtype=torch.int64, device=index.device).scatter_add_(0, group, valid.long())
        banned = rarely_used(counts, lengths, bank.top_k, policy.alpha)
        if policy.scope == "sequence":
            # a short prompt is left alone in the company of longer ones as well
            banned &= (lengths >= self._min_len()).unsqueeze(-1)
        used = counts > 0
        layer.count(experts_used=used.sum(), experts_skipped=(used & banned).sum())
        if policy.decode == "sticky":
            layer.sticky = banned
        return banned[group]

    def decisions(self) -> list[Tensor | None]:
        """What the last prompt's decision bans for the tokens after it, bool ``[1 or S, E]`` a layer."""
        return [layer.sticky for layer in self._layers.values()]

    def recall(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        """Set what the next step goes by, where sequences were prompted one by one.

        Args:
            rows: What :meth:`decisions` gave after the prompt of each sequence, in the order of the batch.
        """
        for number, layer in enumerate(self._layers.values()):
            found = [row[number] for row in rows]
            known = next((one for one in found if one is not None), None)
            nothing = None if known is None else torch.zeros_like(known)
            parts = [nothing if one is None else one for one in found]
            layer.sticky = None if known is None else torch.cat([part for part in parts if part is not None])

    def _options(self, layer: _LayerState) -> SkipOptions:
        auto = layer.rule.conserves
        renormalize = auto if self.policy.renormalize == "auto" else self.policy.renormalize == "yes"
        fallback: Any = self.policy.fallback
        return SkipOptions(self.policy.alpha, fallback, self.policy.keep_top1, renormalize)

    @staticmethod
    def _count(layer: _LayerState, index: Tensor, drop: Drop, valid: Tensor) -> None:
        empty = drop.index >= layer.bank.num_experts
        layer.count(
            slots=valid.sum() * index.shape[-1],
            slots_dropped=(drop.dropped & valid.unsqueeze(-1)).sum(),
            tokens=valid.sum(),
            tokens_without_expert=(empty.all(-1) & valid).sum(),
        )

    @staticmethod
    def _totals(layer: _LayerState) -> dict[str, int]:
        return {name: int(layer.counters.get(name, 0)) for name in COUNTERS}

    def statistics(self) -> dict[str, Any]:
        """What the policy did since it was attached or reset, as JSON data.

        ``experts_used`` counts experts that would have run, once per layer, sequence (or batch) and
        call; ``experts_skipped`` those of them that did not. ``seconds`` is the time spent deciding,
        not the time saved, which only a benchmark can tell.
        """
        counted = [self._totals(layer) for layer in self._layers.values()]
        total = {name: sum(values[name] for values in counted) for name in COUNTERS}
        return {
            "policy": {name: getattr(self.policy, name) for name in SkippingPolicy.__dataclass_fields__},
            "calls": dict(self.calls),
            "seconds": self.seconds,
            "total": total,
            "expert_skip_rate": total["experts_skipped"] / max(1, total["experts_used"]),
            "slot_drop_rate": total["slots_dropped"] / max(1, total["slots"]),
            "layers": [{"module": s.bank.module, **values} for s, values in zip(self._layers.values(), counted)],
        }

    def reset(self) -> None:
        """Set all counters to zero and forget sticky decisions."""
        self.seconds = 0.0
        self.calls = dict.fromkeys(self.calls, 0)
        for layer in self._layers.values():
            layer.counters.clear()
            layer.sticky = None

    def detach(self) -> None:
        """Remove the hooks and restore the experts implementation; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model.config._experts_implementation != self._implementation:
            self._model.set_experts_implementation(self._implementation or "eager")
            # None is a legal value in transformers but not for its setter
            self._model.config._experts_implementation = self._implementation
        for layer in self._layers.values():
            experts = self._model.get_submodule(layer.bank.module)
            if hasattr(experts, "llmcompress_previous"):
                del experts.llmcompress_previous
        if getattr(self._model, "llmcompress_skipping", None) is self:
            del self._model.llmcompress_skipping


def attach(model: Any, layout: ModelLayout, policy: Mapping[str, Any]) -> SkippingController:
    """Make a loaded model follow a PESF policy until :meth:`SkippingController.detach`.

    Args:
        model: A transformers causal language model, dense or with packed experts.
        layout: Its layout.
        policy: The saved policy (``policies["pesf"]``).

    Raises:
        InputError: The policy is not understood, the model has no experts, or one is attached already.
    """
    parsed = SkippingPolicy.from_dict(policy)
    if all(block.bank is None for block in layout.blocks):
        raise InputError(f"{layout.model_type} has no experts, so an expert-skipping policy has nothing to act on")
    if getattr(model, "llmcompress_skipping", None) is not None:
        raise InputError("the model already follows a skipping policy", "detach it first")
    controller = SkippingController(model, layout, parsed)
    model.llmcompress_skipping = controller
    return controller
