"""The native engine of models with the gated delta rule against transformers' modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import decode as native

from llmcompress.errors import InputError
from llmcompress.inference.coverage import DELTAS, decline_config
from llmcompress.inference.delta import DeltaEngine
from llmcompress.inference.native import decline, open_engine
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import attach

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

# of the largest logit; float32 sums in another order differ by a few units of the last place
EXACT = 3e-5


@torch.inference_mode()
def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` by transformers."""
    return model(tokens.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize("family", DELTAS)
def test_prompts_and_steps(decoders: Any, sequences: Any, ids: torch.Tensor, family: str, bits: int | None) -> None:
    model = decoders.dense(family) if bits is None else decoders.packed(family, bits)
    assert decline(model) is None
    expected = reference(model, ids[:150])
    # chunks of its own prompt begin and end elsewhere
    for prompt in (1, 70, 140):
        engine = open_engine(model, positions=160)
        assert isinstance(engine, DeltaEngine)
        assert engine.decoder.takes_prompts == (bits is not None)
        found = sequences.natively(engine, ids[:150], prompt)
        assert sequences.off(found, expected[prompt - 1 :]) < EXACT


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # one value head to a key head; short convolutions; keys of one vector
        ("qwen3_next", {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 2, "linear_key_head_dim": 16}),
        ("qwen3_next", {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True}),
        ("qwen3_5_text", {"linear_num_key_heads": 1, "linear_conv_kernel_dim": 8, "tie_word_embeddings": True}),
    ],
)
def test_other_forms(decoders: Any, sequences: Any, ids: torch.Tensor, family: str, changes: dict[str, Any]) -> None:
    model = decoders.packed(family, **changes)
    found = sequences.natively(open_engine(model, positions=112), ids[:100], 90)
    assert sequences.off(found, reference(model, ids[:100])[89:]) < EXACT


@pytest.mark.parametrize("family", DELTAS)
def test_errors_are_those_of_modules(decoders: Any, sequences: Any, ids: torch.Tensor, family: str) -> None:
    sequences.as_exact_as_modules(open_engine(decoders.packed(family), positions=80), ids[:75], 70)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "kimi_linear", "minimax"])
def test_a_prompt_leaves_the_bits_of_steps(decoders: Any, ids: torch.Tensor, family: str, isa: str) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        # more positions than 64 are shared out by chunks in a step with several threads
        engine = open_engine(decoders.packed(family), slots=2, positions=144, threads=1)
        told = engine.prompt(0, ids[:130].tolist())
        engine.prompt(1, ids[:1].tolist())
        for position in range(1, 130):
            stepped = engine.step(ids[position : position + 1], [1])[0]
        assert torch.equal(told, stepped)
        for part in (engine.cache.states, engine.cache.inputs, engine.cache.keys, engine.cache.values):
            assert torch.equal(part[:, 0], part[:, 1])
        assert engine.cache.states.abs().max() > 0.05
    finally:
        native.set_isa(None)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(decoders: Any, sequences: Any, ids: torch.Tensor, threads: int) -> None:
    model, found = decoders.packed("qwen3_next"), []
    for count in (1, threads):
        engine = open_engine(model, slots=3, positions=112, threads=count)
        rows = [engine.prompt(slot, ids[slot : 90 + slot].tolist()) for slot in range(3)]
        found.append([*rows, *engine.step(ids[100:103]), engine.cache.states])
    for a, b in zip(*found):
        assert sequences.off(a, b) < EXACT
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "kimi_linear", "minimax"])
def test_a_prompt_in_parts_and_from_a_snapshot(decoders: Any, ids: torch.Tensor, family: str) -> None:
    model = decoders.packed(family)
    engine = open_engine(model, slots=2, positions=160)
    assert engine.keeps_snapshots
    piece = engine.piece
    assert piece is not None
    whole = engine.prompt(0, ids[:150].tolist()).clone()
    assert engine.prompt(1, ids[:piece].tolist(), last=False).numel() == 0
    snapshot = engine.snapshot(1)
    assert snapshot.nbytes == engine.snapshot_bytes(piece)
    assert torch.equal(engine.prompt(1, ids[piece:150].tolist(), start=piece), whole)
    assert torch.equal(engine.cache.states[:, 0], engine.cache.states[:, 1])
    # another prompt in between, and in the place of the first
    engine.prompt(1, ids[7:60].tolist())
    engine.resume(0, snapshot)
    assert torch.equal(engine.prompt(0, ids[piece:150].tolist(), start=piece), whole)
    with pytest.raises(InputError, match="its state is not at hand"):
        engine.prompt(0, ids[piece:150].tolist(), start=piece)
    with pytest.raises(InputError, match="cut short"):
        engine.copy(0, 1, 20)


@pytest.mark.parametrize("family", DELTAS)
def test_written_and_served_alike(decoders: Any, sequences: Any, ids: torch.Tensor, family: str) -> None:
    model = decoders.packed(family)
    sequences.written_alike(model, ids)
    engine = open_engine(model, slots=2, positions=64, threads=1)
    sizes = engine.decoder.layers[0].delta.sizes
    state = 4 * (3 * sizes.heads * sizes.key_dim * sizes.value_dim)
    sequences.served_alike(
        engine, lambda: open_engine(model, positions=64, threads=1), ids, lambda count: count * state
    )


def test_room_grows_and_states_stay(decoders: Any, ids: torch.Tensor) -> None:
    model = decoders.packed("qwen3_next")
    small, large = open_engine(model, positions=48), open_engine(model, slots=3, positions=96)
    for engine in (small, large):
        engine.prompt(0, ids[:40].tolist())
    small.reserve(96, 3)
    for position in range(40, 50):
        token = ids[position : position + 1]
        assert torch.equal(small.step(token, [0]), large.step(token, [0]))


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "minimax"])
def test_experts_are_skipped_as_in_modules(decoders: Any, sequences: Any, ids: torch.Tensor, family: str) -> None:
    model, tokens = decoders.packed(family), ids[:200]
    with torch.inference_mode():
        untouched = model(tokens.unsqueeze(0), use_cache=False).logits[0, -1]
        controller = attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9})
        expected = model(tokens.unsqueeze(0), use_cache=False).logits[0, -1]
        found = open_engine(model, positions=208).prompt(0, tokens.tolist())
    assert controller.statistics()["total"]["slots_dropped"] > 0
    assert sequences.off(found, expected) < EXACT
    assert (found - untouched).abs().max() > 1e-3


def test_sixteen_bit_models_lose_less_than_by_modules(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.packed("qwen3_5_text").to(torch.bfloat16), ids[:40]
    modules = reference(model, tokens).float()
    engine = open_engine(model, positions=48)
    natively = torch.stack([engine.prompt(0, tokens[: count + 1].tolist()) for count in range(40)])
    exact = reference(model.float(), tokens)
    assert EXACT < (natively - exact).norm() < 0.6 * (modules - exact).norm()


def test_what_is_declined(decoders: Any) -> None:
    for family in DELTAS:
        assert decline_config({"model_type": family}) is None
        assert "gelu" in str(decline_config({"model_type": family, "hidden_act": "gelu"}))
    assert "40 columns are no multiple of 16" in str(decline(decoders.dense("qwen3_next", linear_value_head_dim=40)))
    assert "over 9 tokens" in str(decline(decoders.dense("qwen3_5_text", linear_conv_kernel_dim=9)))
    assert "none of its layers has attention" in str(decline(decoders.dense("qwen3_next", num_hidden_layers=2)))
    assert "see 32 tokens alone (sliding_window)" in str(decline(decoders.dense("minimax", sliding_window=32)))
    model = decoders.dense("qwen3_next")
    model.model.layers[0].linear_attn.in_proj_ba.register_forward_pre_hook(lambda module, inputs: None)
    assert "in_proj_ba has hooks" in str(decline(model))


def test_a_step_takes_one_token_of_a_sequence(decoders: Any, ids: torch.Tensor) -> None:
    engine = open_engine(decoders.packed("qwen3_next"), positions=32)
    with pytest.raises(ValueError, match="one token a step"):
        native.step(
            engine.decoder, engine.cache, ids[:2], torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int32),
            engine._logits, planes=engine.planes,
        )  # fmt: skip


def test_projections_of_queries_keys_and_values_may_be_packed_differently(
    decoders: Any, sequences: Any, ids: torch.Tensor
) -> None:
    model = decoders.packed("olmo_hybrid")
    other = decoders.packed("olmo_hybrid", bits=8)
    for index, layer in enumerate(model.model.layers[:3]):
        layer.linear_attn.k_proj = other.model.layers[index].linear_attn.k_proj
    engine = open_engine(model, positions=112)
    assert engine.decoder.takes_prompts
    assert sequences.off(sequences.natively(engine, ids[:100], 90), reference(model, ids[:100])[89:]) < EXACT
