"""Responses that teach nothing are left out of the arithmetic, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.data.problems.countdown import Countdown
from llmcompress.evaluation.self_correction import Reader
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.s2r_rl import S2RRl, S2RRlConfig
from llmcompress.training import rl
from llmcompress.training.optimizer import Trainer
from llmcompress.training.policy import Policy

TASK = {"kind": "countdown", "high": 15, "limit": 60, "compact": True}
IDS = [[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13], [14, 2], [6, 6, 2], [7, 8, 9, 2], [3, 2], [4, 5, 6, 7]]
# the first four agree
OUTCOMES = [1, 1, 1, 1, -1, -1, -1, 1]


@pytest.fixture
def scene(tiny, tmp_path):
    handle = ModelHandle.open("asset:reference_reasoner")
    stage = S2RRl("r", S2RRlConfig(type="s2r_rl", task=TASK, level="outcome", samples=4, micro_batch=3))
    settings = stage._settings(tiny.context(tmp_path, "r"))
    reader = Reader(handle.tokenizer(), Countdown(high=15, limit=60, compact=True))
    problems = reader.problems.problems("train")[:2]
    policy = Policy(handle.dense_model(torch.float32), compute=torch.float32)
    with torch.no_grad():
        # away from the reference, so that there is a KL
        next(iter(policy.trainable.values())).mul_(1.1)
    rollouts = []
    for place, (ids, outcome) in enumerate(zip(IDS, OUTCOMES)):
        problem = problems[place // 4]
        rollout = rl.judged(reader, problem, place // 4, reader.prompt(problem.question), ids, -1)
        rollout.outcome = outcome
        rollouts.append(rollout)
    return policy, reader, rollouts, settings


def gradients(policy, reader, rollouts, settings, picked):
    """Of one update, and what the curve says of it."""
    scored = rl.score(policy, reader, rollouts, settings, same=False)
    found = {}

    class Kept(Trainer):
        def update(self):
            for name, parameter in self.parameters.items():
                found[name] = parameter.grad.clone()
                parameter.grad = None
            return 0.0

    figures = rl.update(policy, reader, scored, picked, settings, Kept(policy.trainable, 1e-3, 1, 10))
    return found, figures, scored


def test_responses_of_weight_zero_are_neither_scored_nor_trained_and_the_gradient_stays(scene, monkeypatch):
    policy, reader, rollouts, settings = scene
    rl.outcome_advantages(rollouts, 4, skip_agreeing=True)
    assert [rollout.weight for rollout in rollouts] == [0.0] * 4 + [1.0] * 4
    picked = [6, 0, 3, 5, 4, 7]
    few, figures, scored = gradients(policy, reader, rollouts, settings, picked)
    assert [bool(row.abs().sum()) for row in scored.old] == [False] * 4 + [True] * 4
    assert rl.taught(rollouts, settings) == [4, 5, 6, 7]
    # an anchor is a gradient for all of them
    assert rl.taught(rollouts, replace(settings, anchor=0.1)) == list(range(8))
    monkeypatch.setattr(rl, "taught", lambda rows, _: list(range(len(rows))))
    every, expected, _ = gradients(policy, reader, rollouts, settings, picked)
    assert sum(float(gradient.abs().sum()) for gradient in every.values()) > 0
    for name, gradient in every.items():
        torch.testing.assert_close(few[name], gradient, rtol=1e-4, atol=1e-7)
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_an_update_on_agreeing_responses_alone_has_a_gradient_of_zero(scene):
    policy, reader, rollouts, settings = scene
    rl.outcome_advantages(rollouts, 4, skip_agreeing=True)
    found, figures, scored = gradients(policy, reader, rollouts, settings, [0, 1, 2, 3])
    assert figures["loss"] == 0
    assert all(float(gradient.abs().sum()) == 0 for gradient in found.values())
    assert rl.curve_record(1, scored, [figures], settings)["agreeing"] == 0.5
