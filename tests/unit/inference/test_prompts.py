"""Prompts through the native layers at once: the numbers of steps of eight tokens, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import decode as native

from llmcompress.inference.engine import Engine

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")


# rows of whole blocks: 24 of the fixture's keys and values are none
QWEN3 = {"head_dim": 32}
QWEN3_MOE = {"moe_intermediate_size": 48}


def both(engine: Engine, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last token at once and by steps; the cache's first two sequences hold the rest."""
    return engine._prompt_at_once(0, tokens.tolist()), engine._prompt_by_steps(1, tokens.tolist())


@pytest.mark.parametrize("count", [9, 30, 75])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe"])
def test_the_numbers_of_steps(decoders: Any, ids: torch.Tensor, family: str, bits: int, count: int) -> None:
    # more positions than 64 are shared out by chunks in a step with several threads, and summed in another order
    changes = {"qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}.get(family, {})
    engine = Engine(decoders.packed(family, bits, **changes), slots=2, positions=96, threads=1)
    assert engine.decoder.takes_prompts
    at_once, by_steps = both(engine, ids[:count])
    assert torch.equal(at_once, by_steps)
    assert torch.equal(engine.cache.keys[:, 0], engine.cache.keys[:, 1])
    assert torch.equal(engine.cache.values[:, 0], engine.cache.values[:, 1])


@pytest.mark.parametrize("planes", [native.INT8_PLANES, native.FLOAT16_PLANES, native.FLOAT32_PLANES])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_threads_do_not_matter(decoders: Any, ids: torch.Tensor, threads: int, planes: int, family: str) -> None:
    model = decoders.packed(family, 4)
    found = []
    for count in (1, threads):
        engine = Engine(model, positions=128, threads=count, cache_dtype=torch.bfloat16)
        engine.planes = planes
        found.append((engine._prompt_at_once(0, ids[:100].tolist()), engine.cache.keys, engine.cache.values))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_every_instruction_set(decoders: Any, ids: torch.Tensor, isa: str) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        model = decoders.packed("qwen3", 3, **QWEN3)
        at_once, by_steps = both(Engine(model, slots=2, positions=48, threads=1), ids[:45])
        assert torch.equal(at_once, by_steps)
    finally:
        native.set_isa(None)


def test_more_tokens_than_go_through_the_layers_at_once(decoders: Any) -> None:
    tokens = torch.randint(3, 60, (700,), generator=torch.Generator().manual_seed(2))
    model = decoders.packed("llama", 4, max_position_embeddings=1024)
    engine = Engine(model, slots=2, positions=704, threads=2)
    expected = model(tokens.unsqueeze(0)).logits[0, -1]
    assert (engine.prompt(0, tokens.tolist()) - expected).abs().max() < 3e-5


def test_a_prompt_in_parts(decoders: Any, ids: torch.Tensor) -> None:
    engine = Engine(decoders.packed("llama", 3), slots=2, positions=96, threads=2)
    whole = native.prompt(engine.decoder, engine.cache, ids[:90], 0)
    native.prompt(engine.decoder, engine.cache, ids[:50], 1)
    rest = native.prompt(engine.decoder, engine.cache, ids[50:90], 1, start=50)
    assert torch.equal(whole, rest)
    assert torch.equal(engine.cache.keys[:, 0], engine.cache.keys[:, 1])


def test_widths_that_differ_within_a_layer(decoders: Any, ids: torch.Tensor) -> None:
    model, other = decoders.packed("llama", 4), decoders.packed("llama", 2, group_size=16)
    for mine, theirs in zip(model.model.layers, other.model.layers):
        mine.self_attn.k_proj = theirs.self_attn.k_proj
        mine.mlp.up_proj = theirs.mlp.up_proj
    at_once, by_steps = both(Engine(model, slots=2, positions=64, threads=1), ids[:40])
    assert torch.equal(at_once, by_steps)


def test_what_it_does_not_take(decoders: Any, ids: torch.Tensor) -> None:
    for model in (decoders.dense("mixtral"), decoders.dense("llama"), decoders.packed("qwen3", 4)):
        engine = Engine(model, positions=48)
        assert not engine.decoder.takes_prompts
        with pytest.raises(ValueError, match="packed weights"):
            native.prompt(engine.decoder, engine.cache, ids[:4], 0)
    engine = Engine(decoders.packed("llama", 4), positions=48)
    for tokens, slot, start in ((ids[:0], 0, 0), (ids[:49], 0, 0), (ids[:9], 0, 40), (ids[:4], 1, 0), (ids[:4], 0, -1)):
        with pytest.raises(ValueError, match="do not fit"):
            native.prompt(engine.decoder, engine.cache, tokens, slot, start)
    with pytest.raises(ValueError, match="not all within"):
        native.prompt(engine.decoder, engine.cache, torch.tensor([10**6]), 0)
    with pytest.raises(ValueError, match="1, 2 or 3 bytes"):
        native.prompt(engine.decoder, engine.cache, ids[:4], 0, planes=4)
