"""Layers whose tokens see a window: against transformers, and with room for the last positions alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import decode_windows

from llmcompress.errors import InputError
from llmcompress.inference.engine import Engine
from llmcompress.inference.generate import Generator, Sampling
from llmcompress.serving.rows import NativeRows

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

# of float32 sums in another order, logits being of size 4
EXACT = 3e-5
# all layers, some, and a window that is a whole number of vectors
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 20},
    "mixtral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 0, "head_dim": 32},
    "olmo3": {},
    "phi3": {"sliding_window": 20},
    "starcoder2": {},
    "gemma2": {},
    "gemma3_text": {},
    "cohere2": {},
    "cwm": {},
    "exaone4": {},
    "exaone_moe": {},
    "gemma4_text": {"enable_moe_block": False},
    "mimo_v2_flash": {},
    "laguna": {},
}
# families whose layers with windows hold the last positions alone: routed ones hold all
SHORT = [family for family in WINDOWS if family not in ("mixtral", "exaone_moe", "mimo_v2_flash", "laguna")]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for a window and two vectors of tokens, so that some hundred tokens move them often."""
    monkeypatch.setattr(decode_windows, "PIECE", 32)


def model_of(decoders: Any, family: str, packed: bool, **changes: Any) -> Any:
    changes = {**WINDOWS[family], **changes}
    return decoders.packed(family, 4, **changes) if packed else decoders.dense(family, **changes)


@torch.inference_mode()
def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` by transformers."""
    return model(tokens.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", WINDOWS)
def test_layers_that_see_a_window(
    decoders: Any, sequences: Any, ids: torch.Tensor, short: None, family: str, packed: bool, threads: int
) -> None:
    model, tokens = model_of(decoders, family, packed), ids[:220]
    expected = reference(model, tokens)
    wide = model_of(decoders, family, packed, sliding_window=400)
    assert (reference(wide, tokens) - expected).abs().max() > 100 * EXACT
    engine = Engine(model, positions=224, threads=threads)
    assert engine.cache.near is not None
    assert (engine.cache.near.positions < 224) == (family in SHORT)
    # one after the other in the same slot: by steps, then at once and in parts, or through the modules; threads that
    # meet where other processes run take ten times as long, so they take few steps of each kind
    for prompt, end in ((3, 220 if threads == 1 else 30), (60, 220 if threads == 1 else 130), (200, 220)):
        found = sequences.natively(engine, tokens[:end], prompt)
        assert (found - expected[prompt - 1 : end]).abs().max() < EXACT


@pytest.mark.parametrize("family", SHORT)
def test_moved_rows_change_no_bit(decoders: Any, sequences: Any, ids: torch.Tensor, short: None, family: str) -> None:
    model, tokens = model_of(decoders, family, packed=True), ids[:250]
    engine = Engine(model, slots=3, positions=256, threads=1)
    near = engine.cache.near
    assert near is not None
    found = sequences.natively(engine, tokens, 100, slot=1)
    assert near.begins.tolist()[::2] == [0, 0]
    assert near.begins[1] > 0
    decode_windows.PIECE = 512
    whole = Engine(model, slots=3, positions=256, threads=1)
    assert whole.cache.near is not None
    assert (whole.cache.near.positions, whole.cache.near.most) == (256, None)
    assert torch.equal(found, sequences.natively(whole, tokens, 100, slot=1))
    assert near.nbytes < whole.cache.near.nbytes / 2
    assert engine.reserved_bytes < whole.reserved_bytes
    assert engine.held_bytes([1]) < whole.held_bytes([1])


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_forgotten_and_what_is_not(decoders: Any, ids: torch.Tensor, short: None, packed: bool) -> None:
    engine, tokens = Engine(model_of(decoders, "olmo3", packed), slots=3, positions=256), ids[:200].tolist()
    expected = engine.prompt(2, [*tokens[:190], *tokens[:40]])
    engine.prompt(0, tokens)
    assert engine.reusable(0, 190)
    assert not engine.reusable(0, 50)
    assert engine.reusable(1, 50)
    for call in (lambda: engine.prompt(0, tokens[50:], start=50), lambda: engine.copy(0, 1, 50)):
        with pytest.raises(InputError, match="forgotten what comes before token 50"):
            call()
    engine.copy(0, 1, 190)
    for slot in (1, 0):
        found = engine.prompt(slot, tokens[:40], start=190)
        assert torch.equal(found, expected) if packed else (found - expected).abs().max() < EXACT
    # what a sequence holds outlives growth
    engine.reserve(400, 4)
    more = engine.step(torch.tensor([5, 5, 5]), [0, 1, 2])
    assert (more - more[0]).abs().max() < EXACT
    # and a new one begins at the front
    assert torch.equal(engine.prompt(0, tokens[:30]), engine.prompt(3, tokens[:30]))


@pytest.mark.parametrize("family", ["gemma2", "gemma4_text"])
def test_served_prompts_begin_with_what_is_held(decoders: Any, ids: torch.Tensor, short: None, family: str) -> None:
    model, tokens = model_of(decoders, family, packed=True), ids[:240].tolist()
    rows = NativeRows(Engine(model, slots=2, positions=256, threads=1), 2, 256)
    # nothing, all but the last token, a prefix that windows have moved past, and one that they have not
    asked = [(tokens[:200], 0), (tokens[:200], 199), ([*tokens[:60], 7, 7], 0), ([*tokens[:195], 9, 9], 195)]
    for key, (prompt, reused) in enumerate(asked):
        logits = rows.join(key, prompt, None, 210)
        assert rows.reused(key) == reused
        alone = Engine(model, positions=256, threads=1)
        assert logits is not None
        assert torch.equal(logits, alone.prompt(0, prompt))
        for token in (5, 6, 7):
            assert torch.equal(rows.step({key: token})[key], alone.step(torch.tensor([token]))[0])
        rows.leave(key)


def test_conversations_go_on_after_the_window(decoders: Any, ids: torch.Tensor, short: None) -> None:
    model = model_of(decoders, "gemma3_text", packed=True)
    talk, theirs, how = Generator(model, "native", conversation=True), Generator(model, "transformers"), Sampling(8)
    prompt = ids[:90].tolist()
    for turn in range(4):
        (found,), (expected,) = talk.generate([prompt], how), theirs.generate([prompt], how)
        assert found.tokens == expected.tokens
        # the last turn takes back what was said long ago
        assert (found.reused > 0) == (turn in (1, 2))
        prompt = [*prompt, *found.tokens, *ids[200 : 220 + turn].tolist()] if turn < 2 else [*prompt[:40], 5, 6]


def test_a_call_that_would_read_what_is_not_there(decoders: Any, ids: torch.Tensor, short: None) -> None:
    engine = Engine(model_of(decoders, "mistral", packed=True), positions=256)
    engine.prompt(0, ids[:200].tolist())
    token, slot, logits = ids[:1], torch.zeros(1, dtype=torch.int32), torch.empty(1, 72)
    for position in (20, 255):
        with pytest.raises(ValueError, match="do not fit the rows"):
            native.step(engine.decoder, engine.cache, token, torch.tensor([position]), slot, logits)
    with pytest.raises(ValueError, match="do not fit the rows"):
        native.prompt(engine.decoder, engine.cache, ids[:90], 0, start=160)
    near = engine.cache.near
    assert near is not None
    with pytest.raises(ValueError, match="do not fit"):
        near.advance(0, 200, 60)
