from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.models.alignment import align
from llmcompress.models.handle import ModelHandle, assign
from llmcompress.models.paths import assets_folder


@pytest.fixture
def handle(tiny_folder: Path) -> ModelHandle:
    return ModelHandle.open(tiny_folder, "float32")


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_skeleton_holds_no_blocks(handle: ModelHandle) -> None:
    model = handle.skeleton()
    assert devices(model.model.layers) == {"meta"}
    assert {n for n, p in model.named_parameters() if p.device.type != "meta"} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
    assert devices(model.model.rotary_emb) == {"cpu"}
    assert not model.training


def test_blocks_come_and_go(handle: ModelHandle) -> None:
    model = handle.skeleton()
    layer = handle.load_block(model, 1)
    assert layer is model.model.layers[1]
    assert devices(layer) == {"cpu"}
    assert devices(model.model.layers[0]) == {"meta"}
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(layer.mlp.experts.down_proj, handle.checkpoint.tensor(name))
    assert not any(p.requires_grad for p in layer.parameters())
    handle.free_block(model, 1)
    assert devices(model.model.layers) == {"meta"}
    handle.load_block(model, 1)
    assert devices(layer) == {"cpu"}


def test_dtypes(handle: ModelHandle, tiny_folder: Path) -> None:
    assert ModelHandle.open(tiny_folder).dtype == handle.checkpoint.dtype == torch.float32
    model = ModelHandle.open(tiny_folder, "bfloat16").dense_model()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert handle.skeleton(torch.float16).lm_head.weight.dtype == torch.float16
    with pytest.raises(InputError, match="int4"):
        ModelHandle.open(tiny_folder, "int4")


def test_dense_model_is_what_transformers_loads(handle: ModelHandle) -> None:
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(handle.path, dtype=torch.float32)
    align(expected)
    found = handle.dense_model()
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert type(found) is type(expected)
    assert found.config._attn_implementation == expected.config._attn_implementation


def test_router_corrections_stay_in_float32(tiny, tmp_path: Path) -> None:
    tiny.model("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path)
    model = ModelHandle.open(tmp_path).dense_model()
    gate = model.model.layers[1].mlp.gate
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32


def test_tokenizer(handle: ModelHandle, tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = handle.tokenizer()
    assert tokenizer.decode(tokenizer("the sea")["input_ids"]) == "the sea"
    bare = Path(shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*")))
    with pytest.raises(InputError, match=r"no usable tokenizer: none of tokenizer\.json"):
        ModelHandle.open(bare).tokenizer()
    other = ModelHandle.open(bare, tokenizer=str(tiny_folder))
    assert other.tokenizer_path == tiny_folder
    assert len(other.tokenizer()) == len(tokenizer)
    with pytest.raises(InputError, match="no such folder"):
        ModelHandle.open(bare, tokenizer=str(tmp_path / "absent")).tokenizer()
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no usable tokenizer"):
        ModelHandle.open(bare).tokenizer()


def test_a_folder_that_is_no_model() -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        ModelHandle.open(assets_folder() / "text")


def test_assign_refuses_what_does_not_fit() -> None:
    layer = nn.Linear(3, 2)
    assign(layer, "weight", torch.ones(2, 3, dtype=torch.float64))
    assert layer.weight.dtype == torch.float32
    with pytest.raises(InputError, match="shape"):
        assign(layer, "weight", torch.ones(3, 2))
    with pytest.raises(InputError, match="no such tensor"):
        assign(layer, "inner.weight", torch.ones(3, 2))
    with pytest.raises(InputError, match="no such tensor"):
        assign(layer, "gain", torch.ones(3, 2))
