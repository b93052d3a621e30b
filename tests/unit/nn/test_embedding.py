"""Packed embedding and head: as the decoded matrix, once in memory, saved and loaded; odd ones refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import hf
from llmcompress.errors import InputError, RecipeError
from llmcompress.export.native import write_native
from llmcompress.models.assemble import compressed_model
from llmcompress.nn import embedding
from llmcompress.nn.embedding import PackedEmbedding, PackedRows, pack_rows
from llmcompress.quant.codecs import codec
from llmcompress.quant.embeddings import matrices, packed_bytes, spec_of
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import PackedStore
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig

IDS = torch.tensor([[5, 9, 1, 33, 60, 2, 17, 8]])
SPECS = [QuantSpec(8, -1, symmetric=True), QuantSpec(4, 32, symmetric=True)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [48, 50])
def test_looks_up_and_multiplies_with_the_decoded_rows(spec: QuantSpec, rows: int) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    packed = pack_rows(weight, spec)
    decoded = codec("int_group").decode(packed)[:rows]
    assert float((decoded - weight).norm() / weight.norm()) < (0.01 if spec.bits == 8 else 0.12)
    module = PackedEmbedding(rows, 64, spec, torch.float32)
    module.load_state_dict(packed.tensors)
    ids, x = torch.tensor([[0, rows - 1, 17], [3, 16, 15]]), torch.randn(5, 64)
    assert torch.equal(module(ids), decoded[ids])
    found = module.project(x)
    assert found.shape == (5, rows)
    torch.testing.assert_close(found, x @ decoded.T, rtol=1e-4, atol=1e-4)
    # after the first product the words of sixteen rows may lie side by side
    assert torch.equal(module(ids), decoded[ids])


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(4, 32)])
@pytest.mark.parametrize("lanes", [1, 16])
def test_rounding_some_rows_at_a_time_changes_nothing(
    spec: QuantSpec, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = pack_rows(weight, spec, lanes)
    monkeypatch.setattr(embedding, "ROUNDED_AT_ONCE", 20 * 64)
    pieces = pack_rows(weight, spec, lanes)
    assert pieces.shape == whole.shape == (50 + -50 % lanes, 64)
    assert all(torch.equal(pieces.tensors[key], tensor) for key, tensor in whole.tensors.items())


@pytest.mark.parametrize(("family", "changes"), [
    ("mamba2", {"tie_word_embeddings": True}), ("jamba", {}), ("gemma3_text", {"tie_word_embeddings": True}),
])  # fmt: skip
def test_a_saved_model_gives_the_same_logits(family: str, changes: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", family, vocab_size=70, **changes)
    Embeddings("embeddings", EmbeddingsConfig(bits=8)).run(state, tiny.context(tmp_path))
    store, layout = PackedStore(tmp_path / "nothing"), state.model.layout
    model = compressed_model(state.model, store, state.policies, torch.float32)
    dense = compressed_model(state.model, store, {}, torch.float32)
    with torch.no_grad():
        # a tied weight is one object
        for weight in {dense.get_input_embeddings().weight, dense.get_output_embeddings().weight}:
            packed = pack_rows(weight, spec_of(state.policies["embeddings"]))
            weight.copy_(codec("int_group").decode(packed)[:70])
        expected, found = dense(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    write_native(state.model, store, state.policies, tmp_path / "artifact", {})
    loaded, _ = hf.load(tmp_path / "artifact", dtype=torch.float32)
    with torch.no_grad():
        # torch.matmul takes another order of sums where a gradient is wanted
        assert torch.equal(loaded.requires_grad_(False)(IDS, use_cache=False).logits, found)
    rows = [module for module in loaded.modules() if isinstance(module, PackedRows)]
    assert len(rows) == len(matrices(layout)) == (1 if changes else 2)
    assert sum(module.nbytes for module in rows) == packed_bytes(layout, state.policies["embeddings"])
    # what was loaded can be saved and loaded again
    loaded.save_pretrained(tmp_path / "again")
    again, _ = hf.load(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS, use_cache=False).logits, found)


def test_an_embedding_that_does_more_and_an_unknown_policy_are_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    store = PackedStore(tmp_path / "nothing")
    for policy in ({"bits": 5, "group_size": -1}, {"bits": 8, "group_size": 0}, {"bits": 8, "group_size": -1, "x": 1}):
        with pytest.raises(InputError, match="embeddings"):
            compressed_model(state.model, store, {"embeddings": policy}, torch.float32)
    import transformers

    config = transformers.BioGptConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    state.model.hf_config = lambda: config
    with pytest.raises(RecipeError, match="look rows up"):
        Embeddings("embeddings", EmbeddingsConfig()).run(state, tiny.context(tmp_path))
