"""Adapters of PEFT's format over a base, held to the adapter modules and to PEFT's rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import InputError
from llmcompress.models.family import ModelFamily
from llmcompress.models.handle import ModelHandle
from llmcompress.models.lora_checkpoint import CONFIG, WEIGHTS, is_adapter, read_adapter
from llmcompress.models.lora_edits import PartAdditions
from llmcompress.nn import lora

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter as our own training writes it, which is PEFT's format."""
    model = ModelHandle.open(base).dense_model(torch.float32)
    parameters = lora.attach(model, NAMES, 4, 8.0, seed=1)
    torch.manual_seed(1)
    for name, place in parameters.items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(place)
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save(model, folder)
    return folder


def change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS)
    return folder


def test_an_adapted_base_is_the_model_with_the_adapter_in_it(base: Path, adapter: Path) -> None:
    plain = ModelHandle.open(base)
    adapted = plain.adapted(adapter)
    model = plain.dense_model(torch.float32)
    lora.load(model, adapter)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.inference_mode():
        expected, found = model(ids).logits, adapted.dense_model(torch.float32)(ids).logits
        assert not torch.allclose(plain.dense_model(torch.float32)(ids).logits, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # other weights, and the base itself, are what they were
    for view in plain.layout.tensors():
        same = torch.equal(plain.checkpoint.tensor(view.name), adapted.checkpoint.tensor(view.name))
        assert same == (view.name.removesuffix(".weight") not in NAMES)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "proj": 2}}, 2.0),  # neither is the end of the name
    ],
)
def test_scales_are_those_of_peft(base: Path, adapter: Path, settings: dict[str, Any], scale: float) -> None:
    plain, tensors = ModelHandle.open(base), load_file(adapter / WEIGHTS)
    name = NAMES[0]
    low, high = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    found = plain.adapted(change(adapter, **settings)).checkpoint.tensor(f"{name}.weight")
    torch.testing.assert_close(found, plain.checkpoint.tensor(f"{name}.weight") + scale * high @ low)


def test_weights_saved_whole_replace_the_bases(base: Path, adapter: Path) -> None:
    head = torch.randn(40, 16)
    change(adapter, {**load_file(adapter / WEIGHTS), "base_model.model.lm_head.weight": head.half()})
    found = ModelHandle.open(base).adapted(adapter).checkpoint.tensor("lm_head.weight")
    assert found.dtype == torch.float32 and torch.equal(found, head.half().float())


def mixture(folder: Path, intermediate: int = 24) -> ModelHandle:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "base")
    return ModelHandle.open(folder / "base")


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """An adapter of rank 2 with scale 2, keys without PEFT's prefix."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}))
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    return folder


def pair(outputs: int, inputs: int, module: str, rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(module))
    return {f"{module}.lora_A.weight": torch.randn(rank, inputs), f"{module}.lora_B.weight": torch.randn(outputs, rank)}


def test_rows_of_dora_get_their_norms(base: Path, tmp_path: Path) -> None:
    parts, norms = pair(16, 16, NAMES[0]), torch.rand(16) + 0.5
    folder = write(tmp_path / "dora", {**parts, f"{NAMES[0]}.lora_magnitude_vector": norms}, use_dora=True)
    plain = ModelHandle.open(base)
    found = plain.adapted(folder).checkpoint.tensor(f"{NAMES[0]}.weight")
    torch.testing.assert_close(found.norm(dim=1), norms)
    low, high = parts.values()
    before = plain.checkpoint.tensor(f"{NAMES[0]}.weight") + 2 * high @ low
    torch.testing.assert_close(torch.cosine_similarity(found, before, dim=1), torch.ones(16))


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
@pytest.mark.parametrize("intermediate", [24, 8])  # 8: gates and ups are square
def test_adapters_of_stacked_experts_are_as_peft_multiplies_them(
    tmp_path: Path, version: str | None, intermediate: int
) -> None:
    """PEFT's own definition: A by expert and rank, B by rank and expert, put together by einsum."""
    plain = mixture(tmp_path, intermediate)
    module, old = "model.layers.0.mlp.experts", version != "0.21.2"
    tensors, deltas = {}, {}
    # two wrappers, one around the other
    for place, name in ((f"{module}.base_layer", "gate_up_proj"), (module, "down_proj")):
        experts, outer, inner = plain.checkpoint.tensor(f"{module}.{name}").shape
        inputs, outputs = (outer, inner) if old else (inner, outer)
        tensors |= pair(outputs, inputs, place, rank=2 * experts)
        low, high = (tensors[f"{place}.lora_{part}.weight"] for part in "AB")
        low, high = low.reshape(experts, 2, inputs), high.reshape(outputs, 2, experts)
        scale = 3.0 if name == "down_proj" else 2.0
        deltas[f"{module}.{name}"] = scale * torch.einsum("nre,erk->ekn" if old else "nre,erk->enk", high, low)
    settings = {"alpha_pattern": {"down_proj": 6}, "peft_version": version}
    adapted = plain.adapted(write(tmp_path / "adapter", tensors, **settings))
    for name, delta in deltas.items():
        torch.testing.assert_close(adapted.checkpoint.tensor(name), plain.checkpoint.tensor(name) + delta)


def test_adapters_of_single_experts_and_of_older_names_find_their_place(tmp_path: Path) -> None:
    plain = mixture(tmp_path)
    shapes = {"block_sparse_moe.experts.1.w3": (24, 16), "mlp.experts.0.w2": (16, 24), "block_sparse_moe.gate": (2, 16)}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensors |= pair(*shape, f"model.layers.0.{name}")
    adapted = plain.adapted(write(tmp_path / "adapter", tensors))

    def delta(name: str) -> torch.Tensor:
        low, high = (tensors[f"model.layers.0.{name}.lora_{part}.weight"] for part in "AB")
        return 2 * high @ low

    places = {
        "mlp.experts.gate_up_proj": ((1, slice(24, 48)), "block_sparse_moe.experts.1.w3"),
        "mlp.experts.down_proj": ((0, slice(None)), "mlp.experts.0.w2"),
        "mlp.gate.weight": ((slice(None),), "block_sparse_moe.gate"),
    }
    for ours, (place, theirs) in places.items():
        expected = plain.checkpoint.tensor(f"model.layers.0.{ours}").clone()
        expected[place] += delta(theirs)
        torch.testing.assert_close(adapted.checkpoint.tensor(f"model.layers.0.{ours}"), expected)


def test_adapters_of_many_experts_copy_their_stack_once(tmp_path: Path) -> None:
    plain = mixture(tmp_path)
    places = [(expert, part) for expert in range(2) for part in ("w1", "w3")]
    tensors: dict[str, torch.Tensor] = {}
    for size, (expert, part) in enumerate(places, 1):
        both = pair(24, 16, f"model.layers.0.mlp.experts.{expert}.{part}")
        tensors |= {name: size * value for name, value in both.items()}
    folder, stack = write(tmp_path / "adapter", tensors), "model.layers.0.mlp.experts.gate_up_proj"
    edit = read_adapter(folder, plain.layout)[stack]
    assert isinstance(edit, PartAdditions)
    assert [(expert, rows) for expert, rows, _ in edit.parts] == [
        (expert, slice(0, 24) if part == "w1" else slice(24, 48)) for expert, part in places
    ]
    weight = plain.checkpoint.tensor(stack)
    before, found = weight.clone(), edit(weight)
    assert torch.equal(weight, before)
    for (expert, rows, _), low, high in zip(edit.parts, *(list(tensors.values())[i::2] for i in (0, 1))):
        torch.testing.assert_close(found[expert, rows], before[expert, rows] + 2 * high @ low)


def test_an_embedding_is_adapted_on_top_of_what_was_saved_of_it(base: Path, tmp_path: Path) -> None:
    module = "model.embed_tokens"
    saved, low, high = torch.randn(40, 16), torch.randn(2, 40), torch.randn(16, 2)
    parts = {"base_layer.weight": saved, "lora_embedding_A": low, "lora_embedding_B": high}
    folder = write(tmp_path / "adapter", {f"{module}.{key}": value for key, value in parts.items()})
    found = ModelHandle.open(base).adapted(folder).checkpoint.tensor(f"{module}.weight")
    torch.testing.assert_close(found, saved + 2 * (high @ low).T)


@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}])
def test_rows_of_trained_tokens_are_replaced(base: Path, tmp_path: Path, indices: Any) -> None:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 16)}
    folder = write(tmp_path / "adapter", rows, trainable_token_indices=indices)
    plain = ModelHandle.open(base)
    expected = plain.checkpoint.tensor("model.embed_tokens.weight").clone()
    expected[[3, 5]] = next(iter(rows.values()))
    assert torch.equal(plain.adapted(folder).checkpoint.tensor("model.embed_tokens.weight"), expected)
    for wrong in (None, [3], [3, 40]):
        write(folder, rows, trainable_token_indices=wrong)
        with pytest.raises(InputError, match=r"which tokens|1 rows"):
            plain.adapted(folder)


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plain = mixture(tmp_path)
    module = "model.layers.0.mlp.experts"
    for parts, words in (
        (pair(20, 16, module, rank=4), "fit none of the base's experts"),
        (pair(48, 16, module, rank=3), "fit none of the base's experts"),
        (pair(24, 10, f"{module}.1.w3"), r"shape \[24, 10\], the base's has \[24, 16\]"),
        ({**pair(24, 16, f"{module}.1.w3"), f"{module}.1.w3.lora_B.weight": torch.randn(24, 3)}, "fit each other"),
    ):
        with pytest.raises(InputError, match=words):
            plain.adapted(write(tmp_path / "adapter", parts))


PEFT_CASES: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7},
    },
    "experts and routers": {
        "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("settings", PEFT_CASES.values(), ids=PEFT_CASES)
def test_what_peft_writes_is_read_as_peft_merges_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    plain = mixture(tmp_path)
    model = plain.dense_model(torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for place in adapted.parameters():
        if place.requires_grad:
            place.data += torch.randn_like(place) / 10
    adapted.save_pretrained(tmp_path / "adapter")
    merged = dict(adapted.merge_and_unload().named_parameters())
    found = plain.adapted(tmp_path / "adapter").checkpoint
    names = [view.name for view in plain.layout.tensors()]
    assert any(not torch.equal(merged[name], plain.checkpoint.tensor(name)) for name in names)
    for name in names:
        torch.testing.assert_close(found.tensor(name), merged[name].data, rtol=1e-6, atol=1e-6)


def test_experts_saved_whole_replace_the_bases_whose_file_holds_them_one_by_one(tmp_path: Path) -> None:
    plain = mixture(tmp_path)
    name = next(name for name in plain.layout.banks if name.endswith("down_proj"))
    assert name not in load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    experts = torch.randn(plain.checkpoint.tensor(name).shape)
    save_file({f"base_model.model.{name}": experts}, tmp_path / WEIGHTS)
    assert torch.equal(plain.adapted(tmp_path).checkpoint.tensor(name), experts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"bias": "all"}, "bias all"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_what_base_and_adapter_do_not_tell_is_refused(
    base: Path, adapter: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        ModelHandle.open(base).adapted(change(adapter, **settings))
    assert refused.value.hint


def test_an_adapter_of_another_base_is_refused_with_all_that_does_not_fit(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    key = f"base_model.model.{NAMES[0]}.lora_A.weight"
    wide = {**tensors, key: torch.randn(4, 32), "base_model.model.model.norm.lora_magnitude": torch.ones(16)}
    with pytest.raises(InputError) as refused:
        ModelHandle.open(base).adapted(change(adapter, wide))
    assert "q_proj.lora_A.weight: for a weight of shape [16, 32], the base's has [16, 16]" in refused.value.message
    assert "norm.lora_magnitude: the base has no such weight" in refused.value.message
    alone = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(InputError, match=r"q_proj\.lora_B\.weight: the base has no such weight"):
        ModelHandle.open(base).adapted(change(adapter, alone))


def test_an_adapter_is_a_member_and_no_model(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmcompress.cli.app import invoke

    assert is_adapter(adapter) and not is_adapter(base)
    plain = ModelHandle.open(base)
    family = ModelFamily.open(plain, {"tuned": str(adapter)})
    weight = f"{NAMES[1]}.weight"
    expected = plain.adapted(adapter).checkpoint.tensor(weight)
    assert torch.equal(family.weights(NAMES[1])["tuned"], expected)
    with pytest.raises(InputError, match="an adapter") as refused:
        ModelHandle.open(adapter)
    assert "merge_and_unload" in str(refused.value.hint)
    for words in (["plan", "gptq", f"model.path={adapter}"], ["inspect", str(adapter)]):
        assert invoke(words) == 4
        assert "an adapter (adapter_config.json), not a model" in capsys.readouterr().err
    # some trainers copy the base's config beside it
    (adapter / "config.json").write_text((base / "config.json").read_text())
    assert torch.equal(ModelFamily.open(plain, {"tuned": str(adapter)}).weights(NAMES[1])["tuned"], expected)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"tuned: .*no adapter_model\.safetensors"):
        ModelFamily.open(plain, {"tuned": str(adapter)})
