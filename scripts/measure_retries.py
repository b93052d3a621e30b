#!/usr/bin/env python3
"""What a self-correcting model does at its second, third … attempt: repeat a rejected answer, or find the right one.

    python scripts/measure_retries.py runs/s2r_tiny/stages/init/model
    python scripts/measure_retries.py runs/s2r_tiny/stages/init/model --split train --problems 700
    python scripts/measure_retries.py runs/s2r_tiny/stages/init/model --split validation --samples 8

Greedy responses to problems of the recipe's task; prints a table and, as the last line, the same as JSON. With
--samples also the mean accuracy of that many responses at temperature 0.7, the share of problems that any of them
solves (what reinforcement could reach by making it the first one), and the share on which they differ (what it can
learn from).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmcompress.algorithms.self_verify import ActionKind, repeats
from llmcompress.data.problems.base import Problem
from llmcompress.evaluation.sampling import Sampling, sample
from llmcompress.evaluation.self_correction import Reader, choose
from llmcompress.models.handle import ModelHandle
from llmcompress.recipe.load import load_recipe


def by_attempt(reader: Reader, problems: Sequence[Problem], responses: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Of each finished attempt: how many there are, the share that repeats an answer, the share that is right."""
    seen, again, right = Counter[int](), Counter[int](), Counter[int]()
    for problem, ids in zip(problems, responses):
        response = reader.read(ids)
        solved = reader.right(problem, response)
        repeated = [r for r, a in zip(repeats(response, reader.answers(response)), response.actions)
                    if a.kind is ActionKind.SOLVE]  # fmt: skip
        # the last action of a response that was cut off is unfinished
        cut_off = not response.ended and response.actions[-1].kind is ActionKind.SOLVE
        for place in range(len(solved) - cut_off):
            seen[place] += 1
            again[place] += repeated[place]
            right[place] += solved[place]
    return [
        {"attempt": n + 1, "count": seen[n], "repeated": again[n] / seen[n], "right": right[n] / seen[n]}
        for n in sorted(seen)
    ]  # fmt: skip


def sampled(
    model: Any, reader: Reader, problems: Sequence[Problem], longest: int, batch: int, count: int
) -> dict[str, float]:
    """Accuracy of ``count`` responses to each problem at temperature 0.7, whether any is right, whether they differ."""
    prompts = [reader.prompt(problem.question) for problem in problems for _ in range(count)]
    responses = sample(model, prompts, Sampling(longest, 0.7, 1.0, batch), reader.end, reader.pad, 1)
    finals = [reader.judge(problems[place // count], ids).final for place, ids in enumerate(responses)]
    right = [sum(finals[begin : begin + count]) for begin in range(0, len(finals), count)]
    return {
        "samples": count, "sampled accuracy": sum(right) / len(finals),
        "any right": sum(n > 0 for n in right) / len(right), "differ": sum(0 < n < count for n in right) / len(right),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="s2r_tiny", help="recipe whose stage says which task and how long")
    parser.add_argument("--stage", default="init")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--problems", type=int, help="how many, chosen by seed 0; all if left out")
    parser.add_argument("--samples", type=int, default=0, help="responses to each problem at temperature 0.7")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config: Any = load_recipe(options.recipe).recipe.stages[options.stage]
    handle = ModelHandle.open(options.model)
    reader = Reader(handle.tokenizer(), config.task.build(), config.chat, config.system)
    problems = choose(reader.problems.problems(options.split), options.problems, 0)
    prompts = [reader.prompt(problem.question) for problem in problems]
    sampling = Sampling(config.measure.max_new_tokens, batch=config.measure.batch)
    model = handle.dense_model(torch.float32).eval()
    responses = sample(model, prompts, sampling, reader.end, reader.pad, 0)
    rows = by_attempt(reader, problems, responses)
    print("attempt  count  repeated   right")
    for row in rows:
        print(f"{row['attempt']:7d} {row['count']:6d} {row['repeated']:9.1%} {row['right']:7.1%}")
    ended = sum(ids[-1] == reader.end for ids in responses) / len(responses)
    accuracy = sum(reader.judge(problem, ids).final for problem, ids in zip(problems, responses)) / len(responses)
    found = {
        "split": options.split, "problems": len(problems), "accuracy": accuracy, "ended": ended, "attempts": rows,
    }  # fmt: skip
    if options.samples > 0:
        found |= sampled(model, reader, problems, sampling.max_new_tokens, sampling.batch, options.samples)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
