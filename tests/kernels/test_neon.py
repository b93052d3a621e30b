"""The NEON variant of low-bit products gives the portable one's numbers; elsewhere than on Arm under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from llmcompress_kernels import build

ARM = platform.machine() == "aarch64"
COMPILER = shutil.which("g++" if ARM else "aarch64-linux-gnu-g++")
EMULATOR = None if ARM else shutil.which("qemu-aarch64")


@pytest.mark.skipif(
    COMPILER is None or not (ARM or EMULATOR), reason="no Arm compiler (g++-aarch64-linux-gnu, qemu-user)"
)
def test_neon_gives_the_portable_numbers(tmp_path: Path) -> None:
    program, csrc = tmp_path / "neon", build.SOURCES / "cpu"
    sources = [csrc / "gemm" / f"{name}.cpp" for name in ("variants", "portable", "neon")]
    flags = [flag for flag in build.Cpp.flags if flag != "-fPIC"]
    command = [COMPILER, *flags, "-static", f"-I{csrc / 'include'}", Path(__file__).with_name("neon.cpp"), *sources]
    subprocess.run([*map(str, command), "-o", str(program)], check=True)
    emulator = [] if ARM else [str(EMULATOR), "-cpu", "max"]
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " cases, 0 off" in done.stdout
    assert int(done.stdout.split()[0]) > 1000
