"""How many bits each node of a residual tree gets.

The error model: energy ``d_v`` appears at node v on top of what the parent left over, quantization leaves the share
``φ(b)``, so a model's error is ``Σ_{v on its path} d_v · Π_{u from v down to the model} φ(b_u)``, and a node costs
``size · (b + overhead)``. Minimise the weighted sum over models and matrices under a budget.

Two solvers. :func:`lagrangian` is exact for any price of a bit: the best cost below a node, as a function of the
error that arrives there, is the lower envelope of lines, computed once from the leaves up; the price is then found by
bisection over all trees together. The greedy one raises the node with the best gain per bit, several bits at once if
that pays. :func:`allocate` runs both on a few matrices, swaps pairs of widths and keeps the better.

No torch here; the numbers come in as plain floats.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmcompress.quant.tree import Tree

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One matrix and its tree.

    Attributes:
        tree: Which models share.
        energy: Energy that appears at each node, in the tree's pre-order, relative to the matrix's own.
        weight: Weight of each leaf's error, pre-order of nodes, 0 for internal nodes.
        size: Weights in the matrix (N·K).
        overhead: Bits per weight that a stored node costs beside its codes.
        prices: Width → bits that a node takes in all, padding included; computed from ``overhead`` when None.
    """

    tree: Tree
    energy: Sequence[float]
    weight: Sequence[float]
    size: int
    overhead: float
    prices: Mapping[int, float] | None = None

    def cost(self, bits: int) -> float:
        """Bits that a node of ``bits`` bits takes, in all."""
        if bits and self.prices is not None:
            return self.prices[bits]
        return self.size * (bits + self.overhead) if bits else 0.0

    def spent(self, bits: Bits) -> float:
        """Bits of all nodes."""
        return sum(self.cost(b) for b in bits)

    def error(self, bits: Bits, phi: Callable[[int], float]) -> float:
        """Weighted error of an allocation."""
        arriving = [0.0] * len(bits)
        total = 0.0
        for position in self.tree.preorder():
            parent = self.tree.parents[position]
            before = arriving[parent] if parent is not None else 0.0
            arriving[position] = phi(bits[position]) * (self.energy[position] + before)
            if self.tree.is_leaf(position):
                total += self.weight[position] * arriving[position]
        return total


@dataclass(frozen=True, slots=True)
class Choice:
    """Widths that nodes may take.

    Attributes:
        internal: For nodes above the leaves.
        leaf: For leaves; without 0 no fine-tune can be merged away.
        phi: Share of the energy that quantization to b bits leaves over; ``phi(0)`` is 1.

    Where leaves may store nothing, the root must store something, or a model could be left without any node.
    """

    internal: tuple[int, ...]
    leaf: tuple[int, ...]
    phi: Callable[[int], float]

    def of(self, problem: Problem, position: int) -> tuple[int, ...]:
        """Widths of one node."""
        if problem.tree.is_leaf(position):
            return self.leaf
        return tuple(filter(None, self.internal)) if position == 0 and 0 in self.leaf else self.internal

    def floor(self, problem: Problem) -> Bits:
        """The cheapest allocation."""
        return tuple(min(self.of(problem, p)) for p in problem.tree.preorder())


def allocate(problems: Sequence[Problem], choice: Choice, budget: float, solver: str = "lagrange") -> list[Bits]:
    """Spend a budget over all nodes of all matrices.

    Args:
        problems: One per matrix.
        choice: Allowed widths.
        budget: Bits in all (not per weight).
        solver: ``lagrange``, whose result the greedy one replaces where it is better, or ``greedy`` alone.

    Returns:
        Bits of each problem's nodes, in pre-order.

    Raises:
        ValueError: The budget does not pay for the smallest widths.
    """
    floor = [choice.floor(p) for p in problems]
    needed = sum(p.spent(b) for p, b in zip(problems, floor))
    if needed > budget * (1 + 1e-9):
        raise ValueError(f"the smallest widths take {needed:.0f} bits, the budget is {budget:.0f}")
    candidates = []
    if solver == "greedy" or len(problems) <= FEW:
        candidates.append(_Climb(problems, choice, budget, floor).run())
    if solver == "lagrange":
        candidates.append(_Climb(problems, choice, budget, lagrangian(problems, choice, budget)).run())
    if len(problems) <= FEW:
        candidates = [_swapped(problems, choice, budget, bits) for bits in candidates]
    return min(candidates, key=lambda found: sum(p.error(b, choice.phi) for p, b in zip(problems, found)))


# matrices up to which both solvers run and swaps are tried; with more, one node is a small part of the budget and
# the price finds the optimum to within it
FEW = 4


def lagrangian(problems: Sequence[Problem], choice: Choice, budget: float) -> list[Bits]:
    """The best allocation that is optimal for some price per bit and fits the budget."""
    low, high = 0.0, _highest_price(problems)
    best = [choice.floor(p) for p in problems]
    free = [best_for_price(p, choice, 0.0) for p in problems]
    if sum(p.spent(b) for p, b in zip(problems, free)) <= budget:
        return free
    for _ in range(60):
        price = (low + high) / 2
        found = [best_for_price(p, choice, price) for p in problems]
        if sum(p.spent(b) for p, b in zip(problems, found)) <= budget:
            best, high = found, price
        else:
            low = price
        if high - low <= 1e-9 * high:
            break
    return best


@dataclass(frozen=True, slots=True)
class _Line:
    """``value + slope · e``: cost below a node for incoming error e, with the widths that reach it (pre-order)."""

    slope: float
    value: float
    bits: Bits


def best_for_price(problem: Problem, choice: Choice, price: float) -> Bits:
    """Widths that minimise ``error + price · bits``, exactly.

    With error e arriving at node v, node and all below it cost at least::

        f_v(e) = min over b of  price · cost(b) + g_v(φ(b) (d_v + e))

    where ``g_v(e)`` is ``weight_v e`` at a leaf and elsewhere ``Σ f_c(e)`` over v's children c. Each f is the lowest of
    some lines in e (:class:`_Line`), so a few lines say all of it; the root's is read at ``e = 0``.
    """
    reach = sum(problem.energy)

    def below(position: int) -> list[_Line]:
        energy, lines = problem.energy[position], []
        children = [below(child) for child in problem.tree.children[position]]
        sums = [_Line(problem.weight[position], 0.0, ())]
        for envelope in children:
            pairs = [_Line(a.slope + b.slope, a.value + b.value, a.bits + b.bits) for a in sums for b in envelope]
            # a leaf's weight is 0 at internal nodes, so sums start from nothing
            sums = _envelope(pairs, reach)
        for bits in choice.of(problem, position):
            left = choice.phi(bits)
            price_here = price * problem.cost(bits)
            lines += [
                _Line(s.slope * left, s.value + s.slope * left * energy + price_here, (bits, *s.bits)) for s in sums
            ]
        return _envelope(lines, reach)

    return min(below(0), key=lambda line: line.value).bits


def _envelope(lines: list[_Line], reach: float) -> list[_Line]:
    """Lines that are lowest somewhere on ``[0, reach]``, from the left to the right."""
    lines = sorted(lines, key=lambda line: (line.value, line.slope))
    kept: list[_Line] = []
    at = 0.0
    current = lines[0]
    while True:
        kept.append(current)
        best_at, best_line = reach, None
        for line in lines:
            if line.slope < current.slope:
                meets = (line.value - current.value) / (current.slope - line.slope)
                if meets < best_at or (meets == best_at and best_line and line.slope < best_line.slope):
                    best_at, best_line = max(meets, at), line
        if best_line is None or best_at >= reach:
            return kept
        at, current = best_at, best_line


def _highest_price(problems: Sequence[Problem]) -> float:
    """A price at which every node takes its smallest width."""
    worst = 0.0
    for problem in problems:
        full = sum(problem.energy) * max(1e-30, sum(problem.weight))
        worst = max(worst, full / (problem.size * 0.5))
    return worst or 1.0


@dataclass
class _Climb:
    """Raise nodes by the best gain per bit until the budget is used up."""

    problems: Sequence[Problem]
    choice: Choice
    budget: float
    start: Sequence[Bits]
    bits: list[Bits] = field(default_factory=list)

    def run(self) -> list[Bits]:
        """Return the allocation."""
        self.bits = list(self.start)
        spent = sum(p.spent(b) for p, b in zip(self.problems, self.bits))
        heap: list[tuple[float, int, int, Bits]] = []
        version = [0] * len(self.problems)

        def push(index: int, room: float) -> None:
            step = self._best_step(index, room)
            if step is not None:
                heapq.heappush(heap, (-step[0], index, version[index], step[1]))

        for index in range(len(self.problems)):
            push(index, self.budget - spent)
        while heap:
            _, index, seen, bits = heapq.heappop(heap)
            if seen != version[index]:
                continue
            extra = self.problems[index].spent(bits) - self.problems[index].spent(self.bits[index])
            if spent + extra > self.budget * (1 + 1e-12):
                # what was affordable when it was found no longer is; look for a smaller step
                version[index] += 1
                push(index, self.budget - spent)
                continue
            self.bits[index] = bits
            spent += extra
            version[index] += 1
            push(index, self.budget - spent)
        return self.bits

    def _best_step(self, index: int, room: float) -> tuple[float, Bits] | None:
        """The raise of one node, or of two siblings, with the best gain per bit that fits into ``room``."""
        problem, bits = self.problems[index], self.bits[index]
        now, paid = problem.error(bits, self.choice.phi), problem.spent(bits)
        best: tuple[float, Bits] | None = None
        for changed in self._raises(problem, bits):
            extra = problem.spent(changed) - paid
            if extra <= 0 or extra > room * (1 + 1e-12):
                continue
            gain = (now - problem.error(changed, self.choice.phi)) / extra
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, changed
        return best

    def _raises(self, problem: Problem, bits: Bits) -> list[Bits]:
        found = []
        for position in problem.tree.preorder():
            for width in self.choice.of(problem, position):
                if width > bits[position]:
                    found.append((*bits[:position], width, *bits[position + 1 :]))
            children = problem.tree.children[position]
            if children:
                # a node becomes superfluous when both children are raised: its bits move down
                for width in self.choice.of(problem, position):
                    if width < bits[position]:
                        found += self._moved_down(problem, bits, position, width)
        return found

    def _moved_down(self, problem: Problem, bits: Bits, position: int, width: int) -> list[Bits]:
        found = []
        options = [[w for w in self.choice.of(problem, c) if w >= bits[c]] for c in problem.tree.children[position]]
        for left in options[0]:
            for right in options[1]:
                changed = list(bits)
                changed[position] = width
                for child, chosen in zip(problem.tree.children[position], (left, right)):
                    changed[child] = chosen
                found.append(tuple(changed))
        return found


def _swapped(problems: Sequence[Problem], choice: Choice, budget: float, start: Sequence[Bits]) -> list[Bits]:
    """Change two nodes of one matrix at a time while the error falls."""
    bits = list(start)
    spent = sum(p.spent(b) for p, b in zip(problems, bits))
    for index, problem in enumerate(problems):
        improved = True
        while improved:
            improved = False
            now, paid = problem.error(bits[index], choice.phi), problem.spent(bits[index])
            for changed in _pair_changes(problem, choice, bits[index]):
                extra = problem.spent(changed) - paid
                if spent + extra <= budget * (1 + 1e-12) and problem.error(changed, choice.phi) < now * (1 - 1e-12):
                    bits[index], spent, improved = changed, spent + extra, True
                    break
    return bits


def _pair_changes(problem: Problem, choice: Choice, bits: Bits) -> list[Bits]:
    found = []
    count = len(bits)
    for a in range(count):
        for b in range(a, count):
            for wa in choice.of(problem, a):
                for wb in choice.of(problem, b) if b != a else (wa,):
                    changed = list(bits)
                    changed[a], changed[b] = wa, wb
                    if tuple(changed) != bits:
                        found.append(tuple(changed))
    return found
