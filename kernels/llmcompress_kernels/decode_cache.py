"""What the decode step keeps of its sequences: keys and values, the latents that both are made of, last inputs."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress_kernels.decode_delta import zero_states
from llmcompress_kernels.decode_layer import Heads
from llmcompress_kernels.decode_low_states import LowStates
from llmcompress_kernels.decode_structs import CacheStruct
from llmcompress_kernels.decode_windows import Windows, get_columns, make_rows, put_columns
from llmcompress_kernels.matrix import KINDS
from llmcompress_kernels.reference.group_gemm import LANES

if TYPE_CHECKING:
    from llmcompress_kernels.decode import Decoder

# of layers that are not there
_NONE = Heads(0, 0, 0, 0)


class Cache:
    """Keys and values of several sequences, float32 or bfloat16, in the step's own order.

    Keys are ``[L, slots, heads, P / 16, Dp, 16]`` and values ``[L, slots, heads, P, Vp]``, both after rotation, for the
    L layers that attend to all positions; ``near`` has those of layers with windows, None without such layers.
    ``inputs`` float32 ``[layers, slots, taps - 1, H]`` are the last ones of convolutions, the newest last, C instead of
    H before a delta rule; ``states`` float32 ``[layers, slots, heads, V / 16, K, 16]`` are those of delta rules. A
    sequence has those of the length at which it stands. Where delta rules have a codec ``low`` keeps these, and
    ``states`` has one slot, for the sequence whose prompt is being read.

    Args:
        decoder: Decoder whose sizes to use.
        slots: Sequences.
        positions: Tokens per sequence; rounded up to a multiple of 16.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, decoder: Decoder, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> None:
        self.positions = -(-positions // LANES) * LANES
        attending = [layer for layer in decoder.layers if layer.attends]
        seen = [layer.window > 0 for layer in attending]
        # which of the two has a layer, and as the how manyth
        self._places = [(near, seen[:index].count(near)) for index, near in enumerate(seen)]
        far, near = (
            next((x.heads for x in attending if x.heads and (x.window > 0) == n), _NONE) for n in (False, True)
        )
        self._make(decoder, (seen.count(False), slots, far.shared), (far.key_dim, far.value_dim), dtype)
        taps = [layer.conv_weight for layer in decoder.layers if layer.conv_weight is not None]
        channels = taps[0].shape[1] if taps else 0
        self.inputs = torch.zeros(len(taps), slots, max(0, decoder.taps - 1), channels)
        rules = [layer.delta for layer in decoder.layers if layer.delta is not None]
        low = bool(rules) and rules[0].codec is not None
        self.low = LowStates(rules, slots) if low else None
        self.states = zero_states(rules[0].sizes if rules else None, len(rules), 1 if low else slots)
        self.near: Windows | None = None
        if any(seen):
            # policies that skip experts count over whole prompts
            whole = any(layer.router is not None for layer in decoder.layers)
            sizes = (near.key_dim, near.value_dim), max(layer.window for layer in attending), self.positions
            self.near = Windows((seen.count(True), slots, near.shared), *sizes, whole, dtype)
        self._struct = CacheStruct(
            self.keys.data_ptr(), self.values.data_ptr(), KINDS[dtype], slots, self.positions,
            windows=None if self.near is None else ctypes.addressof(self.near.struct), inputs=self.inputs.data_ptr(),
            states=self.states.data_ptr(), low=None if self.low is None else ctypes.addressof(self.low.bound),
        )  # fmt: skip

    def _make(self, decoder: Decoder, lead: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype) -> None:
        self.key_dim, self.value_dim = dims
        self.keys, self.values = make_rows(lead, self.positions, dims, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        near = 0 if self.near is None else self.near.nbytes
        return self.keys.nbytes + self.values.nbytes + self.fixed_bytes + self.reading_bytes + near

    @property
    def fixed_bytes(self) -> int:
        """Bytes of what does not grow with the sequences: last inputs of convolutions, states."""
        return self.inputs.nbytes + (self.states.nbytes if self.low is None else self.low.nbytes)

    @property
    def reading_bytes(self) -> int:
        """Bytes of the float states of the one prompt that is being read, where states are kept in low bits."""
        return 0 if self.low is None else self.states.nbytes

    def reading(self, slot: int) -> Tensor:
        """States of delta rules of a sequence whose prompt goes on, float32 ``[layers, heads, V / 16, K, 16]``."""
        return self.states[:, 0 if self.low is not None else slot]

    def held_bytes(self, tokens: int) -> int:
        """Bytes of a sequence's positions in use, of the last inputs of its convolutions and of its states."""
        near = 0 if self.near is None else self.near.nbytes
        slots, fixed = self.keys.shape[1], self.fixed_bytes
        growing = self.nbytes - near - fixed - self.reading_bytes
        found = growing // (slots * self.positions) * tokens + fixed // slots
        if self.near is not None:
            found += near // (slots * self.near.positions) * min(tokens, self.near.positions)
        return found

    @property
    def most(self) -> int | None:
        """Tokens of one sequence that may be computed in one call; None for any number."""
        return None if self.near is None else self.near.most

    def holds(self, slot: int, count: int) -> bool:
        """Whether all is there that a token after the first ``count`` of a sequence sees; windows forget."""
        return self.near is None or self.near.holds(slot, count)

    def advance(self, slot: int, start: int, count: int) -> None:
        """As :meth:`~llmcompress_kernels.decode_windows.Windows.advance`; without windows there is room."""
        if self.near is not None:
            self.near.advance(slot, start, count)

    def sees_window(self, layer: int) -> bool:
        """Whether tokens of a layer, counted among those with attention, see a window."""
        return self._places[layer][0]

    def fill(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store what another implementation computed.

        Args:
            layer: Which of the layers with attention.
            slot: Which sequence.
            start: Position of the first token.
            keys: ``[heads, tokens, D]``, rotated.
            values: ``[heads, tokens, V]``.
        """
        near, place = self._places[layer]
        if near and self.near is not None:
            self.near.fill(place, slot, start, keys, values)
            return
        self.values[place, slot, :, start : start + keys.shape[1], : self.value_dim] = values
        put_columns(self.keys[place, slot], start, keys, self.key_dim)

    def read(self, layer: int, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's first ``count`` positions, ``[heads, count, D]`` and V; see :meth:`fill`."""
        near, place = self._places[layer]
        if near and self.near is not None:
            return self.near.read(place, slot, count)
        keys = get_columns(self.keys[place, slot], count, self.key_dim)
        return keys, self.values[place, slot, :, :count, : self.value_dim]

    def part(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of a sequence's first ``count`` positions, a multiple of 16, in the cache's own order."""
        return self.keys[:, slot, :, : count // LANES].clone(), self.values[:, slot, :, :count].clone()

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Give a sequence the first positions of :meth:`part`, of this cache or of another one of the same decoder."""
        self.keys[:, slot, :, : keys.shape[2]] = keys
        self.values[:, slot, :, : values.shape[2]] = values

    def copy(self, source: int, target: int, count: int, other: Cache | None = None) -> None:
        """Give a sequence the first ``count`` positions of another one, in this cache or in a smaller one."""
        held, blocks = other or self, -(-count // LANES)
        self.keys[:, target, :, :blocks] = held.keys[:, source, :, :blocks]
        self.values[:, target, :, :count] = held.values[:, source, :, :count]
        self.inputs[:, target] = held.inputs[:, source]
        self.reading(target).copy_(held.reading(source))
        if self.low is not None and held.low is not None:
            self.low.copy(source, target, held.low)
        if self.near is not None and held.near is not None:
            self.near.copy(source, target, count, held.near)


class LatentCache(Cache):
    """Latents of several sequences with the turned part of their keys, one row a token: ``[L, slots, 1, P, Dp]``.

    Dp is C + R rounded up to 16; the first C columns are latents after their norm, the next R a key after rotation.
    Arguments and attributes are those of :class:`Cache`; ``values`` is the latents' part of ``keys``. Other layers may
    have states (Kimi-Linear), in float only.

    Args:
        decoder: One with latents.
        slots: Sequences.
        positions: Tokens per sequence; rounded up to a multiple of 16.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    def _make(self, decoder: Decoder, lead: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype) -> None:
        assert decoder.latents is not None
        self.size, self.width = decoder.latents.size, decoder.latents.width
        self.keys = torch.zeros((*lead, self.positions, -(-self.width // LANES) * LANES), dtype=dtype)
        self.values = self.keys[..., : self.size]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.fixed_bytes

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

    def part(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of a sequence's first ``count`` rows; values are among them."""
        return self.keys[:, slot, :, :count].clone(), self.values[:, slot, :, :0].clone()

    def copy(self, source: int, target: int, count: int, other: Cache | None = None) -> None:
        """Give a sequence the first ``count`` positions of another one, in this cache or in a smaller one."""
        held = other or self
        self.keys[:, target, :, :count] = held.keys[:, source, :, :count]
        self.inputs[:, target] = held.inputs[:, source]
        self.states[:, target] = held.states[:, source]


def cache_for(decoder: Decoder, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> Cache:
    """The cache that a decoder's steps take; arguments as of :class:`Cache`."""
    return (Cache if decoder.latents is None else LatentCache)(decoder, slots, positions, dtype)
