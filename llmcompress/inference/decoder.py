"""A model's weights in the layout of the native decode step (:mod:`llmcompress_kernels.decode`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import matrix
from llmcompress_kernels.decode_delta import Delta, DeltaSizes, StateCodec
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor, nn

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.inference.coverage import (
    ACTIVATIONS,
    CENTRED,
    NEIGHBOURS,
    NORMS_LAST,
    activation_of,
)
from llmcompress.inference.gates import with_gates
from llmcompress.inference.latent import is_latent, keys_and_values, latents_of
from llmcompress.inference.rotary import table_of
from llmcompress.models.layout import Block, ExpertBank, ModelLayout
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.embedding import PackedEmbedding, PackedRows, TiedHead, factor_of
from llmcompress.nn.experts import PackedExperts
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.mixers import runtime_of
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.tree_linear import PerMember, TreeLinear
from llmcompress.quant.codecs import codec
from llmcompress.quant.codecs.int_group import PACKED, SCALE, ZERO
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
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "norm_f")
# what configs call what norms add to the mean of squares
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")


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
    factor = float(getattr(config, "logit_scale", None) or 1.0)
    last = norm_of(final, adds_one=layout.norm_adds_one) * factor, _norm_bias(final, config)
    attention = next(s.module for block in layout.blocks for s in block.sublayers if s.kind == "attention")
    decoder = assembled(config, layers, last, model.get_submodule(attention), ends, routing, bool(members), scale)
    bank = next(iter(layout.banks.values()), None)
    if bank is None or bank.activation != "gpt_oss":
        return decoder
    experts: Any = model.get_submodule(bank.module)
    return replace(decoder, activation="gpt_oss", gate_slope=experts.alpha, gate_limit=experts.limit)


def _embedding_scale(words: Any, config: Any) -> float:
    """Factor of embeddings; Gemma's is rounded to the type of its weights."""
    if isinstance(words, PackedEmbedding):
        own = words.factor
    else:
        factor = factor_of(words)
        own = 1.0 if factor is None else float(torch.tensor(factor, dtype=words.weight.dtype))
    # AFMoE takes the root of the width or nothing
    root = float(config.hidden_size**0.5) if getattr(config, "mup_enabled", False) else 1.0
    return own * root * float(getattr(config, "embedding_multiplier", 1.0))


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
    )


def assembled(
    config: Any,
    layers: Sequence[native.Layer],
    final: tuple[Tensor, Tensor | None],
    attention: Any,
    ends: Sequence[tuple[matrix.Matrix, matrix.Matrix]],
    routing: native.Routing,
    family: bool = False,
    embedding_scale: float = 1.0,
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
        embedding_scale: Factor of embeddings.
    """
    latents = latents_of(config, attention) if is_latent(attention) else None
    groups = config.num_attention_heads if latents else getattr(attention, "num_key_value_groups", 1)
    tables = 1 + max(layer.rotary or 0 for layer in layers)
    return native.Decoder(
        layers=layers,
        # what divides the logits divides what the head reads
        final_norm=final[0] / getattr(config, "logits_scaling", 1.0),
        final_norm_bias=final[1],
        cosine=torch.empty(tables, 0, 0),
        sine=torch.empty(tables, 0, 0),
        embedding=ends[0][0],
        head=ends[0][1],
        heads=config.num_attention_heads,
        key_value_heads=config.num_attention_heads // groups,
        head_dim=attention.qk_head_dim if latents else _head_dim(attention),
        latents=latents,
        epsilon=next(float(getattr(config, key)) for key in EPSILONS if hasattr(config, key)),
        attention_scale=attention.scaling,
        routing=routing,
        embedding_scale=embedding_scale,
        activation=ACTIVATIONS[activation_of(config.to_dict())],
        attention_cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        neighbours=config.model_type in NEIGHBOURS,
        member_embeddings=[embedding for embedding, _ in ends] if family else (),
        member_heads=[head for _, head in ends] if family else (),
    )


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


def parts(module: Any) -> list[Any]:
    """A module, or those of the members of a family that stand in its place."""
    return list(module.parts) if isinstance(module, PerMember) else [module]


def norm_of(module: Any, name: str = "weight", adds_one: bool = False) -> Any:
    """A norm's weights or biases float32 ``[H]``, or ``[M, H]`` of a family; None where there are none.

    Args:
        module: The norm.
        name: Which of its tensors.
        adds_one: It multiplies by one more than it holds.
    """
    given = [getattr(part, name, None) for part in parts(module)]
    rows = [row.detach().float() + float(adds_one) for row in given if row is not None]
    if not rows:
        return None
    return torch.stack(rows).contiguous() if isinstance(module, PerMember) else rows[0].contiguous()


def final_norm_of(model: Any) -> Any:
    """The module of the norm before a model's head."""
    base = model.base_model
    return next(getattr(base, name) for name in _FINAL_NORMS if hasattr(base, name))


def _norm_bias(module: Any, config: Any) -> Any:
    """Biases of a LayerNorm, zeros where its family has none; None for RMSNorm."""
    if config.model_type in CENTRED:
        return torch.zeros_like(norm_of(module))
    return norm_of(module, "bias")


def window_of(config: Any, layer: int) -> int:
    """Positions that a token of a layer sees, itself the last of them; 0 for all.

    Args:
        config: Config of a text model. Families whose configs do not know windows ignore the key.
        layer: Which one.
    """
    known = hasattr(type(config), "sliding_window") and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None)
    if not known or (kinds is not None and kinds[layer] != "sliding_attention"):
        return 0
    return int(config.sliding_window or 0)


def _norms(model: Any, block: Block, adds_one: bool) -> dict[str, Any]:
    """Norms before and after the sublayers of a layer, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    found: dict[str, Any] = {"attention_norm": None, "mlp_norm": None}
    for name, sublayer in zip(("attention", "mlp"), block.sublayers):
        if sublayer.pre_norm is not None:
            before = model.get_submodule(sublayer.pre_norm)
            found[f"{name}_norm"] = norm_of(before, adds_one=adds_one)
            found[f"{name}_norm_bias"] = _norm_bias(before, model.config.get_text_config())
        if sublayer.post_norm is not None:
            found[f"{name}_after"] = norm_of(model.get_submodule(sublayer.post_norm), adds_one=adds_one)
    return found


def _layer(model: Any, block: Block, members: Sequence[str] = (), adds_one: bool = False) -> native.Layer:
    first, *beneath = block.sublayers
    attention, mlp = model.get_submodule(first.module), model.get_submodule(beneath[-1].module)
    config: Any = model.config.get_text_config()
    beside: dict[str, Any] = {}
    correction: Tensor | None = None
    if block.bank is None:
        gate, up, down = mlp_parts(mlp, members)
        router = None
    else:
        gate, up, down = experts_of(model.get_submodule(block.bank.module), block.bank)
        decides = Router(model, block.bank.router)
        weight: Any = decides.module.get_parameter(block.bank.router.matrix)
        router = matrix.dense(weight.detach(), getattr(decides.module, "bias", None))
        correction = decides.rule(block.bank.top_k).correction
        beside = _beside(model, block, members)
    window = window_of(config, block.index)
    return native.Layer(
        **_norms(model, block, adds_one),
        **(
            _delta_rule(model, first.module)
            if first.kind == "ssm"
            else _projections(attention, config, members, adds_one)
        ),
        gate=gate,
        up=up,
        down=down,
        router=router,
        router_correction=None if correction is None else correction.detach().float().contiguous(),
        **beside,
        window=window,
        rotary=table_of(model, attention, block.index, window),
        parallel=beneath[0].parallel,
    )


def _projections(attention: Any, config: Any, members: Sequence[str], adds_one: bool) -> dict[str, Any]:
    """What attention reads before and after, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    output = linear_matrix(attention.o_proj if hasattr(attention, "o_proj") else attention.dense, members)
    if is_latent(attention):
        return {**_latent_projections(attention), "output": output}
    last = config.model_type in NORMS_LAST
    names = ("query_layernorm", "key_layernorm") if last else ("q_norm", "k_norm")
    query_norm, key_norm = (norm_of(getattr(attention, name, None), adds_one=adds_one) for name in names)
    heads = _heads(attention, config, members)
    return {
        **heads,
        "output": output,
        "query_norm": query_norm,
        "key_norm": key_norm,
        "sinks": norm_of(attention, "sinks"),
        "gates": heads["query"].rows == 2 * config.num_attention_heads * _head_dim(attention),
        "norms_last": last,
        "whole_norms": query_norm is not None and query_norm.shape[-1] != attention.head_dim,
    }


def delta_sizes(module: Any) -> DeltaSizes:
    """Sizes of a delta rule.

    Args:
        module: A mixer of Qwen3-Next or Qwen3.5.
    """
    return DeltaSizes(module.num_v_heads, module.num_k_heads, module.head_k_dim, module.head_v_dim)


def _delta_rule(model: Any, name: str) -> dict[str, Any]:
    """What a delta rule reads before and after, by the names of :class:`~llmcompress_kernels.decode.Layer`."""
    module = model.get_submodule(name)
    grouped, sizes = hasattr(module, "in_proj_qkvz"), delta_sizes(module)
    if grouped:
        # those of a key head's value heads side by side
        both = module.in_proj_ba.weight.detach().unflatten(0, (sizes.key_heads, 2, -1))
        steps = both.transpose(0, 1).reshape(2 * sizes.heads, -1)
    else:
        steps = torch.cat([module.in_proj_b.weight.detach(), module.in_proj_a.weight.detach()])
    decay = -module.A_log.detach().float().exp()
    return {
        **dict.fromkeys(("query", "key", "value")),
        "conv_in": linear_matrix(module.in_proj_qkvz if grouped else module.in_proj_qkv),
        "conv_gates": None if grouped else linear_matrix(module.in_proj_z),
        "conv_weight": module.conv1d.weight.detach()[:, 0].float().mT.contiguous(),
        "steps": matrix.dense(steps),
        "output": linear_matrix(module.out_proj),
        "delta": Delta(
            sizes, norm_of(module, "dt_bias"), decay, norm_of(module.norm), grouped, *_state_codec(model, name)
        ),
    }


def _head_dim(attention: Any) -> int:
    return int(attention.head_dim if hasattr(attention, "head_dim") else attention.head_size)


def _state_codec(model: Any, name: str) -> tuple[StateCodec | None, Tensor | None]:
    """How a delta rule's states are kept, and their calibrated scale."""
    runtime = runtime_of(model)
    if runtime is None:
        return None, None
    quantizer = runtime.quantizers[name]
    spec, static = quantizer.spec, quantizer.static
    codec = StateCodec(spec.bits, quantizer.window, spec.refit, spec.dither)
    return codec, None if static is None else static.detach().contiguous()


def _heads(attention: Any, config: Any, members: Sequence[str]) -> dict[str, matrix.Matrix]:
    """Queries, keys and values from one linear or three; of GPT-NeoX's, which has each head's side by side, copies."""
    names = ("query", "key", "value")
    if hasattr(attention, "query_key_value"):
        both: Any = attention.query_key_value
        rows = torch.arange(both.out_features).view(config.num_attention_heads, 3, -1)
        return {name: linear_matrix(both, members, rows[:, i].flatten()) for i, name in enumerate(names)}
    if not hasattr(attention, "qkv_proj"):
        found = {name: linear_matrix(getattr(attention, f"{name[0]}_proj"), members) for name in names}
        if hasattr(attention, "gate_proj"):
            found["query"] = with_gates(attention.q_proj, attention.gate_proj, config.num_attention_heads)
        return found
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    sizes = [count * attention.head_dim for count in counts]
    return dict(zip(names, linear_parts(attention.qkv_proj, sizes, members)))


def _latent_projections(attention: Any) -> dict[str, Any]:
    low = attention.q_lora_rank is not None
    absorb, expand = keys_and_values(attention)
    return {
        "query": linear_matrix(attention.q_b_proj if low else attention.q_proj),
        "query_down": linear_matrix(attention.q_a_proj) if low else None,
        "query_down_norm": norm_of(attention.q_a_layernorm) if low else None,
        "key": linear_matrix(attention.kv_a_proj_with_mqa),
        "key_norm": norm_of(attention.kv_a_layernorm),
        "value": None,
        "absorb": absorb,
        "expand": expand,
    }


def mlp_parts(mlp: Any, members: Sequence[str] = ()) -> tuple[matrix.Matrix, matrix.Matrix | None, matrix.Matrix]:
    """Gate, up and down of an MLP: the first two from one linear, where the gate comes first, or two, or no gate."""
    for first, last in (("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h")):
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


def linear_matrix(module: nn.Module, members: Sequence[str] = (), rows: slice | Tensor = _ALL) -> matrix.Matrix:
    """A linear, or some of its rows, as a step reads it: dense, packed, or a tree's nodes for these members."""
    if isinstance(module, TreeLinear):
        assert isinstance(rows, slice)
        return _tree(module, members, rows)
    bias: Any = None if module.bias is None else module.bias[rows]  # type: ignore[index]
    if not isinstance(module, PackedLinear):
        weight: Any = module.weight
        return matrix.dense(weight.detach()[rows], bias)
    module.prepare()
    return packed_matrix(module, rows, bias)


def linear_parts(module: nn.Module, sizes: Sequence[int], members: Sequence[str] = ()) -> list[matrix.Matrix]:
    """A linear of several whose rows follow each other, so many of each."""
    ends = list(accumulate(sizes))
    return [linear_matrix(module, members, slice(end - size, end)) for size, end in zip(sizes, ends)]


def _tree(module: TreeLinear, members: Sequence[str], rows: slice) -> matrix.Matrix:
    """Nodes with a bit for each member; without a family those on one model's path."""
    module.prepare()
    first, count = _span(rows, module.out_features)
    assert first % LANES == 0
    blocks = slice(first // LANES, (first + count) // LANES)
    planes = [replace(p, words=p.words[blocks], scale=p.scale[blocks]) for p in module.planes]
    names = list(members) or [next(iter(sorted(frozenset.intersection(*module.members))))]
    below = [sum(1 << i for i, name in enumerate(names) if name in module.members[p.node]) for p in planes]
    bias = torch.stack([module.biases[name].float()[rows] for name in names]) if module.biases else None
    return matrix.of_tree(planes, below, count, module.in_features, module.group_size, bias)


def packed_matrix(side: PackedTensors, rows: slice | Tensor, bias: Tensor | None = None) -> matrix.Matrix:
    """Some rows of a packed weight, shared where they follow each other interleaved already, and copied elsewhere."""
    tensors: dict[str, Any] = {key: side._buffers.get(key) for key in (PACKED, SCALE, ZERO)}
    if isinstance(rows, slice) and side.interleaved and all((end or 0) % LANES == 0 for end in (rows.start, rows.stop)):
        blocks = slice(*(None if end is None else end // LANES for end in (rows.start, rows.stop)))
        interleaved, parts = True, [None if t is None else t[..., blocks, :, :] for t in tensors.values()]
    else:
        stored = side.packed_weight().tensors
        interleaved, parts = False, [None if t is None else t[..., rows, :] for t in map(stored.get, tensors)]
    words, scale, zero = parts
    assert words is not None
    assert scale is not None
    sizes = (side.spec.bits, side.columns_per_group, side.shape[-1])
    found = matrix.packed(words, scale, zero, *sizes, bias, interleaved)
    return replace(found, input_bytes=native.INT8_PLANES) if getattr(side, "int8_activations", False) else found


def _span(rows: slice, count: int) -> tuple[int, int]:
    first, last, _ = rows.indices(count)
    return first, last - first


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
