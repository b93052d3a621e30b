"""GPU code without a GPU: every Triton kernel compiled for sm_80 and sm_90; what the interpreter hides is linted."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "kernels" / "llmcompress_kernels"
ARCHITECTURES = (80, 90)
# bytes of shared memory that one program may use
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Reports of all kernels, compiled cold by two processes."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "llmcompress_kernels.triton.aot", "--share"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    parts = [subprocess.Popen([*command, f"{part}/2"], **pipes) for part in range(2)]
    told = [part.communicate() for part in parts]
    reports = [json.loads(line) for out, _ in told for line in out.splitlines() if line.startswith("{")]
    assert reports, told
    return reports


@pytest.mark.slow
def test_every_kernel_compiles(compiled: list[dict]) -> None:
    assert [r for r in compiled if "error" in r] == []
    assert {r["arch"] for r in compiled} == set(ARCHITECTURES)
    jitted = set()
    for path in sorted((PACKAGE / "triton").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                jitted.add(node.name.removesuffix("_kernel"))
    assert jitted
    missing = {name for name in jitted if not any(r["kernel"] == f"{name}_kernel" for r in compiled)}
    assert missing == set(), "list them in triton/aot.py"


@pytest.mark.slow
def test_no_kernel_spills_or_asks_for_too_much_shared_memory(compiled: list[dict]) -> None:
    assert [r for r in compiled if r["spills"] > 0] == []
    assert [r for r in compiled if r["shared"] > SHARED_LIMIT[r["arch"]]] == []


@pytest.mark.slow
def test_kernels_use_the_matrix_instructions_they_are_meant_to(compiled: list[dict]) -> None:
    for report in (r for r in compiled if r["matrix"]):
        # tiles of 32 rows are below what the wide instruction takes
        narrow = report["name"] in ("delta_decode/w5", "prompt_read_kernel/fp32")
        kind = "wgmma" if report["arch"] >= 90 and not narrow else "mma"
        assert report[kind] > 0, report
        assert (report["int8"] > 0) == (report["kernel"] == "int8_gemm_kernel"), report
    assert [r for r in compiled if not r["matrix"] and r["mma"] + r["wgmma"] > 0] == []


@pytest.mark.slow
def test_widening_a_code_stays_cheap(compiled: list[dict]) -> None:
    """Instructions per weight in the loop for few tokens.

    At 3 TB/s an H100 can issue 5.3 instructions per 4-bit weight with a scale and a zero point per 128 (132
    multiprocessors, 128 lanes, 1.755 GHz); a loop that needs more cannot reach the bandwidth, however it is scheduled.
    """
    budget = {"group_gemm/w4/fp16/16": 4.2, "group_gemm/w4/bf16/16": 4.2, "group_gemm/w2/bf16/16": 4.2}
    for report in compiled:
        if report["arch"] == 90 and report["name"] in budget:
            assert 1 < report["per_weight"] < budget[report["name"]], report


def bfloat16_findings(source: str) -> list[int]:
    """Lines of jitted functions that load and use a value without widening it or naming its type.

    The interpreter keeps bfloat16 as raw integers, so ``tl.load(...) * 2`` is wrong there and right on a GPU. A load
    must be followed by ``.to(...)``, unless it is what a name is assigned to and that pointer holds integers or fp16,
    which ``other=0`` says for integers and a comment ``# fp16`` for the rest.
    """
    found, lines = [], source.splitlines()
    tree = ast.parse(source)
    widened = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to"
    }
    for function in ast.walk(tree):
        jitted = isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)
        if not jitted:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load" and id(node) not in widened:
                other = next((k.value for k in node.keywords if k.arg == "other"), None)
                integers = isinstance(other, ast.Constant | ast.Name) and not isinstance(
                    getattr(other, "value", 0), float
                )
                if (
                    not integers
                    and "# fp" not in lines[node.end_lineno - 1]
                    and "# int" not in lines[node.end_lineno - 1]
                ):
                    found.append(node.lineno)
    return found


def test_kernels_widen_bfloat16_right_after_the_load() -> None:
    for path in sorted((PACKAGE / "triton").glob("*.py")):
        assert bfloat16_findings(path.read_text()) == [], path.name


def test_the_bfloat16_check_finds_arithmetic_on_a_raw_load() -> None:
    head = "@triton.jit\ndef f(x):\n    "
    assert bfloat16_findings(head + "y = tl.load(x, mask=m, other=0.0) * 2") == [3]
    assert bfloat16_findings(head + "y = tl.load(x)") == [3]
    assert bfloat16_findings(head + "y = tl.load(x, mask=m, other=0.0).to(tl.float32) * 2") == []
    assert bfloat16_findings(head + "y = tl.load(x, mask=m, other=0) >> 2") == []
    assert bfloat16_findings(head + "y = tl.load(x)  # int32") == []
