"""The native decode step: one call computes every layer of a decoder for a few tokens.

This is the thin, typed side of ``csrc/cpu/decode``: structures that C++ reads, packing of weights into blocks, the
call. It knows tensors and sizes, not model families; :mod:`llmcompress.inference` fills it from a model.

Legend: B tokens of a step (at most :data:`MAX_BATCH`), L layers, H hidden, I intermediate, D head dimension,
Dp = D rounded up to 16, P positions of the cache (a multiple of 16), E experts, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu, select
from llmcompress_kernels.decode_cache import Cache
from llmcompress_kernels.decode_checks import (
    check_mixers,
    check_norms,
    check_numbers,
    check_sizes,
    check_slots,
    check_tensors,
    check_windows,
)
from llmcompress_kernels.decode_layer import NO_ROUTING, Latents, Layer, Routing
from llmcompress_kernels.decode_structs import (
    REROUTE,
    STRUCTS,
    BoundMixersStruct,
    LayerStruct,
    ModelStruct,
    PromptStruct,
    StepStruct,
)
from llmcompress_kernels.matrix import Matrix, MatrixStruct

FAMILY = "decode"
MAX_BATCH = 8
# as in decode.h
MAX_HEAD_DIM = 1024
PHASES = ("norm", "qkv", "attention", "output", "mixer", "router", "gate_up", "down", "head", "wait")

for _isa in cpu.float_isas():
    build.register(
        build.Family(
            cpu.variant(FAMILY, _isa),
            (
                "cpu/decode/decode*.cpp",
                f"cpu/decode/*_{_isa}.cpp",
                f"cpu/tree/tree_{_isa}.cpp",
                "cpu/gemm/variants.cpp",
            ),
            headers=("cpu/include/**/*", "cpu/decode/*.h", "cpu/tree/*.inc"),
            # sums may be fused with products: the step has no twin that it must equal bit by bit
            flags=("-ffp-contract=fast", "-Wno-psabi"),
            isa=_isa,
        )
    )


# decides on a layer's choice of experts: number of the layer, router logits float32 [T, E], weights float32 [T, k] and
# experts int32 [T, k], ascending; the last two are changed in place, where E empties a slot
Reroute = Callable[[int, Tensor, Tensor, Tensor], None]

# of Activation in lowbit.h, and XIELU and RELU of decode.h
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "gpt_oss": 3, "relu2": 4, "xielu": 5, "relu": 6}
# of Routing in decode.h
_ROUTING = {"softmax": 0, "sparsemixer": 1, "sigmoid": 2}
# members of a family that a node can tell apart
MAX_MEMBERS = 64
# bytes of an activation as a fixed-point number with an exponent a group: as exact as float32 sums, more exact than
# bf16 or fp16 activations, and int8
FLOAT32_PLANES, FLOAT16_PLANES, INT8_PLANES = 3, 2, 1


def unavailable() -> str | None:
    """Why the step cannot run on this machine, or None; starts no build."""
    return cpu.unavailable(FAMILY)


# without it transformers' modules run one by one, on the operators
select.register(select.Implementation("decode_step", "cpu", ("cpu",), unavailable))
select.register(select.Implementation("decode_step", "reference", ("any",)))


# the instruction set in use, None before it is known
_in_use: str | None = None


def library() -> ctypes.CDLL:
    """The compiled family, of the instruction set in use.

    Raises:
        BuildError: It cannot be had here; the text says why.
    """
    global _in_use  # noqa: PLW0603 - one choice per process
    if _in_use is None:
        _in_use = cpu.wanted()
        build.prepare((cpu.variant(FAMILY, _in_use), cpu.products_family(_in_use)))
    lib = build.load(cpu.variant(FAMILY, _in_use))
    if getattr(lib, "llmcompress_products_of", None) != _in_use:
        cpu.hand_products(lib, _in_use)
        lib.llmcompress_products_of = _in_use  # type: ignore[attr-defined]
    if not hasattr(lib, "llmcompress_decode_ready"):
        for which, structure in enumerate(STRUCTS):
            assert lib.llmcompress_decode_size(which) == ctypes.sizeof(structure), structure
        lib.llmcompress_decode_create.restype = ctypes.c_void_p
        lib.llmcompress_decode_destroy.argtypes = (ctypes.c_void_p,)
        for call in (lib.llmcompress_decode_step, lib.llmcompress_decode_prompt):
            call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        lib.llmcompress_decode_ready = True  # type: ignore[attr-defined]
    return lib


def set_isa(name: str | None) -> bool:
    """Switch the instruction set, one of :data:`cpu.ISAS`, None for the best; False where the CPU cannot run it."""
    global _in_use  # noqa: PLW0603 - one choice per process
    if name is not None and not cpu.runs(name):
        return False
    _in_use = name or cpu.fastest()
    return True


@dataclass(eq=False)
class Decoder:
    """All weights and sizes of a model; keeps every tensor alive that C++ points to.

    Attributes:
        layers: In order.
        final_norm, final_norm_bias: float32 ``[H]``, as norms of layers.
        cosine, sine: Rotary tables float32 ``[positions, R / 2]``, R their own; the first R columns of a head are
            turned, usually all, maybe none; with latents the last ones.
        query_scales: float32 ``[positions]``, factors of the queries of layers that sharpen, or None.
        embedding, head: ``[V, H]``.
        neighbours: Columns of a head are turned in pairs that stand side by side, not ``R / 2`` apart.
        latents: What keys and values are made of; None where each head has its own.
        epsilon: Epsilon of every norm.
        attention_scale: Factor of the scores, usually ``D ** -0.5``.
        routing: Routing of the routers.
        screen: The head rounded to 8 bits, by which greedy steps find the few rows worth computing, or None.
        screen_error: float32 ``[V]``, bound of ``|head x - screen x| / |x|`` for every row.
        member_embeddings: Embeddings of a family, one for each member; norms then have a row for each, ``[M, H]``.
        member_heads: The same of heads.
        embedding_scale: Factor of embeddings.
        residual_scale: Factor of all that layers add to the hidden states.
        embedding_norm: RMSNorm weights ``[H]`` of embeddings, or None.
        position_rows: float32 ``[positions, H]``, added to embeddings with their factor (OPT), or None.
        activation: Activation of the gates of MLPs, one of :data:`ACTIVATIONS`.
        gate_slope, gate_limit: Of gpt_oss's: gates are cut at the limit, what they open at both sides. Of xIELU, whose
            MLPs have no gates, beta and epsilon.
        attention_cap, logit_cap: Scores and logits x become ``cap tanh(x / cap)``; 0 for no cap.

    Raises:
        ValueError: More members than :data:`MAX_MEMBERS`, heads or latents wider than :data:`MAX_HEAD_DIM`, layers that
            share a cache and differ in what they keep there, or norms of another size.
    """

    layers: Sequence[Layer]
    final_norm: Tensor
    cosine: Sequence[Tensor]
    sine: Sequence[Tensor]
    embedding: Matrix
    head: Matrix
    epsilon: float
    attention_scale: float
    routing: Routing = NO_ROUTING
    latents: Latents | None = None
    gate_slope: float = 0.0
    gate_limit: float = 0.0
    final_norm_bias: Tensor | None = None
    screen: Matrix | None = None
    screen_error: Tensor | None = None
    member_embeddings: Sequence[Matrix] = ()
    member_heads: Sequence[Matrix] = ()
    query_scales: Tensor | None = None
    embedding_norm: Tensor | None = None
    position_rows: Tensor | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    neighbours: bool = False
    activation: str = "silu"
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HEAD_DIM, MAX_MEMBERS)
        check_norms(self)
        kinds, mixes = [layer.kept_as for layer in self.layers], [layer.mixes for layer in self.layers]
        places = [(mixes[:index].count(True), kinds[:index].count(kind)) for index, kind in enumerate(kinds)]
        structs = (LayerStruct * len(self.layers))(
            *(
                layer._struct(*place, self.cosine, self.sine, self.query_scales)
                for layer, place in zip(self.layers, places)
            )
        )
        embeddings, heads = (
            (MatrixStruct * len(side))(*(matrix.struct() for matrix in side)) if side else None
            for side in (self.member_embeddings, self.member_heads)
        )
        # C++ reads these at every step
        self._kept = (embeddings, heads)
        given = (self.final_norm, self.final_norm_bias, self.embedding_norm, self.position_rows)
        routing, latents = self.routing, self.latents or Latents(0, 0, 0.0, False)
        model = ModelStruct(
            structs, *(None if t is None else t.data_ptr() for t in given),
            self.embedding.struct(), self.head.struct(),
            MatrixStruct() if self.screen is None else self.screen.struct(),
            None if self.screen_error is None else self.screen_error.data_ptr(), embeddings, heads,
            len(self.layers), self.hidden,
            int(self.neighbours or latents.neighbours), latents.size, latents.width, self.taps,
            latents.epsilon, ACTIVATIONS[self.activation], routing.top_k, _ROUTING[routing.kind],
            len(self.member_heads), int(routing.renormalizes), int(routing.scales_inputs), routing.groups,
            routing.top_groups, routing.voters,
            self.epsilon, self.attention_scale, routing.scale, routing.floor, routing.jitter,
            self.attention_cap, self.logit_cap, self.gate_slope, self.gate_limit,
            self.embedding_scale, self.residual_scale,
        )  # fmt: skip
        lib = library()
        self._handle = lib.llmcompress_decode_create(ctypes.byref(model))
        weakref.finalize(self, lib.llmcompress_decode_destroy, self._handle)

    @property
    def hidden(self) -> int:
        """Width of the hidden states, H."""
        return self.final_norm.shape[-1]

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, V."""
        return self.head.rows

    @property
    def taps(self) -> int:
        """L of the convolutions, 0 where there are none."""
        return next((layer.conv_weight.shape[0] for layer in self.layers if layer.conv_weight is not None), 0)

    @property
    def mixes(self) -> bool:
        """Whether there are layers with mixers, which steps and prompts have to be given."""
        return any(layer.mixes for layer in self.layers)

    @cached_property
    def takes_prompts(self) -> bool:
        """Whether :func:`prompt` computes it: layers packed in whole blocks of rows, but for routers."""
        return all(layer.takes_prompts for layer in self.layers)

    @property
    def positions(self) -> int:
        """Positions that rotary tables, factors of queries and what is added to embeddings have."""
        tables = (*self.cosine, *self.sine, self.query_scales, self.position_rows)
        return min(table.shape[0] for table in tables if table is not None)

    def with_rotary(
        self, cosine: Sequence[Tensor], sine: Sequence[Tensor], query_scales: Tensor | None = None
    ) -> Decoder:
        """The same weights with other tables by position; see the attributes."""
        return replace(self, cosine=cosine, sine=sine, query_scales=query_scales)

    def step_bytes(self, batch: int = 1) -> int:
        """Weight bytes that one step reads: all but the embedding, and of experts at most ``batch * k``."""
        total = self.head.nbytes
        for layer in self.layers:
            for name, weight in layer.matrices().items():
                routed = layer.router is not None and name in ("gate", "up", "down")
                share = min(1.0, batch * self.routing.top_k / weight.experts) if routed else 1.0
                total += int(weight.nbytes * share)
        return total


class Mixers:
    """Layers that keep a recurrent state in the place of keys and values, as another library computes them.

    Args:
        run: Address of its functions (``Mixers`` of ``csrc/cpu/decode/decode.h``).
        engine: Its handle of the layers.
        states: Address of what it keeps of the sequences.
        owners: Owners whose memory all this is; kept alive.
    """

    def __init__(self, run: int, engine: int, states: int, owners: Sequence[Any]) -> None:
        self._struct = BoundMixersStruct(run, engine, states)
        self._owners = owners


def step(
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    logits: Tensor | None,
    best: Tensor | None = None,
    planes: int = FLOAT32_PLANES,
    threads: int | None = None,
    layers: tuple[int, int] | None = None,
    hidden: Tensor | None = None,
    seconds: Tensor | None = None,
    members: Tensor | None = None,
    mixers: Mixers | None = None,
) -> None:
    """Compute B tokens: one of each of B sequences, or several of one where all layers have attention alone.

    Args:
        decoder: The weights.
        cache: Holds all earlier positions of every sequence; takes the new ones.
        tokens: int64 ``[B]``.
        positions: int64 ``[B]``, where each token stands, below ``cache.positions``.
        slots: int32 ``[B]``, the sequence of each token. Tokens of one sequence attend to each other by position.
        logits: float32 ``[B, V]``, written; None where the decoder has a screen and only ``best`` is wanted.
        best: int64 ``[B]``, written with the index of the largest logit.
        planes: Bytes of each input of packed weights; 1 rounds them to int8 per group, 2 holds what 16-bit inputs do.
        threads: As :func:`llmcompress_kernels.cpu.team` has it.
        layers: Half-open range of layers, all by default. With a part of them ``hidden`` is input and output.
        hidden: float32 ``[B, H]``.
        seconds: float64 ``[len(PHASES)]``, the first thread's time by phase is added.
        members: Members of a family, int32 ``[B]``, whose tokens they are; equal ones must be neighbours.
        mixers: Mixers of a decoder that has some; their states are replaced.

    Raises:
        ValueError: A size is out of range, or a tensor is not of the type and shape named here.
    """
    batch, count = tokens.shape[0], len(decoder.layers)
    first, last = layers or (0, count)
    if not 0 < batch <= MAX_BATCH:
        raise ValueError(f"a step takes 1 to {MAX_BATCH} tokens, not {batch}")
    if (first, last) != (0, count) and hidden is None:
        raise ValueError("a part of the layers needs hidden states")
    if logits is None and (decoder.screen is None or best is None):
        raise ValueError("a step without logits needs a screened head and a place for the best")
    if (members is None) != (not decoder.member_heads):
        raise ValueError("members belong to the steps of a family, and to all of them")
    if members is not None and not 0 <= int(members.min()) <= int(members.max()) < len(decoder.member_heads):
        raise ValueError(f"members {members.tolist()} are not all within 0..{len(decoder.member_heads) - 1}")
    check_mixers(decoder, mixers)
    check_tensors(
        batch, tokens=(tokens, torch.int64, None), positions=(positions, torch.int64, None),
        slots=(slots, torch.int32, None), members=(members, torch.int32, None), best=(best, torch.int64, None),
        logits=(logits, torch.float32, decoder.vocabulary), hidden=(hidden, torch.float32, decoder.hidden),
    )  # fmt: skip
    check_tensors(len(PHASES), seconds=(seconds, torch.float64, None))
    check_slots(decoder, slots, cache.keys.shape[1])
    limit = min(cache.positions, decoder.positions)
    if int(positions.min()) < 0 or int(positions.max()) >= limit:
        raise ValueError(f"positions {positions.tolist()} are not all within 0..{limit - 1}")
    check_numbers(decoder, tokens, planes)
    if cache.near is not None:
        for slot, position in zip(slots.tolist(), positions.tolist()):
            check_windows(cache.near, slot, position, 1)
    given = (tokens, positions, slots, members, logits, best, seconds)
    call = StepStruct(
        *(None if t is None else t.data_ptr() for t in given), _address(mixers),
        None if hidden is None else hidden.data_ptr(),
        batch, planes, cpu.team(threads), first, last, 0,
    )  # fmt: skip
    library().llmcompress_decode_step(decoder._handle, ctypes.byref(cache._struct), ctypes.byref(call))


def prompt(
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    slot: int,
    start: int = 0,
    planes: int = FLOAT32_PLANES,
    threads: int | None = None,
    seconds: Tensor | None = None,
    member: int = 0,
    reroute: Reroute | None = None,
    mixers: Mixers | None = None,
    last: bool = True,
) -> Tensor:
    """Compute any number of tokens of one sequence at once, all layers but no head.

    Args:
        decoder: One for which :attr:`Decoder.takes_prompts` holds.
        cache: Holds the sequence's earlier positions; takes the new ones.
        tokens: int64 ``[T]``.
        slot: Which sequence of the cache.
        start: Position of the first token.
        planes: As in :func:`step`.
        threads: As :func:`llmcompress_kernels.cpu.team` has it.
        seconds: As in :func:`step`; rounding and waiting are counted where they happen.
        member: Member of a family, whose tokens they are.
        reroute: Called once for every layer with experts, between their choice and their work.
        mixers: As in :func:`step`; between the parts of one prompt they take steps, but no other prompt. Parts that are
            multiples of :data:`llmcompress_kernels.mamba2.CUT` tokens change no bit.
        last: Whether the prompt ends here; only mixers and low-bit states ask.

    Returns:
        Hidden states of the last token, float32 ``[1, H]``, from which :func:`step` goes on with no layers left.

    Raises:
        ValueError: A size is out of range, or a tensor is not of the type and shape named here.
        Exception: What ``reroute`` raised, after all layers; the positions in the cache are useless then.
    """
    count, limit = tokens.shape[0], min(cache.positions, decoder.positions)
    if not decoder.takes_prompts:
        raise ValueError("prompts need packed weights in every layer")
    if count < 1 or start < 0 or start + count > limit or not 0 <= slot < cache.keys.shape[1]:
        raise ValueError(f"{count} tokens from {start} on in slot {slot} do not fit a cache of {limit} positions")
    if not 0 <= member < max(1, len(decoder.member_heads)):
        raise ValueError(f"member {member} is not within 0..{len(decoder.member_heads) - 1}")
    check_mixers(decoder, mixers)
    check_tensors(count, tokens=(tokens, torch.int64, None))
    check_tensors(len(PHASES), seconds=(seconds, torch.float64, None))
    check_numbers(decoder, tokens, planes)
    if cache.near is not None:
        check_windows(cache.near, slot, start, count)
    hidden, raised = torch.empty(1, decoder.hidden), list[BaseException]()
    callback = REROUTE() if reroute is None else _callback(decoder, count, reroute, raised)
    call = PromptStruct(
        *(None if t is None else t.data_ptr() for t in (tokens, hidden, seconds)),
        ctypes.cast(callback, ctypes.c_void_p), _address(mixers),
        count, start, slot, member, planes, cpu.team(threads), int(last), 0,
    )  # fmt: skip
    library().llmcompress_decode_prompt(decoder._handle, ctypes.byref(cache._struct), ctypes.byref(call))
    if raised:
        raise raised[0]
    return hidden


def _callback(decoder: Decoder, count: int, reroute: Reroute, raised: list[BaseException]) -> Any:
    """``reroute`` for C++, which has no exceptions to pass on: they are collected, and the calls after one left out."""

    def rows(address: int, columns: int, kind: Any = ctypes.c_float) -> Tensor:
        memory = (kind * (count * columns)).from_address(address)
        dtype = torch.float32 if kind is ctypes.c_float else torch.int32
        return torch.frombuffer(memory, dtype=dtype).view(count, columns)

    def call(layer: int, scores: int, weights: int, chosen: int) -> None:
        try:
            if not raised:
                router = decoder.layers[layer].router
                assert router is not None
                k = decoder.routing.top_k
                reroute(layer, rows(scores, router.rows), rows(weights, k), rows(chosen, k, ctypes.c_int32))
        except BaseException as error:  # raised again by the caller
            raised.append(error)

    return REROUTE(call)


def _address(mixers: Mixers | None) -> int | None:
    return None if mixers is None else ctypes.addressof(mixers._struct)
