"""The CPU kernels of residual trees against the definition, every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmcompress_kernels import cpu, tree
from llmcompress_kernels.reference.bitpack import pack
from llmcompress_kernels.reference.delta_decode import delta_decode

if (reason := tree.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if not tree.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    tree.set_isa(None)


def weights(widths: list[int], rows: int, columns: int, group: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draws = torch.Generator().manual_seed(rows + columns)
    packed, scale = [], []
    for bits in widths:
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=draws, dtype=torch.uint8)
        packed.append(pack(codes, bits))
        scale.append((torch.rand(rows, -(-columns // group), generator=draws) + 0.05).half())
    return packed, scale


@pytest.mark.parametrize(("rows", "columns", "group"), [(32, 192, 96), (40, 100, 128), (17, 320, 320), (48, 72, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_widths_and_ranges(isa: str, rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    widths = [4, 6, 3, 1, 2, 5, 1]
    spans = [(0, 75), (0, 20), (3, 10), (20, 75), (10, 12), (40, 71), (74, 74)]
    multiplier = [2.0**-i for i in range(len(widths))]
    packed, scale = weights(widths, rows, columns, group)
    x = torch.randn(75, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[5] = 0
    parts = tree.planes(packed, scale, widths, multiplier, group, columns)
    assert [part.bits for part in parts] == [4, 4, 2, 2, 1, 1, 2, 4, 1, 1]
    got = tree.product(x, parts, [spans[part.node] for part in parts], rows, group)
    assert got.dtype == dtype
    expected = delta_decode(x.double(), packed, scale, torch.tensor(spans), widths, multiplier, group)
    error = (got.double() - expected).norm() / expected.norm()
    assert float(error) < (2e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("rows", [64, 80])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(isa: str, rows: int) -> None:
    packed, scale = weights([4, 1], rows, 256, 128)
    parts = tree.planes(packed, scale, [4, 1], [1.0, 0.25], 128, 256)
    x = torch.randn(13, 256)
    whole = tree.product(x, parts, [(0, 13), (4, 9)], rows, 128, threads=2)
    assert torch.equal(whole[6:7], tree.product(x[6:7], parts, [(0, 1), (0, 1)], rows, 128, threads=1))
    assert torch.equal(whole[:3], tree.product(x[:3], parts, [(0, 3), (0, 0)], rows, 128, threads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_one_bit_nodes_keep_their_largest_and_smallest_numbers(isa: str, dtype: torch.dtype) -> None:
    """Numbers just below a power of two would round up to it, and four of those are one too many for a table's entries.

    Codes that take all positive numbers and leave out all negative ones, and the other way round, give the ends of the
    range. Rows are in blocks of four and one, tokens in pairs and one alone.
    """
    rows, columns, group = 80, 544, 256
    signs = torch.randint(0, 2, (3, columns), generator=torch.Generator().manual_seed(3)) * 2 - 1
    x = signs * torch.tensor(2.0).to(dtype).nextafter(torch.tensor(0.0).to(dtype))
    codes = (signs[0] > 0).to(torch.uint8).expand(rows, columns).clone()
    codes[1::2] = 1 - codes[1::2]
    steps = torch.full((rows, -(-columns // group)), 0.5).half()
    parts = tree.planes([pack(codes, 1)], [steps], [1], [1.0], group, columns)
    got = tree.product(x, parts, [(0, 3)], rows, group)
    expected = delta_decode(x.double(), [pack(codes, 1)], [steps], torch.tensor([(0, 3)]), [1], [1.0], group)
    assert float(expected[0].abs().max()) > 0.49 * columns
    places = 10 if dtype == torch.float16 else 20
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2.0**-places, atol=0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=columns * 2.0**-places)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_chunk_keep_the_lowest_digits_that_there_are(isa: str, bits: int, dtype: torch.dtype) -> None:
    """Codes as large and digits but the highest as small as can be: sums of 16 bits have little room to spare.

    Tokens are eight, four and one, which may add up in different ways.
    """
    rows, columns, group, tokens = 16, 512, 256, 13
    # as fixed-point numbers, of which the first of a chunk fixes the place: 2^13 and 128, 2^20 and 255 * 128
    x = torch.full((tokens, columns), 32640 * 2.0**-20 if dtype == torch.float32 else 2.0**-6, dtype=dtype)
    x[:, ::group] = 1.0
    stored, steps = [pack(torch.full((rows, columns), (1 << bits) - 1, dtype=torch.uint8), bits)], torch.ones(rows, 2)
    parts = tree.planes(stored, [steps.half()], [bits], [1.0], group, columns)
    got = tree.product(x, parts, [(0, tokens)], rows, group)
    expected = delta_decode(x.double(), stored, [steps.half()], torch.tensor([(0, tokens)]), [bits], [1.0], group)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2.0**-8, atol=0)


def test_what_is_no_number_spoils_its_own_row_only(isa: str) -> None:
    packed, scale = weights([2], 16, 64, 64)
    parts = tree.planes(packed, scale, [2], [1.0], 64, 64)
    x = torch.randn(3, 64)
    clean = tree.product(x, parts, [(0, 3)], 16, 64)
    x[1, 7] = float("inf")
    got = tree.product(x, parts, [(0, 3)], 16, 64)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("columns", "group"), [(100, 128), (72, 16), (320, 320), (96, 96)])
def test_the_order_of_words_is_as_described(bits: int, columns: int, group: int) -> None:
    """Column 4j + i of a unit's word is its bits 8i + width j, for the low plane and the high one."""
    draws = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (20, columns), generator=draws, dtype=torch.uint8)
    scale = torch.rand(20, -(-columns // group), generator=draws).half()
    parts = tree.planes([pack(codes, bits)], [scale], [bits], [1.0], group, columns)
    assert torch.equal(tree.codes_of(parts, 20, group, columns), codes)
    low, width = parts[0], parts[0].bits
    words = low.words.transpose(1, 2).flatten(0, 1)
    for row, column in ((0, 0), (3, 5), (17, min(group, columns) - 1), (19, columns - 1)):
        unit = column // group * (-(-group // 32)) + column % group // 32
        place = column % group % 32
        word = int(words[row, unit * width + place // (32 // width)]) & 0xFFFFFFFF
        within = place % (32 // width)
        assert word >> (8 * (within % 4) + width * (within // 4)) & ((1 << width) - 1) == int(codes[row, column]) & (
            (1 << width) - 1
        )
