"""Prompts that are read in parts, and sequences that begin with what is held already."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import mamba2

from llmcompress.errors import InputError
from llmcompress.inference.caches import LEAST_PREFIX, Snapshot, Snapshots, shared_prefix
from llmcompress.inference.engine import Engine
from llmcompress.inference.recurrent import RecurrentEngine
from llmcompress.models.registry import layout_from_config
from llmcompress.nn import skipping
from llmcompress.nn.mixers import attach

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")
needs_states = pytest.mark.skipif(mamba2.unavailable() is not None, reason=f"no native kernels: {mamba2.unavailable()}")
# of float32 sums in another order, logits being of size 1
EXACT = 3e-5
PARTS = [(0, 1, 90), (0, 8, 17, 25, 90), (0, 64, 89, 90), (0, 40, 80, 90)]


def in_parts(engine: Any, slot: int, tokens: list[int], cuts: tuple[int, ...]) -> torch.Tensor:
    found = torch.empty(0)
    for start, end in pairwise(cuts):
        assert len(found) == 0
        found = engine.prompt(slot, tokens[start:end], start=start, last=end == cuts[-1])
    return found


@needs_native
@pytest.mark.parametrize("cuts", PARTS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "mixtral", "olmo3", "phi3", "gemma2", "deepseek_v2"])
def test_parts_of_a_packed_prompt_are_the_whole_bit_by_bit(
    decoders: Any, ids: torch.Tensor, family: str, threads: int, cuts: tuple[int, ...]
) -> None:
    engine, tokens = Engine(decoders.packed(family, 4), slots=2, positions=96, threads=threads), ids[:90].tolist()
    whole = engine.prompt(0, tokens)
    assert torch.equal(in_parts(engine, 1, tokens, cuts), whole)
    assert torch.equal(engine.cache.keys[:, 0], engine.cache.keys[:, 1])
    assert torch.equal(engine.cache.values[:, 0], engine.cache.values[:, 1])
    assert engine.lengths == [90, 90]


@needs_native
@pytest.mark.parametrize("cuts", PARTS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "olmo3", "glm4", "gemma2", "deepseek_v2", "deepseek_v3"])
def test_parts_of_a_dense_prompt_give_its_logits(
    decoders: Any, ids: torch.Tensor, family: str, cuts: tuple[int, ...]
) -> None:
    engine, tokens = Engine(decoders.dense(family), slots=2, positions=96), ids[:90].tolist()
    assert not engine.decoder.takes_prompts
    whole = engine.prompt(0, tokens)
    assert (in_parts(engine, 1, tokens, cuts) - whole).abs().max() < EXACT
    more = engine.step(torch.tensor([5, 5]), [0, 1])
    assert (more[0] - more[1]).abs().max() < EXACT


@needs_native
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "olmo3", "deepseek_v2"])
def test_a_sequence_begins_with_anothers_tokens(decoders: Any, ids: torch.Tensor, family: str, packed: bool) -> None:
    model = decoders.packed(family, 4) if packed else decoders.dense(family)
    engine, tokens = Engine(model, slots=3, positions=96), ids[:80].tolist()
    engine.prompt(0, [*tokens[:50], 7, 8, 9])
    engine.step(torch.tensor([11]), [0])
    engine.copy(0, 2, 50)
    assert engine.lengths == [54, 0, 50]
    found = engine.prompt(2, tokens[50:], start=50)
    expected = engine.prompt(1, tokens)
    assert torch.equal(found, expected) if packed else (found - expected).abs().max() < EXACT
    # and a sequence goes on from the middle of its own
    assert (engine.prompt(0, tokens[50:], start=50) - expected).abs().max() < EXACT
    assert engine.lengths == [80, 80, 80]


@needs_native
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_sequences_outlive_growth(decoders: Any, ids: torch.Tensor, family: str) -> None:
    model = decoders.packed(family, 4, **({"head_dim": 32} if family == "qwen3" else {}))
    engine, tokens = Engine(model, positions=48), ids[:60].tolist()
    engine.prompt(0, tokens[:40])
    engine.reserve(200, 3)
    assert engine.lengths == [40, 0, 0]
    assert torch.equal(engine.prompt(0, tokens[40:], start=40), engine.prompt(1, tokens))


@needs_native
def test_what_cannot_go_on_is_said_so(decoders: Any, ids: torch.Tensor) -> None:
    model = decoders.packed("mixtral", 4)
    engine, tokens = Engine(model, slots=2, positions=48), ids[:40].tolist()
    engine.prompt(0, tokens[:9])
    with pytest.raises(InputError, match="holds 9 tokens and cannot go on from 10"):
        engine.prompt(0, tokens, start=10)
    with pytest.raises(InputError, match="49 tokens exceed"):
        engine.prompt(0, tokens, start=9)
    with pytest.raises(InputError, match="sequence 2 of 2"):
        engine.copy(0, 2, 4)
    with pytest.raises(InputError, match="holds 9 tokens, not 10"):
        engine.copy(0, 1, 10)
    skipping.attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9, "min_len": 8})
    assert (engine.piece, engine.keeps_prefixes) == (None, False)
    for start, last in ((9, True), (0, False)):
        with pytest.raises(InputError, match="whole prompt"):
            engine.prompt(0, tokens[:20], start=start, last=last)


_MAMBA2 = {"num_heads": 6, "head_dim": 16, "state_size": 32}
_MAMBA1 = {"state_size": 16, "time_step_rank": 16}


@needs_states
@pytest.mark.parametrize(("family", "bits"), [("mamba2", None), ("mamba2", 4), ("mamba", None), ("falcon_mamba", 4)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cuts", [(0, 64, 300), (0, 128, 192, 300), (0, 256, 300)])
@torch.inference_mode()
def test_parts_of_a_state_space_prompt_are_the_whole_bit_by_bit(
    family: str, bits: int | None, threads: int, cuts: tuple[int, ...], tiny: Any
) -> None:
    sizes = {"hidden_size": 48, "expand": 2, "vocab_size": 70, **(_MAMBA2 if family == "mamba2" else _MAMBA1)}
    model = tiny.model(family, **sizes, conv_kernel=4, num_hidden_layers=2)
    if bits is not None:
        attach(model, layout_from_config(model.config.to_dict()), {"bits": bits, "codec": "dsq"})
    tokens = torch.randint(3, 70, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    engine = RecurrentEngine(model, slots=3, threads=threads)
    whole, other = engine.prompt(0, tokens), engine.prompt(2, tokens[:50])
    alone = engine.step(torch.tensor([9]), [2]).clone()
    engine.prompt(2, tokens[:50])
    found = torch.empty(0)
    for start, end in pairwise(cuts):
        found = engine.prompt(1, tokens[start:end], start=start, last=end == 300)
        if end == cuts[1]:
            # somebody else's step in between
            assert torch.equal(engine.step(torch.tensor([9]), [2]), alone)
    assert torch.equal(found, whole)
    assert other.shape == whole.shape
    for held in (engine.states.codes, engine.states.scale, engine.states.floats, engine.states.conv):
        assert held is None or torch.equal(held[:, 0], held[:, 1])
    engine.prompt(1, tokens[:64], last=False)
    engine.prompt(0, tokens[:9])
    with pytest.raises(InputError, match="its state is not at hand"):
        engine.prompt(1, tokens[64:], start=64)
    with pytest.raises(InputError, match="cut short"):
        engine.copy(0, 1, 5)


@needs_states
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["mamba2", "falcon_mamba"])
@torch.inference_mode()
def test_a_snapshot_outlives_other_prompts(family: str, threads: int, tiny: Any) -> None:
    """Three threads share the channels of a short part otherwise than those of a long one."""
    heads = {"hidden_size": 96, "num_heads": 3, "head_dim": 64, "state_size": 32, "n_groups": 1}
    sizes = heads if family == "mamba2" else {"hidden_size": 96, **_MAMBA1}
    model = tiny.model(family, **sizes, expand=2, vocab_size=70, conv_kernel=4, num_hidden_layers=2)
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq", "window": 2})
    tokens = torch.randint(3, 70, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    engine = RecurrentEngine(model, slots=3, threads=threads)
    whole = engine.prompt(0, tokens)
    with pytest.raises(InputError, match="is not being read"):
        engine.snapshot(0)
    engine.prompt(1, tokens[:64], last=False)
    with pytest.raises(InputError, match="is not being read"):
        engine.snapshot(2)
    kept = engine.snapshot(1)
    assert (kept.count, kept.nbytes) == (64, engine.snapshot_bytes(64))
    engine.prompt(1, tokens[64:100], start=64)
    engine.prompt(2, tokens[::-1])
    engine.step(torch.tensor([5]), [2])
    engine.resume(1, kept)
    assert torch.equal(engine.prompt(1, tokens[64:], start=64), whole)
    for held in (engine.states.codes, engine.states.scale, engine.states.conv):
        assert held is not None
        assert torch.equal(held[:, 0], held[:, 1])
    assert engine.lengths[:2] == [300, 300]


def test_snapshots_are_taken_where_prompts_end_and_part() -> None:
    def snapshot(count: int, floats: int) -> Snapshot:
        return Snapshot(count, None, torch.zeros(floats))

    held, first = Snapshots(1000), list(range(200))
    assert held.cuts(first, 0, 64) == [192]
    assert held.find(first) is None
    held.keep(first[:192], snapshot(192, 192))
    assert held.find(first) is not None
    # the logits after the last token are wanted
    assert held.find(first[:192]) is None
    assert held.cuts(first, 192, 64) == []
    other = [*range(150), *range(500, 560)]
    assert held.find(other) is None
    assert held.cuts(other, 0, 64) == [128, 192]
    held.keep(other[:128], snapshot(128, 50))
    found = held.find([*range(140), 7])
    assert found is not None
    assert found.count == 128
    # 192 + 50 floats are within 1000 bytes; the one used longest ago makes room for the next
    assert held.nbytes == 968
    held.keep(other[:64], snapshot(64, 10))
    found = held.find(first)
    assert found is not None
    assert found.count == 128
    assert held.nbytes == 240
    held.keep(first[:192], snapshot(192, 300))
    assert held.nbytes == 240


@pytest.mark.parametrize("common", [0, 3, LEAST_PREFIX, LEAST_PREFIX + 1, 47, 63, 64, 80])
def test_the_prefix_that_two_share(common: int) -> None:
    held = list(range(80))
    prompt = [*held[:common], 999, *held[common + 1 : 64]]
    expected = min(common, len(prompt) - 1)
    assert shared_prefix(held, prompt) == (expected if expected >= LEAST_PREFIX else 0)
    # the last token is computed in any case
    assert shared_prefix(held, held[:40]) == 39
    assert shared_prefix(held[:LEAST_PREFIX], held) == LEAST_PREFIX
    assert shared_prefix([], held) == 0
