"""How a model solves, verifies and corrects: responses to held-out problems, judged action by action."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.self_verify import ActionKind, Episode, Response, behaviour, cut, judge, verdict_of
from llmcompress.data.actions import CHECK, CORRECT, INCORRECT
from llmcompress.data.problems.base import Problem, ProblemSet, boxed
from llmcompress.distributed.world import ALONE, World
from llmcompress.errors import InputError
from llmcompress.evaluation.sampling import Sampling, sample, why_batched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
# what a tokenizer shows for the first bytes of a character, and how many tokens a character can have
_HALF, _LONGEST_CHARACTER = "\ufffd", 8
# of the control at equal tokens
MOST_SAMPLES = 64
# responses of each kind whose texts are kept
SHOWN = 3


@dataclass(frozen=True)
class Reader:
    """Turns problems into prompts and token ids into judged responses.

    Attributes:
        tokenizer: The model's.
        problems: Checks answers.
        chat: Render through the tokenizer's chat template; otherwise the question and a line feed.
        system: System line of the chat template; none where it is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    problems: ProblemSet
    chat: bool = False
    system: str = SYSTEM
    _pieces: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def end(self) -> int:
        """Id of the end token.

        Raises:
            InputError: The tokenizer has none.
        """
        found = self.tokenizer.eos_token_id
        if not isinstance(found, int):
            raise InputError("the tokenizer has no end token", "set eos_token in tokenizer_config.json")
        return found

    @property
    def pad(self) -> int:
        """Id for padding."""
        found = self.tokenizer.pad_token_id
        return found if isinstance(found, int) else self.end

    def prompt(self, question: str) -> list[int]:
        """Token ids that a response follows.

        Raises:
            InputError: ``chat`` is set and the tokenizer has no chat template, or one that refuses the turns.
        """
        if not self.chat:
            return self._begun(f"{question}\n")
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("chat is set, but the tokenizer has no chat template", "set chat: false")
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": question})
        from jinja2 import TemplateError

        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            hint = 'system: "" leaves the system line out' if self.system else "set chat: false"
            raise InputError(f"the chat template refuses the prompt: {error}", hint) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begun(self, text: str) -> list[int]:
        """Token ids of a text behind the token that begins every text, where the tokenizer puts one there: Gemma's and
        Llama's models have seen no text without. An end that it puts behind the text would end the prompt.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer(text)["input_ids"])
        places = (n for n in range(len(whole) - len(ids) + 1) if whole[n : n + len(ids)] == ids)
        return [*whole[: next(places, 0)], *ids]

    def tokens(self, text: str, following: str = "") -> list[int]:
        """Token ids of a text as it is tokenized in front of another one: the last line feeds of a text are one token
        to SmolLM2's tokenizer and others, in front of a letter they are two. Where no token ends between the two, those
        of the text alone.
        """
        alone = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not following:
            return alone
        whole = list(self.tokenizer(text + following, add_special_tokens=False)["input_ids"])
        ends = list(itertools.accumulate(map(len, self.pieces(whole))))
        return whole[: ends.index(len(text)) + 1] if len(text) in ends else alone

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, so that the pieces together are the decoded text.

        A token that completes a character begun by earlier ones gets the whole character, those before it get nothing.
        """
        alone = [self._alone(token) for token in ids]
        if "".join(alone) == self._text(ids):
            return alone
        found, done, start = [], "", 0
        for stop in range(1, len(ids) + 1):
            text = self._text(ids[start:stop])
            if text.endswith(_HALF) and stop < len(ids) and stop - start < _LONGEST_CHARACTER:
                found.append("")
                continue
            found.append(text[len(done) :])
            # two tokens of context keep leading spaces right at a cost that does not grow with the length
            start = stop if text.endswith(_HALF) else max(0, stop - 2)
            done = self._text(ids[start:stop]) if start < stop else ""
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _alone(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._text([token])
        return self._pieces[token]

    def text(self, ids: Sequence[int]) -> str:
        """Text of a response without special tokens."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )  # fmt: skip

    def read(self, ids: Sequence[int]) -> Response:
        """Cut response ids into actions."""
        ended = bool(ids) and ids[-1] == self.end
        return cut(self.pieces(ids[:-1] if ended else ids), ended)

    def answers(self, response: Response) -> list[str | None]:
        """Content of each attempt's own box. Boxes in verifications are never read."""
        return [boxed(action.text) for action in response.actions if action.kind is ActionKind.SOLVE]

    def right(self, problem: Problem, response: Response) -> list[bool]:
        """Whether each attempt's answer is right."""
        return [self.problems.check(problem, answer) for answer in self.answers(response)]

    def judge(self, problem: Problem, ids: Sequence[int], right: list[bool] | None = None) -> Episode:
        """Cut and judge; ``right`` tells of each attempt where that is known already."""
        response = self.read(ids)
        right = self.right(problem, response) if right is None else right
        return judge(response, right, len(ids), self.answers(response))


def verdicts(
    world: World, reader: Reader, problems: Sequence[Problem], responses: Sequence[Sequence[int]]
) -> list[list[bool]] | list[None]:
    """Whether each attempt of each response is right, told by one process to all: a checker with a time limit need not
    say the same twice. None for each where there is one process, which may as well judge when it needs to.

    Args:
        world: The processes.
        reader: Judges.
        problems: Problem of each response.
        responses: Token ids.
    """
    if world.size == 1:
        return [None] * len(responses)
    return world.spread(len(responses), lambda i: reader.right(problems[i], reader.read(responses[i])))


@dataclass(frozen=True, slots=True)
class Measured:
    """Episodes of a model on problems, in the problems' order, with the texts.

    Attributes:
        episodes: Judged responses.
        texts: Texts of the responses.
        declined: Why transformers' modules wrote them, None where the native engine did.
    """

    episodes: list[Episode]
    texts: list[str]
    declined: str | None = None

    def figures(self) -> dict[str, float | int | None]:
        """See :func:`~llmcompress.algorithms.self_verify.behaviour`."""
        return behaviour(self.episodes)


def measure(
    model: PreTrainedModel, reader: Reader, problems: Sequence[Problem], sampling: Sampling, seed: int = 0,
    world: World = ALONE,
) -> Measured:  # fmt: skip
    """Let a model answer problems and judge what it writes.

    Args:
        model: In evaluation mode.
        reader: Prompts and judgement.
        problems: Which problems.
        sampling: Temperature 0 is the paper's setting.
        seed: For temperatures above 0.
        world: The processes that share the work.
    """
    from llmcompress.inference.greedy import GreedyWriter

    prompts = [reader.prompt(problem.question) for problem in problems]
    writer = GreedyWriter(model)
    responses = sample(model, prompts, sampling, reader.end, reader.pad, seed, world, writer)
    known = verdicts(world, reader, problems, responses)
    episodes = [reader.judge(problem, ids, right) for problem, ids, right in zip(problems, responses, known)]
    texts = [reader.text(ids) for ids in responses]
    return Measured(episodes, texts, why_batched(model, sampling) or writer.reason)


def verify_given(
    model: PreTrainedModel, reader: Reader, problems: Sequence[Problem], attempts: Sequence[str], sampling: Sampling
) -> list[bool | None]:
    """What a model says of attempts that are given to it, greedily: the verdict of the verification that it writes
    behind each, None where it gives none. A model that never verifies by itself is asked as well.

    Args:
        model: In evaluation mode.
        reader: Prompts.
        problems: What each attempt answers.
        attempts: Texts.
        sampling: Sampling of the verifications.
    """
    prompts = [
        [*reader.prompt(problem.question), *reader.tokens(attempt + CHECK, attempt)]
        for problem, attempt in zip(problems, attempts, strict=True)
    ]
    found = sample(model, prompts, replace(sampling, temperature=0.0), reader.end, reader.pad, 0)
    return [_first_verdict(reader.text(ids)) for ids in found]


def _first_verdict(text: str) -> bool | None:
    """That of the first sentence that gives one: a model that was not taught what follows may write anything then."""
    places = {text.find(told): told for told in (CORRECT, INCORRECT) if told in text}
    return verdict_of(places[min(places)] if places else text)


def majority(
    model: PreTrainedModel,
    reader: Reader,
    problems: Sequence[Problem],
    sampling: Sampling,
    budget: float,
    seed: int = 0,
    world: World = ALONE,
) -> dict[str, float]:
    """The control at equal tokens: sample answers until a problem has cost ``budget`` tokens on average, then vote.

    Only first attempts vote, and only their tokens count: sampling would stop there. Answers that the task's checker
    takes for one (``1/2`` and ``0.5``) have their votes together. Ties go to the answer that came first. ``best_of`` is
    the share of problems that any sample solves, the ceiling of a perfect verifier over the same samples. After
    :data:`MOST_SAMPLES` of each problem it ends in any case.

    Args:
        model: In evaluation mode.
        reader: Prompts and judgement.
        problems: Which problems.
        sampling: With a temperature above 0.
        budget: Tokens per problem that the model under comparison spends.
        seed: Seed of the samples.
        world: The processes that share the work.

    Returns:
        ``accuracy``, ``best_of``, ``samples`` and ``tokens`` per problem.
    """
    votes: list[dict[str, int]] = [{} for _ in problems]
    solved = [False] * len(problems)
    prompts = [reader.prompt(problem.question) for problem in problems]
    spent, rounds = 0, 0
    while spent < budget * len(problems) and rounds < MOST_SAMPLES:
        responses = sample(model, prompts, sampling, reader.end, reader.pad, seed + 7919 * (rounds + 1), world)
        rounds += 1
        for index, (problem, ids) in enumerate(zip(problems, responses)):
            attempt = reader.read(ids).actions[0]
            spent += attempt.stop
            answer = boxed(attempt.text)
            if answer is not None:
                _vote(votes[index], problem, answer, reader.problems)
                solved[index] |= reader.problems.check(problem, answer)
    # of equal counts max takes the first
    right = sum(bool(v) and reader.problems.check(p, max(v, key=v.__getitem__)) for p, v in zip(problems, votes))
    count = max(1, len(problems))
    return {
        "accuracy": right / count, "best_of": sum(solved) / count, "samples": float(rounds), "tokens": spent / count,
    }  # fmt: skip


def _vote(votes: dict[str, int], problem: Problem, answer: str, judge: ProblemSet) -> None:
    """Count an answer for the first one that it is the same as."""
    known = answer if answer in votes else next((old for old in votes if judge.same(problem, old, answer)), answer)
    votes[known] = votes.get(known, 0) + 1


def choose(problems: Sequence[Problem], count: int | None, seed: int) -> list[Problem]:
    """``count`` problems by seed, in their own order; all of them for None or a larger count."""
    if count is None or count >= len(problems):
        return list(problems)
    picked = random.Random(f"{seed}:choose").sample(range(len(problems)), count)
    return [problems[index] for index in sorted(picked)]


def paired_test(
    before: Sequence[bool], after: Sequence[bool], problems: Sequence[Hashable] | None = None
) -> float:  # fmt: skip
    """Two-sided exact test of two models on the same problems: how often chance alone makes a difference as large.

    If nothing tells the models apart, they may change places on any problem. With one pair of answers to a problem this
    is McNemar's exact test. Pairs of one problem (several seeds) change places together: a problem that one model finds
    easier it finds easier with most seeds, so that they are not that many independent trials. What another seed of the
    training would give is not asked: that is for the spread over seeds.

    Args:
        before: Whether each answer of one model was right.
        after: The same of the other, to the same problems.
        problems: What each pair answers; None where no problem comes twice.

    Returns:
        The probability, 1 where the models agree everywhere.
    """
    gained: Counter[Hashable] = Counter()
    for problem, old, new in zip(problems or range(len(before)), before, after, strict=True):
        gained[problem] += new - old
    found = abs(sum(gained.values()))
    # signed sum → number of ways to it
    ways: Counter[int] = Counter({0: 1})
    for size, count in sorted(Counter(abs(net) for net in gained.values()).items()):
        if size == 0:
            continue
        # of `count` problems that each weigh `size`, `won` go one way
        own = {size * (2 * won - count): comb(count, won) for won in range(count + 1)}
        grown: Counter[int] = Counter()
        for (one, left), (two, right) in itertools.product(ways.items(), own.items()):
            grown[one + two] += left * right
        ways = grown
    return sum(count for total, count in ways.items() if abs(total) >= found) / sum(ways.values())


def write_episodes(path: Path, problems: Sequence[Problem], measured: Measured) -> None:
    """Keep every verdict and some texts (right at once, corrected, broken, failed) for the report and for paired
    tests.
    """
    from llmcompress.durable import write_durably

    kinds: dict[str, list[dict[str, Any]]] = {"right": [], "corrected": [], "broken": [], "failed": []}
    for problem, episode, text in zip(problems, measured.episodes, measured.texts):
        first = bool(episode.right) and episode.right[0]
        kind = ("right" if first else "corrected") if episode.final else ("broken" if first else "failed")
        if len(kinds[kind]) < SHOWN:
            kinds[kind].append({"kind": kind, "question": problem.question, "response": text})
    data = {
        "final": [episode.final for episode in measured.episodes],
        "first": [bool(episode.right) and episode.right[0] for episode in measured.episodes],
        "keys": [problem.key for problem in problems],
        "texts": [row for rows in kinds.values() for row in rows],
    }
    write_durably(path, json.dumps(data, ensure_ascii=False).encode())
