from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.errors import ExportError
from llmcompress.export.gguf_blocks import block_type, blocks_value, to_blocks
from llmcompress.quant.codecs.int_group import decode, encode
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec


def packed(shape: tuple[int, ...], spec: QuantSpec) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    grid = (*shape[:-1], spec.groups(shape[-1]))
    scale = (torch.rand(grid, generator=generator) * 0.1 + 1e-3).half()
    zero = None
    if not spec.symmetric:
        zero = torch.randint(0, spec.levels, grid, dtype=torch.uint8, generator=generator)
    return encode(codes, scale, zero, spec)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec(4, 32, True), (5, 96)),
        (QuantSpec(4, 64, True), (2, 5, 96)),  # the last group is half as long
        (QuantSpec(4, -1, True), (5, 96)),
        (QuantSpec(8, 32, True), (2, 3, 64)),
        (QuantSpec(4, 32, False), (5, 96)),
        (QuantSpec(4, 128, False), (2, 5, 256)),
    ],
    ids=str,
)
def test_blocks_decode_to_our_values_in_the_gguf_package(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    gguf = pytest.importorskip("gguf")
    weight = packed(shape, spec)
    blocks = to_blocks(weight)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[block_type(spec)])
    assert found.shape == shape
    assert torch.equal(torch.from_numpy(found), blocks_value(weight))
    difference = (torch.from_numpy(found) - decode(weight)).abs().max()
    assert difference == 0 if spec.symmetric else difference < 2e-3


def test_one_block_by_hand() -> None:
    spec = QuantSpec(4, 32, True)
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).unsqueeze(0)
    data = to_blocks(encode(codes, torch.tensor([[0.5]]), None, spec))
    assert data.dtype == np.uint8
    # fp16 0.5 is 0x3800; element i and element i+16 are both i, in the low and in the high nibble
    assert data[0].tolist() == [0x00, 0x38, *(i * 17 for i in range(16))]


@pytest.mark.parametrize("spec", [QuantSpec(3, 32, True), QuantSpec(4, 24, True), QuantSpec(3, 24, True)], ids=str)
def test_widths_and_groups_without_blocks_are_an_error(spec: QuantSpec) -> None:
    with pytest.raises(ExportError, match="with 96 columns has no exact GGML type"):
        to_blocks(packed((2, 96), spec))


def test_an_offset_beyond_fp16_is_an_error() -> None:
    spec = QuantSpec(4, 32)
    weight = encode(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[60000.0]]), torch.tensor([[15]]), spec)
    with pytest.raises(ExportError, match="exceeds fp16"):
        to_blocks(weight)
