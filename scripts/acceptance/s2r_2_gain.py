#!/usr/bin/env python3
"""S2R 2: what each step gains on held-out problems, with controls; three seeds.

SFT over base and over SFT on solutions only; ORL and PRL over SFT by a paired test; first attempts shown apart, so that
ICR − CIR shows real self-correction; PRL raises verification accuracy most.

The twelve runs can be made in pieces: see s2r_runs.py. The recipes were chosen on validation problems with other seeds
(0 and 1) than these, of which no model had been measured before. The split goes by the hash of a problem, so that all
seeds have the same 677 test problems.
"""

from __future__ import annotations

import json
import statistics
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import verdict
from s2r_runs import KEPT, ensure, figures_of, reinforced, runs_folder, taught

from llmcompress.evaluation.self_correction import paired_test

SEEDS = (6, 7, 8)


def read(run: Path, stage: str, name: str) -> dict[str, Any]:
    """Figures and verdicts that a stage kept under a name."""
    episodes = json.loads((run / "stages" / stage / f"episodes_{name}.json").read_text())
    return {**figures_of(run, stage, name), **episodes}


def tell(seed: int, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Show a model's figures at once, on stderr, so that a run that is cut off has shown what it found."""
    shown = {key: round(figures[key], 4) for key in SHOWN if figures.get(key) is not None}
    # one piece: two threads tell
    print(f"seed {seed} {name}: {json.dumps(shown)}", file=sys.stderr, flush=True)
    return figures


def start(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Base and SFT."""
    run = taught(folder, seed)
    return {
        "base": tell(seed, "base", read(run, "init", "before")),
        "sft": tell(seed, "sft", read(run, "init", "after")),
    }


def reinforce(seed: int, folder: Path, name: str, before: Future[Any]) -> dict[str, dict[str, Any]]:
    """ORL or PRL from the SFT model of :func:`start`."""
    before.result()
    run = reinforced(folder, seed, {"orl": "s2r_tiny", "prl": "s2r_tiny_prl"}[name], name)
    return {name: tell(seed, name, read(run, "reinforce", "after"))}


def control(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """SFT on right solutions alone."""
    run = ensure(folder / f"solutions_{seed}", "s2r_tiny_solutions", f"run.seed={seed}")
    return {"solutions": tell(seed, "solutions", read(run, "init", "after"))}


def all_seeds(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Every run of every seed, two at a time with one thread each."""
    with ThreadPoolExecutor(2) as pool:
        # a run that waits for its SFT model blocks none: that one was given to the pool before it
        sft = [pool.submit(start, seed, folder) for seed in SEEDS]
        rest = [
            [pool.submit(reinforce, seed, folder, name, sft[n]) for name in ("orl", "prl")]
            for n, seed in enumerate(SEEDS)
        ]
        controls = [pool.submit(control, seed, folder) for seed in SEEDS]
        parts = [[sft[n], *rest[n], controls[n]] for n in range(len(SEEDS))]
        return [{k: v for part in row for k, v in part.result().items()} for row in parts]


SHOWN = (
    "accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_recall", "correct_precision",
    "incorrect_to_correct", "correct_to_incorrect", "trials", "tokens", "ended", "n_first_wrong", "n_first_right",
)  # fmt: skip


def spread(runs: list[dict[str, dict[str, Any]]], name: str, key: str = "accuracy") -> str:
    """Mean and half range over the seeds, in percent."""
    values = [100 * (run[name][key] or 0.0) for run in runs]
    return f"{statistics.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def better(runs: list[dict[str, dict[str, Any]]], above: str, below: str) -> tuple[bool, float]:
    """Whether every seed gains, and the exact paired test over the answers of all seeds, by problem."""
    every = all(run[above]["accuracy"] > run[below]["accuracy"] for run in runs)
    before = [x for run in runs for x in run[below]["final"]]
    after = [x for run in runs for x in run[above]["final"]]
    keys = [key for run in runs for key in run[below]["keys"]]
    assert keys == [key for run in runs for key in run[above]["keys"]], "other problems"
    return every, paired_test(before, after, keys)


def net(run: dict[str, Any]) -> float:
    """Problems won by correction minus those lost, as a share of all."""
    won = (run["incorrect_to_correct"] or 0) * run["n_first_wrong"]
    lost = (run["correct_to_incorrect"] or 0) * run["n_first_right"]
    return (won - lost) / run["n_problems"]


def main() -> None:
    with runs_folder() as folder:
        runs = all_seeds(folder)
    claims, tests = {}, []
    for above, below in (("sft", "base"), ("sft", "solutions"), ("orl", "sft"), ("prl", "sft")):
        every, p = better(runs, above, below)
        tests.append(f"{above} over {below} {p:.2g}")
        claims[f"{above} over {below}"] = every and p < 0.05
    gains = [[net(run[name]) for run in runs] for name in ("sft", "orl", "prl")]
    claims["correction gains more than it breaks"] = min(min(row) for row in gains) > 0
    claims["ORL or PRL corrects more than SFT"] = max(map(statistics.mean, gains[1:])) > statistics.mean(gains[0])
    by_name = {n: statistics.mean(run[n]["verification_accuracy"] or 0 for run in runs) for n in ("sft", "orl", "prl")}
    # less than a tenth of a point apart is a tie
    claims["PRL has the highest VA"] = by_name["prl"] > max(by_name["sft"], by_name["orl"]) + 0.001
    broken = [name for name, holds in claims.items() if not holds]
    names = ("base", "solutions", "sft", "orl", "prl")
    table = ", ".join(f"{name} {spread(runs, name)} (first {spread(runs, name, 'first_accuracy')})" for name in names)
    figures = ", ".join(f"{n} {100 * v:.1f}" for n, v in by_name.items())
    verdict(
        not broken,
        f"accuracy in %: {table}; VA {figures}; net correction in points "
        f"{', '.join(f'{100 * statistics.mean(row):.1f}' for row in gains)}; p by problem {', '.join(tests)}; "
        f"{len(SEEDS)} seeds; "
        f"does not hold: {'; '.join(broken) or 'nothing'}{KEPT}",
    )


if __name__ == "__main__":
    main()
