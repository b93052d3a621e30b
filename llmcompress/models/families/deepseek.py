"""DeepSeek-V2 to V3.2 and GLM-5: latent attention, first layers dense, shared experts beside the routed ones.
Youtu-LLM and MiniCPM3: latent attention in every layer, no experts.

In V3.2 and GLM-5 an indexer chooses the positions that a token sees. Rounding it would change a choice that no
statistic of ours knows, it is a thousandth of the weights, and it stays dense. Some layers of GLM-5 may take over the
choice of the layer before.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    PER_EXPERT,
    Family,
    Part,
    biases,
    expert_bank,
    gated_groups,
    gated_mlp,
    mixture,
    norm,
    scaled,
    weights,
)
from llmcompress.models.families.prediction import further_layers
from llmcompress.models.layout import LinearGroup, LinearView, Role, RouterView, Sublayer, TensorView


def latent_attention(facts: Facts, layer: str) -> Part:
    """Multi-head latent attention: q (or q_a → q_b), kv_a → kv_b, o.

    q_a and kv_a read the normed input; q_b and kv_b read the normed latents inside the module,
    hence two ``inner`` groups.
    """
    module = f"{layer}.self_attn"
    heads, bias, hidden = facts.heads, facts.flag("attention_bias"), facts.hidden
    latent, rope, nope = facts.size("kv_lora_rank"), facts.size("qk_rope_head_dim"), facts.size("qk_nope_head_dim")
    value, query_latent = facts.size("v_head_dim"), facts.optional_size("q_lora_rank")

    def linear(name: str, rows: int, columns: int, with_bias: bool = False) -> LinearView:
        return LinearView(f"{module}.{name}", rows, columns, Role.ATTENTION, with_bias)

    down = linear("kv_a_proj_with_mqa", latent + rope, hidden, bias)
    groups, kept = [], []
    if query_latent is None:
        groups.append(LinearGroup((linear("q_proj", heads * (nope + rope), hidden), down), "first", module))
    else:
        groups.append(LinearGroup((linear("q_a_proj", query_latent, hidden, bias), down), "first", module))
        inner = linear("q_b_proj", heads * (nope + rope), query_latent)
        groups.append(LinearGroup((inner,), "inner", module))
        kept += norm(f"{module}.q_a_layernorm", query_latent)
    groups.append(LinearGroup((linear("kv_b_proj", heads * (nope + value), latent),), "inner", module))
    groups.append(LinearGroup((linear("o_proj", hidden, heads * value, bias),), "last", module))
    kept += norm(f"{module}.kv_a_layernorm", latent)
    sublayer = Sublayer("attention", module, f"{layer}.input_layernorm", None, tuple(groups))
    return Part(sublayer, (*kept, *biases(tuple(groups))))


def sparse_attention(facts: Facts, layer: str, chooses: bool = True) -> Part:
    """Latent attention to the positions that an indexer chooses, its own or that of an earlier layer."""
    part, module = latent_attention(facts, layer), f"{layer}.self_attn.indexer"
    heads, width = facts.size("index_n_heads"), facts.size("index_head_dim")
    if facts.get("q_lora_rank") is None:
        raise InputError("config.json: q_lora_rank is null, but an indexer reads the latents of queries")
    if not chooses:
        return Part(replace(part.sublayer, handed=facts.size("index_topk")), part.kept)
    sizes = {"wk": width, "weights_proj": heads}
    beside = tuple(LinearView(f"{module}.{n}", rows, facts.hidden, Role.ATTENTION) for n, rows in sizes.items())
    kept = weights(beside)
    kept.append(TensorView(f"{module}.wq_b.weight", (heads * width, facts.size("q_lora_rank"))))
    kept += norm(f"{module}.k_norm", width, bias=True)
    return Part(replace(part.sublayer, beside=beside), (*part.kept, *kept))


def sigmoid_router(facts: Facts, layer: str) -> RouterView:
    """The router of DeepSeek-V3, which GLM-4.5 took over."""
    module = f"{layer}.mlp.gate"
    scale, renormalizes = facts.number("routed_scaling_factor"), facts.flag("norm_topk_prob")
    correction = TensorView(f"{module}.e_score_correction_bias", (facts.size("n_routed_experts"),))
    return RouterView(module, "sigmoid_group_topk", renormalizes, scale=scale, correction=correction)


def feed_forward(facts: Facts, index: int, layer: str, router: RouterView) -> Part:
    """A dense MLP in the first layers, then routed experts beside shared ones."""
    if facts.first_dense(index):
        return gated_mlp(facts, layer, facts.flag("mlp_bias"))
    return with_shared(facts, layer, router)


def by_kind(facts: Facts, index: int, layer: str, otherwise: bool) -> Part:
    """A dense MLP or DeepSeek-V3's experts, as a list says; ``otherwise``, whether dense, without one."""
    if facts.dense(index, otherwise):
        return gated_mlp(facts, layer)
    return with_shared(facts, layer, sigmoid_router(facts, layer))


def with_shared(facts: Facts, layer: str, router: RouterView) -> Part:
    """Routed experts beside shared ones."""
    bank = expert_bank(facts, layer, "n_routed_experts", "moe_intermediate_size", router)
    size = facts.size("moe_intermediate_size") * facts.size("n_shared_experts")
    module = f"{layer}.mlp.shared_experts"
    shared = gated_groups(module, facts.hidden, size, Role.SHARED_EXPERTS, facts.flag("mlp_bias"))
    return mixture(layer, bank, shared)


def _deepseek_v2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    # transformers 5 ignores norm_topk_prob here and always multiplies by the scale
    scale = facts.number("routed_scaling_factor")
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=False, scale=scale)
    return latent_attention(facts, layer), feed_forward(facts, index, layer, router)


def _deepseek_v3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return latent_attention(facts, layer), feed_forward(facts, index, layer, sigmoid_router(facts, layer))


def _sparse_layer(facts: Facts, index: int, layer: str, chooses: bool) -> tuple[Part, ...]:
    head = sparse_attention(facts, layer, chooses)
    return head, by_kind(facts, index, layer, facts.first_dense(index))


def _deepseek_v32(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _sparse_layer(facts, index, layer, True)


def _glm_moe_dsa(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _sparse_layer(facts, index, layer, _chooses(facts, index))


def _chooses(facts: Facts, index: int) -> bool:
    """Whether a layer of GLM-5 has an indexer: by transformers' list, or by a pattern or a rhythm of the hub's."""
    if facts.get("indexer_types") is not None:
        return facts.layer_kind("indexer_types", index, ("full", "shared"), "full") == "full"
    pattern = facts.get("index_topk_pattern")
    if pattern is None:
        every = max(facts.size("index_topk_freq", at_least=0), 1)
        return max(index - facts.size("index_skip_topk_offset", at_least=0) + 1, 0) % every == 0
    if not isinstance(pattern, str | list) or index >= len(pattern):
        raise InputError(f"config.json: index_topk_pattern {pattern!r} says nothing of layer {index}")
    return pattern[index] in ("F", "full")


def _youtu(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return latent_attention(facts, layer), gated_mlp(facts, layer)


def _minicpm3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    if facts.get("v_head_dim") is None:
        facts = facts.having(v_head_dim=facts.hidden // facts.heads)
    parts = latent_attention(facts, layer), gated_mlp(facts, layer, facts.flag("mlp_bias"))
    if facts.get("scale_depth") is None:
        return parts
    return scaled(parts, facts.number("scale_depth") / math.sqrt(facts.size("num_hidden_layers")))


_SHARED = {
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip

_V3 = {
    **_SHARED, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}  # fmt: skip

FAMILIES = (
    Family(
        "deepseek_v2",
        _deepseek_v2,
        {
            **_SHARED, "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "first_k_dense_replace": 0, "n_routed_experts": 64,
            "n_shared_experts": 2, "routed_scaling_factor": 1.0, "num_experts_per_tok": None,
            "moe_intermediate_size": 1407,
        },
        aliases={"n_routed_experts": "num_experts"},
        disk=PER_EXPERT,
    ),
    Family(
        "youtu",
        _youtu,
        {
            **_SHARED, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
            "num_attention_heads": 16, "tie_word_embeddings": True,
        },
    ),
    Family(
        "minicpm3",
        _minicpm3,
        {
            **_SHARED, "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
            "num_attention_heads": 40, "tie_word_embeddings": True, "kv_lora_rank": 256, "q_lora_rank": 768,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": None, "scale_depth": 1.4,
        },
    ),
    Family(
        "deepseek_v3",
        _deepseek_v3,
        _V3,
        aliases={"n_routed_experts": "num_local_experts"},
        disk=PER_EXPERT,
        ignored=further_layers("num_nextn_predict_layers"),
    ),
    Family(
        "deepseek_v32",
        _deepseek_v32,
        {
            **_V3, "mlp_layer_types": None, "num_nextn_predict_layers": None, "index_n_heads": 64,
            "index_head_dim": 128, "index_topk": 2048,
        },
        aliases={"n_routed_experts": "num_experts"},
        disk=PER_EXPERT,
        ignored=further_layers("num_nextn_predict_layers"),
    ),
    Family(
        "glm_moe_dsa",
        _glm_moe_dsa,
        {
            **_V3, "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78,
            "num_attention_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
            "mlp_layer_types": None, "num_nextn_predict_layers": None, "index_n_heads": 32, "index_head_dim": 128,
            "index_topk": 2048, "indexer_types": None, "index_topk_pattern": None, "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
        },
        aliases={"n_routed_experts": "num_experts"},
        disk=PER_EXPERT,
        ignored=further_layers("num_nextn_predict_layers"),
    ),
)  # fmt: skip
