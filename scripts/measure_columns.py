#!/usr/bin/env python3
"""How soon a small model works out verifications without a mistake: in columns, or with every sum in one step.

    python scripts/measure_columns.py --seconds 240

Two Llamas of half a million parameters, from scratch and with equal seeds, learn solutions of word problems and answers
put back into them (``read_back``), for equal CPU seconds; questions are short (``h503,146,3``), so that the time goes
into arithmetic. Printed is the share of held-out verifications without any mistake, and that of first attempts.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import time
from contextlib import ExitStack
from unittest import mock

import torch
from train_reasoner import batch, build_model, build_optimizers, build_tokenizer, learn
from training.allocator import keep_arenas

from llmcompress.data.problems import word_problems
from llmcompress.data.problems.base import BOX, boxed
from llmcompress.data.problems.word_problems import TEMPLATES, WordProblems
from llmcompress.evaluation.sampling import Sampling, sample

STORIES = {
    "change": "c{n},{price},{paid}", "share": "h{total},{rest},{friends}", "saving": "s{start},{weekly},{goal}",
    "sum": "t{total},{more}",
}  # fmt: skip
# whole words of the solutions are tokens
WORDS = (" paid", " had", " goal", " together")
ROWS, HELD_OUT = 64, 200


def sum_at_once(a: int, b: int) -> str:
    """``227+136=363``."""
    return f"{a}+{b}={a + b}"


def product_by_digits(a: int, b: int) -> str:
    """``7*40=280, 7*5=35, 315``: partial products, whose sums are at once."""
    if not 10 <= b < 10**8:
        return f"{a}*{b}={a * b}"
    told, total = [], 0
    for place, digit in enumerate(str(b)):
        part = int(digit) * 10 ** (len(str(b)) - 1 - place)
        if part:
            total += a * part
            told += [f"{a}*{part}={a * part}", *([str(total)] if told else [])]
    return ", ".join(told)


FORMS = {"columns": {}, "at once": {"column_sum": sum_at_once, "column_product": product_by_digits}}


def texts(task: WordProblems, problems, rng: random.Random, count: int):
    """(prompt, target) of solutions, then of as many answers put back."""
    for number in range(count):
        problem = rng.choice(problems)
        if number < count // 2:
            yield f"{problem.question}\n", task.solution(problem, rng)
        else:
            attempt, steps = task.read_back(problem, rng)
            yield f"{problem.question}\n{attempt}\n", steps


def held_out(model, tokenizer, task: WordProblems) -> tuple[float, float]:
    """Shares of right first attempts and of verifications without a mistake."""
    problems = task.problems("validation")[:HELD_OUT]
    rows = list(texts(task, problems, random.Random(1), 2 * HELD_OUT))
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt, _ in rows]
    found = sample(
        model.eval(), prompts, Sampling(128, batch=HELD_OUT), tokenizer.eos_token_id, tokenizer.pad_token_id, 0
    )
    told = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    first = sum(boxed(text) == boxed(row[1]) for text, row in zip(told[:HELD_OUT], rows))
    exact = sum(text == row[1] for text, row in zip(told[HELD_OUT:], rows[HELD_OUT:]))
    model.train()
    return first / HELD_OUT, exact / HELD_OUT


def train(form: str, seconds: float, sizes: tuple[int, ...], seed: int) -> None:
    """Train for this many CPU seconds and print what came of it."""
    task, tokenizer = WordProblems(60000, sizes=sizes, brief=True), build_tokenizer(WORDS, " ?[A-Za-z]+", (BOX,))
    problems = task.problems("pretrain")
    model = build_model(len(tokenizer), 96, 4, seed).train()
    optimizers = build_optimizers(model, 4e-3)
    step, tokens, begun = 0, 0, time.process_time()
    while (spent := (time.process_time() - begun) / seconds) < 1:
        rows = list(texts(task, problems, random.Random(f"{seed}:{step}"), ROWS))
        # solutions are half as long
        parts = [batch(tokenizer, rows[: ROWS // 2]), batch(tokenizer, rows[ROWS // 2 :])]
        learn(model, optimizers, parts, step, 1 - spent)
        tokens += sum(ids.numel() for ids, _ in parts)
        step += 1
    first, exact = held_out(model, tokenizer, task)
    print(
        f"{form:8} {step} steps, {tokens / 1e6:.1f} M tokens: first attempts {first:.1%}, verifications without a "
        f"mistake {exact:.1%}",
        flush=True,
    )


def main() -> None:
    keep_arenas()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU seconds of each model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    short = tuple(dataclasses.replace(t, story=re.sub(r"\s", "", STORIES[t.name])) for t in TEMPLATES)
    for form in args.forms:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(word_problems, TEMPLATES=short, **FORMS[form]))
            stack.enter_context(mock.patch.dict(word_problems._BY_NAME, {t.name: t for t in short}))
            train(form, args.seconds, tuple(args.sizes), args.seed)


if __name__ == "__main__":
    main()
