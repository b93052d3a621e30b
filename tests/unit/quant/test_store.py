from __future__ import annotations

from pathlib import Path

import torch

from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore

Q, UP, ROUTER = "layers.0.q_proj", "layers.0.experts.gate_up_proj", "layers.0.gate.weight"


def weight() -> PackedWeight:
    tensors = {"weight_packed": torch.arange(8, dtype=torch.int32).reshape(4, 2), "weight_scale": torch.ones(4, 1)}
    return PackedWeight((4, 16), QuantSpec(bits=4, group_size=16, symmetric=True), tensors)


def test_a_store_shows_what_lies_below_until_it_has_its_own(tmp_path: Path) -> None:
    below, above = PackedStore(tmp_path / "a"), PackedStore(tmp_path / "b", PackedStore(tmp_path / "a"))
    pruned = {f"{Q}.weight": torch.zeros(4, 16), UP: torch.zeros(2, 4, 16), ROUTER: torch.zeros(2, 4)}
    below.write_block(0, BlockPatch({}, pruned, {"sparsity": 0.5, "seconds": 1}))
    assert above.finished() == set() and above.indices() == [0]
    assert set(above.read_block(0).replaced) == set(pruned)
    # what is quantized above was dense below: one weight is never both
    above.write_block(0, BlockPatch({Q: weight(), UP: weight()}, {ROUTER: torch.ones(2, 4)}, {"seconds": 2}))
    found = above.read_block(0)
    assert set(found.packed) == {Q, UP} == set(above.plan())
    assert set(found.replaced) == {ROUTER} and bool(found.replaced[ROUTER].all())
    assert found.record == {"sparsity": 0.5, "seconds": 2}
    assert torch.equal(found.packed[Q].tensors["weight_packed"], weight().tensors["weight_packed"])
    assert set(below.read_block(0).replaced) == set(pruned)


def test_what_a_kill_left_half_written_is_not_there(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)
    store.write_block(1, BlockPatch({Q: weight()}, {}))
    (tmp_path / "00000.safetensors.part").write_bytes(b"half")
    assert store.finished() == {1} and store.read_block(0).packed == {}
