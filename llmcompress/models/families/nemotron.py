"""Nemotron-H and Nemotron 3: one mixer per layer, be it Mamba-2, attention, an MLP or experts, none with a gate."""

from __future__ import annotations

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.mixers import plain_mixer
from llmcompress.models.families.parts import (
    AttentionNames,
    Family,
    Part,
    attention,
    biases,
    expert_bank,
    mixture,
    plain_groups,
)
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer, TensorView

_KEYS = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")


def _nemotron_kinds(facts: Facts) -> list[str]:
    letters = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    pattern = facts.get("hybrid_override_pattern")
    if facts.get("layers_block_type") is not None:
        return facts.layer_kinds("layers_block_type")
    if isinstance(pattern, str):
        unknown = sorted(set(pattern) - set(letters))
        if unknown:
            raise InputError(f"config.json: hybrid_override_pattern has unknown letters {''.join(unknown)!r}")
        return [letters[letter] for letter in pattern]
    return ["linear_attention", "moe", "full_attention", "mlp"]


def _nemotron_experts(facts: Facts, layer: str) -> Part:
    """Ungated experts of a sigmoid router, beside ungated shared experts; in Nemotron 3 Super and Ultra the routed ones
    work on a narrower projection of the input.
    """
    if facts.get("mlp_hidden_act") != "relu2":
        raise InputError(
            f"config.json: mlp_hidden_act {facts.get('mlp_hidden_act')!r} is not supported with experts of nemotron_h",
            "supported: relu2",
        )
    module, hidden, bias = f"{layer}.mixer", facts.hidden, facts.flag("mlp_bias")
    latent, entry = facts.optional_size("moe_latent_size"), None
    correction = TensorView(f"{module}.gate.e_score_correction_bias", (facts.size("n_routed_experts"),))
    extra: list[TensorView] = []
    if latent is not None:
        # every routed token passes both, for less than a hundredth of a layer's weights
        entry = LinearView(f"{module}.fc1_latent_proj", latent, hidden, Role.MLP, bias)
        for name, rows, columns in (("fc1", latent, hidden), ("fc2", hidden, latent)):
            extra.append(TensorView(f"{module}.{name}_latent_proj.weight", (rows, columns)))
            extra += [TensorView(f"{module}.{name}_latent_proj.bias", (rows,))] if bias else []
    router = RouterView(
        f"{module}.gate",
        "sigmoid_group_topk",
        facts.flag("norm_topk_prob"),
        scale=facts.number("routed_scaling_factor"),
        correction=correction,
    )
    bank = expert_bank(
        facts, layer, "n_routed_experts", "moe_intermediate_size", router,
        name="mixer", activation="relu2", gated=False, entry=entry,
    )  # fmt: skip
    size = facts.size("moe_shared_expert_intermediate_size")
    shared = plain_groups(f"{module}.shared_experts", hidden, size, Role.SHARED_EXPERTS, bias)
    return mixture(layer, bank, shared, tuple(extra), name="mixer", pre_norm="norm")


def _nemotron_h(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """One mixer per layer: Mamba-2, attention, an ungated MLP or ungated experts."""
    kind, module, pre_norm = _nemotron_kinds(facts)[index], f"{layer}.mixer", f"{layer}.norm"
    if kind == "linear_attention":
        part = plain_mixer(facts, layer, _KEYS)
    elif kind == "full_attention":
        part = attention(facts, layer, names=AttentionNames("mixer", "norm"))
    elif kind == "mlp":
        size, bias = facts.size("intermediate_size"), facts.flag("mlp_bias")
        groups = plain_groups(module, facts.hidden, size, Role.MLP, bias)
        part = Part(Sublayer("mlp", module, pre_norm, None, groups), biases(groups))
    elif kind == "moe":
        part = _nemotron_experts(facts, layer)
    else:
        raise InputError(
            f"config.json: layer {index} of this nemotron_h is {kind!r}, which is not supported",
            "supported: linear_attention, full_attention, mlp, moe",
        )
    return (part,)


FAMILIES = (
    Family(
        "nemotron_h",
        _nemotron_h,
        {
            "vocab_size": 131072, "hidden_size": 4096, "tie_word_embeddings": False, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504, "mlp_bias": False,
            "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4,
            "use_bias": False, "use_conv_bias": True, "mlp_hidden_act": "relu2", "n_routed_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
            "moe_latent_size": None, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        },
        aliases={
            "layers_block_type": "layer_types", "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
            "use_conv_bias": "mamba_conv_bias", "n_routed_experts": "num_local_experts",
        },
        disk=DiskNames(renames=(("model.", "backbone."),), experts=("model.", "backbone.")),
        embedding="embeddings",
        final_norm="norm_f",
        depth=lambda facts: len(_nemotron_kinds(facts)),
        ignored=(r"^mtp",),
    ),
)  # fmt: skip
