#!/usr/bin/env python3
"""Replay windows of quantized states: exactness by R, the number of tokens between two roundings, and its memory.

Held-out text through the reference Mamba-2 or hybrid, W16A16, token by token as in decoding; 4 bits with the shipped
dither and to nearest (the paper's), each with and without reconstruction, and 8 bits with the dither. Shown are the
perplexity, how much higher it is than with float states and than with R = 1 (in pairs over windows of text, with
standard errors), the same above float for the first and last tokens of a window, the Kullback-Leibler divergence of
the next token's distribution from that with float states, and what a sequence keeps: KB, and bits per value of its
states, window included. ``--recall`` also asks for words after running text (``evaluate``'s recall).

    python scripts/compare_replay_windows.py [--asset reference_hybrid] [--replay 1 2 4 8] [--seeds 1] [--recall]
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "acceptance"))

import q_mamba_2_quality as quality
from compare_channel_scales import divergence, predictions, spread
from q_mamba_2_quality import ASSETS, EDGE, Study

from llmcompress.evaluation.config import RecallConfig
from llmcompress.evaluation.recall import recall
from llmcompress.models.handle import ModelHandle
from llmcompress.models.state_memory import sequence_bytes
from llmcompress.recipe.lock import hardware

ROUNDINGS = {"dither": [4, 8], "rtn": [4]}


@dataclass
class Found:
    """Negative log likelihoods ``[windows, T - 1]``, log probabilities batch by batch, recall in percent."""

    losses: Tensor
    logs: list[Tensor]
    recalled: str

    def part(self, which: slice = slice(None)) -> Tensor:
        """Mean loss of some positions, window by window."""
        return self.losses[:, which].mean(1)


def through(model: Any, study: Study, asked: RecallConfig | None) -> Found:
    """Everything that is measured of one model, states rounded as in decoding."""
    (losses, kept), text = predictions(model, study.heldout), ""
    if asked is not None:
        found = recall(model, study.tokenizer, study.heldout.flatten(), asked)
        text = ", ".join(f"{100 * one['accuracy']:.0f} at {one['distance']}" for one in found)
    return Found(losses, kept, text)


def row(name: str, one: Found, exact: Found, first: Found, kept: tuple[int, int]) -> str:
    """One line of the table; ``kept`` bytes and values of a sequence's states."""
    apart = divergence(exact.logs, one.logs)
    edges = [spread(one.part(which) - exact.part(which), 100) for which in (slice(EDGE), slice(-EDGE, None))]
    return (
        f"{name:<24} {math.exp(one.losses.mean()):8.3f}  {spread(one.part() - exact.part(), 100):>18} % above float "
        f"(first {EDGE} {edges[0]}, last {edges[1]})  {spread(one.part() - first.part(), 100):>18} % above R = 1  "
        f"divergence {1e3 * apart.mean():.3f} +- {1e3 * apart.std() / len(apart) ** 0.5:.3f}e-3  "
        f"{kept[0] / 1e3:.1f} KB, {8 * kept[0] / kept[1]:.2f} bits a value"
        + (f"  recall {one.recalled}" if one.recalled else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asset", default="reference_mamba2", choices=["reference_mamba2", "reference_hybrid"])
    parser.add_argument("--replay", type=int, nargs="*", default=[1, 2, 4, 8], metavar="R")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=quality.LENGTH, help="tokens of a window of text")
    parser.add_argument("--seeds", type=int, default=1, help="of reconstruction; 0 leaves it out")
    parser.add_argument("--recall", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quality.LENGTH = args.length
    asked = None
    if args.recall:
        source = {"kind": "jsonl", "path": "asset:text/heldout.jsonl.gz"}
        asked = RecallConfig.model_validate({"source": source, "samples": 64})
    with tempfile.TemporaryDirectory(prefix="llmcompress-windows-") as work:
        study = Study(ASSETS / args.asset, Path(work), args.windows, 32)
        layout = ModelHandle.open(study.folder, "float32").layout
        values = sequence_bytes(layout, None, 4)[2] // 4
        exact = through(study.assembled("float", None, None, False), study, asked)
        print(
            f"{args.asset}, {args.windows} windows of {args.length}, seeds of reconstruction 0 to {args.seeds - 1}; "
            f"{hardware()['cpu']}, one thread, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}\nfloat {math.exp(exact.losses.mean()):.3f}"
            + (f"  recall {exact.recalled}" if asked else ""),
            flush=True,
        )
        for rounding, widths in ROUNDINGS.items():
            for bits in widths:
                # what reconstruction mends is 4-bit states
                for seed in [None, *range(args.seeds if bits == 4 else 0)]:
                    first = None
                    for window in args.replay:
                        policy = {"bits": bits, "codec": "dsq", "rounding": rounding, "window": window}
                        name = f"H{bits} {rounding} R={window}" + ("" if seed is None else f" esr {seed}")
                        one = through(study.assembled(name, policy, seed, False), study, asked)
                        first = first or one
                        kept = sequence_bytes(layout, policy, 4)[0], values
                        print(row(name, one, exact, first, kept), flush=True)


if __name__ == "__main__":
    main()
