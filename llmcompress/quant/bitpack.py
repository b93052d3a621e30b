"""Bit packing: unsigned codes of 1 to 8 bits as a little-endian, LSB-first stream of int32 words.

Code ``i`` of a row occupies bits ``i*bits … (i+1)*bits - 1`` of the row's stream; codes may cross
word borders and the last word is padded with zeros. For 2, 3, 4 and 8 bits the words are the
same as those of compressed-tensors' ``pack-quantized`` format.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
# eight codes of any supported width fill whole bytes and fit one int64
CODES_PER_UNIT = 8
# rows are handled in slabs so that the int64 intermediate stays near 32 MB
SLAB_CODES = 1 << 22


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold ``count`` codes."""
    return -(-count * bits // WORD_BITS)


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
    lanes = rows.reshape(-1, units, CODES_PER_UNIT)
    mask = (1 << bits) - 1
    value = (lanes[..., 0] & mask).to(torch.int64)
    for lane in range(1, CODES_PER_UNIT):
        value |= (lanes[..., lane] & mask).to(torch.int64) << (lane * bits)
    octets = value.contiguous().view(torch.uint8).reshape(-1, units, 8)
    return octets[..., :bits].reshape(-1, units * bits)


def _unpack_rows(rows: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``[R, B]`` bytes into ``[R, count]`` uint8."""
    units = -(-count // CODES_PER_UNIT)
    octets = torch.zeros((rows.shape[0], units, 8), dtype=torch.uint8, device=rows.device)
    wanted = units * bits
    if rows.shape[1] < wanted:
        rows = torch.nn.functional.pad(rows, (0, wanted - rows.shape[1]))
    octets[..., :bits] = rows[:, :wanted].reshape(-1, units, bits)
    value = octets.view(torch.int64).reshape(-1, units)
    codes = torch.empty((rows.shape[0], units, CODES_PER_UNIT), dtype=torch.uint8, device=rows.device)
    mask = (1 << bits) - 1
    for lane in range(CODES_PER_UNIT):
        codes[..., lane] = ((value >> (lane * bits)) & mask).to(torch.uint8)
    return codes.reshape(-1, units * CODES_PER_UNIT)[:, :count]
