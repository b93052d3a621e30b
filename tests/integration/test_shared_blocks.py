"""Zamba2's shared transformers: weights that belong to one block and are run by several."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.export.compressed_tensors import CompressedTensorsExporter
from llmcompress.models import sizes
from llmcompress.models.assemble import compressed_model
from llmcompress.models.family import unsupported
from llmcompress.models.registry import layout_from_config
from llmcompress.models.streamed import StreamedModel
from llmcompress.stages.gptq import Gptq, GptqConfig

TWO = {
    "num_mem_blocks": 2, "num_hidden_layers": 6,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"],
}  # fmt: skip
TOKENS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(5))
RULES = {
    "adapters": {"match": "adapter_list", "keep": True},
    "rest": {"match": ".", "bits": 8, "group_size": 16, "symmetric": True},
}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_shared_weights_count_once_and_are_met_at_every_use(tiny: Any) -> None:
    model = tiny.model("zamba2", **TWO)
    layout = layout_from_config(model.config.to_dict())
    assert sizes.parameters(layout) == sum(parameter.numel() for parameter in model.parameters())
    names = [name for name, *_ in layout.quantizable()]
    assert len(names) == len(set(names))
    loans = {block.index: block.loan for block in layout.blocks if block.loan is not None}
    assert {index: loan.block for index, loan in loans.items()} == {4: 1, 5: 2}
    shared = sum(sizes.borrowed_parameters(block) for block in layout.blocks)
    assert sizes.active_parameters(layout) == sizes.parameters(layout) - layout.hidden + shared
    # adapters belong to the block that runs them
    own = [view.name for view in layout.blocks[4].linears() if "adapter_list" in view.name]
    assert len(own) == 8
    assert all(".layers.1.shared_transformer." in name and "_adapter_list.2." in name for name in own)


def test_what_cannot_hold_shared_weights_refuses(tiny: Any) -> None:
    config = tiny.config("zamba2", **TWO).to_dict()
    layout = layout_from_config(config)
    assert "share weights" in unsupported(layout)[0]
    assert any("tie" in reason for reason in CompressedTensorsExporter().refusals(layout, {}, {}))
    with pytest.raises(InputError, match="tie_word_embeddings is false"):
        layout_from_config({**config, "tie_word_embeddings": False})


def test_every_use_sees_the_quantized_weights_and_a_resumed_run_has_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    config = GptqConfig(rules=RULES, damp=0.05)
    state = tiny.state(tmp_path / "model", "zamba2", samples=8, **TWO)
    Gptq("quantize", config).run(state, tiny.context(tmp_path))
    handle, store = state.model, state.packed
    assert not any("adapter_list" in name for name in store.plan())

    whole = compressed_model(handle, store, {}, torch.float32)
    streamed = StreamedModel(handle, store, [TOKENS], torch.float32)
    with torch.inference_mode():
        expected, dense = whole(TOKENS).logits, handle.dense_model(torch.float32)(TOKENS).logits
    found = streamed.logits(0, slice(0, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found - dense).norm()) > 10 * float((found - expected).norm())

    before = digests(store.root)
    for kept in (2, 5):
        for index in range(kept, 6):
            store.path(index).unlink()
        Gptq("quantize", config).run(tiny.state(tmp_path / "model", "zamba2", samples=8), tiny.context(tmp_path))
        assert digests(store.root) == before
