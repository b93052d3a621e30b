"""Lets this process take its processor for one with AVX-512, whose code is compiled for AVX2 by way of SIMDe.

As a plugin of pytest (``-p emulated.toolchain``) or by :func:`install`. Tests and operators then find an instruction
set ``avx512`` like any other, and slow: :mod:`rewrite` says how its libraries are compiled.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from llmcompress_kernels import build, columns, cpu, cpu_state

HERE = Path(__file__).resolve().parent


class Emulating(build.Cpp):
    """g++ behind ``rewrite.py``."""

    def version(self) -> str:
        """Of the compiler, with a hash of what the emulation is made of: libraries are kept as others are."""
        digest = hashlib.sha256()
        for name in ("rewrite.py", "avx512.h", "definitions.h"):
            digest.update((HERE / name).read_bytes())
        return f"{super().version()} emulating {digest.hexdigest()[:12]}"

    def compile(self, source: Path, target: Path, family: build.Family) -> list[str]:
        """See :class:`build.Toolchain`."""
        return [sys.executable, str(HERE / "rewrite.py"), *super().compile(source, target, family)]


def lacks() -> str | None:
    """Why nothing can be emulated here, or None."""
    try:
        compiler = build.cpp.find()
        if not cpu.runs("avx2"):
            return "this CPU has no AVX2"
    except build.BuildError as error:
        return str(error)
    asked = subprocess.run(
        [compiler, "-x", "c++", "-E", "-include", "simde/x86/avx512.h", "/dev/null"], capture_output=True, check=False
    )
    return "no headers of SIMDe (apt-get install libsimde-dev)" if asked.returncode != 0 else None


def install() -> None:
    """Give every family with AVX-512 the emulating compiler, and say that this processor runs it.

    Raises:
        SystemExit: See :func:`lacks`.
    """
    reason = lacks()
    if reason:
        raise SystemExit(f"AVX-512 cannot be emulated: {reason}")
    emulating, runs, state_family = Emulating(), cpu.runs, cpu_state.family

    def emulated(family: build.Family) -> build.Family:
        return replace(family, toolchain=emulating)

    for name, family in build.FAMILIES.items():
        if family.isa == "avx512" or name == columns.FAMILY:
            build.FAMILIES[name] = emulated(family)
    cpu.runs = lambda isa: isa == "avx512" or runs(isa)
    cpu_state.family = lambda isa: emulated(state_family(isa)) if isa == "avx512" else state_family(isa)
    # what cpu_state asks; torch's own code goes on as it was
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
    build.register(cpu_state.family(cpu_state.instructions()))


def pytest_configure() -> None:
    """Before tests are collected, which ask what this processor runs."""
    # without this a processor that has AVX-512 would be asked for its fastest, and others as well
    os.environ.setdefault(cpu.ISA_VARIABLE, "avx512")
    install()
