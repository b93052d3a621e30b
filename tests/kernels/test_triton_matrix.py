"""Triton matrix kernels under the interpreter, against the definition evaluated in float64.

Tolerances are relative Frobenius errors: one rounding of the result for fp16 and bf16 (2^-11, 2^-8 at most), fp32 sums.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from llmcompress_kernels import tables
from llmcompress_kernels.reference import group_gemm as dense_definition
from llmcompress_kernels.reference import moe_group_gemm as routed_definition

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.triton import group_gemm, moe_group_gemm, routing, tuning, widened  # noqa: E402

TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}
TYPES = tuple(TOLERANCE)
SMALL = tuning.Config(16, 32, 64, splits=2, stages=1)
# weights are scaled instead of sums, as with many tokens
LARGE = tuning.Config(64, 32, 64, stages=1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    error = (found.double() - expected).norm() / expected.norm()
    return float("inf") if error.isnan() else error.item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["sums", "weights"])
def test_group_gemm(packed, bits: int, dtype: torch.dtype, config: tuning.Config) -> None:
    torch.manual_seed(bits)
    # tokens, rows, columns, group: one token; ragged; groups that cut words; one group per odd row; exact tiles
    for (tokens, rows, columns, group), symmetric in zip(
        [(1, 40, 96, 32), (3, 33, 200, 64), (2, 24, 50, 16), (2, 33, 49, 128), (2, 32, 128, 64)],
        itertools.cycle([False, True]),
    ):
        weight = packed((rows, columns), bits, group, symmetric)
        x = torch.randn(tokens, columns).to(dtype)
        operands = (weight.weight, weight.scale, weight.zero, bits, group, columns)
        found = group_gemm.group_gemm(x, *operands, config=config)
        assert found.dtype == dtype
        limit = 2 * TOLERANCE[dtype] if config is LARGE and dtype != torch.float32 else TOLERANCE[dtype]
        assert relative(found, dense_definition.group_gemm(x.double(), *operands)) < limit, (rows, columns, group)


def test_group_gemm_of_many_tokens_reorders_them_once(packed) -> None:
    weight = packed((33, 64), 3, 32, False)
    operands = (weight.weight, weight.scale, weight.zero, 3, 32, 64)
    x = torch.randn(group_gemm.REORDERED_ONCE + 1, 64).to(torch.float16)
    expected = dense_definition.group_gemm(x.double(), *operands)
    assert relative(group_gemm.group_gemm(x, *operands), expected) < 5e-4
    assert relative(group_gemm.group_gemm(x, *operands, config=LARGE), expected) < 1e-3


def test_group_gemm_of_no_tokens_and_of_batches(packed) -> None:
    weight = packed((8, 32), 4, 32, True)
    operands = (weight.weight, weight.scale, weight.zero, 4, 32, 32)
    assert group_gemm.group_gemm(torch.randn(0, 32), *operands).shape == (0, 8)
    x = torch.randn(2, 1, 32)
    torch.testing.assert_close(group_gemm.group_gemm(x, *operands), dense_definition.group_gemm(x, *operands))


def test_sums_over_splits_are_reproducible(packed) -> None:
    weight = packed((16, 256), 4, 64, False)
    x = torch.randn(1, 256)
    operands = (x, weight.weight, weight.scale, weight.zero, 4, 64, 256)
    first = group_gemm.group_gemm(*operands, config=tuning.Config(16, 16, 32, splits=5, stages=1))
    assert torch.equal(first, group_gemm.group_gemm(*operands, config=tuning.Config(16, 16, 32, splits=5, stages=1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_are_added_in_one_launch(packed, dtype) -> None:
    weight = packed((48, 256), 4, 64, False)
    x = torch.randn(40, 256).to(dtype)
    operands = (x, weight.weight, weight.scale, weight.zero, 4, 64, 256)
    config = tuning.Config(64, 16, 32, splits=5, stages=1)
    expected = dense_definition.group_gemm(x.double(), *operands[1:])
    found = group_gemm.group_gemm(*operands, config=replace(config, joined=True))
    assert found.dtype == dtype
    assert relative(found, expected) < 1e-3
    assert torch.equal(found, group_gemm.group_gemm(*operands, config=replace(config, joined=True)))


def test_few_parts_take_fewer_bytes_than_codes() -> None:
    for tokens, rows, columns, bits in itertools.product((17, 64, 128, 200), (2560, 10576), (2560, 5120), (3, 4)):
        config = tuning.few_parts(tokens, rows, columns, bits, 132)
        assert config.splits == 1 or config.splits * tokens * 8 <= columns * bits / 8 / 2
        assert config.splits * config.columns <= columns
    # a weight of few rows is split all the same, where that is cheap
    assert tuning.few_parts(32, 2560, 5120, 4, 132).splits > 1


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "size"), [(1, 2, 8, 16), (7, 2, 4, 16), (40, 4, 9, 16), (33, 3, 60, 32)]
)
def test_routing_sorts_every_slot_into_a_block_of_its_expert(tokens: int, slots: int, experts: int, size: int) -> None:
    torch.manual_seed(tokens)
    index = torch.rand(tokens, experts + 1).topk(slots, -1).indices
    blocks = routing.route(index, experts, size)
    by_sorting = routing.route_by_sorting(index, experts, size)
    assert torch.equal(blocks.slots, by_sorting.slots)
    assert torch.equal(blocks.experts, by_sorting.experts)
    count = index.numel()
    assert blocks.experts.numel() == routing.block_limit(count, experts, size)
    owner = blocks.experts.repeat_interleave(size)
    taken = blocks.slots < count
    kept = index.flatten() < experts
    assert torch.equal(blocks.slots[taken].sort().values, kept.nonzero().flatten().int())
    assert torch.equal(owner[taken].long(), index.flatten()[blocks.slots[taken].long()])
    used = (blocks.slots.view(-1, size) < count).any(1)
    assert torch.equal(used, blocks.experts < experts)


def test_slots_of_no_expert_are_skipped_on_a_gpu_where_nobody_waits_for_their_values() -> None:
    index = torch.tensor([[0, 5], [-1, 2], [2**20, 1]])
    plain = torch.tensor([[0, 3], [3, 2], [3, 1]])
    for route in (routing.route, routing.route_by_sorting):
        found, expected = route(index, 3, 16), route(plain, 3, 16)
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(found.experts, expected.experts)


@pytest.mark.parametrize(
    ("up_bits", "down_bits", "dtype", "sizes", "activation", "bias"),
    [
        (2, 3, torch.float16, (5, 2, 4, 32, 24, 32), "silu", True),
        (3, 4, torch.bfloat16, (4, 2, 3, 64, 32, 32), "gelu", False),
        (4, 2, torch.float32, (3, 1, 5, 50, 24, 16), "gelu_pytorch_tanh", False),
        (8, 16, torch.float32, (3, 2, 4, 32, 16, 32), "gpt_oss", True),
        (16, 8, torch.bfloat16, (2, 2, 4, 32, 32, 32), "silu", False),
    ],
)
def test_moe(packed, up_bits, down_bits, dtype, sizes, activation, bias) -> None:
    torch.manual_seed(up_bits)
    tokens, slots, experts, hidden, inner, group = sizes
    up = packed((experts, 2 * inner, hidden), up_bits, group, False)
    down = packed((experts, hidden, inner), down_bits, min(group, inner), True)
    biases = (torch.randn(experts, 2 * inner), torch.randn(experts, hidden)) if bias else (None, None)
    x = torch.randn(tokens, hidden).to(dtype)
    index = torch.rand(tokens, experts + 1).topk(slots, -1).indices
    index[0, 0] = experts
    sides = []
    for side, values in zip((up, down), biases):
        weight = side.weight.to(dtype) if side.bits == 16 else side.weight
        sides += [weight, side.scale, side.zero, values, side.bits, side.group_size]
    arguments = (index, torch.rand(tokens, slots), *sides, inner, activation, 1.3, 0.5)
    found = moe_group_gemm.moe_group_gemm(x, *arguments)
    assert found.dtype == dtype
    expected = routed_definition.moe_group_gemm(x.double(), *arguments)
    # the intermediate is rounded to the type, too
    assert relative(found, expected) < 3 * TOLERANCE[dtype]


def test_moe_skips_experts_without_tokens_and_tokens_without_experts(packed, monkeypatch) -> None:
    up, down = packed((4, 32, 32), 4, 32, True), packed((4, 32, 16), 3, 16, True)
    poisoned = up.scale.clone()
    poisoned[1:] = float("nan")

    def poisoned_memory(shape: tuple[int, ...], **how: Any) -> torch.Tensor:
        return torch.full(shape, float("nan") if how["dtype"].is_floating_point else -1, **how)

    monkeypatch.setattr(torch, "empty", poisoned_memory)
    index = torch.tensor([[0, 4], [4, 0], [4, -1]])
    sides = (up.weight, poisoned, None, None, 4, 32, down.weight, down.scale, None, None, 3, 16)
    x = torch.randn(3, 32)
    found = moe_group_gemm.moe_group_gemm(x, index, torch.rand(3, 2), *sides, 16, "silu", 1.0, 1.0)
    assert found.isfinite().all()
    assert torch.equal(found[2], torch.zeros(32))


def test_kernels_decline_what_they_cannot_compute() -> None:
    assert group_gemm.verify(torch.zeros(1, 8), 5) == "5 bits"
    assert "float64" in (group_gemm.verify(torch.zeros(1, 8, dtype=torch.float64), 4) or "")
    assert group_gemm.verify(torch.zeros(1, 8), 3) is None
    assert moe_group_gemm.verify(torch.zeros(1, 8), 4, 16, "silu") is None
    assert "relu" in (moe_group_gemm.verify(torch.zeros(1, 8), 4, 4, "relu") or "")


def test_search_keeps_the_fastest_configuration_that_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path))
    tuning._table.cache_clear()

    def milliseconds(config: tuning.Config) -> float:
        if config.rows == 128:
            raise RuntimeError("out of shared memory")
        return config.rows / config.splits

    name = tuning.key("group_gemm", 4, torch.float16, 5, 4096, 14336)
    best, took = tuning.search(name, "NVIDIA H100", tuning.candidates(5), milliseconds)
    assert (best.rows, best.splits, took) == (32, 8, 4.0)
    stored = tuning._table("NVIDIA H100")
    assert stored == {name: best}
    monkeypatch.setattr(tuning, "_device", lambda _: ("NVIDIA H100", 132, True))
    cuda = torch.device("cuda", 0)
    # 5 to 8 tokens share a bucket
    assert tuning.pick("group_gemm", 4, torch.float16, 8, 4096, 14336, cuda) == best
    assert tuning.pick("group_gemm", 4, torch.float16, 9, 4096, 14336, cuda) != best
    tables.path_of("triton", "NVIDIA H100").write_text("{broken")
    tuning._table.cache_clear()
    assert tuning.pick("group_gemm", 4, torch.float16, 8, 4096, 14336, cuda) == tuning.default(8, 4096, 14336, 132)
    tuning._table.cache_clear()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_widened_weights_are_the_definitions(packed, bits: int) -> None:
    # whole groups per tile, two groups in one, one group per row, groups that cut words
    for columns, group in ((256, 128), (192, 32), (49, 64), (50, 16)):
        w = packed((3, 40, columns), bits, group, bits == 3)
        found = widened.widen(w.weight, w.scale, w.zero, bits, group, columns, 8, 24, torch.float32)
        identity = torch.eye(columns, dtype=torch.float64)
        for bank in range(3):
            zero = None if w.zero is None else w.zero[bank]
            expected = dense_definition.group_gemm(
                identity, w.weight[bank], w.scale[bank], zero, bits, group, columns
            ).T
            assert relative(found[bank], expected[8:32]) < 1e-6, (columns, group)


def test_products_with_widened_weights(packed, monkeypatch) -> None:
    monkeypatch.setattr(widened, "WORKSPACE", 1)  # rows come in several pieces
    w = packed((600, 64), 4, 32, False)
    x = torch.randn(5, 64)
    operands = (w.weight, w.scale, w.zero, 4, 32, 64)
    assert relative(widened.group_gemm(x, *operands), dense_definition.group_gemm(x.double(), *operands)) < 1e-6


def test_experts_with_widened_weights(packed, monkeypatch) -> None:
    monkeypatch.setattr(widened, "WORKSPACE", 1)
    experts, slots, hidden, inner, tokens = 3, 2, 288, 288, 9
    up, down = packed((experts, 2 * inner, hidden), 3, 32, False), packed((experts, hidden, inner), 4, 64, True)
    x = (0.05 * torch.randn(tokens, hidden)).to(torch.bfloat16)
    index = torch.rand(tokens, experts).topk(slots, -1).indices
    index[0, 0] = index[3, 1] = experts  # skipped
    index[index == 2] = 1  # an expert without tokens, and one that tokens name twice
    weights = torch.rand(tokens, slots)
    own = [v for s in (up, down) for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group_size)]
    expected = sum(
        routed_definition.moe_group_gemm(
            x.double(), index[:, j : j + 1], weights[:, j : j + 1], *own, inner, "silu", 1.7, 7.0
        )
        for j in range(slots)
    )
    sides = [(s.weight, s.scale, s.zero, s.bits, s.group_size) for s in (up, down)]
    found = widened.moe_group_gemm(x, index, weights, *sides, inner, "silu", 1.7, 7.0)
    assert relative(found, expected) < 1e-2


def test_widening_is_for_many_tokens(packed) -> None:
    x, index = torch.zeros(512, 8, dtype=torch.bfloat16), torch.zeros(512, 2, dtype=torch.int64)
    scale = torch.zeros(4, 1, 1)
    assert widened.verify_routed(x, index, (scale, None, scale, None), (4, 4)) is None
    assert widened.verify_routed(x[:1], index[:1], (scale, None, scale, None), (4, 4)) == "0 tokens"
    assert "bias" in (widened.verify_routed(x, index, (scale, scale, scale, None), (4, 4)) or "")
    assert "float16" in (widened.verify_routed(x.half(), index, (scale, None, scale, None), (4, 4)) or "")
    assert widened.verify_routed(x, index, (scale, None, scale, None), (4, 4), "relu2") == "activation relu2"
