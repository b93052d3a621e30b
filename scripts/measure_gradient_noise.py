#!/usr/bin/env python3
"""How much of a reinforcement gradient is signal: the same for one advantage a response and one for each action.

    python scripts/measure_gradient_noise.py runs/s2r_tiny/stages/init/model
    python scripts/measure_gradient_noise.py runs/s2r_tiny/stages/init/model --batches 16 --seed 1

Samples independent batches from the model, each of other training problems and as large as a step of the recipe, and
computes the gradient of each batch three ways: outcome level with ``credit: response`` (RLOO), with ``credit:
action``, and process level. Of gradients g₁ … g_n the signal ‖E g‖² is the mean inner product of two batches and the
noise the mean ‖g‖² less the signal; as many times the responses of a batch as noise is of signal make the two equal.
The signal is itself estimated: its standard error (leaving out one batch after the other) is printed with it. Prints a
table and, as the last line, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.rl_objectives import GroupBaseline
from llmcompress.evaluation.self_correction import Reader, choose
from llmcompress.models.handle import ModelHandle
from llmcompress.recipe.load import load_recipe
from llmcompress.stages.s2r.rl import S2RRl
from llmcompress.training import rl
from llmcompress.training.policy import Policy


class Kept:
    """In the place of an optimiser: keeps the gradient and moves nothing."""

    def __init__(self, policy: Policy) -> None:
        self.values = list(policy.trainable.values())
        self.gradient = torch.empty(0)

    def update(self) -> float:
        """Take the gradients at hand."""
        self.gradient = torch.cat([value.grad.flatten() for value in self.values if value.grad is not None])
        for value in self.values:
            value.grad = None
        return float(self.gradient.norm())


def kinds(settings: rl.RlSettings) -> dict[str, tuple[rl.RlSettings, Callable[[list[rl.Rollout]], None]]]:
    """Settings and how advantages are given, by name; no KL and no penalty, so that the outcome alone counts."""
    plain = replace(settings, kl=0.0, repeat_penalty=0.0, anchor=0.0)
    process = replace(plain, level="process", credit="response")
    return {
        "credit: response": (
            replace(plain, level="outcome", credit="response"),
            lambda rows: rl.outcome_advantages(rows, settings.samples, skip_agreeing=False),
        ),
        "credit: action": (
            replace(plain, level="outcome", credit="action"),
            lambda rows: rl.action_advantages(rows, settings.samples, skip_agreeing=False),
        ),
        "level: process": (
            process, lambda rows: rl.process_advantages(rows, GroupBaseline(), rl.context_keys, process),
        ),
    }  # fmt: skip


def signal(gradients: Sequence[Tensor]) -> float:
    """Mean inner product of two different batches' gradients: ``‖E g‖²`` without bias."""
    count, total = len(gradients), torch.stack(list(gradients)).double().sum(0)
    own = sum(float(gradient.double().square().sum()) for gradient in gradients)
    return (float(total.square().sum()) - own) / (count * (count - 1))


def summary(gradients: Sequence[Tensor], responses: int) -> dict[str, float]:
    """Signal, its standard error, noise, and the responses that make them equal."""
    found = signal(gradients)
    without = [signal([*gradients[:n], *gradients[n + 1 :]]) for n in range(len(gradients))]
    mean, count = sum(without) / len(without), len(without)
    error = ((count - 1) / count * sum((value - mean) ** 2 for value in without)) ** 0.5
    noise = sum(float(gradient.square().sum()) for gradient in gradients) / count - found
    return {"signal": found, "error": error, "noise": noise, "responses": responses * noise / max(found, 1e-12)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="s2r_tiny", help="recipe whose stage `reinforce` says how")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config: Any = load_recipe(options.recipe).recipe.stages["reinforce"]
    context: Any = SimpleNamespace(seed=options.seed)
    settings = S2RRl("reinforce", config)._settings(context)
    handle = ModelHandle.open(options.model)
    reader = Reader(handle.tokenizer(), config.task.build(), config.chat, config.system)
    policy = Policy(handle.dense_model(torch.float32))
    problems = choose(reader.problems.problems("train"), None, options.seed)
    kept: Any = Kept(policy)
    found: dict[str, list[Tensor]] = {}
    for batch in range(options.batches):
        places = rl.prompts_of_step(len(problems), settings.prompts, batch, options.seed)
        rollouts = rl.collect(policy, reader, problems, places, settings, options.seed * 65_537 + batch)
        scored = rl.score(policy, reader, rollouts, settings, same=True)
        for name, (own, give) in kinds(settings).items():
            give(rollouts)
            for rollout in rollouts:
                rollout.weight = 1.0
            # by length, so that every token of every response counts the same
            rl.weigh_by_length(rollouts, own.units)
            rl.update(policy, reader, scored, range(len(rollouts)), own, kept)
            found.setdefault(name, []).append(kept.gradient)
    responses = settings.prompts * settings.samples
    rows = {name: summary(gradients, responses) for name, gradients in found.items()}
    print(f"{'':18}{'signal':>10}{'± error':>10}{'noise':>10}{'responses for as much signal as noise':>40}")
    for name, row in rows.items():
        print(f"{name:18}{row['signal']:10.2e}{row['error']:10.1e}{row['noise']:10.2e}{row['responses']:40,.0f}")
    print(json.dumps({"batches": options.batches, "responses": responses, "torch": torch.__version__, **rows}))


if __name__ == "__main__":
    main()
