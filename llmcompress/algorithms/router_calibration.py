"""QESC: make a router fed with compressed activations choose the full-precision experts.

EAC-MoE (arXiv 2508.01625) section 4.3: per layer, fit a copy ``W`` of the router weight ``W0`` so
that its logits on the compressed stream ``x̂`` match those of ``W0`` on the full-precision stream
``x`` over the experts that rank in the full-precision top K (Eq. 5)::

    L = mean over tokens of 1/K · Σ_{i in T} ((W0 x)_i − (W x̂)_i)²

The paper names no optimiser. The loss is separable by expert, so each row of ``W`` has a closed
form, which is the default here; gradient descent is the alternative. Shapes: ``T`` tokens, ``N``
experts, ``H`` input features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.expert_shift import ShiftTally, rank_counts
from llmcompress.algorithms.hessian import cholesky
from llmcompress.algorithms.routing import RouterRule

# as in gptq.py. 2: experts with few top-K tokens are solved in a system of tokens
REVISION = 2
# experts whose Gram matrices are held at once, in bytes
GRAM_BUDGET = 512 * 2**20
# inputs of one expert that are gathered at once
PIECE_BYTES = 4 * 2**20
# rows of a matrix of tokens' products that are made at once
PRODUCT_ROWS = 512


@dataclass(frozen=True)
class SolverOptions:
    """Settings of :func:`calibrate_router`; the recipe fields of the same names explain them."""

    k: int | None = None
    solver: str = "ridge"
    ridge: float = 1e-2
    off_topk_weight: float = 0.0
    guard: bool = True
    lr_rel: float = 0.02
    epochs: int = 10
    tokens_per_batch: int = 4096
    seed: int = 0


@dataclass(frozen=True)
class RouterFit:
    """Result of :func:`calibrate_router`.

    Attributes:
        weight: ``[N, H]`` in the stored dtype; the original where the guard rejected the fit.
        bias: ``[N]`` or None.
        kept: Whether the fit was kept.
        record: JSON data: ``before`` and ``after`` shift rates on the held-out tokens,
            ``loss_before``, ``loss_after`` on the fitted tokens, ``k``, ``kept``.
    """

    weight: Tensor
    bias: Tensor | None
    kept: bool
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterUpdate:
    """What a router hook of a quantizing stage decided about one block.

    Attributes:
        replaced: Run-time tensor name → new value (``….gate.weight``); empty for a mere diagnosis.
        record: JSON data stored under ``router`` in the block's record.
    """

    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Bool ``[T, N]``: the ``k`` best experts of each token."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, dim=-1).indices, True)


def topk_mse(target: Tensor, logits: Tensor, mask: Tensor) -> float:
    """TopK-MSE (Eq. 5): mean over tokens and over their top-K experts of the squared logit error.

    Args:
        target: float ``[T, N]``, full-precision logits.
        logits: float ``[T, N]``, logits of the router under calibration.
        mask: bool ``[T, N]``, K true entries per row.
    """
    return float((target.double() - logits.double()).square()[mask].mean())


def auto_k(scores_hat: Tensor, reference: Tensor, chosen: Tensor, cover: float = 0.97) -> int:
    """Smallest useful K: a multiple of 4, at least 2k, that covers ``cover`` of the lost experts.

    Args:
        scores_hat: ``[T, N]`` scores of the uncalibrated router on the compressed stream.
        reference: int64 ``[T, k]`` full-precision experts.
        chosen: int64 ``[T, k]`` experts chosen on the compressed stream.
        cover: Share of lost experts that must rank within K.

    Returns:
        K; N when N ≤ 8 or when nothing smaller covers enough.
    """
    n, k = scores_hat.shape[-1], reference.shape[-1]
    if n <= 8:
        return n
    counts = rank_counts(scores_hat, reference, chosen).double()
    total = float(counts.sum())
    for K in range(4 * math.ceil(2 * k / 4), n, 4):
        if total == 0 or float(counts[:K].sum()) >= cover * total:
            return K
    return n


def solve_ridge(
    x_hat: Tensor, target: Tensor, mask: Tensor, weight: Tensor, ridge: float = 1e-2, off_topk_weight: float = 0.0
) -> Tensor:
    """Closed-form minimiser of TopK-MSE, row by row.

    With token weights ``m`` (1 in the expert's top-K tokens, ``off_topk_weight`` elsewhere),
    ``G = Σ m x̂ x̂ᵀ`` and ``λ = ridge · tr(G)/H`` the row is ``w0 + δ`` with
    ``(G + λ I) δ = Σ m x̂ (target − w0·x̂)``: without a disturbance the right side is zero and
    the row stays as it is. A row with fewer than H/8 top-K tokens is held by ``ridge = 1``.

    Args:
        x_hat: float ``[T, H]`` compressed-stream router inputs.
        target: float ``[T, N]`` full-precision logits.
        mask: bool ``[T, N]`` top-K membership.
        weight: ``[N, H]`` original weight W0.
        ridge: Relative pull towards W0.
        off_topk_weight: Weight of tokens outside an expert's top-K set.

    Returns:
        float32 ``[N, H]``.
    """
    x_hat, w0 = x_hat.float(), weight.float()
    h = w0.shape[1]
    residual = target.float() - x_hat @ w0.T
    counts = mask.sum(0)
    lean = counts < h / 8
    strength = torch.where(lean, max(1.0, ridge), ridge).to(x_hat)
    if (off_topk_weight == 1 or bool(mask.all())) and not bool(lean.any()):
        # every expert has the same tokens, and so the same system
        gram, sums = x_hat.T @ x_hat, residual.T @ x_hat
        return w0 + _solve(gram[None], sums[None], strength[:1])[0]
    everything = (x_hat.T @ x_hat, residual.T @ x_hat) if off_topk_weight > 0 else None
    out = w0.clone()
    few = (counts < h) & (off_topk_weight == 0)
    if bool(few.any()):
        _solve_by_tokens(out, x_hat, residual, mask, few.nonzero().squeeze(-1).tolist(), strength)
    many = (~few).nonzero().squeeze(-1).tolist()
    chunk = max(1, GRAM_BUDGET // (4 * h * h))
    for start in range(0, len(many), chunk):
        experts = many[start : start + chunk]
        grams, right = _own_sums(x_hat, residual, mask, experts)
        picked = torch.tensor(experts, device=w0.device)
        if everything is not None:
            grams.mul_(1 - off_topk_weight).add_(everything[0], alpha=off_topk_weight)
            right.mul_(1 - off_topk_weight).add_(everything[1][picked], alpha=off_topk_weight)
        live = grams.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        if bool(live.any()):
            picked = picked[live]
            out[picked] += _solve(grams[live], right[live].unsqueeze(1), strength[picked]).squeeze(1)
    return out


def _own_sums(x_hat: Tensor, residual: Tensor, mask: Tensor, experts: list[int]) -> tuple[Tensor, Tensor]:
    """``Σ x̂ x̂ᵀ`` ``[E, H, H]`` and ``Σ x̂ (target − w0·x̂)`` ``[E, H]`` over the top-K tokens of each of some experts."""
    h = x_hat.shape[1]
    grams, right = x_hat.new_zeros(len(experts), h, h), x_hat.new_zeros(len(experts), h)
    for slot, expert in enumerate(experts):
        # piece by piece: a large copy costs a page fault per 4 KiB, a small one stays in the caches
        for tokens in mask[:, expert].nonzero().squeeze(-1).split(max(512, PIECE_BYTES // (4 * h))):
            x = x_hat.index_select(0, tokens)
            grams[slot].addmm_(x.T, x)
            right[slot] += residual[tokens, expert] @ x
    return grams, right


def _solve_by_tokens(
    out: Tensor, x_hat: Tensor, residual: Tensor, mask: Tensor, experts: list[int], strength: Tensor
) -> None:
    """Rows of :func:`solve_ridge` for experts with fewer top-K tokens than features, added to ``out [N, H]``.

    ``(XᵀX + λI)⁻¹ Xᵀ r = Xᵀ (XXᵀ + λI)⁻¹ r``: the right side's system has a token's size, and all experts' systems are
    parts of one matrix of products.
    """
    shares = mask[:, experts].sum(0).double()
    size = x_hat.shape[0]
    # one matrix for all where it takes less work than their own, and little memory
    products = None
    if size**2 <= 2 * float(shares.square().sum()) and 4 * size**2 <= GRAM_BUDGET:
        products = _lower_products(x_hat)
    for expert in experts:
        tokens = mask[:, expert].nonzero().squeeze(-1)
        x = x_hat.index_select(0, tokens)
        system = x @ x.T if products is None else products.index_select(0, tokens).index_select(1, tokens)
        if float(system.diagonal().sum()) > 0:
            right = residual[tokens, expert][None, None]
            found = _solve(system[None], right, strength[expert : expert + 1], x_hat.shape[1])
            out[expert] += found[0, 0] @ x


def _lower_products(x: Tensor) -> Tensor:
    """``x xᵀ`` of ``x [T, H]``, its lower triangle mirrored."""
    products = x.new_empty(x.shape[0], x.shape[0])
    for start in range(0, x.shape[0], PRODUCT_ROWS):
        stop = min(start + PRODUCT_ROWS, x.shape[0])
        torch.mm(x[start:stop], x[:stop].T, out=products[start:stop, :stop])
        products[:start, start:stop] = products[start:stop, :start].T
    return products


def _solve(gram: Tensor, right: Tensor, ridge: Tensor, features: int | None = None) -> Tensor:
    """Solve ``δ (G + ridge·tr(G)/H·I) = right``, in float64 where float32 does not factorise.

    Args:
        gram: float32 ``[B, S, S]``, symmetric, with a positive trace.
        right: float32 ``[B, R, S]``.
        ridge: float32 ``[B]``.
        features: H, where that is not S.

    Returns:
        float32 ``[B, R, S]``.
    """
    size = gram.shape[-1]
    damp = ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / (features or size)
    system = gram.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(damp[:, None])
    factor, info = cholesky(system)
    if bool((info == 0).all()):
        return torch.cholesky_solve(right.mT, factor).mT
    exact = gram.double() + damp.double()[:, None, None] * torch.eye(size, device=gram.device, dtype=torch.float64)
    return torch.linalg.solve(exact, right.double().mT).mT.float()


def solve_adam(x_hat: Tensor, target: Tensor, mask: Tensor, weight: Tensor, options: SolverOptions) -> Tensor:
    """Minimise TopK-MSE by Adam: no weight decay, clipped gradient, learning rate falling along a cosine.

    Args:
        x_hat: float ``[T, H]`` compressed-stream router inputs.
        target: float ``[T, N]`` full-precision logits.
        mask: bool ``[T, N]`` top-K membership.
        weight: ``[N, H]`` original weight W0.
        options: ``lr_rel``, ``epochs``, ``tokens_per_batch``, ``off_topk_weight`` and ``seed`` are used.

    Returns:
        float32 ``[N, H]``.
    """
    x_hat, target = x_hat.float(), target.float()
    trained = weight.float().clone().requires_grad_(True)
    rate = options.lr_rel * float(weight.float().square().mean().sqrt())
    optimizer = torch.optim.Adam([trained], lr=rate)
    tokens, batch = x_hat.shape[0], options.tokens_per_batch
    steps = options.epochs * -(-tokens // batch)
    generator = torch.Generator().manual_seed(options.seed)
    step = 0
    with torch.enable_grad():
        for _ in range(options.epochs):
            for rows in torch.randperm(tokens, generator=generator).split(batch):
                picked = rows.to(x_hat.device)
                inside = mask[picked].float()
                share = inside + options.off_topk_weight * (1 - inside)
                error = (x_hat[picked] @ trained.T - target[picked]).square()
                loss = (share * error).sum() / share.sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_([trained], 1.0)
                optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.step()
                step += 1
    return trained.detach()


def calibrate_router(
    target: Tensor,
    x_hat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouterRule,
    options: SolverOptions,
    held: Tensor | None = None,
) -> RouterFit:
    """Fit one router and decide on held-out tokens whether the fit stays.

    Args:
        target: float ``[T, N]``, logits of the original router on the full-precision stream.
        x_hat: ``[T, H]``, router inputs of the compressed stream, same tokens.
        weight: ``[N, H]`` original weight, in the dtype it is stored in.
        bias: ``[N]`` or None; trained with the weight as the coefficient of a constant input 1.
        rule: How logits select experts.
        options: Solver settings.
        held: bool ``[T]``, tokens kept out of the fit for the guard; None uses every token for both.

    Returns:
        The fit, already rounded to the stored dtype: what is judged is what is saved.

    Raises:
        ValueError: K lies outside ``[k, N]``.
    """
    held = torch.zeros(x_hat.shape[0], dtype=torch.bool, device=x_hat.device) if held is None else held
    judged = held if bool(held.any()) else ~held
    features, original = _augment(x_hat, weight, bias)
    before_logits = features @ original.T
    reference = rule.select(target)
    K = auto_k(rule.scores(before_logits), reference, rule.select(before_logits)) if options.k is None else options.k
    if not rule.top_k <= K <= weight.shape[0]:
        raise ValueError(f"K must lie between {rule.top_k} and {weight.shape[0]}, not {K}")
    mask = top_mask(rule.scores(target), K)
    fit = (~held).nonzero().squeeze(-1)
    features_fit, target_fit, mask_fit = (each.index_select(0, fit) for each in (features, target, mask))
    if options.solver == "adam":
        solved = solve_adam(features_fit, target_fit, mask_fit, original, options)
    else:
        solved = solve_ridge(features_fit, target_fit, mask_fit, original, options.ridge, options.off_topk_weight)
    new_weight, new_bias = _split(solved, weight, bias)
    after_logits = features @ _augment(x_hat[:0], new_weight, new_bias)[1].T
    before = _rates(rule, target, before_logits, reference, judged, K)
    after = _rates(rule, target, after_logits, reference, judged, K)
    kept = not options.guard or after["overlap"] > before["overlap"]
    record = {
        "before": before,
        "after": after if kept else before,
        "loss_before": topk_mse(target_fit, before_logits.index_select(0, fit), mask_fit),
        "loss_after": topk_mse(target_fit, after_logits.index_select(0, fit), mask_fit),
        "k": K,
        "kept": kept,
    }
    return RouterFit(new_weight if kept else weight, new_bias if kept else bias, kept, record)


def _augment(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float32 features and weight; a bias becomes the column of a constant feature 1."""
    if bias is None:
        return x.float(), weight.float()
    ones = torch.ones(x.shape[0], 1, device=x.device)
    return torch.cat((x.float(), ones), -1), torch.cat((weight.float(), bias.float()[:, None]), -1)


def _split(solved: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Undo :func:`_augment` and round to the stored dtypes."""
    if bias is None:
        return solved.to(weight.dtype), None
    return solved[:, :-1].to(weight.dtype), solved[:, -1].to(bias.dtype)


def _rates(
    rule: RouterRule, target: Tensor, logits: Tensor, reference: Tensor, tokens: Tensor, K: int
) -> dict[str, float]:
    tally = ShiftTally(rule, cover=(K,))
    picked = logits[tokens]
    tally.add(reference[tokens], rule.select(picked), target[tokens], picked)
    return tally.rates()
