"""``group_gemm`` beside PyTorch's own ways to multiply with few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels.bench.timing import COLD_BYTES, Rotation, bandwidth_probes, interleave, read_bandwidth
from llmcompress_kernels.check import random_stack
from llmcompress_kernels.prepared import product
from llmcompress_kernels.reference.group_gemm import decode
from llmcompress_kernels.reference.group_gemm import interleave as interleave_rows

aten = torch.ops.aten
# in features, out features: a large and a medium layer, and one of a small model
SHAPES = ((4096, 14336), (2048, 1408), (576, 1536))
# names of PyTorch's candidates
BF16, INT4, INT8, DYNAMIC = "torch bf16", "torch int4", "torch int8", "torch dynamic int8"


def bench_linear(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = (1, 8, 128),
    bits: Sequence[int] = (4, 3, 2),
    group: int = 64,
    threads: int = 2,
    rounds: int = 15,
    budget: float = 15.0,
    seed: int = 0,
    cold: int = COLD_BYTES,
) -> list[dict[str, Any]]:
    """Time every candidate on every shape, bf16 activations.

    Args:
        shapes: ``(in features, out features)``.
        tokens: Rows of the activation.
        bits: Widths of ours; each runs exactly and with int8 activations (``W4``, ``W4 int8``).
        group: Columns per scale, asymmetric.
        threads: Threads of PyTorch.
        rounds: Clean samples wanted.
        budget: Seconds per shape and number of tokens.
        seed: Seed of the weights.
        cold: Bytes through which each candidate's weights rotate.

    Returns:
        One dict per candidate: shape, seconds, GB/s of stored weight and its share of the bandwidth probed beside it,
        GFLOP/s, speed-up over bf16, and the relative error against float64 on the candidate's own codes.
    """
    torch.set_num_threads(threads)
    rows = []
    with torch.inference_mode():
        probes = bandwidth_probes(threads)
        for columns, out in shapes:
            for count in tokens:
                rows += _one(columns, out, count, bits, group, rounds, budget, seed, cold, probes)
    return rows


def _one(
    columns: int,
    out: int,
    tokens: int,
    bits: Sequence[int],
    group: int,
    rounds: int,
    budget: float,
    seed: int,
    cold: int,
    probes: dict[str, Callable[[], Any]],
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)
    candidates: dict[str, Rotation] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}

    def add(
        name: str,
        make: Callable[[], tuple[Any, ...]],
        size: int,
        call: Callable[..., Any],
        weight: Callable[[], Tensor],
        bind: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        candidates[name], sizes[name] = Rotation(call, make, size, cold, bind), size
        expected = x.double() @ weight().double().T
        errors[name] = float((candidates[name]().double() - expected).norm() / expected.norm())

    _add_torch(add, x, torch.randn(out, columns, generator=generator) * 0.05, group)
    for width in bits:
        side = random_stack((out, columns), width, group, False, generator)
        assert side.scale is not None
        assert side.zero is not None
        dense = decode(side.weight, side.scale, side.zero, width, group, columns)
        operands = tuple(interleave_rows(t) for t in (side.weight, side.scale, side.zero))
        size = sum(t.nbytes for t in operands)
        for int8 in (False, True):
            name = f"W{width} int8" if int8 else f"W{width}"
            bind = _binder(width, group, columns, int8)
            add(name, _constant(operands), size, lambda layer: layer(x), _constant(dense), bind)
        del dense
    timings = interleave({**probes, **candidates}, rounds, budget)
    base, bandwidth = timings[BF16].median, read_bandwidth(timings)
    return [
        {
            "in": columns,
            "out": out,
            "tokens": tokens,
            "candidate": name,
            "microseconds": round(timing.median * 1e6, 2),
            "best_microseconds": round(timing.best * 1e6, 2),
            "ns_per_weight": round(timing.median * 1e9 / (columns * out), 5),
            "gb_per_s": round(sizes[name] / timing.median / 1e9, 2),
            "probed_gb_per_s": round(bandwidth / 1e9, 2),
            "share_of_bandwidth": round(sizes[name] / timing.median / bandwidth, 3),
            "gflop_per_s": round(2 * columns * out * tokens / timing.median / 1e9, 1),
            "times_bf16": round(base / timing.median, 3),
            "relative_error": round(errors[name], 6),
            "clean_samples": timing.clean,
            "samples": timing.total,
        }
        for name, timing in timings.items()
        if name in candidates
    ]


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _binder(bits: int, group: int, columns: int, int8: bool) -> Callable[..., tuple[Any, ...]]:
    """Makes of a weight what a layer calls."""
    return lambda packed, scale, zero: (product(packed, scale, zero, bits, group, columns, int8),)


def _add_torch(add: Callable[..., None], x: Tensor, weight: Tensor, group: int) -> None:
    """PyTorch's candidates: bf16, and its int4 and int8 operators, called by what reaches them in the shortest time."""
    out, columns = weight.shape
    # the functions that torch's own binding makes, less a microsecond beside those of torch.ops
    int4, int8 = torch._weight_int4pack_mm_for_cpu, torch._weight_int8pack_mm
    dynamic = torch.ops.quantized.linear_dynamic.default
    dense = weight.to(torch.bfloat16)
    add(BF16, lambda: (dense,), dense.nbytes, lambda w: torch.nn.functional.linear(x, w), lambda: dense)

    grouped = weight.view(out, columns // group, group)
    low = grouped.amin(-1)
    scale = ((grouped.amax(-1) - low) / 15).to(torch.bfloat16).float()
    codes = ((grouped - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15)
    # its convention: (code - 8) * scale + offset
    offset = (low + 8 * scale).to(torch.bfloat16)
    pairs = torch.stack([scale.T.to(torch.bfloat16), offset.T], -1).contiguous()
    packed = aten._convert_weight_to_int4pack_for_cpu(codes.view(out, columns).to(torch.int32), 1)
    add(
        INT4,
        lambda: (packed, pairs),
        packed.nbytes + pairs.nbytes,
        lambda w, s: int4(x, w, group, s),
        lambda: ((codes - 8) * scale.unsqueeze(-1) + offset.float().unsqueeze(-1)).view(out, columns),
    )

    per_row = (weight.abs().amax(1) / 127).to(torch.bfloat16)
    bytes_ = (weight / per_row.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    add(
        INT8,
        lambda: (bytes_, per_row),
        bytes_.nbytes,
        lambda w, s: int8(x, w, s),
        lambda: bytes_.float() * per_row.float().unsqueeze(1),
    )

    torch.backends.quantized.engine = "onednn"
    quantized = torch.quantize_per_channel(weight, per_row.double(), torch.zeros(out, dtype=torch.long), 0, torch.qint8)
    x32 = x.float()
    # prepacked weights are opaque objects that a rotation cannot clone, so they are made here
    copies = [
        torch.ops.quantized.linear_prepack(quantized, None) for _ in range(max(1, min(64, COLD_BYTES // bytes_.nbytes)))
    ]
    turn = iter(range(1 << 62))
    add(
        DYNAMIC,
        lambda: (copies,),
        bytes_.nbytes,
        lambda packs: dynamic(x32, packs[next(turn) % len(packs)], True),
        quantized.dequantize,
    )
