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
    flags = [flag for flag in build.Cpp.flags if flag != "-fPIC"]
    compile_one = [COMPILER, *flags, f"-I{build.SOURCES / 'cpu' / 'include'}", "-c"]
    objects = []
    for name in ("neon", "portable"):
        objects.append(tmp_path / f"{name}.o")
        # both export the same name
        source = [f"-Dllmcompress_products={name}_products", build.SOURCES / "cpu" / "products" / f"{name}.cpp"]
        subprocess.run([*map(str, [*compile_one, *source]), "-o", str(objects[-1])], check=True)
    program = tmp_path / "neon"
    main = [COMPILER, *flags, "-static", f"-I{build.SOURCES / 'cpu' / 'include'}", Path(__file__).with_name("neon.cpp")]
    subprocess.run([*map(str, [*main, *objects]), "-o", str(program)], check=True)
    emulator = [] if ARM else [str(EMULATOR), "-cpu", "max"]
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " cases, 0 off" in done.stdout
    assert int(done.stdout.split()[0]) > 1000
