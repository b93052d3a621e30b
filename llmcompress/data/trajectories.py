"""Stage 0 of S2R: trial-and-error trajectories out of a model's own samples (paper section 2.2, appendix C)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from llmcompress.algorithms.self_verify import verdict_of
from llmcompress.data.actions import CHECK, RETRY, response
from llmcompress.data.problems.base import Problem, ProblemSet, boxed
from llmcompress.data.verifiers import Verifier
from llmcompress.section import Section


class KeepProbabilities(Section):
    """How many trajectories of each difficulty are kept. The paper names only the aim (cover one to four trials); these
    are the figures of the authors' tool, balanced by hand for their models.
    """

    all_right: float = Field(default=0.2394, ge=0, le=1)
    """Every sample is right: one trial."""

    few_wrong: float = Field(default=0.5, ge=0, le=1)
    """Up to a fifth of the samples is wrong: two trials."""

    some_wrong: float = Field(default=0.5, ge=0, le=1)
    """Up to three fifths are wrong: three trials."""

    most_wrong: float = Field(default=0.5, ge=0, le=1)
    """More are wrong: four trials."""

    fewer_trials: float = Field(default=1.0, ge=0, le=1)
    """There were fewer different wrong answers than the level asks for, so that the trajectory is shorter."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A training text.

    Attributes:
        problem: Key of the problem.
        question: Its text.
        response: The response without the end token.
        trials: Attempts in it.
        kind: ``trajectory`` (ends right), ``pair`` (one attempt, its verification and what follows at once),
            ``verification`` (that of a given attempt alone), ``given up`` (every attempt wrong) or ``solution``.
        ends: Whether the end token follows.
    """

    problem: str
    question: str
    response: str
    trials: int
    kind: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled solution: its text and whether its answer is right."""

    text: str
    right: bool

    @property
    def answer(self) -> str | None:
        """Content of its box."""
        return boxed(self.text)


def first_attempt(text: str) -> str:
    """The part of a sampled response before any marker: only attempts are building material."""
    places = [place for place in (text.find(CHECK.strip()), text.find(RETRY.strip())) if place >= 0]
    return text[: min(places)].rstrip("\n") if places else text


def level(wrong: int, samples: int) -> int:
    """Trials a problem of this difficulty should get: 1 to 4, by the share of wrong samples (0, ≤ 0.2, ≤ 0.6,
    above).
    """
    share = wrong / samples
    return 1 if wrong == 0 else 2 if share <= 0.2 + 1e-9 else 3 if share <= 0.6 + 1e-9 else 4


class Builder:
    """Makes trajectories and pairs.

    Args:
        problems: Checks answers.
        verifier: Writes verifications; one with a false verdict is dropped (the truth filter).
        keep: Probabilities.
        seed: Seed of all choices.
    """

    def __init__(self, problems: ProblemSet, verifier: Verifier, keep: KeepProbabilities, seed: int) -> None:
        self.problems, self.verifier, self.keep, self.seed = problems, verifier, keep, seed
        self.counts: Counter[str] = Counter()
        self._judged: tuple[Any, list[tuple[Sample, str]]] = (None, [])

    def usable(self, problem: Problem, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
        """One sample for each different answer, with a true verification; samples without an answer are left out.

        Judged and counted once for all rows that are made of a problem, one kind after the other.
        """
        asked = (problem.key, tuple(samples))
        if self._judged[0] != asked:
            self._judged = (asked, self._judge(problem, samples))
        return self._judged[1]

    def _judge(self, problem: Problem, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
        found: dict[str, tuple[Sample, str]] = {}
        for sample in samples:
            answer = sample.answer
            if answer is None or answer in found:
                continue
            text = self.verifier.write(problem, answer)
            if text is None or verdict_of(text) != sample.right:
                self.counts["verifications dropped"] += 1
                continue
            found[answer] = (sample, text)
        return list(found.values())

    def trajectories(self, problem: Problem, samples: Sequence[Sample], count: int) -> list[Trajectory]:
        """Up to ``count`` different trajectories of a problem: other wrong attempts, another order, another solution.

        The paper builds one. One for each problem, repeated for many epochs, teaches a small model that very attempt;
        others of the same problem teach it to try what it has not tried yet.
        """
        usable = self.usable(problem, samples)
        if not any(sample.right for sample, _ in usable):
            self.counts["no right sample"] += 1
            return []
        found = [self._trajectory(problem, samples, usable, number) for number in range(count)]
        return list({row.response: row for row in found if row is not None}.values())

    def _trajectory(
        self, problem: Problem, samples: Sequence[Sample], usable: Sequence[tuple[Sample, str]], number: int
    ) -> Trajectory | None:
        """Wrong trials first, all answers different, the last one right; None when it is not kept."""
        rng = random.Random(f"{self.seed}:trajectory:{problem.key}" + (f":{number}" if number else ""))
        right = [pair for pair in usable if pair[0].right]
        wrong = [pair for pair in usable if not pair[0].right]
        wanted = level(sum(not sample.right for sample in samples), len(samples))
        keep = self.keep
        probability = (keep.all_right, keep.few_wrong, keep.some_wrong, keep.most_wrong)[wanted - 1]
        used = min(wanted - 1, len(wrong))
        if used < wanted - 1:
            # none at all (all wrong samples without an answer) is the easiest level, a few are a shorter trajectory
            probability = keep.fewer_trials if used else keep.all_right
        if rng.random() >= probability:
            self.counts["not kept"] += 1
            return None
        trials = [*rng.sample(wrong, used), rng.choice(right)]
        text = response([(sample.text, check) for sample, check in trials])
        return Trajectory(problem.key, problem.question, text, len(trials), "trajectory")

    def single(self, problem: Problem, samples: Sequence[Sample]) -> Trajectory | None:
        """A right attempt, accepted at once, of a problem whose trajectory begins with a wrong one; None elsewhere.

        Trajectories train attempts that follow others. What holds for the first one is trained with this row: the same
        right sample that the control trains.
        """
        right = [pair for pair in self.usable(problem, samples) if pair[0].right]
        if not right or all(sample.right for sample in samples):
            return None
        rng = random.Random(f"{self.seed}:single:{problem.key}")
        sample, check = rng.choice(right)
        return Trajectory(problem.key, problem.question, response([(sample.text, check)]), 1, "trajectory")

    def given_up(self, problem: Problem, samples: Sequence[Sample], trials: int) -> Trajectory | None:
        """``trials`` wrong attempts, all rejected, and the end: a search has a last trial. None where no sample is
        wrong.

        Where there are fewer different wrong answers some come twice, as they do in responses.
        """
        wrong = [pair for pair in self.usable(problem, samples) if not pair[0].right]
        if not wrong:
            return None
        rng = random.Random(f"{self.seed}:given up:{problem.key}")
        chosen = rng.sample(wrong, min(trials, len(wrong))) + rng.choices(wrong, k=max(0, trials - len(wrong)))
        text = response([(sample.text, check) for sample, check in chosen])
        return Trajectory(problem.key, problem.question, text, trials, "given up")

    def pairs(self, problem: Problem, samples: Sequence[Sample]) -> list[Trajectory]:
        """Every different attempt with its verification: warm-up rows for verification alone.

        After "incorrect" the retry marker follows, after "correct" the end, so that the transition is learned with it.
        """
        return [
            Trajectory(
                problem.key, problem.question, f"{sample.text}{CHECK}{check}{'' if sample.right else RETRY}", 1, "pair",
                ends=sample.right,
            )
            for sample, check in self.usable(problem, samples)
        ]  # fmt: skip

    def solution(self, problem: Problem, samples: Sequence[Sample]) -> Trajectory | None:
        """A right sample alone: the control "SFT on solutions only"."""
        right = [sample for sample in samples if sample.right]
        if not right:
            return None
        rng = random.Random(f"{self.seed}:solution:{problem.key}")
        return Trajectory(problem.key, problem.question, rng.choice(right).text, 1, "solution")


def by_problem(rows: Sequence[Trajectory], share: float, seed: int) -> tuple[list[Trajectory], list[Trajectory]]:
    """Rows in two parts that have no problem in common, each in the order of ``rows``: what stays, and the rows of
    about ``share`` of the problems, by seed: one at least and all but one at most, none where there is only one.
    """
    problems = sorted({row.problem for row in rows})
    count = min(max(1, round(share * len(problems))), max(0, len(problems) - 1))
    chosen = set(random.Random(f"{seed}:validation").sample(problems, count))
    return [row for row in rows if row.problem not in chosen], [row for row in rows if row.problem in chosen]


def some(rows: Sequence[Trajectory], count: int, seed: int) -> list[Trajectory]:
    """``count`` of the rows by seed, or all of them where there are fewer."""
    return random.Random(f"{seed}:some").sample(list(rows), min(count, len(rows)))


def balanced_pairs(pairs: Sequence[Trajectory], count: int, seed: int) -> list[Trajectory]:
    """``count`` pairs, as many right as wrong attempts where there are enough, by seed."""
    rng = random.Random(f"{seed}:pairs")
    right, wrong = ([pair for pair in pairs if pair.ends is ends] for ends in (True, False))
    each = min(len(right), len(wrong), (count + 1) // 2)
    chosen = rng.sample(right, each) + rng.sample(wrong, each)
    rng.shuffle(chosen)
    return chosen[:count]


def trial_counts(rows: Sequence[Trajectory]) -> Mapping[str, int]:
    """Trajectories by number of trials."""
    counts = Counter(row.trials for row in rows if row.kind == "trajectory")
    return {str(trials): counts[trials] for trials in sorted(counts)}
