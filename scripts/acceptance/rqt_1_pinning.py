#!/usr/bin/env python3
"""RQT 1: the tests that pin our variant down all exist and pass."""

from __future__ import annotations

import re
import subprocess
import sys

from harness import ROOT, verdict

# file → a part of the name of each test that must be there
NEEDED = {
    "tests/paper/test_rqt_tree.py": [
        "merge_cost_is_exact", "merge_cost_is_ward", "one_weighted_problem", "within_three_percent",
        "allocation_is_optimal", "optimal_for_five", "order_of_models",
    ],
    "tests/paper/test_rqt_build.py": [
        "single_model_is_plain_gptq", "identical_leaves", "rtvq", "bitdelta", "order_of_models", "leaves_improve",
    ],
    "tests/unit/quant/test_delta_tree.py": ["round_trip", "sum_of_nodes_is_exact"],
    "tests/kernels/test_delta_decode.py": ["every_width", "models_of_a_tree"],
    "tests/integration/test_family.py": [
        "file_bytes_are_the_accounting", "errors_are_those", "life_of_a_family", "mixed_batch_equals",
    ],
}  # fmt: skip


def main() -> None:
    command = [sys.executable, "-m", "pytest", *NEEDED, "-vv", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = re.findall(r"(tests/\S+\.py)::(\w+).* PASSED", done.stdout)
    absent = [
        f"{file}::{part}" for file, parts in NEEDED.items() for part in parts
        if not any(f == file and part in name for f, name in passed)
    ]  # fmt: skip
    if done.returncode:
        print(done.stdout[-6000:])
    verdict(
        done.returncode == 0 and not absent, f"{len(passed)} pinning tests pass, absent or failed: {absent or 'none'}"
    )


if __name__ == "__main__":
    main()
