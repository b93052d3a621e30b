"""What nvcc makes of a source for a GPU that is not here: registers, spills, and instructions by name.

    python -m llmcompress_kernels.cuda.machine_code [--arch 80 90]

prints one JSON object per instance of the state and tree kernels. Needs nvcc and cuobjdump, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcompress_kernels import build
from llmcompress_kernels.cuda import aot, toolchain

SOURCES = ("state/update.cu", "state/replay.cu", "tree/tree.cu")


@dataclass(frozen=True)
class Instance:
    """One kernel in one architecture's machine code.

    Attributes:
        arch: 80 or 90.
        numbers: Template arguments in order, types left out.
        registers: Per thread.
        stack: Bytes.
        spills: Bytes stored and loaded.
        code: Instructions in order, without addresses.
    """

    arch: int
    numbers: tuple[int, ...]
    registers: int
    stack: int
    spills: int
    code: tuple[str, ...]

    def counts(self) -> Counter[str]:
        """Instructions by name, modifiers left out."""
        return Counter(opcode(line) for line in self.code)

    def loops(self) -> list[Counter[str]]:
        """The same of every loop: from the target of a backward branch to the branch; an instruction has 16 bytes."""
        found = []
        for place, line in enumerate(self.code):
            branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
            if branch and int(branch[1], 16) < 16 * place:
                found.append(Counter(opcode(one) for one in self.code[int(branch[1], 16) // 16 : place + 1]))
        return found


def opcode(line: str) -> str:
    """Name of an instruction without predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def instances(source: str, arch: int, folder: Path, flags: Sequence[str] = ()) -> list[Instance]:
    """Compile ``csrc/cuda/<source>`` and look into it.

    Raises:
        BuildError: It does not compile.
    """
    cubin = folder / f"{source.replace('/', '-')}-{arch}.cubin"
    command = [toolchain.find(), *toolchain.FLAGS, *flags, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
    command += [str(build.SOURCES / "cuda" / source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise build.BuildError(done.stderr[-2000:])
    tool = aot._cuobjdump()
    assert tool is not None
    told = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", told)
    resources = aot._resources(done.stderr)
    found = []
    for name, listing in zip(parts[1::2], parts[2::2]):
        code = tuple(m[1].strip() for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+([^;/]*);", listing))
        numbers = tuple(map(int, re.findall(r"L[ib](\d+)E", name)))
        found.append(Instance(arch, numbers, **resources[name], code=code))
    return found


def main() -> int:
    """Compile and print; exit code 1 if that is not possible."""
    parser = argparse.ArgumentParser(description="Registers and instructions of the state and tree kernels.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    options = parser.parse_args()
    reason = aot.missing()
    if reason is not None:
        print(reason)  # noqa: T201
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            for arch in options.arch:
                for one in instances(source, arch, Path(folder)):
                    line = {"source": source, "arch": arch, "numbers": one.numbers, "registers": one.registers}
                    common = dict(one.counts().most_common(12))
                    print(json.dumps({**line, "spills": one.spills, "stack": one.stack, **common}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
