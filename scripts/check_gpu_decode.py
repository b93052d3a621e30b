#!/usr/bin/env python3
"""A decode step of a Mamba-2 with packed states on a GPU: the three launches against transformers' forward.

    python scripts/check_gpu_decode.py [--model asset:reference_mamba2] [--device cuda] [--batches 1 16] [--out FILE]

For every type of activations, replay window and batch, token by token over one text that fp32 writes: how far the
logits of both are from those of fp32 with states in floats, how far from each other, how many greedy tokens agree, and
milliseconds a token of each, eager. Two things must hold, or the exit code is 1. In fp32 the first token, read from one
prompt's codes, is within 1e-4 of transformers' forward. Over the text ours is no further from floats than 1.2 times
transformers' forward; the two part, because sums in another order turn some values between two codes, and a scale
that differs in its last bit has another dither. A dense model gets states of 4 bits with a dither; an
artifact keeps its own. ``--device cpu`` rehearses fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from llmcompress import hf  # noqa: E402
from llmcompress.models.registry import layout_from_config  # noqa: E402
from llmcompress.nn import decode_step  # noqa: E402
from llmcompress.nn.mixers import attach, float_states, runtime_of  # noqa: E402

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST, NO_FURTHER = 1e-4, 1.2


@contextmanager
def transformers_forward() -> Iterator[None]:
    """Inside, no token is decoded by one call."""
    known, decode_step.TOKEN_TYPES = decode_step.TOKEN_TYPES, {}
    try:
        yield
    finally:
        decode_step.TOKEN_TYPES = known


def read(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits ``[S, T - prompt, V]`` of every token that follows the prompt, one token a pass."""
    held = model(ids[:, :prompt], use_cache=True)
    name = "cache_params" if getattr(held, "cache_params", None) is not None else "past_key_values"
    cache = {name: held[name], "use_cache": True}
    return torch.cat([model(ids[:, t : t + 1], **cache).logits.float() for t in range(prompt, ids.shape[1])], 1)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, tokens of mixers that one call decoded are counted."""
    own, seen = decode_step.kernels.mamba2_decode, [0]

    def count(*arguments: Any) -> torch.Tensor:
        seen[0] += 1
        return own(*arguments)

    decode_step.kernels.mamba2_decode = count
    try:
        yield seen
    finally:
        decode_step.kernels.mamba2_decode = own


def timed(model: Any, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, float]:
    """The same, and milliseconds a token; the first tokens warm up."""
    read(model, ids[:, : prompt + 2], prompt)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    found = read(model, ids, prompt)
    wait()
    return found, 1e3 * (time.perf_counter() - began) / (ids.shape[1] - prompt)


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Relative distance of logits at every token, ``[T]``, float64 on the CPU."""
    rows = [t.double().cpu().transpose(0, 1).flatten(1) for t in (mine, theirs)]
    return (rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1)


def load(options: argparse.Namespace, dtype: torch.dtype, window: int) -> Any:
    """The model, with packed states."""
    model, _ = hf.load(options.model, dtype=dtype, device=options.device)
    if runtime_of(model) is None:
        policy = {"bits": 4, "codec": "dsq", "rounding": "dither", "window": window}
        attach(model, layout_from_config(model.config.to_dict()), policy)
    return model


def compare(options: argparse.Namespace, name: str, window: int, batch: int) -> dict[str, Any]:
    """One line of the report."""
    generator = torch.Generator().manual_seed(batch)
    exact, model = load(options, torch.float32, window), load(options, TYPES[name], window)
    ids = torch.randint(3, model.config.vocab_size, (batch, options.prompt), generator=generator).to(options.device)
    with transformers_forward():
        text = exact.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=options.tokens,
        )  # fmt: skip
        with float_states(exact):
            truth = read(exact, text, options.prompt)
        plain, plain_ms = timed(model, text, options.prompt)
    with counted() as seen:
        ours, ours_ms = timed(model, text, options.prompt)
    found, theirs = (float(apart(one, truth).mean()) for one in (ours, plain))
    between = apart(ours, plain)
    holds = found < NO_FURTHER * theirs and (name != "float32" or float(between[0]) < FIRST)
    by_one_call = seen[0] == (options.tokens + 2) * len(model.get_submodule("backbone").layers)
    return {
        "type": name, "window": window, "batch": batch, "holds": holds and by_one_call, "by_one_call": by_one_call,
        "ours_to_fp32": found, "transformers_to_fp32": theirs,
        "between_first": float(between[0]), "between": float(between.mean()),
        "same_greedy_tokens": float((ours.argmax(-1) == plain.argmax(-1)).float().mean()),
        "ours_ms": round(ours_ms, 3), "transformers_ms": round(plain_ms, 3),
    }  # fmt: skip


def main() -> int:
    """Compare all; exit code 1 if anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:reference_mamba2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--types", nargs="+", choices=TYPES, help="of activations; on a CPU float32 only")
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    # a prompt is transformers' own on a GPU, so it is in a rehearsal
    decode_step.DecodeStep.fits_prompt = lambda *_: False  # type: ignore[method-assign]
    types = options.types or (["float32"] if options.device == "cpu" else list(TYPES))
    lines = []
    for name in types:
        for window in options.windows:
            for batch in options.batches:
                lines.append(compare(options, name, window, batch))
                print(json.dumps(lines[-1]), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(lines, indent=1) + "\n")
    return 0 if all(line["holds"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
