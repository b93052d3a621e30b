"""Kimi Linear: Kimi Delta Attention in most layers, DeepSeek's latent attention and experts in the rest of it.

Facts found in transformers 5.23: hub configs keep the linear layers in a dict of its own, with numbers of layers from
one on. What makes decays and step sizes (``forget_gate``, ``b_proj``) acts through exponentials and sigmoids and is
small; it stays dense, as in Qwen3-Next. Heads are not turned to their positions anywhere.
"""

from __future__ import annotations

from llmcompress.errors import InputError
from llmcompress.models.families.deepseek import by_kind, latent_attention
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, norm, weights
from llmcompress.models.layout import DiskNames, LinearGroup, LinearView, Role, ScanView, Sublayer, TensorView

_KINDS = ("linear_attention", "full_attention")
# where a config says what of the linear layers
_SIZES = {
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}


def _given(facts: Facts) -> Facts:
    """The dict in which hub configs describe the linear layers, over what the file says itself."""
    found = facts.get("linear_attn_config") or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: linear_attn_config must be an object, not {found!r}")
    return Facts(found, {theirs: facts.get(ours) for ours, theirs in _SIZES.items()})


def _sizes(facts: Facts) -> tuple[int, int, int]:
    """Heads, columns of one, and taps of the convolution."""
    given = _given(facts)
    heads, head, taps = (given.size(key) for key in _SIZES.values())
    return heads, head, taps


def _kind(facts: Facts, index: int) -> str:
    if facts.get("layer_types") is not None:
        return facts.layer_kind("layer_types", index, _KINDS, _KINDS[0])
    given = _given(facts)
    if given.get("full_attn_layers") is None or given.get("kda_layers") is None:
        return _KINDS[index > 0 and index % 4 == 0]
    for kind, key in zip(_KINDS, ("kda_layers", "full_attn_layers")):
        if index + 1 in given.indices(key):
            return kind
    raise InputError(f"config.json: linear_attn_config has layer {index + 1} in neither of its two lists")


def _delta_attention(facts: Facts, layer: str) -> Part:
    """Queries, keys and values through a convolution and the rule, its norm gated by a projection in two steps."""
    module, hidden = f"{layer}.self_attn", facts.hidden
    heads, head, taps = _sizes(facts)
    inner, gate = heads * head, f"{layer}.self_attn.forget_gate"

    def linear(name: str, rows: int, columns: int) -> LinearView:
        return LinearView(f"{module}.{name}", rows, columns, Role.SSM)

    first = [*(linear(f"{word}_proj", inner, hidden) for word in "qkv"), linear("g_a_proj", head, hidden)]
    groups = (
        LinearGroup(tuple(first), "first", module),
        LinearGroup((linear("g_b_proj", inner, head),), "inner", module),
        LinearGroup((linear("o_proj", hidden, inner),), "last", module),
    )
    beside = (linear("forget_gate.f_a_proj", head, hidden), linear("b_proj", heads, hidden))
    kept = weights(beside)
    kept += [TensorView(f"{gate}.f_b_proj.weight", (inner, head)), TensorView(f"{gate}.dt_bias", (inner,))]
    kept += [TensorView(f"{gate}.A_log", (1, 1, heads, 1)), TensorView(f"{module}.conv1d.weight", (3 * inner, 1, taps))]
    scan = ScanView(module, "kda", heads, head, head, heads, 3 * inner, taps)
    sublayer = Sublayer("ssm", module, f"{layer}.input_layernorm", None, groups, scan=scan, beside=beside)
    return Part(sublayer, (*kept, *norm(f"{module}.o_norm", head)))


def _kimi_linear(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    linear = _kind(facts, index) == "linear_attention"
    head = _delta_attention(facts, layer) if linear else latent_attention(facts, layer)
    return head, by_kind(facts, index, layer, facts.first_dense(index))


def _disk(facts: Facts) -> DiskNames:
    heads, head, _ = _sizes(facts)
    mixture = ".block_sparse_moe."
    return DiskNames(
        (
            (".mlp.gate.", f"{mixture}gate."),
            (".mlp.shared_experts.", f"{mixture}shared_experts."),
            (".self_attn.forget_gate.", ".self_attn."),
        ),
        (".mlp.experts", f"{mixture}experts"),
        *("w1.weight", "w3.weight", "w2.weight"),
        # transformers writes the dense layers so
        older=((".mlp.", mixture),),
        cut=((".conv1d.weight", tuple((f".{word}_conv1d.weight", heads * head) for word in "qkv")),),
    )


FAMILIES = (
    Family(
        "kimi_linear",
        _kimi_linear,
        {
            "vocab_size": 163840, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 27,
            "num_attention_heads": 32, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
            "mlp_bias": False, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1, "mlp_layer_types": None,
            "layer_types": None, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1024, "routed_scaling_factor": 2.446, "norm_topk_prob": True,
            "linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "linear_attn_config": None,
        },
        aliases={
            "n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts",
            "num_experts_per_tok": "num_experts_per_token", "norm_topk_prob": "moe_renormalize",
        },
        disk=_disk,
    ),
)  # fmt: skip
