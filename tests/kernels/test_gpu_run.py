"""Kernels on a GPU, against the definition in float64 there; run by scripts/gpu_check.sh."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from llmcompress_kernels import ops, select, state
from llmcompress_kernels.reference import group_gemm as dense_definition
from llmcompress_kernels.reference import moe_group_gemm as routed_definition
from llmcompress_kernels.reference import state as state_definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        reason="TRITON_INTERPRET is set; use scripts/gpu_check.sh",
    ),
]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    error = (found.double() - expected).norm() / expected.norm()
    return float("inf") if error.isnan() else error.item()


def test_triton_is_what_runs() -> None:
    used = {row.op: row.implementation for row in select.explain("cuda") if row.used}
    assert used["moe_group_gemm"] in ("triton", "cuda")
    assert used["group_gemm"] in ("triton", "cuda")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 5, 17, 64, 300])
def test_group_gemm(packed, bits: int, dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    for rows, columns, group in ((1024, 2048, 128), (576, 1536, 64), (333, 1000, 32), (130, 200, 24)):
        w = packed((rows, columns), bits, group, columns % 128 != 0, "cuda")
        x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
        operands = (w.weight, w.scale, w.zero, bits, group, columns)
        expected = dense_definition.group_gemm(x.double(), *operands)
        assert relative(ops.group_gemm(x, *operands), expected) < TOLERANCE[dtype], (rows, columns, group)


@pytest.mark.parametrize(("up_bits", "down_bits"), [(2, 2), (3, 3), (4, 4), (3, 4), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 33, 1000])
def test_moe(packed, up_bits: int, down_bits: int, dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    experts, slots, hidden, inner = 16, 4, 512, 704
    up = packed((experts, 2 * inner, hidden), up_bits, 64, False, "cuda")
    down = packed((experts, hidden, inner), down_bits, 64, True, "cuda")
    if down_bits == 16:
        down = ops.Stack(down.weight.to(dtype))
    # codes of 8 bits reach 255, and fp16 ends at 65504
    x = torch.randn(tokens, hidden, device="cuda", dtype=dtype) / (64 if up_bits == 8 else 1)
    index = torch.rand(tokens, experts + 1, device="cuda").topk(slots, -1).indices
    index[0, 0] = experts
    weights = torch.rand(tokens, slots, device="cuda")
    found = ops.moe_group_gemm(x, index, weights, up, down, inner)
    sides = [v for s in (up, down) for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group_size)]
    expected = routed_definition.moe_group_gemm(x.double(), index, weights, *sides, inner, "silu", 1.702, 7.0)
    assert relative(found, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_cuda_kernels(packed, bits: int, dtype: torch.dtype, tokens: int) -> None:
    """CUDA C++ by itself, dense and routed, where its build is possible."""
    from llmcompress_kernels.cuda import skinny

    if skinny.unavailable() is not None:
        pytest.skip(skinny.unavailable())
    torch.manual_seed(tokens)
    for rows, columns, group in ((14336, 4096, 128), (1000, 14336, 64), (130, 640, 1 << 20)):
        w = packed((rows, columns), bits, group, False, "cuda")
        x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
        operands = (w.weight, w.scale, w.zero, bits, group, columns)
        assert skinny.verify(x, *operands[:5]) is None
        expected = dense_definition.group_gemm(x.double(), *operands)
        found = [skinny.group_gemm(x, *operands) for _ in range(3)]
        assert relative(found[0], expected) < TOLERANCE[dtype], (rows, columns, group)
        assert torch.equal(found[0], found[1])  # whatever block comes last
        assert torch.equal(found[0], found[2])
    experts, slots, hidden, inner = 8, 2, 1024, 1408
    banks = [
        packed(shape, bits, 128, False, "cuda") for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner))
    ]
    sides = tuple(skinny.Side(b.weight, b.scale, b.zero, None, bits, 128) for b in banks)
    x = 0.05 * torch.randn(tokens, hidden, device="cuda", dtype=dtype)
    index = torch.rand(tokens, experts + 1, device="cuda").topk(slots, -1).indices
    weights = torch.rand(tokens, slots, device="cuda")
    own = [v for s in sides for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group)]
    expected = routed_definition.moe_group_gemm(x.double(), index, weights, *own, inner, "silu", 1.702, 7.0)
    found = skinny.moe_group_gemm(x, index, weights, sides, inner, "silu", 1.702, 7.0)
    assert relative(found, expected) < 2 * TOLERANCE[dtype]


def test_moe_in_a_graph_follows_its_inputs(packed) -> None:
    up, down = packed((8, 256, 128), 3, 64, False, "cuda"), packed((8, 128, 128), 3, 64, False, "cuda")
    x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
    index, weights = torch.randint(0, 9, (4, 2), device="cuda"), torch.rand(4, 2, device="cuda")
    ops.moe_group_gemm(x, index, weights, up, down, 128)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.moe_group_gemm(x, index, weights, up, down, 128)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        index.copy_(torch.randint(0, 9, (4, 2), device="cuda"))
        graph.replay()
        assert torch.equal(found, ops.moe_group_gemm(x, index, weights, up, down, 128))


def test_operators_stay_whole_in_a_compiled_graph(packed) -> None:
    w = packed((256, 512), 4, 128, True, "cuda")
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.group_gemm(x, w.weight, w.scale, None, 4, 128, 512) + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_opcheck(packed) -> None:
    w = packed((64, 96), 3, 32, False, "cuda")
    arguments = (torch.randn(2, 96, device="cuda"), w.weight, w.scale, w.zero, 3, 32, 96)
    torch.library.opcheck(torch.ops.llmcompress.group_gemm.default, arguments)


def test_rows_beyond_two_to_the_31_elements() -> None:
    """Addresses are 64-bit: the last expert begins beyond 2^31 codes' worth of words."""
    experts, rows, columns = 2, 4096, 1 << 19
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB")
    weight = torch.zeros(experts, 2 * rows, columns * 8 // 32, dtype=torch.int32, device="cuda")
    assert weight.numel() > 1 << 30
    weight[-1] = 0x01010101
    scale = torch.ones(experts, 2 * rows, 1, dtype=torch.float16, device="cuda") / columns
    words = torch.randint(-(2**31), 2**31 - 1, (experts, columns, rows * 4 // 32), dtype=torch.int32, device="cuda")
    scales = torch.rand(experts, columns, rows // 128, dtype=torch.float16, device="cuda")
    down = ops.Stack(words, scales, None, None, 4, 128)
    x = torch.ones(1, columns, device="cuda", dtype=torch.bfloat16)
    index, weights = torch.tensor([[1]], device="cuda"), torch.ones(1, 1, device="cuda")
    zero = torch.zeros(experts, 2 * rows, 1, dtype=torch.int32, device="cuda")
    up = ops.Stack(weight, scale, zero, None, 8, columns)
    found = ops.moe_group_gemm(x, index, weights, up, down, rows)
    activated = torch.nn.functional.silu(torch.ones(1, rows, device="cuda", dtype=torch.float64))
    for part in (slice(0, 32), slice(columns - 32, columns)):
        expected = dense_definition.group_gemm(activated, words[1, part], scales[1, part], None, 4, 128, rows)
        assert relative(found[:, part], expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tree(packed, dtype: torch.dtype) -> None:
    from llmcompress_kernels.triton.delta_decode import delta_decode

    torch.manual_seed(0)
    rows, columns, group, bits = 512, 1024, 128, [4, 1, 2, 3, 5, 6]
    spans = torch.tensor([[0, 39], [0, 3], [3, 18], [18, 19], [19, 38], [38, 39]])
    multipliers = [1.0] + [2.0**-4] * 5
    made = [packed((rows, columns), b, group, True, "cuda") for b in bits]
    x = torch.randn(40, columns, device="cuda", dtype=dtype)
    found = delta_decode(x, [m.weight for m in made], [m.scale for m in made], spans, bits, multipliers, group)
    expected = torch.zeros(40, rows, dtype=torch.float64, device="cuda")
    for (low, high), b, m, multiplier in zip(spans.tolist(), bits, made, multipliers):
        codes = ops.unpack(m.weight, b, columns).double() - ((1 << b) - 1) / 2
        wide = multiplier * m.scale.double().repeat_interleave(group, 1) * codes
        expected[low:high] += x[low:high].double() @ wide.T
    assert relative(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(8, 11008, 4096), (4, 1000, 11008), (13, 300, 1280), (16, 4096, 4096), (1, 77, 256)],
)
def test_cuda_tree(dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    """CUDA C++ by itself, against the definition."""
    from llmcompress_kernels.cuda import tree
    from llmcompress_kernels.reference import delta_decode as definition

    if tree.unavailable() is not None:
        pytest.skip(tree.unavailable())
    torch.manual_seed(tokens)
    bits = [4, 2, 1, 1, 1, 1]
    half = tokens // 2
    # 1 bit for all tokens, for half of them, for one, and for the last one
    spans = torch.tensor([[0, tokens], [0, half], [0, tokens], [half, tokens], [0, 1], [tokens - 1, tokens]])
    multipliers = [1.0, 0.5, 2.0**-2, 2.0**-3, 2.0**-3, 2.0**-4]
    # words at random: packing codes takes the CPU longer than all the rest
    words = [
        torch.randint(-(1 << 31), (1 << 31) - 1, (rows, columns * b // 32), dtype=torch.int32, device="cuda")
        for b in bits
    ]
    scales = [(0.1 * torch.rand(rows, columns // 128, device="cuda") + 0.01).half() for _ in bits]
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
    operands = (words, scales, spans, bits, multipliers, 128)
    found = [tree.delta_decode(x, *operands) for _ in range(3)]
    expected = definition.delta_decode(x.double(), *operands)
    assert relative(found[0], expected) < TOLERANCE[dtype]
    assert torch.equal(found[0], found[1])  # whatever block comes last
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_state_update_gives_the_definitions_codes(bits: int, dither: bool) -> None:
    torch.manual_seed(bits)
    sequences, heads, channels, states = 3, 8, 64, 128
    from llmcompress_kernels.triton.state import dsq_pack

    held = list(dsq_pack(torch.randn(sequences, heads, channels, states, device="cuda"), None, bits))
    expected = [t.clone() for t in held]
    for _ in range(3):
        drive = torch.randn(sequences, heads, channels, device="cuda")
        decay = torch.rand(sequences, heads, device="cuda")
        b, c = (torch.randn(sequences, 2, states, device="cuda") for _ in range(2))
        found = state.dsq_state_update(*held, None, drive, decay, b, c, bits, dither=dither)
        wanted = state_definition.dsq_state_update(*expected, None, drive, decay, b, c, bits, dither=dither)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(held, expected))


@pytest.mark.parametrize(
    ("implementation", "bits", "states", "window"),
    [("cuda", 4, 128, 2), ("cuda", 4, 64, 16), ("triton", 4, 128, 4), ("triton", 8, 64, 2)],
)
def test_replay_windows_give_the_definitions_codes(
    monkeypatch, implementation: str, bits: int, states: int, window: int
) -> None:
    """By a graph of all tokens of a window, sequences at different places, twice."""
    from llmcompress_kernels.cuda import state as cuda_state

    if implementation == "cuda" and cuda_state.unavailable(cuda_state.REPLAY) is not None:
        pytest.skip(cuda_state.unavailable(cuda_state.REPLAY))
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", implementation)
    torch.manual_seed(window)
    sequences, heads, channels, groups = 70, 20, 64, 2
    held = [*state.dsq_pack(torch.randn(sequences, heads, channels, states, device="cuda"), None, bits, dither=True)]
    width = heads * channels + heads + groups * states
    held += [torch.randn(sequences, window - 1, width, device="cuda")]
    held[3][..., heads * channels : heads * channels + heads] = 0.9
    held += [torch.randint(0, window, (sequences,), dtype=torch.int32, device="cuda")]
    text = (
        torch.randn(window, sequences, heads, channels, device="cuda"),
        torch.rand(window, sequences, heads, device="cuda"),
        *(torch.randn(window, sequences, groups, states, device="cuda") for _ in "bc"),
    )

    def run(update: Any, kept: list[torch.Tensor]) -> list[torch.Tensor]:
        tokens = ([x[t] for x in text] for t in range(window))
        return [update(*kept[:3], None, *kept[3:], *token, bits, dither=True) for token in tokens]

    theirs, start = ([t.clone() for t in held] for _ in "12")
    run(state.dsq_replay_update, held)  # builds and warms
    for mine, first in zip(held, start):
        mine.copy_(first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(state.dsq_replay_update, held)
    for mine, first in zip(held, start):
        mine.copy_(first)
    for _ in range(2):
        graph.replay()
        for mine, wanted in zip(found, run(state_definition.dsq_replay_update, theirs)):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert all(torch.equal(mine, expected) for mine, expected in zip(held, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "window"), [(4, 1), (4, 3), (16, 1)])
def test_mixer_of_one_token(bits: int, window: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    sequences, heads, channels, states, groups = 3, 8, 64, 128, 2
    inner, width = heads * channels, heads * channels + 2 * groups * states
    weights = (torch.randn(width, 4), torch.randn(width), torch.randn(heads), -torch.rand(heads) * 0.01)
    weights = (*weights, torch.randn(heads), torch.rand(inner))
    weights = tuple(t.to("cuda", dtype) for t in weights)
    conv = torch.randn(sequences, width, 4, device="cuda", dtype=dtype)
    floats = torch.randn(sequences, heads, channels, states, device="cuda")
    held = (*state.dsq_pack(floats, None, bits), None, None) if bits < 16 else (None, None, None, None, floats)
    kept: tuple[torch.Tensor, ...] = ()
    if window > 1:
        recent = torch.zeros(sequences, window - 1, inner + heads + groups * states, device="cuda")
        kept = (recent, torch.arange(sequences, dtype=torch.int32, device="cuda") % window)
    theirs, other = tuple(None if t is None else t.clone() for t in held), conv.clone()
    their_kept = [t.clone() for t in kept]
    for _ in range(window + 1):
        projected = torch.randn(sequences, inner + width + heads, device="cuda", dtype=dtype)
        tail = (groups, states, bits, 1e-5, False, bits < 16)
        found = state.mamba2_decode(projected, conv, *weights, *held, *tail, *kept)
        wanted = state_definition.mamba2_decode(projected, other, *weights, *theirs, *tail, *their_kept)
        limits = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found, wanted, **limits)
        assert torch.equal(conv, other)
        for mine, expected in zip(held, theirs):
            if mine is not None and mine.dtype == torch.uint8:
                assert (mine != expected).float().mean() < 1e-2  # exponentials differ in their last bit
            if mine is not None:
                expected.copy_(mine)  # and what differs would go on


def test_scan_is_differentiable() -> None:
    tokens, heads, channels, states = 40, 4, 32, 64
    drive = torch.randn(1, tokens, heads, channels, device="cuda", requires_grad=True)
    decay = torch.rand(1, tokens, heads, device="cuda").requires_grad_()
    b, c = (torch.randn(1, tokens, 2, states, device="cuda", requires_grad=True) for _ in range(2))
    begin = torch.zeros(1, heads, channels, states, device="cuda")
    bits = torch.tensor([4, 6, 8, 16], dtype=torch.int32, device="cuda")
    out, _ = state.selective_scan_q(drive, decay, b, c, begin, bits)
    inputs = (drive, decay, b, c)
    found = torch.autograd.grad(out.square().sum(), inputs)
    plain = [t.detach() for t in inputs]
    expected, _, kept = state_definition.selective_scan_q(*plain, begin, bits, None, 1, 1, True)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-3)
    wanted = state_definition.selective_scan_q_backward(2 * expected, *plain, kept, bits, None, 1, 1)
    for mine, theirs in zip(found, wanted):
        assert (mine - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_prompt_of_a_mixer(dtype: torch.dtype) -> None:
    """A length that is no multiple of a chunk, from a state, against the definition in fp32."""
    torch.manual_seed(0)
    sequences, tokens, heads, channels, states, groups = 2, 150, 8, 64, 128, 2
    inner, width = heads * channels, heads * channels + 2 * groups * states
    rates = -torch.tensor([0.3, 200.0, 1e-4, 5.0] * 2, device="cuda")
    draw = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    weights = (draw(width, 4), draw(width), draw(heads), rates, draw(heads), 1 + 0.1 * draw(inner))
    rows, conv = draw(sequences, tokens, inner + width + heads).to(dtype), draw(sequences, width, 4).to(dtype)
    held = draw(sequences, heads, channels, states)
    other, tail = held.clone(), (groups, 0.01, 4.0, 1e-5)
    found = torch.ops.llmcompress.mamba2_prefill(rows[..., :-heads], rows[..., -heads:], conv, *weights, held, *tail)
    wide = rows.float()
    expected = state_definition.mamba2_prefill(
        wide[..., :-heads], wide[..., -heads:], conv.float(), *weights, other, *tail
    )
    close = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative(found, expected.double()) < close
    assert relative(held, other.double()) < close


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_int8_activations(packed, bits: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    for rows, columns, group in ((1024, 2048, 1 << 20), (333, 1000, 64)):
        w = packed((rows, columns), bits, group, group == 64, "cuda")
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        operands = (w.weight, w.scale, w.zero, bits, group, columns, True)
        expected = dense_definition.group_gemm(x.float(), *operands)
        assert relative(ops.group_gemm(x, *operands), expected.double()) < TOLERANCE[torch.bfloat16], (rows, columns)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 33, 1024])
def test_int8_activations_with_one_scale_a_token(packed, bits: int, tokens: int) -> None:
    from llmcompress_kernels.triton import int8_gemm

    torch.manual_seed(tokens)
    for rows, columns in ((1024, 2048), (333, 1000)):
        w = packed((rows, columns), bits, 1 << 20, True, "cuda")
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        weight = dense_definition.decode(w.weight, w.scale, None, bits, 1 << 20, columns)
        expected = ((x.float() / scale).round() * scale).double() @ weight.double().T
        found = int8_gemm.token_gemm(x, w.weight, w.scale, bits, columns)
        assert relative(found, expected) < TOLERANCE[torch.bfloat16], (rows, columns)
