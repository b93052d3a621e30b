"""Templated word problems: two or three steps with people, goods and prices; exact answers, verification by
substitution.

The templates are our own. Numbers are chosen so that every quantity on the way is a whole number above zero. How hard
they are is a matter of ``sizes``: an attempt divides or multiplies a long number in one step, while the brief
verification works in columns (:mod:`~llmcompress.data.problems.columns`), so that it is the easier of the two however
long the numbers are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmcompress.data.problems.arithmetic import whole_number
from llmcompress.data.problems.base import BOX, SHARES, Problem, Split, split_of
from llmcompress.data.problems.columns import column_product, column_sum

NAMES = (
    "Ana",
    "Ben",
    "Chloe",
    "David",
    "Elif",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kemi",
    "Liam",
    "Mona",
    "Noor",
)
GOODS = ("apples", "books", "cards", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")


Values = dict[str, int]


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of story.

    Attributes:
        name: Part of the key.
        draw: Makes the numbers, this many times as large as the smallest.
        story: Question; formatted with the numbers, ``who``, ``other`` and ``things``.
        answer: The value asked for.
        solution: Steps without a box.
        check: Steps that put ``answer`` back into the story and end with what must agree.
        brief_solution, brief_check: The same in formulas; see :class:`WordProblems`.
    """

    name: str
    draw: Callable[[random.Random, int], Values]
    story: str
    answer: Callable[[Values], int]
    solution: Callable[[Values], str]
    check: Callable[[Values, int], str]
    brief_solution: Callable[[Values], str]
    brief_check: Callable[[Values, int], str]


def _factor(r: random.Random, largest: int, size: int) -> int:
    # in larger problems one factor stays a digit, so that what is hard is the other's length
    return r.randint(2, largest if size == 1 else 9)


def _shopping(r: random.Random, size: int) -> Values:
    n, price = _factor(r, 12, size), r.randint(2, 15 * size)
    return {"n": n, "price": price, "paid": n * price + r.randint(1, 40 * size)}


def _sharing(r: random.Random, size: int) -> Values:
    friends, each, rest = _factor(r, 9, size), r.randint(2, 15 * size), r.randint(1, 20 * size)
    return {"total": friends * each + rest, "rest": rest, "friends": friends}


def _saving(r: random.Random, size: int) -> Values:
    weekly, start, weeks = _factor(r, 20, size), r.randint(1, 60 * size), r.randint(3, 12 * size)
    return {"start": start, "weekly": weekly, "goal": start + weekly * weeks}


def _twice(r: random.Random, size: int) -> Values:
    small, more = r.randint(3, 40 * size), r.randint(1, 20 * size)
    return {"more": more, "total": 2 * small + more}


TEMPLATES = (
    Template(
        "change", _shopping, "{who} buys {n} {things} at {price} dollars each and pays with {paid} dollars. How many "
        "dollars of change does {who} get?",
        lambda v: v["paid"] - v["n"] * v["price"],
        lambda v: f"The price is {v['n']} * {v['price']} = {v['n'] * v['price']}. "
        f"The change is {v['paid']} - {v['n'] * v['price']} = {v['paid'] - v['n'] * v['price']}.",
        lambda v, x: f"Price and change together: {v['n']} * {v['price']} = {v['n'] * v['price']}, and "
        f"{v['n'] * v['price']} + {x} = {v['n'] * v['price'] + x}. The payment was {v['paid']}.",
        lambda v: f"{v['n']}*{v['price']}={v['n'] * v['price']}; {v['paid']}-{v['n'] * v['price']}="
        f"{v['paid'] - v['n'] * v['price']}.",
        lambda v, x: f"{column_product(v['n'], v['price'])}; {column_sum(v['n'] * v['price'], x)}; paid {v['paid']}.",
    ),
    Template(
        "share", _sharing, "{who} has {total} {things}, keeps {rest} of them and shares the others equally among "
        "{friends} friends. How many {things} does each friend get?",
        lambda v: (v["total"] - v["rest"]) // v["friends"],
        lambda v: f"To share: {v['total']} - {v['rest']} = {v['total'] - v['rest']}. "
        f"Each: {v['total'] - v['rest']} / {v['friends']} = {(v['total'] - v['rest']) // v['friends']}.",
        lambda v, x: f"Give them back: {v['friends']} * {x} = {v['friends'] * x}, and {v['friends'] * x} + "
        f"{v['rest']} = {v['friends'] * x + v['rest']}. At the start there were {v['total']}.",
        lambda v: f"{v['total']}-{v['rest']}={v['total'] - v['rest']}; {v['total'] - v['rest']}/{v['friends']}="
        f"{(v['total'] - v['rest']) // v['friends']}.",
        lambda v, x: f"{column_product(v['friends'], x)}; {column_sum(v['friends'] * x, v['rest'])}; had {v['total']}.",
    ),
    Template(
        "saving", _saving, "{who} has {start} dollars and saves {weekly} dollars every week. After how many weeks does "
        "{who} have {goal} dollars?",
        lambda v: (v["goal"] - v["start"]) // v["weekly"],
        lambda v: f"Missing: {v['goal']} - {v['start']} = {v['goal'] - v['start']}. "
        f"Weeks: {v['goal'] - v['start']} / {v['weekly']} = {(v['goal'] - v['start']) // v['weekly']}.",
        lambda v, x: f"After {x} weeks: {x} * {v['weekly']} = {x * v['weekly']}, and {v['start']} + {x * v['weekly']} "
        f"= {v['start'] + x * v['weekly']}. The goal is {v['goal']}.",
        lambda v: f"{v['goal']}-{v['start']}={v['goal'] - v['start']}; {v['goal'] - v['start']}/{v['weekly']}="
        f"{(v['goal'] - v['start']) // v['weekly']}.",
        lambda v, x: f"{column_product(v['weekly'], x)}; {column_sum(v['weekly'] * x, v['start'])}; goal {v['goal']}.",
    ),
    Template(
        "sum", _twice, "{who} and {other} have {total} {things} together, and {who} has {more} more than {other}. How "
        "many {things} does {other} have?",
        lambda v: (v["total"] - v["more"]) // 2,
        lambda v: f"Without the surplus: {v['total']} - {v['more']} = {v['total'] - v['more']}. "
        f"Half of it: {v['total'] - v['more']} / 2 = {(v['total'] - v['more']) // 2}.",
        lambda v, x: f"The other one has {x} + {v['more']} = {x + v['more']}, together {x} + {x + v['more']} = "
        f"{2 * x + v['more']}. It should be {v['total']}.",
        lambda v: f"{v['total']}-{v['more']}={v['total'] - v['more']}; {v['total'] - v['more']}/2="
        f"{(v['total'] - v['more']) // 2}.",
        lambda v, x: f"{column_sum(x, v['more'])}; {column_sum(x + v['more'], x)}; together {v['total']}.",
    ),
)  # fmt: skip
_BY_NAME = {template.name: template for template in TEMPLATES}


@dataclass(frozen=True)
class WordProblems:
    """``count`` different word problems, drawn once from ``seed``.

    Attributes:
        count: Problems of all splits together.
        seed: Seed of the problems themselves.
        sizes: How many times as large the numbers are; each problem takes one of these.
        brief: Write solutions and verifications in formulas alone, verifications in columns.
    """

    count: int = 4000
    seed: int = 0
    sizes: tuple[int, ...] = (1,)
    brief: bool = False

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        rng = random.Random(f"word problems:{self.seed}")
        found: dict[Split, list[Problem]] = {split: [] for split in SHARES}
        seen: set[str] = set()
        for _ in range(20 * self.count):
            if len(seen) == self.count:
                break
            template = rng.choice(TEMPLATES)
            values = template.draw(rng, self.sizes[0] if len(self.sizes) == 1 else rng.choice(self.sizes))
            # names and goods are surface: the same numbers in another dress are the same problem
            key = f"{template.name}:{','.join(map(str, values.values()))}"
            who, other = rng.sample(NAMES, 2)
            question = template.story.format(**values, who=who, other=other, things=rng.choice(GOODS))
            if key in seen:
                continue
            seen.add(key)
            data = {"template": template.name, "values": values}
            found[split_of(key)].append(Problem(key, question, str(template.answer(values)), data))
        return found

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split."""
        return self._splits[split]

    def check(self, problem: Problem, answer: str | None) -> bool:
        """Whether a whole number, with or without a dollar sign, is the value."""
        return _value(answer or "") == int(problem.answer)

    def same(self, problem: Problem, first: str, second: str) -> bool:
        """Whether both are the same whole number."""
        value = _value(first)
        return value is not None and value == _value(second)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """The steps, then the value in its box."""
        template = _BY_NAME[problem.data["template"]]
        steps = (template.brief_solution if self.brief else template.solution)(problem.data["values"])
        return f"{steps} {BOX}{problem.answer}}}"

    def read_back(self, problem: Problem, rng: random.Random) -> tuple[str, str]:
        """An attempt, right or with a slip in its last step as often, and what putting its answer back gives: no
        verdict.
        """
        answer = int(problem.answer)
        given = answer if rng.random() < 0.5 else _slip(answer, rng)
        text = self.solution(problem, rng)
        # the answer stands at the end of the last step and in the box behind it
        steps = text.rsplit(problem.answer, 2)[0]
        return f"{steps}{given}. {BOX}{given}}}", self.check_steps(problem, str(given))

    def check_steps(self, problem: Problem, answer: str) -> str:
        """Put the answer back into the story."""
        value = _value(answer)
        if value is None:
            return "This is not a whole number."
        template = _BY_NAME[problem.data["template"]]
        return (template.brief_check if self.brief else template.check)(problem.data["values"], value)


def _slip(value: int, rng: random.Random) -> int:
    """Another whole number that is not negative: a digit too large or too small at some place, or a near number."""
    while True:
        place = 10 ** rng.randrange(len(str(value)))
        found = value + rng.choice((-1, 1)) * (place if rng.random() < 0.7 else rng.randint(2, 30))
        if found >= 0:
            return found


def _value(answer: str) -> int | None:
    """The whole number of an answer, with or without a dollar sign."""
    return whole_number(answer.replace("\\$", "").replace("$", ""))
