from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.quant.bitpack import pack, unpack
from llmcompress.quant.spec import packed_words


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """One big integer, cut into words: the definition of the stream."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(packed_words(len(codes), bits))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@settings(max_examples=60)
@given(bits=st.integers(1, 8), count=st.integers(1, 140), rows=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_matches_the_definition_and_round_trips(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 60, 65, 576])
def test_bytes_equal_compressed_tensors(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))


def test_leading_dimensions_slabs_and_layout() -> None:
    codes = torch.randint(0, 8, (2, 3, 4, 45), dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.shape == (2, 3, 4, packed_words(45, 3))
    assert torch.equal(packed[1, 2, 3], pack(codes[1, 2, 3], 3))
    assert torch.equal(unpack(packed, 3, 45), codes)
    turned = torch.randint(0, 16, (45, 7), dtype=torch.uint8).T
    assert torch.equal(unpack(pack(turned, 4), 4, 45), turned)


def test_slabs_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 4, (50, 33), dtype=torch.uint8)
    whole = pack(codes, 2)
    monkeypatch.setattr("llmcompress.quant.bitpack.SLAB_CODES", 100)
    assert torch.equal(pack(codes, 2), whole)
    assert torch.equal(unpack(whole, 2, 33), codes)


def test_meta_tensors_give_shapes() -> None:
    codes = torch.empty((4, 45), dtype=torch.uint8, device="meta")
    packed = pack(codes, 3)
    assert packed.shape == (4, 5)
    assert packed.device.type == "meta"
    assert unpack(packed, 3, 45).shape == (4, 45)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="words per row"):
        unpack(torch.zeros((2, 3), dtype=torch.int32), 4, 100)
