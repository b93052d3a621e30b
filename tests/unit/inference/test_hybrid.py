"""The native engine of hybrids against transformers' modules, which run on the same operators."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import decode, mamba1, mamba2
from transformers import DynamicCache

from llmcompress.errors import InputError
from llmcompress.inference.hybrid import HybridEngine
from llmcompress.inference.native import decline, open_engine
from llmcompress.models.assemble import compressed_model
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import attach
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig
from llmcompress.stages.rtn import Rtn, RtnConfig

_REASON = decode.unavailable() or mamba2.unavailable()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"no native kernels: {_REASON}")

_MIXERS: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 48, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 32,
    "mamba_n_groups": 2, "mamba_expand": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 80,
    "max_position_embeddings": 512,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    **_MIXERS, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 6,
    "num_experts_per_tok": 3, "shared_intermediate_size": 48, "residual_multiplier": 0.6, "embedding_multiplier": 3.0,
    "logits_scaling": 6.0, "attention_multiplier": 0.4, "position_embedding_type": "rope",
}  # fmt: skip
JAMBA: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_d_state": 16, "mamba_dt_rank": 16, "mamba_expand": 2,
    "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 6, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "use_associative_scan": False,
}  # fmt: skip
LFM2: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **LFM2, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "num_dense_layers": 1,
    "routed_scaling_factor": 1.3,
}  # fmt: skip
_MIX = "linear_attention"
NEMOTRON: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 16, "mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 32,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48, "moe_latent_size": None,
    "max_position_embeddings": 512,
}  # fmt: skip
FALCON: dict[str, Any] = {
    **_MIXERS, "mamba_d_ssm": 96, "mamba_rms_norm": False, "num_hidden_layers": 3, "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7, "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9, "key_multiplier": 0.6,
    "mlp_multipliers": [0.9, 1.1], "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7], "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
}  # fmt: skip
ZAMBA: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "n_mamba_heads": 6,
    "mamba_ngroups": 2, "mamba_d_state": 32, "num_key_value_heads": None, "num_mem_blocks": 2, "adapter_rank": 16,
    "max_position_embeddings": 512, "hidden_act": "gelu", "use_shared_attention_adapter": True, "num_hidden_layers": 5,
    "layers_block_type": [_MIX, "hybrid", "hybrid", _MIX, "hybrid"],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granitemoehybrid", GRANITE),
    # as Granite 4 is: no positions; and its small ones: one MLP and no experts
    "nope": ("granitemoehybrid", {**GRANITE, "position_embedding_type": None, "tie_word_embeddings": True}),
    "dense": ("granitemoehybrid", {**GRANITE, "num_local_experts": 0, "mamba_n_groups": 1}),
    "attention": ("granitemoehybrid", {**GRANITE, "layer_types": ["full_attention"] * 3}),
    "bamba": ("bamba", {**_MIXERS, "attn_layer_indices": [1], "mamba_proj_bias": True, "num_key_value_heads": 3}),
    # Mamba-1, no positions; experts in every second layer, or one MLP as in Jamba's small ones
    "jamba": ("jamba", JAMBA),
    # short convolutions; dense, with biases and more taps, or with experts after the first layer
    "lfm2": ("lfm2", LFM2),
    "taps": ("lfm2", {**LFM2, "conv_bias": True, "conv_L_cache": 5, "tie_word_embeddings": False}),
    "lfm2_moe": ("lfm2_moe", EXPERTS),
    # one sublayer a layer, MLPs and experts without gates; mixers first and last, or neither
    "nemotron": (
        "nemotron_h",
        {**NEMOTRON, "layers_block_type": [_MIX, "mlp", _MIX, "full_attention", "moe", _MIX], "mlp_bias": True},
    ),
    "nano": ("nemotron_h", {**NEMOTRON, "layers_block_type": ["moe", "full_attention", _MIX, _MIX, "moe", "mlp"]}),
    # experts on a narrower projection, with biases
    "super": (
        "nemotron_h",
        {
            **NEMOTRON,
            "layers_block_type": [_MIX, "moe", "full_attention", "moe"],
            "moe_latent_size": 32,
            "mlp_bias": True,
        },
    ),
    # attention and a mixer side by side, factors everywhere; a gate alone, or a norm by groups after it, with biases
    "falcon": ("falcon_h1", FALCON),
    "normed": (
        "falcon_h1",
        {
            **FALCON,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "projectors_bias": True,
        },
    ),
    # shared transformers that lay aside what they say, with adapters; without those of attention, with biases
    "zamba": ("zamba2", ZAMBA),
    "shared": (
        "zamba2",
        {
            **ZAMBA,
            "use_shared_attention_adapter": False,
            "use_mem_rope": False,
            "num_mem_blocks": 1,
            "add_bias_linear": True,
        },
    ),
    "thin": ("jamba", {**JAMBA, "num_experts": 1, "tie_word_embeddings": True, "mamba_proj_bias": True}),
}
IDS = torch.randint(3, 70, (330,), generator=torch.Generator().manual_seed(5))
# logits are of size 1; float32 sums in another order differ by a few units of the last place
EXACT = 3e-5


def slack(name: str) -> float:
    """How much further off a model may be.

    Transformers without residual connections inside amplify what differs: both sides are as far from float64, up to
    9e-5 of the largest logit (:func:`test_errors_are_those_of_modules`), and up to 3e-5 from each other.
    """
    return 2.0 if MODELS[name][0] == "zamba2" else 1.0


def exact(name: str) -> float:
    """How far logits may be off."""
    return EXACT * slack(name)


def packed(
    tiny: Any, folder: Path, name: str, states: dict[str, Any] | None = None, bits: int = 8, int8: bool = False,
    embeddings: int = 0,
) -> Any:  # fmt: skip
    """Experts, attention and mixers rounded to nearest, states in low bits, as the stages make it."""
    family, sizes = MODELS[name]
    state = tiny.state(folder / "model", family, **sizes)
    rules = {"all": {"match": ".", "bits": bits, "group_size": 16, "symmetric": True}}
    Rtn("weights", RtnConfig.model_validate({"rules": rules})).run(state, tiny.context(folder))
    if int8:
        Activations("activations", ActivationsConfig(granularity="chunk")).run(state, tiny.context(folder))
    if embeddings:
        Embeddings("embeddings", EmbeddingsConfig(bits=embeddings)).run(state, tiny.context(folder))
    if states is not None:
        state.policies["state_cache"] = states
    return compressed_model(state.model, state.packed, state.policies, torch.float32).eval()


def states_of(name: str, **changes: Any) -> dict[str, Any] | None:
    """States in 4 bits, as a policy says it; None for models that keep none."""
    return None if "lfm2" in MODELS[name][0] else {"bits": 4, "codec": "dsq", **changes}


@torch.inference_mode()
def by_modules(model: Any, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, Any]:
    """Logits ``[T, V]`` from the prompt's last token on, and the cache."""
    cache, rows, start = DynamicCache(config=model.config), [], 0
    for end in range(prompt, len(tokens) + 1):
        # without positions Bamba takes every token for the first
        given = {"input_ids": tokens[None, start:end], "position_ids": torch.arange(start, end)[None]}
        rows.append(model(**given, past_key_values=cache, use_cache=True).logits[0, -1])
        start = end
    return torch.stack(rows), cache


def held_alike(engine: HybridEngine, cache: Any, slot: int, name: str) -> None:
    """Convolutions, float states and keys of the engine are those of transformers' cache."""

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        # inside of shared transformers a few numbers differ by more than logits do
        allowed = 2e-5 * (6 if slack(name) > 1 else 1) * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=allowed)

    mixers, attention, convolutions = 0, 0, 0
    for layer, own in zip((cache.layers[block] for block in engine.blocks), engine.decoder.layers):
        if own.convolves:
            held = engine.cache.inputs[convolutions, slot]
            close(held, layer.conv_states[0][0, :, 1:].mT)
            convolutions += 1
        if own.mixes:
            assert engine.states is not None
            close(engine.states.conv[mixers, slot], layer.conv_states[0][0])
            if engine.states.floats is not None:
                held = engine.states.floats[mixers, slot]
                if engine.mixer_weights is not None and engine.mixer_weights.rank:
                    held = mamba1.unblocked(held)
                close(held, layer.recurrent_states[0][0])
            mixers += 1
        if own.attends:
            count, width = layer.values.shape[-2:]
            held = engine.cache.values[attention, slot, :, :count, :width]
            close(held, layer.values[0])
            attention += 1


@pytest.mark.parametrize("prompt", [1, 3, 300])
@pytest.mark.parametrize("name", MODELS)
def test_a_dense_model_with_float_states_agrees(name: str, prompt: int, tiny: Any, sequences: Any) -> None:
    family, sizes = MODELS[name]
    model, tokens = tiny.model(family, **sizes), IDS[: prompt + 5]
    expected, cache = by_modules(model, tokens, prompt)
    engine = open_engine(model, slots=2, positions=320)
    assert isinstance(engine, HybridEngine)
    assert sequences.off(sequences.natively(engine, tokens, prompt, 1), expected) < exact(name)
    held_alike(engine, cache, 1, name)
    assert engine.lengths == [0, len(tokens)]


@pytest.mark.parametrize(("prompt", "threads"), [(1, 3), (40, 2), (325, 1), (325, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_takes_prompts_at_once(
    name: str, prompt: int, threads: int, tiny: Any, tmp_path: Path, sequences: Any
) -> None:
    model, tokens = packed(tiny, tmp_path, name, bits=4), IDS[: prompt + 4]
    expected, cache = by_modules(model, tokens, prompt)
    engine = HybridEngine(model, slots=2, positions=336, threads=threads)
    assert engine.decoder.takes_prompts
    assert sequences.off(sequences.natively(engine, tokens, prompt, 1), expected) < exact(name)
    held_alike(engine, cache, 1, name)


@pytest.mark.parametrize("name", ["granite", "jamba", "lfm2_moe", "nemotron", "falcon", "zamba", "shared"])
def test_errors_are_those_of_modules(name: str, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    model = packed(tiny, tmp_path, name, bits=4)
    sequences.as_exact_as_modules(HybridEngine(model, positions=64), IDS[:45], 40)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", ["taps", "super", "normed", "zamba"])
def test_other_widths(name: str, bits: int, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    model, tokens = packed(tiny, tmp_path, name, bits=bits), IDS[:40]
    expected, cache = by_modules(model, tokens, 30)
    engine = HybridEngine(model, slots=2, positions=48)
    assert sequences.off(sequences.natively(engine, tokens, 30, 1), expected) < exact(name)
    held_alike(engine, cache, 1, name)


STORED = [("dsq", "rtn", 1), ("dsq_refit", "rtn", 1), ("dsq", "dither", 4), ("dsq_refit", "rtn", 3)]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("codec", "rounding", "window"), STORED)
@pytest.mark.parametrize(
    ("name", "bits"), [("granite", 4), ("granite", 8), ("jamba", 4), ("nemotron", 4), ("normed", 4), ("shared", 4)]
)
@torch.inference_mode()
def test_packed_states_have_the_same_codes(
    name: str, bits: int, codec: str, rounding: str, window: int, at_once: bool, tiny: Any, tmp_path: Path,
    sequences: Any,
) -> None:  # fmt: skip
    """Step by step from the same states: float32 sums in another order may move a number across a rounding boundary."""
    policy = {"bits": bits, "codec": codec, "rounding": rounding, "window": window}
    model, tokens = packed(tiny, tmp_path, name, policy), IDS[:60]
    engine, cache, differ = HybridEngine(model), DynamicCache(config=model.config), []
    mixers = [cache.layers[block] for block, own in zip(engine.blocks, engine.decoder.layers) if own.mixes]
    if not at_once:
        engine.least_at_once = 1000
    for at in range(39, len(tokens)):
        given = tokens[: at + 1] if at == 39 else tokens[at : at + 1]
        expected = model(given[None], past_key_values=cache, use_cache=True).logits[0, -1]
        found = engine.prompt(0, given.tolist()) if at == 39 else engine.step(given, [0])[0]
        assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())
        assert int(found.argmax()) == int(expected.argmax())
        differ += sequences.differing(engine.states, mixers, window, at - 39)
    assert sum(differ) / len(differ) < 0.01


@pytest.mark.parametrize("name", ["granite", "nope", "bamba", "jamba", "lfm2", "lfm2_moe", "nano", "falcon", "zamba"])
@pytest.mark.parametrize("window", [1, 4])
def test_generation_takes_it_and_writes_the_same(
    window: int, name: str, tiny: Any, tmp_path: Path, sequences: Any
) -> None:
    model = packed(tiny, tmp_path, name, states_of(name, window=window))
    sequences.written_alike(model, IDS)


@pytest.mark.parametrize("name", ["granite", "lfm2_moe", "nano", "falcon", "zamba"])
def test_serving_takes_it(name: str, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    """Sequences join and leave at any place of the others' windows, and get places that others left in the middle."""
    model = packed(tiny, tmp_path, name, states_of(name, rounding="dither", window=4))
    engine = HybridEngine(model, slots=2, positions=64)
    kept = engine.cache.inputs.nbytes + (0 if engine.states is None else engine.states.nbytes)
    assert kept > 0
    sequences.served_alike(engine, lambda: HybridEngine(model, positions=64), IDS, lambda count: kept * count // 2)


def test_gate_and_up_share_the_first_matrix_of_their_adapter(tiny: Any, tmp_path: Path) -> None:
    engine = HybridEngine(packed(tiny, tmp_path, "zamba", None), positions=32)
    shared = [layer for layer in engine.decoder.layers if layer.aside is not None]
    assert shared
    for layer in shared:
        pairs = [side.adapter.matrices for side in (layer.gate, layer.up) if side is not None and side.adapter]
        (of_gate, gate), (of_up, up) = pairs
        assert of_gate is of_up
        assert gate.data.data_ptr() != up.data.data_ptr()


def test_what_is_held_and_reserved(tiny: Any, tmp_path: Path, sequences: Any) -> None:
    model = packed(tiny, tmp_path, "granite", {"bits": 4, "codec": "dsq"})
    engine = HybridEngine(model, slots=2, positions=32)
    engine.prompt(0, [3, 4, 5])
    assert engine.states is not None
    one = engine.cache.keys.nbytes // (2 * 32)
    assert engine.held_bytes([0]) == 3 * 2 * one + engine.states.nbytes // 2
    assert engine.reserved_bytes == 2 * engine.cache.keys.nbytes + engine.states.nbytes
    before = engine.states
    engine.reserve(20, 2)
    assert engine.states is before
    rows = sequences.natively(engine, IDS[:14], 9, 1)[:-1]
    engine.reserve(70, 3)
    assert engine.states.slots == engine.slots == 3
    assert engine.lengths == [3, 14, 0]
    # what was held goes on
    alone = sequences.natively(HybridEngine(model), IDS[:16], 9)
    assert torch.equal(rows, alone[: len(rows)])
    assert torch.equal(torch.stack([engine.step(IDS[at : at + 1], [1])[0].clone() for at in (14, 15)]), alone[-2:])
    with pytest.raises(InputError, match="not at hand"):
        engine.prompt(1, [3, 4], start=9)
    with pytest.raises(InputError, match="cut short"):
        engine.copy(1, 0, 2)
    assert not engine.keeps_prefixes
    assert set(engine.profile(torch.tensor([3, 4]))) == set(decode.PHASES)
    with pytest.raises(InputError, match="sequence"):
        engine.prompt(3, [3])
    dense = HybridEngine(tiny.model(*MODELS["granite"][:1], **GRANITE))
    assert dense.piece is None
    with pytest.raises(InputError, match="not packed"):
        dense.prompt(0, [3, 4], last=False)
    with pytest.raises(ValueError, match="repeat"):
        engine.step(torch.tensor([3, 4]), [1, 1])


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any] | None, str]] = [
    ("granitemoehybrid", {"mamba_d_conv": 3}, None, "convolution"),
    ("granitemoehybrid", {"mamba_d_state": 16}, None, "16 channels by 16"),
    ("granitemoehybrid", {"hidden_act": "gelu"}, None, "gelu"),
    ("granitemoehybrid", {"layer_types": ["linear_attention"] * 3}, None, "none of its layers has attention"),
    ("granitemoehybrid", {}, {"bits": 4, "codec": "per_channel"}, "per_channel"),
    ("granitemoehybrid", {}, {"bits": 4, "codec": "dsq", "window": 65}, "window of 65 tokens"),
    ("jamba", {"mamba_dt_rank": 3}, None, "rank 3"),
    ("lfm2", {"hidden_size": 40, "num_attention_heads": 5}, None, "40 channels"),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, None, "norm before their gates"),
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, None, "mamba_hidden_act"),
    ("granitemoehybrid", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, None, "rota"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "policy", "reason"), REFUSED)
def test_what_it_cannot_run_it_declines(
    family: str, changes: dict[str, Any], policy: dict[str, Any] | None, reason: str, tiny: Any, sequences: Any
) -> None:
    sizes = {"jamba": JAMBA, "lfm2": LFM2, "nemotron_h": MODELS["nano"][1], "falcon_h1": FALCON}.get(family, GRANITE)
    model = tiny.model(family, **{**sizes, **changes})
    sequences.refused(model, policy, reason)


def test_hooks_are_declined(tiny: Any) -> None:
    model = tiny.model("granitemoehybrid", **GRANITE)
    assert decline(model) is None
    model.model.layers[0].shared_mlp.input_linear.register_forward_pre_hook(lambda module, inputs: None)
    assert "hooks" in str(decline(model))


@pytest.mark.parametrize(
    "name", ["granite", "dense", "bamba", "thin", "lfm2", "lfm2_moe", "nemotron", "falcon", "zamba"]
)
def test_activations_are_rounded_as_the_model_rounds_them(name: str, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    """Routed experts keep float inputs, all others are rounded."""
    model, exact = packed(tiny, tmp_path, name, int8=True), packed(tiny, tmp_path, name)
    engine, tokens = HybridEngine(model, positions=64), IDS[:30]
    for layer in engine.decoder.layers:
        for weight in (layer.query, layer.conv_in):
            assert weight is None or weight.input_bytes == decode.INT8_PLANES
        assert layer.gate is None or layer.gate.input_bytes == (0 if layer.router else decode.INT8_PLANES)
    expected, _ = by_modules(model, tokens, 24)
    effect = (by_modules(exact, tokens, 24)[0] - expected).abs().mean()
    # a sum in another order moves an input across a rounding boundary now and then, and its step with it
    assert float((sequences.natively(engine, tokens, 24) - expected).abs().mean()) < 0.5 * float(effect)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["granite", "nope"])
def test_packed_embeddings_and_heads(name: str, bits: int, tiny: Any, tmp_path: Path, sequences: Any) -> None:
    """70 rows do not fill the last block; one model has a head of its own."""
    model = packed(tiny, tmp_path, name, embeddings=bits)
    engine, tokens = HybridEngine(model, slots=2, positions=64), IDS[:30]
    assert engine.vocabulary == 70
    assert engine.decoder.head.bits == engine.decoder.embedding.bits == bits
    expected, _ = by_modules(model, tokens, 24)
    assert sequences.off(sequences.natively(engine, tokens, 24), expected) < exact(name)
    assert int(engine.greedy(tokens[:2])[0]) < 70


def alike(engine: HybridEngine) -> None:
    """Two sequences of the same prompt keep the same, bit by bit."""
    states = engine.states
    mixed = () if states is None else (states.codes, states.scale, states.conv)
    for held in (*mixed, engine.cache.values, engine.cache.inputs):
        assert held is not None
        assert torch.equal(held[:, 0], held[:, 1])


@pytest.mark.parametrize("cuts", [(0, 64, 300), (0, 128, 192, 300), (0, 256, 300)])
@pytest.mark.parametrize(
    ("name", "threads", "window"),
    [
        ("granite", 1, 1),
        ("granite", 3, 4),
        ("bamba", 2, 1),
        ("jamba", 2, 1),
        ("taps", 2, 1),
        ("lfm2_moe", 1, 1),
        ("nemotron", 2, 4),
        ("normed", 2, 1),
        ("zamba", 2, 1),
    ],
)
def test_parts_of_a_prompt_are_the_whole_bit_by_bit(
    name: str, threads: int, window: int, cuts: tuple[int, ...], tiny: Any, tmp_path: Path
) -> None:
    model = packed(tiny, tmp_path, name, states_of(name, window=window))
    engine, tokens = HybridEngine(model, slots=3, positions=304, threads=threads), IDS[:300].tolist()
    assert engine.piece == mamba2.CUT
    whole = engine.prompt(0, tokens)
    engine.prompt(2, tokens[:50])
    alone = engine.step(torch.tensor([9]), [2]).clone()
    engine.prompt(2, tokens[:50])
    found = torch.empty(0)
    for start, end in pairwise(cuts):
        found = engine.prompt(1, tokens[start:end], start=start, last=end == cuts[-1])
        if end == cuts[1]:
            # somebody else's step in between
            assert torch.equal(engine.step(torch.tensor([9]), [2]), alone)
    assert torch.equal(found, whole)
    alike(engine)
    assert torch.equal(*engine.step(torch.tensor([9, 9]), [0, 1]).clone())
    engine.prompt(1, tokens[:64], last=False)
    engine.prompt(0, tokens[:9])
    with pytest.raises(InputError, match="its state is not at hand"):
        engine.prompt(1, tokens[64:], start=64)


@pytest.mark.parametrize("name", ["granite", "taps", "lfm2_moe", "nano", "falcon", "zamba"])
def test_a_snapshot_outlives_other_prompts(name: str, tiny: Any, tmp_path: Path) -> None:
    model, tokens = packed(tiny, tmp_path, name, states_of(name), bits=4), IDS[:200].tolist()
    engine = HybridEngine(model, slots=3, positions=208, threads=2)
    whole = engine.prompt(0, tokens)
    engine.prompt(1, tokens[:128], last=False)
    kept = engine.snapshot(1)
    assert (kept.count, kept.nbytes) == (128, engine.snapshot_bytes(128))
    engine.prompt(1, tokens[128:150], start=128)
    engine.prompt(2, tokens[::-1])
    engine.step(torch.tensor([5, 6]), [2, 1])
    engine.resume(1, kept)
    assert torch.equal(engine.prompt(1, tokens[128:], start=128), whole)
    alike(engine)


@pytest.mark.parametrize("policy", [{"alpha": 0.9}, {"alpha": 1.0, "fallback": "reroute"}])
@pytest.mark.parametrize("name", ["granite", "jamba", "lfm2_moe", "nano", "super"])
@torch.inference_mode()
def test_experts_are_skipped_as_in_modules(name: str, policy: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    model, tokens = packed(tiny, tmp_path, name, bits=4), IDS[:300]
    untouched = model(tokens[None], use_cache=False).logits[0, -1]
    controller = attach(model, layout_from_config(model.config.to_dict()), policy)
    expected = model(tokens[None], use_cache=False).logits[0, -1]
    told = controller.statistics()
    controller.reset()
    found = HybridEngine(model, positions=304, threads=2).prompt(0, tokens.tolist())
    mine = controller.statistics()
    assert mine["total"]["slots_dropped"] + mine["total"]["slots"] > 0
    assert {**mine, "seconds": 0} == {**told, "seconds": 0}
    assert (found - expected).abs().max() < exact(name) * expected.abs().max()
    assert (found - untouched).abs().max() > 1e-3
