"""All C++ for this kind of processor by clang: to objects, since a missing instruction set shows no earlier."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llmcompress_kernels import build, cpu, cpu_state, processors

STATES = {"x86_64": ("avx512", "avx2", "portable")}.get(cpu.architecture(), ("portable",))
LIBRARIES = {name: family for name, family in build.FAMILIES.items() if family.toolchain is build.cpp}
LIBRARIES |= {f"{cpu_state.FAMILY}_{isa}": cpu_state.family(isa) for isa in STATES}
del LIBRARIES[cpu_state.FAMILY]


@pytest.fixture(scope="module")
def clang() -> str:
    """Path of a clang that has OpenMP's header."""
    path = shutil.which("clang++")
    if path is None:
        pytest.skip("no clang++")
    asked = [path, "-fopenmp", "-x", "c++", "-E", "-include", "omp.h", "/dev/null"]
    if subprocess.run(asked, capture_output=True, check=False).returncode != 0:
        pytest.skip("clang++ without omp.h (apt-get install libomp-dev)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_clang_compiles(name: str, clang: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", clang)
    family = LIBRARIES[name]

    def complaint(source: Path) -> str:
        command = [*build.cpp.compile(source, tmp_path / f"{source.stem}.o", family), "-O0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else f"{source.name}: {done.returncode}\n{done.stderr}"

    with ThreadPoolExecutor(processors.count()) as pool:
        found = "".join(pool.map(complaint, family.files()))
    assert not found, found[:3000]
