"""The native engine of delta rules with states in low bits, against transformers' modules and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu_state
from llmcompress_kernels import decode as native
from transformers import DynamicCache

from llmcompress.inference.native import decline, open_engine
from llmcompress.inference.speed import rounded
from llmcompress.models.registry import layout_from_config
from llmcompress.models.state_memory import sequence_bytes
from llmcompress.nn.mixers import attach, register_scales
from llmcompress.quant.spec import QuantSpec

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None or cpu_state.unavailable() is not None, reason="no native kernels"
)
# whose decays are one for a head
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")
# sizes that have kernels
SIZES = {"linear_key_head_dim": 64, "linear_value_head_dim": 32}
DITHERED = {"bits": 4, "codec": "dsq", "rounding": "dither", "window": 4}
POLICIES: list[dict[str, Any]] = [
    {"bits": 4, "codec": "dsq"}, {"bits": 8, "codec": "dsq"}, DITHERED, {"bits": 4, "codec": "dsq_refit", "window": 3},
    {"bits": 4, "codec": "dsq_static_p"},
]  # fmt: skip


def low(decoders: Any, family: str, policy: dict[str, Any], dense: bool = False, **changes: Any) -> Any:
    """A model with random weights, packed unless ``dense``, and states in low bits."""
    model = decoders.dense(family, **{**SIZES, **changes})
    with torch.no_grad():
        if not dense:
            model = rounded(model, QuantSpec(8, 32, symmetric=False))
        layout = layout_from_config(model.config.to_dict())
        register_scales(model, layout, policy)
        for name, scale in model.named_buffers():
            if name.endswith("state_scale"):
                scale.uniform_(0.1, 0.4)
    attach(model, layout, policy)
    return model


def rules(cache: Any) -> list[Any]:
    """Packed states of a transformers cache, layer by layer."""
    return [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "-".join(str(v) for v in p.values()))
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_codes_are_those_of_modules(
    decoders: Any, ids: torch.Tensor, family: str, policy: dict[str, Any], dense: bool
) -> None:
    model = low(decoders, family, policy, dense)
    assert decline(model) is None
    engine = open_engine(model, slots=2, positions=96)
    assert engine.decoder.takes_prompts == (not dense)
    engine.prompt(1, ids[50:60].tolist())
    told = engine.prompt(0, ids[:70].tolist())
    cache: Any = DynamicCache(config=model.config)
    expected = model(ids[:70][None], past_key_values=cache, use_cache=True).logits[0, -1]
    for position in range(70, 80):
        assert (told - expected).abs().max() < 3e-3 * expected.abs().max()
        for index, held in enumerate(rules(cache)):
            same = (engine.cache.low.codes[index, 0] == held.codes[0][0]).float().mean()
            # sums in another order; a value between two codes goes either way
            assert same > 0.97, (position, index)
            if held.count is not None:
                assert engine.cache.low.count[0] == held.count[0] == (position - 70) % policy["window"]
            channel = None if held.channel is None else held.channel[0]
            count = 0 if held.count is None else int(held.count[0])
            engine.cache.low.fill(index, 0, held.codes[0][0], channel, held.state[0])
            if held.recent is not None:
                engine.cache.low.recent[index, 0, :count] = held.recent[0, :count]
                engine.cache.low.count[0] = count
        told = engine.step(ids[position : position + 1], [0])[0].clone()
        token = ids[position : position + 1][None]
        expected = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
        for index, layer in enumerate(layer for layer in cache.layers if hasattr(layer, "recurrent_states")):
            engine.cache.inputs[index, 0] = layer.conv_states[0][0, :, 1:].mT


@pytest.mark.parametrize("policy", [POLICIES[0], DITHERED], ids=["every", "window"])
def test_parts_snapshots_threads_and_slots_change_no_bit(
    decoders: Any, ids: torch.Tensor, policy: dict[str, Any]
) -> None:
    model, tokens = low(decoders, "qwen3_next", policy), ids[:150].tolist()

    def steps(engine: Any, slot: int) -> list[torch.Tensor]:
        return [engine.step(ids[at : at + 1], [slot])[0].clone() for at in range(150, 157)]

    engine = open_engine(model, slots=2, positions=192, threads=1)
    wanted = [engine.prompt(0, tokens).clone(), *steps(engine, 0)]
    piece = engine.piece
    assert piece is not None
    engine.prompt(1, tokens[:piece], last=False)
    snapshot = engine.snapshot(1)
    assert snapshot.nbytes == engine.snapshot_bytes(piece)
    found = [engine.prompt(1, tokens[piece:], start=piece).clone(), *steps(engine, 1)]
    assert all(map(torch.equal, wanted, found))
    engine.prompt(0, ids[7:60].tolist())
    engine.resume(0, snapshot)
    found = [engine.prompt(0, tokens[piece:], start=piece).clone(), *steps(engine, 0)]
    assert all(map(torch.equal, wanted, found))
    # room for more sequences in the middle of a window and of another prompt
    small = open_engine(model, positions=160, threads=1)
    small.prompt(0, tokens)
    first = small.step(ids[150:151], [0])[0].clone()
    small.reserve(192, 3)
    small.prompt(2, tokens[:piece], last=False)
    small.reserve(256, 4)
    assert torch.equal(small.prompt(2, tokens[piece:], start=piece), wanted[0])
    assert torch.equal(first, wanted[1])
    assert torch.equal(small.step(ids[151:152], [0])[0], wanted[2])


def test_threads_share_heads_out(decoders: Any, ids: torch.Tensor) -> None:
    """Codes move where sums of other layers do; after a prompt, whose bits no thread changes, none does."""
    one, three = (open_engine(low(decoders, "qwen3_next", DITHERED), positions=64, threads=count) for count in (1, 3))
    for engine in (one, three):
        engine.prompt(0, ids[:50].tolist())
    assert torch.equal(one.cache.low.codes, three.cache.low.codes)
    assert torch.equal(one.cache.low.scale, three.cache.low.scale)
    for at in range(50, 55):
        both = [engine.step(ids[at : at + 1], [0])[0] for engine in (one, three)]
        torch.testing.assert_close(*both, rtol=1e-3, atol=1e-2)
    same = (one.cache.low.codes == three.cache.low.codes).float().mean()
    assert same > 0.97


def test_sequences_stand_at_different_places_of_their_windows(decoders: Any, ids: torch.Tensor) -> None:
    model = low(decoders, "qwen3_5_text", DITHERED)
    together, alone = (open_engine(model, slots=2, positions=96, threads=1) for _ in range(2))
    for engine in (together, alone):
        engine.prompt(0, ids[:20].tolist())
    for at in range(20, 22):
        for engine in (together, alone):
            engine.step(ids[at : at + 1], [0])
    together.prompt(1, ids[30:40].tolist())
    for at in range(22, 30):
        both = together.step(ids[[at, at + 18]], [0, 1])
        assert torch.equal(both[0], alone.step(ids[at : at + 1], [0])[0])
    assert together.cache.low.count.tolist() == [2, 0]


@pytest.mark.parametrize("policy", [POLICIES[0], DITHERED], ids=["every", "window"])
def test_a_sequence_takes_the_bytes_of_the_tables(decoders: Any, policy: dict[str, Any]) -> None:
    model = low(decoders, "qwen3_5_moe_text", policy)
    engine = open_engine(model, slots=3, positions=32)
    expected, _, floats = sequence_bytes(layout_from_config(model.config.to_dict()), policy, 4)
    # the number of a window's tokens is the same in all layers
    shared = 4 * 2 if policy.get("window", 1) > 1 else 0
    assert engine.cache.low.nbytes == 3 * (expected - shared)
    assert engine.cache.reading_bytes == floats
    assert engine.cache.held_bytes(0) == expected - shared + engine.cache.inputs.nbytes // 3


def test_what_is_declined(decoders: Any) -> None:
    for changes, policy in (
        ({"linear_key_head_dim": 48}, DITHERED), ({}, {"bits": 6, "codec": "dsq"}),
        ({}, {"bits": 4, "codec": "group32"}), ({}, {"bits": 4, "codec": "dsq", "rounding": "stochastic"}),
    ):  # fmt: skip
        assert "no kernel for states" in str(decline(low(decoders, "qwen3_next", policy, True, **changes)))
    assert "128 value heads share a key head" in str(
        decline(low(decoders, "qwen3_5_text", DITHERED, True, linear_num_key_heads=1, linear_num_value_heads=128))
    )


def test_decays_along_a_key_are_not_kept_in_low_bits(decoders: Any) -> None:
    model = decoders.dense("kimi_linear")
    assert decline(model) is None
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq"})
    assert "no kernel for states of codec dsq" in str(decline(model))
