#!/usr/bin/env python3
"""Foundation 6: malformed recipes and inputs each end with their exit code, one clear message and nothing half done.

python scripts/acceptance/foundation_6_malformed.py [--fresh] [--keep] [WORDS OF A CASE'S NAME ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

from harness import verdict
from malformed import data_cases, model_cases, recipe_cases, run_cases
from malformed.bench import make_base
from malformed.execute import check_case, preload

LEAST = 60
WORKERS = 2
CASES = [*recipe_cases.CASES, *model_cases.CASES, *data_cases.CASES, *run_cases.CASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose name holds one of these")
    parser.add_argument("--fresh", action="store_true", help="a fresh interpreter for every case")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that do not hold")
    options = parser.parse_args()
    wanted = [n for n, c in enumerate(CASES) if not options.words or any(w in c.name for w in options.words)]
    root = Path(tempfile.mkdtemp(prefix="llmcompress-malformed-"))
    base = make_base(root / "base")
    if any(CASES[number].torch for number in wanted) and not options.fresh:
        preload()
    # cheap cases first: a mistake in the frame shows at once
    wanted.sort(key=lambda number: CASES[number].torch)
    held, began = 0, time.time()
    jobs = [(number, root, base, options.fresh) for number in wanted]
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        for number, found in pool.imap_unordered(_one, jobs):
            held += not found
            for line in found:
                print(f"{CASES[number].name}: {line}", flush=True)
    if not options.keep or held == len(wanted):
        shutil.rmtree(root, ignore_errors=True)
    else:
        print(f"kept: {root}")
    print(f"{time.time() - began:.0f} s")
    verdict(held == len(wanted) and len(wanted) >= LEAST, f"{held} of {len(wanted)} malformed inputs end as they must")


def _one(job: tuple[int, Path, Path, bool]) -> tuple[int, list[str]]:
    number, root, base, fresh = job
    try:
        return number, check_case(CASES[number], number, root, base, fresh)
    except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        return number, [f"the case itself failed: {type(error).__name__}: {error}"]


if __name__ == "__main__":
    main()
