#!/usr/bin/env python3
"""RQT 5, goal C9: eight requests of four members in one batch.

First the tokens: greedy continuations of the mixed batch are those that each member gives alone, with the trained
family. Then time per step, random weights of TinyLlama-1.1B's shapes (12 of 22 layers, 4096 of
32000 tokens, so that the three models fit), interleaved in one process: one mixed step of a star of 4-bit root
and 1-bit leaves, eight single steps of a dense bf16 model, eight single steps of a 4-bit model, all by the native
engine.
Codes and scales exceed the last-level cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_runs import MEMBERS, artifact, need_models, prompts
from harness import verdict

REQUESTS, NEW, ROUNDS = 8, 32, 7
SIZES: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def same_tokens() -> list[str]:
    """Differences between a mixed batch and each member alone, on the trained family; both ways of computing."""
    from llmcompress.inference.engine import Engine
    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.models.family_model import dense_member, load_members

    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        found = FamilyArtifact(artifact(Path(folder)))
        chosen = list(MEMBERS[:4])
        who = [chosen[i % 4] for i in range(REQUESTS)]
        family = load_members(found, chosen, torch.float32)
        asked = [family.tokenizer(name)(prompts(name, 2)[i // 4])["input_ids"][:24] for i, name in enumerate(who)]
        together = family.generate(asked, who, NEW)
        native = in_one_batch(Engine(family.model, slots=REQUESTS, positions=128), asked, who)
        for i, name in enumerate(who):
            model = dense_member(found, name, torch.float32)
            ids = torch.tensor([asked[i]])
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=10**6,
                pad_token_id=0,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            wrong += [f"modules: request {i} of {name}"] if together[i] != alone else []
            wrong += [f"native: request {i} of {name}"] if native[i] != alone else []
    return wrong


def in_one_batch(engine: Any, asked: list[list[int]], who: list[str]) -> list[list[int]]:
    """Greedy continuations by the native engine, all requests in every step."""
    order = sorted(range(len(who)), key=lambda i: (engine.members.index(who[i]), i))
    written: list[list[int]] = [[] for _ in who]
    for i in order:
        written[i].append(int(engine.prompt(i, asked[i], who[i]).argmax()))
    for _ in range(NEW - 1):
        tokens = engine.greedy(torch.tensor([written[i][-1] for i in order]), order)
        for i, token in zip(order, tokens.tolist()):
            written[i].append(token)
    return written


def big(seed: int, whole: bool = True) -> Any:
    """A bf16 model of random weights; its matrices repeat a block of random numbers, which changes no time.

    Without ``whole`` the matrices of the layers stay without memory: what is outside the trees is enough of a member.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmcompress.models.handle import fill_constants

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, dtype="bfloat16")).to(torch.bfloat16).eval()
    fill_constants(model)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(torch.bfloat16)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            size = parameter.numel()
            if parameter.ndim == 1:
                value = torch.ones(size, dtype=torch.bfloat16)
            elif whole or "proj" not in name:
                value = noise.repeat(-(-size // noise.numel()))[:size].view(parameter.shape)
            else:
                continue
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model


def four_bits() -> Any:
    """The same model with random 4-bit weights."""
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.packed import PackedTensors
    from llmcompress.nn.swap import swap_modules
    from llmcompress.quant.spec import QuantSpec

    model = big(0)
    layout = layout_from_config(model.config.to_dict())
    names = [name for name, *_ in layout.quantizable()]
    swap_modules(model, layout, dict.fromkeys(names, QuantSpec(4, 128, symmetric=True)), torch.bfloat16)
    draws = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PackedTensors):
            shape = module.weight_packed.shape
            words = torch.randint(-(2**31), 2**31, shape, generator=draws, dtype=torch.int64)
            module.weight_packed = words.to(torch.int32)
            module.weight_scale = torch.full(module.weight_scale.shape, 0.003, dtype=torch.float16)
    return model.eval()


def stepper(engine: Any, batch: int) -> Callable[[], None]:
    """One greedy step of ``batch`` sequences that stay where they are."""
    tokens, slots = torch.full((batch,), 7), list(range(batch))

    def step() -> None:
        engine.greedy(tokens, slots)
        for slot in slots:
            engine.lengths[slot] -= 1

    return step


def ways() -> dict[str, tuple[Callable[[], None], int, int]]:
    """Name → (one step, how many of them, bytes of weights that a step reads)."""
    from llmcompress.inference.engine import Engine
    from llmcompress.inference.random_family import RandomFamily
    from llmcompress.quant.tree import Tree

    names = ["a", "b", "c", "d"]
    models = {name: big(i, whole=False) for i, name in enumerate(names)}
    family = RandomFamily(models, Tree.star(names), {4: 4, 1: 1}, 128)
    found: dict[str, tuple[Callable[[], None], int, int]] = {}
    mixed = Engine(family.model, slots=REQUESTS, positions=128)
    who = [names[i // 2] for i in range(REQUESTS)]
    for slot, name in enumerate(who):
        mixed.prompt(slot, [5, 6, 7], name)
    heads = sum(head.nbytes for head in mixed.decoder.member_heads)
    found["mixed"] = (stepper(mixed, REQUESTS), 1, mixed.step_bytes - mixed.decoder.head.nbytes + heads)
    dense = Engine(big(0), slots=1, positions=128)
    dense.prompt(0, [5, 6, 7])
    found["bf16"] = (stepper(dense, 1), REQUESTS, dense.step_bytes)
    four = Engine(four_bits(), slots=1, positions=128)
    four.prompt(0, [5, 6, 7])
    found["4 bits"] = (stepper(four, 1), REQUESTS, four.step_bytes)
    return found


def measured(found: dict[str, tuple[Callable[[], None], int, int]]) -> dict[str, float]:
    """Median seconds of all eight requests' next tokens, ways interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(ROUNDS + 1):
        for name, (step, count, _) in found.items():
            began = time.perf_counter()
            for _ in range(count):
                step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    need_models()
    with torch.inference_mode():
        wrong = same_tokens()
        print("tokens: " + ("; ".join(wrong) or f"all {REQUESTS} requests as each member alone, both ways"))
        found = ways()
        seconds = measured(found)
    from llmcompress_kernels import cpu

    for name, (_, count, size) in found.items():
        rate = size * count / seconds[name] / 1e9
        print(
            f"{name:7s} {1e3 * seconds[name]:8.1f} ms for 8 tokens  {size * count / 1e6:8.1f} MB read  {rate:5.1f} GB/s"
        )
    bf16, four = (seconds[name] / seconds["mixed"] for name in ("bf16", "4 bits"))
    holds = not wrong and bf16 >= 5 and four >= 1.3
    verdict(
        holds,
        f"mixed batch {bf16:.2f} times eight bf16 decodes (goal 5), {four:.2f} times eight 4-bit decodes (goal 1.3), "
        f"{torch.get_num_threads()} threads, {cpu.isa()}; tokens {'equal' if not wrong else 'DIFFER: ' + wrong[0]}",
    )


if __name__ == "__main__":
    main()
