"""Keys and values of layers whose tokens see a window: of every sequence the last positions, and no more.

The rows of a sequence are positions in a row from :attr:`Windows.begins` on. When they are full, those that can still
be seen move to the front. That costs little: a window moves once in as many tokens as there are rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress_kernels.decode_structs import CacheStruct
from llmcompress_kernels.matrix import KINDS
from llmcompress_kernels.reference.group_gemm import LANES

# tokens of a prompt that are computed at once, as many as share a reading of the weights (prompt_room.h)
PIECE = 512


def _blocks(tokens: int) -> int:
    return -(-tokens // LANES)


class Windows:
    """Keys ``[L, slots, heads, P / 16, Dp, 16]`` and values ``[L, slots, heads, P, Vp]`` of L layers with windows.

    Args:
        lead: L, slots, heads.
        dims: D and V, columns of a key and of a value.
        window: The widest of the layers.
        positions: Tokens that a sequence may reach, a multiple of 16.
        whole: Keep room for all of them, for models whose prompts are computed at once whatever their length.
        dtype: ``torch.float32`` or ``torch.bfloat16``.

    Attributes:
        positions: P, rows of a sequence.
        most: Tokens of one sequence that may be computed in one call; None for any number.
        begins: int64 ``[slots]``, position of the first row of each sequence, a multiple of 16.
    """

    def __init__(
        self,
        lead: tuple[int, int, int],
        dims: tuple[int, int],
        window: int,
        positions: int,
        whole: bool,
        dtype: torch.dtype,
    ) -> None:
        least = LANES * (_blocks(window + PIECE) + 1)
        self.window, (self.key_dim, self.value_dim) = window, dims
        self.positions = positions if whole else min(positions, least)
        self.most = None if self.positions == positions else PIECE
        self.keys, self.values = make_rows(lead, self.positions, dims, dtype)
        self.begins = torch.zeros(lead[1], dtype=torch.int64)
        self.struct = CacheStruct(
            self.keys.data_ptr(), self.values.data_ptr(), KINDS[dtype], lead[1], self.positions,
            begins=self.begins.data_ptr(),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def holds(self, slot: int, count: int) -> bool:
        """Whether all is there that a token after the first ``count`` of a sequence sees."""
        begin = int(self.begins[slot])
        return begin == 0 or count - self.window + 1 >= begin

    def advance(self, slot: int, start: int, count: int) -> None:
        """Make room for some tokens of a sequence, at most :attr:`most`.

        Args:
            slot: Which sequence.
            start: Position of the first; of earlier ones those stay that it sees.
            count: How many.

        Raises:
            ValueError: They are too many.
        """
        begin = int(self.begins[slot]) if start > 0 else 0
        # a length that was declared, not computed (speed.py), may lie before all rows
        first = LANES * (max(0, start - self.window + 1) // LANES)
        if begin <= first and start + count - begin <= self.positions:
            self.begins[slot] = begin
            return
        if start + count - first > self.positions:
            raise ValueError(f"{count} tokens at once do not fit {self.positions} rows with a window of {self.window}")
        if begin < first:
            self._move(slot, first - begin, start - begin)
        self.begins[slot] = first

    def settle(self, slot: int, start: int, end: int) -> int:
        """Decide on the first row of a sequence of ``end`` tokens, whose positions from ``start`` on are new.

        Returns:
            The position from which on rows have to be stored (:meth:`fill`).
        """
        begin = int(self.begins[slot]) if start > 0 else 0
        stays = end - begin <= self.positions
        self.begins[slot] = begin if stays else LANES * ((end - self.window + 1) // LANES)
        return start if stays else int(self.begins[slot])

    def _move(self, slot: int, first: int, end: int) -> None:
        """Bring rows ``[first, end)`` of a sequence to the front; ``first`` is a multiple of 16."""
        end = min(end, self.positions)
        if first >= end:
            return
        low, high = first // LANES, _blocks(end)
        self.keys[:, slot, :, : high - low] = self.keys[:, slot, :, low:high].clone()
        self.values[:, slot, :, : end - first] = self.values[:, slot, :, first:end].clone()

    def fill(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """As :meth:`~llmcompress_kernels.decode_cache.Cache.fill`; rows before the first one are left out."""
        count = keys.shape[1]
        begin = int(self.begins[slot])
        left = max(0, begin - start)
        rows = slice(start + left - begin, start + count - begin)
        self.values[layer, slot, :, rows, : self.value_dim] = values[:, left:]
        put_columns(self.keys[layer, slot], rows.start, keys[:, left:], self.key_dim)

    def read(self, layer: int, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`~llmcompress_kernels.decode_cache.Cache.read`; what is there no more is zero."""
        begin = int(self.begins[slot])
        keys = get_columns(self.keys[layer, slot], count - begin, self.key_dim)
        values = self.values[layer, slot, :, : count - begin, : self.value_dim]
        pad = torch.nn.functional.pad
        return pad(keys, (0, 0, begin, 0)), pad(values, (0, 0, begin, 0))

    def copy(self, source: int, target: int, count: int, held: Windows) -> None:
        """Give a sequence the rows of another one's first ``count`` positions, here or where there is less room."""
        begin = int(held.begins[source])
        rows = max(0, min(count - begin, held.positions))
        blocks = _blocks(rows)
        self.keys[:, target, :, :blocks] = held.keys[:, source, :, :blocks]
        self.values[:, target, :, :rows] = held.values[:, source, :, :rows]
        self.begins[target] = begin


def make_rows(
    lead: tuple[int, ...], positions: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys ``[*lead, P / 16, Dp, 16]`` and values ``[*lead, P, Vp]`` of nothing yet.

    Args:
        lead: L, slots, heads.
        positions: P, a multiple of 16.
        dims: D and V.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """
    of_keys, of_values = (LANES * _blocks(size) for size in dims)
    keys = torch.zeros((*lead, positions // LANES, of_keys, LANES), dtype=dtype)
    return keys, torch.zeros((*lead, positions, of_values), dtype=dtype)


def get_columns(keys: Tensor, count: int, head_dim: int) -> Tensor:
    """Keys ``[heads, count, D]`` of the first rows of what :func:`put_columns` stored ``[heads, P / 16, Dp, 16]``."""
    return keys.transpose(-1, -2)[:, : _blocks(count)].flatten(1, 2)[:, :count, :head_dim]


def put_columns(keys: Tensor, start: int, rows: Tensor, head_dim: int) -> None:
    """Store keys in blocks of sixteen positions.

    Args:
        keys: ``[heads, P / 16, Dp, 16]``, changed.
        start: Row of the first position.
        rows: ``[heads, tokens, D]``.
        head_dim: D.
    """
    count = rows.shape[1]
    # [heads, P, D] seen through the blocked order
    seen = keys.transpose(-1, -2)
    first, last = start // LANES, _blocks(start + count)
    # a copy: a single block would be flattened in place
    patch = seen[:, first:last].flatten(1, 2).clone()
    patch[:, start - first * LANES : start - first * LANES + count, :head_dim] = rows.to(patch.dtype)
    seen[:, first:last] = patch.unflatten(1, (last - first, LANES))
