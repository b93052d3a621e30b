"""ESR-style reconstruction: tune a selective state-space block to the states it will really have.

Q-Mamba (Chen et al., Findings of ACL 2025) restores the *selective* ability of a model with quantized states by
block-wise reconstruction. How was not to be had; objective, engines, parameters and schedule here are this
project's (``PAPERS.md``). One head of Mamba-2 with a state that is stored after it was read::

    u_t = a_t ĥ_{t-1} + x_t ⊗ B_t        y_t = u_t C_t        ĥ_t = Q(u_t)                       (1)

``a_t = exp(dt_t A)``; ``x_t`` already holds the factor ``dt_t``; ``D`` and gate are outside. Q makes the recurrence
non-linear, so it must be stepped through, but its straight-through gradient (dQ/du = 1) is that of a linear one.
With ``e_t = Q(u_t) - u_t``::

    ĥ_t = a_t ĥ_{t-1} + (x_t ⊗ B_t + e_t)       E_t = ĥ_t - h_t = a_t E_{t-1} + e_t              (2)

Two engines give that value and that gradient. ``inject`` finds ``e_t`` without gradients and puts it into a
differentiable parallel scan. ``fused`` steps through (1) once and walks the adjoint ``λ_t = dL/du_t`` backwards::

    λ_t = dy_t ⊗ C_t + a_{t+1} λ_{t+1}    dC_t = dy_t u_t    dx_t = λ_t B_t    dB_t = x_t λ_t    da_t = <λ_t, ĥ_{t-1}>

Simulations that leave out recirculation (quantize at chunk ends, or only for the read-out) are 2 to 15 times
too optimistic and are not offered.

Legend: S sequences, T tokens, H heads, P channels of a head, N states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.algorithms.decoupled_scales import fake_quantize
from llmcompress.quant.states import StateSpec

Engine = Literal["inject", "fused"]
# tokens between two kept states of the fused engine; those between are stepped through again in the backward pass
SEGMENT = 32


@dataclass(frozen=True, slots=True)
class Rounder:
    """What a state becomes by being stored.

    Attributes:
        spec: Codec and width; must round to nearest.
        static: fp16 ``[H, P]`` or ``[H, N]`` calibrated scale of the codecs that have one.
        head_bits: int ``[H]`` widths per head, or None.
        window: Tokens between two roundings (replay window); 1 rounds at every token. The first token is rounded, as
            in evaluation (``nn/mixers.py``), where it stands for the prompt.
    """

    spec: StateSpec
    static: Tensor | None = None
    head_bits: Tensor | None = None
    window: int = 1

    def heads(self, which: slice) -> Rounder:
        """The rounder of some heads."""
        static = None if self.static is None else self.static[which]
        bits = None if self.head_bits is None else self.head_bits[which]
        return Rounder(self.spec, static, bits, self.window)

    @property
    def has_kernel(self) -> bool:
        """Whether the operator ``selective_scan_q`` stores states in this way."""
        return not self.spec.active or self.spec.has_kernel

    def kernel_scan(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """:func:`scan` by the operator, where :attr:`has_kernel`; one state per segment is kept for the adjoint."""
        from llmcompress_kernels.reference.state import FLOAT_BITS
        from llmcompress_kernels.state import selective_scan_q

        heads, channels = x.shape[2:]
        bits = torch.full((heads,), self.spec.bits if self.spec.active else FLOAT_BITS, dtype=torch.int32)
        if self.head_bits is not None and self.spec.active:
            bits = self.head_bits.to(torch.int32)
        start = x.new_zeros((x.shape[0], heads, channels, b.shape[-1]))
        static = self.static if self.spec.active else None
        how = (static, 1, self.window, self.spec.refit, self.spec.dither)
        return selective_scan_q(x, a, b, c, start, bits.to(x.device), *how)[0]

    def __call__(self, u: Tensor, step: int) -> Tensor:
        """The stored state ``[S, H, P, N]`` after token ``step``, without gradient."""
        if not self.spec.active or step % self.window:
            return u.detach()
        return fake_quantize(u.detach(), self.spec, self.static, None, self.head_bits)


def scan_loop(x: Tensor, a: Tensor, b: Tensor, c: Tensor, rounder: Rounder) -> Tensor:
    """Equation (1) token by token with a straight-through estimator: the definition of both engines.

    Args:
        x: fp32 ``[S, T, H, P]``, multiplied by dt.
        a: fp32 ``[S, T, H]`` decay in ``(0, 1]``.
        b: fp32 ``[S, T, H, N]``.
        c: As ``b``.
        rounder: Stores the state.

    Returns:
        ``[S, T, H, P]``.
    """
    state = x.new_zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
    outputs = []
    for t in range(x.shape[1]):
        fresh = _fresh(state, x, a, b, t)
        outputs.append((fresh * c[:, t, :, None, :]).sum(-1))
        state = fresh + (rounder(fresh, t) - fresh).detach()
    return torch.stack(outputs, 1)


def _fresh(state: Tensor, x: Tensor, a: Tensor, b: Tensor, t: int) -> Tensor:
    """``u_t`` of equation (1), ``[S, H, P, N]``."""
    return a[:, t, :, None, None] * state + x[:, t, :, :, None] * b[:, t, :, None, :]


def rounding_errors(x: Tensor, a: Tensor, b: Tensor, rounder: Rounder) -> Tensor:
    """``e_t`` of equation (2), ``[S, T, H, P, N]``; arguments as in :func:`scan_loop`."""
    state = x.new_zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
    errors = x.new_empty((*x.shape, b.shape[-1]))
    for t in range(x.shape[1]):
        fresh = _fresh(state, x, a, b, t)
        state = rounder(fresh, t)
        errors[:, t] = state - fresh
    return errors


def parallel_scan(a: Tensor, inputs: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + inputs_t`` by doubling, differentiable.

    Args:
        a: ``[S, T, H]``.
        inputs: ``[S, T, H, P, N]``.

    Returns:
        ``[S, T, H, P, N]``.
    """
    gain, value, reach = a[..., None, None], inputs, 1
    while reach < a.shape[1]:
        value = torch.cat((value[:, :reach], value[:, reach:] + gain[:, reach:] * value[:, :-reach]), 1)
        gain = torch.cat((gain[:, :reach], gain[:, reach:] * gain[:, :-reach]), 1)
        reach *= 2
    return value


def scan_inject(x: Tensor, a: Tensor, b: Tensor, c: Tensor, rounder: Rounder) -> Tensor:
    """Engine ``inject``: equation (2) as a parallel scan over inputs with the errors put in. As :func:`scan_loop`."""
    with torch.no_grad():
        errors = rounding_errors(x, a, b, rounder)
    stored = parallel_scan(a, x[..., None] * b[..., None, :] + errors)
    return ((stored - errors) * c[..., None, :]).sum(-1)


class _Fused(torch.autograd.Function):
    """Engine ``fused``; keeps one state per segment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, c: Tensor, rounder: Rounder) -> Tensor:
        state = x.new_zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
        kept, outputs = [], torch.empty_like(x)
        for t in range(x.shape[1]):
            if t % SEGMENT == 0:
                kept.append(state)
            fresh = _fresh(state, x, a, b, t)
            outputs[:, t] = (fresh * c[:, t, :, None, :]).sum(-1)
            state = rounder(fresh, t)
        ctx.rounder = rounder
        ctx.save_for_backward(x, a, b, c, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, a, b, c, *kept = ctx.saved_tensors
        dx, da, db, dc = (torch.empty_like(t) for t in (x, a, b, c))
        adjoint = torch.zeros_like(kept[0])
        for index in reversed(range(len(kept))):
            start, stop = index * SEGMENT, min((index + 1) * SEGMENT, x.shape[1])
            states = _replayed(x, a, b, kept[index], ctx.rounder, start, stop)
            for t in reversed(range(start, stop)):
                before, fresh = states[t - start]
                adjoint = adjoint + grad[:, t, :, :, None] * c[:, t, :, None, :]
                dc[:, t] = (grad[:, t, :, :, None] * fresh).sum(-2)
                dx[:, t] = (adjoint * b[:, t, :, None, :]).sum(-1)
                db[:, t] = (adjoint * x[:, t, :, :, None]).sum(-2)
                da[:, t] = (adjoint * before).sum((-2, -1))
                adjoint = a[:, t, :, None, None] * adjoint
        return dx, da, db, dc, None


def _replayed(
    x: Tensor, a: Tensor, b: Tensor, state: Tensor, rounder: Rounder, start: int, stop: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs ``(ĥ_{t-1}, u_t)`` of a segment, from the state before it."""
    pairs = []
    for t in range(start, stop):
        fresh = _fresh(state, x, a, b, t)
        pairs.append((state, fresh))
        state = rounder(fresh, t)
    return pairs


def scan_fused(x: Tensor, a: Tensor, b: Tensor, c: Tensor, rounder: Rounder) -> Tensor:
    """Engine ``fused``: equation (1) with a hand-written adjoint. Arguments and result as :func:`scan_loop`."""
    out: Tensor = _Fused.apply(x, a, b, c, rounder)
    return out


ENGINES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Rounder], Tensor]] = {
    "inject": scan_inject,
    "fused": scan_fused,
}


def head_blocks(heads: int, sequences: int, tokens: int, channels: int, states: int, budget: int) -> list[slice]:
    """Ranges of heads whose states over all tokens fit into ``budget`` bytes of fp32; at least one head each."""
    one = 4 * sequences * tokens * channels * states
    step = max(1, min(heads, budget // max(1, one)))
    return [slice(i, min(i + step, heads)) for i in range(0, heads, step)]


def scan(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, rounder: Rounder, engine: Engine = "fused", budget: int = 1 << 30
) -> Tensor:
    """Equation (1) with straight-through gradients, in blocks of heads so that memory stays bounded.

    Heads do not depend on each other. ``inject`` keeps every token's state, so its blocks are run again in the
    backward pass instead of being kept.

    Args:
        x: fp32 ``[S, T, H, P]``, multiplied by dt.
        a: fp32 ``[S, T, H]``.
        b: fp32 ``[S, T, G, N]``; head h reads group ``h // (H / G)``.
        c: As ``b``.
        rounder: Stores the state.
        engine: Which engine.
        budget: Bytes for the states of one block of heads.

    Returns:
        ``[S, T, H, P]``.
    """
    if engine == "fused" and rounder.has_kernel:
        return rounder.kernel_scan(x, a, b, c)
    sequences, tokens, heads, channels = x.shape
    share = heads // b.shape[2]
    b, c = b.repeat_interleave(share, 2), c.repeat_interleave(share, 2)
    # the fused engine holds one segment's states twice, inject a few copies of all of them
    held = 2 * SEGMENT if engine == "fused" else 6 * tokens
    run = ENGINES[engine]
    parts = []
    for which in head_blocks(heads, sequences, held, channels, b.shape[-1], budget):
        some = (x[:, :, which], a[:, :, which], b[:, :, which], c[:, :, which])
        mine = rounder.heads(which)
        if engine == "inject" and torch.is_grad_enabled():
            parts.append(torch.utils.checkpoint.checkpoint(run, *some, mine, use_reentrant=False))
        else:
            parts.append(run(*some, mine))
    return torch.cat(parts, 2)


@dataclass(frozen=True, slots=True)
class Objective:
    """What the reconstruction minimises.

    Attributes:
        state_weight: Weight of the error of the scan's output beside that of the block's output.
        warmup: Tokens at the start of a sequence that count ``early`` only: errors need time to build up.
        early: Their weight.
    """

    state_weight: float = 0.1
    warmup: int = 32
    early: float = 0.25

    def loss(self, output: Tensor, target: Tensor, scanned: Tensor, scanned_target: Tensor) -> Tensor:
        """Weighted relative squared error.

        Args:
            output: ``[S, T, D]`` of the quantized block.
            target: The same in full precision.
            scanned: ``[S, T, H, P]`` outputs of the quantized scan.
            scanned_target: The same in full precision.
        """
        loss = _relative(output, target, self._weights(output))
        if self.state_weight:
            loss = loss + self.state_weight * _relative(scanned, scanned_target, self._weights(scanned))
        return loss

    def _weights(self, like: Tensor) -> Tensor:
        weights = torch.ones(like.shape[1], device=like.device)
        weights[: self.warmup] = self.early
        return weights.view(1, -1, *[1] * (like.ndim - 2))


def _relative(value: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return ((value - target).square() * weights).sum() / (target.square() * weights).sum().clamp(min=1e-12)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the parameters of a block are trained.

    Attributes:
        epochs: Passes over the training sequences.
        batch: Sequences of a step.
        held_out: Share of the sequences on which the block is judged.
        clip: Largest norm of the gradient of each parameter group.
        patience: Stop after this many epochs without a better held-out loss.
        rollback: Keep the initial values where the held-out loss did not fall.
        seed: Seed of the order of sequences.
    """

    epochs: int = 10
    batch: int = 4
    held_out: float = 0.125
    clip: float = 1.0
    patience: int = 2
    rollback: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        rate: Learning rate at the start; falls to a tenth along a cosine.
        bound: Largest change of each value: ``bound * max(|value|, 1)``; None without limit.
        names: Keys into the parameters.
    """

    rate: float
    names: tuple[str, ...]
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Result of :func:`reconstruct`.

    Attributes:
        kept: Whether the trained values were kept.
        before, after: Held-out loss with initial and with final values.
        losses: Held-out loss after each epoch.
        training: Mean training loss of each epoch.
    """

    kept: bool
    before: float
    after: float
    losses: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "kept": self.kept,
            "before": self.before,
            "after": self.after,
            "epochs": self.losses,
            "training": self.training,
        }


def split(sequences: int, held_out: float) -> tuple[list[int], list[int]]:
    """Training and held-out sequences, evenly interleaved; at least one of each."""
    held = [i for i in range(sequences) if int((i + 1) * held_out) > int(i * held_out)] or [sequences - 1]
    return [i for i in range(sequences) if i not in held] or held, held


def reconstruct(
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    loss: Callable[[list[int]], Tensor],
    sequences: int,
    schedule: Schedule,
) -> Reconstruction:
    """Train parameters in place by AdamW on a block's loss; roll back where the held-out loss did not improve.

    Args:
        parameters: Leaf tensors the loss depends on.
        groups: Which are trained and how fast.
        loss: Loss of some sequences, given by index.
        sequences: How many there are.
        schedule: Epochs, batches, judgement.

    Returns:
        What happened; the best values seen on the held-out sequences are in place.
    """
    train, held = split(sequences, schedule.held_out)
    chosen = [name for group in groups for name in group.names]
    initial = {name: parameters[name].detach().clone() for name in chosen}
    for name in chosen:
        parameters[name].requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[n] for n in group.names], "lr": group.rate} for group in groups if group.names],
        weight_decay=0.0,
    )
    steps = schedule.epochs * -(-len(train) // schedule.batch)
    # along a cosine, to a tenth
    fall = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    before = best = judged(loss, held, schedule.batch)
    best_values, losses, training, worse = initial, [], [], 0
    for epoch in range(schedule.epochs):
        seen = []
        for rows in _batches(train, schedule.batch, schedule.seed + epoch):
            value = loss(rows)
            value.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], schedule.clip)
            optimizer.step()
            fall.step()
            optimizer.zero_grad(set_to_none=True)
            _bound(parameters, groups, initial)
            seen.append(float(value.detach()))
        training.append(sum(seen) / len(seen))
        losses.append(judged(loss, held, schedule.batch))
        if losses[-1] < best:
            best, worse = losses[-1], 0
            best_values = {name: parameters[name].detach().clone() for name in chosen}
        else:
            worse += 1
            if worse >= schedule.patience:
                break
    kept = best < before
    final = best_values if kept or schedule.rollback else {n: parameters[n].detach().clone() for n in chosen}
    for name in chosen:
        parameters[name].requires_grad_(False)
        parameters[name].copy_(final[name])
        parameters[name].grad = None
    return Reconstruction(kept, before, best if kept or schedule.rollback else losses[-1], losses, training)


def judged(loss: Callable[[list[int]], Tensor], held: list[int], batch: int) -> float:
    """Mean loss over the held-out sequences."""
    with torch.no_grad():
        parts = [held[i : i + batch] for i in range(0, len(held), batch)]
        return sum(float(loss(rows)) * len(rows) for rows in parts) / len(held)


def _batches(rows: list[int], size: int, seed: int) -> Iterator[list[int]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(rows), size):
        yield [rows[i] for i in order[start : start + size]]


def _bound(parameters: Mapping[str, Tensor], groups: Sequence[Group], initial: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for group in groups:
            for name in group.names if group.bound is not None else ():
                assert group.bound is not None
                room = group.bound * initial[name].abs().clamp(min=1.0)
                parameters[name].copy_(torch.clamp(parameters[name], initial[name] - room, initial[name] + room))
