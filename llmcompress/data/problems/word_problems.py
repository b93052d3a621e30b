"""Templated word problems: two or three steps with people, goods and prices; exact answers, verification by
substitution.

The templates are our own. Numbers are chosen so that every quantity on the way is a whole number above zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmcompress.data.problems.arithmetic import whole_number
from llmcompress.data.problems.base import BOX, SHARES, Problem, Split, split_of

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


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of story.

    Attributes:
        name: Part of the key.
        draw: Makes the numbers.
        story: Question; formatted with the numbers, ``who``, ``other`` and ``things``.
        answer: The value asked for.
        solution: Steps without a box.
        check: Steps that put ``answer`` back into the story and end with what must agree.
    """

    name: str
    draw: Callable[[random.Random], dict[str, int]]
    story: str
    answer: Callable[[dict[str, int]], int]
    solution: Callable[[dict[str, int]], str]
    check: Callable[[dict[str, int], int], str]


def _shopping(r: random.Random) -> dict[str, int]:
    n, price = r.randint(2, 12), r.randint(2, 15)
    return {"n": n, "price": price, "paid": n * price + r.randint(1, 40)}


def _sharing(r: random.Random) -> dict[str, int]:
    friends, each, rest = r.randint(2, 9), r.randint(2, 15), r.randint(1, 20)
    return {"total": friends * each + rest, "rest": rest, "friends": friends}


def _saving(r: random.Random) -> dict[str, int]:
    weekly, start, weeks = r.randint(2, 20), r.randint(1, 60), r.randint(3, 12)
    return {"start": start, "weekly": weekly, "goal": start + weekly * weeks}


def _twice(r: random.Random) -> dict[str, int]:
    small, more = r.randint(3, 40), r.randint(1, 20)
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
    ),
    Template(
        "share", _sharing, "{who} has {total} {things}, keeps {rest} of them and shares the others equally among "
        "{friends} friends. How many {things} does each friend get?",
        lambda v: (v["total"] - v["rest"]) // v["friends"],
        lambda v: f"To share: {v['total']} - {v['rest']} = {v['total'] - v['rest']}. "
        f"Each: {v['total'] - v['rest']} / {v['friends']} = {(v['total'] - v['rest']) // v['friends']}.",
        lambda v, x: f"Give them back: {v['friends']} * {x} = {v['friends'] * x}, and {v['friends'] * x} + "
        f"{v['rest']} = {v['friends'] * x + v['rest']}. At the start there were {v['total']}.",
    ),
    Template(
        "saving", _saving, "{who} has {start} dollars and saves {weekly} dollars every week. After how many weeks does "
        "{who} have {goal} dollars?",
        lambda v: (v["goal"] - v["start"]) // v["weekly"],
        lambda v: f"Missing: {v['goal']} - {v['start']} = {v['goal'] - v['start']}. "
        f"Weeks: {v['goal'] - v['start']} / {v['weekly']} = {(v['goal'] - v['start']) // v['weekly']}.",
        lambda v, x: f"After {x} weeks: {x} * {v['weekly']} = {x * v['weekly']}, and {v['start']} + {x * v['weekly']} "
        f"= {v['start'] + x * v['weekly']}. The goal is {v['goal']}.",
    ),
    Template(
        "sum", _twice, "{who} and {other} have {total} {things} together, and {who} has {more} more than {other}. How "
        "many {things} does {other} have?",
        lambda v: (v["total"] - v["more"]) // 2,
        lambda v: f"Without the surplus: {v['total']} - {v['more']} = {v['total'] - v['more']}. "
        f"Half of it: {v['total'] - v['more']} / 2 = {(v['total'] - v['more']) // 2}.",
        lambda v, x: f"The other one has {x} + {v['more']} = {x + v['more']}, together {x} + {x + v['more']} = "
        f"{2 * x + v['more']}. It should be {v['total']}.",
    ),
)  # fmt: skip
_BY_NAME = {template.name: template for template in TEMPLATES}


@dataclass(frozen=True)
class WordProblems:
    """``count`` different word problems, drawn once from ``seed``.

    Attributes:
        count: Problems of all splits together.
        seed: Of the problems themselves.
    """

    count: int = 4000
    seed: int = 0

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        rng = random.Random(f"word problems:{self.seed}")
        found: dict[Split, list[Problem]] = {split: [] for split in SHARES}
        seen: set[str] = set()
        for _ in range(20 * self.count):
            if len(seen) == self.count:
                break
            template = rng.choice(TEMPLATES)
            values = template.draw(rng)
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
        return whole_number((answer or "").replace("\\$", "").replace("$", "")) == int(problem.answer)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """The steps, then the value in its box."""
        steps = _BY_NAME[problem.data["template"]].solution(problem.data["values"])
        return f"{steps} {BOX}{problem.answer}}}"

    def check_steps(self, problem: Problem, answer: str) -> str:
        """Put the answer back into the story."""
        value = whole_number(answer.replace("\\$", "").replace("$", ""))
        if value is None:
            return "This is not a whole number."
        return _BY_NAME[problem.data["template"]].check(problem.data["values"], value)
