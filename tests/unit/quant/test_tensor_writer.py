from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from llmcompress.quant.tensor_writer import write_tensors


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    real = torch.randn(7, 5, generator=g)
    return {
        "b.weight": real.to(torch.bfloat16), "a.weight": real, "c.scale": real.half(), "d.codes": real.to(torch.int32),
        "e.zero": real.abs().to(torch.uint8), "ü.name": real.to(torch.int64), "f": real.double(), "g": real > 0,
        "h.scalar": torch.tensor(3.0), "i.empty": torch.empty(0, 4), "j": real.to(torch.int8),
        "k": real.to(torch.int16), "l": real.to(torch.float8_e4m3fn),
    }  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"packed": '{"x": [1, "ü"]}'}])
def test_bytes_are_those_of_the_library(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:
        write_tensors(handle, some_tensors(), metadata)
    assert path.read_bytes() == save(some_tensors(), metadata=metadata)


def test_a_slice_is_written_as_its_values(tmp_path: Path) -> None:
    whole = torch.arange(24).view(4, 6)
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:
        write_tensors(handle, {"x": whole[:, 1:3]})
    assert path.read_bytes() == save({"x": whole[:, 1:3].contiguous()})


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as handle, pytest.raises(KeyError):
        write_tensors(handle, {"x": torch.zeros(2, dtype=torch.complex64)})
