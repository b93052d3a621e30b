"""The native engine on a family: members side by side in one step, against each member's dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.inference.engine import Engine, decline
from llmcompress.inference.random_family import RandomFamily
from llmcompress.quant.tree import Tree
from llmcompress.serving.mixed_rows import MixedRows, disagrees
from llmcompress.serving.rows import NativeRows, Rows, SeparateRows, prompt_logits

MEMBERS = ("ant", "bee", "cat", "dog")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    # biases in the attention's inputs
    "qwen2": {},
    # norms of heads
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
    # several matrices in one
    "phi3": {},
    # norms before and after that multiply by one more than they hold, windows, embeddings with a factor
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    # norms without weights
    "nanochat": {},
    # LayerNorm of heads: one for all of a layer, one for each
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True, "num_key_value_heads": 1},
}


def source(model_type: str, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 72, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "intermediate_size": 80, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**sizes, **FAMILIES[model_type]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_family(model_type: str, widths: dict[int, int] | None = None) -> RandomFamily:
    """Two pairs: the root has 5 bits, pairs 3, leaves 2, or others by the number of members below."""
    pairs = [frozenset(MEMBERS[:2]), frozenset(MEMBERS[2:])]
    merges = [*((frozenset([a]), frozenset([b])) for a, b in (MEMBERS[:2], MEMBERS[2:])), (pairs[0], pairs[1])]
    models = {name: source(model_type, seed) for seed, name in enumerate(MEMBERS)}
    return RandomFamily(models, Tree.of(MEMBERS, merges), widths or {4: 5, 2: 3, 1: 2}, 32)


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=10**6
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_request_gets_its_members_tokens(model_type: str) -> None:
    """Ten requests of four members, one joining each step, by every way to hold them."""
    family = random_family(model_type)
    draws = torch.Generator().manual_seed(1)
    asked = [(MEMBERS[i * 3 % 4], torch.randint(3, 72, (3 + 5 * i,), generator=draws).tolist()) for i in range(10)]
    dense = {name: family.dense(name) for name in MEMBERS}
    expected = [alone(dense[name], prompt, 8) for name, prompt in asked]
    assert len({tuple(tokens) for tokens in expected}) > 5
    mixed = MixedRows(family.model, 16, 64, family.batch, family.members)
    separate = SeparateRows(family.model, 16, 64, family.batch)
    assert disagrees(mixed, separate, family.members, 72) is None
    ways: list[Rows] = [mixed, separate]
    reason = decline(family.model)
    if reason is None:
        ways.append(NativeRows(Engine(family.model, slots=10, positions=64), 10, 64))
    for rows in ways:
        assert _decode(rows, asked, 8) == expected, rows.kind
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("widths", [{4: 5, 2: 3, 1: 2}, {4: 4, 2: 0, 1: 1}])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_prompts_at_once_are_those_of_steps(model_type: str, widths: dict[int, int]) -> None:
    """More tokens than are rounded at once."""
    family = random_family(model_type, widths)
    if (reason := decline(family.model)) is not None:
        pytest.skip(reason)
    engine = Engine(family.model, slots=2, positions=112, threads=1)
    assert engine.decoder.takes_prompts
    tokens = torch.randint(3, 72, (101,), generator=torch.Generator().manual_seed(2)).tolist()
    for member in range(len(MEMBERS)):
        engine._owners = [member, member]
        assert torch.equal(engine._prompt_at_once(0, tokens), engine._prompt_by_steps(1, tokens))
        assert torch.equal(engine.cache.keys[:, 0], engine.cache.keys[:, 1])


def test_parts_of_prompts_are_the_whole_and_stay_with_their_member() -> None:
    family = random_family("qwen3")
    if (reason := decline(family.model)) is not None:
        pytest.skip(reason)
    engine = Engine(family.model, slots=3, positions=112, threads=1)
    tokens = torch.randint(3, 72, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = engine.prompt(0, tokens, "cat")
    for start, end in ((0, 37), (37, 99), (99, 100)):
        found = engine.prompt(1, tokens[start:end], "cat", start=start, last=end == 100)
    assert torch.equal(found, whole)
    engine.copy(0, 2, 64)
    assert torch.equal(engine.prompt(2, tokens[64:], "cat", start=64), whole)
    with pytest.raises(InputError, match="belongs to cat, not to dog"):
        engine.prompt(2, tokens[64:], "dog", start=64)
    rows = NativeRows(engine, 3, 112)
    rows.join(0, tokens, "ant", 110)
    for key, member, held in ((1, "bee", 0), (2, "ant", 99)):
        rows.join(key, tokens, member, 110)
        assert rows.reused(key) == held


def test_probabilities_of_a_prompt_are_its_members() -> None:
    family = random_family("llama")
    tokens = torch.randint(3, 72, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    for member in ("cat", "ant"):
        expected = family.dense(member)(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(prompt_logits(family.model, tokens, member), expected, atol=1e-4, rtol=1e-4)


def test_more_members_than_a_node_tells_apart_go_through_modules() -> None:
    names = [f"m{i}" for i in range(65)]
    models = dict.fromkeys(names, source("llama", 0))
    # nearly flat: exponents have bounds
    merges = [(frozenset(names[i : i + 1]), frozenset(names[i + 1 : i + 2])) for i in range(0, 64, 2)]
    left = [first | second for first, second in merges] + [frozenset(names[64:])]
    while len(left) > 1:
        first, second, *left = left
        merges.append((first, second))
        left.append(first | second)
    family = RandomFamily(models, Tree.of(names, merges), {65: 4, 1: 2}, 32)
    assert "65 members" in (decline(family.model) or "")


def test_activations_of_their_own_go_through_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    monkeypatch.setitem(FAMILIES, "apertus", {"rope_parameters": rotary})
    assert "activations of their own (xielu)" in (decline(random_family("apertus").model) or "")


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("opt", {"ffn_dim": 80}), ("gpt_neo", {"attention_types": [[["global"], 2]]})]
)
def test_learned_positions_go_through_modules(
    monkeypatch: pytest.MonkeyPatch, model_type: str, sizes: dict[str, Any]
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, sizes)
    assert "learned positions of their own" in (decline(random_family(model_type).model) or "")


def test_gates_by_a_linear_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"num_dense_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    monkeypatch.setitem(FAMILIES, "afmoe", dense)
    family = random_family("afmoe")
    assert decline(family.model) is None
    engine = Engine(family.model, slots=2, positions=64)
    tokens = torch.randint(3, 72, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    # by steps and at once
    for slot, (member, count) in enumerate((("cat", 5), ("ant", 33))):
        with torch.inference_mode():
            expected = family.dense(member)(torch.tensor([tokens])).logits[0, count - 1 :]
        found = [engine.prompt(slot, tokens[:count], member)]
        found += [engine.step(torch.tensor([token]), [slot])[0].clone() for token in tokens[count:]]
        torch.testing.assert_close(torch.stack(found), expected, atol=1e-4, rtol=1e-4)


def _decode(rows: Rows, asked: list[tuple[str, list[int]]], count: int) -> list[list[int]]:
    written: dict[int, list[int]] = {}
    waiting, alive = list(range(len(asked))), []
    while waiting or alive:
        if waiting:
            key = waiting.pop(0)
            member, prompt = asked[key]
            written[key] = [int(rows.join(key, prompt, member, len(prompt) + count).argmax())]
            alive.append(key)
        found = rows.step({key: written[key][-1] for key in alive})
        for key in list(alive):
            if len(written[key]) == count:
                rows.leave(key)
                alive.remove(key)
            else:
                written[key].append(int(found[key].argmax()))
    return [written[key] for key in range(len(asked))]


def test_a_move_gives_the_stored_order_back() -> None:
    """Preparing for the CPU kernels and moving a module loses no bit."""
    family = random_family("llama")
    module: Any = family.model.model.layers[0].mlp.gate_proj
    before = [(getattr(module, f"packed_{i}").clone(), getattr(module, f"scale_{i}").clone()) for i in range(7)]
    if not module.prepare():
        pytest.skip("the kernels of residual trees do not run here")
    assert module.packed_0.numel() == 0
    module.to("cpu")
    for index, (packed, scale) in enumerate(before):
        assert torch.equal(getattr(module, f"packed_{index}"), packed)
        assert torch.equal(getattr(module, f"scale_{index}"), scale)
