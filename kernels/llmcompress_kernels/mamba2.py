"""A whole Mamba-2 or Mamba-1 model natively: one call a token for many sequences, one a prompt.

The typed side of ``csrc/cpu/state/model*.cpp``. It knows tensors and sizes; ``llmcompress/inference/recurrent.py``
fills it from a model. A step of Mamba-2 is bit for bit the chain of the operators ``group_gemm`` and ``mamba2_decode``,
which have their definitions (``tests/kernels/test_mamba2_model.py``); what Mamba-1 has of its own is in
:mod:`~llmcompress_kernels.mamba1`.

Legend: B sequences of a step, L layers, D hidden, H heads, P channels of a head, I = H P, G groups, N states,
C = I + 2 G N channels of the convolution, V vocabulary, S slots, W tokens of a replay window. In Mamba-1 every channel
has time steps and decays of its own: R is the width of their bottleneck, C = I, G = 1, and heads only cut channels for
their scales.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu, cpu_state, pages, select
from llmcompress_kernels.decode import Mixers
from llmcompress_kernels.decode_checks import check_tensors
from llmcompress_kernels.matrix import Matrix, MatrixStruct
from llmcompress_kernels.reference.group_gemm import LANES

# sequences of one call
MAX_BATCH = 64
# cuts of a prompt at multiples of this many tokens change no bit
CUT = 64
# tokens of one call, so that an interrupt need not wait for all of a long prompt
MAX_PROMPT = 32 * CUT
PHASES = ("input", "in_proj", "mix", "state", "gate", "out_proj", "head", "wait")
STATES = (32, 64, 128, 256)


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm", ctypes.c_void_p),
        *((name, MatrixStruct) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "dt_bias", "a", "d", "gain", "fixed")),
        *((name, ctypes.c_int32) for name in ("in_planes", "x_planes", "out_planes", "reserved")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("final_norm", ctypes.c_void_p),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
        ("vocabulary", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("layer_count", "hidden", "heads", "channels", "states", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "refit", "head_planes")),
        *((name, ctypes.c_float) for name in ("epsilon", "gate_epsilon", "low", "high")),
        *((name, ctypes.c_int32) for name in ("dither", "window", "rank")),
    )


class _States(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "channel", "scale", "floats", "conv", "recent", "count")),
        ("slots", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "slots", "logits", "best", "seconds")),
        ("batch", ctypes.c_int64), ("threads", ctypes.c_int32), ("reserved", ctypes.c_int32),
    )  # fmt: skip


class _Prompt(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "logits", "seconds")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("slot", "first", "last", "threads")),
    )


def unavailable() -> str | None:
    """Why the native model cannot run on this machine, or None; starts no build."""
    return cpu_state.unavailable() or cpu.unavailable()


select.register(select.Implementation("mamba2_step", "cpu", ("cpu",), unavailable))
# transformers' modules, on the operators
select.register(select.Implementation("mamba2_step", "reference", ("any",)))


def library() -> ctypes.CDLL:
    """The compiled family of states.

    Raises:
        BuildError: It, or the products it uses, cannot be had here; the text says why.
    """
    lib = build.load(cpu_state.FAMILY)
    if not hasattr(lib, "llmcompress_mamba2_ready"):
        for which, structure in enumerate((_Layer, _Model, _States, _Step, _Prompt)):
            assert lib.llmc_mamba2_size(which) == ctypes.sizeof(structure), structure
        lib.llmc_mamba2_create.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        lib.llmc_mamba2_create.restype = ctypes.c_void_p
        lib.llmc_mamba2_destroy.argtypes = (ctypes.c_void_p,)
        for name in ("llmc_mamba2_step", "llmc_mamba2_prompt"):
            getattr(lib, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            getattr(lib, name).restype = None
        lib.llmc_mamba2_carry.argtypes = (*[ctypes.c_void_p] * 4, ctypes.c_int32)
        lib.llmc_mamba2_carry.restype = None
        lib.llmc_mamba2_mixers.restype = ctypes.c_void_p
        lib.llmcompress_mamba2_ready = True  # type: ignore[attr-defined]
    return lib


@dataclass(frozen=True, slots=True)
class Layer:
    """``h += out_proj(mixer(in_proj(norm(h))))``.

    Attributes:
        norm: float32 ``[D]``.
        in_proj: ``[I + C, D]``, or with the time steps' H rows after them where ``dt_proj`` is None; of Mamba-1
            ``[2 I, D]``, the gate last.
        dt_proj: Dense ``[H, D]``: rows of in_proj that read unrounded inputs. Of Mamba-1 ``[I, R]``, without bias.
        out_proj: ``[D, I]``.
        conv_weight: float32 ``[C, 4]``.
        conv_bias: float32 ``[C]`` or None.
        dt_bias, a, d: float32 ``[H]``, of Mamba-1 ``[I]`` and ``a [I, N]``; ``a`` is negative.
        gain: float32 ``[I]``, weight of the gated norm, None for a gate without a norm; of Mamba-1 ``[R + 2 N]``, those
            of the norms of dt, B and C, or None.
        fixed: fp16 ``[H, P]`` calibrated channel scale of the states, or None.
        in_planes, out_planes: Bytes of an activation: 3 as exact as float32, 1 rounds to int8.
        x_proj: ``[R + 2 N, I]`` of Mamba-1: inputs of the time steps, B and C.
        x_planes: As the others.
    """

    norm: Tensor
    in_proj: Matrix
    dt_proj: Matrix | None
    out_proj: Matrix
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    a: Tensor
    d: Tensor
    gain: Tensor | None
    fixed: Tensor | None = None
    in_planes: int = 3
    out_planes: int = 3
    x_proj: Matrix | None = None
    x_planes: int = 3

    def _struct(self) -> _Layer:
        rows = (self.conv_weight, self.conv_bias, self.dt_bias, self.a, self.d, self.gain, self.fixed)
        inner = (MatrixStruct() if m is None else m.struct() for m in (self.x_proj, self.dt_proj))
        return _Layer(
            self.norm.data_ptr(), self.in_proj.struct(), *inner, self.out_proj.struct(),
            *(None if t is None else t.data_ptr() for t in rows), self.in_planes, self.x_planes, self.out_planes, 0,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of its projections."""
        return sum(m.nbytes for m in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj) if m is not None)


@dataclass(eq=False)
class Model:
    """All weights and sizes; keeps every tensor alive that C++ points to. One call at a time.

    Attributes:
        layers: In order.
        final_norm: float32 ``[D]``.
        embedding, head: ``[V, D]``, packed ones with rows up to a multiple of 16; None where the layers stand among
            others (:func:`mixers`).
        vocabulary: V, 0 without them.
        heads, channels, states, groups: H, P, N, G. N is of :data:`STATES`, P a multiple of 16 up to 256; D and I / G
            are multiples of 16. In Mamba-1 N is :data:`~llmcompress_kernels.mamba1.STATES` and P at most 64.
        bits: Bits of the states' codes, 4 or 8; 0 keeps states in float32.
        refit: Whether channel scales are fitted to the codes.
        dither: Whether a dither is added before states are rounded.
        head_planes: As in a layer.
        epsilon, gate_epsilon: Of the norms and the gated norms; in Mamba-1 the latter is that of the norms of dt, B and
            C, negative where there are none.
        limits: Smallest and largest time step of a prompt; steps have none, as in transformers.
        window: W, tokens between two roundings of a state (``dsq_replay_update``), from the end of a prompt, which is
            rounded; 1 to :data:`~llmcompress_kernels.cpu_state.MAX_WINDOW`, of no effect on float states.
        rank: R of Mamba-1, 0 in Mamba-2.
    """

    layers: Sequence[Layer]
    final_norm: Tensor
    embedding: Matrix | None
    head: Matrix | None
    vocabulary: int
    heads: int
    channels: int
    states: int
    groups: int
    bits: int
    refit: bool
    epsilon: float
    gate_epsilon: float
    limits: tuple[float, float]
    head_planes: int = 3
    dither: bool = False
    window: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= cpu_state.MAX_WINDOW:
            raise ValueError(f"a replay window has 1 to {cpu_state.MAX_WINDOW} tokens, not {self.window}")
        structs = (_Layer * len(self.layers))(*(layer._struct() for layer in self.layers))
        sizes = (self.heads, self.channels, self.states, self.groups, self.bits, int(self.refit), self.head_planes)
        model = _Model(
            structs, self.final_norm.data_ptr(),
            *(MatrixStruct() if end is None else end.struct() for end in (self.embedding, self.head)), self.vocabulary,
            len(self.layers), self.hidden, *sizes, self.epsilon, self.gate_epsilon, *self.limits, int(self.dither),
            self.window, self.rank,
        )  # fmt: skip
        self._kept = structs
        lib = library()
        self._handle = lib.llmc_mamba2_create(ctypes.byref(model), cpu.products(cpu.isa()))
        weakref.finalize(self, lib.llmc_mamba2_destroy, self._handle)

    @property
    def hidden(self) -> int:
        """Width of the hidden states, D."""
        return self.final_norm.shape[-1]

    @property
    def width(self) -> int:
        """Channels of the convolution, C."""
        return self.heads * self.channels + (0 if self.rank else 2 * self.groups * self.states)

    @property
    def carried_bytes(self) -> int:
        """Bytes of :class:`Carried`."""
        return len(self.layers) * (self.heads * self.channels * self.states + cpu_state.CONV_WIDTH * self.width) * 4

    def step_bytes(self) -> int:
        """Weight bytes that a step reads."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.head is None else self.head.nbytes)

    def logits(self, rows: int) -> Tensor:
        """Room for the logits of a call, float32 ``[rows, V up to 16]``."""
        return torch.empty(rows, -(-self.vocabulary // LANES) * LANES)


class States:
    """The states of several sequences, between two tokens: ``[L, S, ...]``.

    Args:
        model: Model whose sizes to use.
        slots: Sequences.

    Attributes:
        codes: uint8 ``[L, S, H, P, N bits / 8]``, or None with float states.
        channel: fp16 ``[L, S, H, P]``, None where it is calibrated.
        scale: fp16 ``[L, S, H, N]``.
        floats: float32 ``[L, S, H, P, N]`` where there are no codes; of Mamba-1 ``[L, S, I / 16, N, 16]``.
        conv: float32 ``[L, S, C, 4]``, the last inputs of the convolution.
        recent: float32 ``[L, S, W - 1, I + H + G N]``, the tokens since each state was rounded, as
            ``dsq_replay_update`` keeps them, of Mamba-1 ``[L, S, W - 1, 2 I + N]`` with dt in the place of decays; None
            with W = 1 or float states.
        count: int32 ``[S]``, how many rows of it are filled, the same in all layers; None likewise.
    """

    def __init__(self, model: Model, slots: int) -> None:
        lead = (len(model.layers), slots)
        heads, channels, states = model.heads, model.channels, model.states
        self.codes = self.channel = self.scale = self.floats = None
        if model.bits:
            self.codes = pages.zeros((*lead, heads, channels, states * model.bits // 8), torch.uint8)
            self.scale = torch.zeros((*lead, heads, states), dtype=torch.float16)
            if model.layers[0].fixed is None:
                self.channel = torch.zeros((*lead, heads, channels), dtype=torch.float16)
        else:
            shape = (heads * channels // LANES, states, LANES) if model.rank else (heads, channels, states)
            self.floats = pages.zeros((*lead, *shape), torch.float32)
        self.conv = torch.zeros(*lead, model.width, cpu_state.CONV_WIDTH)
        self.recent = self.count = None
        if model.bits and model.window > 1:
            row = heads * channels * (2 if model.rank else 1) + model.groups * states + (0 if model.rank else heads)
            self.recent = torch.zeros(*lead, model.window - 1, row)
            self.count = torch.zeros(slots, dtype=torch.int32)
        self._struct = _States(*(None if t is None else t.data_ptr() for t in self._held()), slots)
        self.slots = slots

    def _held(self) -> tuple[Tensor | None, ...]:
        return (self.codes, self.channel, self.scale, self.floats, self.conv, self.recent, self.count)

    def take(self, others: States) -> None:
        """Copy the first sequences from others of the same model."""
        for mine, theirs in zip(self._held(), others._held()):
            if mine is not None and theirs is not None:
                # all but the counts have a row for each layer
                part = mine if mine.ndim == 1 else mine.transpose(0, 1)
                part[: others.slots] = theirs if theirs.ndim == 1 else theirs.transpose(0, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences."""
        return sum(t.nbytes for t in self._held() if t is not None)


@dataclass(frozen=True, slots=True)
class Carried:
    """What a prompt has left after some of its tokens, a multiple of :data:`CUT`: all that its next part goes on from.

    Attributes:
        states: float32 ``[L, I N]`` in the order in which the kernels walk them; not rounded.
        inputs: float32 ``[L, 4, C]``, the last inputs of the convolutions.
        lanes: Channels side by side in ``states``.
    """

    states: Tensor
    inputs: Tensor
    lanes: int

    @property
    def nbytes(self) -> int:
        """Bytes of states and inputs."""
        return self.states.nbytes + self.inputs.nbytes


def carried(model: Model) -> Carried:
    """A copy of what the prompt that is being read has left; only between its parts."""
    size = len(model.layers), model.heads * model.channels * model.states
    states, inputs, lanes = torch.empty(size), torch.empty(size[0], cpu_state.CONV_WIDTH, model.width), ctypes.c_int64()
    _carry(model, states, inputs, lanes, 0)
    return Carried(states, inputs, lanes.value)


def carry(model: Model, held: Carried) -> None:
    """Let the next part of a prompt go on from here.

    Args:
        model: Whose it was.
        held: From :func:`carried`, whichever prompts have been read since.
    """
    _carry(model, held.states, held.inputs, ctypes.c_int64(held.lanes), 1)


def _carry(model: Model, states: Tensor, inputs: Tensor, lanes: ctypes.c_int64, back: int) -> None:
    library().llmc_mamba2_carry(model._handle, states.data_ptr(), inputs.data_ptr(), ctypes.addressof(lanes), back)


def mixers(model: Model, states: States) -> Mixers:
    """Layers of a model that stand among others, with their states, for :func:`llmcompress_kernels.decode.step`.

    Args:
        model: Without embedding and head; a step or prompt of one decoder at a time.
        states: With a slot for every sequence of that decoder's cache.
    """
    run = library().llmc_mamba2_mixers()
    return Mixers(run, model._handle, ctypes.addressof(states._struct), (model, states))


def step(
    model: Model, states: States, tokens: Tensor, slots: Tensor, logits: Tensor, best: Tensor | None = None,
    threads: int | None = None, seconds: Tensor | None = None,
) -> None:  # fmt: skip
    """One token of each of B sequences; their states are replaced.

    Args:
        model: The weights.
        states: States of the sequences.
        tokens: int64 ``[B]``.
        slots: int32 ``[B]``, which sequences, all different.
        logits: float32 ``[B or more, V up to 16]`` of :meth:`Model.logits`, written.
        best: int64 ``[B]``, written with the index of the largest logit.
        threads: As :func:`llmcompress_kernels.cpu.team` has it.
        seconds: float64 ``[len(PHASES)]``, the first thread's time by phase is added.

    Raises:
        ValueError: A size is out of range, or a tensor is not of the type and shape named here.
    """
    batch = tokens.shape[0]
    _check_tokens(model, tokens)
    if not 0 < batch <= MAX_BATCH or logits.shape[0] < batch:
        raise ValueError(f"a step takes 1 to {MAX_BATCH} tokens with room for their logits, not {batch}")
    chosen = slots.tolist()
    if len(set(chosen)) != batch or min(chosen) < 0 or max(chosen) >= states.slots:
        raise ValueError(f"sequences {chosen} are not {batch} different ones of {states.slots}")
    _check_room(model, batch, logits, seconds)
    check_tensors(batch, slots=(slots, torch.int32, None), best=(best, torch.int64, None))
    given: tuple[Any, ...] = (tokens, slots, logits, best, seconds)
    call = _Step(*(None if t is None else t.data_ptr() for t in given), batch, cpu.team(threads), 0)
    library().llmc_mamba2_step(model._handle, ctypes.byref(states._struct), ctypes.byref(call))


def prompt(
    model: Model, states: States, slot: int, tokens: Tensor, logits: Tensor,
    threads: int | None = None, seconds: Tensor | None = None, first: bool = True, last: bool = True,
) -> None:  # fmt: skip
    """Start a sequence: the prompt is scanned in float, as transformers does, and its last state is stored.

    A prompt may come in parts, between which the model computes steps of other sequences but no other prompt: its float
    states stay with the model until the last part. Parts that are multiples of :data:`CUT` tokens change no bit.

    Args:
        model: The weights.
        states: States of the sequences.
        slot: Slot whose state is replaced.
        tokens: int64 ``[T]``, at least one.
        logits: float32 ``[1 or more, V up to 16]``, of which the first row is written: the last token's.
        threads: As :func:`llmcompress_kernels.cpu.team` has it.
        seconds: As in :func:`step`.
        first: Whether these tokens begin the prompt.
        last: Whether they end it; logits are written then.

    Raises:
        ValueError: A size is out of range, or a tensor is not of the type and shape named here.
    """
    _check_tokens(model, tokens)
    if not 0 <= slot < states.slots or len(tokens) == 0:
        raise ValueError(f"sequence {slot} of {states.slots} with {len(tokens)} tokens")
    _check_room(model, 1, logits, seconds)
    run, workers = library().llmc_mamba2_prompt, cpu.team(threads)
    for start in range(0, len(tokens), MAX_PROMPT):
        part = tokens[start : start + MAX_PROMPT]
        begins, ends = first and start == 0, last and start + len(part) == len(tokens)
        clock = None if seconds is None else seconds.data_ptr()
        call = _Prompt(
            part.data_ptr(), logits.data_ptr(), clock, len(part), slot, int(begins), int(ends), workers
        )  # fmt: skip
        run(model._handle, ctypes.byref(states._struct), ctypes.byref(call))


def _check_tokens(model: Model, tokens: Tensor) -> None:
    # what is read beyond the table would be someone else's memory
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary:
        raise ValueError(f"tokens {tokens.tolist()} are not all within 0..{model.vocabulary - 1}")
    if tokens.dtype != torch.int64 or not tokens.is_contiguous():
        raise ValueError("tokens are int64 and contiguous")


def _check_room(model: Model, rows: int, logits: Tensor, seconds: Tensor | None) -> None:
    check_tensors(rows, logits=(logits, torch.float32, -(-model.vocabulary // LANES) * LANES))
    check_tensors(len(PHASES), seconds=(seconds, torch.float64, None))
