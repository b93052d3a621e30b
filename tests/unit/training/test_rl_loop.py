"""What a step of reinforcement is made of, by hand: its problems, its updates, its loss, when it ends."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from llmcompress.algorithms.rl_objectives import GroupBaseline
from llmcompress.distributed.world import ALONE
from llmcompress.evaluation.sampling import Sampling
from llmcompress.training import offline, rl

SETTINGS = rl.RlSettings(
    level="outcome", steps=4, prompts=2, samples=2, updates=2, lr=1e-3, warmup=0, max_norm=None, kl=0.5, kl_mean=False,
    clip=0.2, ratio="mean", sampling=Sampling(8, 0.5), truncation_reward=-1, flip_bonus=1.0, verify_correct_bonus=1.0,
    discount=0.0, train_end=True, skip_agreeing=False, micro_batch=2, micro_tokens=None, save_every=1, seed=3,
)  # fmt: skip
VOCABULARY = 6


class Policy:
    """Logits that depend on the last token alone; the reference has others."""

    world, sampler = ALONE, None

    def __init__(self):
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))
        self.other = torch.randn(VOCABULARY, VOCABULARY)
        self.trainable = {"table": self.table}

    def logits(self, ids, mask):
        return self.table[ids]

    def reference_logits(self, ids, mask):
        return self.other[ids]

    @contextmanager
    def reference(self):
        own, self.table = self.table, self.other
        yield
        self.table = own


READER = SimpleNamespace(pad=0)


def rollout(ids, advantages, first=None, ended=True, weight=1.0):
    """One prompt token, ``ids`` of two actions of which the first has ``first`` tokens."""
    first = len(ids) if first is None else first
    spans = [(0, first), (first, len(ids))][: 2 if first < len(ids) else 1]
    actions = [SimpleNamespace(start=start, stop=stop) for start, stop in spans]
    response = SimpleNamespace(actions=actions, ended=ended)
    return rl.Rollout(
        0, [1], ids, response, SimpleNamespace(right=(True,)), [1] * len(actions), 1, advantages, [False], weight
    )


def by_hand(table, ids, temperature):
    """Log-probability of each token of a response that follows token 1."""
    logs = (table.detach() / temperature).log_softmax(-1)
    return torch.stack([logs[before, token] for before, token in zip([1, *ids], ids)])


def updated(policy, rollouts, settings, picked=None):
    """Figures and gradient of one update."""
    scored = rl.score(policy, READER, rollouts, settings, same=False)
    trainer = SimpleNamespace(update=lambda: 0.0)
    figures = rl.update(policy, READER, scored, picked or list(range(len(rollouts))), settings, trainer)
    gradient, policy.table.grad = policy.table.grad.clone(), None
    return figures, gradient, scored


def test_tokens_are_scored_at_the_temperature_they_were_sampled_at():
    policy, rows = Policy(), [rollout([2, 3, 4], [1.0]), rollout([5, 2], [1.0])]
    scored = rl.score(policy, READER, rows, SETTINGS, same=False)
    for place, row in enumerate(rows):
        torch.testing.assert_close(scored.old[place], by_hand(policy.table, row.ids, 0.5))
        torch.testing.assert_close(scored.reference[place], by_hand(policy.other, row.ids, 0.5))
    # a policy that still is the reference is asked once
    same = rl.score(policy, READER, rows, SETTINGS, same=True)
    assert all(torch.equal(a, b) for a, b in zip(same.old, same.reference))


@pytest.mark.parametrize("ratio", ["mean", "sum", "token"])
def test_the_first_update_on_fresh_responses_has_a_ratio_of_one(ratio):
    """So its loss is minus the mean of the weighted advantages, whatever the lengths and the padding."""
    policy, settings = Policy(), replace(SETTINGS, kl=0.0, ratio=ratio)
    rows = [rollout([2, 3, 4], [1.0], weight=2.0), rollout([5, 2], [-0.5], weight=0.5), rollout([3], [0.25])]
    figures, _, _ = updated(policy, rows, settings)
    assert figures["loss"] == pytest.approx(-(2.0 - 0.25 + 0.25) / 3, abs=1e-6)
    assert figures["clipped"] == 0


@pytest.mark.parametrize(("mean", "level"), [(False, "outcome"), (True, "outcome"), (False, "process")])
def test_distance_from_the_reference_is_taken_off_the_advantage(mean, level):
    policy, settings = Policy(), replace(SETTINGS, kl_mean=mean, level=level)
    row = rollout([2, 3, 4], [1.0, 2.0] if level == "process" else [1.0], first=2)
    scored = rl.score(policy, READER, [row], settings, same=False)
    apart = by_hand(policy.table, row.ids, 0.5) - by_hand(policy.other, row.ids, 0.5)
    expected = [1 - 0.5 * float(apart.mean() if mean else apart.sum())]
    if level == "process":
        expected = [1 - 0.5 * float(apart[:2].sum()), 2 - 0.5 * float(apart[2])]
    assert rl.unit_advantages(scored, 0, settings) == pytest.approx(expected, rel=1e-5)


def test_an_end_token_that_is_not_trained_is_of_no_unit():
    row, open_ = rollout([2, 3, 4], [1.0], first=2), rollout([2, 3, 4], [1.0], first=2, ended=False)
    assert rl.token_units(row, "process", train_end=True) == [0, 0, 1]
    assert rl.token_units(row, "process", train_end=False) == [0, 0, -1]
    assert rl.token_units(row, "outcome", train_end=False) == [0, 0, -1]
    # what was cut off ends with a token like any other
    assert rl.token_units(open_, "outcome", train_end=False) == [0, 0, 0]
    policy = Policy()
    (_, trained, _), (_, left, _) = (
        updated(policy, [row], replace(SETTINGS, kl=0.0, train_end=end)) for end in (True, False)
    )
    # the last token follows token 3
    assert trained[3].abs().sum() > 0 and left[3].abs().sum() == 0 and left[1].abs().sum() > 0


def test_an_anchor_adds_the_mean_distance_over_the_first_attempt():
    policy, plain = Policy(), replace(SETTINGS, kl=0.0)
    rows = [rollout([2, 3, 4], [1.0], first=2), rollout([5], [1.0])]
    without, with_anchor = (updated(policy, rows, replace(plain, anchor=anchor))[0]["loss"] for anchor in (0.0, 0.3))
    p, q = policy.table.detach().log_softmax(-1), policy.other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    # of the first attempt: tokens after 1 and 2; after 1
    expected = ((kl[1] + kl[2]) / 2 + kl[1]) / 2
    assert float(with_anchor - without) == pytest.approx(0.3 * float(expected), rel=1e-4)


def test_weights_by_length_are_one_on_average_and_keep_what_is_left_out():
    rows = [rollout([2, 3, 4, 5, 2], [1.0], first=1), rollout([2], [1.0]), rollout([2, 3, 4], [1.0], weight=0.0)]
    rl.weigh_by_length(rows, "outcome")
    assert [row.weight for row in rows] == pytest.approx([5 / 3, 1 / 3, 0])
    rows = [rollout([2, 3, 4, 5, 2], [1.0], first=1), rollout([2, 3], [1.0])]
    rl.weigh_by_length(rows, "process")
    assert [row.weight for row in rows] == pytest.approx([4 / 3, 2 / 3])


@pytest.mark.parametrize("skip", [True, False])
def test_samples_that_agree_are_left_out_only_where_that_is_asked_for(skip):
    for give in (rl.outcome_advantages, rl.action_advantages):
        rows = [rollout([2], []) for _ in range(4)]
        rows[3].outcome = -1
        give(rows, 2, skip_agreeing=skip)
        assert [row.weight for row in rows] == [float(not skip)] * 2 + [1.0] * 2
        assert [row.advantages[0] for row in rows] == [0, 0, 2, -2]


@pytest.mark.parametrize(("count", "wanted"), [(5, 2), (6, 3), (4, 4)])
def test_every_epoch_takes_each_problem_once_in_an_order_of_its_own(count, wanted):
    found = [place for step in range(2 * count) for place in rl.prompts_of_step(count, wanted, step, seed=1)]
    epochs = [found[begin : begin + count] for begin in range(0, len(found), count)]
    assert len(found) == 2 * count * wanted
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert rl.prompts_of_step(20, 20, 0, seed=1) != rl.prompts_of_step(20, 20, 0, seed=2)


def test_a_guard_stops_beyond_its_limits_and_not_at_them():
    guard = rl.Guard(ended_below=0.5, trials_above=3.0, seconds=10.0)
    fine = {"ended": 0.5, "trials": 3.0}
    assert guard.reason(fine, 10.0) is None and rl.Guard().reason({"ended": 0.0, "trials": 99.0}, 1e9) is None
    assert "ended_below" in str(guard.reason({**fine, "ended": 0.49}))
    assert "trials_above" in str(guard.reason({**fine, "trials": 3.01}))
    assert "seconds" in str(guard.reason(fine, 10.1))


def test_the_curve_holds_means_over_the_responses(monkeypatch):
    shown = ("accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_recall", "trials",
             "tokens", "ended", "well_formed", "repeated_retries")  # fmt: skip
    monkeypatch.setattr(rl, "behaviour", lambda episodes: dict.fromkeys(shown, 0.5))
    rows = [rollout([2, 3], [1.0]), rollout([4], [1.0]), rollout([5, 5], [1.0], weight=0.0)]
    rows[0].outcome = -1
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]), torch.zeros(2)]
    reference = [torch.tensor([-1.5, -3.0]), torch.tensor([-1.0]), torch.zeros(2)]
    record = rl.curve_record(7, rl.Scored(rows, old, reference), [{"loss": 1.0}, {"loss": 2.0}], SETTINGS)
    assert record["step"] == 7 and "sampler_gap" not in record
    # responses that teach nothing were not scored: they are no part of the mean
    assert (record["kl"], record["loss"]) == ((1.5 + 0.5) / 2, 1.5)
    assert record["reward"] == pytest.approx(1 / 3)
    assert (record["repeated_retries"], record["agreeing"]) == (0.5, pytest.approx(1 / 3))


@pytest.fixture
def traced(monkeypatch):
    """The loops with sampling, scoring and updates replaced by what writes down that it was called."""
    log = SimpleNamespace(seeds=[], asked=[], picked=[], figures=[], rows=None)

    def collect(policy, reader, problems, indices, settings, seed):
        log.seeds.append(seed)
        log.asked.append(list(indices))
        return log.rows or [rollout([2, 3], [1.0]) for _ in range(len(indices) * settings.samples)]

    def update(policy, reader, scored, picked, settings, trainer):
        log.picked.append(list(picked))
        policy.table.grad = torch.ones_like(policy.table)
        return {"loss": 0.0, "clipped": 0.0, "grad_norm": trainer.update()}

    def record(step, scored, figures, settings):
        log.figures.append(scored)
        return {"step": step, "ended": 1.0, "trials": 1.0}

    for name, stand_in in (("collect", collect), ("update", update), ("curve_record", record)):
        monkeypatch.setattr(rl, name, stand_in)
        if hasattr(offline, name):
            monkeypatch.setattr(offline, name, stand_in)
    return log


def online(folder, settings=SETTINGS, guard=None, baseline=None):
    told = []
    found = rl.train_online(
        Policy(), READER, [None] * 5, settings, baseline or GroupBaseline(), guard or rl.Guard(),
        folder / "progress.safetensors", told.append,
    )  # fmt: skip
    return found, told


def test_every_response_of_a_step_is_in_one_update_and_no_two_steps_sample_alike(traced, tmp_path):
    settings = replace(SETTINGS, prompts=3, samples=3, updates=2)
    (curve, stopped), told = online(tmp_path, settings)
    assert curve == told and [record["step"] for record in curve] == [1, 2, 3, 4] and stopped is None
    assert len(set(traced.seeds)) == 4 and len(traced.picked) == 8
    steps = [traced.picked[begin] + traced.picked[begin + 1] for begin in range(0, 8, 2)]
    assert all(sorted(step) == list(range(9)) for step in steps)
    assert len({tuple(step) for step in steps}) == 4 and [len(part) for part in traced.picked[:2]] == [5, 4]


@pytest.mark.parametrize(("credit", "units"), [("response", 1), ("action", 2)])
def test_credit_is_given_to_what_the_recipe_names(traced, tmp_path, credit, units):
    settings = replace(SETTINGS, credit=credit, steps=1)
    actions = rollout([2, 3], [], first=1)
    traced.rows = [replace(actions, advantages=[], repeated=[False, False]) for _ in range(4)]
    online(tmp_path, settings)
    assert [len(row.advantages) for row in traced.figures[0].rollouts] == [units] * 4


def test_training_that_was_stopped_stays_stopped(traced, tmp_path):
    (curve, stopped), _ = online(tmp_path, guard=rl.Guard(seconds=1e-9))
    assert len(curve) == 1 and "guard.seconds" in stopped
    assert online(tmp_path)[0] == (curve, stopped)


def test_another_step_is_not_begun_where_the_time_would_not_suffice_for_it(traced, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(rl, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    # a step takes 10 seconds and 10 lie between two: the second ends at 40, another one would end at 50 or later
    (curve, stopped), _ = online(tmp_path, guard=rl.Guard(seconds=45.0))
    assert len(curve) == 2 and "50 s" in str(stopped)


def test_a_running_baseline_goes_on_where_it_was(traced, tmp_path):
    settings = replace(SETTINGS, level="process", steps=2)
    scopes = [GroupBaseline(scope="running", min_group=1) for _ in range(2)]
    online(tmp_path, settings, baseline=scopes[0])
    assert scopes[0].state()
    online(tmp_path, settings, baseline=scopes[1])
    assert scopes[1].state() == scopes[0].state()


def test_a_pass_over_the_pool_takes_each_response_once_with_its_own_probabilities(traced, tmp_path):
    policy, settings = Policy(), replace(SETTINGS, prompts=2, samples=2, updates=2)
    rows = [rollout([2, 3][: 1 + place % 2] * (1 + place), [1.0]) for place in range(7)]
    pool = offline.Pool(rows, [0] * 7, {})
    expected = {id(row): by_hand(policy.other, row.ids, 0.5) for row in rows}
    offline.train_offline(policy, READER, pool, settings, 2, tmp_path / "progress.safetensors", lambda _: None)
    assert [len(part) for part in traced.picked] == [2, 2, 2, 1] * 2
    passes = [list(chain.from_iterable(traced.picked[begin : begin + 4])) for begin in (0, 4)]
    assert all(sorted(found) == list(range(7)) for found in passes) and passes[0] != passes[1]
    for part in traced.figures:
        for row, old, reference in zip(part.rollouts, part.old, part.reference, strict=True):
            # the pool was sampled by the reference: there is no distance at the beginning
            torch.testing.assert_close(old, expected[id(row)])
            assert torch.equal(old, reference)
