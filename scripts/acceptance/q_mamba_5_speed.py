#!/usr/bin/env python3
"""Q-Mamba 5 (goal C8): W8A8H4 on the CPU against transformers' fallback, and our 4-bit state against our float state.

The reference Mamba-2 and one of 168 M parameters with random weights (24 layers of 768, heads of 64 x 128), batch 1, 8
and 32, two threads, candidates interleaved, medians. transformers runs the dense model in fp32 and in bf16, and the
faster of the two counts, at each batch anew. Ours is what `generate` and `serve` run: the native engine, one call a
step or prompt; the same packed model through transformers' modules on our operators is shown beside it. Decode at least
6 times transformers' at batch 8, prefill of 512 tokens at least 8 times, and the 4-bit state update at least twice as
fast as our own with fp32 states at batch 8 and 32, in the codec of the recipes (a dither before rounding, and the
replay window of `recipes/q_mamba_tiny.yaml`). An update in a window of R tokens is the mean of R tokens in a row, of
which one rounds: both with all sequences in step, which round at the same token, and staggered, so that at each token
a part of them does; the slower counts. Windows of 1, 4 and 8 are shown, and, rounding at every token, to nearest and
with a calibrated channel scale (and dither). That is judged on the large model, as C8 says: states of the reference
model (0.6 MB a sequence) never leave the second cache level, so nothing is saved by making them smaller; its figure is
shown.

    chrt -f 5 python scripts/acceptance/q_mamba_5_speed.py [--models reference large] [--threads 2] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import ROOT, verdict
from llmcompress_kernels import state as kernels
from state_models import MAMBA2_130M, make_model, quantized

from llmcompress.algorithms.decoupled_scales import pack_codes, quantize
from llmcompress.inference.native import open_engine
from llmcompress.quant.states import StateSpec

BATCHES = (1, 8, 32)
PROMPT = 512
DECODE, PREFILL, STEP = 6.0, 8.0, 2.0
WINDOWS = (4, 8)
# transformers' own chunk size; an output head of its own makes 168 M
LARGE = {**MAMBA2_130M, "chunk_size": 256, "tie_word_embeddings": False}


def recipe_window() -> int:
    """Tokens between two roundings in the recipe."""
    plan = yaml.safe_load((ROOT / "recipes" / "q_mamba_tiny.yaml").read_text())
    found: int = plan["stages"]["states"].get("replay_window", 1)
    return found


def models(name: str, root: Path) -> dict[str, Any]:
    """The dense model in two types as transformers runs it, and the packed one as its modules."""
    from transformers import AutoModelForCausalLM

    from llmcompress import hf
    from llmcompress.models.paths import resolve_path

    source, folder = resolve_path("asset:reference_mamba2"), root / name
    if name == "large":
        source = folder / "dense"
        if not source.exists():
            source.mkdir(parents=True)
            subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
    folder.mkdir(exist_ok=True)
    artifact = folder / "run" / "artifact"
    if not artifact.exists():
        quantized(source, folder, states={"rounding": "dither", "replay_window": recipe_window()})
    found = {
        word: AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return {**found, "modules": hf.load(artifact, dtype=torch.float32)[0]}


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; one sample of each per round."""
    taken: dict[str, list[float]] = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, run in candidates.items():
            began = time.perf_counter()
            run()
            taken[key].append(time.perf_counter() - began)
    return {key: statistics.median(values) for key, values in taken.items()}


def decoder(model: Any, batch: int) -> Callable[[], None]:
    """One decode step of a batch after a short prompt."""
    ids = torch.randint(3, 4000, (batch, 8), generator=torch.Generator().manual_seed(1))
    held = model(ids, use_cache=True, logits_to_keep=1)
    token = held.logits[:, -1:].argmax(-1)

    def step() -> None:
        model(token, cache_params=held.cache_params, use_cache=True)

    step()
    return step


def native_decoder(engine: Any, batch: int) -> Callable[[], None]:
    """The same by the native engine."""
    ids = torch.randint(3, 4000, (batch, 8), generator=torch.Generator().manual_seed(1))
    engine.reserve(0, batch)
    token = torch.stack([engine.prompt(slot, row) for slot, row in enumerate(ids.tolist())]).argmax(-1)
    slots = list(range(batch))

    def step() -> None:
        engine.step(token, slots)

    step()
    return step


def state_steps(model: Any, batch: int, windows: Sequence[int]) -> dict[str, tuple[Callable[[], None], int]]:
    """The state update of all layers, and of how many tokens: one, 4-bit and fp32, or those of a window."""
    config = model.config
    heads, channels, states = config.num_heads, config.head_dim, config.state_size
    generator = torch.Generator().manual_seed(2)
    drive = torch.randn(batch, heads, channels, generator=generator)
    decay = 0.9 + 0.1 * torch.rand(batch, heads, generator=generator)
    b, c = (torch.randn(batch, 1, states, generator=generator) for _ in range(2))
    layers, packed, calibrated = [], [], []
    for _ in range(config.num_hidden_layers):
        layers.append(torch.randn(batch, heads, channels, states, generator=generator))
        found = quantize(layers[-1], StateSpec(bits=4))
        assert found.channel is not None
        assert found.state is not None
        codes = pack_codes(found.codes, 4)
        packed.append((codes, found.channel.contiguous(), found.state.contiguous(), None))
        calibrated.append((codes.clone(), None, found.state.clone(), found.channel[0].contiguous()))

    def floats() -> None:
        for held in layers:
            kernels.state_update(held, drive, decay, b, c)

    def update(kept: list[Any], dither: bool) -> None:
        for one in kept:
            kernels.dsq_state_update(*one, drive, decay, b, c, 4, dither=dither)

    found = {"window 1": (packed, True), "nearest": (packed, False), "static": (calibrated, True)}
    steps = {"fp32": (floats, 1), **{name: (partial(update, *how), 1) for name, how in found.items()}}
    for window in windows:
        for staggered in (False, True):
            count = (
                torch.arange(batch, dtype=torch.int32) % window if staggered else torch.zeros(batch, dtype=torch.int32)
            )
            row = batch, window - 1, heads * channels + heads + states
            kept = [
                (*(None if t is None else t.clone() for t in one), torch.zeros(row), count.clone()) for one in packed
            ]
            name = f"window {window} {'staggered' if staggered else 'in step'}"
            steps[name] = partial(whole_window, kept, (drive, decay, b, c), window), window
    return steps


def whole_window(kept: list[Any], token: tuple[torch.Tensor, ...], window: int) -> None:
    """As many tokens as a window has, so that every sequence rounds once."""
    for _ in range(window):
        for one in kept:
            kernels.dsq_replay_update(*one, *token, 4, dither=True)


def measure(name: str, root: Path) -> tuple[bool, str]:
    """Whether one model's goals are met, and its figures."""
    held = models(name, root)
    engine = open_engine(held["modules"])
    rounds, words, holds, window = 15 if name == "reference" else 5, [], True, recipe_window()
    for batch in BATCHES:
        candidates = {key: decoder(model, batch) for key, model in held.items()}
        found = interleaved({**candidates, "native": native_decoder(engine, batch)}, rounds)
        steps = state_steps(held["fp32"], batch, sorted({*WINDOWS, window} - {1}))
        taken = interleaved({key: run for key, (run, _) in steps.items()}, 2 * rounds)
        step = {key: taken[key] / tokens for key, (_, tokens) in steps.items()}
        base = min(found["fp32"], found["bf16"])
        modules = base / found["modules"]
        mine = max(value for key, value in step.items() if key.startswith(f"window {window}"))
        decode, state = base / found["native"], step["fp32"] / mine
        others = ", ".join(f"{key} {step['fp32'] / value:.2f}x" for key, value in step.items() if key != "fp32")
        words.append(
            f"batch {batch}: decode {1e3 * found['native']:.2f} ms, {decode:.2f}x (modules {modules:.2f}x); "
            f"state {1e3 * mine:.2f} ms beside {1e3 * step['fp32']:.2f}, {state:.2f}x ({others})"
        )
        print(name, words[-1], {key: f"{1e3 * value:.2f} ms" for key, value in found.items()}, flush=True)
        holds &= batch != 8 or decode >= DECODE
        holds &= batch == 1 or name != "large" or state >= STEP
    ids = torch.randint(3, 4000, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    run = {key: partial(model, ids, use_cache=True, logits_to_keep=1) for key, model in held.items()}
    run["native"] = partial(engine.prompt, 0, ids[0].tolist())
    for warm in ("modules", "native"):
        run[warm]()
    found = interleaved(run, 5 if name == "reference" else 3)
    base = min(found["fp32"], found["bf16"])
    prefill = base / found["native"]
    words.append(
        f"prefill {PROMPT / found['native']:.0f} tokens/s, {prefill:.2f}x (modules {base / found['modules']:.2f}x)"
    )
    print(name, words[-1], {key: f"{1e3 * value:.1f} ms" for key, value in found.items()}, flush=True)
    return holds and prefill >= PREFILL, f"{name}: {', '.join(words)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["reference", "large"], choices=["reference", "large"])
    parser.add_argument("--keep", type=Path, help="folder in which models are made once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(LARGE, options.make)
        return
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="llmcompress-speed-") as work:
        root = options.keep or Path(work)
        found = [measure(name, root) for name in options.models]
    text = "; ".join(part for _, part in found)
    verdict(
        all(holds for holds, _ in found),
        f"W8A8H4, {options.threads} threads, against transformers' faster of fp32, bf16; {text}",
    )


if __name__ == "__main__":
    main()
