"""What the decode step keeps of its sequences: keys and values, or the latents that both are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress_kernels.decode_structs import CacheStruct
from llmcompress_kernels.matrix import KINDS
from llmcompress_kernels.reference.group_gemm import LANES

if TYPE_CHECKING:
    from llmcompress_kernels.decode import Decoder


class Cache:
    """Keys and values of several sequences, float32 or bfloat16, in the step's own order.

    Keys are ``[L, slots, heads, P / 16, Dp, 16]`` and values ``[L, slots, heads, P, Dp]``, both after rotation, for the
    L layers with attention.

    Args:
        decoder: Whose sizes to use.
        slots: Sequences.
        positions: Tokens per sequence; rounded up to a multiple of 16.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, decoder: Decoder, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> None:
        self.positions = -(-positions // LANES) * LANES
        lead = (sum(not layer.mixes for layer in decoder.layers), slots, decoder.key_value_heads)
        self._make(decoder, lead, dtype)
        self._struct = CacheStruct(self.keys.data_ptr(), self.values.data_ptr(), KINDS[dtype], slots, self.positions)

    def _make(self, decoder: Decoder, lead: tuple[int, ...], dtype: torch.dtype) -> None:
        self.head_dim = decoder.head_dim
        padded = -(-decoder.head_dim // LANES) * LANES
        self.keys = torch.zeros((*lead, self.positions // LANES, padded, LANES), dtype=dtype)
        self.values = torch.zeros((*lead, self.positions, padded), dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def fill(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store what another implementation computed.

        Args:
            layer: Which of the layers with attention.
            slot: Which sequence.
            start: Position of the first token.
            keys: ``[heads, tokens, D]``, rotated.
            values: ``[heads, tokens, D]``.
        """
        count = keys.shape[1]
        self.values[layer, slot, :, start : start + count, : self.head_dim] = values
        # [heads, P, D] seen through the blocked order
        seen = self.keys[layer, slot].transpose(-1, -2)
        first, last = start // LANES, -(-(start + count) // LANES)
        # a copy: a single block would be flattened in place
        patch = seen[:, first:last].flatten(1, 2).clone()
        patch[:, start - first * LANES : start - first * LANES + count, : self.head_dim] = keys.to(patch.dtype)
        seen[:, first:last] = patch.unflatten(1, (last - first, LANES))

    def read(self, layer: int, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's first ``count`` positions, each ``[heads, count, D]``; see :meth:`fill`."""
        keys = self.keys[layer, slot].transpose(-1, -2)[:, : -(-count // LANES)].flatten(1, 2)
        return keys[:, :count, : self.head_dim], self.values[layer, slot, :, :count, : self.head_dim]

    def copy(self, source: int, target: int, count: int, other: Cache | None = None) -> None:
        """Give a sequence the first ``count`` positions of another one, in this cache or in a smaller one."""
        held, blocks = other or self, -(-count // LANES)
        self.keys[:, target, :, :blocks] = held.keys[:, source, :, :blocks]
        self.values[:, target, :, :count] = held.values[:, source, :, :count]


class LatentCache(Cache):
    """Latents of several sequences with the turned part of their keys, one row a token: ``[L, slots, 1, P, Dp]``.

    Dp is C + R rounded up to 16; the first C columns are latents after their norm, the next R a key after rotation.
    Arguments and attributes are those of :class:`Cache`; ``values`` is the latents' part of ``keys``.

    Args:
        decoder: One with latents.
        slots: Sequences.
        positions: Tokens per sequence; rounded up to a multiple of 16.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    def _make(self, decoder: Decoder, lead: tuple[int, ...], dtype: torch.dtype) -> None:
        assert decoder.latents is not None
        self.size, self.width = decoder.latents.size, decoder.latents.width
        self.keys = torch.zeros((*lead, self.positions, -(-self.width // LANES) * LANES), dtype=dtype)
        self.values = self.keys[..., : self.size]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes

    def fill(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store what another implementation computed.

        Args:
            layer: Which layer.
            slot: Which sequence.
            start: Position of the first token.
            keys: Latents ``[1, tokens, C]``.
            values: Turned parts of keys ``[1, tokens, R]``, pairs half of R apart.
        """
        rows = self.keys[layer, slot, :, start : start + keys.shape[1]]
        rows[..., : self.size], rows[..., self.size : self.width] = keys, values

    def read(self, layer: int, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Latents and turned parts of a sequence's first ``count`` positions; see :meth:`fill`."""
        rows = self.keys[layer, slot, :, :count]
        return rows[..., : self.size], rows[..., self.size : self.width]

    def copy(self, source: int, target: int, count: int, other: Cache | None = None) -> None:
        """Give a sequence the first ``count`` positions of another one, in this cache or in a smaller one."""
        self.keys[:, target, :, :count] = (other or self).keys[:, source, :, :count]


def cache_for(decoder: Decoder, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> Cache:
    """The cache that a decoder's steps take; arguments as of :class:`Cache`."""
    return (Cache if decoder.latents is None else LatentCache)(decoder, slots, positions, dtype)
