"""The native engine of models with states alone against transformers' modules, which run on the same operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import mamba1
from llmcompress_kernels import mamba2 as native
from transformers import DynamicCache

from llmcompress.errors import InputError
from llmcompress.inference import recurrent
from llmcompress.inference.native import decline, open_engine
from llmcompress.inference.recurrent import RecurrentEngine
from llmcompress.models.assemble import compressed_model
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig
from llmcompress.stages.rtn import Rtn, RtnConfig

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_heads": 6, "head_dim": 16, "expand": 2, "state_size": 32, "vocab_size": 70,
    "conv_kernel": 4, "num_hidden_layers": 2,
}  # fmt: skip
MAMBA1: dict[str, Any] = {
    "hidden_size": 48, "expand": 2, "state_size": 16, "time_step_rank": 16, "vocab_size": 70, "conv_kernel": 4,
    "num_hidden_layers": 2, "use_associative_scan": False,
}  # fmt: skip
FAMILIES = {"mamba2": SIZES, "mamba": MAMBA1, "falcon_mamba": MAMBA1}
IDS = torch.randint(3, 70, (330,), generator=torch.Generator().manual_seed(5))
RULES = {"projections": {"role": "ssm", "bits": 8, "group_size": -1, "symmetric": True}}
# logits are of size 1; float32 sums in another order differ by a few units of the last place
EXACT = 2e-5


def packed(
    tiny: Any, folder: Path, states: dict[str, Any] | None, embeddings: bool = True, family: str = "mamba2",
    **changes: Any,
) -> Any:  # fmt: skip
    """W8A8 with low-bit states, as the stages make it."""
    state = tiny.state(folder / "model", family, **{**FAMILIES[family], **changes})
    Rtn("weights", RtnConfig.model_validate({"rules": RULES})).run(state, tiny.context(folder))
    Activations("activations", ActivationsConfig(granularity="chunk")).run(state, tiny.context(folder))
    if embeddings:
        Embeddings("embeddings", EmbeddingsConfig(bits=8)).run(state, tiny.context(folder))
    if states is not None:
        state.policies["state_cache"] = states
    return compressed_model(state.model, state.packed, state.policies, torch.float32).eval()


@torch.inference_mode()
def by_modules(model: Any, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, Any]:
    """Logits ``[T, V]`` from the prompt's last token on, and the cache."""
    cache = DynamicCache(config=model.config)
    rows = [model(tokens[None, :prompt], cache_params=cache, use_cache=True).logits[0, -1]]
    for token in tokens[prompt:]:
        rows.append(model(token[None, None], cache_params=cache, use_cache=True).logits[0, -1])
    return torch.stack(rows), cache


DENSE: list[tuple[str, dict[str, Any]]] = [
    ("mamba2", {}),
    ("mamba2", {"n_groups": 1, "use_bias": True, "tie_word_embeddings": False}),
    ("mamba", {}),
    ("mamba", {"use_bias": True, "tie_word_embeddings": False, "use_conv_bias": False}),
    ("falcon_mamba", {}),
    # heads of 64 and of 16 channels
    ("falcon_mamba", {"hidden_size": 64, "time_step_rank": 32}),
    ("mamba", {"hidden_size": 16, "expand": 3}),
]


@pytest.mark.parametrize("prompt", [1, 3, 300])
@pytest.mark.parametrize(("family", "changes"), DENSE)
def test_a_dense_model_with_float_states_agrees(
    family: str, changes: dict[str, Any], prompt: int, tiny: Any, sequences: Any
) -> None:
    model, tokens = tiny.model(family, **{**FAMILIES[family], **changes}), IDS[: prompt + 4]
    expected, cache = by_modules(model, tokens, prompt)
    engine = open_engine(model, slots=2)
    assert isinstance(engine, RecurrentEngine)
    assert sequences.off(sequences.natively(engine, tokens, prompt, 1), expected) < EXACT
    for layer, kept in zip(cache.layers, engine.states.floats[:, 1]):
        held = kept if family == "mamba2" else mamba1.unblocked(kept)
        torch.testing.assert_close(held, layer.recurrent_states[0][0], rtol=1e-4, atol=5e-6)
    assert engine.lengths == [0, len(tokens)]


STORED = [
    ("dsq", "rtn", 1),
    ("dsq_refit", "rtn", 1),
    ("dsq", "dither", 1),
    ("dsq", "dither", 4),
    ("dsq_refit", "rtn", 3),
]


@pytest.mark.parametrize(("codec", "rounding", "window"), STORED)
@pytest.mark.parametrize(("family", "bits"), [("mamba2", 4), ("mamba2", 8), ("falcon_mamba", 4), ("mamba", 8)])
@torch.inference_mode()
def test_a_packed_model_gives_the_same_codes(
    family: str, bits: int, codec: str, rounding: str, window: int, tiny: Any, tmp_path: Path, sequences: Any
) -> None:
    """Step by step from the same states: a float32 sum in another order may move an int8 input, and with it a scale,
    across a rounding boundary; a dither, which the scale's last bit gives, then parts the two for good."""
    policy = {"bits": bits, "codec": codec, "rounding": rounding, "window": window}
    changes = {"tie_word_embeddings": bits == 4}
    model, tokens = packed(tiny, tmp_path, policy, codec == "dsq", family, **changes), IDS[:60]
    engine, cache, differ = RecurrentEngine(model), DynamicCache(config=model.config), []
    for at in range(39, len(tokens)):
        given = tokens[: at + 1] if at == 39 else tokens[at : at + 1]
        expected = model(given[None], cache_params=cache, use_cache=True).logits[0, -1]
        found = engine.prompt(0, given.tolist()) if at == 39 else engine.step(given, [0])[0]
        assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())
        assert int(found.argmax()) == int(expected.argmax())
        differ += sequences.differing(engine.states, cache.layers, window, at - 39)
    assert sum(differ) / len(differ) < 0.01


@pytest.mark.parametrize(("family", "window"), [("mamba2", 1), ("mamba2", 4), ("mamba", 1), ("falcon_mamba", 4)])
def test_generation_takes_it_and_writes_the_same(
    family: str, window: int, tiny: Any, tmp_path: Path, sequences: Any
) -> None:
    model = packed(tiny, tmp_path, {"bits": 4, "codec": "dsq", "window": window}, family=family)
    sequences.written_alike(model, IDS)


@pytest.mark.parametrize(("family", "window"), [("mamba2", 1), ("mamba2", 4), ("falcon_mamba", 1), ("mamba", 4)])
def test_serving_takes_it(family: str, window: int, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    """Sequences join and leave at any place of the others' windows, and get places that others left in the middle."""
    policy = {"bits": 4, "codec": "dsq", "rounding": "dither", "window": window}
    model = packed(tiny, tmp_path, policy, family=family)
    engine = RecurrentEngine(model, slots=2)
    sequences.served_alike(engine, lambda: RecurrentEngine(model), IDS, lambda count: engine.states.nbytes * count // 2)


def test_more_sequences_need_more_room(tiny: Any) -> None:
    engine = RecurrentEngine(tiny.model("mamba2", **SIZES))
    engine.prompt(0, [3, 4])
    held = engine.states
    engine.reserve(1000, 1)
    assert engine.states is held
    engine.reserve(1, 5)
    assert (engine.slots, engine.lengths) == (5, [0] * 5)
    for tokens, slot in (([3], 5), ([], 0)):
        with pytest.raises(InputError, match="sequence"):
            engine.prompt(slot, tokens)
    with pytest.raises(InputError, match="cache_dtype"):
        open_engine(engine.model, cache_dtype=torch.float32)
    assert set(engine.profile(torch.tensor([3, 4]))) == set(native.PHASES)


REFUSED: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({"conv_kernel": 3}, None, "convolution"),
    ({"state_size": 16}, None, "16 channels by 16"),
    ({"hidden_act": "gelu"}, None, "gelu"),
    ({"hidden_size": 40, "num_heads": 5, "n_groups": 1}, None, "hidden size 40"),
    ({}, {"bits": 4, "codec": "per_channel"}, "per_channel"),
    ({}, {"bits": 6, "codec": "dsq"}, "several widths"),
    ({}, {"bits": 4, "codec": "dsq", "window": 65}, "window of 65 tokens"),
]


@pytest.mark.parametrize(("changes", "policy", "reason"), REFUSED)
def test_what_it_cannot_run_it_declines(
    changes: dict[str, Any], policy: dict[str, Any] | None, reason: str, tiny: Any, sequences: Any
) -> None:
    model = tiny.model("mamba2", **{**SIZES, **changes})
    sequences.refused(model, policy, reason)


def test_hooks_and_other_families_are_declined(tiny: Any) -> None:
    model = tiny.model("mamba2", **SIZES)
    model.backbone.layers[0].mixer.in_proj.register_forward_pre_hook(lambda module, inputs: None)
    assert "hooks" in str(decline(model))
    assert "mixtral is not among" in str(recurrent.decline(tiny.model("mixtral")))


@pytest.mark.parametrize(
    ("changes", "policy", "reason"),
    [
        ({"state_size": 8}, None, "32 channels by 8"),
        ({"hidden_size": 24, "expand": 1}, None, "8 channels by 16"),
        ({"time_step_rank": 5}, None, "rank 5"),
        ({}, {"bits": 4, "codec": "per_channel"}, "per_channel"),
    ],
)
def test_mixers_of_mamba_that_it_cannot_run(
    changes: dict[str, Any], policy: dict[str, Any] | None, reason: str, tiny: Any, sequences: Any
) -> None:
    sequences.refused(tiny.model("falcon_mamba", **{**MAMBA1, **changes}), policy, reason)
