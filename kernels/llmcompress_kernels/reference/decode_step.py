"""The decode step in plain PyTorch: what each fact of a :class:`~llmcompress_kernels.decode.Decoder` means.

A whole sequence goes through at once, without a cache, and every token sees what the step would let it see. Mixers of
another library, layers that lay aside what they say, adapters, residual trees and low-bit states have definitions of
their own (:mod:`~llmcompress_kernels.reference.state`, ``delta_state``; ``tests/unit/inference/test_hybrid.py``).

Legend: T tokens, H columns of hidden states, D and V columns of a key and of a value, E experts, k of them a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, relu, silu, softplus

from llmcompress_kernels.reference.delta import gated_delta_mix, kimi_delta_mix, lightning_mix
from llmcompress_kernels.reference.group_gemm import decode, deinterleave

if TYPE_CHECKING:
    from llmcompress_kernels.decode import Decoder
    from llmcompress_kernels.decode_layer import Layer, Routing
    from llmcompress_kernels.matrix import Matrix


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits after every token of one sequence.

    Args:
        decoder: Of one model, with rotary tables of at least T positions.
        tokens: int64 ``[T]``.

    Returns:
        float32 ``[T, V]``.

    Raises:
        NotImplementedError: The decoder has something that this definition leaves out.
    """
    if decoder.mixes or decoder.member_heads or any(layer.aside is not None for layer in decoder.layers):
        raise NotImplementedError("mixers, families and layers that lay aside what they say are defined elsewhere")
    hidden = decoder.embedding_scale * weight_of(decoder.embedding)[tokens]
    hidden = hidden if decoder.position_rows is None else hidden + decoder.position_rows[: len(tokens)]
    hidden = _norm(hidden, decoder.embedding_norm, None, decoder.epsilon)
    for layer in decoder.layers:
        hidden = _layer(decoder, layer, hidden)
    last = _norm(hidden, decoder.final_norm, decoder.final_norm_bias, decoder.epsilon)
    return _capped(_product(decoder.head, last), decoder.logit_cap)


def weight_of(matrix: Matrix) -> Tensor:
    """A weight in float32, ``[(E,) N, K]``; without its bias and factors."""
    if matrix.planes or matrix.adapter is not None:
        raise NotImplementedError("residual trees and adapters are defined elsewhere")
    if not matrix.bits:
        return matrix.data.float()
    assert matrix.scale is not None
    words, scale, zero = (None if t is None else deinterleave(t) for t in (matrix.data, matrix.scale, matrix.zero))
    assert words is not None
    assert scale is not None
    return decode(words, scale, zero, matrix.bits, matrix.group_size, matrix.columns)[..., : matrix.rows, :]


def route(
    rule: Routing, scores: Tensor, correction: Tensor | None = None, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which experts tokens take.

    Args:
        rule: How.
        scores: float32 ``[T, E]`` of a router.
        correction: float32 ``[E]``, added to what ranks them.
        factors: float32 ``[E]``, of the weights.

    Returns:
        int64 ``[T, k]`` and their weights float32 ``[T, k]``.
    """
    if rule.kind == "sparsemixer":
        return _sparsemixer(scores, rule.top_k, rule.jitter)
    shares = scores.sigmoid() if rule.kind == "sigmoid" else scores.softmax(-1)
    ranked = scores if correction is None and (rule.kind == "softmax" or rule.groups == 1) else shares
    ranked = ranked if correction is None else ranked + correction
    if rule.groups > 1:
        parts = ranked.unflatten(-1, (rule.groups, -1))
        best = parts.topk(rule.voters, dim=-1).values.sum(-1).topk(rule.top_groups, dim=-1).indices
        left = torch.zeros(parts.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        ranked = parts.masked_fill(~left[..., None], -torch.inf).flatten(-2)
    chosen = ranked.topk(rule.top_k, dim=-1).indices
    weights = shares.gather(-1, chosen)
    if rule.renormalizes:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.floor)
    weights = rule.scale * weights
    return chosen, weights if factors is None else weights * factors[chosen]


def _sparsemixer(scores: Tensor, count: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Sparsemixer outside of training (arXiv 2409.12136): a softmax among experts not taken whose scores are near."""
    left, chosen, weights = scores.clone(), [], []
    for _ in range(count):
        top, best = left.max(-1, keepdim=True)
        near = (top - scores) / torch.maximum(scores.abs(), top) <= 2 * jitter
        chosen.append(best)
        weights.append(left.masked_fill(~near, -torch.inf).softmax(-1).gather(-1, best))
        left = left.scatter(-1, best, -torch.inf)
    return torch.cat(chosen, -1), torch.cat(weights, -1)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """RMSNorm of the last dimension, or with a bias LayerNorm; without weights ``x`` itself."""
    if weight is None:
        return x
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    normed = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))
    return normed if bias is None else normed + bias


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap > 0 else x


def _product(matrix: Matrix, x: Tensor, expert: int | None = None) -> Tensor:
    """``factors (W x + bias)`` of each row of ``x``."""
    weight, bias = weight_of(matrix), matrix.bias
    if expert is not None:
        weight, bias = weight[expert], None if bias is None else bias[expert]
    said = linear(x, weight, bias)
    return said if matrix.factors is None else matrix.factors * said


def _layer(decoder: Decoder, layer: Layer, hidden: Tensor) -> Tensor:
    epsilon, before = decoder.epsilon, hidden
    if layer.attends or layer.convolves:
        x = _norm(hidden, layer.attention_norm, layer.attention_norm_bias, epsilon)
        hidden = hidden if layer.keeps is None else layer.keeps[0] * x
        said = _first_half(decoder, layer, x)
        hidden = hidden + decoder.residual_scale * _norm(said, layer.attention_after, None, epsilon)
    if layer.gate is not None:
        read = before if layer.parallel else hidden
        x = _norm(read, layer.mlp_norm, layer.mlp_norm_bias, epsilon)
        hidden = hidden if layer.keeps is None else layer.keeps[1] * x
        said = _mlp(decoder, layer, x) if layer.router is None else _experts(decoder, layer, x, read)
        hidden = hidden + decoder.residual_scale * _norm(said, layer.mlp_after, None, epsilon)
    return layer.output_scale * hidden


def _first_half(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    if layer.delta is not None:
        told = _delta_rule(layer, x)
    elif layer.convolves:
        told = _convolution(layer, x)
    else:
        told = (_attention if layer.absorb is None else _latent_attention)(decoder, layer, x)
    assert layer.output is not None
    return _product(layer.output, told)


def _attention(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    """Results ``[T, heads V]`` of grouped-query attention, before the last projection."""
    sizes = layer.heads
    assert sizes is not None
    assert layer.query is not None
    assert layer.key is not None
    rows, keys = (_product(side, x).unflatten(-1, (-1, sizes.key_dim)) for side in (layer.query, layer.key))
    # keys alone may be values, too, as they are before their norm
    values = keys if layer.value is None else _product(layer.value, x).unflatten(-1, (-1, sizes.value_dim))
    queries, gates = (rows[:, ::2], rows[:, 1::2]) if layer.gates else (rows, None)
    queries = _heads(decoder, layer, queries, layer.query_norm, layer.query_norm_bias)
    keys = _heads(decoder, layer, keys, layer.key_norm, layer.key_norm_bias)
    told = _attend(decoder, layer, queries, keys, _norm(values, layer.value_norm, None, decoder.epsilon))
    if layer.head_gates is not None:
        opened = _product(layer.head_gates, x).unflatten(-1, (sizes.count, -1))
        told = told * (softplus(opened) if layer.softplus else opened.sigmoid())
    return (told if gates is None else told * gates.sigmoid()).flatten(1)


def _latent_attention(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    """Likewise where heads make keys and values of latents (section 2.1.2 of arXiv 2405.04434)."""
    latents, sizes = decoder.latents, layer.heads
    assert latents is not None
    assert sizes is not None
    assert layer.query is not None
    assert layer.key is not None
    assert layer.absorb is not None
    assert layer.expand is not None
    low = x if layer.query_down is None else _product(layer.query_down, x)
    low = _norm(low, layer.query_down_norm, None, latents.epsilon)
    queries = _product(layer.query, low).unflatten(-1, (sizes.count, -1))
    given = _product(layer.key, x)
    held = _norm(given[:, : latents.size], layer.key_norm, None, latents.epsilon)
    beside = latents.width - latents.size
    turned = _turned(decoder, layer, given[:, None, latents.size :], latents.neighbours).expand(-1, sizes.count, -1)
    own = _turned(decoder, layer, queries[..., -beside:], latents.neighbours)
    queries = torch.cat([queries[..., : sizes.key_dim - beside], own], dim=-1)
    keys = torch.cat([torch.einsum("tc,hdc->thd", held, weight_of(layer.absorb)), turned], dim=-1)
    values = torch.einsum("tc,hvc->thv", held, weight_of(layer.expand))
    return _attend(decoder, layer, queries, keys, values).flatten(1)


def _heads(decoder: Decoder, layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Queries or keys ``[T, heads, D]``, normed and turned."""
    if weight is None:
        return _turned(decoder, layer, x, decoder.neighbours)
    if layer.norms_last:
        return _norm(_turned(decoder, layer, x, decoder.neighbours), weight, None, decoder.epsilon)
    if layer.whole_norms:
        x = _norm(x.flatten(1), weight, None, decoder.epsilon).view_as(x)
    else:
        if layer.own_norms:
            weight, bias = weight.view(x.shape[1:]), None if bias is None else bias.view(x.shape[1:])
        x = _norm(x, weight, bias, decoder.epsilon)
    return _turned(decoder, layer, x, decoder.neighbours)


def _turned(decoder: Decoder, layer: Layer, x: Tensor, neighbours: bool) -> Tensor:
    """``[T, heads, D]`` with its first columns turned to their positions: pairs of neighbours, or of two halves."""
    if layer.rotary is None:
        return x
    tables = decoder.cosine[layer.rotary], decoder.sine[layer.rotary]
    cosine, sine = (table[: len(x), None] for table in tables)
    turned = 2 * cosine.shape[-1]
    pairs = x[..., :turned].unflatten(-1, (-1, 2) if neighbours else (2, -1))
    one, other = pairs.unbind(-1 if neighbours else -2)
    both = one * cosine - other * sine, other * cosine + one * sine
    return torch.cat([torch.stack(both, -1 if neighbours else -2).flatten(-2), x[..., turned:]], dim=-1)


def _attend(decoder: Decoder, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``[T, heads, V]`` of queries ``[T, heads, D]``, keys ``[T, shared, D]`` and values ``[T, shared, V]``."""
    count, times = len(queries), queries.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(times, dim=1) for part in (keys, values))
    if layer.sharpens and decoder.query_scales is not None:
        queries = queries * decoder.query_scales[:count, None, None]
    scores = _capped(torch.einsum("thd,shd->hts", queries * decoder.attention_scale, keys), decoder.attention_cap)
    at = torch.arange(count)
    seen = at[None] <= at[:, None]
    if layer.window:
        first = at // layer.window * layer.window if layer.chunked else at - layer.window + 1
        seen &= at[None] >= first[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[:, None, None].expand(-1, count, 1)], dim=-1)
    return torch.einsum("hts,shv->thv", scores.softmax(-1)[..., :count], values)


def _convolution(layer: Layer, x: Tensor) -> Tensor:
    """A short gated convolution (LFM2): ``[T, H]`` before the last projection."""
    assert layer.conv_in is not None
    assert layer.conv_weight is not None
    first, second, given = _product(layer.conv_in, x).chunk(3, dim=-1)
    count, taps = len(x), len(layer.conv_weight)
    seen = pad(first * given, (0, 0, taps - 1, 0))
    told = sum((tap * seen[i : i + count] for i, tap in enumerate(layer.conv_weight)), torch.zeros_like(given))
    return second * (told if layer.conv_bias is None else told + layer.conv_bias)


def _delta_rule(layer: Layer, x: Tensor) -> Tensor:
    """A layer with float states between its projections: ``[T, heads V]``."""
    delta, taps = layer.delta, layer.conv_weight
    assert delta is not None
    assert taps is not None
    sizes = delta.sizes
    if delta.codec is not None:
        raise NotImplementedError("states in low bits are defined elsewhere")
    if delta.sigmoid != (delta.rule != "gated"):
        raise NotImplementedError(f"no model has gates of the rule {delta.rule!r} that open otherwise")
    sides = (layer.conv_in, layer.conv_key, layer.conv_value)
    mixed = torch.cat([_product(side, x) for side in sides if side is not None], dim=-1)
    gates = x if layer.gates_low is None else _product(layer.gates_low, x)
    gates = mixed if layer.conv_gates is None else _product(layer.conv_gates, gates)
    if delta.order == "with_gates":
        values = sizes.heads // sizes.key_heads * sizes.value_dim
        parts = mixed.unflatten(-1, (sizes.key_heads, -1)).split([sizes.key_dim, sizes.key_dim, values, values], -1)
        query, key, value, gates = (part.flatten(1) for part in parts)
        mixed = torch.cat([query, key, value], dim=-1)
    state = torch.zeros(sizes.heads, sizes.key_dim, sizes.value_dim)
    if delta.rule == "lightning":
        return lightning_mix(mixed, gates, delta.decay, delta.gain, delta.epsilon, state)[0]
    assert layer.steps is not None
    assert delta.dt_bias is not None
    steps, inputs = _product(layer.steps, x), torch.zeros(len(taps) - 1, mixed.shape[-1])
    rest = (taps, delta.dt_bias, delta.decay, delta.gain, delta.epsilon)
    if delta.rule == "columns":
        assert layer.decays_low is not None
        assert layer.decays is not None
        times = _product(layer.decays, _product(layer.decays_low, x))
        return kimi_delta_mix(mixed, gates, steps, times, *rest, inputs, state)[0]
    return gated_delta_mix(mixed, gates, steps, *rest, sizes.key_heads, inputs, state, delta.most)[0]


def _opened(decoder: Decoder, layer: Layer, gate: Tensor, up: Tensor | None) -> Tensor:
    """``activation(gate) * up``, or the first alone."""
    kind, limit = decoder.activation, decoder.gate_limit
    if kind == "gpt_oss":
        assert up is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * (decoder.gate_slope * gate).sigmoid() * (up + 1)
    if kind == "xielu":
        above, below = layer.bends
        bent = (torch.expm1(gate.clamp(max=limit)) - gate) * below
        return decoder.gate_slope * gate + torch.where(gate > 0, above * gate.square(), bent)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": silu, "gelu": gelu, "relu": relu, "relu2": lambda x: relu(x).square(),
        "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    }  # fmt: skip
    activated = known[kind](gate)
    return activated if up is None else activated * up


def _mlp(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    assert layer.gate is not None
    assert layer.down is not None
    up = None if layer.up is None else _product(layer.up, x)
    return _product(layer.down, _opened(decoder, layer, _product(layer.gate, x), up))


def _experts(decoder: Decoder, layer: Layer, x: Tensor, read: Tensor) -> Tensor:
    """What routed experts and an MLP beside them say of ``x``, the norm of ``read``."""
    rule, epsilon = decoder.routing, decoder.epsilon
    assert layer.router is not None
    assert layer.gate is not None
    assert layer.down is not None
    asked = x if layer.router_norm is None else _norm(read, layer.router_norm, None, epsilon)
    chosen, weights = route(rule, _product(layer.router, asked), layer.router_correction, layer.expert_scales)
    given = x if layer.entry is None else _product(layer.entry, x)
    routed = torch.zeros(len(x), layer.down.rows)
    for expert in chosen.unique().tolist():
        at, slot = torch.where(chosen == expert)
        weight = weights[at, slot, None]
        factor = weight if rule.scales_inputs else torch.ones(1)
        gate = factor * _product(layer.gate, given[at], expert)
        up = None if layer.up is None else factor * _product(layer.up, given[at], expert)
        said = _product(layer.down, _opened(decoder, layer, gate, up), expert)
        routed[at] += said if rule.scales_inputs else weight * said
    routed = _norm(routed if layer.exit is None else _product(layer.exit, routed), layer.routed_after, None, epsilon)
    if layer.shared_gate is None or layer.shared_down is None:
        return routed
    own = x if layer.shared_norm is None else _norm(read, layer.shared_norm, None, epsilon)
    up = None if layer.shared_up is None else _product(layer.shared_up, own)
    beside = _product(layer.shared_down, _opened(decoder, layer, _product(layer.shared_gate, own), up))
    if layer.shared_router is not None:
        beside = beside * _product(layer.shared_router, own).sigmoid()
    return routed + _norm(beside, layer.shared_after, None, epsilon)
