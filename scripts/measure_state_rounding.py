#!/usr/bin/env python3
"""Why one codec of 4-bit states does better than another: what rounding does once, and what the recurrence makes of it.

Scan inputs of the reference Mamba-2 on calibration text; the state is rounded after every token, codec by codec. Per
class of heads (half-life below 10 tokens, below 100, longer), means over heads of

- one-shot: ``||Q(u) - u|| / ||u||`` of the fresh states that the quantized recurrence meets,
- gain: ``<Q(u), u> / <u, u> - 1``, by which one rounding makes states longer or shorter; the recurrence multiplies it
  by itself at every token,
- output: relative error of the scan's output against float states.

Interventions change one thing of a codec each: scales in fp32 instead of fp16; the channel scale made the exact maximum
once the state scale is known (nothing in a row is left unused, nothing clips); that maximum cut to nine tenths; the
gain taken out per head or per row with the float state in hand (not a codec, a test of the cause); noise or a dither
before rounding. ``--perplexity`` measures held-out text as well, every third of 24 windows of 1,024 tokens, in pairs.

    python scripts/measure_state_rounding.py [--perplexity] [NAME ...]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "acceptance"))

from q_mamba_2_quality import ASSETS, Study, windows

from llmcompress.algorithms.decoupled_scales import fake_quantize, to_scale
from llmcompress.algorithms.selective_scan import ScanInputs, half_life, scan
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.nn.mixers import attach, recurrent_evaluation
from llmcompress.nn.states import StateQuantizer
from llmcompress.quant.states import StateSpec
from llmcompress.quant.store import PackedStore

BITS, QMAX = 4, 7.0
TOKENS, SEQUENCES, WINDOWS, EVERY = 512, 2, 24, 3
CLASSES = (10.0, 100.0)
TINY = 1e-20
Round = Callable[[Tensor], Tensor]


def codec(name: str, **changes: Any) -> Round:
    """One of the product's."""
    spec = StateSpec(BITS, name, **changes)  # type: ignore[arg-type]
    return lambda u: fake_quantize(u, spec)


def plain_scales(u: Tensor) -> Tensor:
    """DSQ with fp32 scales."""
    channel = u.abs().mean(-1, keepdim=True).sqrt().clamp_min(TINY)
    step = channel * (u.abs() / channel).amax(-2, keepdim=True).clamp_min(TINY) / QMAX
    return (u / step).round().clamp(-QMAX, QMAX) * step


def exact_maximum(share: float) -> Round:
    """DSQ whose channel scale is then ``share`` of the row's exact maximum in units of the state scale."""

    def rounded(u: Tensor) -> Tensor:
        size = u.abs()
        channel = to_scale(size.mean(-1).sqrt()).float()[..., None]
        state = to_scale((size / channel).amax(-2)).float()[..., None, :]
        exact = to_scale(share * (size / state).amax(-1)).float()[..., None]
        step = exact * (state / QMAX)
        return (u / step).round().clamp(-QMAX, QMAX) * step

    return rounded


def without_gain(inner: Round, axes: tuple[int, ...]) -> Round:
    """A codec with its gain taken out, per head (both axes) or per row (the last)."""

    def rounded(u: Tensor) -> Tensor:
        value = inner(u)
        along = (value * u).sum(axes, keepdim=True)
        return value * torch.where(along > 0, u.square().sum(axes, keepdim=True) / along.clamp_min(TINY), 1.0)

    return rounded


def stochastic(name: str) -> Round:
    """A codec that rounds up with the probability of the remainder."""
    spec, generator = StateSpec(BITS, name, rounding="stochastic"), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    return lambda u: fake_quantize(u, spec, None, torch.rand(u.shape, generator=generator))


def named() -> dict[str, Round]:
    """Everything that is measured."""
    return {
        "dsq": codec("dsq"),
        "per_channel": codec("per_channel"),
        "dsq_refit": codec("dsq_refit"),
        "dsq_als, 1 pass": codec("dsq_als", refits=1),
        "dsq_als, 3 passes": codec("dsq_als"),
        "dsq, fp32 scales": plain_scales,
        "dsq, exact maximum": exact_maximum(1.0),
        "dsq, 0.9 of it": exact_maximum(0.9),
        "dsq, no gain per head": without_gain(codec("dsq"), (-1, -2)),
        "dsq, no gain per row": without_gain(codec("dsq"), (-1,)),
        "per_channel, no gain per head": without_gain(codec("per_channel"), (-1, -2)),
        "dsq, stochastic": stochastic("dsq"),
        "per_channel, stochastic": stochastic("per_channel"),
        "dsq, dither": codec("dsq", rounding="dither"),
    }


def scan_inputs(study: Study, work: Path) -> list[ScanInputs]:
    """What the mixers of the float model feed their scans, layer by layer."""
    handle = ModelHandle.open(study.folder, "float32")
    model = compressed_model(handle, PackedStore(work / "nothing"), {}, torch.float32)
    runtime, found = attach(model, handle.layout, {"bits": 16, "codec": "none"}), {}
    runtime.inspect = found.setdefault
    with torch.inference_mode(), recurrent_evaluation(model):
        model(windows(study.tokenizer, study.calibration, TOKENS, SEQUENCES, 0), use_cache=False)
    return [found[layer] for layer in sorted(found)]


def errors(inputs: ScanInputs, exact: Tensor, rounded: Round) -> tuple[Tensor, Tensor, Tensor]:
    """One-shot error, gain and output error per head ``[H]``."""
    off, along, energy = (torch.zeros(inputs.x.shape[2]) for _ in range(3))

    def store(u: Tensor, _token: int) -> Tensor:
        value, axes = rounded(u), (0, 2, 3)
        off.add_((value - u).square().sum(axes))
        along.add_((value * u).sum(axes))
        energy.add_(u.square().sum(axes))
        return value

    difference = scan(inputs, None, store)[0] - exact
    output = difference.square().sum((0, 1, 3)) / exact.square().sum((0, 1, 3))
    return (off / energy).sqrt(), along / energy - 1, output.sqrt()


def perplexity(study: Study, work: Path, rounded: Round | None) -> Tensor:
    """Mean negative log likelihood of each window, with states rounded so; None leaves them in float."""
    handle = ModelHandle.open(study.folder, "float32")
    policies = {} if rounded is None else {"state_cache": {"bits": BITS, "codec": "per_channel"}}
    model = compressed_model(handle, PackedStore(work / "nothing"), policies, torch.float32)
    before, rows = StateQuantizer.fake, study.heldout[::EVERY]
    if rounded is not None:
        StateQuantizer.fake = lambda _self, fresh, _step: rounded(fresh)  # type: ignore[method-assign]
    try:
        with torch.inference_mode(), recurrent_evaluation(model):
            logits = model(rows, use_cache=False).logits.float()[:, :-1]
    finally:
        StateQuantizer.fake = before  # type: ignore[method-assign]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double().mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="measure only these")
    parser.add_argument("--perplexity", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: rounded for name, rounded in named().items() if not args.names or name in args.names}
    with tempfile.TemporaryDirectory(prefix="llmcompress-rounding-") as folder:
        work = Path(folder)
        study = Study(ASSETS / "reference_mamba2", work, WINDOWS, SEQUENCES)
        inputs = scan_inputs(study, work)
        lives = torch.cat([half_life((one.dt.double() * one.a.double().mean(-1)).mean((0, 1, 3))) for one in inputs])
        sorts = [lives < CLASSES[0], (lives >= CLASSES[0]) & (lives < CLASSES[1]), lives >= CLASSES[1]]
        print(f"{len(lives)} heads, {', '.join(str(int(sort.sum())) for sort in sorts)} by half-life")
        base = perplexity(study, work, None) if args.perplexity else None
        if base is not None:
            print(f"float perplexity {math.exp(base.mean()):.3f}", flush=True)
        with torch.inference_mode():
            exact = [scan(one, None, None)[0] for one in inputs]
            for name, rounded in chosen.items():
                parts = zip(*(errors(one, out, rounded) for one, out in zip(inputs, exact)))
                columns = [" ".join(f"{float(v[s].mean()):8.4f}" for s in sorts) for v in map(torch.cat, parts)]
                line = f"{name:<30} one-shot {columns[0]}   gain {columns[1]}   output {columns[2]}"
                if base is not None:
                    loss = perplexity(study, work, rounded)
                    above, spread = loss - base, (loss - base).std() / len(loss) ** 0.5
                    line += (
                        f"   perplexity {math.exp(loss.mean()):.3f}, {100 * above.mean():+.3f} +- {100 * spread:.3f} %"
                    )
                print(line, flush=True)


if __name__ == "__main__":
    main()
