"""``python -m llmcompress_kernels build | check``: compile ahead of time, compare with float64."""

from __future__ import annotations

import argparse
import sys

from llmcompress_kernels import build, check, cpu


def main() -> int:
    """Entry point; the exit code is 1 if a family does not build or a case is too far off."""
    parser = argparse.ArgumentParser(prog="python -m llmcompress_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("build", help="compile every family of native kernels that this machine uses")
    options.add_argument("--every-isa", action="store_true", help="and those of other processors of its kind")
    options = commands.add_parser("check", help="run random cases on every instruction set of this CPU")
    options.add_argument("--cases", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    return build_all(chosen.every_isa) if chosen.command == "build" else check_all(chosen.cases, chosen.seed)


def build_all(every_isa: bool) -> int:
    """Build the families that this machine uses and print where they are; on request those of all instruction sets."""
    names = sorted(name for name, family in build.FAMILIES.items() if every_isa or _needed(family))
    failed, code = build.prepare(names), 0
    for name in names:
        family = build.FAMILIES[name]
        if name in failed:
            print(f"{name}: {'not built: ' if family.optional else ''}{failed[name]}")  # noqa: T201
            code = code if family.optional else 1
        else:
            print(f"{name}: {build.finished(family)}")  # noqa: T201
    return code


def _needed(family: build.Family) -> bool:
    """Where nothing can be compiled every family may say why."""
    try:
        return cpu.needed(family)
    except build.BuildError:
        return True


def check_all(cases: int, seed: int) -> int:
    """Run random cases and print those that are too far off."""
    if not cpu.ready():
        print(f"no native kernels: {cpu.unavailable()}")  # noqa: T201
        return 1
    names, good, failures = check.run(cases, seed)
    for line in failures:
        sys.stderr.write(f"{line}\n")
    print(f"{good} of {cases} random cases within tolerance on {', '.join(names)}")  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
