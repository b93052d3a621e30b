"""Bit packing: unsigned codes of 1 to 8 bits as a little-endian, LSB-first stream of int32 words.

Code ``i`` of a row occupies bits ``i*bits … (i+1)*bits - 1`` of the row's stream; codes may cross
word borders and the last word is padded with zeros. For 2, 3, 4 and 8 bits the words are the
same as those of compressed-tensors' ``pack-quantized`` format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.quant.spec import packed_words

# eight codes of any supported width fill whole bytes and fit one int64
CODES_PER_UNIT = 8
# rows are handled in slabs whose intermediates stay in a core's second-level cache, and in the heap
SLAB_CODES = 1 << 18
# what is copied at once: the largest power of two that divides the bytes of a unit
_PARTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: ``[..., K]`` uint8, each below ``2**bits``; higher bits are ignored.
        bits: Code width, 1 to 8.

    Returns:
        ``[..., ceil(K*bits/32)]`` int32.

    Raises:
        ValueError: ``bits`` is out of range or ``codes`` is not uint8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    count = codes.shape[-1]
    words = packed_words(count, bits)
    if codes.device.type == "meta":
        return codes.new_empty((*codes.shape[:-1], words), dtype=torch.int32)
    rows = codes.reshape(-1, count)
    out = torch.zeros((rows.shape[0], words * 4), dtype=torch.uint8, device=codes.device)
    slab = max(1, SLAB_CODES // max(count, 1))
    for start in range(0, rows.shape[0], slab):
        stream = _pack_rows(rows[start : start + slab], bits)
        width = min(stream.shape[1], out.shape[1])
        out[start : start + slab, :width] = stream[:, :width]
    return out.view(torch.int32).reshape(*codes.shape[:-1], words)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: ``[..., ceil(count*bits/32)]`` int32.
        bits: Code width, 1 to 8.
        count: Codes per row.

    Returns:
        ``[..., count]`` uint8.

    Raises:
        ValueError: ``bits`` is out of range or the row width does not fit ``count``.
    """
    _check_bits(bits)
    words = packed_words(count, bits)
    if packed.shape[-1] != words:
        raise ValueError(f"{count} codes of {bits} bits need {words} words per row, got {packed.shape[-1]}")
    if packed.device.type == "meta":
        return packed.new_empty((*packed.shape[:-1], count), dtype=torch.uint8)
    rows = packed.reshape(-1, words).contiguous().view(torch.uint8)
    out = torch.empty((rows.shape[0], count), dtype=torch.uint8, device=packed.device)
    slab = max(1, SLAB_CODES // max(count, 1))
    for start in range(0, rows.shape[0], slab):
        out[start : start + slab] = _unpack_rows(rows[start : start + slab], bits, count)
    return out.reshape(*packed.shape[:-1], count)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")


def _pack_rows(rows: Tensor, bits: int) -> Tensor:
    """Pack ``[R, K]`` uint8 into ``[R, ceil(K/8)*bits]`` bytes."""
    count = rows.shape[1]
    units = -(-count // CODES_PER_UNIT)
    if count != units * CODES_PER_UNIT:
        rows = torch.nn.functional.pad(rows, (0, units * CODES_PER_UNIT - count))
    if bits == 8:
        return rows
    # eight codes are eight bytes: one int64, in which neighbours move together; two bytes, four, eight at a time
    codes = rows.contiguous()
    value = (codes if codes.storage_offset() % 8 == 0 else codes.clone()).view(torch.int64)
    for even, odd, shift in _neighbours(bits):
        moved = value.bitwise_right_shift(shift).bitwise_and_(odd)
        value = value.bitwise_and(even).bitwise_or_(moved)
    part = _PARTS[bits & -bits]
    pieces = value.view(part).reshape(-1, units, 8 // part.itemsize)
    return pieces[..., : bits // part.itemsize].reshape(rows.shape[0], -1).contiguous().view(torch.uint8)


def _unpack_rows(rows: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``[R, B]`` bytes into ``[R, count]`` uint8."""
    units = -(-count // CODES_PER_UNIT)
    wanted = units * bits
    if rows.shape[1] < wanted:
        rows = torch.nn.functional.pad(rows, (0, wanted - rows.shape[1]))
    if bits == 8:
        return rows[:, :count]
    octets = torch.zeros((rows.shape[0], units, 8), dtype=torch.uint8, device=rows.device)
    octets[..., :bits] = rows[:, :wanted].reshape(-1, units, bits)
    value = octets.view(torch.int64)
    for even, odd, shift in reversed(_neighbours(bits)):
        moved = value.bitwise_and(odd).bitwise_left_shift_(shift)
        value = value.bitwise_and_(even).bitwise_or_(moved)
    return value.view(torch.uint8).reshape(rows.shape[0], -1)[:, :count]


def _neighbours(bits: int) -> list[tuple[int, int, int]]:
    """Masks of what stays and of what has moved next to it, and by how many bits it does, for one, two and four codes.

    Lanes of an int64 hold this many codes each, the lowest bits of the lane filled. An odd lane moves down until it
    touches the even one below; together they are a lane of the next round.
    """
    found = []
    for codes in (1, 2, 4):
        lane, filled = 8 * codes, bits * codes
        even = sum(((1 << filled) - 1) << at for at in range(0, 64, 2 * lane))
        found.append((even, even << filled, lane - filled))
    return found
