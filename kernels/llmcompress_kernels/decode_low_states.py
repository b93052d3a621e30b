"""Low-bit states of the decode step's delta rules: what is kept of sequences. The kernels are the state family's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu_state, pages
from llmcompress_kernels.decode_delta import Delta
from llmcompress_kernels.decode_structs import BoundLowStatesStruct


class HeldStruct(ctypes.Structure):
    """``Held`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "channel", "scale", "fixed", "recent", "count")),
        *(
            (name, ctypes.c_int64)
            for name in ("slots", "heads", "groups", "channels", "states", "bits", "window", "refit", "dither")
        ),
    )


class LowStates:
    """States of several sequences, P columns of a value by N of a key for each of H heads.

    Args:
        rules: Rules of the L layers that have one, with a codec.
        slots: S, sequences.

    Attributes:
        codes: uint8 ``[L, S, H, P, N bits / 8]``.
        channel: fp16 ``[L, S, H, P]``, None where it is calibrated.
        scale: fp16 ``[L, S, H, N]``.
        recent: float32 ``[L, S, R - 1, H P + H + G N]``, the tokens since each state was rounded, as
            ``dsq_delta_update`` keeps them; None where every token rounds.
        count: int32 ``[S]``, how many rows of it are filled, the same in all layers; None likewise.
        bound: For the cache's struct.
    """

    def __init__(self, rules: Sequence[Delta], slots: int) -> None:
        sizes, codec = rules[0].sizes, rules[0].codec
        assert codec is not None
        lead, heads = (len(rules), slots), sizes.heads
        self.codes = pages.zeros((*lead, heads, sizes.value_dim, sizes.key_dim * codec.bits // 8), torch.uint8)
        self.scale = torch.zeros((*lead, heads, sizes.key_dim), dtype=torch.float16)
        given = [rule.fixed for rule in rules if rule.fixed is not None]
        self._fixed = torch.stack(given) if given else None
        self.channel = None if given else torch.zeros((*lead, heads, sizes.value_dim), dtype=torch.float16)
        self.recent = self.count = None
        if codec.window > 1:
            row = heads * (sizes.value_dim + 1) + sizes.key_heads * sizes.key_dim
            self.recent = torch.zeros(*lead, codec.window - 1, row)
            self.count = torch.zeros(slots, dtype=torch.int32)
        pointers = (self.codes, self.channel, self.scale, self._fixed, self.recent, self.count)
        numbers = (slots, heads, sizes.key_heads, sizes.value_dim, sizes.key_dim, codec.bits, codec.window)
        self._struct = HeldStruct(
            *(None if t is None else t.data_ptr() for t in pointers), *numbers, int(codec.refit), int(codec.dither)
        )
        run = build.load(cpu_state.FAMILY).llmc_delta_rules
        run.restype = ctypes.c_void_p
        self.bound = BoundLowStatesStruct(run(), ctypes.addressof(self._struct))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return (self.codes, self.channel, self.scale, self.recent)

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences."""
        return sum(t.nbytes for t in (*self._parts(), self.count) if t is not None)

    def copy(self, source: int, target: int, other: LowStates) -> None:
        """Give a sequence the states of another one, of these or of others of the same rules."""
        for mine, theirs in zip(self._parts(), other._parts()):
            if mine is not None and theirs is not None:
                mine[:, target] = theirs[:, source]
        if self.count is not None and other.count is not None:
            self.count[target] = other.count[source]

    def fill(self, layer: int, slot: int, codes: Tensor, channel: Tensor | None, scale: Tensor) -> None:
        """Store what another implementation has rounded at the end of a prompt, ``[H, P, N bits / 8]`` and so on."""
        self.codes[layer, slot], self.scale[layer, slot] = codes, scale
        if self.channel is not None and channel is not None:
            self.channel[layer, slot] = channel
        if self.count is not None:
            self.count[slot] = 0
