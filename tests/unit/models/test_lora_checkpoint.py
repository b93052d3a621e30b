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
from llmcompress.models.lora_checkpoint import CONFIG, WEIGHTS, is_adapter
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


def test_experts_saved_whole_replace_the_bases_whose_file_holds_them_one_by_one(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    plain = ModelHandle.open(tmp_path / "base")
    name = next(name for name in plain.layout.banks if name.endswith("down_proj"))
    assert name not in load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    experts = torch.randn(plain.checkpoint.tensor(name).shape)
    save_file({f"base_model.model.{name}": experts}, tmp_path / WEIGHTS)
    assert torch.equal(plain.adapted(tmp_path).checkpoint.tensor(name), experts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_what_is_no_sum_with_the_base_is_refused(
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
    (adapter / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"tuned: .*no adapter_model\.safetensors"):
        ModelFamily.open(plain, {"tuned": str(adapter)})
