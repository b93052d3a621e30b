"""nvcc as a toolchain of :mod:`llmcompress_kernels.build`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress_kernels import build

COMPILER_VARIABLE = "NVCC"
# where NVIDIA's packages put it when it is not on the path
USUAL = Path("/usr/local/cuda/bin/nvcc")
FLAGS = ("-std=c++17", "-O3")


def find() -> str:
    """Path of nvcc: ``$NVCC``, the path, or its usual place.

    Raises:
        BuildError: There is none.
    """
    asked = os.environ.get(COMPILER_VARIABLE)
    path = shutil.which(asked or "nvcc") or (str(USUAL) if not asked and USUAL.is_file() else None)
    if path is None:
        raise build.BuildError(
            f"{COMPILER_VARIABLE}={asked} is not an executable"
            if asked
            else f"no CUDA compiler (install nvcc, or set {COMPILER_VARIABLE})"
        )
    return path


@dataclass(frozen=True)
class Nvcc:
    """Compiles for the GPU of this process; the library serves that architecture only, which is part of its key."""

    def find(self) -> str:
        """See :class:`llmcompress_kernels.build.Toolchain`; without a GPU there is nothing to compile for."""
        if not torch.cuda.is_available():
            raise build.BuildError("no CUDA device to compile for")
        return find()

    def version(self) -> str:
        """See :class:`llmcompress_kernels.build.Toolchain`."""
        return build.compiler_version(self.find())

    def compile(self, source: Path, target: Path, family: build.Family) -> list[str]:
        """See :class:`llmcompress_kernels.build.Toolchain`."""
        compiler = self.find()  # says why not where there is no GPU to ask
        major, minor = torch.cuda.get_device_capability()
        flags = [*FLAGS, f"-arch=sm_{major}{minor}", "-Xcompiler=-fPIC,-fvisibility=hidden", *family.flags]
        return [compiler, *flags, "-c", str(source), "-o", str(target)]

    def link(self, objects: list[Path], target: Path, family: build.Family) -> list[str]:
        """See :class:`llmcompress_kernels.build.Toolchain`."""
        return [self.find(), "-shared", *map(str, objects), "-o", str(target), *family.libraries]


nvcc = Nvcc()
