#!/usr/bin/env python3
"""Q-Mamba 2: quantized states on the reference Mamba-2, held-out text, states stored as in decoding.

Perplexity fp <= H8 <= H6 <= H4 with reconstruction < H4 < H4 with one scale per channel, with every one of three
seeds; H8 within 0.5 % of float states; reconstruction recovers at least 30 % of the gap between H4 and float with every
seed. Four settings of ``dsq`` are measured: rounded to nearest (the paper's) and with a dither before rounding (the
recipes'), at every token (replay window 1, the paper's) and at every fourth (the recipes'). Differences are taken in
pairs over windows of text. fp, H8 and H6 may be the same but for noise: a step between them counts as kept where the
later one is lower by no more than two standard errors. Judged are

- the order of rounding to nearest at the recipes' window, all other steps strictly, and what is recovered there;
- what is recovered of the damage of rounding to nearest at window 1;
- with a dither, of whose little error reconstruction can take back no more than noise: that no step of the order is
  contradicted by more than two standard errors, at both windows;
- that H4 as shipped (dither and window) is below every other setting and below one scale per channel.

Shown beside it are each setting's order taken strictly, one scale per channel with noise before rounding (the same
cure), and W8A8H4 as shipped, with reconstruction, and with the embedding in 8 bits.

    python scripts/acceptance/q_mamba_2_quality.py [--model FOLDER] [--windows 24] [--seeds 3]

Everything runs in one process: stages on the shipped calibration text, then the compressed model through its own
mixers on the shipped held-out text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, verdict
from state_models import SHIPPED

from llmcompress.data.calibration import CalibrationSet
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.nn.mixers import recurrent_evaluation
from llmcompress.quant.store import PackedStore
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.dsq import Dsq, DsqConfig
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig
from llmcompress.stages.esr import Esr, EsrConfig
from llmcompress.stages.rtn import Rtn, RtnConfig
from llmcompress.stages.state import RunContext, RunState

ASSETS = ROOT / "recipes" / "assets"
LENGTH, CALIBRATION, EDGE = 1024, 512, 256
RECOVERED, NEAR = 0.30, 0.005
ROUNDINGS = {"dither": "with dither", "rtn": "to nearest"}
WINDOWS = (1, int(SHIPPED["replay_window"]))
# what the literature tabulates for mamba2-2.7b on WikiText-2: float, W8A8H4 with reconstruction
PAPER = (9.06, 12.99)
WEIGHTS = {"projections": {"role": ["ssm"], "bits": 8, "group_size": -1, "symmetric": True}}


def texts(name: str) -> list[str]:
    with gzip.open(ASSETS / "text" / name, "rt", encoding="utf-8") as handle:
        return [json.loads(line)["text"] for line in handle]


def windows(tokenizer: Any, rows: list[str], length: int, count: int, seed: int | None) -> torch.Tensor:
    """``[count, length]`` windows: the first ones, or a random choice without overlap."""
    stream = [token for text in rows for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    total = len(stream) // length
    every = torch.tensor(stream[: total * length]).view(total, length)
    if seed is None:
        # spread over the text, so that all books count
        return every[torch.linspace(0, total - 1, min(count, total)).long()]
    return every[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]]


@dataclass
class Measured:
    """Mean negative log likelihood in nats: of all tokens, of each window's first and last, and window by window."""

    whole: float
    first: float
    last: float
    windows: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Of all tokens."""
        return math.exp(self.whole)

    def above(self, other: Measured) -> tuple[float, float]:
        """How much higher than ``other``, and the standard error of that: relative perplexity, windows in pairs."""
        difference = (self.windows - other.windows).double()
        return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def measure(model: Any, ids: torch.Tensor, batch: int = 8) -> Measured:
    parts = []
    with torch.inference_mode(), recurrent_evaluation(model):
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch]
            logits = model(rows, use_cache=False).logits.float()[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            parts.append(nll)
    nll = torch.cat(parts)
    return Measured(float(nll.mean()), float(nll[:, :EDGE].mean()), float(nll[:, -EDGE:].mean()), nll.mean(1))


class Study:
    """One model, its texts and a folder for stages."""

    def __init__(self, folder: Path, work: Path, count: int, sequences: int) -> None:
        from transformers import AutoTokenizer

        self.folder, self.work, self.sequences = folder, work, sequences
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.heldout = windows(self.tokenizer, texts("heldout.jsonl.gz"), LENGTH, count, None)
        self.calibration = texts("calibration.jsonl.gz")

    def compressed(
        self, name: str, policy: dict[str, Any] | None, seed: int | None, weights: bool, words: bool = False
    ) -> Measured:
        """Quantize, reconstruct with ``seed`` unless it is None, and measure."""
        found = measure(self.assembled(name, policy, seed, weights, words), self.heldout)
        print(
            f"{name:<18} perplexity {found.perplexity:8.3f}   first {EDGE} {math.exp(found.first):8.3f}   "
            f"last {EDGE} {math.exp(found.last):8.3f}",
            flush=True,
        )
        return found

    def assembled(
        self, name: str, policy: dict[str, Any] | None, seed: int | None, weights: bool, words: bool = False
    ) -> Any:
        """The quantized model; ``seed`` None leaves out reconstruction."""
        handle = ModelHandle.open(self.folder, "float32")
        tokens = windows(self.tokenizer, self.calibration, CALIBRATION, self.sequences, seed or 0)
        state = RunState(model=handle, calibration=CalibrationSet.of(tokens, {}))
        if words:
            Embeddings("embeddings", EmbeddingsConfig()).run(state, self.context(name, "embeddings", 0))
        if weights:
            Rtn("weights", RtnConfig.model_validate({"rules": WEIGHTS})).run(state, self.context(name, "weights", 0))
            Activations("activations", ActivationsConfig()).run(state, self.context(name, "activations", 0))
        if policy is not None and policy["codec"] == "dsq_static_p":
            # channel scales from calibration text, after the weights, as recipes do it
            Dsq("states", DsqConfig.model_validate(policy)).run(state, self.context(name, "states", 0))
        elif policy is not None:
            state.policies["state_cache"] = policy
        if seed is not None:
            Esr("esr", EsrConfig()).run(state, self.context(name, "esr", seed))
        store = state.packed or PackedStore(self.work / name / "nothing")
        return compressed_model(handle, store, state.policies, torch.float32)

    def context(self, name: str, stage: str, seed: int) -> RunContext:
        """Context of one stage in a folder of its own."""
        folder = self.work / name / stage
        folder.mkdir(parents=True, exist_ok=True)
        return RunContext(self.work / name, stage, folder, seed, "cpu", "float32", {}, lambda _event: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "reference_mamba2")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="llmcompress-q-mamba-") as work:
        study = Study(args.model, Path(work), args.windows, args.sequences)
        fp = study.compressed("float", None, None, False)
        found = {
            (rounding, window): judged(study, {"codec": "dsq", "rounding": rounding, "window": window}, args.seeds)
            for window in WINDOWS
            for rounding in ROUNDINGS
        }
        channel = {
            (how, window): study.compressed(
                f"H4 per_channel {how} R={window}",
                {"bits": 4, "codec": "per_channel", "rounding": how, "window": window},
                None,
                False,
            )
            for window in WINDOWS
            for how in ("rtn", "stochastic")
        }
        rest = weights(study, fp, args.seeds)
    texts = []
    for window in WINDOWS:
        for rounding, words in ROUNDINGS.items():
            setting = found[rounding, window]
            order = setting.order(fp, channel["rtn", window])
            texts.append(f"window {window}, dsq {words}: {setting.text(fp, channel['rtn', window])}, {order}")
        rtn, noisy = channel["rtn", window], channel["stochastic", window]
        against = paired(found["dither", window].states[4], noisy)
        texts.append(
            f"window {window}, one scale per channel: H4 {rtn.perplexity:.3f}, with noise {noisy.perplexity:.3f} "
            f"(dsq with dither against it {against})"
        )
    claims = claimed(fp, found, channel)
    for words, kept in claims.items():
        print(f"{words}: {'kept' if kept else 'NOT KEPT'}", flush=True)
    missed = [words for words, kept in claims.items() if not kept]
    texts += [rest, *(f"NOT KEPT: {words}" for words in missed)]
    verdict(not missed, f"perplexity float {fp.perplexity:.3f}; " + "; ".join(texts))


def weights(study: Study, fp: Measured, seeds: int) -> str:
    """Figures of W8A8H4 as the recipes keep states: shown, not judged."""
    h4 = {"bits": 4, "codec": "dsq", "rounding": SHIPPED["rounding"], "window": WINDOWS[1]}
    full = study.compressed("W8A8H4", h4, None, True).perplexity
    fuller = [study.compressed(f"W8A8H4 esr seed {s}", h4, s, True).perplexity for s in range(min(2, seeds))]
    words = study.compressed("W8A8H4 embedding 8", h4, None, True, True).perplexity
    loss = statistics.mean(fuller) / fp.perplexity - 1
    return (
        f"W8A8H4 as shipped {full:.3f}, with the embedding in 8 bits {words:.3f}, with ESR {listed(fuller)} "
        f"({100 * loss:+.2f} %; tabulated for mamba2-2.7b {100 * (PAPER[1] / PAPER[0] - 1):+.1f} %)"
    )


def claimed(
    fp: Measured, found: dict[tuple[str, int], Codec], channel: dict[tuple[str, int], Measured]
) -> dict[str, bool]:
    """What is judged, in words, and whether it is so."""
    last = WINDOWS[-1]
    shipped = found["dither", last].states
    others = [one.states[4] for key, one in found.items() if key != ("dither", last)]
    return {
        f"order at window {last} to nearest": found["rtn", last].ordered(fp, channel["rtn", last]),
        **{
            f"{RECOVERED:.0%} recovered at window {window} to nearest": found["rtn", window].least(fp) >= RECOVERED
            for window in WINDOWS
        },
        **{
            f"order at window {window} with dither within errors": found["dither", window].fits(
                fp, channel["rtn", window]
            )
            for window in WINDOWS
        },
        "H4 as shipped below every other setting": all(shipped[4].perplexity <= one.perplexity for one in others),
        "H4 as shipped below one scale per channel": shipped[4].perplexity < channel["rtn", last].perplexity,
        f"H8 within {NEAR:.1%} of float": all(one.states[8].above(fp)[0] <= NEAR for one in found.values()),
    }


@dataclass
class Codec:
    """One codec at three widths, and at 4 bits with reconstruction by seed."""

    states: dict[int, Measured]
    reconstructed: list[Measured]

    def chains(self, fp: Measured, channel: Measured) -> list[list[Measured]]:
        """fp, H8, H6, H4 with reconstruction, H4, one scale per channel; by seed."""
        return [[fp, *(self.states[b] for b in (8, 6)), one, self.states[4], channel] for one in self.reconstructed]

    def fits(self, fp: Measured, channel: Measured) -> bool:
        """Whether no step of the order goes down by more than two standard errors, with every seed."""
        return all(_kept(*pair) for chain in self.chains(fp, channel) for pair in pairwise(chain))

    def ordered(self, fp: Measured, channel: Measured) -> bool:
        """Order but for noise up to H6, strictly from there on, with every seed."""
        chains = self.chains(fp, channel)
        below = all(_kept(*pair) for chain in chains for pair in pairwise(chain[:3]))
        return below and all(one.whole < two.whole for chain in chains for one, two in pairwise(chain[2:]))

    def order(self, fp: Measured, channel: Measured) -> str:
        """Where the order is broken, taken strictly, in words."""
        names = ("float", "H8", "H6", "H4+ESR", "H4", "per channel")
        chains, steps = self.chains(fp, channel), list(pairwise(range(len(names))))
        broken = [f"{names[i]} above {names[j]}" for i, j in steps if any(c[i].whole > c[j].whole for c in chains)]
        return f"taken strictly {', '.join(broken)}" if broken else "order kept strictly"

    def least(self, fp: Measured) -> float:
        """Smallest share that is recovered."""
        return min(self.recovered(fp))

    def recovered(self, fp: Measured) -> list[float]:
        """Share of the gap between H4 and float that reconstruction takes back, by seed."""
        low = self.states[4].perplexity
        return [(low - one.perplexity) / (low - fp.perplexity) for one in self.reconstructed]

    def text(self, fp: Measured, channel: Measured) -> str:
        """Figures, and differences with their standard errors."""
        h8, h6, h4 = (self.states[bits] for bits in (8, 6, 4))
        values = [one.perplexity for one in self.reconstructed]
        share = ", ".join(f"{100 * r:.0f} %" for r in self.recovered(fp))
        return (
            f"H8 {h8.perplexity:.3f} ({paired(h8, fp)}), H6 {h6.perplexity:.3f}, H4 {h4.perplexity:.3f} "
            f"({paired(h4, fp)}; against one scale per channel {paired(h4, channel)}), H4+ESR {listed(values)} "
            f"({share} of the gap recovered; against H4 {', '.join(paired(one, h4) for one in self.reconstructed)})"
        )


def judged(study: Study, policy: dict[str, Any], seeds: int) -> Codec:
    """All that is measured of one setting of the codec."""
    name = f"{policy['rounding']} R={policy['window']}"
    states = {bits: study.compressed(f"H{bits} {name}", {"bits": bits, **policy}, None, False) for bits in (8, 6, 4)}
    esr = [study.compressed(f"H4 {name} esr seed {s}", {"bits": 4, **policy}, s, False) for s in range(seeds)]
    return Codec(states, esr)


def _kept(one: Measured, two: Measured) -> bool:
    """Whether ``two`` is not below ``one`` by more than two standard errors."""
    difference, error = two.above(one)
    return difference >= -2 * error


def listed(values: list[float]) -> str:
    """Perplexities with commas."""
    return ", ".join(f"{value:.3f}" for value in values)


def paired(one: Measured, two: Measured) -> str:
    """Relative difference and its standard error."""
    difference, error = one.above(two)
    return f"{100 * difference:+.3f} +- {100 * error:.3f} %"


if __name__ == "__main__":
    main()
