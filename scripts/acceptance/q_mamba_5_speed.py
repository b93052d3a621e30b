#!/usr/bin/env python3
"""Q-Mamba 5 (goal C8): a packed 4-bit state on the CPU against transformers' fallback and our own float state.

The reference Mamba-2 and one of 168 M parameters with random weights (24 layers of 768, heads of 64 x 128), batch 1, 8
and 32, one thread, candidates interleaved, medians: decode at least 6 times transformers' fallback at batch 8, prefill
at least 8 times, and the 4-bit state update at least twice as fast as our own with fp32 states at batch 8 and 32.

    chrt -f 5 python scripts/acceptance/q_mamba_5_speed.py [reference | large ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import ROOT, verdict
from llmcompress_kernels import state as kernels

from llmcompress.algorithms.decoupled_scales import StateSpec, pack_codes, quantize
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach

BATCHES = (1, 8, 32)
PROMPT = 512
POLICY = {"bits": 4, "codec": "dsq"}
DECODE, PREFILL, STEP = 6.0, 8.0, 2.0


def models(name: str) -> tuple[Any, Any]:
    """The model as transformers runs it, and the same weights with packed states."""
    from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        if name == "reference":
            folder = ROOT / "recipes" / "assets" / "reference_mamba2"
            pair.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        else:
            config = Mamba2Config(
                vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, state_size=128,
                n_groups=1, tie_word_embeddings=True,
            )  # fmt: skip
            pair.append(Mamba2ForCausalLM(config).eval())
    attach(pair[1], layout_from_config(pair[1].config.to_dict()), POLICY)
    return pair[0], pair[1]


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
    held = model(ids, use_cache=True)
    token = held.logits[:, -1:].argmax(-1)

    def step() -> None:
        model(token, cache_params=held.cache_params, use_cache=True)

    step()
    return step


def state_steps(model: Any, batch: int) -> dict[str, Callable[[], None]]:
    """One token's state update of all layers: 4-bit and fp32."""
    config = model.config
    heads, channels, states = config.num_heads, config.head_dim, config.state_size
    generator = torch.Generator().manual_seed(2)
    drive = torch.randn(batch, heads, channels, generator=generator)
    decay = 0.9 + 0.1 * torch.rand(batch, heads, generator=generator)
    b, c = (torch.randn(batch, 1, states, generator=generator) for _ in range(2))
    layers, packed = [], []
    for _ in range(config.num_hidden_layers):
        layers.append(torch.randn(batch, heads, channels, states, generator=generator))
        found = quantize(layers[-1], StateSpec(bits=4))
        packed.append((pack_codes(found.codes, 4), found.channel.contiguous(), found.state.contiguous()))

    def floats() -> None:
        for held in layers:
            kernels.state_update(held, drive, decay, b, c)

    def codes() -> None:
        for one in packed:
            kernels.dsq_state_update(*one, None, drive, decay, b, c, 4)

    return {"fp32": floats, "4 bit": codes}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    holds, parts = True, []
    for name in sys.argv[1:] or ("reference", "large"):
        plain, ours = models(name)
        rounds = 15 if name == "reference" else 5
        words = []
        for batch in BATCHES:
            found = interleaved({"hf": decoder(plain, batch), "ours": decoder(ours, batch)}, rounds)
            step = interleaved(state_steps(plain, batch), rounds)
            decode, state = found["hf"] / found["ours"], step["fp32"] / step["4 bit"]
            words.append(f"batch {batch}: decode {1e3 * found['ours']:.2f} ms, {decode:.2f}x; state {state:.2f}x")
            print(name, words[-1], flush=True)
            holds &= batch != 8 or decode >= DECODE
            holds &= batch == 1 or state >= STEP
        ids = torch.randint(3, 4000, (1, PROMPT), generator=torch.Generator().manual_seed(3))
        both = {"hf": plain, "ours": ours}
        run = {key: partial(model, ids, use_cache=True) for key, model in both.items()}
        found = interleaved(run, 3)
        prefill = found["hf"] / found["ours"]
        words.append(f"prefill {PROMPT / found['ours']:.0f} tokens/s, {prefill:.2f}x")
        print(name, words[-1], flush=True)
        holds &= prefill >= PREFILL
        parts.append(f"{name}: {', '.join(words)}")
    verdict(holds, f"one thread, fp32 weights, against transformers' fallback; {'; '.join(parts)}")


if __name__ == "__main__":
    main()
