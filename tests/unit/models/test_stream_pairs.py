"""Cross moments of two streams, taken by the walker's taps, against inputs seen by plain hooks."""

from __future__ import annotations

import pytest
import torch

from llmcompress.models.capture import gated
from llmcompress.models.stream_pairs import StreamPairs, StreamRecorder
from llmcompress.models.walker import Walker


class Watcher:
    """Visitor that wants all moments and takes the cross moments as a quantizer does."""

    affinity = False

    def __init__(self, pairs=None):
        self.pairs, self.cross, self.index = pairs, {}, None

    def wants(self, names):
        return self.pairs is not None

    def linears(self, group, gram):
        if self.pairs is not None:
            self.cross[group.linears[0].name] = self.pairs.take(group.linears[0].name)

    def router(self, bank, router, x):
        self.x = x
        self.index = router(x)[2]

    def routed(self, bank, counts):
        pass

    def experts(self, bank, name, experts, gram, shared):
        if self.pairs is None:
            return
        self.cross[name] = self.pairs.take(name)
        if name == bank.gate_up:
            self.pairs.keep_original(bank, experts)
            self.pairs.model.get_submodule(bank.module).gate_up_proj.data.mul_(1.1)


@torch.no_grad()
def run(tiny, folder, family, recorder_type=StreamRecorder, pairs_type=StreamPairs, **options):
    state = tiny.state(folder / "model", family, samples=3, length=16)
    handle = state.model
    model = handle.skeleton(torch.float32)
    walker = Walker(model, state.calibration.tokens)
    walker.batches = [slice(0, 2), slice(2, 3)]
    hidden = walker.embed([block.name for block in handle.layout.blocks])
    walker.embed([block.name for block in handle.layout.blocks])
    block = handle.layout.blocks[-1]
    handle.load_block(model, block.index)
    noisy = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    names = {name for name, _, _, index in handle.layout.quantizable() if index == block.index}
    recorder = recorder_type(names, **options)
    module = model.get_submodule(block.bank.module)
    original = module.gate_up_proj.detach().clone()
    first = Watcher()
    walker.forward(block, hidden.clone(), first, tap=recorder)
    pairs = pairs_type(recorder, model)
    second = Watcher(pairs)
    walker.forward(block, noisy, second, tap=pairs)
    return block, module, original, first, second, recorder


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_expert_pairs_follow_the_quantized_routing(tiny, tmp_path, family):
    block, module, original, first, second, recorder = run(tiny, tmp_path, family)
    bank = block.bank
    up, down = second.cross[bank.gate_up], second.cross[bank.down]
    for expert in range(bank.num_experts):
        tokens = (second.index == expert).any(-1)
        x, x_hat = first.x[tokens], second.x[tokens]
        assert torch.allclose(up[expert], (x - x_hat).T @ x_hat, atol=1e-4)
        z = gated(module, bank, expert, x, original[expert])
        z_hat = gated(module, bank, expert, x_hat)
        assert torch.allclose(down[expert], (z - z_hat).T @ z_hat, atol=1e-4)
    assert not recorder.inputs, "every kept input was used"


def test_linear_pairs(tiny, tmp_path):
    block, _, _, _, second, _ = run(tiny, tmp_path, "qwen2_moe")
    groups = [group for sublayer in block.sublayers for group in sublayer.groups]
    assert {group.linears[0].name for group in groups} <= set(second.cross)
    for group in groups:
        cross = second.cross[group.linears[0].name]
        width = group.linears[0].in_features
        assert cross.shape == (1, width, width) and cross.abs().max() > 0
    shared = next(g for g in groups if g.position == "first" and "shared" in g.module)
    _, _, _, first, second, _ = run(tiny, tmp_path, "qwen2_moe")
    expected = (first.x - second.x).T @ second.x
    assert torch.allclose(second.cross[shared.linears[0].name][0], expected, atol=1e-4)


class Streams(StreamRecorder):
    """Keeps the residual stream before each sublayer as the walker has it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.before = {}

    def residual(self, sublayer, hidden):
        self.before[sublayer.module] = hidden.flatten(0, 1).clone()
        super().residual(sublayer, hidden)


class PairedStreams(StreamPairs):
    """Keeps that, the inputs of linears, and where tokens went."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.before, self.seen = {}, {}

    def residual(self, sublayer, hidden):
        self.before[sublayer.module] = hidden.flatten(0, 1).clone()
        super().residual(sublayer, hidden)

    def linears(self, group, x):
        self.seen.setdefault(group.linears[0].name, []).append(x.clone())
        super().linears(group, x)

    def routed(self, routing):
        self.routing = routing[0]
        super().routed(routing)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_outputs_are_paired_with_the_drift_of_the_residual_stream(tiny, tmp_path, family):
    block, module, _, _, second, recorder = run(tiny, tmp_path, family, Streams, PairedStreams, residuals=True)
    pairs, bank = second.pairs, block.bank
    attention, moe = block.sublayers
    output = next(group for group in attention.groups if group.position == "last").linears[0].name
    drift = recorder.before[attention.module] - pairs.before[attention.module]
    x_hat = torch.cat(pairs.seen[output])
    assert torch.allclose(second.cross[output][0, x_hat.shape[1] :], drift.T @ x_hat, atol=1e-3)
    drift = recorder.before[moe.module] - pairs.before[moe.module]
    routing = pairs.routing
    weights = torch.zeros(len(drift)).index_add_(0, routing.token, routing.weight)
    for expert in range(bank.num_experts):
        tokens = routing.token[routing.bounds[expert] : routing.bounds[expert + 1]]
        z_hat = gated(module, bank, expert, second.x[tokens])
        expected = (drift[tokens] / weights[tokens, None]).T @ z_hat
        assert torch.allclose(second.cross[bank.down][expert, z_hat.shape[1] :], expected, atol=1e-3)
    others = [group for sub in block.sublayers for group in sub.groups if group.linears[0].name != output]
    for group in others:
        cross = second.cross[group.linears[0].name]
        assert cross.shape[-1] == cross.shape[-2], "shared experts and first linears take no part"
    assert second.cross[bank.gate_up].shape[-1] == second.cross[bank.gate_up].shape[-2]
    assert not recorder.residuals, "every kept stream was used"
