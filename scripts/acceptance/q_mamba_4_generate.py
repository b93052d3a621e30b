#!/usr/bin/env python3
"""Q-Mamba 4: generate() with the packed cache writes token by token what a slow reference writes.

The reference keeps the state in float tensors of this script's own, takes every token through the equations as written
out below and rounds the state by the formula; it shares the model's projections and norms, but no cache, no packing, no
replay of a window and no mixer code. Greedy, 2 000 tokens, batch 4, on the shipped Mamba-2 at W8A8H4, states as the
recipes keep them (with a dither, every fourth token) and as the paper does (to nearest, at every token). Beam search
with 3 beams writes what it writes with the same values kept in float, and the score that it gives each text is that
text's likelihood by the slow reference, which holds nothing but that text: a state of another beam would show.
Kernels are set to their definitions: fast ones sum the read-out in another order, and one flipped code grows into
another text after hundreds of tokens. How far the fast kernels agree is measured with the reference's text given
(teacher forcing), so that a difference cannot grow: shown, not judged.

The first token's state comes from the model's own prefill. It is checked apart: its codes against those that a
token-by-token pass over the prompt gives may differ by one in at most 1 of 1 000 places.

    python scripts/acceptance/q_mamba_4_generate.py [--model FOLDER] [--tokens 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import verdict
from state_models import SHIPPED, quantized

BEAMS, BEAM_TOKENS = 3, 64
PAPERS: dict[str, Any] = {"type": "dsq", "bits": 4, "rounding": "rtn", "replay_window": 1}
# largest error of a score in nats per token; one state that followed the wrong beam makes 4e-3 and more
SCORE = 1e-5


@dataclass
class Kept:
    """How states are kept: rounded after every ``window`` tokens, with a dither or to nearest."""

    window: int
    dither: bool


class SlowMixer:
    """One mixer between its projections, a token at a time, state in float and rounded by the formula.

    Args:
        mixer: Mamba-2 mixer of transformers; its projections and parameters are used, its forward is not.
        conv: ``[S, C, 4]`` last inputs of the convolution.
        state: fp32 ``[S, H, P, N]``.
        kept: When and how it is rounded; None leaves it in float.
    """

    def __init__(self, mixer: Any, conv: Any, state: Any, kept: Kept | None) -> None:
        self.mixer, self.conv, self.state, self.kept, self.tokens = mixer, conv.clone(), state.clone(), kept, 0

    def forward(self, hidden: Any, **_: Any) -> Any:
        """Takes and gives ``[S, 1, D]``."""
        import torch
        from torch.nn.functional import silu, softplus

        m = self.mixer
        heads, groups, states = m.num_heads, m.n_groups, m.ssm_state_size
        inner = heads * m.head_dim
        gate, mixed, dt = m.in_proj(hidden[:, 0]).split([inner, inner + 2 * groups * states, heads], -1)
        self.conv = torch.cat((self.conv[..., 1:], mixed[..., None]), -1)
        mixed = silu((self.conv * m.conv1d.weight[:, 0]).sum(-1) + m.conv1d.bias)
        x, b, c = mixed.split([inner, groups * states, groups * states], -1)
        dt = softplus(dt + m.dt_bias)
        decay = (dt * -m.A_log.exp()).exp()
        x = x.unflatten(-1, (heads, -1))
        b, c = (t.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for t in (b, c))
        fresh = decay[..., None, None] * self.state + (dt[..., None] * x)[..., None] * b[:, :, None]
        y = (fresh @ c[..., None])[..., 0]
        self.tokens += 1
        due = self.kept is not None and self.tokens % self.kept.window == 0
        self.state = rounded(fresh, self.kept.dither) if self.kept is not None and due else fresh
        y = (y + m.D[:, None] * x).flatten(1) * silu(gate)
        y = y.unflatten(-1, (groups, -1))
        y = y * (y.square().mean(-1, keepdim=True) + m.norm.variance_epsilon).rsqrt()
        return m.out_proj(y.flatten(1) * m.norm.weight)[:, None]


def rounded(u: Any, dither: bool) -> Any:
    """What a state ``[..., P, N]`` becomes by being stored with 4 bits, from the formula (q = 7)."""
    import torch

    half = lambda t: t.clamp(2.0**-24, 65504.0).half().float()  # noqa: E731 - a word for the formula
    size = u.abs()
    total, width = size, size.shape[-1]
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    channel = half((total[..., 0] / u.shape[-1]).double().sqrt().float())[..., :, None]
    state = half((size / channel).amax(-2))[..., None, :]
    step = channel * (state / 7.0)
    value = u / step
    if dither:
        # bits 12 to 15 of the scale's bits times 40503 make sixteen values from -1/2 to 1/2; the sum is rounded once
        level = ((state.half().view(torch.int16).int() & 0xFFFF) * 40503 & 0xFFFF) >> 12
        product = (u * (1 / channel)).double() * (1 / (state / 7.0)).double()
        value = (product + (level.double() - 7.5) / 16).float()
    return torch.clamp(value.round(), -7, 7) * step


@contextmanager
def slow_mixers(model: Any, convs: list[Any], states: list[Any], kept: Kept | None) -> Iterator[list[SlowMixer]]:
    """Inside, the model's mixers are slow ones that start from these inputs of the convolution and states."""
    mixers = mixers_of(model)
    ours = [mixer.forward for mixer in mixers]
    slow = [SlowMixer(*parts, kept) for parts in zip(mixers, convs, states)]
    try:
        for mixer, one in zip(mixers, slow):
            mixer.forward = one.forward
        yield slow
    finally:
        for mixer, forward in zip(mixers, ours):
            mixer.forward = forward


def mixers_of(model: Any) -> list[Any]:
    """Mamba-2 mixers in the order of layers."""
    return [module for module in model.modules() if type(module).__name__ == "Mamba2Mixer"]


def prefilled(model: Any, prompt: Any) -> tuple[Any, list[Any], list[Any]]:
    """Logits of the next token ``[S, V]``, and after the model's own prefill: inputs of convolutions, stored states."""
    out = model(prompt, use_cache=True)
    layers = [out.cache_params.layers[mixer.layer_idx] for mixer in mixers_of(model)]
    convs = [layer.conv_states[0].clone() for layer in layers]
    return out.logits[:, -1], convs, [layer.recurrent_states[0].load() for layer in layers]


def slow_decoding(model: Any, prompt: Any, tokens: int, kept: Kept) -> tuple[Any, int, int]:
    """Greedy decoding by :class:`SlowMixer` from the model's own prefill.

    Returns:
        Tokens with the prompt; how many codes of the prefill's states differ from those of a token-by-token pass; of
        how many.
    """
    import torch

    with torch.inference_mode():
        logits, convs, stored = prefilled(model, prompt)
        zeros = [torch.zeros_like(conv) for conv in convs], [torch.zeros_like(state) for state in stored]
        with slow_mixers(model, *zeros, None) as slow:
            for at in range(prompt.shape[1]):
                model(prompt[:, at : at + 1], use_cache=False)
            again = [rounded(one.state, kept.dither) for one in slow]
        differing = sum(int((one - two).abs().gt(1e-3 * one.abs().amax()).sum()) for one, two in zip(stored, again))
        rows, word = [prompt], logits.argmax(-1, keepdim=True)
        with slow_mixers(model, convs, stored, kept):
            for _ in range(tokens - 1):
                rows.append(word)
                word = model(word, use_cache=False).logits[:, -1:].argmax(-1)
    return torch.cat([*rows, word], 1), differing, sum(state.numel() for state in stored)


def slow_score(model: Any, text: Any, start: int, kept: Kept, places: Any) -> Any:
    """Mean log likelihood ``[S]`` of the tokens from ``start`` on, by :class:`SlowMixer`.

    A text is read in ``BEAMS`` copies, as many rows as the search has, because a product of matrices gives a row other
    last bits with another number of rows, and in another place; with a dither such a bit parts two states for good. So
    the copy in the place where the search computed a token is believed, and the others take over its state.

    Args:
        model: Whose projections are used.
        text: int64 ``[S, T]``.
        start: Tokens of the prompt.
        kept: How states are kept.
        places: int64 ``[S, T - start]``, row of the search in which each token was chosen.
    """
    import torch

    copies = text.repeat_interleave(BEAMS, 0)
    with torch.inference_mode():
        logits, convs, stored = prefilled(model, copies[:, :start])
        rows = [logits[places[:, 0]]]
        chosen = places[:, 0].repeat_interleave(BEAMS)
        convs, stored = [conv[chosen] for conv in convs], [state[chosen] for state in stored]
        with slow_mixers(model, convs, stored, kept) as slow:
            for at in range(start, text.shape[1] - 1):
                place = places[:, at + 1 - start]
                rows.append(model(copies[:, at : at + 1], use_cache=False).logits[place, -1])
                chosen = place.repeat_interleave(BEAMS)
                for one in slow:
                    one.conv, one.state = one.conv[chosen], one.state[chosen]
        said = torch.stack(rows, 1).log_softmax(-1)
    return said.gather(-1, text[:, start:, None])[..., 0].mean(-1)


def same_until(one: Any, two: Any) -> int:
    """Tokens before the first difference in any row."""
    width = min(one.shape[1], two.shape[1])
    differs = (one[:, :width] != two[:, :width]).any(0).nonzero()
    return int(differs[0]) if len(differs) else width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:reference_mamba2")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--forced", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forced:
        forced(*options.forced)
        return
    results = [judged(options.model, options.tokens, states) for states in (SHIPPED, PAPERS)]
    verdict(all(holds for holds, _ in results), "; ".join(text for _, text in results))


def judged(model: str, tokens: int, states: dict[str, Any]) -> tuple[bool, str]:
    """Whether one way to keep states holds, and its figures."""
    kept = Kept(states["replay_window"], states["rounding"] == "dither")
    root = Path(tempfile.mkdtemp(prefix="llmcompress-generate-"))
    try:
        artifact = quantized(model, root, states=states)
        os.environ["LLMCOMPRESS_KERNELS"] = "reference"
        found = compare(str(artifact), tokens, root / "text.json", kept)
        del os.environ["LLMCOMPRESS_KERNELS"]
        command = [sys.executable, __file__, "--forced", str(artifact), str(root / "text.json")]
        subprocess.run(command, check=True)
    finally:
        shutil.rmtree(root)
    greedy, wanted, beams, score, differing, codes = found
    text = (
        f"{states['rounding']}, replay window {kept.window}: greedy equal for {greedy} of {wanted} tokens in all 4 "
        f"rows; 3 beams {'equal' if beams else 'DIFFER'}, their scores within {score:.1e} of the slow reference's "
        f"(limit {SCORE:.0e}); prefill: {differing} of {codes} codes differ from a token-by-token pass"
    )
    print(text, flush=True)
    return greedy == wanted and beams and score <= SCORE and 1000 * differing <= codes, text


def compare(artifact: str, tokens: int, text: Path, kept: Kept) -> tuple[int, int, bool, float, int, int]:
    """Tokens that agree, of how many; whether beam search agrees, its scores' largest error; the prefill's codes."""
    import torch

    from llmcompress import hf
    from llmcompress.nn.mixers import runtime_of

    model, _ = hf.load(artifact, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = torch.randint(3, int(model.config.vocab_size), (4, 12), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    packed = model.generate(prompt, max_new_tokens=tokens, **options)
    slow, differing, codes = slow_decoding(model, prompt, tokens, kept)
    text.write_text(json.dumps(slow.tolist()))
    agreed = same_until(packed, slow)
    if agreed < slow.shape[1]:
        print(f"first difference at token {agreed}", flush=True)
    options |= {
        "max_new_tokens": BEAM_TOKENS,
        "num_beams": BEAMS,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    beams = model.generate(prompt, **options)
    start = prompt.shape[1]
    places = beams.beam_indices[:, : beams.sequences.shape[1] - start]
    own = slow_score(model, beams.sequences, start, kept, places)
    runtime = runtime_of(model)
    assert runtime is not None
    runtime.packed = False
    same = torch.equal(beams.sequences, model.generate(prompt, **options).sequences)
    return agreed, slow.shape[1], same, float((beams.sequences_scores - own).abs().max()), differing, codes


def forced(artifact: str, text: str) -> None:
    """Print how often the fast kernels choose the reference's next token when given its text so far."""
    import torch

    from llmcompress import hf

    model, _ = hf.load(artifact, dtype=torch.float32)
    ids = torch.tensor(json.loads(Path(text).read_text()))
    with torch.inference_mode():
        out = model(ids[:, :12], use_cache=True)
        chosen = [out.logits[:, -1].argmax(-1)]
        for at in range(12, ids.shape[1] - 1):
            out = model(ids[:, at : at + 1], cache_params=out.cache_params, use_cache=True)
            chosen.append(out.logits[:, -1].argmax(-1))
    agree = torch.stack(chosen, 1) == ids[:, 12:]
    print(f"fast kernels, reference's text given: {int(agree.sum())} of {agree.numel()} next tokens equal", flush=True)


if __name__ == "__main__":
    main()
