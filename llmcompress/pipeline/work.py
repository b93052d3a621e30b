"""Seconds of a quantizing stage's parts on one process: counted from the layout, divided by measured rates. Torch-free.

Every function names what the engine does, counts it, and divides by one rate of :class:`~llmcompress.pipeline.rates.
Rates`; there are no other factors. What depends on the data is taken as follows: tokens spread evenly over the experts,
and where K of a router's calibration is measured it is the least that the search tries.

Legend: E experts, N rows, K columns, H hidden size, T tokens, S shards of the calibration set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from llmcompress.distributed.balance import shares
from llmcompress.models import sizes
from llmcompress.models.heap import MAPPED
from llmcompress.models.layout import Block, ExpertBank, Sublayer
from llmcompress.models.memory_limits import FORCED_TOKENS, Limits, kept_bytes
from llmcompress.pipeline.rates import Rates, rate_at
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.blockwise.estimate import BATCH_TOKENS, CPU_TURN, CUDA_BATCH_TOKENS, Job
from llmcompress.stages.blockwise.method import RarePolicy

# messages of a sum of whole numbers on all processes, which is no single one
COUNTS = 3
# bytes of the matrix of all tokens' products, and tokens held out, in a router's fit: algorithms/router_calibration.py
PRODUCTS_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """How calibration tokens pass through one process.

    Attributes:
        tokens: Tokens of this process.
        length: Length of a window.
        batches: Batches of this process, of each sublayer.
        shards: Shards of this process, whose statistics are kept apart.
        heads: Attention heads.
    """

    tokens: int
    length: int
    batches: int
    shards: int
    heads: int

    @classmethod
    def of(cls, windows: int, length: int, shards: int, heads: int, cuda: bool = False) -> Run:
        """So many windows, cut into shards; no batch spans two."""
        rows = max(1, (CUDA_BATCH_TOKENS if cuda else BATCH_TOKENS) // max(length, 1))
        batches = sum(ceil(len(shard) / rows) for shard in shares(windows, shards))
        return cls(windows * length, length, batches, shards, heads)


@dataclass(frozen=True, slots=True)
class Passed:
    """What a sublayer's pass consists of.

    Attributes:
        products: Seconds of products with weights, and of routers' choices.
        pairs: Pairs of tokens, over all heads.
        values: That enter or leave products.
        batches: That were run.
        pieces: Projections of an expert that were run on some tokens.
    """

    products: float = 0.0
    pairs: float = 0.0
    values: float = 0.0
    batches: float = 0.0
    pieces: float = 0.0

    def __add__(self, other: Passed) -> Passed:
        return Passed(
            self.products + other.products, self.pairs + other.pairs, self.values + other.values,
            self.batches + other.batches, self.pieces + other.pieces,
        )  # fmt: skip

    def times(self, number: float) -> Passed:
        """So many of them."""
        return Passed(
            self.products * number, self.pairs * number, self.values * number, self.batches * number,
            self.pieces * number,
        )  # fmt: skip

    def seconds(self, rates: Rates, hidden: int, width: int) -> float:
        """Time, for a hidden size and a number of values per attention head."""
        found = self.products + self.values / rate_at(rates.moved, hidden)
        found += self.pairs / rate_at(rates.attention, width) if self.pairs else 0.0
        return found + self.batches * rates.batch + self.pieces * rates.piece


def product(tokens: float, rows: int, columns: int, rates: Rates) -> float:
    """Seconds of ``[T, K] @ [K, N]``: as fast as the narrower side allows."""
    return 2.0 * tokens * rows * columns / rate_at(rates.product, min(rows, columns))


def head_width(block: Block, heads: int) -> int:
    """Values per head of a block's attention, 1 where it has none."""
    for sublayer in block.sublayers:
        if sublayer.kind == "attention":
            return max(1, next((g.linears[0].in_features for g in sublayer.groups if g.position == "last"), 0) // heads)
    return 1


def inside(sublayer: Sublayer, run: Run, rates: Rates, hidden: int) -> Passed:
    """Everything of a sublayer but its experts and its last projection; of a MoE router and shared experts.

    Hidden states pass through a norm, are held, added to and searched for NaN; of a MoE also cleared and copied.
    """
    bank = sublayer.experts
    found = Passed(values=float((4 if bank is None else 6) * run.tokens * hidden), batches=run.batches)
    for group in sublayer.groups:
        if group.position != "last" or bank is not None:
            found += _group(group, run, rates)
            if sublayer.kind == "attention":  # queries and keys are rotated, everything is laid out by heads
                found += Passed(values=float(run.tokens * sum(linear.out_features for linear in group.linears)))
    if sublayer.kind == "attention":
        found += Passed(pairs=float(run.tokens * run.length * run.heads))
    if bank is not None:
        chosen = product(run.tokens, bank.num_experts, bank.width, rates)
        chosen += run.tokens * bank.num_experts / rates.routed
        found += Passed(products=chosen, values=float(run.tokens * bank.width))
    return found


def last_projection(sublayer: Sublayer, run: Run, rates: Rates) -> Passed:
    """The last projection of attention, mixer or dense MLP."""
    found = Passed()
    for group in sublayer.groups:
        if group.position == "last" and sublayer.experts is None:
            found += _group(group, run, rates)
    return found


def _group(group: Any, run: Run, rates: Rates) -> Passed:
    columns = group.linears[0].in_features
    rows = sum(linear.out_features for linear in group.linears)
    products = sum(product(run.tokens, linear.out_features, columns, rates) for linear in group.linears)
    return Passed(products=products, values=run.tokens * (rows + columns))


def first_projections(bank: ExpertBank, run: Run, rates: Rates) -> Passed:
    """Gate and up projections of all experts, on the tokens that are routed to them."""
    chosen = run.tokens * bank.top_k
    return Passed(
        products=product(chosen, bank.first_rows, bank.hidden, rates),
        values=float(chosen * (bank.hidden + bank.first_rows + bank.intermediate)),
        pieces=_pieces(bank, run),
    )


def down_projections(bank: ExpertBank, run: Run, rates: Rates) -> Passed:
    """Down projections of all experts, weighted and added up."""
    chosen = run.tokens * bank.top_k
    return Passed(
        products=product(chosen, bank.hidden, bank.intermediate, rates),
        values=2.0 * chosen * bank.hidden,
        pieces=_pieces(bank, run),
    )


def _pieces(bank: ExpertBank, run: Run) -> float:
    """Experts that see tokens, of each shard apart."""
    return float(run.shards * min(bank.num_experts, run.tokens * bank.top_k // run.shards))


class BlockWork:
    """Seconds of a block's parts on one process.

    Args:
        block: Which block.
        job: What the stage does.
        inputs: What it finds.
        limits: Memory it may take.
        run: The tokens of this process.
        ranks: Processes.
        shards: Shards of the calibration set, over all of them.
        rates: Rates of one of them.
    """

    def __init__(
        self, block: Block, job: Job, inputs: PlanInputs, limits: Limits, run: Run, ranks: int, shards: int,
        rates: Rates,
    ) -> None:  # fmt: skip
        self.block, self.job, self.inputs, self.limits, self.run = block, job, inputs, limits, run
        self.ranks, self.shards, self.rates, self.pooled = ranks, shards, rates, shards > 1
        self.hidden, self.width = inputs.layout.hidden, head_width(block, run.heads)
        self.everyone = inputs.samples * inputs.length

    # ---- what has two streams: the forward passes ----

    def forward(self, last: bool) -> float:
        """Forward passes; of the last block only what statistics need is run."""
        found = Passed()
        if self.job.streams:
            found += self._quantized_stream(last)
        if self.job.streams > 1:
            found += self._full_stream(last)
        return found.seconds(self.rates, self.hidden, self.width)

    def _full_stream(self, last: bool) -> Passed:
        """The full-precision stream: up to the router in the last block."""
        found, final = Passed(), self.block.sublayers[-1]
        for sublayer in self.block.sublayers:
            needed = not (last and sublayer is final)
            if needed or sublayer.experts is not None or self.job.targets:
                found += inside(sublayer, self.run, self.rates, self.hidden)
            if needed:
                found += last_projection(sublayer, self.run, self.rates)
                bank = sublayer.experts
                if bank is not None:
                    found += first_projections(bank, self.run, self.rates)
                    found += down_projections(bank, self.run, self.rates)
        return found

    def _quantized_stream(self, last: bool) -> Passed:
        """The stream in which weights are quantized; inputs that are not kept are computed twice."""
        found, final = Passed(), self.block.sublayers[-1]
        run, rates, item = self.run, self.rates, self.inputs.compute_bytes
        for sublayer in self.block.sublayers:
            needed = not (last and sublayer is final)
            once = inside(sublayer, run, rates, self.hidden)
            ends = [g for g in sublayer.groups if g.position == "last" and sublayer.experts is None]
            planned = any(linear.name in self.job.plan for g in ends for linear in g.linears)
            kept = all(kept_bytes(run.tokens * g.linears[0].in_features, item) <= self.limits.keep for g in ends)
            twice = self.job.hessians and planned and needed and not kept
            found += once.times(2 if twice else 1)
            if needed:
                found += last_projection(sublayer, run, rates)
            bank = sublayer.experts
            if bank is None:
                continue
            counted = self.job.hessians and bank.down in self.job.plan
            chunk = self.chunks()[0]
            rows = run.tokens * bank.top_k * chunk // bank.num_experts
            kept = rows * bank.intermediate * item <= self.limits.keep
            passes = int(counted) + int(needed and not (counted and kept))
            found += first_projections(bank, run, rates).times(passes)
            found += down_projections(bank, run, rates) if needed else Passed()
        return found

    def chunks(self) -> list[int]:
        """Experts in each of :meth:`Limits.chunks`."""
        bank = self.block.bank
        if bank is None:
            return []
        chunks = self.limits.chunks(bank.num_experts, bank.hidden, bank.intermediate)
        return [chunk.stop - chunk.start for chunk in chunks]

    # ---- second moments ----

    def moments(self) -> float:
        """Sums of ``x xᵀ``, and with targets of ``(x − x̂) x̂ᵀ``; gathered inputs of experts included."""
        found, rates, run = 0.0, self.rates, self.run
        moved = rate_at(rates.moved, self.hidden)
        for _, count, columns, tokens, drift in self._inputs_of_weights():
            routed = count > 1
            found += 2.0 * tokens * columns**2 / rate_at(rates.hessian, columns)
            if routed:
                found += tokens * columns / moved + run.shards * count * rates.piece
            squares = count * run.shards * columns**2
            found += squares / rates.squares + self._fresh(4 * squares)
            if self.job.targets:
                # the inputs of the full-precision stream come from memory, their difference is formed and multiplied
                found += 3.0 * tokens * columns / moved + 2.0 * tokens * columns * (columns + drift) / rate_at(
                    rates.product, columns
                )
                found += self._fresh(4 * count * run.shards * columns * (columns + drift))
                found += 2 * run.shards * count * rates.piece if routed else 0.0
        bank = self.block.bank
        if bank is not None and self.job.targets and bank.down in self.job.plan:
            found += first_projections(bank, run, rates).seconds(rates, self.hidden, self.width)
        return found + self._rare()

    def _inputs_of_weights(self) -> Iterator[tuple[int, int, int, float, int]]:
        """Rows, matrices, columns, tokens of this process and width of the drift, of weights that share inputs."""
        for sublayer in self.block.sublayers:
            for group in sublayer.groups:
                rows = sum(linear.out_features for linear in group.linears if linear.name in self.job.plan)
                if rows:
                    drift = self._drift(sublayer) if group.position == "last" and sublayer.experts is None else 0
                    yield rows, 1, group.linears[0].in_features, self.run.tokens, drift
            bank = sublayer.experts
            for name in (bank.gate_up, bank.down) if bank is not None else ():
                if bank is not None and name in self.job.plan:
                    experts, rows, columns = bank.shape(name)
                    drift = self._drift(sublayer) if name == bank.down and bank.entry is None else 0
                    yield rows, experts, columns, self.run.tokens * bank.top_k, drift

    def _drift(self, sublayer: Sublayer) -> int:
        return self.hidden if self.job.residuals and sublayer.post_norm is None else 0

    def _rare(self) -> float:
        """Moments that are mixed in where experts see too few tokens: of all tokens, through each of them."""
        bank, found = self.block.bank, 0.0
        if bank is None:
            return 0.0
        seen, needed = self.everyone * bank.top_k / bank.num_experts, RarePolicy().needed
        if bank.gate_up in self.job.plan and seen < needed(bank.hidden):
            found += 2.0 * self.run.tokens * bank.hidden**2 / rate_at(self.rates.hessian, bank.hidden)
        if bank.down in self.job.plan and seen < needed(bank.intermediate):
            tokens = min(self.everyone, FORCED_TOKENS) / self.ranks * bank.num_experts
            found += product(tokens, bank.first_rows, bank.hidden, self.rates)
            found += 2.0 * tokens * bank.intermediate**2 / rate_at(self.rates.hessian, bank.intermediate)
            found += 2 * self.run.shards * bank.num_experts * self.rates.piece
        return found

    # ---- solves ----

    def solves(self) -> tuple[float, float]:
        """Solves: seconds of those that follow one another, and of one expert's, all projections together."""
        serial = one = 0.0
        chunk = self.chunks()[0] if self.block.bank is not None else 1
        for rows, count, columns, _, drift in self._inputs_of_weights():
            together = 1 if self.pooled else min(count, chunk)
            turn = min(together, max(1, CPU_TURN // (4 * rows * columns)))
            each = self._solve(rows, columns, drift) + self.rates.matrix / turn
            each += self._fresh(5 * rows * columns * together) / together
            if self.pooled:
                each += (
                    self.shards
                    * columns
                    * (columns + (columns + drift if self.job.targets else 0))
                    / (self.rates.squares)
                )
            serial, one = (serial + each, one) if count == 1 else (serial, one + each)
        return serial, one

    def _solve(self, rows: int, columns: int, drift: int) -> float:
        rates, values = self.rates, rows * columns
        found = columns**3 / rate_at(rates.factor, columns) + rows * columns**2 / rate_at(rates.columns, columns)
        if self.job.targets:
            found += (columns**3 / 3 + 4.0 * rows * columns**2) / rate_at(rates.fit, columns)
        return found + values / rates.packed

    def rounding(self, grid: str) -> float:
        """Rounding to nearest of everything planned."""
        values, rates = self._planned_values(), self.rates
        return values / (rates.searched if grid == "mse" else rates.rounded)

    def unpacking(self) -> float:
        """What every process decodes of what all have solved."""
        return self._planned_values() / self.rates.packed if self.pooled else 0.0

    def _planned_values(self) -> int:
        shapes = {linear.name: (linear.out_features, linear.in_features) for linear in self.block.linears()}
        bank = self.block.bank
        found = dict[str, tuple[int, ...]](shapes)
        if bank is not None:
            found |= {name: bank.shape(name) for name in (bank.gate_up, bank.down)}
        return sum(prod(shape) for name, shape in found.items() if name in self.job.plan)

    # ---- files ----

    def read(self) -> float:
        """The block's weights from the checkpoint, which every process reads."""
        values, inputs, rates = sizes.block_parameters(self.block), self.inputs, self.rates
        values += sizes.borrowed_parameters(self.block)
        cached = sizes.model_bytes(inputs.layout, {}, inputs.weight_bytes) <= rates.cache
        return values * (inputs.compute_bytes / rates.read + (0.0 if cached else inputs.weight_bytes / rates.disk))

    def write(self) -> float:
        """The packed block, durably."""
        return sizes.packed_block_bytes(self.block, self.job.plan) / self.rates.written + self.rates.flush

    def _fresh(self, size: float) -> float:
        """Memory that is touched for the first time; small pieces come from what was freed before."""
        return size / self.rates.memory if size >= MAPPED else 0.0

    # ---- routers ----

    def router(self, fields: Any) -> float:
        """Fit of the block's router, on every token, which the first process does alone."""
        bank = self.block.bank
        if bank is None or not getattr(fields, "calibrate", False):
            return 0.0
        rates, width, experts = self.rates, bank.width, bank.num_experts
        tokens = self.everyone * (1 - getattr(fields, "holdout", 0.0))
        asked = getattr(fields, "k", None)
        considered = min(experts, asked) if isinstance(asked, int) else least_k(experts, bank.top_k)
        # logits of the original, of its residual and of the new router; inputs are copied for the fit
        found = 3 * product(self.everyone, experts, width, rates) + self.everyone * experts / rates.select
        found += 2.0 * tokens * width / rate_at(rates.moved, width)
        if considered == experts:
            return found + product(tokens, width, width, rates) + width**3 / rate_at(rates.factor, width)
        own = tokens * considered / experts
        if own >= width:
            found += experts * (product(own, width, width, rates) + width**3 / rate_at(rates.factor, width))
            found += experts * own * width / rate_at(rates.moved, width)
            return found + self._fresh(8 * experts * width**2)
        size = max(1, int(own))
        if tokens**2 <= 2 * experts * own**2 and 4 * tokens**2 <= PRODUCTS_BYTES:
            found += product(tokens, int(tokens), width, rates) / 2 + self._fresh(4 * tokens**2)
            found += experts * (own * tokens / rate_at(rates.moved, width) + self._fresh(4 * own * tokens))
        else:
            found += experts * product(own, size, width, rates)
        # inputs and the system are gathered, the latter copied and its factor read twice
        each = own * (width + own) / rate_at(rates.moved, width) + 3 * own**2 / rates.squares
        each += self._fresh(4 * own * width)
        return found + experts * (each + own**3 / rate_at(rates.factor, own) + rates.piece)

    # ---- messages ----

    def traffic(self, fields: Any) -> tuple[float, float]:
        """Bytes over all links, and messages one after another, for this block."""
        if self.ranks == 1:
            return 0.0, 0.0
        # of a sum all shards but the owner's travel to it, each as a shape and its values
        remote = self.shards - self.shards / self.ranks
        kinds = 2 if self.job.targets else 1
        data = messages = 0.0
        for _, count, columns, _, drift in self._inputs_of_weights() if self.job.hessians else ():
            squares = columns * (columns + (columns + drift if self.job.targets else 0))
            data += count * remote * squares * sizes.HESSIAN_BYTES
            messages += count * remote * 2 * kinds + COUNTS
            # header and two or three tensors of each matrix, then its error, from every owner
            messages += 3.0 * count + 4 * (1 if count == 1 else self.ranks)
        data += (self.ranks - 1) * sizes.packed_block_bytes(self.block, self.job.plan)
        bank = self.block.bank
        if bank is not None and getattr(fields, "calibrate", False):
            per_stream = self.everyone * bank.width * self.inputs.compute_bytes
            data += self.job.streams * per_stream * (self.ranks - 1) / self.ranks
            messages += 2 * self.job.streams * (self.ranks - 1) + 4
        return data, messages


def least_k(experts: int, top_k: int) -> int:
    """The smallest K that ``auto`` tries, see ``auto_k`` of algorithms/router_calibration.py."""
    return experts if experts <= 8 else min(experts, 4 * ceil(2 * top_k / 4))


def heads_of(config: Mapping[str, Any]) -> int:
    """Attention heads of a ``config.json``, also where the text model is a part of it; 1 where it names none."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, Mapping) else config).get("num_attention_heads")
    return int(found) if isinstance(found, int) and found > 0 else 1
