"""What scripts/acceptance/expert_artifacts.py says of artifacts of every layout, whole and with experts left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.models.handle import ModelHandle
from llmcompress.quant.bitpack import pack
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "acceptance" / "expert_artifacts.py"
GROUP = 16


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("expert_artifacts", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def gptq(w: Tensor) -> dict[str, Tensor]:
    """A weight ``[N, K]`` as GPTQModel stores it: codes along K in columns, zero points less one."""
    codes, scale, zero = round_to_nearest(w[None].float(), QuantSpec(4, GROUP), "minmax")
    assert zero is not None
    # the layout has no code for a zero point of 0
    zero = zero.clamp(min=1)
    stored = pack((zero[0].t().contiguous() - 1).to(torch.uint8), 4)
    return {"qweight": pack(codes[0], 4).t().contiguous(), "qzeros": stored, "scales": scale[0].t().contiguous()}


def symmetric(w: Tensor) -> dict[str, Tensor]:
    """A weight as compressed-tensors stores it."""
    spec = QuantSpec(4, GROUP, symmetric=True)
    return dict(int_group.encode(*round_to_nearest(w[None].float(), spec, "minmax"), spec).tensors)


def projections(folder: Path) -> dict[str, Tensor]:
    """Name → weight of every expert projection, as tools that unstack experts name them."""
    handle, found = ModelHandle.open(str(folder)), {}
    for index, block in enumerate(handle.layout.blocks):
        assert block.bank is not None
        both, down = (handle.checkpoint.tensor(name) for name in (block.bank.gate_up, block.bank.down))
        for expert in range(block.bank.num_experts):
            parts = [*both[expert].chunk(2), down[expert]]
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), parts):
                found[f"model.layers.{index}.mlp.experts.{expert}.{name}"] = weight
    return found


@pytest.mark.parametrize("layout", [gptq, symmetric])
def test_experts_are_counted_and_compared(layout, script: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    weights = projections(tiny_folder)
    stored = {
        f"{name}.{key}": (t[0] if t.dim() == 3 else t).contiguous()
        for name, weight in weights.items()
        for key, t in layout(weight).items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    whole = script.survey(tmp_path, tiny_folder, 4, GROUP)
    assert (whole["quantized"], whole["dense"], whole["missing"], whole["unsound"]) == (len(weights), 0, 0, 0)
    assert 0 < whole["error"] < 0.2

    dense, missing, endless, other = list(weights)[:4]
    keys = list(layout(weights[dense]))
    for name in (dense, missing):
        for key in keys:
            del stored[f"{name}.{key}"]
    stored[f"{dense}.weight"] = weights[dense].clone()
    scales = next(key for key in keys if "scale" in key)
    stored[f"{endless}.{scales}"] = torch.full_like(stored[f"{endless}.{scales}"], float("nan"))
    # an expert that is compared: its scales with the wrong sign
    last = list(weights)[-1]
    assert other != last
    stored[f"{last}.{scales}"] = -stored[f"{last}.{scales}"]
    save_file(stored, tmp_path / "model.safetensors")
    found = script.survey(tmp_path, tiny_folder, 4, GROUP)
    assert (found["dense"], found["missing"], found["unsound"]) == (1, 1, 2)
    assert found["quantized"] == len(weights) - 2


def test_stacked_experts_left_dense_are_found(script: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    handle = ModelHandle.open(str(tiny_folder))
    banks = [block.bank for block in handle.layout.blocks if block.bank is not None]
    names = [name for bank in banks for name in (bank.gate_up, bank.down)]
    save_file({name: handle.checkpoint.tensor(name).contiguous() for name in names}, tmp_path / "model.safetensors")
    found = script.survey(tmp_path, tiny_folder, 4, GROUP)
    assert (found["quantized"], found["dense"]) == (0, found["expected"])
