"""Dense and routed products on a GPU, beside torch's bfloat16 and the peers that are installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_timing import Timed, replay, rotations
from llmcompress_kernels import ops, select
from llmcompress_kernels.cuda import skinny

GROUP = 128
# calls of a graph at least, so that its start does not count
LEAST_CALLS = 8
# measure Triton by itself and other projects' kernels as well
PEERS = True
# of these, what is left out
SKIPPED: set[str] = set()
# Mixtral-8x7B
HIDDEN, INTERMEDIATE, EXPERTS, SLOTS = 4096, 14336, 8, 2
DENSE = ((14336, 4096), (4096, 14336))


def packed(*shape: int, bits: int, group: int = GROUP) -> ops.Stack:
    """Random codes, scales and zero points; small values, so that sums stay finite."""
    words = lambda count: -(-count * bits // 32)  # noqa: E731
    *rows, columns = shape
    groups = -(-columns // group)
    draw = lambda count: torch.randint(-(1 << 31), (1 << 31) - 1, (*rows, count), dtype=torch.int32, device="cuda")  # noqa: E731
    scale = torch.full((*rows, groups), 0.01, dtype=torch.float16, device="cuda")
    return ops.Stack(draw(words(columns)), scale, draw(words(groups)), None, bits, group)


def nbytes(stack: ops.Stack) -> int:
    """Bytes of the packed weight."""
    return sum(t.nbytes for t in (stack.weight, stack.scale, stack.zero) if t is not None)


def dense_weights(rows: int, columns: int, bits: int) -> list[ops.Stack]:
    """Weights of one shape, as many as keep the cache from helping."""
    first = packed(rows, columns, bits=bits)
    return [first, *(packed(rows, columns, bits=bits) for _ in range(rotations(nbytes(first)) - 1))]


def bank(bits: int) -> tuple[ops.Stack, ops.Stack]:
    """Both projections of a Mixtral layer's experts."""
    return packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN, bits=bits), packed(EXPERTS, HIDDEN, INTERMEDIATE, bits=bits)


def sides(bits: int) -> tuple[skinny.Side, ...]:
    """A :func:`bank` as the CUDA C++ kernels take it."""
    return tuple(skinny.Side(s.weight, s.scale, s.zero, None, bits, s.group_size) for s in bank(bits))


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations ``[T, H]``, experts and weights ``[T, k]`` of a Mixtral layer, routed uniformly."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS, -1).indices
    return x, index, torch.rand(tokens, SLOTS, device="cuda")


def several(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same calls, over and over, until a graph of them is long enough."""
    return calls * -(-LEAST_CALLS // len(calls))


def dense(tokens: int, bits: int, rate: float) -> Iterator[dict[str, Any]]:
    """One line per shape: our time, bfloat16's, the peers', and the share of the floor."""
    for rows, columns in DENSE:
        x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
        weights = dense_weights(rows, columns, bits)
        wide = [torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        candidates: dict[str, list[Callable[[], object]]] = {
            "ours": [_dense_call(x, w, columns) for w in weights],
            "bf16": [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in wide],
        }
        reasons = _both(candidates, tokens <= skinny.TOKENS)
        for name, make in (("humming", _humming), ("gemlite", _gemlite)) if PEERS else ():
            if name in SKIPPED:
                continue
            try:
                candidates[name] = make(x, rows, columns, bits)
            except Exception as error:  # a peer that cannot run is a line of the report
                reasons[name] = f"{type(error).__name__}: {error}"[:300]
        line = {"op": "group_gemm", "rows": rows, "columns": columns, "tokens": tokens, "bits": bits}
        yield {**line, **_figures(_replay(candidates), nbytes(weights[0]) / rate * 1e6), "not_run": reasons}


def routed(tokens: int, bits: int, rate: float, skipped: float = 0.0) -> dict[str, Any]:
    """The MoE block of one Mixtral layer; ``skipped`` is the share of slots that are pruned."""
    x, index, weights = routing(tokens)
    if skipped:
        index = torch.where(torch.rand(tokens, SLOTS, device="cuda") < skipped, EXPERTS, index)
    first = bank(bits)
    size = nbytes(first[0]) + nbytes(first[1])
    banks = [first, *(bank(bits) for _ in range(max(2, rotations(size)) - 1))]
    candidates: dict[str, list[Callable[[], object]]] = {
        "ours": [lambda s=s: ops.moe_group_gemm(x, index, weights, *s, INTERMEDIATE) for s in banks]
    }
    reasons = _both(candidates, tokens * SLOTS <= skinny.SLOTS_PER_EXPERT * EXPERTS)
    try:
        candidates["bf16"] = _grouped_bfloat16(x, index, weights)
    except (AttributeError, RuntimeError) as error:
        reasons["bf16"] = f"{type(error).__name__}: {error}"[:300]
    hit = int((torch.bincount(index.flatten(), minlength=EXPERTS + 1)[:EXPERTS] > 0).sum())
    floor = size * hit / EXPERTS / rate * 1e6
    line = {"op": "moe_group_gemm", "tokens": tokens, "bits": bits, "experts_hit": hit, "skipped": skipped}
    used = float((index < EXPERTS).float().mean())
    found = _figures(_replay(candidates), floor)
    flops = 6 * tokens * SLOTS * used * HIDDEN * INTERMEDIATE
    return {**line, **found, "teraflops": flops / found["ours_us"] / 1e6, "slots_used": used, "not_run": reasons}


def _both(candidates: dict[str, list[Callable[[], object]]], few: bool) -> dict[str, str]:
    """Add Triton on its own where CUDA C++ is what runs, or say why it is not; a graph keeps what captured it."""
    reason = skinny.unavailable() or (None if few else "too many tokens")
    if reason is not None:
        return {"cuda": reason}
    if not PEERS or "triton" in SKIPPED:
        return {}

    def only(function: Callable[[], object]) -> object:
        before = os.environ.get(select.VARIABLE)
        os.environ[select.VARIABLE] = "triton"
        try:
            return function()
        finally:
            if before is None:
                del os.environ[select.VARIABLE]
            else:
                os.environ[select.VARIABLE] = before

    candidates["triton"] = [partial(only, call) for call in candidates["ours"]]
    return {}


def _dense_call(x: torch.Tensor, w: ops.Stack, columns: int) -> Callable[[], object]:
    assert w.scale is not None
    return lambda: ops.group_gemm(x, w.weight, w.scale, w.zero, w.bits, w.group_size, columns)


def _grouped_bfloat16(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[Callable[[], object]]:
    """torch._grouped_mm on the same routing, tokens sorted beforehand: what transformers runs, less its sorting."""
    order = index.flatten().argsort(stable=True)
    kept = order[index.flatten()[order] < EXPERTS]
    counts = torch.bincount(index.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    offsets = counts.cumsum(0).to(torch.int32)
    rows = x[kept // SLOTS].contiguous()
    share = weights.flatten()[kept].unsqueeze(1).to(x.dtype)
    up = torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE, dtype=torch.bfloat16, device="cuda") * 0.01
    down = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device="cuda") * 0.01

    def call() -> object:
        gate, value = torch._grouped_mm(rows, up, offs=offsets).chunk(2, -1)
        outer = torch._grouped_mm(torch.nn.functional.silu(gate) * value, down, offs=offsets) * share
        return torch.zeros_like(x).index_add_(0, kept // SLOTS, outer)

    call()
    return [call]


def _humming(x: torch.Tensor, rows: int, columns: int, bits: int) -> list[Callable[[], object]]:
    layer_module = importlib.import_module("humming.layer")
    config = {"b_dtype": f"uint{bits}", "group_size": GROUP, "has_zero_point": True}
    layers = []
    # as many as keep the cache from helping, like our own
    for _ in range(rotations(rows * columns * bits // 8)):
        layer = layer_module.HummingLayer(rows, columns, weight_config=dict(config), torch_dtype=x.dtype).cuda()
        layer.load_from_unquantized(torch.randn(rows, columns, dtype=x.dtype, device="cuda"))
        layer.transform()
        layer(x)
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


def _gemlite(x: torch.Tensor, rows: int, columns: int, bits: int) -> list[Callable[[], object]]:
    core = importlib.import_module("gemlite.core")
    if bits == 3:
        raise ValueError("gemlite has no 3-bit weights")
    kind = core.DType.BF16
    layers = []
    for _ in range(4):
        layer = core.GemLiteLinear(bits, GROUP, columns, rows, kind, kind)
        codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device="cuda")
        scales = torch.full((rows * columns // GROUP, 1), 0.01, dtype=x.dtype, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, float(1 << (bits - 1))), None)
        layer(x)
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


def _replay(candidates: dict[str, list[Callable[[], object]]]) -> dict[str, Timed]:
    return replay({name: several(calls) for name, calls in candidates.items()})


def _figures(times: dict[str, Timed], floor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"floor_us": round(floor, 2)}
    for name, each in times.items():
        found[f"{name}_us"] = round(each.median, 2)
    found["floor_share"] = round(floor / times["ours"].median, 3)
    for name, each in times.items():
        if name != "ours":
            found[f"over_{name}"] = round(each.median / times["ours"].median, 3)
    return found
