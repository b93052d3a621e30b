from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.inference.greedy import end_tokens
from llmcompress.models.assemble import attach_policies, block_tensors, compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.quant.store import BlockPatch, PackedStore


@pytest.fixture
def handle(tiny_folder: Path) -> ModelHandle:
    return ModelHandle.open(tiny_folder)


ROUTER = "model.layers.0.mlp.gate.weight"


def test_an_empty_store_gives_the_dense_model(handle: ModelHandle, tmp_path: Path) -> None:
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.inference_mode():
        found = compressed_model(handle, PackedStore(tmp_path / "none"), {})(ids).logits
        assert torch.equal(found, handle.dense_model()(ids).logits)


def test_text_ends_where_the_exported_model_ends_it(tiny, tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    model.generation_config.update(eos_token_id=[2, 7], repetition_penalty=1.1)
    model.save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source")
    for found in (handle.dense_model(), compressed_model(handle, PackedStore(tmp_path / "none"), {})):
        assert end_tokens(found) == {2, 7}
        assert found.generation_config.repetition_penalty == 1.1


def test_replaced_tensors_take_the_type_of_the_file(tiny, tmp_path: Path) -> None:
    tiny.model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source", "float32")
    new = torch.randn(8, 32)
    store = PackedStore(tmp_path / "blocks")
    store.write_block(0, BlockPatch({}, {ROUTER: new}))
    found = dict(block_tensors(handle, store, handle.layout.blocks[0]))[ROUTER]
    assert found.dtype == torch.bfloat16
    gate = compressed_model(handle, store, {}).model.layers[0].mlp.gate.weight
    assert gate.dtype == torch.float32
    assert torch.equal(gate, new.to(torch.bfloat16).float())


@pytest.mark.parametrize(("name", "shape"), [("model.layers.0.mlp.other.weight", (2,)), (ROUTER, (2, 2))])
def test_replacements_that_do_not_fit_are_refused(handle: ModelHandle, tmp_path: Path, name: str, shape: tuple) -> None:
    store = PackedStore(tmp_path)
    store.write_block(0, BlockPatch({}, {name: torch.ones(shape)}))
    with pytest.raises(InputError, match=name):
        compressed_model(handle, store, {})


def test_unknown_policies_are_refused(handle: ModelHandle) -> None:
    with pytest.raises(InputError, match="unknown policy sparkle"):
        attach_policies(handle.skeleton(), handle.layout, {"sparkle": {}})
