"""A compiler for files with AVX-512 on processors without it: preprocess, take AVX-512's words out, compile.

    python rewrite.py g++ FLAG... -c FILE.cpp -o FILE.o        # called by toolchain.py

What is left of AVX-512 after the preprocessor, to whom ``avx512.h`` has named other functions, are flags, targets,
questions to the processor and assembler; assembler that is not known here is an error. Functions need not be inlined
nor loops unrolled: that is most of what these files cost a compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = Path(__file__).resolve().with_name("avx512.h")
# what the emulation itself is compiled with
FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-flax-vector-conversions", "-Wno-psabi", f"-include{HEADER}", "-O1")
RULES = (
    (r"^#pragma GCC target\(\"[^\"]*avx512[^\"]*\"\)$", ""),
    (r"^#pragma GCC unroll \d+$", ""),
    (r"__attribute__\(\(always_inline\)\)", ""),
    (r"__builtin_cpu_supports\(\"avx512\w*\"\)", "true"),
    # a quad of bytes from memory, which goes to every lane
    (
        r'asm\("vpdpbusd %2%\{1to16%\}, %1, %0" : "\+v"\((\w+)\) : "v"\((\w+)\), "m"\((.*)\)\);',
        r"{ int32_t quad_; std::memcpy(&quad_, &(\3), 4);"
        r" \1 = emulated::mm512_dpbusd_epi32(\1, \2, simde_mm512_set1_epi32(quad_)); }",
    ),
    (
        r'asm\("vpdpbusd %2, %1, %0" : "\+v"\((.*?)\) : "v"\((.*?)\), "v"\((.*)\) *\);',
        r"\1 = emulated::mm512_dpbusd_epi32(\1, \2, \3);",
    ),
    (
        r'asm volatile\("vmovdqa64 %1, %0" : "=v"\((\w+)\) : "m"\((.*)\)\);',
        r"\1 = emulated::mm512_load_si512(&(\2));",
    ),
)
# registers that only AVX-512 has
WIDE_ASSEMBLER = re.compile(r'\basm\b.*"[+=]?v"')


def main() -> int:
    """Compile as the command says; the exit code of what failed, or 0."""
    command = sys.argv[1:]
    source, target = command[command.index("-c") + 1], command[command.index("-o") + 1]
    kept = [word for word in command if not word.startswith("-mavx512")]
    flags = [word for word in kept if word not in ("-c", source, "-o", target)] + list(FLAGS)
    done = subprocess.run([*flags, "-E", source], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return done.returncode
    with tempfile.TemporaryDirectory(prefix="llmcompress-emulated-") as folder:
        rewritten = Path(folder) / "rewritten.ii"
        rewritten.write_text("".join(rewrite(done.stdout.splitlines(keepends=True), source)))
        compile_it = [flag for flag in flags if not flag.startswith("-include")]
        command = [*compile_it, "-x", "c++-cpp-output", "-c", str(rewritten), "-o", target]
        return subprocess.run(command, check=False).returncode


def rewrite(lines: list[str], source: str) -> list[str]:
    """A preprocessed file without AVX-512 in the project's own lines.

    Raises:
        SystemExit: An asm statement with its registers is not among the rules.
    """
    ours, written, begun = True, [], ""
    for line in lines:
        marker = re.match(r'# \d+ "([^"]*)"((?: \d)*)', line)
        if marker and not begun:
            # 3: a header of the system
            ours = "3" not in marker[2].split() and not marker[1].startswith(str(HEADER.parent))
        elif ours:
            # the preprocessor puts a macro that a statement uses, and what follows, on lines of their own
            text = begun + ("" if marker else line)
            begun = text.rstrip("\n") if re.search(r"\basm\b[^;]*$", text) else ""
            if not begun:
                written.append(without_avx512(text, source))
            continue
        written.append(line)
    return written


def without_avx512(text: str, source: str) -> str:
    """A line by the rules.

    Raises:
        SystemExit: It has assembler that they leave.
    """
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    if WIDE_ASSEMBLER.search(text):
        raise SystemExit(f"error: {source}: assembler that {Path(__file__).name} does not know: {text.strip()}")
    return text


if __name__ == "__main__":
    sys.exit(main())
