"""The C++ for AVX-512 on processors without it, by way of SIMDe; scripts/check_emulated.py runs more of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llmcompress_kernels import cpu

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COMPILER = shutil.which("g++")
SIMDE = COMPILER is not None and (
    subprocess.run(
        [COMPILER, "-x", "c++", "-E", "-include", "simde/x86/avx512.h", "/dev/null"], capture_output=True, check=False
    ).returncode
    == 0
)
RUNS_AVX2 = cpu.ready() and cpu.runs("avx2")
needs_simde = pytest.mark.skipif(
    not (SIMDE and RUNS_AVX2), reason="no g++, no AVX2, or no headers of SIMDe (apt-get install libsimde-dev)"
)


def check_definitions(folder: Path, *flags: str) -> str:
    """Compile and run scripts/emulated/check.cpp; what it prints."""
    program = folder / "check"
    options = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-mf16c", "-flax-vector-conversions", "-w", *flags]
    source = SCRIPTS / "emulated" / "check.cpp"
    subprocess.run([str(COMPILER), *options, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_simde
def test_own_definitions_are_those_of_simde(tmp_path: Path) -> None:
    assert check_definitions(tmp_path, "-DSIMDE") == "500000 compared, 0 off\n"


@pytest.mark.skipif(not (COMPILER and cpu.ready() and cpu.runs("avx512")), reason="this CPU has no AVX-512 to ask")
def test_own_definitions_are_what_the_processor_does(tmp_path: Path) -> None:
    assert check_definitions(tmp_path).endswith("compared, 0 off\n")


@needs_simde
def test_assembler_that_is_not_known_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "new.cpp"
    source.write_text('#include <immintrin.h>\nvoid f(__m512i& a) { asm("vpxord %0, %0, %0" : "+v"(a)); }\n')
    command = [sys.executable, str(SCRIPTS / "emulated" / "rewrite.py"), str(COMPILER), "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "new.cpp: assembler that rewrite.py does not know: void f(" in done.stderr


@pytest.mark.slow
@needs_simde
def test_products_states_and_trees_of_avx512() -> None:
    """Products to the bit what AVX2 makes of them, states and trees by tests of this folder."""
    command = [sys.executable, str(SCRIPTS / "check_emulated.py"), "--brief"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("emulated AVX-512: gemm, state, tree\n")
