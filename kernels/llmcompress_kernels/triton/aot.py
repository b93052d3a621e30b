"""Compile every Triton kernel to PTX and machine code for GPUs that are not here, and report what came out.

    python -m llmcompress_kernels.triton.aot [--arch 80 90] [--only NAME_PART]

prints one JSON object per kernel: shared memory, registers, spilled bytes, and how many matrix instructions of which
kind. Needs no GPU and no driver. The variants are the ones that launches choose by default: one token and many
tokens, every bit width, dense and routed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32", "i32": "*i32", "i64": "*i64", "u8": "*u8", "i8": "*i8"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        name: Shown in the report.
        kernel: The jitted function.
        types: Type of every run-time argument.
        constants: Value of every compile-time argument.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        matrix: It is expected to use tensor cores.
        weights: Weights per turn of the main loop; its instructions are counted if given.
        fused: Multiply-adds may be fused.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    matrix: bool = True
    weights: int = 0
    fused: bool = True


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel of the package, as launches on an architecture specialise it by default."""
    many = 128 if arch >= 90 else 64
    yield from _dense(many)
    yield from _routed(many)
    yield from _widened()
    yield from _states()
    yield from _mixers(arch)
    yield from _prompts()
    yield from _bytes()
    yield from _trees()
    yield from _columns()


def _walk(bits: int, kind: str, tokens: int, columns: int) -> dict[str, Any]:
    """Compile-time arguments that the matrix kernels share."""
    import triton.language as tl

    compute = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[kind]
    pairs = kind == "fp16" or (kind == "bf16" and bits < 8)
    return {
        "GROUP": 128,
        "BITS": bits,
        "HAS_ZERO": bits != 3,
        "EVEN": True,
        "ONE_GROUP": bits != 16,
        "BM": tokens,
        "BK": columns,
        "COMPUTE": compute,
        "PAIR_TYPE": compute if pairs and bits != 16 else None,
        "REORDER": pairs and bits != 16 and tokens <= 32,
        "SCALED": tokens >= 64,
    }


WEIGHT = {"weight": "*i32", "scale": "*fp16", "zero": "*i32"}
SIZES = {"words": "i32", "groups": "i32", "zero_words": "i32"}


def _dense(many: int) -> Iterator[Variant]:
    from llmcompress_kernels.triton.group_gemm import ADDED, add_parts_kernel, group_gemm_kernel

    types = {"parts": "*fp32", "out": "*bf16", "count": "i32", "size": "i32"}
    yield Variant("add_parts/bf16", add_parts_kernel, types, {"BLOCK": ADDED}, matrix=False)
    for bits in (2, 3, 4, 8):
        for kind, tokens, columns, warps in (("fp16", 16, 128, 4), ("bf16", 16, 128, 4), ("bf16", many, 64, 8)):
            types = {"x": POINTERS[kind], **WEIGHT, "out": "*fp32", "tokens": "i32", "rows": "i32", "columns": "i32"}
            constants = {**_walk(bits, kind, tokens, columns), "BN": 128}
            name = f"group_gemm/w{bits}/{kind}/{tokens}"
            yield Variant(
                name, group_gemm_kernel, {**types, **SIZES, "steps": "i32"}, constants, warps, weights=128 * columns
            )


def _routed(many: int) -> Iterator[Variant]:
    from llmcompress_kernels.triton.moe_group_gemm import combine_kernel, down_kernel, gate_up_kernel
    from llmcompress_kernels.triton.routing import route_kernel

    sides = (
        (2, "fp16", 16),
        (3, "bf16", 16),
        (4, "bf16", 16),
        (3, "bf16", many),
        (4, "fp16", many),
        (16, "bf16", many),
    )
    for bits, kind, tokens in sides:
        walk = {**_walk(bits, kind, tokens, 128 if tokens == 16 else 64), "HAS_BIAS": False, "EXPERTS": 8}
        weight = dict(WEIGHT) if bits != 16 else {**WEIGHT, "weight": POINTERS[kind]}
        head = {"x": POINTERS[kind], "slots": "*i32", "experts": "*i32", **weight, "bias": POINTERS[kind]}
        warps = 4 if tokens == 16 else 8
        up = {**head, "out": POINTERS[kind], "alpha": "fp32", "limit": "fp32", "count": "i32", "columns": "i32"}
        constants = {**walk, "SLOTS": 2, "ACTIVATION": "silu", "BN": 128 if tokens == 16 else 64}
        name = f"w{bits}/{kind}/{tokens}"
        types = {**up, "intermediate": "i32", **SIZES}
        yield Variant(f"moe_gate_up/{name}", gate_up_kernel, types, constants, warps)
        types = {**head, "out": "*fp32", "count": "i32", "columns": "i32", "rows": "i32", **SIZES, "steps": "i32"}
        yield Variant(f"moe_down/{name}", down_kernel, types, {**walk, "BN": 128}, warps)
    types = {"index": "*i64", "slots": "*i32", "experts": "*i32", "count": "i32", "places": "i32"}
    constants = {"EXPERTS": 60, "SIZE": 16, "COUNT": 64, "BLOCKS": 64, "BANK": 64, "CHUNK": 64}
    yield Variant("moe_route", route_kernel, types, constants, matrix=False)
    types = {"parts": "*fp32", "index": "*i64", "weights": "*fp32", "out": "*bf16", "count": "i32", "hidden": "i32"}
    constants = {"SPLITS": 4, "SLOTS": 2, "EXPERTS": 8, "BLOCK": 1024}
    yield Variant("moe_combine", combine_kernel, types, constants, matrix=False)


def _widened() -> Iterator[Variant]:
    import triton.language as tl

    from llmcompress_kernels.triton import widened

    sizes = dict.fromkeys(("first", "chunk", "span", "rows", "columns", "intermediate", "hidden"), "i32")
    for bits in (2, 3, 4, 8):
        constants = {"GROUP": 128, "BITS": bits, "HAS_ZERO": True, "ONE_GROUP": True, "COMPUTE": tl.bfloat16}
        constants |= {"BN": widened.ROWS, "BK": widened.COLUMNS}
        types = {**WEIGHT, "out": "*bf16", **sizes, **SIZES}
        yield Variant(f"widen/w{bits}", widened.widen_kernel, types, constants, matrix=False)
    types = {"h": "*bf16", "out": "*bf16", "ends": "*i32", **sizes, "alpha": "fp32", "limit": "fp32"}
    constants = {"ACTIVATION": "silu", "EXPERTS": 8, "BLOCK": 1024}
    yield Variant("widened_gate", widened.gate_kernel, types, constants, matrix=False)
    types = {"rows": "*bf16", "places": "*i64", "weights": "*fp32", "out": "*bf16", "ends": "*i32"}
    constants = {"SLOTS": 2, "EXPERTS": 8, "BLOCK": 1024}
    yield Variant("widened_weigh", widened.weigh_kernel, {**sizes, **types}, constants, matrix=False)


def _states() -> Iterator[Variant]:
    from llmcompress_kernels.triton import replay, state

    sizes = {"FIXED": 0, "HEADS": 80, "P": 64, "N": 128, "LOG": 7}
    pointers = dict.fromkeys(("drive", "decay", "b", "c", "out", "grad", "last", "kept", "scratch"), "*fp32")
    pointers |= dict.fromkeys(("d_drive", "d_decay", "d_b", "d_c", "state"), "*fp32")
    pointers |= {"codes": "*u8", "channel": "*fp16", "scale": "*fp16", "fixed": "*fp16", "bits": "*i32"}
    pointers |= dict.fromkeys(("tokens", "segments", "first", "window"), "i32")
    for bits in (4, 8):
        for kernel in (state.dsq_update_kernel, state.dsq_pack_kernel):
            constants = {**sizes, "BITS": bits, "SHARE": 80}
            yield Variant(f"{kernel.__name__}/s{bits}", kernel, pointers, constants, 8, matrix=False, fused=False)
    pointers |= {"recent": "*fp32", "count": "*i32", "sequences": "i32", "rows": "i32"}
    constants = {**sizes, "BITS": 4, "SHARE": 80, "FIXED": 3}
    for kernel in (state.dsq_update_kernel, replay.dsq_replay_kernel, replay.dsq_read_kernel):
        name = f"{kernel.__name__}/s4/dither"
        yield Variant(name, kernel, pointers, constants, 8, matrix=False, fused=False)
    constants = {"BLOCK": replay.SEQUENCES}
    yield Variant("advance_window", replay.advance_window_kernel, pointers, constants, 1, matrix=False)
    constants = {**sizes, "GROUPS": 1, "LENGTH": 32, "KEEP": True}
    for kernel in (state.dsq_scan_kernel, state.dsq_scan_backward_kernel):
        yield Variant(kernel.__name__, kernel, pointers, constants, 8, matrix=False, fused=False)


def _mixers(arch: int) -> Iterator[Variant]:
    from llmcompress_kernels.triton import mixer

    for kind in ("bf16", "fp32"):
        pointers = dict.fromkeys(("projected", "conv", "conv_weight", "conv_bias", "dt_bias", "d", "gain"), f"*{kind}")
        pointers |= dict.fromkeys(("a", "x", "y", "drive", "decay", "b", "c"), "*fp32")
        sizes = dict.fromkeys(("row", "inner", "both", "heads", "width"), "i32")
        # where launches may overlap, the form of benches that begins early
        early = kind == "bf16" and arch >= 90
        constants = {"CHANNELS": 64, "WIDTH": 4, "HAS_BIAS": True, "BLOCK": mixer.BLOCK, "EARLY": early}
        types = {**pointers, **sizes}
        yield Variant(f"mixer_inputs/{kind}", mixer.mixer_inputs_kernel, types, constants, matrix=False)
        types = {**pointers, **sizes, "out": f"*{kind}", "epsilon": "fp32"}
        constants = {"CHANNELS": 64, "SKIP": True, "BLOCK": 8192, "EARLY": early}
        yield Variant(f"mixer_output/{kind}", mixer.mixer_output_kernel, types, constants, 16, matrix=False)
    constants = {"HEADS": 80, "SHARE": 80, "P": 64, "N": 128, "ROWS": mixer.ROWS}
    for kind in ("fp32", "fp16"):
        types = {**dict.fromkeys(("drive", "decay", "b", "c", "out"), "*fp32"), "state": f"*{kind}"}
        yield Variant(f"state_update/{kind}", mixer.state_update_kernel, types, constants, matrix=False)


def _prompts() -> Iterator[Variant]:
    import torch
    import triton.language as tl

    from llmcompress_kernels.triton import prompt

    names = ("projected", "history", "conv_weight", "conv_bias", "mixed", "dt", "dt_bias", "d", "y")
    pointers = dict.fromkeys(names, "*bf16") | dict.fromkeys(("a", "state", "states"), "*fp32")
    sizes = dict.fromkeys(("row", "dt_row", "tokens", "inner", "channels", "chunks"), "i32")
    types = {**pointers, **sizes, "low": "fp32", "high": "fp32"}
    constants = {"WIDTH": 4, "HAS_HISTORY": True, "HAS_BIAS": True, "BLOCK": prompt.BLOCK, "STEP": prompt.TOKENS}
    yield Variant("prompt_inputs", prompt.prompt_inputs_kernel, types, constants, matrix=False)
    full = types | dict.fromkeys(names, "*fp32")
    for kind, held, compute in (("bf16", {**types, "states": "*bf16"}, tl.bfloat16), ("fp32", full, tl.float32)):
        chosen = prompt.launch(64, 128, torch.bfloat16 if kind == "bf16" else torch.float32)
        shape: dict[str, Any] = {"HEADS": 80, "SHARE": 80, "P": 64, "N": 128, "L": chosen.tokens, "PART": chosen.part}
        shape |= {"COMPUTE": compute, "PRECISION": "tf32" if kind == "bf16" else "tf32x3"}
        for kernel, rows, warps in (
            (prompt.prompt_states_kernel, chosen.walked, chosen.walking),
            (prompt.prompt_read_kernel, chosen.channels, chosen.warps),
        ):
            yield Variant(f"{kernel.__name__}/{kind}", kernel, held, {**shape, "ROWS": rows}, warps)


def _bytes() -> Iterator[Variant]:
    from llmcompress_kernels.triton import int8_gemm as kernels

    sizes = dict.fromkeys(
        ("tokens", "rows", "columns", "chunks", "words", "pitch", "groups", "zero_words", "steps"), "i32"
    )
    pointers = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "sums": "*i32", "weight": "*i32", "out": "*i8"}
    types = {**sizes, **pointers}
    constants = {"CHUNK": kernels.CHUNK, "COUNT": kernels.ROUNDED // kernels.CHUNK, "SUMS": False}
    yield Variant("round_activations", kernels.round_activations_kernel, types, constants, matrix=False)
    constants = {"BITS": 4, "BN": kernels.ROWS, "BK": kernels.COLUMNS}
    yield Variant("lay_out_codes/w4", kernels.lay_out_codes_kernel, types, constants, matrix=False)
    types |= {"x": "*i8", "weight": "*i8", "scale": "*fp16", "zero": "*i32", "out": "*bf16"}
    for name, tokens, bits, group in (("chunk", 4096, 8, 0), ("token", 4096, 8, 0), ("chunk", 16, 4, 128)):
        chosen = kernels.launch(tokens, 10576, 2560, name == "token")
        constants = {"GROUP": group, "BITS": bits, "HAS_ZERO": group > 0, "PER_TOKEN": name == "token", "EVEN": True}
        constants |= {"TURN": bits == 8, "BM": chosen.tokens, "BN": chosen.rows, "BK": 128 if name == "token" else 64}
        types |= {"out": "*bf16" if chosen.splits == 1 else "*fp32"}
        full = f"int8_gemm/{name}/w{bits}/{tokens}"
        yield Variant(full, kernels.int8_gemm_kernel, dict(types), constants, chosen.warps, chosen.stages)


def _trees() -> Iterator[Variant]:
    import triton.language as tl

    from llmcompress_kernels.triton.delta_decode import delta_decode_kernel

    types = {"x": "*bf16", "packed": "*i64", "scales": "*i64", "multipliers": "*fp32", "spans": "*i32", "out": "*fp32"}
    types |= dict.fromkeys(("nodes", "tokens", "rows", "columns", "words", "groups", "steps"), "i32")
    for bits in range(1, 7):
        pairs = tl.bfloat16 if bits in (2, 3, 4) else None
        rows, columns, stages = (32, 32, 1) if bits == 5 else (64, 128, 3)
        constants = {"GROUP": 128, "BITS": bits, "BM": 16, "BN": rows, "BK": columns, "COMPUTE": tl.bfloat16}
        constants["PAIR_TYPE"] = pairs
        yield Variant(f"delta_decode/w{bits}", delta_decode_kernel, types, constants, stages=stages)


def _columns() -> Iterator[Variant]:
    from llmcompress_kernels.triton import gptq_columns as kernels

    types = dict.fromkeys(("weights", "factor", "scale", "zero", "values", "errors"), "*fp32") | {"codes": "*u8"}
    types |= {**dict.fromkeys(("columns", "rows", "first", "count"), "i32"), "top": "fp32"}
    sizes = {"COLUMNS": kernels.COLUMNS, "ROWS": kernels.ROWS, "ROUNDER": kernels.ROUNDER}
    for half in (False, True):
        name = f"gptq_columns/{'half' if half else 'whole'}"
        yield Variant(name, kernels.gptq_columns_kernel, types, {**sizes, "HALF": half}, warps=1, matrix=False)
    names = ("pull", "hessian", "scale", "zero", "values", "changes")
    types = dict.fromkeys(names, "*fp32") | {"codes": "*u8", "top": "fp32"}
    types |= dict.fromkeys(("columns", "rows", "first", "count"), "i32")
    for half in (False, True):
        name = f"descent_columns/{'half' if half else 'whole'}"
        yield Variant(name, kernels.descent_columns_kernel, types, {**sizes, "HALF": half}, warps=1, matrix=False)


def compile_variant(variant: Variant, arch: int) -> dict[str, Any]:
    """Compile one variant and read off the artefacts.

    Returns:
        ``name``, ``kernel``, ``arch``, ``seconds``, ``shared`` bytes, ``registers``, ``spills`` bytes of stack, counts
        of ``mma`` and ``wgmma`` instructions in the PTX, and ``per_weight`` instructions in the main loop.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    signature, constants = {}, {}
    for name in variant.kernel.arg_names:
        if name in variant.constants:
            signature[name], constants[name] = "constexpr", variant.constants[name]
        else:
            signature[name] = variant.types[name]
    # what a launch finds out by itself: pointers and sizes are multiples of 16
    places = {name: i for i, name in enumerate(variant.kernel.arg_names)}
    sizes = ("columns", "rows", "words", "hidden", "channels", "inner", "row", "pitch")
    even = [n for n, t in variant.types.items() if n in places and (t.startswith("*") or n in sizes)]
    attributes = {(places[name],): [["tt.divisibility", 16]] for name in even}
    began = time.perf_counter()
    source = triton.compiler.ASTSource(variant.kernel, signature, constants, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": variant.fused}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "name": variant.name,
        "kernel": variant.kernel.__name__,
        "arch": arch,
        "seconds": round(time.perf_counter() - began, 2),
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"], variant),
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "int8": len(re.findall(r"mma\S*\.s8\.s8", ptx)),
        "matrix": variant.matrix,
    }


def _resources(cubin: bytes, variant: Variant) -> dict[str, Any]:
    """Registers per thread, bytes of stack (spills), and instructions per weight in the main loop."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as handle:
        handle.write(cubin)
        handle.flush()
        told = _told([str(tool), "-res-usage", handle.name])
        found: dict[str, Any] = {}
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()  # type: ignore[union-attr]
        found.update(registers=int(registers), spills=int(stack))
        if variant.weights:
            code = _told([str(tool), "-sass", handle.name])
            found["per_weight"] = round(longest_loop(code) * variant.warps * 32 / variant.weights, 2)
    return found


def _told(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_loop(code: str) -> int:
    """Instructions in the longest loop of a disassembly: from the target of a backward branch to the branch."""
    at = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", code)]
    longest = 0
    for address, text in at:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            longest = max(longest, sum(int(branch[1], 16) <= a <= address for a, _ in at))
    return longest


def main() -> int:
    """Compile in one process per core; exit code 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--share", default="0/1", help="which of how many processes this is")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    own, of = map(int, options.share.split("/"))
    work = [(v, arch) for arch in options.arch for v in variants(arch) if options.only in v.name]
    failed = 0
    for variant, arch in work[own::of]:
        try:
            print(json.dumps(compile_variant(variant, arch)), flush=True)  # noqa: T201
        except Exception as error:  # every failure is a line of the report
            failed += 1
            told = f"{type(error).__name__}: {error}"
            print(json.dumps({"name": variant.name, "arch": arch, "error": told[:2000]}), flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
