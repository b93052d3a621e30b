"""S2R's actions: cutting a response into attempts and verifications, verdicts, rewards, loss masks, behaviour figures.

Ma, Wang et al., "S2R: Teaching LLMs to Self-verify and Self-correct via Reinforcement Learning", ACL 2025 long 1104,
arXiv 2502.12853. A response is ``(s_1, v_1, …, s_k, v_k, <end>)``: attempts and the verification of each (section 2.1).
Everything here works on pieces of text and index ranges over tokens; the ids themselves are never rewritten, so cutting
and joining gives back the same ids whatever the tokenizer.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# texts that open a verification and a further attempt (appendix C; markers of the authors' code in other wording)
CHECK_PATTERN = r"\n*Wait, let me recheck my solution\.\n*"
RETRY_PATTERN = r"\n*Let me try again\.\n*"
_MARKER = re.compile(f"(?P<check>{CHECK_PATTERN})|(?P<retry>{RETRY_PATTERN})")

_VERDICT = re.compile(r"Therefore, the answer is (correct|incorrect)\.")
_UNDECIDED = re.compile(r"\bcan(?:not|'t) (?:be )?verif", re.IGNORECASE)
# asked of the last sentence, the negative list first: "not correct" contains "correct"
_NEGATIVE = (
    "is incorrect", "is likely incorrect", "is unlikely correct", "answer is wrong", "incorrect answer",
    "not the correct answer", "is not correct", "solution is incorrect", "calculation is wrong", "result is incorrect",
)  # fmt: skip
_POSITIVE = (
    "is correct", "appears to be correct", "answer is reasonable", "is indeed correct", "verified to be correct",
    "verified as correct", "correctly solved", "answer checks out", "is plausible",
)  # fmt: skip


class ActionKind(StrEnum):
    """What an action is; the end token belongs to the last action."""

    SOLVE = "solve"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a response.

    Attributes:
        kind: Attempt or verification.
        start, stop: Token range ``[start, stop)``; may be empty for an attempt that was never written.
        marker: Tokens at the start of the range that belong to the marker that opened it; 0 for the first attempt.
        text: Text without its marker.
    """

    kind: ActionKind
    start: int
    stop: int
    marker: int
    text: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response cut into actions, which always alternate and begin with an attempt.

    Attributes:
        actions: In order; together they cover every token.
        ended: Whether the end token was written.
        well_formed: No marker was repeated, no action is empty, the last action is a verification with a verdict,
            ended.
    """

    actions: tuple[Action, ...]
    ended: bool
    well_formed: bool


@dataclass(frozen=True, slots=True)
class Episode:
    """A response that has been judged.

    Attributes:
        right: For each attempt, whether its answer is right (``V_golden``).
        verdicts: For each attempt that was verified, what the verification said; None is no verdict.
        ended: Whether the end token was written.
        well_formed: See :class:`Response`.
        tokens: Tokens of the response.
        repeated: Of each attempt after the first, whether it gives an answer that the response has rejected before;
            None where answers are not known.
    """

    right: tuple[bool, ...]
    verdicts: tuple[bool | None, ...]
    ended: bool
    well_formed: bool
    tokens: int = 0
    repeated: tuple[bool, ...] | None = None

    @property
    def final(self) -> bool:
        """Whether the last attempt is right. A response without its end token has given no answer."""
        return self.ended and bool(self.right) and self.right[-1]


def cut(pieces: Sequence[str], ended: bool) -> Response:
    """Cut a response into actions.

    A marker of the kind of the action it stands in (a second "Let me try again." inside an attempt) opens nothing: the
    text stays part of that action, as in the authors' code, and the response is not well-formed. A token that holds
    the end of one action and the start of a marker belongs to the marker's action.

    Args:
        pieces: Text of each token in order, without the end token; their concatenation is the response.
        ended: Whether an end token followed; it then counts as one more token, of the last action.

    Returns:
        Actions over ``len(pieces) + ended`` tokens.
    """
    text = "".join(pieces)
    starts = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    kind, regular = ActionKind.SOLVE, True
    # (kind, first token, first token after the marker, first character after the marker)
    opened = [(kind, 0, 0, 0)]
    borders = []
    for match in _MARKER.finditer(text):
        wanted = ActionKind.VERIFY if match["check"] else ActionKind.SOLVE
        if wanted == kind:
            regular = False
            continue
        kind = wanted
        first = _token_at(starts, match.start())
        opened.append((kind, first, _token_at(starts, match.end() - 1) + 1, match.end()))
        borders.append(match.start())
    total = len(pieces) + ended
    actions = []
    for index, (which, first, after, begin) in enumerate(opened):
        stop = opened[index + 1][1] if index + 1 < len(opened) else total
        end = borders[index] if index < len(borders) else len(text)
        actions.append(Action(which, first, stop, min(after, stop) - first, text[begin:end]))
    last = actions[-1]
    complete = last.kind is ActionKind.VERIFY and verdict_of(last.text) is not None and ended
    filled = all(action.text.strip() for action in actions)
    return Response(tuple(actions), ended, regular and complete and filled)


def opens_action(text: str) -> bool:
    """Whether a text holds a marker, so that it would not stay one action."""
    return _MARKER.search(text) is not None


def _token_at(starts: Sequence[int], character: int) -> int:
    """Index of the token that holds a character; empty pieces before it are passed over."""
    return min(bisect_right(starts, character) - 1, len(starts) - 2)


def verdict_of(text: str) -> bool | None:
    """What a verification says: True for correct, False for incorrect, None where it says neither.

    The last "Therefore, the answer is …" decides; without one, the phrases of the authors' data tools in the last
    sentence. "Cannot be verified" is no verdict.
    """
    found = _VERDICT.findall(text)
    if found:
        return bool(found[-1] == "correct")
    # a point inside a number ends no sentence
    sentences = [sentence for sentence in re.split(r"[.!?](?!\d)|\n", text) if sentence.strip()]
    last = sentences[-1].lower() if sentences else ""
    if _UNDECIDED.search(last):
        return None
    if any(phrase in last for phrase in _NEGATIVE):
        return False
    return True if any(phrase in last for phrase in _POSITIVE) else None


def action_rewards(response: Response, right: Sequence[bool], truncation_reward: int | None = -1) -> list[int]:
    """``R_a`` of every action (section 2.3.2).

    Args:
        response: The response.
        right: For each attempt, whether its answer is right.
        truncation_reward: Reward of the last action of a response without its end token; None leaves it as it is.

    Returns:
        +1 or −1 per action: an attempt by its answer, a verification by whether its verdict is true; no verdict is −1.
    """
    rewards, attempt = [], -1
    for action in response.actions:
        if action.kind is ActionKind.SOLVE:
            attempt += 1
            rewards.append(1 if right[attempt] else -1)
        else:
            rewards.append(1 if verdict_of(action.text) == right[attempt] else -1)
    if not response.ended and truncation_reward is not None:
        rewards[-1] = truncation_reward
    return rewards


def outcome_reward(response: Response, right: Sequence[bool], truncation_reward: int | None = -1) -> int:
    """``R_o``: whether the last attempt is right (section 2.3.1); an unfinished response gets ``truncation_reward``."""
    if not response.ended and truncation_reward is not None:
        return truncation_reward
    return 1 if right[-1] else -1


def repeats(response: Response, answers: Sequence[str | None]) -> list[bool]:
    """Of every action, whether it is a retry whose answer an earlier attempt of the response gave already.

    Args:
        response: The response.
        answers: Answer of each attempt, None for none; attempts without one repeat each other.
    """
    given: set[str | None] = set()
    again, attempt = [], -1
    for action in response.actions:
        attempt += action.kind is ActionKind.SOLVE
        again.append(action.kind is ActionKind.SOLVE and answers[attempt] in given)
        given.add(answers[attempt])
    return again


def rejected_again(verdicts: Sequence[bool | None], answers: Sequence[str | None]) -> list[bool]:
    """Of each attempt after the first, whether it gives an answer that the response has rejected before. Ours.

    A policy that says "incorrect" of whatever it has written, or that retries without another idea, has true verdicts
    and gains nothing; accuracy alone does not tell it from one that cannot solve the problem.

    Args:
        verdicts: What was said of each attempt that was verified.
        answers: Answer of each attempt, None for none; attempts without one repeat each other.
    """
    rejected: set[str | None] = set()
    again = []
    for place, answer in enumerate(answers):
        if place > 0:
            again.append(answer in rejected)
        if place < len(verdicts) and verdicts[place] is False:
            rejected.add(answer)
    return again


def judge(
    response: Response, right: Sequence[bool], tokens: int, answers: Sequence[str | None] | None = None
) -> Episode:
    """Put together what the figures need; ``answers`` of the attempts, where repeats are to be counted."""
    verdicts = tuple(verdict_of(a.text) for a in response.actions if a.kind is ActionKind.VERIFY)
    repeated = None if answers is None else tuple(rejected_again(verdicts, answers))
    return Episode(tuple(right), verdicts, response.ended, response.well_formed, tokens, repeated)


def sft_mask(response: Response, markers: bool = True, right: bool = True) -> list[bool]:
    """δ of Eq. 1: which tokens of a trajectory are trained.

    Every verification, the last attempt and the end token are; earlier attempts are context, never targets.

    Args:
        response: A trajectory.
        markers: Also train the marker that opens an attempt that is not trained itself: it is the transition after
            "incorrect". (The authors' loss does not, their row-splitting tool does.)
        right: Whether the last attempt is; a wrong one is no target.

    Returns:
        One flag per token.
    """
    attempts = [a for a in response.actions if a.kind is ActionKind.SOLVE]
    mask = []
    for action in response.actions:
        length = action.stop - action.start
        if action.kind is ActionKind.VERIFY or (right and action is attempts[-1]):
            mask += [True] * length
        else:
            head = action.marker if markers else 0
            mask += [True] * head + [False] * (length - head)
    return mask


def verdict_tokens(pieces: Sequence[str], response: Response) -> list[bool]:
    """Tokens that hold the word of a verdict: what is decided after "Therefore, the answer is".

    Args:
        pieces: Text of each token, without the end token, that :func:`cut` was given.
        response: What it made of them.

    Returns:
        One flag per token, the end token included; none is set in a verification in other words.
    """
    found = [False] * response.actions[-1].stop
    for action in response.actions:
        if action.kind is not ActionKind.VERIFY:
            continue
        own = pieces[action.start : action.stop]
        said = list(_VERDICT.finditer("".join(own)))
        if said:
            begin, end = said[-1].span(1)
            starts = [0, *itertools.accumulate(len(piece) for piece in own)]
            first, last = _token_at(starts, begin), _token_at(starts, end - 1)
            found[action.start + first : action.start + last + 1] = [True] * (last - first + 1)
    return found


def behaviour(episodes: Sequence[Episode]) -> dict[str, float | int | None]:
    """The figures of appendix E, as shares between 0 and 1; None where there is nothing to count.

    Returns:
        ``accuracy``, ``first_accuracy``, ``verification_accuracy`` (VA), ``error_recall`` (ER), ``correct_recall``,
        ``correct_precision`` (CP), ``incorrect_to_correct`` (ICR), ``correct_to_incorrect`` (CIR), ``trials``,
        ``tokens``, ``ended``, ``well_formed``, ``repeated_retries`` (ours: share of attempts after the first that give
        an answer which the response has rejected before), and the counts behind them, named ``n_…``.
    """
    retries = [again for e in episodes for again in e.repeated or ()]
    pairs = [(right, said) for e in episodes for right, said in zip(e.right, e.verdicts)]
    wrong = [said for right, said in pairs if not right]
    correct = [said for right, said in pairs if right]
    accepted = [right for right, said in pairs if said is True]
    first_right = [e.final for e in episodes if e.right and e.right[0]]
    first_wrong = [e.final for e in episodes if not (e.right and e.right[0])]
    return {
        "accuracy": _share([e.final for e in episodes]),
        "first_accuracy": _share([bool(e.right) and e.right[0] for e in episodes]),
        "verification_accuracy": _share([said == right for right, said in pairs]),
        "error_recall": _share([said is False for said in wrong]),
        "correct_recall": _share([said is True for said in correct]),
        "correct_precision": _share(accepted),
        "incorrect_to_correct": _share(first_wrong),
        "correct_to_incorrect": _share([not final for final in first_right]),
        "trials": _mean([len(e.right) for e in episodes]),
        "tokens": _mean([e.tokens for e in episodes]),
        "ended": _share([e.ended for e in episodes]),
        "well_formed": _share([e.well_formed for e in episodes]),
        "repeated_retries": _share(retries),
        "n_problems": len(episodes),
        "n_verifications": len(pairs),
        "n_wrong_attempts": len(wrong),
        "n_accepted": len(accepted),
        "n_retries": len(retries),
        "n_first_wrong": len(first_wrong),
        "n_first_right": len(first_right),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(map(bool, flags)) / len(flags) if flags else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
