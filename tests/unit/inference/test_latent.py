"""Latent attention: what is kept of a token, and how heads read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native

from llmcompress.inference.engine import Engine, decline
from llmcompress.inference.latent import halves, side_by_side
from llmcompress.models.registry import layout_from_config
from llmcompress.nn import activations
from llmcompress.nn.skipping import attach

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

EXACT = 3e-5
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16,
    "mscale": 0.7, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
# nothing fills a vector
NARROW = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20}


@torch.inference_mode()
def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` by transformers."""
    return model(tokens.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
        ("deepseek_v2", {"rope_parameters": YARN, "attention_bias": True}),
        ("deepseek_v2", NARROW),
        ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": 48}),
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v3", {**NARROW, "num_attention_heads": 5, "num_key_value_heads": 5}),
        ("deepseek_v32", {"rope_parameters": YARN, "attention_bias": True}),
        ("glm_moe_dsa", NARROW),
    ],
)
def test_every_form(
    decoders: Any, sequences: Any, ids: torch.Tensor, family: str, changes: dict[str, Any], packed: bool
) -> None:
    model = decoders.packed(family, 4, group_size=16, **changes) if packed else decoders.dense(family, **changes)
    assert decline(model) is None
    # by steps, and by transformers' modules or at once
    for prompt in (3, 40):
        tokens = ids[: prompt + 8]
        found = sequences.natively(Engine(model, positions=64, threads=2), tokens, prompt)
        assert (found - reference(model, tokens)[prompt - 1 :]).abs().max() < EXACT


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
def test_steps_go_on_from_a_prompt_that_modules_read(
    decoders: Any, sequences: Any, ids: torch.Tensor, family: str
) -> None:
    from transformers import DynamicCache

    model, tokens = decoders.dense(family), ids[:26]
    # acts on prompts only, which modules read then
    attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9, "min_len": 2})
    kept = DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [tokens[None, :20], *tokens[20:].split(1)]
        expected = [model(part.view(1, -1), past_key_values=kept, use_cache=True).logits[0, -1] for part in parts]
    found = sequences.natively(Engine(model, positions=32), tokens, 20)
    assert (found - torch.stack(expected)).abs().max() < EXACT


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_token_leaves_its_latents_and_nothing_else(decoders: Any, ids: torch.Tensor, family: str) -> None:
    from transformers import DynamicCache

    model, tokens, kept = decoders.packed(family, 4), ids[:40], DynamicCache()
    engine = Engine(model, positions=48)
    engine.prompt(0, tokens.tolist())
    with torch.inference_mode():
        model(tokens[None], past_key_values=kept, use_cache=True)
    for index, layer in enumerate(kept.layers):
        latents, turned = engine.cache.read(index, 0, 40)
        assert (latents - layer.keys[0]).abs().max() < EXACT
        theirs = halves(layer.values[0]) if family == "deepseek_v2" else layer.values[0]
        assert (turned - theirs).abs().max() < EXACT
    # 48 latents and 16 turned numbers in each of three layers
    assert engine.reserved_bytes == 48 * 3 * 64 * 4
    assert engine.held_bytes([0]) == 40 * 3 * 64 * 4


def test_pairs_and_halves() -> None:
    pairs = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert halves(pairs).tolist() == [[0.0, 2.0, 4.0, 1.0, 3.0, 5.0]]
    assert torch.equal(side_by_side(halves(pairs)), pairs)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_bfloat16_models_lose_less_than_by_modules(decoders: Any, ids: torch.Tensor, family: str) -> None:
    # no experts, which a rounded number makes a token change
    model, tokens = decoders.packed(family, 4, first_k_dense_replace=3).to(torch.bfloat16), ids[:24]
    modules = reference(model, tokens).float()
    engine = Engine(model, positions=32)
    assert engine.decoder.layers[0].absorb.data.dtype == engine.cache.keys.dtype == torch.bfloat16
    natively = torch.stack([engine.prompt(0, tokens[: i + 1].tolist()) for i in range(len(tokens))])
    exact = reference(model.float(), tokens)  # of the same weights
    assert EXACT < (natively - exact).norm() < 0.6 * (modules - exact).norm()


def test_packed_values_are_shared(decoders: Any) -> None:
    model = decoders.packed("deepseek_v2", 4)
    expand, held = Engine(model).decoder.layers[1].expand, model.model.layers[1].self_attn.kv_b_proj
    assert (expand.bits, expand.rows, expand.columns, expand.experts) == (4, 48, 48, 6)
    assert expand.data.untyped_storage().data_ptr() == held.weight_packed.untyped_storage().data_ptr()
    narrow = Engine(decoders.packed("deepseek_v2", 4, **NARROW, group_size=16)).decoder.layers[1].expand
    assert (narrow.bits, narrow.rows, narrow.columns, narrow.experts) == (0, 20, 24, 6)


def test_what_is_declined(decoders: Any) -> None:
    model = decoders.packed("deepseek_v2", 4)
    policy = {"bits": 8, "roles": ["attention"], "granularity": "chunk"}
    activations.attach(model, layout_from_config(model.config.to_dict()), policy)
    assert "kv_b_proj rounds its inputs" in str(decline(model))
    model = decoders.packed("deepseek_v3", 4)
    model.model.layers[0].self_attn.kv_a_proj_with_mqa.register_forward_pre_hook(lambda module, inputs: None)
    assert "kv_a_proj_with_mqa has hooks" in str(decline(model))
