"""Building trajectories: difficulty, truth filter, order of trials, pairs, the control."""

import pytest

from llmcompress.algorithms.self_verify import cut, verdict_of
from llmcompress.data.actions import CHECK, INCORRECT, RETRY
from llmcompress.data.problems.base import Problem, boxed
from llmcompress.data.problems.countdown import Countdown
from llmcompress.data.trajectories import (
    Builder,
    KeepProbabilities,
    Sample,
    balanced_pairs,
    first_attempt,
    level,
    some,
    trial_counts,
)
from llmcompress.data.verifiers import Program

TASK = Countdown(compact=True)
PROBLEM = Problem("2,3,4:20", "2,3,4:20", data={"numbers": [2, 3, 4], "target": 20})
ALL = KeepProbabilities(all_right=1, few_wrong=1, some_wrong=1, most_wrong=1)


def samples(*answers):
    return [Sample(f"\\boxed{{{a}}}", TASK.check(PROBLEM, a)) for a in answers]


def builder(keep=ALL, verifier=None):
    return Builder(TASK, verifier or Program(TASK), keep, seed=0)


def single(made, problem, given):
    """The one trajectory of a problem, None where it has none."""
    return next(iter(made.trajectories(problem, given, 1)), None)


@pytest.mark.parametrize(
    ("wrong", "of", "trials"),
    [(0, 5, 1), (1, 5, 2), (2, 5, 3), (3, 5, 3), (4, 5, 4), (5, 5, 4), (1, 10, 2), (7, 10, 4)],
)
def test_levels_of_difficulty(wrong, of, trials):
    assert level(wrong, of) == trials


def test_a_hard_problem_gets_three_different_wrong_trials_and_ends_right():
    row = single(builder(), PROBLEM, samples("2*3*4", "2+3+4", "2*3+4", "2+3*4", "(2+3)*4"))
    assert row.trials == 4
    response = cut([row.response], ended=True)
    attempts = [boxed(a.text) for a in response.actions[::2]]
    verdicts = [verdict_of(a.text) for a in response.actions[1::2]]
    assert len(set(attempts)) == 4
    assert verdicts == [False, False, False, True]
    assert [TASK.check(PROBLEM, a) for a in attempts] == verdicts
    assert response.well_formed


def test_more_trajectories_of_a_problem_differ_and_begin_with_the_single_one():
    given = samples("2*3*4", "2+3+4", "2*3+4", "2+3*4", "(2+3)*4")
    rows = builder().trajectories(PROBLEM, given, 4)
    assert rows[0] == single(builder(), PROBLEM, given)
    assert 1 < len({row.response for row in rows}) == len(rows) <= 4
    for row in rows:
        attempts = [boxed(a.text) for a in cut([row.response], ended=True).actions[::2]]
        assert len(set(attempts)) == len(attempts)
    # where there is but one way, it is there once
    assert len(builder().trajectories(PROBLEM, samples("(2+3)*4"), 4)) == 1
    made = builder()
    assert made.trajectories(PROBLEM, samples("2*3*4"), 4) == []
    assert made.counts["no right sample"] == 1


def test_equal_wrong_answers_count_once_and_missing_ones_not_at_all():
    made = builder()
    row = single(made, PROBLEM, [*samples("2*3*4", "2*3*4", "2*3*4", "(2+3)*4"), Sample("no idea", False)])
    assert row.trials == 2


def test_difficulty_is_that_of_all_samples_equal_ones_included():
    row = single(builder(), PROBLEM, samples("2*3*4", "2+3+4", *["(2+3)*4"] * 8))
    assert row.trials == 2


def test_a_problem_without_a_different_wrong_answer_is_kept_like_the_easiest():
    unreadable = [*samples("(2+3)*4"), *[Sample("no idea", False)] * 4]
    for share, kept in ((0, False), (1, True)):
        keep = KeepProbabilities(all_right=share, fewer_trials=1 - share)
        assert (single(builder(keep), PROBLEM, unreadable) is not None) == kept
        # one wrong answer of the three that are wanted is a shorter trajectory
        keep = KeepProbabilities(all_right=1 - share, fewer_trials=share)
        assert (single(builder(keep), PROBLEM, [*unreadable, *samples("2+3+4")]) is not None) == kept


def test_a_problem_without_a_right_sample_is_left_out():
    made = builder()
    assert single(made, PROBLEM, samples("2*3*4", "2+3+4")) is None
    assert made.counts["no right sample"] == 1


def test_false_verdicts_are_dropped():
    class Liar:
        def write(self, problem, answer):
            return f"Surely. {INCORRECT}"

    made = builder(verifier=Liar())
    assert single(made, PROBLEM, samples("(2+3)*4", "2+3+4")) is None
    assert made.counts["verifications dropped"] == 1
    assert [row.ends for row in made.pairs(PROBLEM, samples("(2+3)*4", "2+3+4"))] == [False]
    # other kinds of rows of the same samples do not count it again, other samples do
    assert made.counts["verifications dropped"] == 1
    assert made.single(PROBLEM, samples("(2+3)*4")) is None
    assert made.counts["verifications dropped"] == 2


def test_probabilities_of_zero_and_one_decide():
    none = KeepProbabilities(all_right=0, few_wrong=0, some_wrong=0, most_wrong=0, fewer_trials=0)
    assert single(builder(none), PROBLEM, samples("(2+3)*4", "2+3+4")) is None
    easy = KeepProbabilities(all_right=0)
    assert single(builder(easy), PROBLEM, samples("(2+3)*4", "(3+2)*4")) is None


def test_keeping_is_a_share_of_the_problems():
    half = builder(KeepProbabilities(all_right=0.3))
    kept = 0
    for index in range(400):
        problem = Problem(f"k{index}", "q", data=PROBLEM.data)
        kept += single(half, problem, samples("(2+3)*4", "(3+2)*4")) is not None
    assert kept / 400 == pytest.approx(0.3, abs=0.07)


def test_pairs_end_with_the_transition_and_are_balanced():
    pairs = builder().pairs(PROBLEM, samples("(2+3)*4", "2+3+4", "2*3*4", "4*(2+3)"))
    assert [p.ends for p in pairs] == [True, False, False, True]
    assert all(p.response.endswith(RETRY) for p in pairs if not p.ends)
    assert all(p.response.count(CHECK) == 1 for p in pairs)
    chosen = balanced_pairs([*pairs, *pairs[1:3]], 4, seed=1)
    assert sum(p.ends for p in chosen) == 2
    assert trial_counts(chosen) == {}
    # an odd number is filled up
    assert [len(balanced_pairs(pairs, count, seed=1)) for count in (1, 3, 9)] == [1, 3, 4]


def test_only_the_first_attempt_of_a_sample_is_used():
    assert first_attempt(f"\\boxed{{1}}{CHECK}x{RETRY}y") == "\\boxed{1}"
    assert first_attempt("plain") == "plain"


def test_the_control_is_a_right_solution_alone():
    row = builder().solution(PROBLEM, samples("2+3+4", "(2+3)*4"))
    assert (row.response, row.kind) == ("\\boxed{(2+3)*4}", "solution")
    assert builder().solution(PROBLEM, samples("2+3+4")) is None


def test_a_hard_problem_gives_its_right_attempt_as_the_first_one_too():
    row = builder().single(PROBLEM, samples("2*3*4", "2+3+4", "(2+3)*4"))
    assert row.trials == 1 and row.ends and row.kind == "trajectory"
    response = cut([row.response], ended=True)
    assert boxed(response.actions[0].text) == "(2+3)*4" and verdict_of(response.actions[1].text) is True
    # its trajectory is such a row already, or there is no right attempt
    assert builder().single(PROBLEM, samples("(2+3)*4", "4*(2+3)")) is None
    assert builder().single(PROBLEM, samples("2*3*4", "2+3+4")) is None


def test_a_search_is_given_up_after_so_many_rejected_trials():
    row = builder().given_up(PROBLEM, samples("2*3*4", "2+3+4", "(2+3)*4"), 4)
    response = cut([row.response], ended=True)
    attempts = [boxed(a.text) for a in response.actions[::2]]
    assert len(attempts) == row.trials == 4 and row.ends and response.well_formed
    # both wrong answers are there, the right one is not
    assert set(attempts) == {"2*3*4", "2+3+4"}
    assert [verdict_of(a.text) for a in response.actions[1::2]] == [False] * 4
    assert builder().given_up(PROBLEM, samples("(2+3)*4"), 4) is None
    # none comes twice where there are enough
    row = builder().given_up(PROBLEM, samples("2*3*4", "2+3+4", "2*3+4", "2+3*4", "3+2*4"), 5)
    assert len({boxed(a.text) for a in cut([row.response], ended=True).actions[::2]}) == 5


def test_some_rows_are_chosen_by_seed():
    rows = [single(builder(), PROBLEM, samples("(2+3)*4"))] * 3
    assert len(some(rows, 2, 0)) == 2 and len(some(rows, 9, 0)) == 3
    marked = list(range(50))
    assert some(marked, 10, 0) == some(marked, 10, 0) != some(marked, 10, 1)
