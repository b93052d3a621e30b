"""``python -m llmcompress_kernels build | check``: compile ahead of time, compare with float64."""

from __future__ import annotations

import argparse
import sys

from llmcompress_kernels import build, check, cpu


def main() -> int:
    """Entry point; the exit code is 1 if a family does not build or a case is too far off."""
    parser = argparse.ArgumentParser(prog="python -m llmcompress_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="compile every family of native kernels")
    options = commands.add_parser("check", help="run random cases on every instruction set of this CPU")
    options.add_argument("--cases", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    return build_all() if chosen.command == "build" else check_all(chosen.cases, chosen.seed)


def build_all() -> int:
    """Build every family and print where it is."""
    code = 0
    for name, family in sorted(build.FAMILIES.items()):
        try:
            print(f"{name}: {build.build(family)}")  # noqa: T201
        except build.BuildError as error:
            print(f"{name}: {'not built: ' if family.optional else ''}{error}")  # noqa: T201
            code = code if family.optional else 1
    return code


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
