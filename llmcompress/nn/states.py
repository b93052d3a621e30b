"""Recurrent states kept in low bits: the packed state of one layer, and the cache layer that holds it.

transformers keeps one float tensor per state-space layer. Here its place is taken by a :class:`PackedState`
(codes and scales; with ``packed=False`` the same values in float, to check against). It answers to the few tensor
methods that transformers' cache layers call on a state (``zero_``, ``index_select``, ``to``, ``device``), so a cache
layer becomes a quantized one by changing its class, KV cache of hybrids included.

Legend: S sequences, H heads, P channels, N states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import state as kernels
from llmcompress_kernels.delta_state import dsq_delta_update
from torch import Tensor

from llmcompress.algorithms import decoupled_scales as scales
from llmcompress.algorithms.decoupled_scales import QuantizedState
from llmcompress.algorithms.gated_delta import difference, over_state
from llmcompress.algorithms.selective_scan import driven, read
from llmcompress.quant.states import DECODED_BITS, StateSpec, state_bytes, window_bytes

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from llmcompress.models.layout import ScanView


# N of the C++ and Triton kernels; other sizes are computed here
KERNEL_STATES = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class StateQuantizer:
    """How the states of one layer are stored.

    Attributes:
        spec: Codec and width.
        scan: Sizes of the state.
        layer: Index of the layer, for stochastic rounding.
        static: fp16 calibrated scale ``[H, P]`` or ``[H, N]``, or None.
        head_bits: int ``[H]`` widths per head, or None for the spec's.
        window: Tokens between two roundings; the tokens since the last one are kept and replayed.
    """

    spec: StateSpec
    scan: ScanView
    layer: int = 0
    static: Tensor | None = None
    head_bits: Tensor | None = None
    window: int = 1

    def noise(self, step: int) -> Tensor | None:
        """Noise for rounding the state after token ``step``, None when rounding to nearest."""
        if self.spec.rounding != "stochastic":
            return None
        shape = (self.scan.heads, self.scan.channels, self.scan.states)
        return scales.rounding_noise(shape, self.spec.seed, self.layer, step)

    def quantize(self, fresh: Tensor, step: int) -> QuantizedState:
        """Codes and scales of a fresh state ``[S, H, P, N]`` after token ``step``."""
        return scales.quantize(fresh, self.spec, self.static, self.noise(step), self.head_bits)

    def dequantize(self, stored: QuantizedState) -> Tensor:
        """fp32 ``[S, H, P, N]``."""
        return scales.dequantize(stored, self.spec, self.static, self.head_bits)

    def fake(self, fresh: Tensor, step: int) -> Tensor:
        """What a fresh state becomes by being stored after token ``step``."""
        if not self.spec.active:
            return fresh
        return self.dequantize(self.quantize(fresh, step))

    def due(self, tokens_since: int) -> bool:
        """Whether the state is rounded this many tokens after the last rounding."""
        return tokens_since % self.window == 0

    @property
    def replays(self) -> bool:
        """Whether there are tokens after which the state is not rounded."""
        return self.spec.active and self.window > 1

    @property
    def row(self) -> tuple[int, int, int]:
        """Values that a window keeps of a token: ``dt x``; decay, for Mamba-1 (whose decay is larger) dt; B.

        Of a delta rule they are its change, its decays and its key.
        """
        scan = self.scan
        inner = scan.heads * scan.channels
        return inner, scan.rates, scan.groups * scan.states

    @property
    def has_kernel(self) -> bool:
        """Whether ``llmcompress_kernels.state`` implements this codec at this size."""
        fits = (
            self.scan.kind not in ("mamba1", "kda")
            and self.scan.states in KERNEL_STATES
            and self.scan.channels % 16 == 0
        )
        return fits and self.spec.has_kernel

    @property
    def one_width(self) -> bool:
        """Whether all heads have one width that the decoding kernels know."""
        return self.head_bits is None and self.spec.bits in DECODED_BITS

    def widths(self) -> list[tuple[int, Tensor | None]]:
        """Code widths in use and the heads that use each; None for all heads."""
        if self.head_bits is None:
            return [(self.spec.bits, None)]
        return [(int(bits), (self.head_bits == bits).nonzero()[:, 0]) for bits in self.head_bits.unique().tolist()]

    @property
    def nbytes(self) -> int:
        """Bytes that one sequence keeps: codes, scales, the tokens of the window and their number."""
        scan = self.scan
        bits = [self.spec.bits] * scan.heads if self.head_bits is None else [int(b) for b in self.head_bits.tolist()]
        stored = sum(state_bytes(self.spec, scan.channels, scan.states, width) for width in bits)
        return stored + window_bytes(self.spec, self.window, sum(self.row))


class PackedState:
    """The state of one layer between two tokens.

    With a replay window of R, sequences may stand at different places of theirs: each is rounded when it has taken R
    tokens since its last rounding.

    Args:
        quantizer: How it is stored.
        packed: Keep packed codes; otherwise keep the same values in fp32.

    Attributes:
        recent: fp32 ``[S, R - 1, W]``, a row ``dt x | decay or dt | B`` for each token since the last rounding (see
            :attr:`StateQuantizer.row`); None where every token rounds, or with values in fp32.
        count: int32 ``[S]``, tokens of each sequence since its last rounding; None where every token rounds.
        tokens: That the longest sequence has taken.
    """

    def __init__(self, quantizer: StateQuantizer, packed: bool = True) -> None:
        self.quantizer, self.packed = quantizer, packed
        self.codes: list[Tensor] = []
        self.channel: Tensor | None = None
        self.state: Tensor | None = None
        self.value: Tensor | None = None
        self.recent: Tensor | None = None
        self.count: Tensor | None = None
        self.tokens = 0

    def store(self, fresh: Tensor, tokens: int) -> None:
        """Round a fresh state of all sequences and keep it; their replay windows start anew.

        Args:
            fresh: fp32 ``[S, H, P, N]``.
            tokens: Tokens that made it since the last call.
        """
        self.tokens += tokens
        self._round(fresh)
        if not self.quantizer.replays:
            return
        self.count = torch.zeros(len(fresh), dtype=torch.int32, device=fresh.device)
        # a cache that was reset may go on with other sequences
        if self.packed and (self.recent is None or len(self.recent) != len(fresh)):
            self.recent = fresh.new_zeros(len(fresh), self.quantizer.window - 1, sum(self.quantizer.row))

    def _round(self, fresh: Tensor) -> None:
        step = self.tokens - 1
        if self.packed and self.quantizer.spec.active:
            self.codes, self.channel, self.state = self._pack(fresh, step)
        else:
            self.value = self.quantizer.fake(fresh, step)

    def _pack(self, fresh: Tensor, step: int) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        quantizer = self.quantizer
        if quantizer.has_kernel and quantizer.one_width:
            how = (quantizer.spec.bits, quantizer.spec.refit, quantizer.spec.dither)
            codes, channel, state = kernels.dsq_pack(fresh, quantizer.static, *how)
            return [codes], channel, state
        found = quantizer.quantize(fresh, step)
        parts = [
            scales.pack_codes(found.codes if heads is None else found.codes[:, heads], bits)
            for bits, heads in quantizer.widths()
        ]
        return parts, found.channel, found.state

    def load(self, a: Tensor | None = None) -> Tensor:
        """The state as the next token meets it, fp32 ``[S, H, P, N]``; never to be changed in place.

        Args:
            a: The layer's ``[H, 1, 1]`` or ``[H, P, N]``, needed to replay a window of Mamba-1.
        """
        value = self._stored()
        if self.recent is None:
            return value
        assert self.count is not None
        scan, filled = self.quantizer.scan, self.count
        for k in range(int(filled.max()) if len(filled) else 0):
            drive, rate, b = self.recent[:, k].split(self.quantizer.row, 1)
            drive, b = drive.view(-1, scan.heads, scan.channels), b.view(-1, scan.groups, scan.states)
            if scan.kind != "mamba1":
                decay = rate.view(-1, scan.heads, 1, scan.rates // scan.heads)
            else:
                assert a is not None, "a window of Mamba-1 is replayed with the layer's rates"
                decay = (rate.view(-1, scan.heads, scan.channels, 1) * a).exp()
            value = torch.where((filled > k)[:, None, None, None], driven(value, drive, decay, b), value)
        return value

    def decode(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Take one token in and read its output ``u C``, fp32 ``[S, H, P]``; arguments as in :meth:`step`."""
        quantizer = self.quantizer
        if not (self.packed and quantizer.has_kernel and quantizer.one_width):
            return read(self.step(x, dt, a, b), c.float())
        assert self.state is not None
        drive, decay = dt * x.float(), (dt[..., 0] * a[:, 0, 0]).exp()
        self.tokens += 1
        held = (self.codes[0], self.channel, self.state, quantizer.static)
        token = (drive, decay, b.float(), c.float())
        how = (quantizer.spec.bits, quantizer.spec.refit, quantizer.spec.dither)
        if self.recent is None or self.count is None:
            return kernels.dsq_state_update(*held, *token, *how)
        return kernels.dsq_replay_update(*held, self.recent, self.count, *token, *how)

    def step(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Take one token in; returns the fresh state ``[S, H, P, N]`` for reading.

        Args:
            x: ``[S, H, P]`` in the model's type.
            dt: fp32 ``[S, H, 1]`` or ``[S, H, P]``.
            a: fp32 ``[H, 1, 1]`` or ``[H, P, N]``.
            b: ``[S, G, N]`` in the model's type.
        """
        drive, decay, b = dt * x.float(), (dt.unsqueeze(-1) * a).exp(), b.float()
        fresh = driven(self.load(a), drive, decay, b)
        if self.recent is None:
            self.take(fresh)
        else:
            rate = decay if self.quantizer.scan.kind == "mamba2" else dt
            self.take(fresh, torch.cat((drive.flatten(1), rate.flatten(1), b.flatten(1)), 1))
        return fresh

    def decode_delta(self, value: Tensor, decay: Tensor, step: Tensor, key: Tensor, query: Tensor) -> Tensor:
        """Take one token of a gated delta rule in and read its output.

        Args:
            value: fp32 ``[S, H, P]``.
            decay: fp32 ``[S, H]`` or ``[S, H, N]``.
            step: fp32 ``[S, H]``.
            key: fp32 ``[S, G, N]`` of length one.
            query: fp32 ``[S, G, N]`` of length one, scaled.

        Returns:
            fp32 ``[S, H, P]``.
        """
        quantizer = self.quantizer
        if self.packed and quantizer.has_kernel and quantizer.one_width:
            assert self.state is not None
            self.tokens += 1
            held = (self.codes[0], self.channel, self.state, quantizer.static, self.recent, self.count)
            how = (quantizer.spec.bits, quantizer.spec.refit, quantizer.spec.dither)
            return dsq_delta_update(*held, value, decay, step, key, query, *how)
        state = self.load()
        change = difference(state, value, decay, step, key)
        fresh = driven(state, change, over_state(decay), key)
        row = None if self.recent is None else torch.cat((change.flatten(1), decay.flatten(1), key.flatten(1)), 1)
        self.take(fresh, row)
        return read(fresh, query)

    def take(self, fresh: Tensor, row: Tensor | None = None) -> None:
        """Keep the fresh state of one more token: sequences at the end of their windows are rounded.

        Args:
            fresh: fp32 ``[S, H, P, N]``.
            row: fp32 ``[S, W]``, the token as ``recent`` keeps it; not needed with values in fp32.
        """
        self.tokens += 1
        if self.count is None:
            self._round(fresh)
            return
        last = self.quantizer.window - 1
        due = self.count == last
        rows = due.nonzero()[:, 0]
        if self.packed and self.recent is not None and row is not None:
            # a due sequence has no place left, and nothing is written
            place = torch.arange(last, device=due.device) == self.count[:, None]
            self.recent = torch.where(place[..., None], row[:, None], self.recent)
            if len(rows):
                codes, channel, state = self._pack(fresh[rows], self.tokens - 1)
                self.codes = [old.index_copy(0, rows, new) for old, new in zip(self.codes, codes)]
                self.channel = _with_rows(self.channel, rows, channel)
                self.state = _with_rows(self.state, rows, state)
        else:
            rounded = self.quantizer.fake(fresh[rows], self.tokens - 1) if len(rows) else fresh[rows]
            self.value = fresh.index_copy(0, rows, rounded)
        self.count = torch.where(due, 0, self.count + 1)

    def _stored(self) -> Tensor:
        if self.value is not None:
            return self.value
        scan = self.quantizer.scan
        parts = [
            (heads, scales.unpack_codes(packed, bits, scan.states))
            for packed, (bits, heads) in zip(self.codes, self.quantizer.widths())
        ]
        codes = parts[0][1]
        if parts[0][0] is not None:
            codes = codes.new_empty(codes.shape[0], scan.heads, scan.channels, scan.states)
            for heads, part in parts:
                codes[:, heads] = part
        return self.quantizer.dequantize(QuantizedState(codes, self.channel, self.state))

    def _tensors(self) -> list[Tensor]:
        held = [*self.codes, self.channel, self.state, self.value, self.recent, self.count]
        return [tensor for tensor in held if tensor is not None]

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedState:
        new = PackedState(self.quantizer, self.packed)
        new.tokens = self.tokens
        new.codes = [change(part) for part in self.codes]
        for name in ("channel", "state", "value", "recent", "count"):
            held = getattr(self, name)
            setattr(new, name, None if held is None else change(held))
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return self._tensors()[0].device

    def to(self, *args: Any, **kwargs: Any) -> PackedState:
        """A copy on another device."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def zero_(self) -> PackedState:
        """Forget everything, in place."""
        for tensor in self._tensors():
            tensor.zero_()
        self.tokens = 0
        return self

    def index_select(self, dim: int, index: Tensor) -> PackedState:
        """The state of chosen sequences (beam search)."""
        assert dim == 0, "a state has sequences along its first axis only"
        return self._map(lambda tensor: tensor.index_select(0, index))

    def append(self, other: PackedState) -> PackedState:
        """The states of these sequences and of others after them, each at its own place of a replay window.

        Raises:
            ValueError: Their rounding depends on the token's number.
        """
        if self.quantizer.spec.rounding == "stochastic":
            raise ValueError("states that are rounded stochastically cannot share a batch")
        rest = iter(other._tensors())
        joined = self._map(lambda tensor: torch.cat([tensor, next(rest)]))
        joined.tokens = max(self.tokens, other.tokens)
        return joined

    def repeat_interleave(self, repeats: int, dim: int = 0) -> PackedState:
        """Each sequence ``repeats`` times."""
        assert dim == 0, "a state has sequences along its first axis only"
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))


def _with_rows(held: Tensor | None, rows: Tensor, new: Tensor | None) -> Tensor | None:
    return held if held is None or new is None else held.index_copy(0, rows, new)


class PackedStateLayer:
    """Mixin for transformers' linear-attention cache layers: the recurrent state is a :class:`PackedState`."""

    is_compileable = False
    quantizer: StateQuantizer
    packed: bool
    incoming: int
    recurrent_states: dict[int, Any]
    conv_states: dict[int, Any]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]

    def update_recurrent_state(self, recurrent_states: Any, state_idx: int = 0, **_: Any) -> Any:
        """Keep a prefill's last state: ``[S, H, P, N]``, of Mamba-1 ``[S, D, N]``, of a delta rule ``[S, H, N, P]``.

        What is kept packed already is given back by the mixers of a delta rule after every token.
        """
        if isinstance(recurrent_states, PackedState):
            return recurrent_states
        held = self.recurrent_states[state_idx]
        if held is None:
            held = self.recurrent_states[state_idx] = PackedState(self.quantizer, self.packed)
            self.is_recurrent_states_initialized[state_idx] = True
        scan = self.quantizer.scan
        fresh = recurrent_states.float()
        if scan.rule:
            fresh = fresh.mT.contiguous()
        fresh = fresh.view(-1, scan.heads, scan.channels, scan.states)
        held.store(fresh, self.incoming)
        return held

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, which transformers' layers with states cannot do by themselves."""
        for index, held in self.recurrent_states.items():
            if held is not None:
                self.recurrent_states[index] = held.repeat_interleave(repeats)
                self.conv_states[index] = self.conv_states[index].repeat_interleave(repeats, 0)
        inherited = getattr(type(self).__base__, "batch_repeat_interleave", None)
        if inherited is not None:
            inherited(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen sequences."""
        for index, held in self.recurrent_states.items():
            if held is not None:
                self.recurrent_states[index] = held.index_select(0, indices)
                self.conv_states[index] = self.conv_states[index].index_select(0, indices)
        inherited = getattr(type(self).__base__, "batch_select_indices", None)
        if inherited is not None:
            inherited(self, indices)


@cache
def _packed_class(base: type) -> type:
    # the class of an object can only be changed to one whose first base it has, so methods are put in by hand
    names = ("is_compileable", "update_recurrent_state", "batch_repeat_interleave", "batch_select_indices")
    own = {name: PackedStateLayer.__dict__[name] for name in names}
    return type(f"Packed{base.__name__}", (base, PackedStateLayer), own)


def adopt(cache_layer: Any, quantizer: StateQuantizer, packed: bool, incoming: int) -> PackedState | None:
    """Make a cache layer keep its states packed; what it holds already is packed now.

    Args:
        cache_layer: A linear-attention layer of a transformers cache, with or without attention beside it.
        quantizer: What rounds the states.
        packed: See :class:`PackedState`.
        incoming: Tokens of the forward pass that is about to run.

    Returns:
        The state that this pass starts from, None at the start of a sequence.
    """
    if not isinstance(cache_layer, PackedStateLayer):
        base: Any = type(cache_layer)
        cache_layer.__class__ = _packed_class(base)
        cache_layer.quantizer, cache_layer.packed = quantizer, packed
        cache_layer.incoming = 0
        for index, held in list(cache_layer.recurrent_states.items()):
            if isinstance(held, Tensor):
                cache_layer.recurrent_states[index] = None
                cache_layer.update_recurrent_state(held, index)
    cache_layer.incoming = incoming
    held = cache_layer.recurrent_states[0]
    return held if held is None or held.tokens else None


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes that a cache keeps between two tokens.

    Attributes:
        states: Codes, scales and replayed tokens, or float states where a layer is not quantized.
        convolution: Convolution states.
        attention: Keys and values.
    """

    states: int
    convolution: int
    attention: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.convolution + self.attention


def cache_bytes(kept: Cache) -> CacheBytes:
    """Measure a transformers cache: tensors that exist, not a formula."""
    states = convolution = attention = 0
    for layer in kept.layers:
        for held in getattr(layer, "recurrent_states", {}).values():
            if held is not None:
                states += held.nbytes
        for conv in getattr(layer, "conv_states", {}).values():
            convolution += 0 if conv is None else conv.nbytes
        for key in ("keys", "values"):
            tensor = getattr(layer, key, None)
            attention += tensor.nbytes if isinstance(tensor, Tensor) else 0
    return CacheBytes(states, convolution, attention)
