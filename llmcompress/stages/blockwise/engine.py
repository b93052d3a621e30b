"""The engine of all quantizing stages: block after block, durable, resumable.

For each block: materialise it, run the full-precision stream through it (only where a router hook wants it), put in
what earlier stages made of it, let the visitor quantize it while the quantized stream runs, write
the result durably, release it. After a kill, finished blocks are read back and only run, which gives
the same activations again.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llmcompress.distributed.balance import shares
from llmcompress.distributed.world import World
from llmcompress.durable import write_durably
from llmcompress.errors import InputError, RecipeError
from llmcompress.models import sizes
from llmcompress.models.memory_limits import DEFAULT, Limits, rounds
from llmcompress.models.visitor import Onlooker
from llmcompress.quant.spec import QuantPlan
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.blockwise.estimate import limits_for
from llmcompress.stages.blockwise.rules import RuleConfig, plain_rules
from llmcompress.stages.blockwise.shared_statistics import SharedMoments, gather, shared_moments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.algorithms.router_calibration import RouterUpdate
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.router import Router
    from llmcompress.models.stream_pairs import StreamRecorder
    from llmcompress.models.walker import Walker
    from llmcompress.stages.blockwise.method import Method
    from llmcompress.stages.blockwise.quantizer import QuantizerConfig
    from llmcompress.stages.state import RunContext, RunState


class RouterHook(Protocol):
    """Sees the router's input in both streams, block by block, and may replace the router."""

    def observe(self, block: Block, router: Router, x: Tensor) -> None:
        """Full-precision stream: the original router and its input ``[T, H]``."""

    def calibrate(self, block: Block, router: Router, x_hat: Tensor) -> RouterUpdate:
        """Quantized stream: its input ``[T, H]``; attention is quantized, the routed experts are not yet."""


class BlockwiseQuantizer:
    """Quantizes a model block by block.

    Args:
        handle: The source model.
        plan: Plan name → spec; may be empty when only routers are calibrated.
        method: How to quantize.
        store: Where finished blocks go; its ``base`` is what earlier stages made.
        ctx: The run.
        calibration: Needed by GPTQ and by router hooks.
        hook: Diagnoses or calibrates routers.
        limits: Memory the walker may take.
    """

    def __init__(
        self,
        handle: ModelHandle,
        plan: QuantPlan,
        method: Method,
        store: PackedStore,
        ctx: RunContext,
        *,
        calibration: CalibrationSet | None = None,
        hook: RouterHook | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.limits = limits
        samples = 0 if calibration is None else len(calibration.tokens)
        self.world = ctx.world.cut(samples)
        self.handle, self.plan, self.method = handle, plan, method
        self.store, self.ctx, self.calibration, self.hook = store, ctx, calibration, hook
        self.shared: SharedMoments | None = None

    def run(self) -> None:
        """Quantize every block that is not finished yet.

        Raises:
            InputError: Weights or activations contain NaN or infinity, or the result falls short of the plan.
            RecipeError: A weight is already quantized by an earlier stage.
        """
        self._refuse_overlap()
        blocks = self.handle.layout.blocks
        finished = set(self.ctx.world.tell(sorted(self.store.finished())))
        if len(finished) < len(blocks):
            if self.ctx.world.rank == 0:
                self._note_environment(bool(finished))
            self._walk(finished)
            # the last block is on disk before any rank looks for it
            self.ctx.world.barrier()
        lacking = sorted(set(self.plan) - set(self.store.plan()))
        if lacking:
            raise InputError(
                f"{self.store.root}: {len(lacking)} planned weights were not quantized, first {lacking[0]}",
                "delete this stage's folder and run again",
            )

    def _walk(self, finished: set[int]) -> None:
        import torch

        from llmcompress.models.assemble import apply_loan, apply_patch

        if self.ctx.world.size > 1:
            # processes read a block at about the same time: what one has brought is there for the others
            self.handle.checkpoint.read_once(False)
        model = self.handle.skeleton(getattr(torch, self.ctx.dtype), head=False)
        streams = self.calibration is not None and (self.method.hessians or self.hook is not None)
        walker, quantized, full = None, None, None
        if streams:
            assert self.calibration is not None
            walker = self._walker(model, self.calibration.tokens)
            quantized = walker.embed([block.name for block in self.handle.layout.blocks])
            self._gather_shared(model, walker, quantized)
            full = walker.cache.copy(quantized) if self.hook is not None or self._targets else None
        self.handle.free_embeddings(model)
        total = len(self.handle.layout.blocks)
        for block in self.handle.layout.blocks:
            if walker is None and block.index in finished:
                continue
            done = block.index in finished
            if not done:
                self.ctx.emit("block_start", index=block.index, total=total)
            started = time.monotonic()
            self.handle.load_block(model, block.index, self.ctx.device)
            last = not (set(range(block.index + 1, total)) - finished)
            recorder = None if done else self._recorder(block, walker)
            if full is not None and walker is not None:
                observer = None if done else _Observer(block, self.hook, self.world)
                walker.forward(block, full, observer, not last, recorder)
            patch = self.store.read_block(block.index) if done else self.store.below(block.index)
            apply_patch(model, self.handle.layout, patch)
            apply_loan(model, self.handle.layout, block, self.store)
            if done:
                assert walker is not None
                assert quantized is not None
                if not last:
                    walker.forward(block, quantized)
            else:
                record = self._quantize(model, block, walker, quantized, recorder, started, not last)
                self.ctx.emit("block_end", index=block.index, total=total, **record)
            self.handle.free_block(model, block.index)
            if last:
                break
        if self.shared is not None and self.world.rank == 0:
            self.shared.path.unlink(missing_ok=True)

    def _gather_shared(self, model: PreTrainedModel, walker: Walker, hidden: Tensor) -> None:
        """Add up statistics of weights that several blocks run, unless an earlier part of the run has."""
        from llmcompress.models.walker import Walker

        if not self.method.hessians:
            return
        self.shared = shared_moments(self.handle.layout, self.plan, self.ctx.stage_dir)
        if self.shared is None:
            return
        if self.world.rank == 0 and not self.shared.path.exists():
            self.ctx.emit("note", text=f"adding up inputs of {len(self.shared.first)} shared weights over all uses")
            everything, start = walker, walker.cache.copy(hidden)
            if self.world.pooled:
                # few weights, so one process sums over the windows of all
                assert self.calibration is not None
                everything = Walker(
                    model, self.calibration.tokens, self.ctx.device, self.ctx.seed,
                    limits=self.limits, folder=self._spill,
                )  # fmt: skip
                start = everything.embed([block.name for block in self.handle.layout.blocks])
            gather(self.handle, model, self.plan, everything, start, self.shared)
        self.ctx.world.barrier()

    @property
    def _spill(self) -> Path:
        """Where activations beyond ``host.ram`` go."""
        return self.ctx.stage_dir / "activations"

    def _walker(self, model: PreTrainedModel, tokens: Tensor) -> Walker:
        """A walker on this rank's windows."""
        from llmcompress.models.walker import Walker

        if not self.world.pooled:
            return Walker(model, tokens, self.ctx.device, self.ctx.seed, limits=self.limits, folder=self._spill)
        own = [shares(len(tokens), self.world.shards)[shard] for shard in self.world.own_shards()]
        first, stop = own[0].start, own[-1].stop
        walker = Walker(
            model, tokens[first:stop], self.ctx.device, self.ctx.seed,
            limits=self.limits, folder=self._spill, shards=[len(shard) for shard in own],
        )  # fmt: skip
        walker.first_token, walker.all_tokens = first * tokens.shape[1], tokens.numel()
        return walker

    def _quantize(
        self,
        model: PreTrainedModel,
        block: Block,
        walker: Walker | None,
        hidden: Tensor | None,
        recorder: StreamRecorder | None,
        started: float,
        advance: bool,
    ) -> dict[str, Any]:
        """Quantize one block, write it, return the figures of its event."""
        from llmcompress.models.stream_pairs import StreamPairs
        from llmcompress.stages.blockwise.block_solver import BlockSolver

        make: Callable[..., BlockSolver] = BlockSolver
        if self.world.pooled:
            from llmcompress.stages.blockwise.pooled_solver import PooledSolver

            make = partial(PooledSolver, self.world)
        pairs = None if recorder is None else StreamPairs(recorder, model)
        solver = make(
            self.handle, model, block, self.plan, self.method,
            hook=self.hook, pairs=pairs, warn=lambda text: self.ctx.emit("warning", text=text),
        )  # fmt: skip
        solver.limits, solver.shared = self.limits, self.shared
        if walker is not None and hidden is not None:
            walker.forward(block, hidden, solver, advance, pairs)
        else:
            solver.visit_without_data()
        # an empty entry would hide the errors of the stage below
        record = {key: value for key, value in solver.record.items() if key != "errors" or value}
        record = {**record, "seconds": round(time.monotonic() - started, 3)}
        if self.world.rank == 0:
            self.store.write_block(block.index, BlockPatch(solver.packed, solver.replaced, record))
        errors = list(solver.record["errors"].values())
        return {"seconds": record["seconds"], "error": sum(errors) / len(errors) if errors else 0.0}

    @property
    def _targets(self) -> bool:
        """Whether weights are fitted to the full-precision stream."""
        return self.method.hessians and self.method.target_ridge is not None

    def _recorder(self, block: Block, walker: Walker | None) -> StreamRecorder | None:
        """Keeps the full-precision inputs of one block, where they are needed."""
        if not self._targets or walker is None:
            return None
        import torch

        from llmcompress.models.stream_pairs import StreamRecorder

        tokens = walker.all_tokens or walker.tokens.numel()
        values = sizes.recorded_width(block, self.plan) * tokens
        round_them = rounds(values, walker.model.dtype.itemsize)
        kept = torch.bfloat16 if round_them else None
        return StreamRecorder(self.plan, walker.cache, kept, self.method.residuals)

    def _refuse_overlap(self) -> None:
        below = {} if self.store.base is None else self.store.base.plan()
        both = sorted(set(below) & set(self.plan))
        if both:
            raise RecipeError(
                f"stages.{self.ctx.stage}.rules: {both[0]} and {len(both) - 1} more weights are already quantized",
                "exclude them with a rule that has keep: true, placed first",
            )

    def _note_environment(self, resumed: bool) -> None:
        """Results are bit-identical for equal threads, dtype and solvers; say so when they changed within a run."""
        import torch

        path = self.ctx.stage_dir / "engine.json"
        now = {"threads": torch.get_num_threads(), "dtype": self.ctx.dtype, "device": self.ctx.device}
        now |= self.method.revision(self.ctx.device)
        if self.hook is not None:
            from llmcompress.algorithms.router_calibration import REVISION as ROUTER_REVISION

            now["router_solver"] = ROUTER_REVISION
        if self.world.pooled:
            now["shards"] = self.world.shards
        if resumed and path.exists():
            before = json.loads(path.read_text())
            if before != now:
                what = "blocks may differ in their last bits from those of an unbroken run"
                if any(before.get(key) != now.get(key) for key in ("solver", "router_solver")):
                    what = "finished blocks are of another solver; --force begins the run again"
                self.ctx.emit("warning", text=f"resumed with {now}, begun with {before}: {what}")
        write_durably(path, json.dumps(now, sort_keys=True).encode())


class _Observer(Onlooker):
    """Visitor of the full-precision stream: shows router inputs to the hook, changes nothing."""

    def __init__(self, block: Block, hook: RouterHook | None, world: World) -> None:
        self.block, self.hook, self.world = block, hook, world

    def router(self, bank: Any, router: Router, x: Tensor) -> None:
        """Pass the router's input on."""
        if self.hook is not None:
            everything = self.world.gather_rows(x)
            if everything is not None:
                self.hook.observe(self.block, router, everything)


def check_rules(stage: str, rules: dict[str, RuleConfig], layout: ModelLayout) -> list[str]:
    """Problems of a stage's rules on this model, as messages with their place in the recipe."""
    from llmcompress.quant.rules import problems

    return [f"stages.{stage}.{text}" for text in problems(plain_rules(rules), layout)]


def run_blockwise(config: QuantizerConfig, state: RunState, ctx: RunContext, hook: RouterHook | None = None) -> None:
    """Run a quantizing stage and attach its store to the run state.

    Args:
        config: The stage's config.
        state: Needs a model, and a calibration set where the method needs Hessians.
        ctx: The run.
        hook: Router hook; when None and ``diagnose_experts`` is set, expert shift is recorded on MoE models.
    """
    assert state.model is not None
    store = PackedStore(ctx.stage_dir / "blocks", state.packed)
    method = config.method()
    if method.hessians:
        state.calibrated(ctx.stage)
    if hook is None and getattr(config, "diagnose_experts", False) and state.calibration is not None:
        hook = _shift_recorder(state.model.layout)
    limits = limits_for(config, plan_inputs(state, ctx), hessians=method.hessians)
    plan: QuantPlan = {}
    if ctx.world.rank == 0:
        plan = planned(config, state, ctx, method, limits)
    ctx.world.barrier()
    if ctx.world.rank > 0:
        # widths that had to be measured are in a file by now
        plan = planned(config, state, ctx, method, limits)
    engine = BlockwiseQuantizer(
        state.model, plan, method, store, ctx, calibration=state.calibration, hook=hook, limits=limits
    )
    engine.run()
    state.packed = store


def plan_inputs(state: RunState, ctx: RunContext) -> PlanInputs:
    """What estimates look at, from a run in progress."""
    import torch

    assert state.model is not None
    samples, length = (0, 0) if state.calibration is None else state.calibration.tokens.shape
    stored, computed = state.model.checkpoint.dtype, getattr(torch, ctx.dtype)
    exact = sizes.held_exactly(str(stored).removeprefix("torch."), ctx.dtype)
    return PlanInputs(
        state.model.layout, stored.itemsize, computed.itemsize, samples, length, {}, ctx.device, ctx.ram, exact
    )  # fmt: skip


def attach_store(state: RunState, ctx: RunContext) -> None:
    """Put a finished stage's store back into the run state."""
    state.packed = PackedStore(ctx.stage_dir / "blocks", state.packed)


def planned(config: QuantizerConfig, state: RunState, ctx: RunContext, method: Method, limits: Limits) -> QuantPlan:
    """The stage's plan; ``auto`` widths are measured once and kept in ``bits.json``."""
    from llmcompress.quant.rules import auto_units, resolve

    assert state.model is not None
    layout = state.model.layout
    rules = plain_rules(config.rules)
    units = auto_units(rules, layout)
    if not units:
        return resolve(rules, layout)
    path = ctx.stage_dir / "bits.json"
    if path.exists():
        return resolve(rules, layout, json.loads(path.read_text()))
    from llmcompress.stages.blockwise.bit_measurement import choose_widths

    chosen = choose_widths(units, state, ctx, second_order=method.hessians, limits=limits)
    write_durably(path, json.dumps(chosen, sort_keys=True).encode())
    return resolve(rules, layout, chosen)


def _shift_recorder(layout: ModelLayout) -> RouterHook | None:
    if all(block.bank is None for block in layout.blocks):
        return None
    from llmcompress.evaluation.expert_shift import ShiftRecorder

    recorder: RouterHook = ShiftRecorder()
    return recorder
