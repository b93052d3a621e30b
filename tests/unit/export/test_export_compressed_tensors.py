from __future__ import annotations

import re
from dataclasses import replace

import pytest

from llmcompress.export.compressed_tensors import CompressedTensorsExporter, Scheme, quantization_config, scheme_of
from llmcompress.models.layout import ModelLayout
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.spec import QuantPlan, QuantSpec

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = layout_from_config({**SIZES, "model_type": "mixtral", "num_local_experts": 4})
GPT_OSS = layout_from_config({**SIZES, "model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4})
GOOD = QuantSpec(4, 32, symmetric=True)
EXPORTER = CompressedTensorsExporter()


def plan(layout: ModelLayout, spec: QuantSpec = GOOD, **changed: QuantSpec | None) -> QuantPlan:
    """All weights under ``spec``, those whose name contains a key under its value."""
    found: QuantPlan = {}
    for name, _, _, _ in layout.quantizable():
        chosen = next((value for part, value in changed.items() if part in name), spec)
        if chosen is not None:
            found[name] = chosen
    return found


def refusal(layout: ModelLayout, quant_plan: QuantPlan) -> str:
    (reason,) = EXPORTER.refusals(layout, quant_plan, {})
    return reason


def test_what_it_holds_is_not_refused() -> None:
    assert EXPORTER.refusals(MIXTRAL, plan(MIXTRAL), {}) == []
    assert EXPORTER.refusals(MIXTRAL, plan(MIXTRAL, QuantSpec(8, -1, True)), {}) == []
    assert EXPORTER.refusals(MIXTRAL, plan(MIXTRAL, experts=QuantSpec(8, 32, True)), {}) == []
    assert EXPORTER.refusals(MIXTRAL, plan(MIXTRAL, self_attn=None), {}) == []
    assert EXPORTER.refusals(MIXTRAL, {}, {}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"o_proj": QuantSpec(4, 32)}, "o_proj and 1 more: asymmetric"),
        ({"o_proj": QuantSpec(3, 32, True)}, "2 or 3 bits; serving kernels read 4 and 8"),
        ({"o_proj": QuantSpec(4, 48, True)}, "not a multiple of the group size"),
        ({"q_proj": QuantSpec(8, 32, True)}, "q_proj + k_proj + v_proj: runtimes fuse these layers"),
        ({"v_proj": None}, "q_proj + k_proj + v_proj: runtimes fuse these layers"),
        ({"down_proj": None}, "2 of 4 expert tensors stay dense"),
        ({"down_proj": QuantSpec(8, 32, True)}, "experts use several schemes"),
        ({"experts": None}, "loses dense experts"),
    ],
)
def test_each_reason_for_refusing(changes: dict[str, QuantSpec | None], words: str) -> None:
    assert words in refusal(MIXTRAL, plan(MIXTRAL, **changes))


def test_projections_that_transformers_initialises_are_refused() -> None:
    mamba = layout_from_config({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "time_step_rank": 32})
    assert "cannot load a packed out_proj of mamba" in refusal(mamba, plan(mamba))
    assert EXPORTER.refusals(mamba, plan(mamba, out_proj=None), {}) == []


def test_layers_with_different_experts_are_refused() -> None:
    mixed = {name: replace(spec, bits=8) if ".1.mlp" in name else spec for name, spec in plan(MIXTRAL).items()}
    assert "8 bit group 32" in refusal(MIXTRAL, mixed)


def test_stacked_families_and_expert_biases_are_refused() -> None:
    reasons = EXPORTER.refusals(GPT_OSS, plan(GPT_OSS), {})
    assert any("stacked" in reason for reason in reasons)
    assert any("biases" in reason for reason in reasons)


def test_losses_and_remarks() -> None:
    assert EXPORTER.losses({}) == []
    assert "pesf policy acts at run time" in EXPORTER.losses({"pesf": {"alpha": 0.3}})[0]
    assert len(EXPORTER.remarks(MIXTRAL, plan(MIXTRAL))) == 2
    assert len(EXPORTER.remarks(MIXTRAL, plan(MIXTRAL, experts=None))) == 1


W8, TOKEN = QuantSpec(8, -1, True), {"activations": {"bits": 8, "roles": ["attention", "mlp"]}}


def test_activations_per_token_are_held_with_8_bit_weights_of_the_same_linears() -> None:
    llama = layout_from_config({**SIZES, "model_type": "llama"})
    assert EXPORTER.refusals(llama, plan(llama, W8), TOKEN) == EXPORTER.losses(TOKEN) == []
    chunk = {"activations": {**TOKEN["activations"], "granularity": "chunk"}}
    assert EXPORTER.refusals(llama, plan(llama), chunk) == []
    assert "activations policy acts at run time" in EXPORTER.losses(chunk)[0]
    for quant_plan in (plan(llama), plan(llama, W8, down_proj=None), plan(llama, W8, down_proj=QuantSpec(8, 32, True))):
        (reason,) = EXPORTER.refusals(llama, quant_plan, TOKEN)
        assert "group_size: -1" in reason
    # rounded are the inputs of attention alone; and routed experts keep theirs
    assert len(EXPORTER.refusals(llama, plan(llama, W8), {"activations": {"bits": 8, "roles": ["attention"]}})) == 1
    assert "experts" in EXPORTER.refusals(MIXTRAL, plan(MIXTRAL, W8), TOKEN)[0]
    config = quantization_config(llama, plan(llama, W8), TOKEN)
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    assert quantization_config(llama, plan(llama, W8), chunk)["format"] == "pack-quantized"


def test_every_module_matches_exactly_one_target_or_is_ignored() -> None:
    config = quantization_config(MIXTRAL, plan(MIXTRAL, QuantSpec(8, -1, True), experts=GOOD, o_proj=None))
    groups = [group["targets"] for group in config["config_groups"].values()]
    # the first group must be the experts' one, and its pattern must name them: that is how transformers finds it
    assert "experts" in groups[0][0]
    names = ["model.layers.1.block_sparse_moe.experts.3.w2"]
    names += [linear.name for block in MIXTRAL.blocks for linear in block.linears()]
    names += [f"model.layers.{i}.block_sparse_moe.gate" for i in (0, 1)]

    def matches(name: str, patterns: list[str]) -> bool:
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)

    for name in names:
        hits = sum(matches(name, targets) for targets in groups)
        ignored = matches(name, config["ignore"])
        assert hits + ignored == 1, name
        assert ignored == (name.endswith(("gate", "o_proj"))), name


def test_linears_that_are_kept_are_ignored() -> None:
    """vLLM refuses a file that neither quantizes nor ignores a linear it knows."""
    layout = layout_from_config(
        {**SIZES, "model_type": "qwen3_next", "num_experts": 4, "layer_types": ["linear_attention", "full_attention"]}
    )
    ignored = quantization_config(layout, plan(layout))["ignore"]
    assert ignored == [
        *(f"model.layers.0.{name}" for name in ("linear_attn.in_proj_ba", "mlp.gate", "mlp.shared_expert_gate")),
        *(f"model.layers.1.{name}" for name in ("mlp.gate", "mlp.shared_expert_gate")),
        "lm_head",
    ]


def test_disagreeing_layers_are_named_one_by_one() -> None:
    mixed = {n: replace(s, bits=8) if ".1.self_attn" in n else s for n, s in plan(MIXTRAL).items()}
    config = quantization_config(MIXTRAL, mixed)
    by_bits = {g["weights"]["num_bits"]: g["targets"] for g in config["config_groups"].values()}
    assert "model.layers.1.self_attn.q_proj" in by_bits[8]
    assert "model.layers.0.self_attn.q_proj" in by_bits[4]


def test_a_group_as_long_as_the_row_or_longer() -> None:
    assert scheme_of(QuantSpec(4, 64, True), 64) == Scheme(4, 64)
    assert scheme_of(QuantSpec(4, 128, True), 64) == Scheme(4, 0)
    assert Scheme(4, 0).to_config()["strategy"] == "channel"


def test_predicted_size_counts_codes_scales_and_shapes() -> None:
    one = {"model.layers.0.self_attn.q_proj": GOOD}
    dense = EXPORTER.output_bytes(MIXTRAL, {}, 2)
    # 64 x 64 weights of two bytes become 4-bit codes, 128 fp16 scales and a shape of two int64
    assert dense - EXPORTER.output_bytes(MIXTRAL, one, 2) == 64 * 64 * 2 - (64 * 64 // 2 + 128 * 2 + 16)
