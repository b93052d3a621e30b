"""Candidates beside what is the default: correct, then how fast.

    python kernels/bench/gpu_candidates.py --out FILE [--only states,trees,products]

Instances of the CUDA C++ kernels for states and residual trees, from libraries built with all of them
(``LLMCOMPRESS_TUNE``), and launches of Triton's products of 4-bit weights with 32 to 128 tokens in the shapes of
Mamba2-2.7B. What is fastest becomes the default in ``cuda/state.py``, ``cuda/tree.py`` and ``triton/tuning.py``.
With the builds on 16 cores all of it is meant to take less than 150 s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).resolve().parent)]

import gpu_mamba  # noqa: E402
import gpu_matrix  # noqa: E402
import gpu_run  # noqa: E402
import gpu_state  # noqa: E402
import gpu_tree  # noqa: E402
import torch  # noqa: E402
from gpu_timing import copy_rate, replay, rotations  # noqa: E402
from llmcompress_kernels import build  # noqa: E402
from llmcompress_kernels.cuda import state as cuda_state  # noqa: E402
from llmcompress_kernels.cuda import tree as cuda_tree  # noqa: E402
from llmcompress_kernels.reference import delta_decode as tree_definition  # noqa: E402
from llmcompress_kernels.reference import state as state_definition  # noqa: E402
from llmcompress_kernels.triton import group_gemm, tuning  # noqa: E402
from llmcompress_kernels.triton.state import dsq_pack  # noqa: E402

VARIANTS = (0, cuda_state.SMALL, cuda_state.LARGE)
WINDOW_VARIANTS = (cuda_state.SMALL, cuda_state.LARGE, *cuda_state.CANDIDATES)
PARTS = ("states", "trees", "products")
BLOCKS_4, BLOCKS_5 = cuda_state.EARLY_READERS
# rounding and reading are launches of their own: each kind of one with some of the other
WINDOWED = (
    *product(WINDOW_VARIANTS, (4, BLOCKS_5)),
    *product((cuda_state.LARGE, 4), (8, BLOCKS_4)),
)
# those that are also launched while the one in front still runs
EARLY = ((cuda_state.LARGE, 4), (4, BLOCKS_5))
CONFIGS = tuple(
    cuda_tree.Config(*shape)
    for shape in (
        (2, 12, 2), (2, 8, 2), (2, 8, 2, 2), (2, 16, 2), (2, 12, 3), (2, 8, 4), (1, 16, 4), (1, 8, 3, 2),
    )
) + tuple(
    cuda_tree.Config(*shape, spread=True)
    for shape in ((2, 12, 2), (2, 12, 3), (2, 8, 2), (2, 8, 2, 2))
)  # fmt: skip
STATE, REPLAY, TREE = "state-tune", "replay-tune", "tree-tune"


def families() -> None:
    """The libraries with all their instances."""
    torch.cuda.init()
    for name, family in ((STATE, cuda_state.FAMILY), (REPLAY, cuda_state.REPLAY), (TREE, cuda_tree.FAMILY)):
        own = build.FAMILIES[family]
        build.register(replace(own, name=name, flags=(*own.flags, "-DLLMCOMPRESS_TUNE")))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(build.load, (STATE, REPLAY, TREE)))


def variants(bits: int) -> tuple[int, ...]:
    """Those that there are of the update without windows."""
    return (*VARIANTS, *(cuda_state.CANDIDATES if bits == 4 else ()))


def check_state(variant: int, bits: int, calibrated: bool, dither: bool = False) -> float:
    """Error of the read-out; raises where codes or scales differ."""
    torch.manual_seed(variant)
    sequences, heads, channels, states = 37, 80, 64, 128
    u = torch.randn(sequences, heads, channels, states, device="cuda")
    u *= torch.randn(channels, 1, device="cuda").exp() * torch.randn(states, device="cuda").exp()
    u[0, 0] = 0
    u[1, 1, :, 3] *= 1e-7
    u[1, 2, :, 5] *= 1e9
    fixed = (torch.rand(heads, channels, device="cuda") + 0.1).half() if calibrated else None
    held = list(dsq_pack(u, fixed, bits))
    expected = [None if t is None else t.clone() for t in held]
    worst = 0.0
    for _ in range(3):
        drive = torch.randn(sequences, heads, channels, device="cuda")
        decay = torch.rand(sequences, heads, device="cuda") * 0.2 + 0.8
        b, c = (torch.randn(sequences, 2, states, device="cuda") for _ in range(2))
        how = (fixed, drive, decay, b, c, bits, False, dither)
        found = cuda_state.dsq_state_update(*held, *how, variant=variant, family=STATE)
        wanted = state_definition.dsq_state_update(*expected, *how)
        worst = max(worst, ((found - wanted).norm() / wanted.norm()).item())
        for mine, exact, name in zip(held, expected, ("codes", "channel", "scale")):
            if mine is not None and not torch.equal(mine, exact):
                raise AssertionError(f"{name}: {(mine != exact).float().mean().item():.2e} differ")
    return worst


def check_windows(variant: int, readers: int, window: int, least: float = 0.0, overlap: bool = False) -> float:
    """Error of the read-out over two windows, sequences at different places; raises where what is kept differs.

    Decays are between ``least`` and 1, or 2^-60 of that where it is 0: numbers that nothing can be divided by.
    """
    torch.manual_seed(window)
    sequences, heads, channels, states = 37, 80, 64, 128
    held = list(dsq_pack(torch.randn(sequences, heads, channels, states, device="cuda"), None, 4, dither=True))
    recent = torch.randn(sequences, window - 1, heads * (channels + 1) + 2 * states, device="cuda")
    recent[..., heads * channels : heads * (channels + 1)] = 0.9
    held += [recent, torch.randint(0, window, (sequences,), dtype=torch.int32, device="cuda")]
    expected = [t if t is None else t.clone() for t in held]
    worst = 0.0
    for _ in range(2 * window):
        token = (
            torch.randn(sequences, heads, channels, device="cuda"),
            least + (1 - least) * torch.rand(sequences, heads, device="cuda"),
            *(torch.randn(sequences, 2, states, device="cuda") for _ in "bc"),
        )
        how = (*token, 4, False, True)
        if least == 0:
            token[1][:, ::16] *= 2.0**-60
        launch = {"variant": variant, "readers": readers, "family": REPLAY, "overlap": overlap}
        found = cuda_state.dsq_replay_update(*held[:3], None, *held[3:], *how, **launch)
        wanted = state_definition.dsq_replay_update(*expected[:3], None, *expected[3:], *how)
        worst = max(worst, ((found - wanted).norm() / wanted.norm()).item())
        for mine, exact, name in zip(held, expected, ("codes", "channel", "scale", "recent", "count")):
            if not torch.equal(mine, exact):
                raise AssertionError(f"{name}: {(mine != exact).float().mean().item():.2e} differ")
    return worst


def time_states(batch: int, rate: float) -> dict[str, Any]:
    """Microseconds of every variant, beside float states."""
    heads, p, n = gpu_state.HEADS, gpu_state.P, gpu_state.N
    drive, decay = torch.randn(batch, heads, p, device="cuda"), torch.rand(batch, heads, device="cuda")
    b, c = torch.randn(batch, 1, n, device="cuda"), torch.randn(batch, 1, n, device="cuda")
    fixed = (torch.rand(heads, p, device="cuda") + 0.5).half()
    candidates = gpu_state.float_updates(batch, drive, decay, b, c)
    for bits in (4, 8):
        size = batch * heads * p * n * bits // 8
        for own in (None, fixed):
            held = [
                dsq_pack(torch.randn(batch, heads, p, n, device="cuda"), own, bits) for _ in range(rotations(size, 16))
            ]
            for variant in variants(bits):
                name = f"dsq{bits}{'' if own is None else '_calibrated'}_{variant}"
                candidates[name] = [
                    lambda h=h, o=own, v=variant, b_=bits: cuda_state.dsq_state_update(
                        *h, o, drive, decay, b, c, b_, variant=v, family=STATE
                    )
                    for h in held
                ]
    held = [dsq_pack(torch.randn(batch, heads, p, n, device="cuda"), None, 4) for _ in candidates["dsq4_1"]]
    for window in gpu_state.WINDOWS:
        for (variant, readers), overlap in (*((pair, False) for pair in WINDOWED), *((pair, True) for pair in EARLY)):
            launch = {"variant": variant, "readers": readers, "family": REPLAY, "overlap": overlap}
            run = partial(cuda_state.dsq_replay_update, **launch)
            name = f"dsq4_w{window}_{variant}_{readers}{'_overlap' if overlap else ''}"
            candidates[name] = gpu_state.window_calls(held, window, drive, decay, b, c, update=run)
    times = replay(candidates, 15)
    floor = {f"floor{bits}": 2 * batch * heads * (p * n * bits // 8 + 2 * (p + n)) / rate * 1e6 for bits in (4, 8)}
    return {
        "batch": batch,
        **{k: round(v, 1) for k, v in floor.items()},
        **{k: round(t.median, 2) for k, t in times.items()},
    }


def check_tree(config: cuda_tree.Config, dtype: torch.dtype, tokens: int) -> float:
    """Error against the definition in float64, on the CPU's copy of nothing: all on the GPU."""
    torch.manual_seed(tokens)
    rows, columns, bits = 1100, 4096, [4, 2, 1, 1]
    spans = torch.tensor([[0, tokens], [0, tokens], [0, 1], [tokens // 2, tokens]])
    nodes = [gpu_tree.node(rows, columns, b) for b in bits]
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    packed, scale = [p for p, _ in nodes], [s for _, s in nodes]
    multiplier = [1.0, 0.25, 2.0**-3, 2.0**-4]
    wanted = tree_definition.delta_decode(x.double(), packed, scale, spans, bits, multiplier, 128)
    worst = 0.0
    for _ in range(3):
        found = cuda_tree.delta_decode(x, packed, scale, spans, bits, multiplier, 128, config=config, family=TREE)
        worst = max(worst, ((found.double() - wanted).norm() / wanted.norm()).item())
    if not worst < (4e-3 if dtype == torch.bfloat16 else 1e-3):
        raise AssertionError(f"error {worst}")
    return worst


def time_trees(rows: int, columns: int, models: int, rate: float) -> dict[str, Any]:
    """Microseconds of every configuration, beside one bfloat16 product per model."""
    given = gpu_tree.Operands.random(rows, columns, models)
    candidates: dict[str, Any] = {"bf16": given.bf16(rows)}
    for config in CONFIGS:
        name = "/".join(map(str, (config.tiles, config.warps, config.stages, config.blocks)))
        candidates[name + ("/spread" if config.spread else "")] = [
            lambda t=t, g=config: cuda_tree.delta_decode(given.x, *given.of(t), config=g, family=TREE)
            for t in given.trees
        ]
    times = replay(candidates, 20)
    found = {"rows": rows, "columns": columns, "models": models, "floor": round(given.size / rate * 1e6, 1)}
    return {**found, **{k: round(t.median, 2) for k, t in times.items()}}


def states(tried: Any, rate: float) -> None:
    """Check all instances for states, then time them."""
    for bits, calibrated, dither in product((4, 8), (False, True), (False, True)):
        for variant in variants(bits):
            if variant == 0 and dither:
                continue  # there is none
            name = f"state {variant} {bits} bits {calibrated} {dither}"
            tried(name, check_state, variant, bits, calibrated, dither)
    for (variant, readers), window, least in product(WINDOWED, gpu_state.WINDOWS, (0.0, 0.8)):
        tried(f"windows of {window}, {variant} {readers} {least}", check_windows, variant, readers, window, least)
    for (variant, readers), window in product(EARLY, gpu_state.WINDOWS):
        name = f"windows of {window}, {variant} {readers} overlap"
        tried(name, check_windows, variant, readers, window, 0.8, True)
    for batch in (512, 64, 1, 16):
        tried(f"state batch {batch}", time_states, batch, rate)


def trees(tried: Any, rate: float) -> None:
    """Check all instances for trees, then time them."""
    for config, tokens in product(CONFIGS, (1, 8)):
        tried(f"tree {config} {tokens}", check_tree, config, torch.bfloat16, tokens)
    for rows, columns, models in (
        (4096, 11008, 8),
        (11008, 4096, 8),
        (4096, 4096, 8),
        (11008, 4096, 4),
        (4096, 4096, 4),
    ):
        tried("tree", time_trees, rows, columns, models, rate)
        torch.cuda.empty_cache()


def products(tried: Any) -> None:
    """Check and time launches of 4-bit products in the shapes of Mamba2-2.7B."""
    for tokens, (rows, columns) in product((64, 128, 32), gpu_mamba.SHAPES):
        tried("product", time_products, tokens, rows, columns)
        torch.cuda.empty_cache()


def launches(tokens: int, rows: int, columns: int) -> dict[str, tuning.Config]:
    """Of a 4-bit product: the default, the same with parts added in one launch, few parts and some beside them."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    usual, few = tuning.default(tokens, rows, columns, count), tuning.few_parts(tokens, rows, columns, 4, count)
    found = {
        "default": usual,
        "default joined": replace(usual, joined=True),
        "few": few,
        "few deeper": replace(few, stages=4),
        "few narrow": replace(few, columns=few.columns // 2, stages=4),
        "few twice": replace(few, splits=2 * few.splits),
        "few high": replace(few, rows=2 * few.rows, splits=2 * few.splits, warps=8),
        "few 8 warps": replace(few, warps=12 - few.warps),
    }
    # of equal ones the first
    return {name: config for config, name in {c: n for n, c in reversed(found.items())}.items()}


def time_products(tokens: int, rows: int, columns: int) -> dict[str, Any]:
    """Microseconds of every launch that is right, beside bf16 weights."""
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    held = [gpu_matrix.packed(rows, columns, bits=4) for _ in range(rotations(rows * columns // 2, 24))]
    wide = [torch.randn(rows, columns, dtype=x.dtype, device="cuda") for _ in range(8)]
    chosen = launches(tokens, rows, columns)

    def product_of(config: tuning.Config, w: Any) -> torch.Tensor:
        return group_gemm.group_gemm(x, w.weight, w.scale, w.zero, 4, w.group_size, columns, config=config)

    with ThreadPoolExecutor(8) as pool:  # compiles side by side
        first = dict(zip(chosen, pool.map(lambda config: attempt(product_of, config, held[0]), chosen.values())))
    w = held[0]
    expected = torch.ops.llmcompress.group_gemm_definition(
        x.float(), w.weight, w.scale, w.zero, 4, w.group_size, columns
    )
    right = {}
    for name, result in first.items():
        error = ((result.float() - expected).norm() / expected.norm()).item() if result is not None else float("nan")
        right[name] = error < 1e-2
    candidates: dict[str, Any] = {"bf16": [lambda w=w: torch.nn.functional.linear(x, w) for w in wide]}
    for name in (name for name in chosen if right[name]):
        candidates[name] = [lambda w=w, c=chosen[name]: product_of(c, w) for w in held]
    times = {name: round(each.median, 2) for name, each in replay(candidates, 15).items()}
    wrong = [name for name, fine in right.items() if not fine]
    return {"tokens": tokens, "rows": rows, "columns": columns, "wrong": wrong, "us": times} | {
        "configs": {name: str(config) for name, config in chosen.items()}
    }


def attempt(function: Any, *arguments: Any) -> Any:
    """Its result, or None where the GPU does not hold the launch."""
    try:
        return function(*arguments)
    except Exception as error:  # a launch that does not compile is one of no use
        print(f"{arguments[0]}: {type(error).__name__}: {error}"[:200], flush=True)
        return None


def main() -> int:
    """Check, then time; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Candidates of kernels and launches beside the defaults.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=gpu_run.parts_of(PARTS), default=PARTS, help="parts, separated by commas")
    options = parser.parse_args()
    parts = options.only
    began, lines, failed = time.perf_counter(), [], 0

    def note(**line: Any) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        options.out.write_text(json.dumps(lines, indent=1) + "\n")

    def tried(what: str, function: Any, *arguments: Any) -> None:
        nonlocal failed
        try:
            note(what=what, at=round(time.perf_counter() - began, 1), result=function(*arguments))
        except Exception as error:  # one failure must not lose the rest
            failed += 1
            note(what=what, failed=f"{type(error).__name__}: {error}"[:600])

    if "states" in parts or "trees" in parts:
        tried("build", families)
    rate = copy_rate()
    note(what="copy", rate=rate, device=torch.cuda.get_device_name())
    if "states" in parts:
        states(tried, rate)
    if "trees" in parts:
        trees(tried, rate)
    if "products" in parts:
        products(tried)
    note(what="end", seconds=round(time.perf_counter() - began, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
