#!/usr/bin/env python3
"""Q-Mamba 4: generate() with the packed cache writes token by token what a slow reference writes.

The reference is independent of cache and scan: transformers' own decoding, whose float state a hook rounds after
every token. Greedy, 2 000 tokens, batch 4, on the shipped Mamba-2 with 4-bit states; beam search with 3 beams
against the same values kept in float. Kernels are set to their definitions: fast ones sum the read-out in another
order, and one flipped code grows into another text after hundreds of tokens.

    python scripts/acceptance/q_mamba_4_generate.py [--model FOLDER] [--tokens 2000]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import verdict
from state_models import quantized


def slow_reference(model: Any, layout: Any, prompt: Any, tokens: int) -> Any:
    """Greedy decoding with transformers' float cache; each state is rounded by a hook."""
    import torch
    from transformers import DynamicCache

    from llmcompress.algorithms.decoupled_scales import StateSpec, fake_quantize

    cache, spec = DynamicCache(config=model.config), StateSpec(4)

    def hook(module: Any, *_: Any) -> None:
        state = cache.layers[module.layer_idx].recurrent_states[0]
        state.copy_(fake_quantize(state.float(), spec))

    handles = [model.get_submodule(b.scan.module).register_forward_hook(hook) for b in layout.blocks if b.scan]
    rows, word = [prompt], prompt
    with torch.inference_mode():
        for _ in range(tokens):
            word = model(word, cache_params=cache, use_cache=True).logits[:, -1:].argmax(-1)
            rows.append(word)
    for handle in handles:
        handle.remove()
    return torch.cat(rows, 1)


def same_until(one: Any, two: Any) -> int:
    """Tokens before the first difference in any row."""
    width = min(one.shape[1], two.shape[1])
    differs = (one[:, :width] != two[:, :width]).any(0).nonzero()
    return int(differs[0]) if len(differs) else width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="asset:reference_mamba2")
    parser.add_argument("--tokens", type=int, default=2000)
    options = parser.parse_args()
    os.environ["LLMCOMPRESS_KERNELS"] = "reference"
    root = Path(tempfile.mkdtemp(prefix="llmcompress-generate-"))
    try:
        artifact = quantized(options.model, root)
        found = compare(str(artifact), options.tokens)
    finally:
        shutil.rmtree(root)
    greedy, beams, wanted = found
    holds = greedy == wanted and beams
    verdict(
        holds, f"greedy equal for {greedy} of {wanted} tokens in all 4 rows; 3 beams {'equal' if beams else 'DIFFER'}"
    )


def compare(artifact: str, tokens: int) -> tuple[int, bool, int]:
    """Tokens that agree, whether beam search agrees, and how many there were."""
    import torch

    from llmcompress import hf
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.mixers import float_states, runtime_of

    model, _ = hf.load(artifact, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    layout = layout_from_config(model.config.to_dict())
    prompt = torch.randint(3, int(model.config.vocab_size), (4, 12), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    packed = model.generate(prompt, max_new_tokens=tokens, **options)
    with float_states(model):
        slow = slow_reference(model, layout, prompt, tokens)
    agreed = same_until(packed, slow)
    if agreed < slow.shape[1]:
        print(f"first difference at token {agreed}", flush=True)
    beams = model.generate(prompt, max_new_tokens=64, num_beams=3, **options)
    runtime = runtime_of(model)
    assert runtime is not None
    runtime.packed = False
    return agreed, torch.equal(beams, model.generate(prompt, max_new_tokens=64, num_beams=3, **options)), slow.shape[1]


if __name__ == "__main__":
    main()
