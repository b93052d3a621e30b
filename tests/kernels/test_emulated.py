"""The C++ for AVX-512 on processors without it, by way of SIMDe; scripts/check_emulated.py runs more of it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from llmcompress_kernels import build, cpu

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_toolchain() -> ModuleType:
    """scripts/emulated/toolchain.py."""
    spec = importlib.util.spec_from_file_location("toolchain", SCRIPTS / "emulated" / "toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()
LACKS = toolchain.lacks()
needs_simde = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


def check_definitions(folder: Path, *flags: str) -> str:
    """Compile and run scripts/emulated/check.cpp; what it prints."""
    compiler = shutil.which("g++")  # clang ignores the pragma by which a part of the file is for another processor
    if compiler is None:
        pytest.skip("no g++")
    program = folder / "check"
    options = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-mf16c", "-flax-vector-conversions", "-w", *flags]
    source = SCRIPTS / "emulated" / "check.cpp"
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_simde
def test_own_definitions_are_those_of_simde(tmp_path: Path) -> None:
    assert check_definitions(tmp_path, "-DSIMDE") == "500000 compared, 0 off\n"


@pytest.mark.skipif(not (cpu.ready() and cpu.runs("avx512")), reason="this CPU has no AVX-512 to ask")
def test_own_definitions_are_what_the_processor_does(tmp_path: Path) -> None:
    assert check_definitions(tmp_path).endswith("compared, 0 off\n")


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert toolchain.lacks() == "CXX=no-such-compiler is not an executable"


@needs_simde
def test_assembler_that_is_not_known_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "new.cpp"
    source.write_text('#include <immintrin.h>\nvoid f(__m512i& a) { asm("vpxord %0, %0, %0" : "+v"(a)); }\n')
    command = [sys.executable, str(SCRIPTS / "emulated" / "rewrite.py"), build.cpp.find(), "-c", str(source)]
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
