#!/usr/bin/env python3
"""Low-bit states of gated delta rules: what they cost a small trained Qwen3.5, and how their error grows with position.

First the perplexity of held-out text, token by token as in decoding, with states in fp32 and at 8, 6 and 4 bits: how
much higher it is than with fp32 in pairs over windows, with standard errors, the same for the first and last tokens of
a window, and the Kullback-Leibler divergence of the next token's distribution. Then the error that rounding leaves in
what the rules of the model read, relative to what they read in fp32, by position and by half-life of the head (from its
decays alone), with all inputs as in the fp32 model. Beside it stands the same recurrence without erasing, which takes
values as they are instead of what the state says wrongly of them. The model is not shipped; it is made by

    python scripts/train_reference.py --model delta --out runs/reference_delta --tokens 1.23e6 --dtype float32 \
        --tokenizer recipes/assets/reference_moe --recall 0.3 --rows 2 --length 1024 --muon --every 50 \
        --data books=train_simple.jsonl.xz:0.84 --data spanish=docs.jsonl.gz:0.08 \
        --data maths=gsm8k_train.jsonl.gz:0.08 --heldout val.jsonl.xz
    python scripts/measure_delta_states.py --model runs/reference_delta/model [--windows 16] [--rules 2]

The model of docs/papers/q_mamba.md ended early: ``70`` in its file ``fall`` when 322 of 600 steps were done.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "acceptance"))

from compare_channel_scales import divergence, predictions, spread
from q_mamba_2_quality import EDGE, LENGTH, texts, windows

from llmcompress.algorithms.decoupled_scales import fake_quantize
from llmcompress.algorithms.gated_delta import DeltaInputs
from llmcompress.algorithms.selective_scan import ScanInputs, half_life
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach, detach
from llmcompress.quant.states import StateSpec
from llmcompress.recipe.lock import hardware

POLICIES: dict[str, dict[str, Any]] = {
    "H8 to nearest": {"bits": 8},
    "H6 to nearest": {"bits": 6},
    "H4 to nearest": {"bits": 4},
    "H4, a scale per column of values": {"bits": 4, "codec": "per_channel"},
    "H4 with dither": {"bits": 4, "rounding": "dither"},
    "H4 to nearest, R = 4": {"bits": 4, "window": 4},
    "H4 with dither, R = 4": {"bits": 4, "rounding": "dither", "window": 4},
    "H8 with dither, R = 4": {"bits": 8, "rounding": "dither", "window": 4},
}
FLOAT: dict[str, Any] = {"bits": 16, "codec": "none"}
# positions and half-lives, upper ends
POSITIONS = (16, 64, 256, 1024)
LIVES = (10.0, 100.0, math.inf)


def perplexities(model: Any, layout: Any, ids: Tensor) -> None:
    """The first table."""
    attach(model, layout, FLOAT)
    exact, logs = predictions(model, ids)
    print(f"fp32 {math.exp(exact.mean()):.3f}", flush=True)
    for name, policy in POLICIES.items():
        attach(model, layout, {"codec": "dsq", **policy})
        one, other = predictions(model, ids)
        places = slice(None), slice(EDGE), slice(-EDGE, None)
        parts = [spread((one - exact)[:, which].mean(1), 100) for which in places]
        apart = divergence(logs, other)
        print(
            f"{name:<33} {math.exp(one.mean()):8.3f}  {parts[0]:>18} % above (first {EDGE} {parts[1]}, last {EDGE} "
            f"{parts[2]})  divergence {1e3 * apart.mean():.3f} +- {1e3 * apart.std() / len(apart) ** 0.5:.3f}e-3",
            flush=True,
        )
    detach(model, layout)


def inputs_of(model: Any, layout: Any, ids: Tensor) -> list[DeltaInputs]:
    """What the rules of the fp32 model are fed, layer by layer."""
    found: list[DeltaInputs] = []
    attach(model, layout, FLOAT).inspect = lambda _layer, given: found.append(given)  # type: ignore[arg-type]
    with torch.inference_mode():
        model(ids, use_cache=False)
    detach(model, layout)
    return found


def without_erasing(given: DeltaInputs) -> ScanInputs:
    """The recurrence ``u = a h + (β v) ⊗ k`` of the same inputs: Mamba-2's, with log a in the place of ``dt A``."""
    dt = (-given.decay.log()).clamp(min=1e-12).unsqueeze(-1)
    # ScanInputs multiplies by dt
    x = given.value * given.step.unsqueeze(-1) / dt
    return ScanInputs(x, dt, -torch.ones(given.decay.shape[-1], 1, 1), given.key, given.query)


def errors_by_position(layers: list[DeltaInputs]) -> None:
    """The second table: relative errors of what is read."""
    heads = torch.cat([half_life(given.log_decay.mean((0, 1))) for given in layers])
    counts = [int(((heads >= low) & (heads < high)).sum()) for low, high in zip((0.0, *LIVES), LIVES)]
    print(f"\nheads with a half-life below {', '.join(f'{life:g}' for life in LIVES)} tokens: {counts}")
    print(f"relative error of outputs up to token {', '.join(map(str, POSITIONS))}")
    for bits, rounding in ((8, "rtn"), (4, "rtn"), (4, "dither")):
        spec = StateSpec(bits, rounding=rounding)  # type: ignore[arg-type]
        for erases in (True, False):
            rows = [_errors(given if erases else without_erasing(given), spec) for given in layers]
            errors, energies = (torch.cat(part, -1) for part in zip(*rows))
            for low, high in zip((0.0, *LIVES), LIVES):
                chosen = (heads >= low) & (heads < high)
                if not chosen.any():
                    continue
                ratios = (errors[:, chosen].sum(-1) / energies[:, chosen].sum(-1)).sqrt()
                title = (
                    f"H{bits} {rounding}, {'delta rule' if erases else 'without erasing'}, {low:g} to {high:g} tokens"
                )
                print(f"{title:<55} " + "  ".join(f"{float(ratio):.4f}" for ratio in ratios), flush=True)


def _errors(given: DeltaInputs | ScanInputs, spec: StateSpec) -> tuple[Tensor, Tensor]:
    """Squared errors and squares of outputs, ``[positions, heads]``."""
    exact, _ = given.run(None, None)
    found, _ = given.run(None, lambda fresh, _t: fake_quantize(fresh, spec))
    both = [part.double().square().sum((0, 3)) for part in (found - exact, exact)]
    ends = [0, *(min(end, exact.shape[1]) for end in POSITIONS)]
    return tuple(torch.stack([part[a:b].sum(0) for a, b in pairwise(ends)]) for part in both)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window of text")
    parser.add_argument("--rules", type=int, default=4, help="windows of the second table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layout = layout_from_config(model.config.to_dict())
    ids = windows(tokenizer, texts("heldout.jsonl.gz"), args.length, args.windows, None)
    print(
        f"{args.windows} windows of {args.length}; {hardware()['cpu']}, one thread, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    perplexities(model, layout, ids)
    errors_by_position(inputs_of(model, layout, ids[: args.rules]))


if __name__ == "__main__":
    main()
