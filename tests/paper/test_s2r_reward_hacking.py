"""S2R test 3: what a policy might try instead of solving gains nothing, neither as outcome nor per action.

Each case is judged with the shipped reasoner's tokenizer, as in training, and held against the honest response.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY
from llmcompress.data.problems.base import Problem
from llmcompress.data.problems.countdown import Countdown
from llmcompress.evaluation.self_correction import Reader
from llmcompress.models.paths import resolve_path
from llmcompress.training.rl import judged, outcome_advantages, penalised, weigh_by_length

TASK = Countdown(compact=True)
PROBLEM = Problem("2,3,4:20", "2,3,4:20", data={"numbers": [2, 3, 4], "target": 20})
RIGHT, WRONG = "\\boxed{(2+3)*4}", "\\boxed{2+3*4}"
STEPS = "3*4=12,2+12=14;20"


@pytest.fixture(scope="module")
def reader():
    return Reader(AutoTokenizer.from_pretrained(resolve_path("asset:reference_reasoner")), TASK)


def play(reader, text, ended=True):
    ids = list(reader.tokenizer(text, add_special_tokens=False)["input_ids"]) + [reader.end] * ended
    return judged(reader, PROBLEM, 0, reader.prompt(PROBLEM.question), ids, -1)


def test_the_honest_response_is_rewarded(reader):
    honest = play(reader, f"{WRONG}{CHECK}{STEPS}{INCORRECT}{RETRY}{RIGHT}{CHECK}2+3=5,5*4=20;20{CORRECT}")
    assert (honest.outcome, honest.rewards) == (1, [-1, 1, 1, 1])
    assert honest.episode.well_formed


def test_two_boxes_in_one_attempt_count_as_the_last_alone(reader):
    """Hedging with a right and a wrong box earns what the last box earns by itself, in both orders."""
    for last, first, reward in ((WRONG, RIGHT, -1), (RIGHT, WRONG, 1)):
        hedged = play(reader, f"{first}{last}{CHECK}{STEPS}{CORRECT}")
        alone = play(reader, f"{last}{CHECK}{STEPS}{CORRECT}")
        assert hedged.rewards == alone.rewards
        assert hedged.outcome == alone.outcome == reward


def test_an_answer_made_of_several_expressions_is_wrong(reader):
    for content in ("2+3*4 (2+3)*4", "2+3*4,(2+3)*4", "(2+3)*4=20", "{(2+3)*4}"):
        assert play(reader, f"\\boxed{{{content}}}{CHECK}{STEPS}{CORRECT}").outcome == -1


def test_a_box_inside_a_verification_is_never_read(reader):
    sneaky = play(reader, f"{WRONG}{CHECK}{STEPS}{RIGHT}{CORRECT}")
    assert sneaky.outcome == -1
    assert sneaky.rewards == [-1, -1]
    # nor does a wrong box there hurt
    assert play(reader, f"{RIGHT}{CHECK}{WRONG}{CORRECT}").outcome == 1


def test_endless_retries_are_cut_off_and_punished(reader):
    """Even when every verdict is true: without an end there is no answer, and the last action is punished."""
    endless = play(reader, RETRY.join([f"{WRONG}{CHECK}{STEPS}{INCORRECT}"] * 12), ended=False)
    assert endless.outcome == -1
    assert endless.rewards[-1] == -1
    assert not endless.episode.final
    # not even a right attempt on the way helps
    lucky = play(reader, f"{RIGHT}{CHECK}x{CORRECT}{RETRY}{RIGHT}{CHECK}x", ended=False)
    assert lucky.outcome == -1


def test_empty_answers_are_wrong(reader):
    for text in ("", "\\boxed{}", f"\\boxed{{}}{CHECK}{CORRECT}", f"{CHECK}{CORRECT}", f"{RETRY}{CHECK}{CORRECT}"):
        empty = play(reader, text)
        assert empty.outcome == -1
        assert empty.rewards[0] == -1
    # calling nothing correct is a false verdict as well
    assert play(reader, f"\\boxed{{}}{CHECK}{CORRECT}").rewards == [-1, -1]


def test_copying_the_target_is_wrong(reader):
    for content in ("20", "20*1", "4*5", "2+3+4+11", "20+2-2", "2*3*4-4"):
        assert play(reader, f"\\boxed{{{content}}}{CHECK}{STEPS}{CORRECT}").outcome == -1


def test_skipping_or_hiding_the_verdict_is_not_a_true_verdict(reader):
    for text in ("", STEPS, f"{CORRECT}{INCORRECT}"):
        assert play(reader, f"{RIGHT}{CHECK}{text}").rewards == [1, -1]


def test_a_response_without_verification_is_judged_but_not_well_formed(reader):
    bare = play(reader, RIGHT)
    assert bare.outcome == 1
    assert not bare.episode.well_formed


def test_repeating_a_marker_opens_no_second_attempt(reader):
    """Two attempts without a verification between them are one, so that retries cannot be had for nothing."""
    double = play(reader, f"{RIGHT}{RETRY}{WRONG}{CHECK}{STEPS}{INCORRECT}")
    assert len(double.rewards) == 2
    assert double.outcome == -1


def test_trying_a_rejected_answer_again_costs_the_penalty_at_both_levels(reader):
    rejected = f"{WRONG}{CHECK}{STEPS}{INCORRECT}{RETRY}"
    again = play(reader, f"{rejected}{rejected}{WRONG}{CHECK}{STEPS}{INCORRECT}")
    other = play(reader, f"{rejected}{rejected}\\boxed{{2*3+4}}{CHECK}{STEPS}{INCORRECT}")
    assert again.repeated == [False, False, True, False, True, False]
    assert other.repeated == [False, False, True, False, False, False]
    # what metrics and report show of it, whatever the penalty
    assert (again.episode.repeated, other.episode.repeated) == ((True, True), (True, False))
    assert (penalised(again, 0.5), penalised(other, 0.5), penalised(again, 0.0)) == (-1.5, -1.25, -1.0)
    # a single attempt has no retry to repeat
    assert penalised(play(reader, f"{RIGHT}{CHECK}{STEPS}{CORRECT}"), 0.5) == 1.0
    outcome_advantages([again, other], 2, skip_agreeing=True, repeat_penalty=0.5)
    assert (again.advantages, other.advantages) == ([-0.25], [0.25])
    outcome_advantages([again, other], 2, skip_agreeing=True)
    assert (again.advantages, again.weight) == ([0.0], 0.0)
    # samples that lose the same part of their reward agree, whatever the mean of such numbers is rounded to
    for samples in range(2, 9):
        group = [replace(other) for _ in range(samples)]
        outcome_advantages(group, samples, skip_agreeing=True, repeat_penalty=0.1)
        assert all((each.advantages, each.weight) == ([0.0], 0.0) for each in group)


def test_length_weights_make_an_action_count_the_same_in_short_and_long_responses(reader):
    short = play(reader, f"{RIGHT}{CHECK}{STEPS}{CORRECT}")
    long = play(reader, f"{WRONG}{CHECK}{STEPS}{INCORRECT}{RETRY}" * 2 + f"{RIGHT}{CHECK}{STEPS}{CORRECT}")
    weigh_by_length([short, long], "process")
    assert (short.weight, long.weight) == (0.5, 1.5)
    weigh_by_length([short, long], "outcome")
    assert short.weight / 0.5 / (long.weight / 1.5) == pytest.approx(len(short.ids) / len(long.ids))
