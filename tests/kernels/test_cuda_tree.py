"""The CUDA C++ kernel for residual trees without a GPU: on the host against the definition, compiled for two GPUs."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llmcompress_kernels import ops, select
from llmcompress_kernels.cuda import aot, machine_code
from llmcompress_kernels.cuda import tree as kernels
from llmcompress_kernels.reference import delta_decode as definition

# one rounding of the result, and products of exact operands in fp32
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.fixture(scope="module")
def emulation(on_host: Callable[[str, str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernel compiled for the host."""
    return on_host("tree-emulation", "cuda/tree/emulate.cpp")


def nodes(rows: int, columns: int, bits: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Packed codes and scales."""
    codes = [torch.randint(0, 1 << b, (rows, columns), dtype=torch.uint8) for b in bits]
    scales = [(torch.rand(rows, columns // kernels.GROUP) + 0.1).to(torch.float16) for _ in bits]
    return [ops.pack(c, b) for c, b in zip(codes, bits)], scales


CONFIGS = (kernels.DEFAULT, kernels.SMALL)


def run(emulation, x, packed, scale, spans, bits, multiplier, processors: int, config=kernels.DEFAULT) -> torch.Tensor:
    """By the emulation, after asking whether it takes the call."""
    assert kernels.verify(x, packed, scale, bits, kernels.GROUP) is None
    return kernels.delta_decode(
        x,
        packed,
        scale,
        spans,
        bits,
        multiplier,
        kernels.GROUP,
        library=emulation,
        processors=processors,
        config=config,
    )


@pytest.mark.parametrize(("dtype", "late"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "bits", "spans", "processors"),
    [
        (1, 40, 256, [4, 1], [[0, 1], [0, 1]], 1),
        # several splits of an odd number of groups, rows of another block, ranges of several tokens
        (4, 300, 1280, [4, 1, 1, 2], [[0, 4], [0, 1], [1, 3], [2, 4]], 6),
        # bits counted and multiplied, of tokens of both tiles; groups in eights
        (12, 33, 2048, [1, 1, 1, 4], [[0, 12], [6, 10], [11, 12], [0, 12]], 3),
        # two tiles of tokens, one of which some nodes do not touch; a token below no node
        (11, 70, 768, [1, 2, 4, 1], [[0, 10], [0, 7], [3, 10], [9, 10]], 1),
    ],
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.tiles}-{c.warps}-{c.stages}")
def test_tree(emulation, config, dtype, late, tokens, rows, columns, bits, spans, processors) -> None:
    torch.manual_seed(tokens)
    emulation.llmcompress_tree_emulation(int(late), tokens)
    packed, scale = nodes(rows, columns, bits)
    multiplier = [2.0**-i for i in range(len(bits))]
    x, ranges = torch.randn(tokens, columns).to(dtype), torch.tensor(spans)
    found = run(emulation, x, packed, scale, ranges, bits, multiplier, processors, config)
    expected = definition.delta_decode(x.double(), packed, scale, ranges, bits, multiplier, kernels.GROUP)
    assert found.dtype == dtype
    assert ((found.double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]
    if tokens == 11:
        assert torch.equal(found[10], torch.zeros(rows, dtype=dtype))


def test_large_activations_stay_finite(emulation) -> None:
    """Scaling by a power of two may not leave fp16."""
    emulation.llmcompress_tree_emulation(1, 0)
    packed, scale = nodes(32, 256, [1])
    scale[0].fill_(2.0**-10)
    x = torch.randn(1, 256).to(torch.float16)
    x[0, ::50] = 60000.0
    spans = torch.tensor([[0, 1]])
    found = run(emulation, x, packed, scale, spans, [1], [1.0], 1)
    expected = definition.delta_decode(x.double(), packed, scale, spans, [1], [1.0], kernels.GROUP)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_activations_of_any_size(emulation, dtype) -> None:
    """Each group has a fixed point of its own: none loses what its neighbour is too large for; one may be zero."""
    emulation.llmcompress_tree_emulation(1, 3)
    packed, scale = nodes(24, 1280, [1])
    size = torch.tensor([0.0, 1e-4, 1.0, 100.0, 1e-2]).repeat_interleave(128).repeat(2)
    x = (torch.randn(2, 1280) * size).to(dtype)
    spans = torch.tensor([[0, 2]])
    for kept in range(1, 5):
        part = torch.where(size == size[128 * kept], x, 0)
        found = run(emulation, part, packed, scale, spans, [1], [0.5], 2)
        expected = definition.delta_decode(part.double(), packed, scale, spans, [1], [0.5], kernels.GROUP)
        assert ((found.double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype], kept
    if dtype == torch.bfloat16:
        for factor in (2.0**-105, 2.0**110):
            tiny = (torch.randn(2, 1280) * factor).to(dtype)
            found = run(emulation, tiny, packed, scale, spans, [1], [0.5], 2).double() / factor
            expected = definition.delta_decode(tiny.double() / factor, packed, scale, spans, [1], [0.5], kernels.GROUP)
            assert ((found - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(emulation, bad) -> None:
    emulation.llmcompress_tree_emulation(0, 1)
    packed, scale = nodes(16, 512, [4, 1])
    x = torch.randn(2, 512).to(torch.bfloat16)
    x[1, 300] = bad
    found = run(emulation, x, packed, scale, torch.tensor([[0, 1], [0, 2]]), [4, 1], [1.0, 1.0], 1)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1]).any()


def test_nodes_without_rows_are_not_read(emulation) -> None:
    emulation.llmcompress_tree_emulation(1, 0)
    packed, scale = nodes(8, 256, [4, 4])
    scale[1].fill_(float("nan"))
    x = torch.randn(2, 256).to(torch.bfloat16)
    found = run(emulation, x, packed, scale, torch.tensor([[0, 2], [2, 2]]), [4, 4], [1.0, 1.0], 1)
    assert torch.isfinite(found).all()
    empty = torch.tensor([[0, 0], [2, 2]])
    assert torch.equal(run(emulation, x, packed, scale, empty, [4, 4], [1.0, 1.0], 1), torch.zeros_like(found))


def test_results_do_not_depend_on_the_order_of_blocks_and_lanes(emulation) -> None:
    packed, scale = nodes(40, 1024, [4, 1])
    x, spans = torch.randn(3, 1024).to(torch.bfloat16), torch.tensor([[0, 3], [1, 2]])
    found = []
    for seed in range(2):
        emulation.llmcompress_tree_emulation(seed, seed)
        found.append(run(emulation, x, packed, scale, spans, [4, 1], [1.0, 0.5], 8))
    assert torch.equal(*found)


def test_what_the_kernel_declines() -> None:
    packed, scale = nodes(8, 256, [4])
    x = torch.zeros(1, 256, dtype=torch.bfloat16)

    def reason(x: torch.Tensor = x, bits: int = 4, group: int = 128) -> str:
        return kernels.verify(x, packed, scale, [bits], group) or ""

    assert reason() == ""
    assert "bits of [3]" in reason(bits=3)
    assert "groups of 64" in reason(group=64)
    assert "float32" in reason(x.float())
    assert "17 tokens" in reason(x.expand(17, -1))
    assert "even number" in reason(torch.zeros(1, 384, dtype=torch.bfloat16))


def test_few_strips_take_fewer_warps() -> None:
    """What was the faster on 132 multiprocessors."""
    assert kernels.launch_of(4096, 32, 132) == kernels.SMALL
    for rows, groups in ((11008, 32), (4096, 86)):
        assert kernels.launch_of(rows, groups, 132) == kernels.DEFAULT


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "bits", "spans", "processors"),
    [
        (4, 300, 1280, [4, 1, 1, 2], [[0, 4], [0, 1], [1, 3], [2, 4]], 6),
        (8, 33, 2048, [1, 1, 1, 4], [[0, 8], [6, 8], [7, 8], [0, 8]], 3),
        (5, 100, 3072, [4, 1, 1], [[0, 5], [0, 1], [1, 2]], 9),
    ],
)
def test_parts_that_are_added_as_they_come(emulation, tokens, rows, columns, bits, spans, processors) -> None:
    """Equal bytes whichever warp is the last, and those of the other form."""
    packed, scale = nodes(rows, columns, bits)
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    operands = (packed, scale, torch.tensor(spans), bits, [1.0, 0.5, 0.25, 0.125][: len(bits)])
    config = dataclasses.replace(kernels.SMALL, spread=True)
    found = []
    for seed in range(3):
        emulation.llmcompress_tree_emulation(seed % 2, seed)
        found.append(run(emulation, x, *operands, processors, config))
    emulation.llmcompress_tree_emulation(1, 0)
    assert all(torch.equal(one, run(emulation, x, *operands, processors, kernels.SMALL)) for one in found)


def test_blocks_share_out_the_work_evenly() -> None:
    config = kernels.DEFAULT
    for rows, columns in ((11008, 4096), (4096, 4096), (4096, 11008), (5120, 13824), (32, 256)):
        groups = columns // kernels.GROUP
        slabs, blocks, strips = kernels.shares(config, rows, groups, 132)
        assert (slabs - 1) * kernels.SLAB < groups <= slabs * kernels.SLAB
        most = max(strips * (b + 1) // blocks - strips * b // blocks for b in range(blocks))
        fair = rows * groups / 132 / kernels.TILE_ROWS / kernels.SLAB
        assert blocks * slabs <= 132
        assert rows < 1000 or most <= 1.12 * fair


def test_shared_memory_is_what_the_launch_asks_for(emulation) -> None:
    for config in CONFIGS:
        for tokens, forms in ((1, 8), (8, 12), (16, 15), (9, 4), (2, 3)):
            asked = emulation.llmcompress_tree_shared(config.warps, tokens, forms)
            assert asked == kernels.shared(config, tokens, forms)
    # a root and its leaves: two launches' blocks beside each other, so that one reads weights while the other ends
    assert 2 * (kernels.shared(kernels.SMALL, 8, 4 + kernels.COUNTS) + 1024) <= 228 << 10
    assert kernels.shared(kernels.SMALL, kernels.TOKENS, 15) <= kernels.MOST_SHARED[90]


def test_what_shared_memory_does_not_hold_is_halved(emulation, monkeypatch) -> None:
    """As 16 tokens of all widths would need on an A100."""
    forms = sum(kernels.BITS) + kernels.COUNTS
    assert kernels.shared(kernels.SMALL, kernels.TILE, forms) <= kernels.MOST_SHARED[80]
    emulation.llmcompress_tree_emulation(0, 5)
    packed, scale = nodes(20, 512, [4, 1, 2, 1])
    x, spans = torch.randn(13, 512).to(torch.bfloat16), torch.tensor([[0, 13], [2, 11], [7, 9], [12, 13]])
    operands = (packed, scale, spans, [4, 1, 2, 1], [1.0, 0.5, 0.5, 0.25])
    whole = run(emulation, x, *operands, 2)
    monkeypatch.setitem(kernels.MOST_SHARED, 90, kernels.shared(kernels.SMALL, kernels.TILE, forms))
    assert kernels.shared(kernels.SMALL, 13, forms) > kernels.MOST_SHARED[90]
    expected = definition.delta_decode(x.double(), *operands, kernels.GROUP)
    for found in (whole, run(emulation, x, *operands, 2)):
        assert ((found.double() - expected).norm() / expected.norm()).item() < TOLERANCE[torch.bfloat16]


def test_nodes_of_one_bit_count_for_few_tokens() -> None:
    ranges = [[0, 8], [0, 4], [4, 9], [8, 9]]
    assert kernels.forms([4, 1, 2, 1], ranges) == 4 + 2 + kernels.COUNTS
    assert kernels.forms([1, 1, 1, 1], ranges) == 1 + kernels.COUNTS
    assert kernels.forms([1, 2, 1, 2], ranges) == 1 + 2


def test_the_implementation_is_listed_with_its_reason() -> None:
    row = {(r.op, r.implementation): r for r in select.explain("cuda")}["delta_decode", "cuda"]
    assert row.used or row.reason
    assert torch.cuda.is_available() or row.reason == "no CUDA device"


@pytest.mark.slow
def test_every_instance_compiles_without_spills(tmp_path) -> None:
    """And its products are mma, of numbers and of bits, its copies asynchronous."""
    if aot.missing() is not None:
        pytest.skip(aot.missing())
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda arch: machine_code.instances("tree/tree.cu", arch, tmp_path), (80, 90))
        found = [one for part in parts for one in part]
    assert {(one.arch, *one.numbers[:5]) for one in found} == {
        (a, b, n, c.tiles, c.warps, c.stages) for a in (80, 90) for b in (0, 1) for n in (1, 2) for c in CONFIGS
    }
    for one in found:
        counts = one.counts()
        assert (one.spills, one.stack) == (0, 0), one.numbers
        warps, held = one.numbers[3], one.numbers[5] if one.arch >= 90 else 1
        assert one.registers * 32 * warps * held <= 65536, one.numbers
        assert counts["HMMA"] >= 3 * 16, one.numbers
        assert counts["BMMA"] >= 2 * kernels.SLAB, one.numbers
        assert counts["LDSM"] >= kernels.SLAB // 2, one.numbers
        assert counts["LDGSTS"] >= 5, one.numbers
