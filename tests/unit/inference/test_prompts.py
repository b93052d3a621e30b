"""Prompts through the native layers at once: the numbers of steps of eight tokens, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import decode as native
from llmcompress_kernels.decode_layer import Heads

from llmcompress.inference.coverage import FAMILIES
from llmcompress.inference.engine import Engine
from llmcompress.inference.speed import rounded
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import attach
from llmcompress.quant.spec import QuantSpec

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")


# rows of whole blocks: 24 of the fixture's keys and values are none
QWEN3 = {"head_dim": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3, "qwen3_moe": {"moe_intermediate_size": 48}, "mellum": {"moe_intermediate_size": 48},
}  # fmt: skip


def both(engine: Engine, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last token at once and by steps; the cache's first two sequences hold the rest."""
    return engine._prompt_at_once(0, tokens.tolist()), engine._prompt_by_steps(1, tokens.tolist())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_steps(decoders: Any, ids: torch.Tensor, family: str, bits: int) -> None:
    # more positions than 64 are shared out by chunks in a step with several threads, and summed in another order
    engine = Engine(decoders.packed(family, bits, **CHANGES.get(family, {})), slots=2, positions=96, threads=1)
    assert engine.decoder.takes_prompts
    for count in (9, 30, 75):
        # nothing in the caches is what an earlier text left there
        engine.cache.keys.zero_()
        engine.cache.values.zero_()
        at_once, by_steps = both(engine, ids[:count])
        assert torch.equal(at_once, by_steps), count
        assert torch.equal(engine.cache.keys[:, 0], engine.cache.keys[:, 1]), count
        assert torch.equal(engine.cache.values[:, 0], engine.cache.values[:, 1]), count


@pytest.mark.parametrize("planes", [native.INT8_PLANES, native.FLOAT16_PLANES, native.FLOAT32_PLANES])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", ["qwen2", "mixtral", "deepseek_v2"])
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
        for model in (decoders.packed("qwen3", 3, **QWEN3), decoders.packed("deepseek_v2", 3)):
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


POLICIES: tuple[dict[str, Any], ...] = (
    {"alpha": 0.9},
    {"alpha": 0.9, "keep_top1": True, "renormalize": "yes"},
    {"alpha": 0.9, "renormalize": "no"},
    {"alpha": 1.0, "fallback": "reroute"},
    {"method": "top_k_minus_one"},
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "qwen3_moe",
        "olmoe",
        "qwen2_moe",
        "phimoe",
        "glm4_moe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "ernie4_5_moe",
        "gemma4_text",
        "llama4_text",
        "cohere2_moe",
        "mimo_v2_flash",
        "laguna",
    ],
)
def test_experts_skipped_as_in_modules(decoders: Any, family: str, policy: dict[str, Any]) -> None:
    # more than a piece, so that experts are counted over several
    tokens = torch.randint(3, 72, (600,), generator=torch.Generator().manual_seed(3))
    changes = {**CHANGES[family], "num_hidden_layers": 3} if family == "qwen3_moe" else {}
    model = decoders.packed(family, 4, max_position_embeddings=1024, **changes)
    with torch.inference_mode():
        untouched = model(tokens.unsqueeze(0), use_cache=False).logits[0, -1]
        controller = attach(model, layout_from_config(model.config.to_dict()), policy)
        expected = model(tokens.unsqueeze(0), use_cache=False).logits[0, -1]
        told = controller.statistics()
        controller.reset()
        found = Engine(model, positions=608, threads=2).prompt(0, tokens.tolist())
    mine = controller.statistics()
    assert mine["total"]["slots_dropped"] > 0
    assert {**mine, "seconds": 0} == {**told, "seconds": 0}
    assert (found - expected).abs().max() < 3e-5
    assert (found - untouched).abs().max() > 1e-3


def test_prompts_that_a_policy_leaves_alone(decoders: Any, ids: torch.Tensor) -> None:
    model = decoders.packed("mixtral", 4)
    expected = Engine(model, positions=48).prompt(0, ids[:40].tolist())
    controller = attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9, "min_len": 41})
    engine = Engine(model, positions=48)
    assert torch.equal(engine.prompt(0, ids[:40].tolist()), expected)
    assert torch.equal(engine.prompt(0, ids[:5].tolist()), engine.prompt(0, ids[:5].tolist()))
    assert controller.statistics()["calls"] == {"prefill": 0, "short": 3, "decode": 0}
    assert controller.statistics()["total"]["tokens"] == 0
    # through the modules, which count by themselves
    dense = decoders.dense("mixtral")
    controller = attach(dense, layout_from_config(dense.config.to_dict()), {"alpha": 0.9, "min_len": 41})
    Engine(dense, positions=48).prompt(0, ids[:40].tolist())
    assert controller.statistics()["calls"] == {"prefill": 0, "short": 1, "decode": 0}


def test_what_rerouting_raises(decoders: Any, ids: torch.Tensor) -> None:
    engine = Engine(decoders.packed("mixtral", 4), positions=48, threads=2)
    layers = []

    def refuse(layer: int, logits: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> None:
        layers.append((layer, logits.shape, weights.shape, chosen.shape))
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        native.prompt(engine.decoder, engine.cache, ids[:20], 0, reroute=refuse)
    assert layers == [(0, (20, 8), (20, 2), (20, 2))]


def test_an_expert_beside_others_of_fewer_bits(decoders: Any, ids: torch.Tensor) -> None:
    model = rounded(decoders.dense("qwen2_moe"), QuantSpec(8, 64, True), QuantSpec(2, 16, False))
    at_once, by_steps = both(Engine(model, slots=2, positions=64, threads=1), ids[:40])
    assert torch.equal(at_once, by_steps)
    with torch.inference_mode():
        expected = model(ids[:40].unsqueeze(0)).logits[0, -1]
    assert (at_once - expected).abs().max() < 3e-5


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
    with pytest.raises(ValueError, match=r"tokens: .*int32"):
        native.prompt(engine.decoder, engine.cache, ids[:4].int(), 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"slots": torch.tensor([2, 0], dtype=torch.int32)}, r"sequences \[2, 0\] are not all within 0..1"),
        ({"slots": torch.tensor([-1, 0], dtype=torch.int32)}, "are not all within"),
        ({"slots": torch.tensor([0, 1])}, "slots: .*expected .*int32"),
        ({"slots": torch.tensor([0], dtype=torch.int32)}, "slots: .*or more rows"),
        ({"tokens": torch.tensor([3, 4], dtype=torch.int32)}, "tokens: .*int64"),
        ({"tokens": torch.tensor([3, 9, 4, 9])[::2]}, "tokens: .*contiguous"),
        ({"positions": torch.tensor([0])}, "positions: "),
        ({"logits": torch.empty(1, 320)}, "logits: "),
        ({"logits": torch.empty(2, 100)}, "logits: .*expected"),
        ({"best": torch.empty(2, dtype=torch.int32)}, "best: "),
        ({"logits": torch.empty(2, 320, device="meta")}, "logits: .* on meta"),
        ({"seconds": torch.zeros(len(native.PHASES))}, "seconds: .*float64"),
        ({"seconds": torch.zeros(1, dtype=torch.float64)}, "seconds: .*or more rows"),
    ],
)
def test_what_a_step_would_read_or_write_beyond_its_tensors_is_refused(
    decoders: Any, wrong: dict[str, torch.Tensor], words: str
) -> None:
    engine = Engine(decoders.packed("llama", 4), slots=2, positions=48)
    wide = replace(engine.decoder.layers[0], heads=Heads(6, 2, 8, 1040))
    for field, value in (("layers", [wide] * 2), ("member_heads", [engine.decoder.head] * 65)):
        with pytest.raises(ValueError, match="more than"):
            replace(engine.decoder, **{field: value})
    short = replace(engine.decoder.layers[1], mlp_norm=torch.ones(engine.decoder.hidden - 1))
    with pytest.raises(ValueError, match="mlp_norm of layer 0 has shape"):
        replace(engine.decoder, layers=[short] * 2)
    with_factors = replace(engine.decoder, query_scales=torch.ones(7))
    assert with_factors.positions == 7
    given = {
        "tokens": torch.tensor([3, 4]), "positions": torch.tensor([0, 0]),
        "slots": torch.tensor([0, 1], dtype=torch.int32), "logits": torch.empty(2, engine.decoder.vocabulary),
        "best": torch.empty(2, dtype=torch.int64),
    }  # fmt: skip
    native.step(engine.decoder, engine.cache, **given)
    with pytest.raises(ValueError, match=words):
        native.step(engine.decoder, engine.cache, **{**given, **wrong})
