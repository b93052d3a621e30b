"""State-space families and hybrids: Mamba, Falcon Mamba, Mamba-2, Bamba, Falcon-H1, Nemotron-H, Granite 4 and Jamba.

Facts found in transformers 5.23: every mixer reads ``conv1d.weight`` directly, Mamba-1 mixers also ``dt_proj.weight``,
so neither may become a packed module; they are small and stay dense. ``in_proj`` of Mamba-2 holds the rows
``[z | x | B | C | dt]``; the dt rows stay dense.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, gcd
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    Family,
    Part,
    attention,
    biases,
    expert_bank,
    gated_mlp,
    mixture,
    norm,
    scaled,
)
from llmcompress.models.layout import (
    DiskNames,
    LinearGroup,
    LinearView,
    Role,
    RouterView,
    ScanView,
    Sublayer,
    TensorView,
)

# channels of a virtual head of Mamba-1, where the number of channels allows
VIRTUAL_HEAD = 64


def _conv(scan: ScanView, bias: bool) -> list[TensorView]:
    views = [TensorView(f"{scan.module}.conv1d.weight", (scan.conv_channels, 1, scan.conv_width))]
    return [*views, TensorView(f"{scan.module}.conv1d.bias", (scan.conv_channels,))] if bias else views


def mamba1(
    facts: Facts,
    scan: ScanView,
    pre_norm: str,
    rank: int,
    bias: bool,
    conv_bias: bool,
    extra: tuple[TensorView, ...] = (),
) -> Part:
    """A Mamba-1 mixer: in_proj → conv → x_proj → dt_proj → scan → out_proj.

    Args:
        facts: The config.
        scan: Made by :func:`virtual_scan`.
        pre_norm: Run-time name of the norm before the mixer.
        rank: Width of the time step's bottleneck.
        bias: Whether in_proj and out_proj have biases.
        conv_bias: Whether the convolution has one.
        extra: Further dense tensors (Jamba's norms).
    """
    module, inner, states = scan.module, scan.conv_channels, scan.states

    def linear(name: str, rows: int, columns: int, with_bias: bool) -> LinearView:
        return LinearView(f"{module}.{name}", rows, columns, Role.SSM, with_bias)

    groups = (
        LinearGroup((linear("in_proj", 2 * inner, facts.hidden, bias),), "first", module),
        LinearGroup((linear("x_proj", rank + 2 * states, inner, False),), "inner", module),
        LinearGroup((linear("out_proj", facts.hidden, inner, bias),), "last", module),
    )
    kept = [TensorView(f"{module}.A_log", (inner, states)), TensorView(f"{module}.D", (inner,))]
    kept += _conv(scan, conv_bias)
    kept += [TensorView(f"{module}.dt_proj.weight", (inner, rank)), TensorView(f"{module}.dt_proj.bias", (inner,))]
    return Part(Sublayer("ssm", module, pre_norm, None, groups, scan=scan), (*kept, *biases(groups), *extra))


def virtual_scan(module: str, inner: int, states: int, width: int) -> ScanView:
    """The scan of a Mamba-1 mixer with ``inner`` channels, cut into virtual heads."""
    channels = gcd(inner, VIRTUAL_HEAD)
    return ScanView(module, "mamba1", inner // channels, channels, states, 1, inner, width)


def mamba2(
    facts: Facts,
    scan: ScanView,
    pre_norm: str,
    in_bias: bool,
    out_bias: bool,
    conv_bias: bool,
    gated_norm: bool = True,
) -> Part:
    """A Mamba-2 mixer: in_proj → conv → scan → gated norm → out_proj.

    Args:
        facts: The config.
        scan: Made by :func:`headed_scan`.
        pre_norm: Run-time name of the norm before the mixer.
        in_bias: Whether in_proj has a bias.
        out_bias: Whether out_proj has one.
        conv_bias: Whether the convolution has one.
        gated_norm: Whether there is a norm between scan and out_proj.
    """
    module, heads, inner = scan.module, scan.heads, scan.heads * scan.channels
    rows = inner + scan.conv_channels + heads
    first = LinearView(f"{module}.in_proj", rows, facts.hidden, Role.SSM, in_bias, kept_rows=heads)
    last = LinearView(f"{module}.out_proj", facts.hidden, inner, Role.SSM, out_bias)
    linears = (LinearGroup((first,), "first", module), LinearGroup((last,), "last", module))
    kept = [TensorView(f"{module}.{name}", (heads,)) for name in ("dt_bias", "A_log", "D")]
    kept += _conv(scan, conv_bias) + (norm(f"{module}.norm", inner) if gated_norm else [])
    return Part(Sublayer("ssm", module, pre_norm, None, linears, scan=scan), (*kept, *biases(linears)))


def headed_scan(module: str, heads: int, channels: int, states: int, groups: int, width: int) -> ScanView:
    """The scan of a Mamba-2 mixer.

    Raises:
        InputError: The heads cannot share the groups evenly.
    """
    if heads % groups:
        raise InputError(f"config.json: {heads} state-space heads do not divide into {groups} groups")
    conv = heads * channels + 2 * groups * states
    return ScanView(module, "mamba2", heads, channels, states, groups, conv, width)


def _rank(facts: Facts, key: str) -> int:
    return ceil(facts.hidden / 16) if facts.get(key) == "auto" else facts.size(key)


def _whole(value: float, what: str) -> int:
    if value != int(value) or value < 1:
        raise InputError(f"config.json: {what} is {value}, not a whole number of channels")
    return int(value)


def _mamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    inner = facts.optional_size("intermediate_size")
    inner = inner or _whole(facts.number("expand") * facts.hidden, "expand * hidden_size")
    scan = virtual_scan(f"{layer}.mixer", inner, facts.size("state_size"), facts.size("conv_kernel"))
    rank, bias, conv_bias = _rank(facts, "time_step_rank"), facts.flag("use_bias"), facts.flag("use_conv_bias")
    return (mamba1(facts, scan, f"{layer}.norm", rank, bias, conv_bias),)


_MIXER_KEYS = ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel")
_HYBRID_KEYS = ("mamba_n_groups", "mamba_d_conv")
_NEMOTRON_KEYS = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")


def _mixer(facts: Facts, layer: str, keys: tuple[str, ...]) -> Part:
    """The Mamba-2 mixer of a layer that holds nothing else."""
    heads, channels, states, groups, width = (facts.size(key) for key in keys)
    scan = headed_scan(f"{layer}.mixer", heads, channels, states, groups, width)
    bias = facts.flag("use_bias")
    return mamba2(facts, scan, f"{layer}.norm", bias, bias, facts.flag("use_conv_bias"))


def _mamba2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return (_mixer(facts, layer, _MIXER_KEYS),)


def _head_dim(facts: Facts, inner: float) -> int:
    heads = facts.size("mamba_n_heads")
    return (
        _whole(inner / heads, "channels per mamba head")
        if facts.get("mamba_d_head") == "auto"
        else facts.size("mamba_d_head")
    )


def _hybrid_mamba(
    facts: Facts, layer: str, inner: float, out_bias: str = "mamba_proj_bias", gated: bool = True
) -> Part:
    """The Mamba-2 mixer of Bamba, Falcon-H1 and Granite 4, whose configs share their words."""
    groups, width = (facts.size(key) for key in _HYBRID_KEYS)
    channels = _head_dim(facts, inner)
    scan = headed_scan(
        f"{layer}.mamba", facts.size("mamba_n_heads"), channels, facts.size("mamba_d_state"), groups, width
    )
    in_bias, conv_bias = facts.flag("mamba_proj_bias"), facts.flag("mamba_conv_bias")
    return mamba2(facts, scan, f"{layer}.input_layernorm", in_bias, facts.flag(out_bias), conv_bias, gated)


def _bamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    if index in facts.indices("attn_layer_indices"):
        first = attention(facts, layer, bias, bias)
    else:
        first = _hybrid_mamba(facts, layer, facts.number("mamba_expand") * facts.hidden)
    return first, gated_mlp(facts, layer, facts.flag("mlp_bias"), "pre_ff_layernorm", name="feed_forward")


def _falcon_h1(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Attention and Mamba-2 side by side on the same input, each with constants of its own."""
    inner = facts.optional_size("mamba_d_ssm") or facts.number("mamba_expand") * facts.hidden
    bias = facts.flag("attention_bias")
    scan = _hybrid_mamba(facts, layer, inner, "projectors_bias", facts.flag("mamba_rms_norm"))
    beside = attention(facts, layer, bias, bias)
    scaled = replace(scan.sublayer, output_scale=facts.number("ssm_out_multiplier"))
    parallel = replace(
        beside.sublayer,
        parallel=True,
        input_scale=facts.number("attention_in_multiplier"),
        output_scale=facts.number("attention_out_multiplier"),
    )
    mlp = gated_mlp(facts, layer, facts.flag("mlp_bias"), "pre_ff_layernorm", name="feed_forward")
    return Part(scaled, scan.kept), Part(parallel, beside.kept), mlp


def _granite(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Granite 4: Mamba-2 or attention, then experts and a shared MLP side by side."""
    bias = facts.flag("attention_bias")
    kind = facts.layer_kind("layer_types", index, "linear_attention")
    if kind == "linear_attention":
        first = _hybrid_mamba(facts, layer, facts.number("mamba_expand") * facts.hidden)
    elif kind == "full_attention":
        first = attention(facts, layer, bias, bias)
    else:
        raise InputError(f"config.json: layer_types[{index}] {kind!r} is not supported in granitemoehybrid")
    module = f"{layer}.shared_mlp"
    size = facts.size("shared_intermediate_size")
    groups = (
        LinearGroup((LinearView(f"{module}.input_linear", 2 * size, facts.hidden, Role.MLP),), "first", module),
        LinearGroup((LinearView(f"{module}.output_linear", facts.hidden, size, Role.MLP),), "last", module),
    )
    after = f"{layer}.post_attention_layernorm"
    parts = [first, Part(Sublayer("mlp", module, after, None, groups), ())]
    if facts.size("num_local_experts", at_least=0):
        router = RouterView(f"{layer}.block_sparse_moe.router", "topk_softmax", renormalizes=True)
        name = "block_sparse_moe"
        bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router, name=name)
        moe = mixture(layer, bank, name=name)
        parts.append(Part(replace(moe.sublayer, parallel=True), moe.kept))
    return scaled(parts, facts.number("residual_multiplier"))


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


def _ungated_groups(facts: Facts, module: str, size: int, role: Role) -> tuple[LinearGroup, ...]:
    """Up and down of an MLP without a gate."""
    bias = facts.flag("mlp_bias")
    up = LinearView(f"{module}.up_proj", size, facts.hidden, role, bias)
    down = LinearView(f"{module}.down_proj", facts.hidden, size, role, bias)
    return LinearGroup((up,), "first", module), LinearGroup((down,), "last", module)


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
    extra = [TensorView(f"{module}.gate.e_score_correction_bias", (facts.size("n_routed_experts"),))]
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
    )
    bank = expert_bank(
        facts, layer, "n_routed_experts", "moe_intermediate_size", router,
        name="mixer", activation="relu2", gated=False, entry=entry,
    )  # fmt: skip
    size = facts.size("moe_shared_expert_intermediate_size")
    shared = _ungated_groups(facts, f"{module}.shared_experts", size, Role.SHARED_EXPERTS)
    return mixture(layer, bank, shared, tuple(extra), name="mixer", pre_norm="norm")


def _nemotron_h(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """One mixer per layer: Mamba-2, attention, an ungated MLP or ungated experts."""
    kind, module, pre_norm = _nemotron_kinds(facts)[index], f"{layer}.mixer", f"{layer}.norm"
    if kind == "linear_attention":
        part = _mixer(facts, layer, _NEMOTRON_KEYS)
    elif kind == "full_attention":
        part = attention(facts, layer, names=("mixer", "norm"))
    elif kind == "mlp":
        groups = _ungated_groups(facts, module, facts.size("intermediate_size"), Role.MLP)
        part = Part(Sublayer("mlp", module, pre_norm, None, groups), biases(groups))
    elif kind == "moe":
        part = _nemotron_experts(facts, layer)
    else:
        raise InputError(
            f"config.json: layer {index} of this nemotron_h is {kind!r}, which is not supported",
            "supported: linear_attention, full_attention, mlp, moe",
        )
    return (part,)


def _jamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Mamba-1 with norms on dt, B and C, or attention; then a dense MLP or experts."""
    if index % facts.size("attn_layer_period") == facts.size("attn_layer_offset", at_least=0):
        first = attention(facts, layer)
    else:
        module, rank, states = f"{layer}.mamba", _rank(facts, "mamba_dt_rank"), facts.size("mamba_d_state")
        norms = (
            *norm(f"{module}.dt_layernorm", rank),
            *norm(f"{module}.b_layernorm", states),
            *norm(f"{module}.c_layernorm", states),
        )
        inner = _whole(facts.number("mamba_expand") * facts.hidden, "mamba_expand * hidden_size")
        scan = virtual_scan(module, inner, states, facts.size("mamba_d_conv"))
        bias, conv_bias = facts.flag("mamba_proj_bias"), facts.flag("mamba_conv_bias")
        first = mamba1(facts, scan, f"{layer}.input_layernorm", rank, bias, conv_bias, norms)
    sparse = index % facts.size("expert_layer_period") == facts.size("expert_layer_offset", at_least=0)
    if not sparse or facts.size("num_experts") == 1:
        return first, gated_mlp(facts, layer, False, "pre_ff_layernorm", name="feed_forward")
    router = RouterView(f"{layer}.feed_forward.router", "softmax_topk", renormalizes=False)
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", router, name="feed_forward")
    return first, mixture(layer, bank, name="feed_forward", pre_norm="pre_ff_layernorm")


_MAMBA = {
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "expand": 2, "conv_kernel": 4,
    "use_bias": False, "use_conv_bias": True, "time_step_rank": "auto", "tie_word_embeddings": True,
}  # fmt: skip
_BACKBONE: dict[str, Any] = {"body": "backbone", "embedding": "embeddings", "final_norm": "norm_f"}
# transformers gives an embedding of the old name random values, so it is never written
_OLD_EMBEDDING = DiskNames(older=(("backbone.embeddings.", "backbone.embedding."),))
_HYBRID = {
    "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mamba_n_heads": 128, "mamba_d_head": "auto",
    "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}  # fmt: skip
_GRANITE_DISK = DiskNames(
    renames=(
        (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
        (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
        (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    )
)

FAMILIES = (
    Family("mamba", _mamba, _MAMBA, disk=_OLD_EMBEDDING, **_BACKBONE),
    Family("falcon_mamba", _mamba, _MAMBA, disk=_OLD_EMBEDDING, **_BACKBONE),
    Family(
        "mamba2",
        _mamba2,
        {
            **_MAMBA, "vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64,
            "num_heads": 128, "head_dim": 64, "n_groups": 8, "tie_word_embeddings": False,
        },
        disk=_OLD_EMBEDDING,
        **_BACKBONE,
    ),
    Family("bamba", _bamba, _HYBRID, final_norm="final_layernorm"),
    Family(
        "falcon_h1",
        _falcon_h1,
        {
            **_HYBRID, "mamba_d_ssm": 1024, "projectors_bias": False, "mamba_rms_norm": False,
            "attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "ssm_out_multiplier": 1.0,
        },
        final_norm="final_layernorm",
    ),
    Family(
        "granitemoehybrid",
        _granite,
        {
            **_HYBRID, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
            "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
            "residual_multiplier": 1.0, "layer_types": None,
        },
        aliases={"layer_types": "layers_block_type"},
        disk=_GRANITE_DISK,
    ),
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
    Family(
        "jamba",
        _jamba,
        {
            "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
            "hidden_act": "silu", "num_experts_per_tok": 2, "num_experts": 16, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto", "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=DiskNames(experts=(".feed_forward.experts", ".feed_forward.experts")),
        final_norm="final_layernorm",
    ),
)  # fmt: skip
