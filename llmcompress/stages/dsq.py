"""Stage ``dsq``: keep the recurrent states of state-space layers in low bits (Q-Mamba, Findings of ACL 2025).

The weights stay as they are. The stage measures, on calibration text, how long each head remembers and what each width
costs it, calibrates scales where the codec has some, and writes a policy that is saved with the model and acts
whenever the loaded model keeps a state (``nn/mixers.py``).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.durable import write_durably
from llmcompress.evaluation.working_set import as_read
from llmcompress.models import sizes
from llmcompress.quant.states import BITS, DITHERED, CompressedCodec, Rounding
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout, ScanView
    from llmcompress.stages.state import RunContext, RunState

# median half-life above which states below 8 bits are known to suffer
LONG_MEMORY = 200.0
# fp32 copies of a batch's states alive while one token is scanned
STATE_COPIES = 8


class DsqConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["dsq"] = "dsq"
    bits: Literal[4, 6, 8] = 4
    """Width of the codes."""
    codec: CompressedCodec = "dsq"
    """``dsq`` is the paper's. ``dsq_refit`` fits its channel scale to the codes by least squares (for runs without
    ``esr``); ``dsq_static_p`` calibrates the channel scale (faster on a CPU, but less exact: PAPERS.md), ``dsq_t`` the
    state scale; ``dsq_als`` refits both scales in turns: the least damage at 4 bits without ``esr``, but no kernel. The
    rest are baselines: one scale per head, channel, state, 32 states, or per head after Hadamard rotations."""
    alpha: Annotated[float, Field(ge=0, le=0.75)] = 0.5
    """Exponent of the first scale; the paper's square root is 0.5."""
    sqrt_axis: Literal["channel", "state"] = "channel"
    """Which axis gets the root of the mean; the other gets the maximum."""
    rounding: Rounding = "rtn"
    """``rtn`` is the paper's, to nearest. ``stochastic`` rounds up with the probability of the remainder; it has no
    kernel. ``dither`` adds what the bits of the state scale give before it rounds to nearest, so that errors add up as
    noise; it has kernels, for codecs ``dsq`` and ``dsq_static_p``."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of stochastic rounding."""
    refits: Annotated[int, Field(ge=1, le=8)] = 3
    """Least-squares passes of ``dsq_als``."""
    replay_window: Annotated[int, Field(ge=1, le=64)] = 1
    """Round the state only every few tokens, and keep what the tokens since have put in (``dt x``, decay, B, in
    fp32) to replay it. Errors fall about with its root and steps take less time, for ``(R - 1) (H P + H + G N) 4``
    bytes per layer and sequence; the paper rounds at every token, which is 1."""
    head_bits: Literal["uniform", "auto"] = "uniform"
    """``auto`` gives each head 4, 6 or 8 bits by measured error, under the average ``avg_bits``."""
    avg_bits: Annotated[float, Field(ge=4, le=8)] = 4.5
    """Budget of ``head_bits: auto``, in code bits per value of the state."""
    samples: Annotated[int, Field(ge=1)] = 8
    """Calibration windows used for the measurements."""
    tokens: Annotated[int, Field(ge=16)] = 512
    """Leading tokens of each of them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sqrt_axis == "state" and self.codec not in ("dsq", "dsq_als"):
            raise ValueError(f"sqrt_axis has no meaning with codec {self.codec}")
        if self.rounding == "dither" and (self.codec not in DITHERED or self.sqrt_axis == "state"):
            raise ValueError(f"rounding dither needs a codec of {', '.join(DITHERED)}, with sqrt_axis channel")
        if self.rounding == "stochastic" and self.codec == "dsq_als":
            raise ValueError("dsq_als rounds to nearest: its refits need fixed codes")
        return self


class Dsq(Stage):
    """Measure states, choose widths and scales, put the policy into ``state.policies``."""

    Config: ClassVar[type[StageConfig]] = DsqConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION})
    produces = frozenset({Kind.POLICY})
    config: DsqConfig

    def check(self, layout: ModelLayout) -> list[str]:
        """Refuse models without recurrent states."""
        if all(block.scan is None for block in layout.blocks):
            return [f"stages.{self.name}: {layout.model_type} has no state-space layers: remove this stage"]
        return []

    def warnings(self, layout: ModelLayout) -> list[str]:
        """Settings that are allowed but likely to hurt."""
        from llmcompress.models.state_memory import sequence_bytes

        found = []
        first = any(block.scan is not None and block.scan.kind == "mamba1" for block in layout.blocks)
        if first and self.config.bits == 4:
            found.append("4-bit states of Mamba-1: its states are small and decay unevenly; 8 bits are recommended")
        rule = any(block.scan is not None and block.scan.rule for block in layout.blocks)
        if rule and self.config.rounding == "dither":
            found.append("a dither made gated delta rules of a small trained model worse: rounding rtn is recommended")
        policy, window = self.policy(None), self.config.replay_window
        whole, states = (sequence_bytes(layout, {**policy, "window": r}, 4)[0] for r in (window, 1))
        if whole > 1.5 * states:
            share = f"{100 * (whole - states) / states:.0f} %"
            found.append(f"a replay_window of {window} takes {share} of the states' own bytes: consider a smaller one")
        return found

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """A stream of a few windows, and the embedding or, later, one block and the states of one batch."""
        layout = inputs.layout
        samples, tokens = min(self.config.samples, inputs.samples or self.config.samples), self._tokens(inputs.length)
        item = inputs.compute_bytes
        stream = sizes.stream_bytes(layout, samples, tokens, item)
        scans = [block.scan for block in layout.blocks if block.scan is not None]
        work = max((_scan_bytes(view, samples, tokens) for view in scans), default=0)
        block = sizes.largest_block(layout) * item + as_read(layout, inputs.weight_bytes)
        runs = len(BITS) + 2
        flops = sizes.forward_flops(layout, samples * tokens, tokens)
        # about twenty operations per value of the state, token and width
        flops += 20.0 * runs * samples * tokens * sum(view.values for view in scans)
        on_gpu = inputs.device == "cuda"
        ram = stream + max(sizes.outside_parameters(layout) * item, block + (0 if on_gpu else work))
        policies = {"state_cache": self.policy(None)}
        return Estimate(ram=ram, vram=work + block + stream if on_gpu else 0, disk=0, flops=flops, policies=policies)

    def _tokens(self, length: int) -> int:
        return min(self.config.tokens, length) if length else self.config.tokens

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Measure the blocks that are not measured yet, then write the policy."""
        from llmcompress.stages.blockwise.state_measurement import measure_states

        assert state.model is not None
        self.require_model(state.model.layout)
        for text in self.warnings(state.model.layout):
            ctx.emit("warning", text=text)
        measure_states(self.config, state, ctx)
        self.restore(state, ctx)
        self._write(state, ctx)
        self._tell(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put policy and calibrated scales into the run state."""
        from llmcompress.stages.blockwise.engine import attach_store
        from llmcompress.stages.blockwise.state_measurement import chosen_widths

        attach_store(state, ctx)
        widths = chosen_widths(self.config, state, ctx)
        state.policies["state_cache"] = self.policy(widths) | {"measured": self._measured(state, widths)}

    def policy(self, head_bits: dict[str, list[int]] | None) -> dict[str, Any]:
        """The policy as plain data, as saved in ``quantization_config``."""
        words = ("bits", "codec", "alpha", "sqrt_axis", "rounding", "seed", "refits")
        found: dict[str, Any] = {word: getattr(self.config, word) for word in words}
        found["window"] = self.config.replay_window
        if head_bits is not None:
            found["head_bits"] = head_bits
        return found

    def _write(self, state: RunState, ctx: RunContext) -> None:
        """The file that the report reads."""
        from llmcompress.models.state_memory import memory_table

        assert state.model is not None
        assert state.packed is not None
        item = state.model.checkpoint.dtype.itemsize
        weights = sizes.model_bytes(state.model.layout, state.packed.plan(), item, state.policies)
        policy = dict(state.policies["state_cache"])
        heads = policy.pop("measured")
        rows = [asdict(row) for row in memory_table(state.model.layout, weights, policy, item)]
        content = {"policy": policy, "heads": heads, "memory": rows}
        write_durably(ctx.stage_dir / "states.json", json.dumps(content, sort_keys=True).encode())

    def _measured(self, state: RunState, head_bits: dict[str, list[int]] | None) -> dict[str, Any]:
        """Half-life and output error of every head at its width, by mixer, for ``inspect`` and the report."""
        assert state.packed is not None
        found: dict[str, Any] = {}
        for _, patch in state.packed.blocks():
            record = patch.record.get("states")
            if record is None:
                continue
            module = record["module"]
            lives = [None if life is None else round(life, 1) for life in record["half_lives"]]
            widths = (head_bits or {}).get(module, [self.config.bits] * len(lives))
            errors = [round(record["errors"][str(bits)][head], 4) for head, bits in enumerate(widths)]
            found[module] = {"half_lives": lives, "errors": errors}
        return found

    def _tell(self, state: RunState, ctx: RunContext) -> None:
        """Warn of heads that remember longer than low bits can."""
        assert state.packed is not None
        assert state.model is not None
        long, total = 0, 0
        for block in state.model.layout.blocks:
            record = state.packed.read_block(block.index).record.get("states")
            if record is not None:
                lives = [life for life in record["half_lives"] if life is not None]
                total += len(record["half_lives"])
                long += sum(life > LONG_MEMORY for life in lives) + len(record["half_lives"]) - len(lives)
        ctx.emit("note", text=f"{long} of {total} heads remember longer than {LONG_MEMORY:.0f} tokens")
        if self.config.bits < 8 and self.config.head_bits == "uniform" and 2 * long > total:
            text = f"most heads remember longer than {LONG_MEMORY:.0f} tokens; {self.config.bits}-bit states may drift"
            window = self.config.replay_window
            ctx.emit(
                "warning", text=f"{text}: try head_bits: auto, or a replay_window of {2 * window if window > 1 else 4}"
            )


def _scan_bytes(view: ScanView, samples: int, tokens: int) -> int:
    """Scan inputs and outputs of a batch, and the states of one token."""
    rows = min(samples, max(1, 4096 // tokens))
    inputs = rows * tokens * (4 * view.heads * view.channels + 2 * view.groups * view.states) * 4
    return inputs + STATE_COPIES * rows * view.values * 4
