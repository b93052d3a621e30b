"""S2R test 1: actions, masks, verdicts, rewards and figures against hand-made answers; cutting keeps every token."""

from __future__ import annotations

import itertools
import random

import pytest

from llmcompress.algorithms.self_verify import (
    ActionKind,
    Episode,
    action_rewards,
    behaviour,
    cut,
    judge,
    outcome_reward,
    rejected_again,
    sft_mask,
    verdict_of,
    verdict_tokens,
)
from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY

SOLVE, VERIFY = ActionKind.SOLVE, ActionKind.VERIFY
# (attempt, verdict) twice wrong, then right: the case of the paper's Figure 2
THREE = ["a1", CHECK, "v1 ", INCORRECT, RETRY, "a2", CHECK, "v2 ", INCORRECT, RETRY, "a3", CHECK, "v3 ", CORRECT]


def kinds(response):
    return [(a.kind, a.start, a.stop) for a in response.actions]


def test_three_trials_are_six_actions_that_cover_every_token():
    response = cut(THREE, ended=True)
    assert kinds(response) == [
        (SOLVE, 0, 1), (VERIFY, 1, 4), (SOLVE, 4, 6), (VERIFY, 6, 9), (SOLVE, 9, 11), (VERIFY, 11, 15),
    ]  # fmt: skip
    assert response.well_formed
    assert [a.text for a in response.actions if a.kind is SOLVE] == ["a1", "a2", "a3"]


def test_mask_of_figure_2():
    """(0, 1, 0, 1, 1, 1) per action; the end token is trained, and the markers of untrained retries by choice."""
    response = cut(THREE, ended=True)
    per_action = [0, 1, 0, 1, 1, 1]
    plain = [bool(m) for m, a in zip(per_action, response.actions) for _ in range(a.stop - a.start)]
    assert sft_mask(response, markers=False) == plain
    with_markers = list(plain)
    with_markers[4] = True
    assert sft_mask(response, markers=True) == with_markers


def test_no_attempt_of_a_search_that_is_given_up_is_trained():
    response = cut(THREE, ended=True)
    mask = sft_mask(response, markers=False, right=False)
    per_action = [0, 1, 0, 1, 0, 1]
    assert mask == [bool(m) for m, a in zip(per_action, response.actions) for _ in range(a.stop - a.start)]


def test_a_single_trial_is_trained_whole():
    assert sft_mask(cut(["a", CHECK, CORRECT], ended=True)) == [True] * 4


def test_the_word_of_a_verdict_is_found_among_its_tokens():
    pieces = [
        "a1 ",
        "Therefore, the answer is correct.",
        CHECK,
        "Therefore,",
        " the answer is",
        " in",
        "correct",
        ". v",
    ]
    pieces += [RETRY, "a2", CHECK, "It is correct. Therefore, the answer is", " correct", "."]
    flags = verdict_tokens(pieces, cut(pieces, ended=True))
    assert len(flags) == len(pieces) + 1
    # not the sentence inside an attempt, not what precedes the verdict, no end token
    assert [place for place, flag in enumerate(flags) if flag] == [5, 6, 12]


def test_a_verification_in_other_words_has_no_verdict_tokens():
    pieces = ["a", CHECK, "the solution", " is correct", "."]
    assert verdict_of("the solution is correct.") is True
    assert not any(verdict_tokens(pieces, cut(pieces, ended=True)))


def plain_split(text):
    """Texts between markers that change the kind of action, found one character after another."""
    found, kind, begin, at = [], SOLVE, 0, 0
    while at < len(text):
        for marker, opens in ((CHECK.strip(), VERIFY), (RETRY.strip(), SOLVE)):
            if text.startswith(marker, at):
                if opens is not kind:
                    found.append(text[begin:at].strip("\n"))
                    kind, begin = opens, at + len(marker)
                at += len(marker) - 1
                break
        at += 1
    return [*found, text[begin:].strip("\n")]


@pytest.mark.parametrize("seed", range(40))
def test_cutting_is_a_partition_however_the_text_is_split_into_tokens(seed):
    rng = random.Random(seed)
    parts = [CHECK, RETRY, CORRECT, INCORRECT, "\n", "x", "Wait", ", let me", " é", "\\boxed{1}", ""]
    text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 12)))
    pieces, at = [], 0
    while at < len(text):
        step = rng.randint(0, 5)
        pieces.append(text[at : at + step])
        at += step
    ended = rng.random() < 0.5
    response = cut(pieces, ended)
    spans = [(a.start, a.stop) for a in response.actions]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(pieces) + ended
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert [a.kind for a in response.actions] == [(SOLVE, VERIFY)[i % 2] for i in range(len(spans))]
    assert [a.text.strip("\n") for a in response.actions] == plain_split(text)


def test_a_marker_inside_a_token_gives_that_token_to_the_new_action():
    # "1.\n\nWait" is one token here, as byte-pair tokenizers like it
    response = cut(["x = 1.\n\nWait", ", let me recheck my solution.\n\nok. ", CORRECT], ended=True)
    assert kinds(response) == [(SOLVE, 0, 0), (VERIFY, 0, 4)]
    assert response.actions[0].text == "x = 1."


def test_repeated_markers_stay_in_their_action_and_are_not_well_formed():
    response = cut(["a", RETRY, "b", CHECK, "v", CHECK, CORRECT], ended=True)
    assert [a.kind for a in response.actions] == [SOLVE, VERIFY]
    assert response.actions[0].stop == 3
    assert not response.well_formed


@pytest.mark.parametrize(
    ("pieces", "ended"),
    [
        (["a"], True),
        (["a", CHECK, "hm"], True),
        (["a", CHECK, CORRECT], False),
        ([CHECK, CORRECT], True),
        (["a", CHECK, INCORRECT, RETRY, "b"], True),
        ([], True),
    ],
)
def test_incomplete_responses_are_not_well_formed(pieces, ended):
    assert not cut(pieces, ended).well_formed


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (CORRECT, True),
        (INCORRECT, False),
        (f"{CORRECT} But no: {INCORRECT}", False),
        ("12 + 3 = 15. Thus the answer is incorrect", False),
        ("The proposed answer is not correct.", False),
        ("So this solution is correct.", True),
        ("The answer is incorrect: it should be 3.5.", False),
        ("It is 3.5. The answer is correct!", True),
        ("Therefore, the answer cannot be verified.", None),
        ("It checks out everywhere", None),
        ("", None),
    ],
)
def test_verdicts(text, verdict):
    assert verdict_of(text) is verdict


def test_rewards_by_hand():
    response = cut(THREE, ended=True)
    assert action_rewards(response, [False, False, True]) == [-1, 1, -1, 1, 1, 1]
    # the second attempt was right and was called wrong
    assert action_rewards(response, [False, True, True]) == [-1, 1, 1, -1, 1, 1]
    assert outcome_reward(response, [False, False, True]) == 1
    assert outcome_reward(response, [True, True, False]) == -1


def test_cut_off_responses_are_penalised_unless_asked_otherwise():
    response = cut(["a", CHECK, CORRECT], ended=False)
    assert action_rewards(response, [True]) == [1, -1]
    assert action_rewards(response, [True], truncation_reward=None) == [1, 1]
    assert outcome_reward(response, [True]) == -1
    assert outcome_reward(response, [True], truncation_reward=None) == 1


def test_figures_by_hand():
    episodes = [
        Episode((True,), (True,), True, True, 10),  # right at once
        Episode((False, True), (False, True), True, True, 20),  # corrected
        Episode((True, False), (False, True), True, True, 30),  # broken, and a wrong one accepted
        Episode((False,), (None,), True, False, 40),  # no verdict
    ]
    found = behaviour(episodes)
    assert found["accuracy"] == 2 / 4
    assert found["first_accuracy"] == 2 / 4
    # verdicts: T/T ok, F/F ok, T/T ok, T/F no, F/T no, F/None no
    assert found["verification_accuracy"] == 3 / 6
    assert found["error_recall"] == 1 / 3
    assert found["correct_recall"] == 2 / 3
    assert found["correct_precision"] == 2 / 3
    assert found["incorrect_to_correct"] == 1 / 2
    assert found["correct_to_incorrect"] == 1 / 2
    assert found["trials"] == 6 / 4
    assert found["tokens"] == 25
    assert found["well_formed"] == 3 / 4
    assert (found["n_verifications"], found["n_first_wrong"], found["n_first_right"]) == (6, 2, 2)


def test_a_retry_that_gives_a_rejected_answer_again_is_counted():
    """The policy that says "incorrect" and writes the same once more, by hand."""
    cases = (
        # answers, verdicts of the attempts, which retries repeat
        (["5", "5", "5"], [False, False, None], [True, True]),
        (["5", "6", "5"], [False, False, True], [False, True]),
        (["5", "6", "7"], [False, False, True], [False, False]),
        # an answer without a verdict, or accepted, is none that was rejected
        (["5", "5"], [None, False], [False]),
        (["5", "5"], [True, True], [False]),
        # no box twice
        ([None, None], [False, False], [True]),
        (["5"], [False], []),
        # the last attempt was cut off before its verification
        (["5", "5"], [False], [True]),
    )
    for answers, verdicts, expected in cases:
        assert rejected_again(verdicts, answers) == expected, (answers, verdicts)
    wrong, right = "2+2=5 \\boxed{5}", "2+2=4 \\boxed{4}"
    said = f"{CHECK}{INCORRECT}{RETRY}"
    pieces = [wrong, said, wrong, said, right, f"{CHECK}{CORRECT}"]
    first = judge(cut(pieces, True), [False, False, True], 9, ["5", "5", "4"])
    unknown = judge(cut(pieces, True), [False, False, True], 9)
    assert first.repeated == (True, False) and unknown.repeated is None
    found = behaviour([first, judge(cut([right, f"{CHECK}{CORRECT}"], True), [True], 3, ["4"])])
    assert (found["repeated_retries"], found["n_retries"]) == (1 / 2, 2)
    assert behaviour([unknown])["repeated_retries"] is None


def test_nothing_to_count_is_none_and_not_zero():
    found = behaviour([judge(cut(["a"], True), [True], 2)])
    assert found["verification_accuracy"] is None
    assert found["incorrect_to_correct"] is None
    assert found["correct_to_incorrect"] == 0
    assert behaviour([])["accuracy"] is None
