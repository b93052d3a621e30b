"""The native engine of Mamba-2 against transformers' modules, which run on the same operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import mamba2 as native
from transformers import DynamicCache

from llmcompress.errors import InputError
from llmcompress.inference.generate import Generator, Sampling
from llmcompress.inference.native import decline, open_engine
from llmcompress.inference.recurrent import RecurrentEngine
from llmcompress.models.assemble import compressed_model
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach
from llmcompress.serving.rows import NativeRows
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig
from llmcompress.stages.rtn import Rtn, RtnConfig

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_heads": 6, "head_dim": 16, "expand": 2, "state_size": 32, "vocab_size": 70,
    "conv_kernel": 4, "num_hidden_layers": 2,
}  # fmt: skip
IDS = torch.randint(3, 70, (330,), generator=torch.Generator().manual_seed(5))
RULES = {"projections": {"role": "ssm", "bits": 8, "group_size": -1, "symmetric": True}}
# logits are of size 1; float32 sums in another order differ by a few units of the last place
EXACT = 2e-5


def packed(tiny: Any, folder: Path, states: dict[str, Any] | None, embeddings: bool = True, **changes: Any) -> Any:
    """W8A8 with low-bit states, as the stages make it."""
    state = tiny.state(folder / "model", "mamba2", **{**SIZES, **changes})
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


def natively(engine: RecurrentEngine, tokens: torch.Tensor, prompt: int, slot: int = 0) -> torch.Tensor:
    rows = [engine.prompt(slot, tokens[:prompt].tolist())]
    rows += [engine.step(tokens[i : i + 1], [slot])[0].clone() for i in range(prompt, len(tokens))]
    return torch.stack(rows)


@pytest.mark.parametrize("prompt", [1, 3, 300])
@pytest.mark.parametrize("changes", [{}, {"n_groups": 1, "use_bias": True, "tie_word_embeddings": False}])
def test_a_dense_model_with_float_states_agrees(changes: dict[str, Any], prompt: int, tiny: Any) -> None:
    model, tokens = tiny.model("mamba2", **{**SIZES, **changes}), IDS[: prompt + 4]
    expected, cache = by_modules(model, tokens, prompt)
    engine = open_engine(model, slots=2)
    assert isinstance(engine, RecurrentEngine)
    assert float((natively(engine, tokens, prompt, 1) - expected).abs().max()) < EXACT * float(expected.abs().max())
    for layer, held in zip(cache.layers, engine.states.floats[:, 1]):
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
@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_a_packed_model_gives_the_same_codes(
    bits: int, codec: str, rounding: str, window: int, tiny: Any, tmp_path: Path
) -> None:
    """Step by step from the same states: a float32 sum in another order may move an int8 input, and with it a scale,
    across a rounding boundary; a dither, which the scale's last bit gives, then parts the two for good."""
    policy = {"bits": bits, "codec": codec, "rounding": rounding, "window": window}
    changes = {"tie_word_embeddings": bits == 4}
    model, tokens = packed(tiny, tmp_path, policy, codec == "dsq", **changes), IDS[:60]
    engine, cache, differ = RecurrentEngine(model), DynamicCache(config=model.config), []
    for at in range(39, len(tokens)):
        given = tokens[: at + 1] if at == 39 else tokens[at : at + 1]
        expected = model(given[None], cache_params=cache, use_cache=True).logits[0, -1]
        found = engine.prompt(0, given.tolist()) if at == 39 else engine.step(given, [0])[0]
        assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())
        assert int(found.argmax()) == int(expected.argmax())
        for index, layer in enumerate(cache.layers):
            held, mine = layer.recurrent_states[0], engine.states
            differ.append(float((mine.codes[index, 0] != held.codes[0][0]).float().mean()))
            torch.testing.assert_close(mine.channel[index, 0], held.channel[0], rtol=2e-3, atol=0)
            mine.codes[index, 0], mine.channel[index, 0] = held.codes[0][0], held.channel[0]
            mine.scale[index, 0], mine.conv[index, 0] = held.state[0], layer.conv_states[0][0]
            if window > 1:
                filled = int(held.count[0])
                assert filled == (at - 39) % window == int(mine.count[0])
                mine.recent[index, 0, :filled] = held.recent[0, :filled]
    assert sum(differ) / len(differ) < 0.01


@pytest.mark.parametrize("window", [1, 4])
def test_generation_takes_it_and_writes_the_same(window: int, tiny: Any, tmp_path: Path) -> None:
    model = packed(tiny, tmp_path, {"bits": 4, "codec": "dsq", "window": window})
    prompts = [IDS[:9].tolist(), IDS[9:14].tolist(), IDS[20:61].tolist()]
    own, theirs = Generator(model), Generator(model, "transformers")
    assert (own.engine, own.reason) == ("native", None)
    how = Sampling(16)
    expected = [one.tokens for one in theirs.generate(prompts, how)]
    assert [one.tokens for one in own.generate(prompts, how)] == expected
    # alone, and sampled twice
    assert own.generate(prompts[2:], how)[0].tokens == expected[2]
    sampled = [own.generate(prompts, Sampling(8, temperature=1.0, top_p=0.9, seed=3)) for _ in range(2)]
    assert [one.tokens for one in sampled[0]] == [one.tokens for one in sampled[1]]


@pytest.mark.parametrize("window", [1, 4])
def test_serving_takes_it(window: int, tiny: Any, tmp_path: Path) -> None:
    """Sequences join and leave at any place of the others' windows, and get places that others left in the middle."""
    model = packed(tiny, tmp_path, {"bits": 4, "codec": "dsq", "rounding": "dither", "window": window})
    engine = RecurrentEngine(model, slots=2)
    rows, texts = NativeRows(engine, 2, 1000), {7: IDS[:24], 8: IDS[30:48], 9: IDS[50:66]}
    prompts, starts, stops = {7: 12, 8: 3, 9: 5}, {7: 0, 8: 2, 9: 5}, {7: 12, 8: 5, 9: 12}
    found: dict[int, list[torch.Tensor]] = {key: [] for key in texts}
    for turn in range(12):
        for key in (key for key, stop in stops.items() if stop == turn):
            rows.leave(key)
        for key in (key for key, start in starts.items() if start == turn):
            found[key].append(rows.join(key, texts[key][: prompts[key]].tolist(), None, 30).clone())
        alive = [key for key in texts if starts[key] <= turn < stops[key]]
        assert rows.held_bytes() * 2 == engine.states.nbytes * len(alive)
        taken = {key: int(texts[key][prompts[key] + turn - starts[key]]) for key in alive}
        for key, logits in rows.step(taken).items():
            found[key].append(logits)
    for key, logits in found.items():
        alone = natively(RecurrentEngine(model), texts[key][: prompts[key] + len(logits) - 1], prompts[key])
        assert torch.equal(torch.stack(logits), alone)


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
    changes: dict[str, Any], policy: dict[str, Any] | None, reason: str, tiny: Any
) -> None:
    model = tiny.model("mamba2", **{**SIZES, **changes})
    if policy is not None:
        attach(model, layout_from_config(model.config.to_dict()), policy)
    assert reason in str(decline(model))
    assert Generator(model).engine == "transformers"
    with pytest.raises(InputError, match="cannot run"):
        Generator(model, "native")


def test_hooks_and_other_families_are_declined(tiny: Any) -> None:
    model = tiny.model("mamba2", **SIZES)
    model.backbone.layers[0].mixer.in_proj.register_forward_pre_hook(lambda module, inputs: None)
    assert "hooks" in str(decline(model))
    assert "mamba is not among" in str(decline(tiny.model("mamba")))
