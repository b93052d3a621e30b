"""The engine of ``esr``: two streams through the model, Mamba-2 mixers tuned block by block, durable and resumable.

The full-precision stream runs the original blocks and gives targets. The quantized stream runs what earlier stages
made of them, with every state stored after every token. A mixer is tuned just before the quantized stream
passes through it, so later blocks see what is left of its error. After a kill finished blocks are read back and only
run, which gives the same activations again.

Legend: S sequences, L length, D hidden size, H heads, P channels, N states.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models import sizes
from llmcompress.quant.states import SCALE, StateSpec
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.stages.base import Estimate, PlanInputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from llmcompress.algorithms.state_reconstruction import Group, Rounder
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ScanView, Sublayer
    from llmcompress.models.walker import Walker
    from llmcompress.stages.esr import EsrConfig
    from llmcompress.stages.state import RunContext

SELECTIVE = ("A_log", "D", "conv1d.weight", "conv1d.bias", "norm.weight")
PROJECTIONS = ("in_proj.weight", "out_proj.weight")


@dataclass(slots=True)
class Target:
    """What the full-precision stream shows of one mixer.

    Attributes:
        hidden: ``[S, L, D]`` the stream's hidden states before the block.
        output: ``[S, L, D]`` the mixer's outputs.
        scanned: ``[S, L, H, P]`` its scan's outputs.
    """

    hidden: Tensor
    output: Tensor
    scanned: Tensor


class Reconstructor:
    """Tunes the Mamba-2 mixers of a model.

    Args:
        config: The recipe section.
        handle: The source model.
        calibration: Sequences.
        policy: How states are stored, as the ``dsq`` stage left it.
        store: Where tuned blocks go; its ``base`` is what earlier stages made.
        ctx: The run.
    """

    def __init__(
        self,
        config: EsrConfig,
        handle: ModelHandle,
        calibration: CalibrationSet,
        policy: Mapping[str, Any],
        store: PackedStore,
        ctx: RunContext,
    ) -> None:
        self.config, self.handle, self.calibration = config, handle, calibration
        self.policy, self.store, self.ctx = policy, store, ctx

    def run(self) -> None:
        """Tune every block that is not finished yet.

        Raises:
            InputError: Weights or activations contain NaN or infinity.
        """
        import torch

        from llmcompress.models.assemble import apply_loan, apply_patch
        from llmcompress.models.walker import Walker

        blocks = self.handle.layout.blocks
        finished = self.store.finished()
        if len(finished) == len(blocks):
            return
        # trained values, scales and losses are fp32 whatever the run computes in
        model = self.handle.skeleton(torch.float32, head=False)
        walker = Walker(model, self.calibration.tokens, self.ctx.device, self.ctx.seed)
        quantized = walker.embed([block.name for block in blocks])
        self.handle.free_embeddings(model)
        full = quantized.clone()
        for block in blocks:
            done = block.index in finished
            if not done:
                self.ctx.emit("block_start", index=block.index, total=len(blocks))
            started = time.monotonic()
            self.handle.load_block(model, block.index, self.ctx.device)
            target = self._full_precision(model, walker, block, full, quantized, not done)
            below = self.store.below(block.index)
            apply_patch(model, self.handle.layout, below)
            apply_loan(model, self.handle.layout, block, self.store)
            if done:
                apply_patch(model, self.handle.layout, BlockPatch({}, self.store.read_block(block.index).replaced))
            else:
                record = self._tune(model, walker, block, quantized, target, below)
                seconds = round(time.monotonic() - started, 3)
                self.ctx.emit("block_end", index=block.index, total=len(blocks), seconds=seconds, **record)
            self._advance(model, walker, block, quantized, below)
            self.handle.free_block(model, block.index)

    def _full_precision(
        self, model: PreTrainedModel, walker: Walker, block: Block, full: Tensor, quantized: Tensor, wanted: bool
    ) -> Target | None:
        """Run the original block on the full-precision stream; note what its mixer does."""
        import torch

        sublayer = mixer_of(block)
        if sublayer is None:
            walker.forward(block, full)
            return None
        mixer = model.get_submodule(sublayer.module)
        exact = self._rounder(sublayer.scan, {}, None)
        target = None
        if wanted:
            # fp_block: what the original mixer makes of the quantized stream
            source = full if self.config.target == "fp_trajectory" else quantized
            scanned: list[Tensor] = []
            outputs: list[Tensor] = []
            walker.lay_aside(block, source)
            with torch.no_grad(), scan_of(mixer, exact, self.config, scanned):
                for rows in walker.batches:
                    outputs.append(mixer(walker.normed(sublayer, source, rows), cache_params=None, attention_mask=None))
            target = Target(source.clone(), torch.cat(outputs), torch.cat(scanned))
        with scan_of(mixer, exact, self.config):
            walker.forward(block, full)
        return target

    def _tune(
        self,
        model: PreTrainedModel,
        walker: Walker,
        block: Block,
        quantized: Tensor,
        target: Target | None,
        below: BlockPatch,
    ) -> dict[str, Any]:
        """Tune one block's mixer, write the block, return the figures of its event."""
        sublayer = mixer_of(block)
        if sublayer is None or target is None:
            self.store.write_block(block.index, BlockPatch({}, {}, {}))
            return {"error": 0.0}
        mixer = model.get_submodule(sublayer.module)
        rounder = self._rounder(sublayer.scan, below.replaced, self.policy)
        trainer = MixerTrainer(self.config, mixer, sublayer, rounder, self.ctx.seed + block.index)
        packed = {name.removeprefix(f"{sublayer.module}.") + ".weight" for name in below.packed}
        walker.lay_aside(block, quantized)
        types = {
            name: self.handle.checkpoint.dtype_of(f"{sublayer.module}.{name}")
            for name, _ in mixer.named_parameters()
            if name not in packed
        }
        result, values = trainer.train(walker, quantized, target, types)
        replaced = {f"{sublayer.module}.{name}": value for name, value in values.items()}
        record = {"esr": result}
        self.store.write_block(block.index, BlockPatch({}, replaced, record))
        return {"error": result["after"], "before": result["before"]}

    def _advance(
        self, model: PreTrainedModel, walker: Walker, block: Block, quantized: Tensor, below: BlockPatch
    ) -> None:
        """Run the tuned block on the quantized stream."""
        sublayer = mixer_of(block)
        if sublayer is None:
            walker.forward(block, quantized)
            return
        rounder = self._rounder(sublayer.scan, below.replaced, self.policy)
        with scan_of(model.get_submodule(sublayer.module), rounder, self.config):
            walker.forward(block, quantized)

    def _rounder(
        self, scan: ScanView | None, replaced: Mapping[str, Tensor], policy: Mapping[str, Any] | None
    ) -> Rounder:
        """How the states of a mixer are stored; without a policy in float."""
        import torch

        from llmcompress.algorithms.state_reconstruction import Rounder

        assert scan is not None
        if policy is None:
            return Rounder(StateSpec(bits=16, codec="none"))
        spec = StateSpec.of(policy).without_noise()
        widths = (policy.get("head_bits") or {}).get(scan.module)
        bits = None if widths is None else torch.tensor(widths)
        return Rounder(spec, replaced.get(f"{scan.module}.{SCALE}"), bits, int(policy.get("window", 1)))


class MixerTrainer:
    """Tunes one mixer in place.

    Args:
        config: The recipe section.
        mixer: A Mamba-2 mixer in fp32, quantized weights in place.
        sublayer: Its sublayer.
        rounder: How its states are stored.
        seed: Seed of the order of sequences.
    """

    def __init__(self, config: EsrConfig, mixer: nn.Module, sublayer: Sublayer, rounder: Rounder, seed: int) -> None:
        self.config, self.mixer, self.sublayer, self.rounder, self.seed = config, mixer, sublayer, rounder, seed

    def train(
        self, walker: Walker, quantized: Tensor, target: Target, types: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Minimise the block's loss, then round the trained values to the stored types and judge them again.

        Args:
            walker: For the mixer's inputs.
            quantized: ``[S, L, D]`` the quantized stream before the block.
            target: What the full-precision stream showed.
            types: By parameter that may be trained, the type in which the artifact holds it.

        Returns:
            The record, and the values to store by their name in the mixer; none where the block was rolled back.
        """
        import torch

        from llmcompress.algorithms.state_reconstruction import Objective, Schedule, judged, reconstruct, split

        config, sublayer = self.config, self.sublayer
        objective = Objective(config.lambda_ssm, config.token_warmup)
        self.mixer.requires_grad_(False)
        parameters = {name: p for name, p in self.mixer.named_parameters() if name in types}
        initial = {name: p.detach().clone() for name, p in parameters.items()}
        scanned: list[Tensor] = []

        def loss(rows: list[int]) -> Tensor:
            scanned.clear()
            with torch.no_grad():
                x = walker.normed(sublayer, quantized, rows)
            output = self.mixer(x, cache_params=None, attention_mask=None)
            drift = (target.hidden[rows] - quantized[rows]).to(output) / sublayer.output_scale
            wanted = target.output[rows] + drift
            return objective.loss(output, wanted, scanned[0], target.scanned[rows])

        schedule = Schedule(
            epochs=config.epochs,
            batch=config.batch_size,
            held_out=config.held_out,
            patience=config.patience,
            rollback=config.rollback,
            seed=self.seed,
        )
        groups = self._groups(parameters)
        count = quantized.shape[0]
        with scan_of(self.mixer, self.rounder, config, scanned):
            result = reconstruct(parameters, groups, loss, count, schedule)
            if not result.kept and config.rollback:
                return result.record(), {}
            names = [name for group in groups for name in group.names]
            with torch.no_grad():
                for name in names:
                    parameters[name].copy_(parameters[name].to(types[name]))
            after = judged(loss, split(count, config.held_out)[1], config.batch_size)
            if config.rollback and not after < result.before:
                with torch.no_grad():
                    for name in names:
                        parameters[name].copy_(initial[name])
                return {**result.record(), "kept": False, "after": result.before}, {}
        values = {name: parameters[name].detach().to(types[name]).cpu() for name in names}
        return {**result.record(), "after": after}, values

    def _groups(self, parameters: Mapping[str, Tensor]) -> list[Group]:
        from llmcompress.algorithms.state_reconstruction import Group

        rates, train = self.config.lr, self.config.train
        groups = []
        if "selective" in train:
            names = tuple(name for name in SELECTIVE if name in parameters)
            groups.append(Group(rates.selective, names, self.config.bound))
            groups.append(Group(rates.dt_bias, ("dt_bias",), self.config.bound))
        names = tuple(name for name in PROJECTIONS if name in parameters)
        if "projections" in train and names:
            groups.append(Group(rates.projections, names))
        return groups


@contextmanager
def scan_of(mixer: nn.Module, rounder: Rounder, config: EsrConfig, seen: list[Tensor] | None = None) -> Iterator[None]:
    """Inside, the mixer scans with states stored by ``rounder``; outputs of the scan are appended to ``seen``."""
    from llmcompress.algorithms.state_reconstruction import scan
    from llmcompress.nn.scan_override import scanned_by

    engine = "fused" if config.engine == "auto" else config.engine

    def run(drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
        y = scan(drive, decay, b, c, rounder, engine, config.memory_mb << 20)
        if seen is not None:
            seen.append(y)
        return y

    with scanned_by(mixer, run):
        yield


def mixer_of(block: Block) -> Sublayer | None:
    """The block's Mamba-2 sublayer, None where it has none.

    Raises:
        InputError: It is not the first to read the block's input.
    """
    for position, sublayer in enumerate(block.sublayers):
        if sublayer.scan is not None and sublayer.scan.kind == "mamba2":
            before = block.sublayers[1 : position + 1]
            if position and sublayer.reads == "hidden" and not all(s.parallel for s in before):
                raise InputError(f"{block.name}: its state-space layer does not come first", "remove the esr stage")
            return sublayer
    return None


def estimate_reconstruction(config: EsrConfig, inputs: PlanInputs) -> Estimate:
    """Memory of the stage: a block in fp32, streams and targets, a training batch, states of a head block; before the
    first block the embedding instead.
    """
    layout = inputs.layout
    scans = [block.scan for block in layout.blocks if block.scan is not None and block.scan.kind == "mamba2"]
    if not scans:
        return Estimate()
    widest = max(scans, key=lambda scan: scan.heads * scan.channels)
    inner, tokens = widest.heads * widest.channels, inputs.samples * inputs.length
    stream = sizes.stream_bytes(layout, inputs.samples, inputs.length, 4)
    # a block, gradients, two moments, and the initial and best values of what is trained
    training = 6 * 4 * sizes.largest_block(layout)
    batch = 16 * 4 * config.batch_size * inputs.length * (2 * inner + widest.conv_channels)
    states = min(config.memory_mb << 20, 8 * config.batch_size * inputs.length * widest.values)
    targets = 2 * stream + 4 * tokens * inner
    disk = 2 * sum(3 * scan.heads + scan.conv_channels * (scan.conv_width + 1) for scan in scans)
    flops = 3.0 * config.epochs * sizes.forward_flops(layout, tokens, inputs.length)
    ram = 2 * stream + max(4 * sizes.outside_parameters(layout), training + targets + batch + states)
    return Estimate(ram=ram, disk=disk, flops=flops)
