"""Instances of the CUDA C++ kernels for states and residual trees beside each other: correct, then how fast.

    python kernels/bench/gpu_candidates.py --out FILE

The libraries are built with all instances (``LLMCOMPRESS_TUNE``); what is fastest becomes the default in
``cuda/state.py`` and ``cuda/tree.py``. Takes about a minute with the build.
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

import gpu_state  # noqa: E402
import gpu_tree  # noqa: E402
import torch  # noqa: E402
from gpu_timing import copy_rate, replay, rotations  # noqa: E402
from llmcompress_kernels import build  # noqa: E402
from llmcompress_kernels.cuda import state as cuda_state  # noqa: E402
from llmcompress_kernels.cuda import tree as cuda_tree  # noqa: E402
from llmcompress_kernels.reference import delta_decode as tree_definition  # noqa: E402
from llmcompress_kernels.reference import state as state_definition  # noqa: E402
from llmcompress_kernels.triton.state import dsq_pack  # noqa: E402

VARIANTS = (0, 1, 2)
WINDOW_VARIANTS = (cuda_state.SMALL, cuda_state.LARGE)
CONFIGS = tuple(
    cuda_tree.Config(*shape)
    for shape in (
        (2, 12, 2), (2, 8, 2), (2, 8, 2, 2), (2, 16, 2), (2, 12, 3), (2, 8, 4), (1, 16, 4), (1, 8, 3, 2),
    )
)  # fmt: skip
STATE, TREE = "state-tune", "tree-tune"


def families() -> None:
    """The libraries with all their instances."""
    torch.cuda.init()
    for name, family in ((STATE, cuda_state.FAMILY), (TREE, cuda_tree.FAMILY)):
        own = build.FAMILIES[family]
        build.register(replace(own, name=name, flags=(*own.flags, "-DLLMCOMPRESS_TUNE")))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(build.load, (STATE, TREE, cuda_state.REPLAY)))


def check_state(variant: int, bits: int, calibrated: bool) -> float:
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
        found = cuda_state.dsq_state_update(*held, fixed, drive, decay, b, c, bits, variant=variant, family=STATE)
        wanted = state_definition.dsq_state_update(*expected, fixed, drive, decay, b, c, bits)
        worst = max(worst, ((found - wanted).norm() / wanted.norm()).item())
        for mine, exact, name in zip(held, expected, ("codes", "channel", "scale")):
            if mine is not None and not torch.equal(mine, exact):
                raise AssertionError(f"{name}: {(mine != exact).float().mean().item():.2e} differ")
    return worst


def check_windows(variant: int, readers: int, window: int) -> float:
    """Error of the read-out over two windows, sequences at different places; raises where what is kept differs."""
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
            torch.rand(sequences, heads, device="cuda"),
            *(torch.randn(sequences, 2, states, device="cuda") for _ in "bc"),
        )
        how = (*token, 4, False, True)
        found = cuda_state.dsq_replay_update(*held[:3], None, *held[3:], *how, variant=variant, readers=readers)
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
            for variant in VARIANTS:
                name = f"dsq{bits}{'' if own is None else '_calibrated'}_{variant}"
                candidates[name] = [
                    lambda h=h, o=own, v=variant, b_=bits: cuda_state.dsq_state_update(
                        *h, o, drive, decay, b, c, b_, variant=v, family=STATE
                    )
                    for h in held
                ]
    held = [dsq_pack(torch.randn(batch, heads, p, n, device="cuda"), None, 4) for _ in candidates["dsq4_1"]]
    for window in gpu_state.WINDOWS:
        for variant, readers in product(WINDOW_VARIANTS, cuda_state.READERS):
            run = partial(cuda_state.dsq_replay_update, variant=variant, readers=readers)
            name = f"dsq4_w{window}_{variant}_{readers}"
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
        candidates["/".join(map(str, (config.tiles, config.warps, config.stages, config.blocks)))] = [
            lambda t=t, g=config: cuda_tree.delta_decode(given.x, *given.of(t), config=g, family=TREE)
            for t in given.trees
        ]
    times = replay(candidates, 20)
    found = {"rows": rows, "columns": columns, "models": models, "floor": round(given.size / rate * 1e6, 1)}
    return {**found, **{k: round(t.median, 2) for k, t in times.items()}}


def main() -> int:
    """Check, then time; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Candidates of the state and tree kernels.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
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

    tried("build", families)
    for variant in VARIANTS:
        for bits in (4, 8):
            for calibrated in (False, True):
                tried(f"state {variant} {bits} bits {calibrated}", check_state, variant, bits, calibrated)
    for variant, readers, window in product(WINDOW_VARIANTS, cuda_state.READERS, gpu_state.WINDOWS):
        tried(f"windows of {window}, {variant} {readers}", check_windows, variant, readers, window)
    for config in CONFIGS:
        for tokens in (1, 8):
            tried(f"tree {config} {tokens}", check_tree, config, torch.bfloat16, tokens)
    rate = copy_rate()
    note(what="copy", rate=rate, device=torch.cuda.get_device_name())
    for batch in (64, 512, 1, 16):
        tried(f"state batch {batch}", time_states, batch, rate)
    for rows, columns, models in (
        (11008, 4096, 8),
        (4096, 4096, 8),
        (4096, 11008, 8),
        (11008, 4096, 4),
        (4096, 4096, 4),
    ):
        tried("tree", time_trees, rows, columns, models, rate)
        torch.cuda.empty_cache()
    note(what="end", seconds=round(time.perf_counter() - began, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
