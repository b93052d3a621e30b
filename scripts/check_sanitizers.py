#!/usr/bin/env python3
"""Build the C++ kernels with AddressSanitizer and UBSan and run products, direct calls, states, trees, the decode step.

    python scripts/check_sanitizers.py [--cases 300] [--seed 0] [--only gemm call state tree decode hybrid]

The products take random cases; calls, states, trees and the decode step take their own tests, where one that is
skipped is a failure, unless this CPU lacks what it needs.

The sanitizer's run time has to be first in the process, so the cases run in a child with LD_PRELOAD. Any report ends
it. Leaks are not looked for: the interpreter has some of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1"


TESTS = {
    # without C++ exceptions: Python does not link libstdc++, so a preloaded sanitizer cannot pass them on
    "call": [
        "tests/kernels/test_prepared.py",
        "tests/kernels/test_cpu_kernels.py",
        "-k",
        "prepared and not bad_input or many_tokens",
    ],
    "state": [f"tests/kernels/test_{name}.py" for name in ("state_ops", "replay_ops", "mamba1", "mamba2_model")],
    "tree": ["tests/kernels/test_cpu_tree.py"],
    # mixers, convolutions and delta rules in the decode step: floats and codes, prompts at once and in steps, threads
    "hybrid": [
        "tests/unit/inference/test_hybrid.py",
        "tests/unit/inference/test_delta.py",
        "tests/kernels/test_gated_delta.py",
        "-k",
        "float_states_agrees or at_once and (40 or 325) or same_codes and 4-True or embeddings or other_widths "
        "or leaves_the_bits or threads_do_not_matter or from_a_snapshot or layer_of_the_step",
    ],
    # a dense and a packed model of each kind, every instruction set, threads, chunks, rounded heads, prompts at once
    "decode": [
        "tests/unit/inference/test_engine.py",
        "tests/unit/inference/test_prompts.py",
        "tests/unit/inference/test_parts.py",
        "tests/unit/inference/test_latent.py",
        "tests/integration/test_family_native.py",
        "-k",
        "packed_models_agree and (3 or 8) or fill_a_vector or chunks or different_lengths or every_instruction_set "
        "or screened_head or rounded_head or bfloat16_model "
        "or dense_families_agree and (qwen2 or qwen3_moe or olmo or glm4 or gemma2) or window "
        "or numbers_of_steps and 8-75 or experts_skipped or parts_of_a_packed_prompt or anothers_tokens or sparsemixer "
        "or threads_do_not_matter or in_parts or widths_that_differ or at_once_are_those or every_form or groups",
    ],
}
FAMILIES = ("gemm", *TESTS)

# Which libraries a family has, of the instruction sets that this processor runs. It loads one, so it runs without
# sanitizers; and all are built before their run time is preloaded, under which compilers take long.
NAMES = """
import sys
import llmcompress_kernels
from llmcompress_kernels import build, cpu

for name, family in build.FAMILIES.items():
    if name.removesuffix(f"_{family.isa}") in sys.argv[1:] and (not family.isa or cpu.runs(family.isa)):
        print(name)
"""
BUILD = """
import sys
import llmcompress_kernels
from llmcompress_kernels import build

sys.exit("\\n".join(build.prepare(sys.argv[1:]).values()) or None)
"""
# The library of states is one for each instruction set; the tests load them all, one after another.
STATES = """
import os
from llmcompress_kernels import build, cpu, cpu_state

for isa in ("avx512", "avx2", "portable"):
    os.environ[cpu.ISA_VARIABLE] = isa
    if cpu_state.instructions() == isa:
        build.build(cpu_state.family(isa))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    options = parser.parse_args()
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    found = {}
    with tempfile.TemporaryDirectory(prefix="llmcompress-asan-") as cache:
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
        plain = {**os.environ, "PYTHONPATH": path}
        environment = {**plain, "LLMCOMPRESS_CACHE": cache, "LLMCOMPRESS_CXXFLAGS": FLAGS}
        # the decode step's tests compare with the products as well
        built = {"processor", "products", "gemm", *options.only} - {"hybrid"}
        built |= {"decode", "state"} if "hybrid" in options.only else set()
        command = [sys.executable, "-c", NAMES, *sorted(built)]
        names = subprocess.run(command, env=plain, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        subprocess.run([sys.executable, "-c", BUILD, *names], env=environment, check=True)
        if "state" in options.only:
            subprocess.run([sys.executable, "-c", STATES], env=environment, check=True)
        environment |= {
            "LD_PRELOAD": runtime.stdout.strip(),
            # torch's own allocations stay under the sanitizer's eye, so a read past a tensor's end is seen
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        for name in options.only:
            found[name] = run(name, options, environment)
    bad = {name: told for name, told in found.items() if told is not None}
    for name, told in bad.items():
        print(f"{name}: {told}")
    clean = ", ".join(name for name in found if name not in bad)
    print(f"no report from AddressSanitizer or UBSan: {clean}" if not bad else f"not clean: {', '.join(bad)}")
    return 1 if bad else 0


def run(name: str, options: argparse.Namespace, environment: dict[str, str]) -> str | None:
    """Run one family's cases; what is wrong, or None."""
    if name == "gemm":
        command = ["llmcompress_kernels", "check", "--cases", str(options.cases), "--seed", str(options.seed)]
    else:
        command = ["pytest", "-x", *TESTS[name]]
    return judge(name, ["-m", *command], environment)


def judge(name: str, command: list[str], environment: dict[str, str]) -> str | None:
    """Run Python on a family's cases and print its last line; what is wrong, or None.

    A skipped test is wrong, unless it is so for what this CPU lacks.
    """
    environment = {**environment, "PYTEST_ADDOPTS": "-rs -p no:cacheprovider"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "nothing was printed"
    print(f"{name}: {last}", flush=True)
    if done.returncode != 0:
        return f"exit code {done.returncode}\n{done.stdout[-3000:]}"
    skipped = [
        line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and "this CPU has no" not in line
    ]
    return "\n".join(["tests were skipped", *skipped]) if skipped else None


if __name__ == "__main__":
    raise SystemExit(main())
