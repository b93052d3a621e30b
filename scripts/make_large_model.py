#!/usr/bin/env python3
"""Write a random Mixtral of any size, in bf16 shards, holding one tensor in memory at a time.

Names are those of hub checkpoints (one tensor per expert and projection). Random weights serve to measure memory and
time, never quality. A tensor is drawn from a seed of its own, so that any part of the model can be made alone.

    python scripts/make_large_model.py OUT --gigabytes 30 [--hidden 2048 --intermediate 4096 --experts 16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "recipes" / "assets" / "reference_moe"
SHARD_BYTES = 2_000_000_000
# distinct values of a tensor that is too large to be drawn value by value; shuffled copies of it fill the rest
DRAWN = 1 << 22


def config(options: argparse.Namespace) -> dict[str, Any]:
    """``config.json`` of a Mixtral with as many layers as the size asks for."""
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    hidden, inner, heads = options.hidden, options.intermediate, options.hidden // 64
    block = 2 * hidden * hidden + 2 * hidden * (hidden // 4) + options.experts * (3 * hidden * inner + hidden)
    layers = max(1, -(-int(options.gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) // block))
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64, "num_hidden_layers": layers, "num_local_experts": options.experts, "num_experts_per_tok": 2,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(found: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, in the order of the forward pass."""
    hidden, inner, vocabulary = found["hidden_size"], found["intermediate_size"], found["vocab_size"]
    keys = found["num_key_value_heads"] * found["head_dim"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(found["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.block_sparse_moe.gate.weight", (found["num_local_experts"], hidden)
        for expert in range(found["num_local_experts"]):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def values(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """Normal weights with a variance of one over the number of inputs, bf16; norms are ones."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    count = shape[0] * shape[1]
    drawn = torch.randn(min(count, DRAWN), generator=generator).mul_(shape[1] ** -0.5).to(torch.bfloat16)
    made = torch.empty(count, dtype=torch.bfloat16)
    for start in range(0, count, DRAWN):
        part = made[start : start + DRAWN]
        # rolled by another amount each time: rows are not copies of each other
        shift = int(torch.randint(len(drawn), (1,), generator=generator))
        part.copy_(drawn.roll(shift)[: len(part)])
    return made.view(shape)


def write(folder: Path, found: dict[str, Any], seed: int) -> int:
    """Write shards, index, config and tokenizer; return bytes of weights."""
    from llmcompress.export.base import ShardWriter

    folder.mkdir(parents=True)
    shards = ShardWriter(folder, SHARD_BYTES)
    total = 0
    for name, shape in shapes(found):
        tensor = values(name, shape, seed)
        total += tensor.numel() * 2
        shards.add(name, tensor)
    shards.close()
    (folder / "config.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=30.0, help="size of the weights, decimal units")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: already exists; remove it or choose another folder")
    found = config(options)
    total = write(options.out, found, options.seed)
    print(f"{options.out}: {total / 1e9:.2f} GB, {found['num_hidden_layers']} layers of {options.experts} experts")


if __name__ == "__main__":
    main()
