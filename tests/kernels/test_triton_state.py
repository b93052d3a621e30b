"""Triton state kernels under the interpreter: codes and scales equal the definition's to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llmcompress_kernels.reference import state as definition

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.triton import replay  # noqa: E402
from llmcompress_kernels.triton import state as kernels  # noqa: E402

SEQUENCES, HEADS, GROUPS, P, N = 2, 4, 2, 16, 32
# calibrated channel scale, refit, dither
KINDS = [(False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, False, True)]


def states(seed: int, *lead: int) -> torch.Tensor:
    """States with outliers along both axes, one of them all zero."""
    torch.manual_seed(seed)
    found = torch.randn(*lead, P, N) * torch.randn(P, 1).exp() * torch.randn(N).exp()
    found[0, 0] = 0
    return found


def step_inputs(*lead: int) -> tuple[torch.Tensor, ...]:
    """drive, decay, b, c."""
    return (
        torch.randn(*lead, HEADS, P),
        torch.rand(*lead, HEADS) * 0.2 + 0.8,
        torch.randn(*lead, GROUPS, N),
        torch.randn(*lead, GROUPS, N),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("calibrated", "refit", "dither"), KINDS)
def test_pack_gives_the_definitions_codes(bits: int, calibrated: bool, refit: bool, dither: bool) -> None:
    u = states(bits, SEQUENCES, HEADS)
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    codes, channel, scale = kernels.dsq_pack(u, fixed, bits, refit, dither)
    qmax = torch.full((1, 1, 1), float((1 << (bits - 1)) - 1))
    expected, expected_channel, expected_scale, _ = definition.dsq_quantize(u, qmax, fixed, refit, dither)
    assert torch.equal(codes, definition.pack(expected.to(torch.int8), bits))
    assert torch.equal(scale, expected_scale)
    assert (channel is None) == calibrated
    assert channel is None or torch.equal(channel, expected_channel)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("calibrated", "refit", "dither"), KINDS)
def test_update(bits: int, calibrated: bool, refit: bool, dither: bool) -> None:
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    codes, channel, scale = kernels.dsq_pack(states(bits, SEQUENCES, HEADS), fixed, bits, refit, dither)
    held = [codes, channel, scale]
    expected = [None if t is None else t.clone() for t in held]
    for _ in range(2):
        inputs = step_inputs(SEQUENCES)
        found = kernels.dsq_state_update(*held, fixed, *inputs, bits, refit, dither)
        wanted = definition.dsq_state_update(*expected, fixed, *inputs, bits, refit, dither)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        assert all(a is None or torch.equal(a, b) for a, b in zip(held, expected))


@pytest.mark.parametrize(
    ("window", "dtype", "bits", "calibrated", "refit", "dither"),
    [
        (1, torch.float32, 4, False, False, True),
        *((3, torch.float32, 4, *kind) for kind in KINDS),
        *((3, torch.float16, 8, *kind) for kind in KINDS),
    ],
)
def test_replay_window(window: int, dtype: torch.dtype, bits: int, calibrated: bool, refit: bool, dither: bool) -> None:
    """Sequences at different places of their windows; rows that are not filled hold NaN."""
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    packed = kernels.dsq_pack(states(bits, SEQUENCES, HEADS), fixed, bits, refit, dither)
    recent = torch.full((SEQUENCES, window - 1, HEADS * P + HEADS + GROUPS * N), torch.nan)
    count = torch.zeros(SEQUENCES, dtype=torch.int32)
    mine, theirs = ([*(None if t is None else t.clone() for t in packed), recent.clone(), count.clone()] for _ in "12")
    for t in range(window + 2):
        first = 1 if t == 0 else 0  # the first sequence begins a token later
        inputs = [x[first:].to(dtype) for x in step_inputs(SEQUENCES)]
        parts = [[None if x is None else x[first:] for x in held] for held in (mine, theirs)]
        given = [[*part[:3], fixed, *part[3:]] for part in parts]
        found = replay.dsq_replay_update(*given[0], *inputs, bits, refit, dither)
        wanted = definition.dsq_replay_update(*given[1], *(x.float() for x in inputs), bits, refit, dither)
        assert found.dtype == dtype
        close = 1e-4 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(found.float(), wanted, rtol=close, atol=close * float(wanted.abs().max()))
        for one, other in zip(mine, theirs):
            assert one is None or torch.equal(one.nan_to_num(nan=-1), other.nan_to_num(nan=-1))
    assert mine[4].tolist() == [(window + 1) % window, (window + 2) % window]


@pytest.mark.parametrize(("calibrated", "refit", "dither"), KINDS)
def test_what_is_not_a_number_stays_so(calibrated: bool, refit: bool, dither: bool) -> None:
    """Met by one token, rounded with the next."""
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    packed = kernels.dsq_pack(states(4, SEQUENCES, HEADS), fixed, 4, refit, dither)
    recent, count = torch.zeros(SEQUENCES, 1, HEADS * P + HEADS + GROUPS * N), torch.zeros(SEQUENCES, dtype=torch.int32)
    mine, theirs = ([None if t is None else t.clone() for t in (*packed, fixed, recent, count)] for _ in "12")
    for t in range(4):
        inputs = step_inputs(SEQUENCES)
        if t == 0:
            inputs[0][0, 1, 3] = torch.nan
        found = replay.dsq_replay_update(*mine, *inputs, 4, refit, dither)
        wanted = definition.dsq_replay_update(*theirs, *inputs, 4, refit, dither)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(mine[2].isnan(), theirs[2].isnan())
    assert wanted[0, 1].isnan().all() and not wanted[1].isnan().any()


@pytest.mark.parametrize(
    ("first", "window", "calibrated", "refit", "dither"),
    [(1, 1, False, False, False), (3, 2, True, False, False), (2, 1, False, True, False), (2, 2, False, False, True)],
)
def test_scan_and_its_adjoint(
    monkeypatch, first: int, window: int, calibrated: bool, refit: bool, dither: bool
) -> None:
    for module in (definition, kernels):
        monkeypatch.setattr(module, "SEGMENT", 8)  # the interpreter is slow
    tokens = 8 + 3
    begin = states(1, 1, HEADS)
    drive, decay, b, c = step_inputs(1, tokens)
    bits = torch.tensor([4, 6, 8, 16], dtype=torch.int32)
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    arguments = (drive, decay, b, c, begin, bits, fixed, first, window, True, refit, dither)
    out, last, kept = kernels.selective_scan_q(*arguments)
    expected_out, expected_last, expected_kept = definition.selective_scan_q(*arguments)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-3)
    assert torch.equal(last, expected_last)
    assert torch.equal(kept, expected_kept)
    grad = torch.randn_like(out)
    arguments = (grad, drive, decay, b, c, kept, bits, fixed, first, window, refit, dither)
    found = kernels.selective_scan_q_backward(*arguments)
    for mine, wanted in zip(found, definition.selective_scan_q_backward(*arguments)):
        assert mine.shape == wanted.shape
        assert (mine - wanted).norm() / wanted.norm() < 1e-5


def test_sizes_that_kernels_decline() -> None:
    assert kernels.verify(64, 128, 4) is None
    assert kernels.verify(64, 128) is None
    assert kernels.verify(64, 128, 6) == "6 bits"
    assert "P = 48" in (kernels.verify(48, 128) or "")
    assert "registers" in (kernels.verify(256, 256) or "")
