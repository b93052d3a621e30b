"""The native engine against transformers, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import decode as native
from llmcompress_kernels.reference.group_gemm import deinterleave

from llmcompress.errors import InputError
from llmcompress.inference.coverage import FAMILIES
from llmcompress.inference.engine import SHORT_PROMPT, Engine, decline
from llmcompress.inference.generate import Generator, Sampling
from llmcompress.models.registry import layout_from_config
from llmcompress.nn import activations, embedding
from llmcompress.nn.skipping import attach
from llmcompress.quant.embeddings import spec_of

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

# logits are of size 8; float32 sums in another order, also those of another build of C++, differ by some units of the
# last place
EXACT = 5e-5
# families whose routers decide
EXPERTS = (
    "mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "phimoe", "glm4_moe", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe", "granitemoeshared", "afmoe", "hy_v3",
    "gemma4_text", "llama4_text", "cohere2_moe", "mimo_v2_flash", "laguna",
)  # fmt: skip
PACKED = (
    "llama", "qwen2", "olmo3", "phi3", "glm4", "gemma2", "gemma3_text", "stablelm", "starcoder2", "nemotron", "cohere2",
    "phi", "exaone4", "granite_swa", "apertus", "nanochat", "falcon", "olmo", "hyperclovax", "minicpm3", "opt",
    "gpt_neo", *EXPERTS,
)  # fmt: skip


@torch.inference_mode()
def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` by transformers."""
    return model(tokens.unsqueeze(0)).logits[0]


def worst(engine: Engine, tokens: torch.Tensor, expected: torch.Tensor, prompt: int) -> float:
    """Largest difference of logits after the prompt and after every further token."""
    found = [engine.prompt(0, tokens[:prompt].tolist())]
    for position in range(prompt, len(tokens)):
        found.append(engine.step(tokens[position : position + 1])[0].clone())
    return float((torch.stack(found) - expected[prompt - 1 :]).abs().max())


@pytest.mark.parametrize("prompt", [5, SHORT_PROMPT + 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_families_agree(decoders: Any, ids: torch.Tensor, family: str, prompt: int) -> None:
    model, tokens = decoders.dense(family), ids[: prompt + 6]
    assert decline(model) is None
    assert worst(Engine(model, positions=64), tokens, reference(model, tokens), prompt) < EXACT


def test_stablelm_with_sublayers_side_by_side(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.packed("stablelm", 4, use_parallel_residual=True), ids[:24]
    assert decline(model) is None
    assert worst(Engine(model, positions=32), tokens, reference(model, tokens), 12) < EXACT


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations_of_gates(decoders: Any, ids: torch.Tensor, activation: str) -> None:
    model, tokens = decoders.packed("llama", 4, hidden_act=activation), ids[:24]
    assert worst(Engine(model, positions=32), tokens, reference(model, tokens), 12) < EXACT


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", PACKED)
def test_packed_models_agree(decoders: Any, ids: torch.Tensor, family: str, bits: int, symmetric: bool) -> None:
    model, tokens = decoders.packed(family, bits, symmetric=symmetric), ids[:24]
    expected = reference(model, tokens)
    exact, rounded = Engine(model, positions=32), Engine(model, positions=32, int8_activations=True)
    assert worst(exact, tokens, expected, 9) < EXACT
    # rounding may move a token to another expert, so that only dense models have a bound
    assert EXACT < worst(rounded, tokens, expected, 9) < (torch.inf if family in EXPERTS else 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_lose_less_than_by_modules(decoders: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    model, tokens = decoders.packed("llama", 4).to(dtype), ids[:24]
    modules = reference(model, tokens).float()
    engine = Engine(model, positions=32, cache_dtype=torch.float32)
    natively = torch.stack([engine.prompt(0, tokens[: i + 1].tolist()) for i in range(len(tokens))])
    exact = reference(model.float(), tokens)  # of the same weights
    assert engine.planes == native.FLOAT16_PLANES
    assert EXACT < (natively - exact).norm() < 0.2 * (modules - exact).norm()


@pytest.mark.parametrize(("family", "size"), [("llama", 48), ("llama", 192), ("mixtral", 48)])
def test_activations_are_rounded_as_the_model_rounds_them(
    decoders: Any, ids: torch.Tensor, family: str, size: int
) -> None:
    # scales of 64 columns, also where a weight's are of 96; routed experts keep float inputs
    model, tokens = decoders.packed(family, 4, 96 if size > 96 else 32, hidden_size=size), ids[:24]
    exact = reference(model, tokens)
    policy = {"bits": 8, "roles": ["attention", "mlp"]}
    layout = layout_from_config(model.config.to_dict())
    activations.attach(model, layout, {**policy, "granularity": "chunk"})
    rounded = reference(model, tokens)
    assert (rounded - exact).abs().max() > 100 * EXACT
    assert worst(Engine(model, positions=32), tokens, rounded, 3) < EXACT
    assert worst(Engine(model, positions=32), tokens, rounded, 9) < EXACT
    model = decoders.packed(family, 4)
    activations.attach(model, layout, {**policy, "granularity": "token"})
    assert "hooks" in str(decline(model))


@pytest.mark.parametrize("policy", [{"bits": 4, "group_size": 16}, {"bits": 8, "group_size": -1}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_packed_embeddings_and_heads(decoders: Any, ids: torch.Tensor, family: str, policy: dict[str, int]) -> None:
    """Tied, or a head of its own; 72 rows do not fill the last block."""
    model, tokens = decoders.packed(family, 4), ids[:24]
    layout = layout_from_config(model.config.to_dict())
    words, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    embedding.make_room(model, layout, policy)
    for module, weight in ((model.get_input_embeddings(), words), (model.get_output_embeddings(), head)):
        if isinstance(module, embedding.PackedRows):
            module.load_state_dict(embedding.pack_rows(weight, spec_of(policy)).tensors)
    assert decline(model) is None
    engine = Engine(model, positions=32)
    assert engine.vocabulary == 72
    assert worst(engine, tokens, reference(model, tokens), 3) < EXACT
    assert worst(engine, tokens, reference(model, tokens), 9) < EXACT


def test_gates_that_are_packed_otherwise_than_their_queries(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.packed("afmoe", 8), ids[:40]
    other = decoders.packed("afmoe", 3)
    for layer, theirs in zip(model.model.layers, other.model.layers):
        layer.self_attn.gate_proj = theirs.self_attn.gate_proj
    for prompt in (5, 20):
        assert worst(Engine(model, positions=48), tokens, reference(model, tokens), prompt) < EXACT


@pytest.mark.parametrize(("family", "shared"), [("cohere", 2), ("cohere", 1), ("stablelm", 1), ("phi", 1)])
def test_queries_and_keys_through_layer_norm(decoders: Any, ids: torch.Tensor, family: str, shared: int) -> None:
    """Of each head: weights of its own (Cohere, StableLM) or shared ones with biases (Phi)."""
    key = "use_qk_norm" if family == "cohere" else "qk_layernorm"
    model, tokens = decoders.packed(family, 4, num_key_value_heads=shared, **{key: True}), ids[:40]
    plain = decoders.packed(family, 4, num_key_value_heads=shared)
    expected = reference(model, tokens)
    assert (reference(plain, tokens) - expected).abs().max() > 100 * EXACT
    for prompt in (5, 20):
        assert worst(Engine(model, positions=48), tokens, expected, prompt) < EXACT


@pytest.mark.parametrize("family", ["llama4_text", "ministral3"])
def test_queries_that_are_sharper_further_on(decoders: Any, ids: torch.Tensor, family: str) -> None:
    rotary = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    beta = "llama_4_scaling_beta"
    changes = [{"attn_scale": by} if family == "llama4_text" else {"rope_parameters": {**rotary, beta: by}}
               for by in (0.0, 0.5)]  # fmt: skip
    tokens = ids[:60]
    plain, model = (decoders.packed(family, 4, **change) for change in changes)
    expected = reference(model, tokens)
    assert (reference(plain, tokens) - expected).abs().max() > 100 * EXACT
    engine = Engine(model, positions=32)
    engine.reserve(64)
    for prompt in (5, 20):
        assert worst(engine, tokens, expected, prompt) < EXACT


@pytest.mark.parametrize("changes", [
    {"multi_query": True, "num_kv_heads": None}, {"multi_query": False, "num_kv_heads": None, "parallel_attn": False},
    {"multi_query": True, "num_kv_heads": None, "parallel_attn": True, "bias": False},
])  # fmt: skip
def test_first_falcons(decoders: Any, ids: torch.Tensor, changes: dict[str, Any]) -> None:
    model, tokens = decoders.packed("falcon", 4, new_decoder_architecture=False, **changes), ids[:40]
    for prompt in (5, 20):
        assert worst(Engine(model, positions=48), tokens, reference(model, tokens), prompt) < EXACT


@pytest.mark.parametrize(("family", "changes"), [
    ("laguna", {"gating": "per-head"}), ("laguna", {"layer_types": ["full_attention"] * 3}),
    ("gemma4_text", {"enable_moe_block": False, "attention_k_eq_v": False}),
    ("llama4_text", {"use_qk_norm": False, "num_experts_per_tok": 1, "attn_temperature_tuning": False}),
    ("cohere2_moe", {"expert_selection_fn": "softmax", "num_shared_experts": 0, "rms_norm_eps": 1e-5}),
    ("cohere2_moe", {"shared_expert_combination_strategy": "sum", "norm_topk_prob": False}),
    ("mimo_v2_flash", {"attention_value_scale": None, "v_head_dim": 48}),
])  # fmt: skip
def test_other_forms_of_these_families(decoders: Any, ids: torch.Tensor, family: str, changes: dict[str, Any]) -> None:
    model, tokens = decoders.packed(family, 4, **changes), ids[:44]
    assert decline(model) is None
    for prompt in (5, 36):
        assert worst(Engine(model, positions=48), tokens, reference(model, tokens), prompt) < EXACT


@pytest.mark.parametrize(("key", "value"), [
    ("final_logit_softcapping", 0.5), ("logits_scaling", 4.0), ("logit_scale", 3.0), ("embedding_multiplier", 5.0),
    ("residual_multiplier", 0.2), ("mup_enabled", True), ("rms_norm_eps", 0.5),
])  # fmt: skip
def test_numbers_that_a_family_does_not_know_change_nothing(
    decoders: Any, ids: torch.Tensor, key: str, value: float
) -> None:
    # a family with LayerNorm for the name that those with RMSNorm have
    family = "stablelm" if key == "rms_norm_eps" else "laguna"
    model, tokens = decoders.packed(family, 4, **{key: value}), ids[:12]
    assert getattr(model.config, key) == value
    assert worst(Engine(model, positions=16), tokens, reference(model, tokens), 5) < EXACT


def test_rows_and_experts_that_do_not_fill_a_vector(decoders: Any, ids: torch.Tensor) -> None:
    sizes = {"intermediate_size": 40, "vocab_size": 75, "hidden_size": 36, "num_attention_heads": 3,
             "num_key_value_heads": 1, "head_dim": 12}  # fmt: skip
    for family in ("llama", "mixtral"):
        model, tokens = decoders.packed(family, 4, group_size=-1, **sizes), ids[:12]
        assert worst(Engine(model, positions=16), tokens, reference(model, tokens), 4) < EXACT


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "gpt_oss"])
def test_long_contexts_are_cut_into_chunks(decoders: Any, ids: torch.Tensor, family: str, threads: int) -> None:
    # no choice of experts that a rounded cache could change
    changes = {"deepseek_v2": {"first_k_dense_replace": 3}, "gpt_oss": {"num_experts_per_tok": 6}}
    model = decoders.packed(family, 4, **changes.get(family, {}))
    expected = reference(model, ids)
    assert worst(Engine(model, positions=300, threads=threads), ids, expected, 290) < EXACT
    halves = Engine(model, positions=300, threads=threads, cache_dtype=torch.bfloat16)
    assert EXACT < worst(halves, ids, expected, 290) < 0.1


@pytest.mark.parametrize(
    "family",
    [
        "mixtral", "deepseek_v3", "olmo3", "gemma2", "gemma4_text", "llama4_text", "cohere2_moe", "mimo_v2_flash",
        "laguna", "nanochat", "falcon", "opt", "gpt_neo",
    ],
)  # fmt: skip
def test_sequences_of_different_lengths_in_one_step(decoders: Any, ids: torch.Tensor, family: str) -> None:
    model = decoders.packed(family, 3)
    lengths = (3, 40, 17, 8, 25)
    engine = Engine(model, slots=5, positions=64, threads=2)
    for slot, length in enumerate(lengths):
        engine.prompt(slot, ids[slot : slot + length].tolist())
    for more in range(3):
        tokens = torch.stack([ids[slot + length + more] for slot, length in enumerate(lengths)])
        best = torch.empty(5, dtype=torch.int64)
        found = engine.step(tokens, best=best)
        for slot, length in enumerate(lengths):
            expected = reference(model, ids[slot : slot + length + more + 1])[-1]
            assert (found[slot] - expected).abs().max() < EXACT
            assert int(best[slot]) == int(expected.argmax())


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_every_instruction_set(decoders: Any, ids: torch.Tensor, isa: str) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        for family in ("qwen3", "olmo3", "glm4", "gemma2", *EXPERTS):
            model, tokens = decoders.packed(family, 3), ids[:40]
            assert worst(Engine(model, positions=48, threads=2), tokens, reference(model, tokens), 34) < EXACT
    finally:
        native.set_isa(None)


def test_layer_by_layer_is_the_whole_step(decoders: Any, ids: torch.Tensor) -> None:
    engine = Engine(decoders.packed("mixtral", 4), positions=32)
    engine.prompt(0, ids[:10].tolist())
    token, at, slot = ids[10:11], torch.tensor([10]), torch.zeros(1, dtype=torch.int32)
    whole, parts = torch.empty(1, 72), torch.empty(1, 72)
    native.step(engine.decoder, engine.cache, token, at, slot, whole)
    hidden = torch.empty(1, 48)
    native.step(engine.decoder, engine.cache, token, at, slot, parts, layers=(0, 1), hidden=hidden)
    native.step(engine.decoder, engine.cache, token, at, slot, parts, layers=(1, 2), hidden=hidden)
    assert torch.equal(whole, parts)


def test_rounded_head_is_close_and_asked_for(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.packed("llama", 4), ids[:12]
    expected = reference(model, tokens)
    assert EXACT < worst(Engine(model, positions=16, head_bits=8), tokens, expected, 6) < 0.1


@pytest.mark.parametrize("family", ["llama", "olmo3", "phi3", "glm4", "gemma2", "gemma3_text"])
def test_bfloat16_model(decoders: Any, ids: torch.Tensor, family: str) -> None:
    model = decoders.packed(family, 4).to(torch.bfloat16)
    tokens = ids[:44]
    engine = Engine(model, positions=48)
    assert engine.cache_dtype == torch.bfloat16
    # the step computes in float32, transformers rounds after every operation
    assert worst(engine, tokens, reference(model, tokens).float(), 36) < 0.15


def test_skipping_policy_acts_on_the_prompt(decoders: Any, ids: torch.Tensor) -> None:
    model = decoders.packed("mixtral", 4)
    layout = layout_from_config(model.config.to_dict())
    plain = reference(model, ids[:60])[-1]
    attach(model, layout, {"alpha": 0.9, "min_len": 2})
    expected = reference(model, ids[:60])[-1]
    assert not torch.equal(plain, expected)
    engine = Engine(model, positions=80)
    assert (engine.prompt(0, ids[:60].tolist()) - expected).abs().max() < EXACT
    model.llmcompress_skipping.detach()
    attach(model, layout, {"alpha": 0.9, "decode": "sticky"})
    assert "sticky" in str(decline(model))


def test_what_is_declined(decoders: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    assert "relu6" in str(decline(decoders.dense("llama", hidden_act="relu6")))
    assert "clip_qkv" in str(decline(decoders.dense("olmoe", clip_qkv=2.0)))
    assert "zamba2" in str(decline(tiny.model("zamba2")))
    assert "do not begin at a word" in str(decline(decoders.packed("llama", 3, group_size=8)))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in str(decline(decoders.dense("llama", rope_parameters=dynamic)))
    assert "sparsemixer" in str(decline(decoders.dense("phimoe", num_experts_per_tok=3)))
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference")
    model = decoders.dense("llama")
    assert "LLMCOMPRESS_KERNELS" in str(decline(model))
    with pytest.raises(InputError, match="native engine cannot run"):
        Engine(model)


def test_longrope_of_one_factor(decoders: Any, ids: torch.Tensor) -> None:
    # transformers' Phi-MoE takes the short factors at any length, and scales tables by what does not change here
    model, tokens = decoders.packed("phimoe", 4, rope_parameters=decoders.longrope), ids[:40]
    assert worst(Engine(model, positions=48), tokens, reference(model, tokens), 9) < EXACT


@pytest.mark.parametrize("family", ["phimoe", "phi3"])
def test_longrope_up_to_where_its_tables_change(decoders: Any, ids: torch.Tensor, family: str) -> None:
    rotary, changes = {**decoders.longrope, "long_mscale": 1.3}, {}
    if family == "phi3":
        rotary |= {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.0, 4.0]}
        changes = {"original_max_position_embeddings": 16}
    model = decoders.packed(family, 4, rope_parameters=rotary, **changes)
    engine = Engine(model)
    assert engine.longest == 16
    assert worst(engine, ids[:16], reference(model, ids[:16]), 9) < EXACT
    with pytest.raises(InputError, match="up to 16 tokens, not 17"):
        engine.reserve(17)
    with pytest.raises(InputError, match="exceed"):
        engine.prompt(0, ids[:17].tolist())
    # what is longer goes through the modules
    writers, how = [Generator(model, engine) for engine in ("auto", "transformers")], Sampling(6)
    for count in (9, 10, 11):
        own, theirs = (writer.generate([ids[:count].tolist()], how)[0].tokens for writer in writers)
        assert own == theirs


@pytest.mark.parametrize("jitter", [0.01, 0.3, 1.0])
def test_sparsemixer(decoders: Any, ids: torch.Tensor, jitter: float) -> None:
    # from hardly any other expert near the chosen one to all of them
    model, tokens = decoders.dense("phimoe", router_jitter_noise=jitter, num_local_experts=16), ids[:16]
    expected = reference(model, tokens)
    assert worst(Engine(model, positions=16), tokens, expected, 5) < EXACT
    other = decoders.dense("phimoe", router_jitter_noise=jitter / 4, num_local_experts=16)
    assert (reference(other, tokens) - expected).abs().max() > 100 * EXACT


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 2, "topk_group": 1, "n_routed_experts": 32, "num_experts_per_tok": 8},
        {"n_group": 8, "topk_group": 7, "n_routed_experts": 64, "num_experts_per_tok": 6},
    ],
)
def test_sigmoids_with_groups(decoders: Any, ids: torch.Tensor, changes: dict[str, Any]) -> None:
    model, tokens = decoders.dense("glm4_moe", **changes), ids[:40]
    expected = reference(model, tokens)
    assert worst(Engine(model, positions=48), tokens, expected, 8) < EXACT
    for change in ({"routed_scaling_factor": 1.0}, {"norm_topk_prob": not changes.get("norm_topk_prob", True)}):
        other = decoders.dense("glm4_moe", **{**changes, **change})
        assert (reference(other, tokens) - expected).abs().max() > 100 * EXACT
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert (reference(model, tokens) - expected).abs().max() > 100 * EXACT
    assert worst(Engine(model, positions=48), tokens, reference(model, tokens), 8) < EXACT


def test_softmax_with_a_correction(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.dense("ernie4_5_moe"), ids[:40]
    expected = reference(model, tokens)
    assert worst(Engine(model, positions=48), tokens, expected, 8) < EXACT
    for layer in model.model.layers[1:]:
        layer.mlp.gate.moe_statics.e_score_correction_bias.data.zero_()
    assert (reference(model, tokens) - expected).abs().max() > 100 * EXACT
    assert worst(Engine(model, positions=48), tokens, reference(model, tokens), 8) < EXACT


def test_the_sum_of_weights_has_a_floor(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.dense("minimax_m2"), ids[:4]
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data.mul_(3.0)
    found = []
    for floor in (1e-20, 0.5):
        engine = Engine(model, positions=16)
        engine.decoder = replace(engine.decoder, routing=replace(engine.decoder.routing, floor=floor))
        found.append(engine.prompt(0, tokens.tolist()))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(_with_floor)
    assert (found[0] - found[1]).abs().max() > 100 * EXACT
    assert (found[1] - reference(model, tokens)[-1]).abs().max() < EXACT


def _with_floor(router: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> Any:
    logits, _, chosen = output
    weights = logits.float().sigmoid().gather(1, chosen)
    return logits, weights / (weights.sum(-1, keepdim=True) + 0.5), chosen


@pytest.mark.parametrize("packed", [True, False])
def test_sinks_limits_and_windows(decoders: Any, ids: torch.Tensor, packed: bool) -> None:
    model, tokens = decoders.packed("gpt_oss", 4) if packed else decoders.dense("gpt_oss"), ids[:40]
    expected = reference(model, tokens)
    for change in ("sinks", "limit", "bias", "window"):
        changed = decoders.packed("gpt_oss", 4) if packed else decoders.dense("gpt_oss")
        for layer in changed.model.layers:
            if change == "sinks":
                layer.self_attn.sinks.data.add_(3.0)
            elif change == "limit":
                layer.mlp.experts.limit = 0.2
            elif change == "bias":
                layer.mlp.router.bias.data.add_(torch.linspace(-1, 1, 6))
                layer.mlp.experts.gate_up_proj_bias.data.mul_(2.0)
        if change == "window":
            changed.config.sliding_window = 6
            changed.model.layers[0].self_attn.sliding_window = 6
        own = reference(changed, tokens)
        assert (own - expected).abs().max() > 100 * EXACT
        assert worst(Engine(changed, positions=48), tokens, own, 8) < EXACT
        assert worst(Engine(changed, positions=48), tokens, own, 35) < EXACT


def test_a_rounded_head_keeps_its_bias(decoders: Any, ids: torch.Tensor) -> None:
    model, tokens = decoders.dense("phimoe"), ids[:10]
    with torch.no_grad():
        model.lm_head.bias.mul_(50)
    expected = reference(model, tokens)
    assert EXACT < worst(Engine(model, positions=16, head_bits=8), tokens, expected, 5) < 0.1
    assert int(Engine(model, screen=True).greedy(tokens[:1])[0]) == int(expected[0].argmax())


def test_sizes_are_checked(decoders: Any, ids: torch.Tensor) -> None:
    model = decoders.dense("llama")
    engine = Engine(model, positions=20)
    with pytest.raises(InputError, match="exceed the cache"):
        engine.prompt(0, ids[:40].tolist())
    with pytest.raises(InputError, match="one or more"):
        Engine(model, slots=0)
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        Engine(model, slots=9).step(ids[:9])
    engine.prompt(0, ids[:32].tolist())
    with pytest.raises(ValueError, match="not all within"):
        engine.step(ids[:1])
    with pytest.raises(ValueError, match="tokens"):
        Engine(model).step(torch.tensor([72]))


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 203, "tie_word_embeddings": False}])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_screened_head_chooses_what_the_whole_head_chooses(
    decoders: Any, ids: torch.Tensor, family: str, changes: Any
) -> None:
    model = decoders.packed(family, 4, **changes)
    screened, whole = Engine(model, 3, 64, screen=True, threads=2), Engine(model, 3, 64, screen=False, threads=2)
    assert screened.decoder.screen is not None
    assert whole.decoder.screen is None
    for engine in (screened, whole):
        for slot in range(3):
            engine.prompt(slot, ids[slot : slot + 5 + slot].tolist())
    for position in range(8, 40):
        tokens = ids[position : position + 3]
        logits = whole.step(tokens)
        assert torch.equal(screened.greedy(tokens), logits.argmax(-1))


def test_screen_bounds_hold_and_are_needed(decoders: Any) -> None:
    model = decoders.dense("llama", vocab_size=203)
    decoder = Engine(model, screen=True).decoder
    head, bound = model.lm_head.weight.detach().double(), decoder.screen_error.double()
    x = torch.randn(500, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = Engine(model, head_bits=8).decoder.head
    near = torch.ops.llmcompress.group_gemm(
        x.float(), *(deinterleave(t)[:203] for t in (out.data, out.scale)), None, 8, 48, 48, False
    ).double()  # fmt: skip
    off = (near - x @ head.T).abs() / x.norm(dim=-1, keepdim=True)
    assert (off <= bound).all()
    # not so wide that everything passes
    assert (off.amax(0) > 0.2 * bound).float().mean() > 0.9
