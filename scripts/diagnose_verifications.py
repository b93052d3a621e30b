#!/usr/bin/env python3
"""Where verifications of brief word problems go wrong: in a product, a sum, a written number, or the verdict.

    python scripts/diagnose_verifications.py benchmarks/s2r_gpu.json
    python scripts/diagnose_verifications.py runs/mine/stages/init/episodes_after.json

Reads responses that a run has left (``episodes_*.json``, or results of scripts/acceptance/s2r_6_gpu.py), and of every
verification in them names the first step that is false. A number without a sum before it (``8*10=80, 8*2=16, 96``) has
to be the sum of the products, or what the columns spell. Responses of a run are chosen by what came of them (right at
once, corrected, broken, failed), so the shares are those of the kept ones, not of all.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcompress.algorithms.self_verify import ActionKind, cut, verdict_of

EQUATION = re.compile(r"(\d+(?:[+*]\d+)+)=(\d+)")
GOAL = re.compile(r"(\d+)\s*; \w+ (\d+)\.")


def responses(found: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(where, response) of every kept response."""
    if isinstance(found, dict):
        for row in found.get("texts", []):
            yield name.strip("/"), row["response"]
        for key, value in found.items():
            yield from responses(value, f"{name}/{key}")


def value(left: str) -> int:
    """Of sums of products."""
    return sum(math.prod(map(int, term.split("*"))) for term in left.split("+"))


def first_false_step(steps: str) -> str | None:
    """Kind of the first step that is false, None where all are true."""
    for part in steps.split("; "):
        products, spelled = 0, ""
        # columns follow the sum they are of
        for item in part.split(": ")[-1].strip(" .").split(", "):
            equation = EQUATION.fullmatch(item)
            if equation:
                left, right = equation[1], int(equation[2])
                if value(left) != right:
                    return "product" if "+" not in left else "sum"
                if "+" not in left:
                    products += right
                    spelled = str(right)[-1] + spelled
                else:
                    # a carry is added to the product before it, or this is a column of a sum
                    spelled = str(right)[-1] + (spelled[1:] if "*" in part else spelled)
            elif re.fullmatch(r"\d+", item) and spelled and int(item) != products and not item.endswith(spelled):
                return "number"
    return None


def judge(steps: str, told: bool | None) -> str:
    """What is wrong with a verification, ``nothing`` included."""
    if told is None:
        return "no verdict"
    reached = GOAL.search(steps)
    if reached and (reached[1] == reached[2]) != told:
        return "verdict against its steps"
    return first_false_step(steps) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--show", action="store_true", help="print the verifications that are wrong")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    for where, text in responses(json.loads(args.file.read_text())):
        for action in cut([text], ended=True).actions:
            if action.kind is ActionKind.VERIFY:
                steps = action.text.split(" Therefore")[0]
                found = judge(steps, verdict_of(action.text))
                counts.setdefault(where, Counter())[found] += 1
                if args.show and found != "nothing":
                    print(f"{where}: {found}: {action.text.strip()}")
    for where, kinds in counts.items():
        told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        print(f"{where or args.file.name}: {sum(kinds.values())} verifications: {told}")


if __name__ == "__main__":
    main()
