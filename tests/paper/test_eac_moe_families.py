"""EAC-MoE test 6: every family through capture, 8-bit quantization, saving and loading; names on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from llmcompress.export.native import write_native
from llmcompress.hf import load
from llmcompress.models.assemble import compressed_model
from llmcompress.stages.qesc import Qesc, QescConfig

RULES = {"all": {"role": ["attention", "experts", "shared_experts", "mlp", "ssm"], "bits": 8, "group_size": 16}}
# how the hub names the router and an expert's gate projection
DISK = {
    "mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.3.w1.weight"),
    "phimoe": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.3.w1.weight"),
    "qwen2_moe": ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"),
    "qwen3_moe": ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"),
    "olmoe": ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"),
    "deepseek_v2": ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"),
    "deepseek_v3": ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"),
    "gpt_oss": ("mlp.router.weight", "mlp.experts.gate_up_proj"),
}


@torch.no_grad()
def test_quantize_save_load(tiny, tmp_path, moe_family):
    state = tiny.state(tmp_path / "model", moe_family, samples=10)
    Qesc("quantize", QescConfig.model_validate({"rules": RULES})).run(state, tiny.context(tmp_path))
    tokens = state.calibration.tokens[:2]
    dense = state.model.dense_model(torch.float32)(tokens).logits
    model = compressed_model(state.model, state.packed, {}, dtype=torch.float32)
    logits = model(tokens).logits
    for _, patch in state.packed.blocks():
        # squared errors, so this is one per cent of the output
        assert all(error < 1e-4 for error in patch.record["errors"].values()), patch.record["errors"]
    # a token at a routing boundary may still change experts, which the median ignores
    per_token = (logits - dense).norm(dim=-1) / dense.norm(dim=-1)
    assert float(per_token.median()) < 2e-2
    planned = {name for name, _, _, _ in state.model.layout.quantizable()}
    assert set(state.packed.plan()) == planned, "no weight was left out silently"
    write_native(state.model, state.packed, {}, tmp_path / "artifact", {})
    again, _ = load(tmp_path / "artifact", dtype=torch.float32)
    assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("family", sorted(DISK))
def test_calibrated_routers_are_found_under_hub_names(tiny, tmp_path, family):
    """The checkpoint has the hub's names; a calibrated router lands in the artifact under the run-time name."""
    state = tiny.state(tmp_path / "model", family, samples=10)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as handle:
        names = set(handle.keys())
    last = len(state.model.layout.blocks) - 1
    router, expert = (f"model.layers.{last}.{part}" for part in DISK[family])
    assert {router, expert} <= names
    rules = {"all": {**RULES["all"], "bits": 3}}
    fields = {"rules": rules, "router": {"guard": False}}
    Qesc("quantize", QescConfig.model_validate(fields)).run(state, tiny.context(tmp_path))
    write_native(state.model, state.packed, {"pesf": {"alpha": 0.5}}, tmp_path / "artifact", {})
    again, _ = load(tmp_path / "artifact")
    name = f"{state.model.layout.blocks[last].bank.router.module}.weight"
    stored = again.get_parameter(name)
    assert torch.equal(stored, state.packed.read_block(last).replaced[name].to(stored))
    assert again.llmcompress_skipping.policy.alpha == 0.5
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())
    assert config["quantization_config"]["policies"] == {"pesf": {"alpha": 0.5}}
