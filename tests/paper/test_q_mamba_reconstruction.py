"""Q-Mamba's recurrence with stored states: engines, gradients, the error identity, block reconstruction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.algorithms.selective_scan import half_life
from llmcompress.algorithms.state_reconstruction import (
    ENGINES,
    Group,
    Objective,
    Rounder,
    Schedule,
    head_blocks,
    parallel_scan,
    reconstruct,
    rounding_errors,
    scan,
    scan_fused,
    scan_loop,
    split,
)
from llmcompress.quant.states import StateSpec


def inputs(tokens: int = 48, heads: int = 2, channels: int = 8, states: int = 16, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, heads, channels, generator=generator, dtype=torch.float64)
    a = 0.85 + 0.149 * torch.rand(2, tokens, heads, generator=generator, dtype=torch.float64)
    b = torch.randn(2, tokens, heads, states, generator=generator, dtype=torch.float64)
    c = torch.randn(2, tokens, heads, states, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, a, b, c)]


def gradients(run, leaves, rounder):
    out = run(*leaves, rounder)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("engine", ["inject", "fused"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("window", [1, 4])
def test_engines_equal_the_straight_through_loop(engine: str, bits: int, window: int) -> None:
    rounder = Rounder(StateSpec(bits=bits), window=window)
    expected, wanted = gradients(scan_loop, inputs(), rounder)
    value, got = gradients(ENGINES[engine], inputs(), rounder)
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for mine, theirs in zip(got, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4
    # rounding must matter, or the test shows nothing
    exact, _ = gradients(scan_loop, inputs(), Rounder(StateSpec(bits=16)))
    assert float((exact - expected).norm() / exact.norm()) > 1e-3


def test_the_fused_adjoint_is_the_derivative_when_nothing_is_rounded() -> None:
    leaves = inputs(tokens=9, heads=1, channels=3, states=4, dtype=torch.float64)
    exact = Rounder(StateSpec(bits=16))
    assert torch.autograd.gradcheck(lambda *some: scan_fused(*some, exact), leaves)


@pytest.mark.parametrize("codec", ["dsq", "per_channel"])
def test_the_error_of_the_state_obeys_its_recurrence(codec: str) -> None:
    x, a, b, _ = (leaf.detach() for leaf in inputs())
    rounder = Rounder(StateSpec(bits=4, codec=codec))
    errors = rounding_errors(x, a, b, rounder)
    stored = parallel_scan(a, x[..., None] * b[..., None, :] + errors)
    clean = parallel_scan(a, x[..., None] * b[..., None, :])
    difference = torch.zeros_like(errors[:, 0])
    for t in range(x.shape[1]):
        difference = a[:, t, :, None, None] * difference + errors[:, t]
        assert torch.allclose(stored[:, t] - clean[:, t], difference, atol=1e-5 * float(clean.abs().max()))
    assert float(difference.norm()) > 0


def test_groups_and_head_blocks_change_nothing() -> None:
    x, a, _, _ = (leaf.detach() for leaf in inputs(heads=4))
    _, _, b, c = (leaf.detach() for leaf in inputs(heads=2, seed=1))
    rounder = Rounder(StateSpec(bits=4), head_bits=torch.tensor([4, 8, 6, 4]))
    whole = scan(x, a, b, c, rounder)
    wide = scan_loop(x, a, b.repeat_interleave(2, 2), c.repeat_interleave(2, 2), rounder)
    assert torch.allclose(whole, wide, atol=1e-5)
    assert torch.equal(scan(x, a, b, c, rounder, budget=1), whole)
    assert len(head_blocks(4, 2, 48, 8, 16, 1)) == 4
    assert head_blocks(4, 2, 48, 8, 16, 1 << 30) == [slice(0, 4)]


def test_half_life_of_a_constant_decay() -> None:
    a = torch.full((1, 5, 2), 0.5)
    a[..., 1] = 0.5**0.01
    assert torch.allclose(half_life(a.log().mean((0, 1))), torch.tensor([1.0, 100.0]))


class Block:
    """A scan with trainable write and read strengths, and the clean block it should match."""

    def __init__(self) -> None:
        x, a, b, c = (leaf.detach() for leaf in inputs(tokens=64, seed=3))
        self.fixed = [t.repeat(4, *[1] * (t.ndim - 1)) for t in (x, a, b, c)]
        self.parameters = {"write": torch.ones(2, 16), "read": torch.ones(2, 16), "decay": torch.zeros(2)}
        self.rounder = Rounder(StateSpec(bits=4))
        with torch.no_grad():
            self.clean = scan_loop(*self.fixed, Rounder(StateSpec(bits=16)))

    def loss(self, rows: list[int]) -> torch.Tensor:
        x, a, b, c = (t[rows] for t in self.fixed)
        p = self.parameters
        y = scan(x, a ** p["decay"].exp(), b * p["write"], c * p["read"], self.rounder)
        return Objective().loss(y.flatten(-2), self.clean[rows].flatten(-2), y, self.clean[rows])


def test_reconstruction_lowers_the_held_out_loss() -> None:
    block = Block()
    groups = [Group(2e-2, ("write", "read")), Group(1e-2, ("decay",), 0.1)]
    result = reconstruct(block.parameters, groups, block.loss, 8, Schedule(epochs=6, batch=2))
    assert result.kept
    assert result.after < result.before * 0.99
    assert result.training[-1] < result.training[0]
    with torch.no_grad():
        assert float(block.loss(split(8, 0.125)[1])) == pytest.approx(result.after, rel=1e-5)
    assert float(block.parameters["decay"].abs().max()) <= 0.1 + 1e-6


def test_reconstruction_that_only_hurts_is_rolled_back() -> None:
    block = Block()
    before = {name: value.clone() for name, value in block.parameters.items()}
    groups = [Group(30.0, ("write", "read", "decay"))]
    result = reconstruct(block.parameters, groups, block.loss, 8, Schedule(epochs=2, batch=4))
    assert not result.kept
    assert result.after == result.before
    for name, value in block.parameters.items():
        assert torch.equal(value, before[name])


def test_reconstruction_is_reproducible() -> None:
    found = []
    for _ in range(2):
        block = Block()
        reconstruct(block.parameters, [Group(1e-2, ("write",))], block.loss, 8, Schedule(epochs=2, batch=4))
        found.append(block.parameters["write"])
    assert torch.equal(*found)


@pytest.mark.parametrize("engine", ["inject", "fused"])
def test_a_replay_window_rounds_the_tokens_that_evaluation_rounds(engine: str, tiny: Any) -> None:
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.mixers import attach
    from llmcompress.nn.scan_override import scanned_by

    model = tiny.model("mamba2")
    layout = layout_from_config(model.config.to_dict())
    hidden = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    mixer = model.get_submodule(layout.blocks[0].scan.module)
    rounder = Rounder(StateSpec(bits=4), window=3)
    with torch.no_grad():
        with scanned_by(mixer, lambda *some: scan(*some, rounder, engine)):
            trained = mixer(hidden)
        attach(model, layout, {"bits": 4, "codec": "dsq", "window": 3})
        deployed = mixer(hidden)
        attach(model, layout, {"bits": 4, "codec": "dsq", "window": 2})
        other = mixer(hidden)
    assert float((trained - deployed).norm() / deployed.norm()) < 1e-4
    assert float((other - deployed).norm() / deployed.norm()) > 1e-3
