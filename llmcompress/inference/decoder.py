"""A model's weights in the layout of the native decode step (:mod:`llmcompress_kernels.decode`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import matrix
from torch import Tensor, nn

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.inference.attention import is_chunked, projections, scale_of, sharpens, window_of
from llmcompress.inference.coverage import (
    ACTIVATIONS,
    NEIGHBOURS,
    activation_of,
)
from llmcompress.inference.latent import is_latent, latents_of
from llmcompress.inference.rotary import table_of
from llmcompress.inference.rules import rule_of
from llmcompress.inference.weights import (
    centres,
    linear_matrix,
    linear_parts,
    norm_of,
    ones_of,
    packed_matrix,
    parts,
)
from llmcompress.models.layout import Block, ExpertBank, ModelLayout
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.embedding import PackedEmbedding, PackedRows, TiedHead, factor_of
from llmcompress.nn.experts import PackedExperts
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.tree_linear import PerMember
from llmcompress.quant.codecs import codec
from llmcompress.quant.codecs.int_group import PACKED, SCALE
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the layout's names of what routers do, and the step's
_ROUTERS = {
    # softmax over the chosen ones divides their weights by their sum
    "topk_softmax": "softmax",
    "softmax_topk": "softmax",
    "sigmoid_group_topk": "sigmoid",
    "sparsemixer": "sparsemixer",
}


_ALL = slice(None)
# what families call the norm before the head
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "norm_f", "ln_f")
# what configs call what norms add to the mean of squares
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")


def number_of(config: Any, key: str, missing: float = 1.0) -> float:
    """A number of a config that its family knows; transformers keeps others too, and its modules ignore them.

    Args:
        config: Config of a text model.
        key: Name of the number.
        missing: What stands for null, and for a number that the family does not know.
    """
    given = getattr(config, key) if hasattr(type(config), key) else None
    return missing if given is None else float(given)


def members_of(model: PreTrainedModel) -> list[str]:
    """Members of a family that a model's rows may belong to, in the order of a batch; none for a single model."""
    return next((module.names for module in model.modules() if isinstance(module, PerMember)), [])


def decoder_of(model: PreTrainedModel, head_bits: int | None = None) -> native.Decoder:
    """A model's weights in the decode step's layout.

    Args:
        model: A model that is not declined.
        head_bits: See :class:`Engine`.

    Returns:
        The decoder, without rotary tables. Packed weights are copied into blocks; dense ones are shared where their
        type allows it. Of a family, bits of nodes and rows of norms follow :func:`members_of`.
    """
    members = members_of(model)
    config: Any = model.config.get_text_config()
    layout = layout_from_config(model.config.to_dict())
    words: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    ends = [ends_of(*both, head_bits) for both in zip(parts(words), parts(output))]
    layers = [_layer(model, block, members, layout.norm_adds_one) for block in layout.blocks]
    scale = _embedding_scale(parts(words)[0], config)
    routing = routing_of(model, layout)
    final = final_norm_of(model)
    factor = number_of(config, "logit_scale")
    weight = _weights(final, config, members, layout.norm_adds_one)
    last = weight * factor, _norm_bias(final, weight)
    modules = (
        model.get_submodule(s.module)
        for block in layout.blocks
        for s in block.sublayers
        if s.kind == "attention" and not s.decays
    )
    attention = next(modules)
    # where normed inputs take the place of hidden states, each layer has factors of its own
    first = layout.blocks[0].sublayers[0]
    adds = first.output_scale if first.keeps is None else 1.0
    decoder = assembled(config, layers, last, attention, ends, routing, bool(members), (scale, adds))
    decoder = replace(decoder, position_rows=position_rows_of(model))
    bank = next(iter(layout.banks.values()), None)
    if decoder.activation == "xielu":
        bent = xielu_of(model, layout.blocks[0])
        return replace(decoder, gate_slope=float(bent.beta), gate_limit=float(bent.eps))
    if bank is None or bank.activation != "gpt_oss":
        return decoder
    experts: Any = model.get_submodule(bank.module)
    return replace(decoder, activation="gpt_oss", gate_slope=experts.alpha, gate_limit=experts.limit)


def xielu_of(model: Any, block: Block) -> Any:
    """The activation of a layer's MLP, which has numbers of its own (Apertus)."""
    return model.get_submodule(block.sublayers[-1].module).act_fn


def _bends(model: Any, block: Block) -> tuple[float, float]:
    bent, softplus = xielu_of(model, block), nn.functional.softplus
    with torch.no_grad():
        return float(softplus(bent.alpha_p.float())), float(bent.beta + softplus(bent.alpha_n.float()))


def _embedding_scale(words: Any, config: Any) -> float:
    """Factor of embeddings; Gemma's is rounded to the type of its weights."""
    if isinstance(words, PackedEmbedding):
        own = words.factor
    else:
        factor = factor_of(words)
        own = 1.0 if factor is None else float(torch.tensor(factor, dtype=words.weight.dtype))
    # AFMoE takes the root of the width or nothing
    root = float(config.hidden_size**0.5) if number_of(config, "mup_enabled", 0.0) else 1.0
    return own * root * number_of(config, "embedding_multiplier")


def _logits_factor(config: Any) -> float:
    """Factor of logits that Granite and others call a divisor, and HyperCLOVA X a factor."""
    given = number_of(config, "logits_scaling")
    return given if config.model_type == "hyperclovax" else 1.0 / given


def routing_of(model: PreTrainedModel, layout: ModelLayout) -> native.Routing:
    """How the routers of a model decide, the same in all layers."""
    bank = next(iter(layout.banks.values()), None)
    if bank is None:
        return native.Routing()
    rule = Router(model, bank.router).rule(bank.top_k)
    kind = _ROUTERS[rule.kind]
    return native.Routing(
        top_k=rule.top_k,
        kind=kind,
        renormalizes=rule.conserves,
        scale=rule.scale,
        groups=rule.groups,
        top_groups=rule.top_groups,
        voters=2 if kind == "sigmoid" else 1,
        jitter=rule.jitter,
        floor=rule.floor,
        scales_inputs=bank.scales_inputs,
    )


def assembled(
    config: Any,
    layers: Sequence[native.Layer],
    final: tuple[Tensor, Tensor | None],
    attention: Any,
    ends: Sequence[tuple[matrix.Matrix, matrix.Matrix]],
    routing: native.Routing,
    family: bool = False,
    scales: tuple[float, float] = (1.0, 1.0),
) -> native.Decoder:
    """A decoder of its parts, with the sizes and constants of its model.

    Args:
        config: Config of the model.
        layers: In order.
        final: Weights and biases of the norm before the head.
        attention: The module of any layer that has one.
        ends: Embedding and head of the model, or of each member of a family.
        routing: Routing of its routers.
        family: Whether it is one.
        scales: Factors of embeddings, and of all that layers add to the hidden states.
    """
    latents = latents_of(config, attention) if is_latent(attention) else None
    tables = 1 + max(layer.rotary or 0 for layer in layers)
    return native.Decoder(
        layers=layers,
        # what divides the logits divides what the head reads
        final_norm=final[0] * _logits_factor(config),
        final_norm_bias=final[1],
        cosine=[torch.empty(0, 0)] * tables,
        sine=[torch.empty(0, 0)] * tables,
        embedding=ends[0][0],
        head=ends[0][1],
        latents=latents,
        epsilon=epsilon_of(config),
        attention_scale=scale_of(attention),
        routing=routing,
        embedding_scale=scales[0],
        activation=ACTIVATIONS[activation_of(config.to_dict())],
        attention_cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        logit_cap=number_of(config, "final_logit_softcapping", 0.0),
        residual_scale=scales[1],
        neighbours=config.model_type in NEIGHBOURS,
        # nanochat's, which has no weights
        embedding_norm=torch.ones_like(final[0]) if config.model_type == "nanochat" else None,
        member_embeddings=[embedding for embedding, _ in ends] if family else (),
        member_heads=[head for _, head in ends] if family else (),
    )


def epsilon_of(config: Any) -> float:
    """What the norms of a model add to the mean of squares; OLMo 1 has it in its modules alone."""
    known = (given for key in EPSILONS if not isnan(given := number_of(config, key, nan)))
    return next(known, 1e-5)


def ends_of(words: Any, last: Any, head_bits: int | None = None) -> tuple[matrix.Matrix, matrix.Matrix]:
    """Embedding and head of a model, dense or packed; one matrix where they share their weights.

    Args:
        words: Module of the embedding.
        last: That of the head.
        head_bits: Bits of a dense head, see :class:`Engine`.
    """
    packed = isinstance(words, PackedRows)
    embedding = _rows(words) if packed else matrix.dense(words.weight.detach())
    if isinstance(last, PackedRows):
        return embedding, _rows(last)
    if isinstance(last, TiedHead):
        return embedding, embedding
    if head_bits is not None:
        bias = None if last.bias is None else last.bias.detach().float().contiguous()
        return embedding, replace(rounded_matrix(last.weight.detach(), head_bits), bias=bias)
    tied = not packed and last.bias is None and last.weight.data_ptr() == words.weight.data_ptr()
    return embedding, embedding if tied else matrix.dense(last.weight.detach(), last.bias)


def _rows(module: PackedRows) -> matrix.Matrix:
    """A packed embedding or head without the rows that fill its last block."""
    module.prepare()
    return replace(packed_matrix(module, slice(None), getattr(module, "bias", None)), rows=module.rows)


def final_norm_of(model: Any) -> Any:
    """The module of the norm before a model's head."""
    base = _body(model)
    return next(getattr(base, name) for name in _FINAL_NORMS if hasattr(base, name))


def position_rows_of(model: Any) -> Tensor | None:
    """Learned positions float32 ``[positions, H]`` that a model adds to embeddings, None where it has none."""
    body = _body(model)
    table = getattr(body, "embed_positions", getattr(body, "wpe", None))
    # OPT's begin with rows that no token has
    return None if table is None else table.weight.detach()[getattr(table, "offset", 0) :].float().contiguous()


def _body(model: Any) -> Any:
    """The module with embeddings, layers and last norm."""
    return getattr(model.base_model, "decoder", model.base_model)


def _weights(module: Any, config: Any, members: Sequence[str], adds_one: bool) -> Any:
    """A norm's weights, ones where it has none (nanochat)."""
    weight = norm_of(module, adds_one=adds_one)
    return ones_of(config.hidden_size, members) if weight is None else weight


def _norm_bias(module: Any, weight: Any) -> Any:
    """Biases of a LayerNorm, zeros where its family has none; None for RMSNorm."""
    bias = norm_of(module, "bias")
    return torch.zeros_like(weight) if bias is None and centres(module) else bias


def _norms(model: Any, block: Block, members: Sequence[str], adds_one: bool) -> dict[str, Any]:
    """Norms before and after the sublayers of a layer, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    config: Any = model.config.get_text_config()
    found: dict[str, Any] = {"attention_norm": None, "mlp_norm": None}

    def weights(name: str) -> Any:
        return _weights(model.get_submodule(name), config, members, adds_one)

    joined = next((sublayer for sublayer in block.sublayers if sublayer.joins is not None), None)
    if joined is not None:
        # an MLP beside experts with norms of its own (Gemma 4)
        first, beside, _ = block.sublayers
        assert joined.joins is not None
        given = (
            ("attention_norm", first.pre_norm), ("attention_after", first.post_norm), ("shared_norm", beside.pre_norm),
            ("shared_after", beside.post_norm), ("mlp_norm", joined.pre_norm), ("routed_after", joined.post_norm),
            ("mlp_after", joined.joins),
        )  # fmt: skip
        return {name: weights(norm) for name, norm in given if norm is not None}
    for name, sublayer in zip(("attention", "mlp"), block.sublayers):
        if sublayer.pre_norm is not None:
            weight = found[f"{name}_norm"] = weights(sublayer.pre_norm)
            found[f"{name}_norm_bias"] = _norm_bias(model.get_submodule(sublayer.pre_norm), weight)
        if sublayer.post_norm is not None:
            found[f"{name}_after"] = weights(sublayer.post_norm)
    return found


def _layer(model: Any, block: Block, members: Sequence[str] = (), adds_one: bool = False) -> native.Layer:
    first, *beneath = block.sublayers
    attention, mlp = model.get_submodule(first.module), model.get_submodule(beneath[-1].module)
    config: Any = model.config.get_text_config()
    if block.bank is None:
        gate, up, down = mlp_parts(mlp, members)
        rest: dict[str, Any] = {"gate": gate, "up": up, "down": down}
    else:
        rest = _experts(model, block, block.bank, config, members)
    window = window_of(config, block.index)
    scale = 1.0 if block.scale is None else float(_tensor(model, block.scale))
    if first.kind == "ssm" or first.decays:
        head = rule_of(model, first.module)
    else:
        head = projections(attention, config, members, adds_one)
    if first.keeps is not None:
        # factors of what is added (MiniMax-01)
        head["output"] = matrix.times(head["output"], first.output_scale)
        rest["down"] = matrix.times(rest["down"], beneath[-1].output_scale)
    return native.Layer(
        **_norms(model, block, members, adds_one),
        **head,
        **rest,
        keeps=None if first.keeps is None else (first.keeps, beneath[-1].keeps or 0.0),
        window=window,
        chunked=is_chunked(config, block.index),
        sharpens=sharpens(config, attention),
        rotary=table_of(model, attention, block.index, window),
        parallel=beneath[0].parallel,
        output_scale=scale,
        bends=_bends(model, block) if activation_of(config.to_dict()) == "xielu" else (0.0, 0.0),
    )


def _tensor(model: Any, name: str) -> Tensor:
    owner, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), own)
    return found


def _experts(model: Any, block: Block, bank: ExpertBank, config: Any, members: Sequence[str]) -> dict[str, Any]:
    """Experts, their router and what is beside them, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    gate, up, down = experts_of(model.get_submodule(bank.module), bank)
    decides = Router(model, bank.router)
    rule = decides.rule(bank.top_k)
    module: Any = decides.module
    weight: Any = module.get_parameter(bank.router.matrix)
    found: dict[str, Any] = {
        "gate": gate,
        "up": up,
        "down": down,
        "router": matrix.dense(weight.detach(), getattr(module, "bias", None)),
        "router_correction": None if rule.correction is None else rule.correction.detach().float().contiguous(),
        "expert_scales": None if rule.factors is None else rule.factors.detach().float().contiguous(),
        **_beside(model, block, members),
    }
    if bank.router.normed:
        found["router_norm"] = module.scale.detach().float() * module.scalar_root_size
    if config.model_type == "laguna":
        # the block multiplies what experts say, not their weights
        found["down"] = matrix.times(down, config.moe_routed_scaling_factor)
    if getattr(config, "shared_expert_combination_strategy", "sum") == "average" and "shared_down" in found:
        found |= {name: matrix.times(found[name], 0.5) for name in ("down", "shared_down")}
    return found


def mlp_parts(mlp: Any, members: Sequence[str] = ()) -> tuple[matrix.Matrix, matrix.Matrix | None, matrix.Matrix]:
    """Gate, up and down of an MLP: the first two from one linear, where the gate comes first, or two, or no gate."""
    for first, last in (("c_fc", "c_proj"), ("fc1", "fc2"), ("fc_in", "fc_out"), ("dense_h_to_4h", "dense_4h_to_h")):
        if hasattr(mlp, first):
            return linear_matrix(getattr(mlp, first), members), None, linear_matrix(getattr(mlp, last), members)
    if not any(hasattr(mlp, name) for name in ("gate_proj", "gate_up_proj", "input_linear", "w1")):
        return linear_matrix(mlp.up_proj, members), None, linear_matrix(mlp.down_proj, members)
    if hasattr(mlp, "input_linear"):
        both, down = mlp.input_linear, mlp.output_linear
    elif hasattr(mlp, "gate_up_proj"):
        both, down = mlp.gate_up_proj, mlp.down_proj
    else:
        names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (linear_matrix(getattr(mlp, name), members) for name in names)
        return gate, up, down
    gate, up = linear_parts(both, [both.out_features // 2] * 2, members)
    return gate, up, linear_matrix(down, members)


def _beside(model: Any, block: Block, members: Sequence[str]) -> dict[str, matrix.Matrix]:
    """The shared expert of a layer with experts, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    mixture = next(sublayer for sublayer in block.sublayers if sublayer.experts is not None)
    beside = next((sublayer for sublayer in block.sublayers if sublayer.kind == "mlp"), None)
    if beside is not None:
        three = mlp_parts(model.get_submodule(beside.module), members)
        return {f"shared_{name}": part for name, part in zip(("gate", "up", "down"), three) if part is not None}
    found = {}
    for view in (view for group in mixture.groups for view in group.linears):
        part = view.name.rpartition(".")[2].removesuffix("_proj")
        found[f"shared_{part}"] = linear_matrix(model.get_submodule(view.name), members)
    share = getattr(model.get_submodule(mixture.module), "shared_expert_gate", None)
    if share is not None:
        found["shared_router"] = matrix.dense(share.weight.detach())
    return found


def experts_of(experts: Any, bank: ExpertBank) -> tuple[matrix.Matrix, matrix.Matrix | None, matrix.Matrix]:
    """Gate, up and down of a bank, or without a gate the first, None and down.

    The first I rows of a stacked projection are the gate.

    Dense ones that the family stores otherwise (transposed, or a row of the gate beside one of up) are copied.
    """
    found = []
    size = bank.intermediate
    halves = (slice(None, size), slice(size, None))
    lines = (slice(0, None, 2), slice(1, None, 2)) if bank.interleaved else halves
    first = zip(("gate_up_proj",) * 2, halves, lines) if bank.gated else [("up_proj", _ALL, _ALL)]
    for key, rows, stored in (*first, ("down_proj", _ALL, _ALL)):
        side, bias = getattr(experts, key), getattr(experts, f"{key}_bias", None)
        bias = None if bias is None else bias.detach()[:, stored]
        if isinstance(side, PackedTensors):
            found.append(packed_matrix(side, rows, bias))
        elif isinstance(experts, PackedExperts):
            found.append(matrix.dense(side.detach()[:, rows], bias))
        else:
            weight = side.detach().mT if bank.transposed else side.detach()
            found.append(matrix.dense(weight[:, stored], bias))
    return found[0], found[1] if bank.gated else None, found[-1]


def rounded_matrix(weight: Tensor, bits: int) -> matrix.Matrix:
    """A dense weight rounded to nearest on a symmetric grid, 64 columns per scale."""
    spec, packed = _encoded(weight, bits)
    columns = weight.shape[-1]
    return matrix.packed(packed[PACKED], packed[SCALE], None, bits, spec.group(columns), columns)


def _encoded(weight: Tensor, bits: int) -> tuple[QuantSpec, dict[str, Tensor]]:
    spec = QuantSpec(bits, 64, symmetric=True)
    values = weight.float()
    scale, zero = find_grid(values, spec, "minmax")
    return spec, codec(spec.codec).encode(round_codes(values, scale, zero, spec), scale, zero, spec).tensors


def screened(decoder: native.Decoder) -> native.Decoder:
    """Add a rounded head and, row by row, how far it can be off.

    By Cauchy and Schwarz a logit differs by at most the length of the row's rounding error times that of the input.
    Inputs of two bytes are off by at most 2^-14 of the largest of 64, so all together by sqrt(64) * 2^-14 = 4.9e-4 of
    the input's length; with what float32 sums add that stays within the allowance of 6e-4 of the row's length.
    """
    weight = decoder.head.data
    screen = rounded_matrix(weight, 8)
    bounds = []
    for rows in weight.split(4096):
        spec, tensors = _encoded(rows, 8)
        exact = rows.float()
        near = codec(spec.codec).decode(PackedWeight(tuple(rows.shape), spec, tensors)).float()
        bounds.append(1.001 * (exact - near).norm(dim=-1) + 6e-4 * exact.norm(dim=-1))
    return replace(decoder, screen=replace(screen, bias=decoder.head.bias), screen_error=torch.cat(bounds).contiguous())
