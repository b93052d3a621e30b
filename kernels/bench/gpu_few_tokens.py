"""Forms and launches of the CUDA C++ products of few tokens, and forms of the tree kernel, beside each other.

    python kernels/bench/gpu_few_tokens.py --out FILE [--seconds S] [--table FILE] [--profile] [--without]

A form is the same source compiled with other choices. Every candidate's result is compared with the definition before
it is timed; FILE is written after every product, and so is the table, with the fastest launch of each.
``--profile`` times nothing and launches each form once, for ncu. ``--without`` times launches without their products,
without copies of weights, or with neither beside them, which tells what limits them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).resolve().parent)]

import gpu_tree  # noqa: E402
import torch  # noqa: E402
from gpu_matrix import DENSE, EXPERTS, HIDDEN, INTERMEDIATE, dense_weights, nbytes, routing, several, sides  # noqa: E402
from gpu_run import versions  # noqa: E402
from gpu_timing import copy_rate, read_rate, replay  # noqa: E402
from llmcompress_kernels import build  # noqa: E402
from llmcompress_kernels.cuda import launches, skinny  # noqa: E402
from llmcompress_kernels.cuda import tree as cuda_tree  # noqa: E402
from llmcompress_kernels.cuda.launches import Launch  # noqa: E402
from llmcompress_kernels.reference import delta_decode as tree_definition  # noqa: E402
from llmcompress_kernels.reference import group_gemm as dense_definition  # noqa: E402
from llmcompress_kernels.reference import moe_group_gemm as routed_definition  # noqa: E402

# by name the flags that choose a form in the source; the one that is used has none
FORMS: dict[str, tuple[str, ...]] = {"usual": ()}
# forms that leave something out, and so give wrong results
PROBES = {
    f"without {what}": (f"-DLLMCOMPRESS_WITHOUT={i}",) for i, what in enumerate(("products", "copies", "both"), 1)
}
TREES: dict[str, tuple[str, ...]] = {"usual": ()}
LAUNCHES = launches.candidates()
USUAL = "8/2/1"
SAMPLES = 11
TOLERANCE = 8e-3  # relative error of bfloat16 results


def families(probes: bool, with_trees: bool) -> None:
    """All forms, compiled side by side."""
    torch.cuda.init()
    made = []
    wanted = [(skinny.FAMILY, {**FORMS, **(PROBES if probes else {})}), (cuda_tree.FAMILY, TREES)]
    for family, forms in wanted if with_trees else wanted[:1]:
        made.append(family)
        own = build.FAMILIES[family]
        for name, flags in forms.items():
            if flags:
                build.register(replace(own, name=f"{family}-{name}".replace(" ", "-"), flags=(*own.flags, *flags)))
                made.append(f"{family}-{name}".replace(" ", "-"))
    with ThreadPoolExecutor(len(made)) as pool:
        list(pool.map(build.load, made))


def _family(name: str) -> str:
    return skinny.FAMILY if FORMS.get(name) == () else f"{skinny.FAMILY}-{name}".replace(" ", "-")


def formed(form: str, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """A call with the library of a form."""
    before = skinny.FAMILY
    skinny.FAMILY = _family(form)
    try:
        return function(*arguments)
    finally:
        skinny.FAMILY = before


def _forms() -> Iterator[tuple[str, str, Launch]]:
    """Form, name and launch of every candidate."""
    for form in FORMS:
        yield from ((form, name, launch) for name, launch in LAUNCHES.items() if form == "usual" or not launch.whole)
    probes = [name for name in PROBES if _family(name) in build.FAMILIES]
    yield from ((form, USUAL, LAUNCHES[USUAL]) for form in probes)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    value = ((found.double() - wanted).norm() / wanted.norm()).item()
    return float("inf") if math.isnan(value) else value


def timed(candidates: dict[str, list[Callable[[], torch.Tensor]]], wanted: torch.Tensor) -> dict[str, Any]:
    """Microseconds of those that are right, fastest first; what is wrong with the others."""
    good, wrong = {}, {}
    for name, calls in candidates.items():
        if name.startswith("without"):
            good[name] = calls
            continue
        try:
            off = max(error(calls[0](), wanted) for _ in range(2))
            if off < TOLERANCE:
                good[name] = calls
            else:
                wrong[name] = f"error {off:.2g}"
        except RuntimeError as failure:
            wrong[name] = str(failure)[:200]
    times = {
        name: round(each.median, 2) for name, each in replay({n: several(c) for n, c in good.items()}, SAMPLES).items()
    }
    return {"us": dict(sorted(times.items(), key=lambda item: item[1])), "wrong": wrong}


def dense(rows: int, columns: int, bits: int, tokens: int, rate: float) -> dict[str, Any]:
    """One dense product."""
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    held = dense_weights(rows, columns, bits)
    first = held[0]
    wanted = dense_definition.group_gemm(x.double(), first.weight, first.scale, first.zero, bits, 128, columns)
    candidates = {
        f"{form} {name}": [
            partial(formed, form, skinny.group_gemm, x, w.weight, w.scale, w.zero, bits, w.group_size, columns, launch)
            for w in held
        ]
        for form, name, launch in _forms()
    }
    return {"floor_us": round(nbytes(first) / rate * 1e6, 2), **timed(candidates, wanted)}


def routed(bits: int, tokens: int, rate: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both launches of a Mixtral layer's experts; one of them is the usual one while the other is varied."""
    x, index, weights = routing(tokens)
    banks = [sides(bits) for _ in range(2)]
    own = [v for s in banks[0] for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group)]
    wanted = routed_definition.moe_group_gemm(
        x.float(), index, weights, *own, INTERMEDIATE, "silu", 1.702, 7.0
    ).double()
    hit = int(index.unique().numel())
    size = sum(t.nbytes for s in banks[0] for t in (s.weight, s.scale, s.zero) if t is not None)
    floor = round(size * hit / EXPERTS / rate * 1e6, 2)
    for number, mode in enumerate(("gate_up", "down")):
        candidates = {}
        for form, name, launch in _forms():
            chosen = (launch, LAUNCHES[USUAL]) if number == 0 else (LAUNCHES[USUAL], launch)
            arguments = (INTERMEDIATE, "silu", 1.702, 7.0, chosen)
            candidates[f"{form} {name}"] = [
                partial(formed, form, skinny.moe_group_gemm, x, index, weights, each, *arguments) for each in banks
            ]
        yield mode, {"experts_hit": hit, "floor_us": floor, **timed(candidates, wanted)}


def trees(rows: int, columns: int, models: int, rate: float) -> dict[str, Any]:
    """Both forms of the tree kernel beside one bfloat16 product per model."""
    given = gpu_tree.Operands.random(rows, columns, models)
    wanted = tree_definition.delta_decode(given.x.double(), *given.of(given.trees[0]))
    candidates = {}
    for form, flags in TREES.items():
        family = f"{cuda_tree.FAMILY}-{form}" if flags else cuda_tree.FAMILY
        candidates[form] = [
            lambda t=t, f=family: cuda_tree.delta_decode(given.x, *given.of(t), family=f) for t in given.trees
        ]
    bf16 = replay({"bf16": given.bf16(rows)}, SAMPLES)["bf16"].median
    return {"floor_us": round(given.size / rate * 1e6, 2), "bf16_us": round(bf16, 2), **timed(candidates, wanted)}


def profile(with_trees: bool) -> None:
    """One launch of each form, one token, for a profiler that is told which kernels to look at."""
    torch.manual_seed(1)
    x, index = torch.randn(1, HIDDEN, dtype=torch.bfloat16, device="cuda"), torch.tensor([[1, 5]], device="cuda")
    for bits in (2, 4):
        held = sides(bits)
        for pair in ((USUAL, USUAL), ("16/2/1/shared", "6/2/2/shared")):
            chosen = tuple(LAUNCHES[name] for name in pair)
            arguments = (INTERMEDIATE, "silu", 1.702, 7.0, chosen)
            formed("usual", skinny.moe_group_gemm, x, index, torch.rand(1, 2, device="cuda"), held, *arguments)
    if not with_trees:
        torch.cuda.synchronize()
        return
    rows, columns, models = 11008, 4096, 8
    given = gpu_tree.Operands.random(rows, columns, models)
    for form, flags in TREES.items():
        family = f"{cuda_tree.FAMILY}-{form}" if flags else cuda_tree.FAMILY
        cuda_tree.delta_decode(given.x, *given.of(given.trees[0]), family=family)
    torch.cuda.synchronize()


def plan(rate: float, with_trees: bool) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """What is measured, what matters most first."""
    for tokens in (1, 8, 4, 16):
        for bits in (2, 3, 4):
            yield {"op": "moe", "bits": bits, "tokens": tokens}, partial(routed, bits, tokens, rate)
        if tokens in (1, 8):
            for bits in (4, 3, 2):
                for rows, columns in DENSE:
                    name = {"op": "dense", "bits": bits, "tokens": tokens, "rows": rows, "columns": columns}
                    yield name, partial(dense, rows, columns, bits, tokens, rate)
        if tokens == 1 and with_trees:
            for rows, columns in ((11008, 4096), (4096, 4096)):
                name = {"op": "tree", "rows": rows, "columns": columns, "models": 8}
                yield name, partial(trees, rows, columns, 8, rate)


def main() -> int:
    """Check and time until the time is up; exit code 1 if something failed."""
    parser = argparse.ArgumentParser(description="Forms and launches of the products of few tokens.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="start nothing after this time")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--without", action="store_true")
    parser.add_argument("--trees", action="store_true", help="forms of the tree kernel as well")
    options = parser.parse_args()
    began = time.perf_counter()
    families(options.without, options.trees)
    if options.profile:
        profile(options.trees)
        return 0
    built = time.perf_counter() - began
    copied, read = copy_rate(), read_rate()
    rate, failed = max(copied, read), 0
    table: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "versions": versions(), "build_seconds": round(built, 1), "copy_gb_per_second": round(copied / 1e9, 1),
        "read_gb_per_second": round(read / 1e9, 1), "lines": [],
    }  # fmt: skip

    pairs: dict[tuple[int, int], dict[tuple[str, str], float]] = {}

    def choose(name: dict[str, Any], us: dict[str, float]) -> None:
        """The fastest; for experts among the pairs that were timed together, since either changes the other's time."""
        found = {k.removeprefix("usual "): time for k, time in us.items() if k.startswith("usual ")}
        bits, tokens = name["bits"], name["tokens"]
        if name["op"] == "dense":
            entry = launches.key("dense", bits, tokens, name["rows"], name["columns"])
            table[entry] = asdict(LAUNCHES[min(found, key=found.__getitem__)])
            return
        timed = pairs.setdefault((bits, tokens), {})
        timed |= {(k, USUAL) if name["mode"] == "gate_up" else (USUAL, k): time for k, time in found.items()}
        first, second = min(timed, key=timed.__getitem__)
        table[launches.key("gate_up", bits, tokens, INTERMEDIATE, HIDDEN)] = asdict(LAUNCHES[first])
        table[launches.key("down", bits, tokens, HIDDEN, INTERMEDIATE)] = asdict(LAUNCHES[second])

    def note(name: dict[str, Any], found: dict[str, Any]) -> None:
        result["lines"].append({**name, **found})
        result["seconds"] = round(time.perf_counter() - began, 1)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        us = found.get("us", {})
        if options.table and us and name["op"] != "tree":
            choose(name, us)
            lines = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
            options.table.write_text("{\n " + lines + "\n}\n")
        shown = {k: us[k] for k in (*list(us)[:3], *(k for k in (f"usual {USUAL}",) if k in us))}
        rest = {k: v for k, v in found.items() if k != "us"}
        print(json.dumps({"at": result["seconds"], **name, **rest, "us": shown}), flush=True)

    for name, measure in plan(rate, options.trees):
        if time.perf_counter() - began > options.seconds:
            break
        try:
            found = measure()
            if isinstance(found, dict):
                note(name, found)
            else:
                for mode, each in found:
                    note({**name, "mode": mode}, each)
        except Exception as failure:  # one failure must not lose the rest
            failed += 1
            note(name, {"failed": f"{type(failure).__name__}: {failure}"[:600]})
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
