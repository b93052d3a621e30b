"""Responses that teach nothing are left out of the arithmetic, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.algorithms.rl_objectives import GroupBaseline, accuracy_bin
from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY
from llmcompress.data.problems.countdown import Countdown
from llmcompress.evaluation.self_correction import Reader
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.s2r.rl import S2RRl, S2RRlConfig
from llmcompress.training import offline, rl
from llmcompress.training.optimizer import Schedule, Trainer
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

    figures = rl.update(policy, reader, scored, picked, settings, Kept(policy.trainable, Schedule(1e-3, 1, 10)))
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
        torch.testing.assert_close(few[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_an_update_on_agreeing_responses_alone_has_a_gradient_of_zero(scene):
    policy, reader, rollouts, settings = scene
    rl.outcome_advantages(rollouts, 4, skip_agreeing=True)
    found, figures, scored = gradients(policy, reader, rollouts, settings, [0, 1, 2, 3])
    assert figures["loss"] == 0
    assert all(float(gradient.abs().sum()) == 0 for gradient in found.values())
    assert rl.curve_record(1, scored, [figures], settings)["agreeing"] == 0.5


def worth(problem, rewards, outcome, repeated=None):
    """A response known by its rewards alone."""
    return rl.Rollout(problem, [], [], None, None, rewards, outcome, [], repeated or [False] * len(rewards))


def test_actions_get_the_outcome_less_what_was_to_be_expected_before_them():
    rollouts = [
        worth(0, [1, 1], 1),
        worth(0, [-1, 1, 1, 1], 1),
        worth(1, [-1, -1], -1),
        worth(1, [-1, 1, -1, -1], -1, [False, False, True, False]),
    ]
    rl.action_advantages(rollouts, 2, skip_agreeing=False, repeat_penalty=0.25)
    # four responses, two right: 0 at the start, which a context of few leans on by four
    right, wrong = 1 / 5, (1 - 1 - 1) / 7
    told = (1 - 1 + 4 * wrong) / 6
    after_right, after_wrong = (1 + 4 * told) / 5, (-1 + 4 * told) / 5
    # both samples of each problem agree, so that RLOO, which the first attempt has, gives 0
    assert rollouts[0].advantages == pytest.approx([0, 1 - right])
    assert rollouts[1].advantages == pytest.approx([0, 1 - wrong, 1 - told, 1 - after_right])
    assert rollouts[2].advantages == pytest.approx([0, -1 - wrong])
    assert rollouts[3].advantages == pytest.approx([0, -1 - wrong, -1 - told - 0.25, -1 - after_wrong])
    assert [rollout.weight for rollout in rollouts] == [1.0] * 4
    rl.action_advantages(rollouts, 2, skip_agreeing=True)
    assert [rollout.weight for rollout in rollouts] == [0.0] * 4
    mixed = [worth(0, [1, 1], 1), worth(0, [-1, -1], -1)]
    rl.action_advantages(mixed, 2, skip_agreeing=True)
    assert [rollout.advantages[0] for rollout in mixed] == [2, -2]
    assert [rollout.weight for rollout in mixed] == [1.0, 1.0]


PLAIN = {
    "discount": 0.0, "truncation_reward": -1, "flip_bonus": 1.0, "verify_correct_bonus": 1.0, "repeat_penalty": 0.0,
    "weigh_by_length": False, "level": "process",
}  # fmt: skip


def test_process_advantages_by_hand():
    """Groups by reward context over all problems; what was cut off is punished and belongs to no group."""

    def responses():
        found = [
            worth(0, [1, 1], 1), worth(0, [-1, 1, 1, 1], 1), worth(1, [-1, -1], -1),
            worth(2, [-1, 1, -1, -1], -1, [False, False, True, False]),
        ]  # fmt: skip
        for place, rollout in enumerate(found):
            rollout.response = SimpleNamespace(ended=place != 2)
        return found

    def advantages(**changes):
        rollouts, settings = responses(), SimpleNamespace(**{**PLAIN, "discount": 0.5, **changes})
        rl.process_advantages(rollouts, GroupBaseline(min_group=1), rl.context_keys, settings)
        return [rollout.advantages for rollout in rollouts]

    # returns 1.5 1 | -0.125 1.75 1.5 1 | -1.5 (-1) | -0.875 0.25 -1.5 -1
    # means of (): -0.25, of (-1,): 1, of (-1, 1): 0
    plain = [[1.75, 0], [0.125, 0.75, 1.5, 0], [-1.25, -1], [-0.625, -0.75, -1.5, 0]]
    assert advantages() == plain
    bonus = advantages(flip_bonus=2.0, verify_correct_bonus=3.0, repeat_penalty=0.25)
    assert bonus == [plain[0], [0.125, 0.75, 3.0, 0], plain[2], [-0.625, -0.75, -1.75, 0]]
    # a cut off action that is no penalty is a member like others: the mean of (-1,) is then 1/3
    counted = advantages(truncation_reward=None)
    assert counted[2] == pytest.approx([-1.25, -4 / 3])
    assert counted[1] == pytest.approx([0.125, 1.75 - 1 / 3, 1.5, 0])
    myopic = advantages(discount=0.0, truncation_reward=None)
    assert myopic[0] == pytest.approx([1.5, 0])
    assert myopic[2] == pytest.approx([-0.5, -4 / 3])


@pytest.mark.parametrize(
    ("level", "grouping", "expected"),
    [
        ("process", "position", [[4 / 3, 2 / 3], [-2 / 3, 2 / 3], [-2 / 3, -4 / 3], [0, 0]]),
        ("process", "context", [[4 / 3, 0], [-2 / 3, 1], [-2 / 3, -1], [0, 0]]),
        ("outcome", "position", [[2 / 3], [2 / 3], [-4 / 3], [0]]),
    ],
)
def test_offline_baselines_are_those_of_problems_as_hard(level, grouping, expected):
    rollouts = [worth(0, [1, 1], 1), worth(0, [-1, 1], 1), worth(1, [-1, -1], -1), worth(2, [1, -1], -1)]
    for rollout in rollouts:
        rollout.response, rollout.episode = SimpleNamespace(ended=True), SimpleNamespace(right=(True,))
    pool = offline.Pool(rollouts, [3, 3, 3, 5], {})
    settings = SimpleNamespace(**{**PLAIN, "level": level})
    offline.pool_advantages(pool, settings, SimpleNamespace(grouping=grouping), GroupBaseline(min_group=1))
    for rollout, values in zip(rollouts, expected):
        assert rollout.advantages == pytest.approx(values)
        assert rollout.weight == 1.0


def test_actions_that_are_credited_are_units_of_their_own(scene):
    _, _, rollouts, settings = scene
    assert settings.units == "outcome"
    assert replace(settings, credit="action").units == replace(settings, level="process").units == "process"
    rl.action_advantages(rollouts, 4, skip_agreeing=True)
    for rollout in rollouts:
        assert len(rollout.advantages) == len(rollout.response.actions)


def test_credit_for_actions_is_refused_where_it_means_nothing():
    for more in ({"level": "process"}, {"level": "outcome", "mode": "offline"}):
        with pytest.raises(ValueError, match="credit: action is for"):
            S2RRlConfig(type="s2r_rl", task=TASK, credit="action", **more)


def test_settings_that_would_teach_nothing_are_refused():
    from llmcompress.stages.s2r.evaluate import S2REvaluateConfig
    from llmcompress.stages.s2r.init import S2RInitConfig
    from llmcompress.stages.s2r.rl import S2RRlConfig

    task = {"kind": "countdown", "high": 8}
    for scope in ("running", "ema"):
        with pytest.raises(ValueError, match=f"baseline.scope: {scope} is for mode: online"):
            S2RRlConfig(type="s2r_rl", task=task, level="process", mode="offline", baseline={"scope": scope})
    with pytest.raises(ValueError, match="gives equal samples"):
        S2REvaluateConfig(type="s2r_evaluate", task=task, majority=True, sampling={"temperature": 0})
    with pytest.raises(ValueError, match=r"sampling\.top_p: below 1"):
        S2RRlConfig(type="s2r_rl", task=task, level="outcome", sampling={"top_p": 0.95})
    with pytest.raises(ValueError, match="gives equal samples"):
        S2RInitConfig(type="s2r_init", task=task, sampling={"temperature": 0})
    S2RInitConfig(type="s2r_init", task=task, data="program", sampling={"temperature": 0})


@pytest.fixture
def pooled(scene):
    """Reader, and the filters applied to one response to a problem."""
    _, reader, _, _ = scene
    # as in the vocabularies of Llama and Qwen
    reader.tokenizer.add_tokens([".\n\n"])
    problem = reader.problems.problems("train")[0]

    def keep(text, **more):
        limits = offline.OfflineSettings(0.0, 1.0, **{**LIMITS, **more})
        ids = [*reader.tokenizer(text, add_special_tokens=False)["input_ids"], reader.end]
        return offline.filter_pool(reader, [problem], [reader.prompt(problem.question)], [[ids]], limits, -1)

    solution = reader.problems.solution(problem, random.Random(0))
    return reader, f"{solution}{CHECK}{CORRECT}", f"{RETRY}1{CHECK}{INCORRECT}", keep


LIMITS = {"max_actions": 4, "after_confirmed": "truncate", "balance": False, "bins": 9, "grouping": "position",
          "epochs": 1}  # fmt: skip


def test_what_goes_on_after_a_confirmed_answer_is_cut_off_before_actions_are_counted(pooled):
    reader, confirmed, more, keep = pooled
    pool = keep(confirmed + 4 * more)
    (rollout,) = pool.rollouts
    assert reader.text(rollout.ids) == confirmed
    assert (rollout.rewards, rollout.episode.well_formed, rollout.ids[-1]) == ([1, 1], True, reader.end)
    assert (rollout.episode.right, rollout.episode.final, rollout.outcome) == ((True,), True, 1)
    assert pool.counts == {"responses that went on after a right, accepted attempt": 1}


def test_a_point_in_one_token_with_the_line_feeds_of_a_marker_is_put_back(pooled):
    """As in the vocabularies of Llama and Qwen; the reasoner's own has whole sentences, so that it is spelt here."""
    reader, confirmed, more, _ = pooled
    problem = reader.problems.problems("train")[0]
    together = reader.tokenizer.convert_tokens_to_ids(".\n\n")

    def ids(text):
        return reader.tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = [*ids(confirmed[:-2]), *ids(confirmed[-2]), together, *ids((RETRY + "1").removeprefix("\n\n"))]
    whole += [*ids(more.removeprefix(f"{RETRY}1")), reader.end]
    assert reader.text(whole) == confirmed + more
    limits = offline.OfflineSettings(0.0, 1.0, **LIMITS)
    pool = offline.filter_pool(reader, [problem], [reader.prompt(problem.question)], [[whole]], limits, -1)
    (rollout,) = pool.rollouts
    assert together not in rollout.ids and reader.text(rollout.ids) == confirmed
    assert (rollout.rewards, rollout.episode.well_formed) == ([1, 1], True)


def test_problems_are_kept_by_accuracy_and_wrong_responses_by_number(pooled):
    reader, confirmed, more, _ = pooled
    first, second = reader.problems.problems("train")[:2]
    texts = {"wrong": more.removeprefix(RETRY), "right": confirmed}

    def keep(*kinds, **changes):
        """Of the first problem these responses, of the second two wrong ones."""
        ids = {
            kind: [*reader.tokenizer(text, add_special_tokens=False)["input_ids"], reader.end]
            for kind, text in texts.items()
        }
        limits = offline.OfflineSettings(0.2, 0.8, **{**LIMITS, **changes})
        prompts = [reader.prompt(problem.question) for problem in (first, second)]
        responses = [[ids[kind] for kind in kinds], [ids["wrong"]] * 2]
        return offline.filter_pool(reader, [first, second], prompts, responses, limits, -1)

    pool = keep("wrong", "right", "wrong", "wrong")
    assert [rollout.episode.final for rollout in pool.rollouts] == [False, True, False, False]
    assert {rollout.problem for rollout in pool.rollouts} == {0}
    assert pool.counts == {"problems outside the accuracy range": 1}
    # at most as many wrong ones as right ones; how hard a problem is, all its responses say
    fewer = keep("wrong", "right", "wrong", "wrong", balance=True)
    assert [rollout.episode.final for rollout in fewer.rollouts] == [False, True]
    assert fewer.counts["responses dropped for balance"] == 2
    assert set(fewer.bins) == set(pool.bins) == {accuracy_bin(1, 4, 9)}
    assert not keep("right", "right").rollouts and not keep("wrong", "wrong").rollouts


def test_responses_with_too_many_actions_are_dropped(pooled):
    _, confirmed, more, keep = pooled
    few, many = more.removeprefix(RETRY) + more, more.removeprefix(RETRY) + 2 * more
    assert len(keep(few).rollouts) == 1
    assert keep(many).counts == {"responses with too many actions": 1}
    assert keep(confirmed + 2 * more, after_confirmed="keep").counts == {"responses with too many actions": 1}
    assert not keep(confirmed + more, after_confirmed="drop").rollouts
    assert keep(confirmed, after_confirmed="drop").rollouts


def test_a_plan_takes_no_row_to_be_longer_than_it_can_get():
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.base import PlanInputs
    from llmcompress.stages.s2r.rl import LONGEST_PROMPT

    layout = ModelHandle.open("asset:reference_reasoner").layout

    def memory(positions: int | None = None, **config: Any) -> int:
        stage = S2RRl("r", S2RRlConfig(type="s2r_rl", task=TASK, level="outcome", **config))
        return stage.estimate(PlanInputs(layout, 4, 4, 0, 0, {}, "cpu", positions=positions)).ram

    assert memory(512) == memory(max_length=512) < memory()
    assert memory(sampling={"max_new_tokens": 52}) == memory(max_length=LONGEST_PROMPT + 52)
