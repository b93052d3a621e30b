"""Definition of ``pack`` and ``unpack``: unsigned codes as a little-endian, LSB-first bit stream."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
# eight codes of b bits fill exactly b bytes
UNIT = 8


def words(count: int, bits: int) -> int:
    """Number of int32 words for ``count`` codes."""
    return -(-count * bits // WORD_BITS)


def _lanes(bits: int) -> tuple[int, int]:
    """Smallest run of codes that fills whole bytes: (codes, bytes)."""
    codes = {1: 8, 2: 4, 4: 2, 8: 1}.get(bits, UNIT)
    return codes, codes * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``[..., K]`` uint8 into ``[..., words(K, bits)]`` int32; bits above ``bits`` are dropped.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``codes`` is not uint8.
    """
    if not 1 <= bits <= 8 or codes.dtype != torch.uint8:
        raise ValueError(f"pack needs uint8 codes of 1 to 8 bits, not {codes.dtype} of {bits}")
    count, lead = codes.shape[-1], codes.shape[:-1]
    lane, size = _lanes(bits)
    runs = -(-count // lane)
    padded = torch.nn.functional.pad(codes, (0, runs * lane - count)).view(*lead, runs, lane)
    value = torch.zeros((*lead, runs), dtype=torch.int64, device=codes.device)
    for position in range(lane):
        value |= (padded[..., position].to(torch.int64) & ((1 << bits) - 1)) << (bits * position)
    octets = torch.stack([(value >> (8 * byte)).to(torch.uint8) for byte in range(size)], dim=-1)
    stream = octets.reshape(*lead, runs * size)
    width = 4 * words(count, bits)
    stream = torch.nn.functional.pad(stream, (0, max(0, width - stream.shape[-1])))[..., :width]
    return stream.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack`: ``[..., words(count, bits)]`` int32 to ``[..., count]`` uint8.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or the width does not fit ``count``.
    """
    if not 1 <= bits <= 8 or packed.shape[-1] != words(count, bits):
        raise ValueError(f"{count} codes of {bits} bits do not fill {packed.shape[-1]} words")
    lead = packed.shape[:-1]
    lane, size = _lanes(bits)
    runs = -(-count // lane)
    octets = packed.contiguous().view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, max(0, runs * size - octets.shape[-1])))[..., : runs * size]
    octets = octets.reshape(*lead, runs, size)
    codes = torch.empty((*lead, runs, lane), dtype=torch.uint8, device=packed.device)
    for position in range(lane):
        # a code lies in one byte or crosses into the next; all arithmetic stays in uint8
        byte, shift = divmod(position * bits, 8)
        value = octets[..., byte] >> shift
        if shift + bits > 8:
            value |= octets[..., byte + 1] << (8 - shift)
        codes[..., position] = value & ((1 << bits) - 1)
    return codes.reshape(*lead, runs * lane)[..., :count].contiguous()
