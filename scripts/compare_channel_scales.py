#!/usr/bin/env python3
"""Channel scales of 4-, 6- and 8-bit states: found at every token (``dsq``), calibrated, or held for some tokens.

Held-out text through the reference Mamba-2 or hybrid, states rounded after every token, with a dither unless asked
otherwise. Two measures, both in pairs over windows: perplexity, which a change of the model may also lower by luck, and
the Kullback-Leibler divergence of the next token's distribution from that with float states, which luck does not lower
and on which windows agree far better. Calibrated scales come from stage ``dsq`` on the calibration text. ``--held 4
16`` finds the channel scales of ``dsq`` at every fourth and sixteenth token only and keeps them in between (no codec of
the product).

    python scripts/compare_channel_scales.py [--asset reference_hybrid] [--bits 4] [--windows 8] [--length 4096]
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

import q_mamba_2_quality as quality
from q_mamba_2_quality import ASSETS, Study

from llmcompress.algorithms.decoupled_scales import dequantize, quantize
from llmcompress.nn.mixers import recurrent_evaluation
from llmcompress.nn.states import StateQuantizer
from llmcompress.quant.states import StateSpec

CODECS = ("dsq", "dsq_static_p")
BATCH = 8


def held(bits: int, every: int, rounding: str) -> Callable[[StateQuantizer, Tensor, int], Tensor]:
    """What becomes of a fresh state when channel scales are found at every few tokens."""
    dynamic, fixed = (StateSpec(bits, codec, rounding=rounding) for codec in CODECS)  # type: ignore[arg-type]
    kept: dict[int, Tensor] = {}

    def stored(quantizer: StateQuantizer, fresh: Tensor, token: int) -> Tensor:
        if token % every == 0 or quantizer.layer not in kept:
            channel = quantize(fresh, dynamic).channel
            assert channel is not None
            kept[quantizer.layer] = channel
        static = kept[quantizer.layer]
        return dequantize(quantize(fresh, fixed, static), fixed, static)

    return stored


def predictions(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Negative log likelihoods ``[windows, T - 1]``, and log probabilities in half precision, batch by batch."""
    losses, kept = [], []
    with torch.inference_mode(), recurrent_evaluation(model):
        for rows in ids.split(BATCH):
            logs = model(rows, use_cache=False).logits.float()[:, :-1].log_softmax(-1)
            losses.append(-logs.gather(-1, rows[:, 1:, None])[..., 0])
            kept.append(logs.half())
    return torch.cat(losses).double(), kept


def divergence(exact: list[Tensor], other: list[Tensor]) -> Tensor:
    """Of each window, in nats a token."""
    pairs = zip(exact, other)
    return torch.cat([(p.float().exp() * (p.float() - q.float())).sum(-1).mean(1) for p, q in pairs]).double()


def spread(values: Tensor, unit: float) -> str:
    """Mean and standard error over windows."""
    return f"{unit * values.mean():+.3f} +- {unit * values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asset", default="reference_mamba2", choices=["reference_mamba2", "reference_hybrid"])
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 4], choices=[4, 6, 8])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=quality.LENGTH, help="tokens of a window")
    parser.add_argument("--rounding", default="dither", choices=["dither", "rtn"])
    parser.add_argument("--held", type=int, nargs="*", default=[], metavar="TOKENS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quality.LENGTH = args.length
    with tempfile.TemporaryDirectory(prefix="llmcompress-channels-") as work:
        study = Study(ASSETS / args.asset, Path(work), args.windows, 32)
        losses, exact = predictions(study.assembled("float", None, None, False), study.heldout)
        base = losses.mean(1)
        print(f"{args.asset}, {len(base)} windows of {args.length}: float {math.exp(base.mean()):.3f}", flush=True)
        for bits in args.bits:
            measured: dict[str, tuple[Tensor, Tensor]] = {}
            for name in (*CODECS, *args.held):
                before = StateQuantizer.fake
                # a codec without kernels, so that states pass through `fake`
                policy = (
                    {"bits": bits, "codec": name, "rounding": args.rounding}
                    if name in CODECS
                    else {"codec": "per_head"}
                )
                if name not in CODECS:
                    StateQuantizer.fake = held(bits, int(name), args.rounding)  # type: ignore[method-assign]
                try:
                    model = study.assembled(f"{bits} {name}", {"bits": bits, **policy}, None, False)
                    losses, found = predictions(model, study.heldout)
                finally:
                    StateQuantizer.fake = before  # type: ignore[method-assign]
                loss = losses.mean(1)
                measured[str(name)] = loss, divergence(exact, found)
                first, own = measured["dsq"], measured[str(name)]
                ratio = own[1] / first[1].mean() - first[1] / first[1].mean()
                word = name if name in CODECS else f"dsq, held for {name}"
                print(
                    f"{bits} bits, {word:<18} {math.exp(loss.mean()):.3f}, {spread(loss - base, 100)} % above float, "
                    f"{spread(loss - first[0], 100)} % above dsq; divergence {1e3 * own[1].mean():.4f}e-3, "
                    f"{spread(ratio, 100)} % above dsq's",
                    flush=True,
                )


if __name__ == "__main__":
    main()
