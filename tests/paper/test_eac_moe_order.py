"""EAC-MoE test 3: attention, then router, then experts; and a router sees every layer before it quantized."""

from __future__ import annotations

import torch

from llmcompress.stages.blockwise import block_solver
from llmcompress.stages.qesc import Qesc, QescConfig
from llmcompress.stages.router_calibration import RouterCalibrator

RULES = {
    "attention": {"role": "attention", "bits": 4, "group_size": 16},
    "experts": {"role": ["experts", "shared_experts", "mlp"], "bits": 2, "group_size": 16},
}


def run(tiny, folder, family):
    state = tiny.state(folder / "model", family, samples=10)
    config = QescConfig.model_validate({"rules": RULES, "router": {"guard": False}})
    Qesc("quantize", config).run(state, tiny.context(folder))
    return state


def test_order_of_the_steps_in_every_layer(tiny, tmp_path, moe_family, monkeypatch):
    steps = []
    linears, experts = block_solver.BlockSolver.linears, block_solver.BlockSolver.experts
    observe, calibrate = RouterCalibrator.observe, RouterCalibrator.calibrate

    def spy_linears(self, group, gram):
        steps.append((self.block.index, "attention" if group.linears[0].role == "attention" else "mlp"))
        return linears(self, group, gram)

    def spy_experts(self, bank, name, chunk, gram, shared):
        steps.append((self.block.index, "gate_up" if name == bank.gate_up else "down"))
        return experts(self, bank, name, chunk, gram, shared)

    def spy_observe(self, block, router, x):
        steps.append((block.index, "full precision"))
        return observe(self, block, router, x)

    def spy_calibrate(self, block, router, x_hat):
        steps.append((block.index, "router"))
        return calibrate(self, block, router, x_hat)

    monkeypatch.setattr(block_solver.BlockSolver, "linears", spy_linears)
    monkeypatch.setattr(block_solver.BlockSolver, "experts", spy_experts)
    monkeypatch.setattr(RouterCalibrator, "observe", spy_observe)
    monkeypatch.setattr(RouterCalibrator, "calibrate", spy_calibrate)
    state = run(tiny, tmp_path, moe_family)
    assert [index for index, _ in steps] == sorted(index for index, _ in steps), "layer after layer"
    for block in state.model.layout.blocks:
        mine = [step for index, step in steps if index == block.index]
        short = [step for i, step in enumerate(mine) if step != "mlp" and (i == 0 or mine[i - 1] != step)]
        # a layer of a hybrid holds one sublayer only
        attention = ["attention"] if any(sublayer.kind == "attention" for sublayer in block.sublayers) else []
        routed = block.bank is not None
        assert short == (["full precision", *attention, "router", "gate_up", "down"] if routed else attention)


@torch.no_grad()
def test_second_router_sees_the_first_layer_quantized(tiny, tmp_path, monkeypatch):
    """Its input equals the router input of the finished model up to there, and not that of the dense model."""
    from llmcompress.models.assemble import compressed_model

    seen = {}
    calibrate = RouterCalibrator.calibrate

    def spy(self, block, router, x_hat):
        seen[block.index] = x_hat.clone()
        return calibrate(self, block, router, x_hat)

    monkeypatch.setattr(RouterCalibrator, "calibrate", spy)
    state = run(tiny, tmp_path, "mixtral")
    tokens, name = state.calibration.tokens, state.model.layout.blocks[1].bank.router.module

    def router_input(model):
        inputs = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model.base_model(tokens)
        handle.remove()
        return inputs[0]

    finished = compressed_model(state.model, state.packed, {}, dtype=torch.float32)
    assert torch.allclose(seen[1], router_input(finished), atol=1e-3)
    assert not torch.allclose(seen[1], router_input(state.model.dense_model(torch.float32)), atol=1e-1)


def test_expert_statistics_use_the_calibrated_router(tiny, tmp_path):
    """Tokens per expert are those of the new router."""
    state = run(tiny, tmp_path, "mixtral")
    patch = state.packed.read_block(1)
    assert patch.replaced and sum(patch.record["tokens_per_expert"]) == 10 * 32 * 2
    counts = patch.record["tokens_per_expert"]
    original = tiny.state(tmp_path / "model", "mixtral", samples=10)
    config = QescConfig.model_validate({"rules": RULES, "router": {"calibrate": False}})
    Qesc("quantize", config).run(original, tiny.context(tmp_path / "plain"))
    assert counts != original.packed.read_block(1).record["tokens_per_expert"]
