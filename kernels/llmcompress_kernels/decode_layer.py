"""What a layer of the decode step has, and what all layers of a model share (``csrc/cpu/decode/decode.h``).

Legend as in :mod:`~llmcompress_kernels.decode`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llmcompress_kernels.decode_delta import Delta
from llmcompress_kernels.decode_structs import LayerStruct
from llmcompress_kernels.matrix import Matrix, MatrixStruct
from llmcompress_kernels.reference.group_gemm import LANES


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts and their weights follow from the router's logits.

    Attributes:
        top_k: Experts of a token; 0 without experts.
        kind: ``softmax`` over all logits, ``sigmoid`` of each (DeepSeek-V3), or ``sparsemixer`` (Phi-MoE).
        renormalizes: Weights are divided by their sum.
        scale: Factor of the weights.
        groups: The experts are this many groups of equal size, side by side.
        top_groups: How many of them, the best, a token chooses from.
        voters: A group is ranked by its best expert (1), or by the sum of its best two (2).
        jitter: Noise level of sparsemixer.
        floor: Added to the sum that weights are divided by.
        scales_inputs: Weights multiply what experts read, not what they write (Llama 4); experts have no biases then.
    """

    top_k: int = 0
    kind: str = "softmax"
    renormalizes: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    voters: int = 1
    jitter: float = 0.0
    floor: float = 1e-20
    scales_inputs: bool = False


# of models without experts
NO_ROUTING = Routing()


@dataclass(frozen=True, slots=True)
class Latents:
    """Attention whose heads make keys and values of the same few numbers of a token (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        size: C, latents of a token.
        width: C + R, what a token leaves in the cache.
        epsilon: Epsilon of the norms of latents and of what queries are made of.
        neighbours: Pairs that are turned stand side by side.
    """

    size: int
    width: int
    epsilon: float
    neighbours: bool


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of a layer's attention.

    Attributes:
        count: Query heads.
        shared: Heads of keys and values, each for as many neighbouring query heads. One with latents.
        key_dim: D, columns of a query and, without latents, of a key.
        value_dim: V, columns of a head's result and, without latents, of a value.
    """

    count: int
    shared: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: ``h += o(attention(norm(h)))``, then ``h += down(activation(gate) * up)`` or routed experts.

    Either half may be missing.

    Attributes:
        attention_norm, mlp_norm: RMSNorm weights float32 ``[H]``, or with biases those of LayerNorm; None for no norm.
        attention_norm_bias, mlp_norm_bias: Likewise, or None.
        heads: Sizes of attention, None without. Layers with windows are alike in all but the number of query heads, and
            so are those without.
        query, key, value, output: Projections of attention, None without. Keys are values, too, where these alone are
            missing and there are no latents (Gemma 4).
        head_gates: ``[heads V, H]`` or ``[heads, H]`` that makes gates of attention's results (AFMoE, Laguna), or None.
        softplus: They open by softplus, not by a sigmoid (Laguna).
        aside: ``[H, H]`` of a layer that lays aside what it says: attention, whose norm has ``2 H`` weights, reads
            hidden states and embedding side by side, the MLP what attention says, and this what the MLP says. None
            elsewhere.
        reads_aside: Whether the mixer reads what the layer before laid aside, added to the hidden states.
        mixes: Whether it has a mixer (:class:`Mixers`), whose norm and projections are not here. Beside attention both
            read the same hidden states.
        conv_in: ``[3 H, H]`` of a short gated convolution in the place of attention: first gate, second gate, input;
            ``output`` is its last projection. Of a delta rule queries, keys and values, maybe gates. None elsewhere.
        conv_weight: float32 ``[L, H]``, its taps, the newest token's last; of a delta rule ``[L, C]``.
        conv_bias: float32 ``[H]`` or None.
        conv_key, conv_value: Of a delta rule, projections of keys and values where they have their own, or None;
            ``conv_in`` makes queries alone then.
        delta: What a delta rule has besides, or None.
        conv_gates: Its ``[heads V, H]`` where gates have a projection of their own, or None.
        steps: Its dense ``[2 heads, H]``: step sizes, then what makes decays, unless ``decays`` does; None without.
        gates_low: ``[R, H]``, what ``conv_gates`` reads in the place of hidden states, or None.
        decays_low, decays: Dense ``[R, H]`` and ``[heads K, R]``: the second makes decays along keys of what the first
            makes (Kimi-Linear); or None.
        gates: Whether each head's queries are followed by as many gates of its result (Qwen3-Next).
        gate, up, down: Projections of the gated MLP, or of the stacked experts; None without. An MLP or experts without
            a gate have their first projection there, and None for the other.
        router: float32 ``[E, H]``, None for a dense layer.
        entry, exit: Dense ``[W, H]`` and ``[H, W]`` of experts that read and write W numbers, or None.
        router_correction: float32 ``[E]``, added to a router's sigmoids or softmax for the choice alone, or None.
        shared_gate, shared_up, shared_down: Projections of an MLP beside the experts, likewise, or None.
        shared_router: Row ``[1, H]`` that gives that MLP its share by a sigmoid; None gives it all.
        router_norm: RMSNorm weights ``[H]`` of what the router reads; None where it reads what experts read.
        shared_norm: Likewise of the MLP beside the experts.
        routed_after: RMSNorm weights ``[H]`` of the sum of all that experts say, or None.
        shared_after: Likewise of what the MLP beside them says, where the former are given.
        expert_scales: float32 ``[E]``, factors of the weights of chosen experts, or None.
        query_norm, key_norm: RMSNorm weights ``[D]`` of each head, or None; in a family ``[M, D]``. With latents the
            second are the latents', ``[C]``.
        query_norm_bias, key_norm_bias: Likewise biases; then they are LayerNorm, each head alone.
        value_norm: RMSNorm weights ``[V]`` of each head's value, or None.
        query_down: With latents (:class:`Latents`), what ``query`` reads in the place of hidden states, or None.
        query_down_norm: RMSNorm weights of what it makes.
        absorb: Dense ``[heads, D - R, C]``: each head's keys, by which its queries meet latents; None without.
        expand: ``[heads, V, C]``: each head's values from its sum of latents; None without.
        sinks: float32 ``[heads]``, scores of a position without a value that every token sees (gpt_oss), or None.
        whole_norms: They are ``[heads D]``, of all heads together.
        own_norms: They are ``[heads D]``, of each head alone (Command R+).
        norms_last: Heads are turned first and normed then, each alone (Hunyuan).
        parallel: MLP or experts read the hidden states before attention adds to them (Cohere, Phi).
        attention_after, mlp_after: RMSNorm weights ``[H]`` of what attention and MLP add to the hidden states, or None.
        window: Positions that a token sees, itself the last of them; 0 for all.
        chunked: It sees those since the last multiple of the window instead (Llama 4).
        sharpens: Queries are multiplied by the decoder's factors of their positions (Llama 4, Ministral 3).
        output_scale: Factor of the hidden states after the layer (Gemma 4).
        keeps: What attention and what the MLP or experts read, times these two factors, takes the place of the hidden
            states before they add to them (MiniMax-01); None where the hidden states stay.
        bends: The two numbers of a layer's xIELU (arXiv 2411.13010): of the parabola above 0 and of the exponential
            below.
        rotary: Which of the decoder's rotary tables turns queries and keys to their positions; None leaves them as they
            are (SmolLM3's every fourth layer).
    """

    attention_norm: Tensor | None
    mlp_norm: Tensor | None
    query: Matrix | None
    key: Matrix | None
    value: Matrix | None
    output: Matrix | None
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    heads: Heads | None = None
    head_gates: Matrix | None = None
    router: Matrix | None = None
    entry: Matrix | None = None
    exit: Matrix | None = None
    query_down: Matrix | None = None
    absorb: Matrix | None = None
    expand: Matrix | None = None
    conv_in: Matrix | None = None
    conv_key: Matrix | None = None
    conv_value: Matrix | None = None
    conv_gates: Matrix | None = None
    steps: Matrix | None = None
    gates_low: Matrix | None = None
    decays_low: Matrix | None = None
    decays: Matrix | None = None
    aside: Matrix | None = None
    shared_gate: Matrix | None = None
    shared_up: Matrix | None = None
    shared_down: Matrix | None = None
    shared_router: Matrix | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    query_norm_bias: Tensor | None = None
    key_norm_bias: Tensor | None = None
    value_norm: Tensor | None = None
    query_down_norm: Tensor | None = None
    router_norm: Tensor | None = None
    shared_norm: Tensor | None = None
    routed_after: Tensor | None = None
    shared_after: Tensor | None = None
    expert_scales: Tensor | None = None
    sinks: Tensor | None = None
    conv_weight: Tensor | None = None
    conv_bias: Tensor | None = None
    delta: Delta | None = None
    router_correction: Tensor | None = None
    attention_norm_bias: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    attention_after: Tensor | None = None
    mlp_after: Tensor | None = None
    mixes: bool = False
    reads_aside: bool = False
    whole_norms: bool = False
    own_norms: bool = False
    norms_last: bool = False
    parallel: bool = False
    gates: bool = False
    softplus: bool = False
    chunked: bool = False
    sharpens: bool = False
    output_scale: float = 1.0
    keeps: tuple[float, float] | None = None
    bends: tuple[float, float] = (0.0, 0.0)
    window: int = 0
    rotary: int | None = 0

    def matrices(self) -> dict[str, Matrix]:
        """Its weights by name."""
        names = [field[0] for field in LayerStruct._fields_ if field[1] is MatrixStruct]
        return {name: weight for name in names if (weight := getattr(self, name)) is not None}

    @property
    def attends(self) -> bool:
        """Whether it has attention, and so keys and values."""
        return self.query is not None

    @property
    def convolves(self) -> bool:
        """Whether it has a convolution, alone or before a delta rule."""
        return self.conv_in is not None

    @property
    def takes_prompts(self) -> bool:
        """Whether :func:`prompt` computes it."""
        shapes = {(side.bits, side.group_size) for side in (self.gate, self.up) if side is not None}
        alike = self.router is None or len(shapes) == 1
        small = ("router", "shared_router", "absorb", "expand", "steps", "decays_low", "decays", "entry", "exit")
        given = {name: weight for name, weight in self.matrices().items() if name not in small}
        if self.head_gates is not None and not (self.head_gates.bits or self.head_gates.planes):
            del given["head_gates"]
        packed = list(given.values())
        packed += [part for weight in packed if weight.adapter is not None for part in weight.adapter.matrices]
        return alike and all((weight.bits or weight.planes) and weight.rows % LANES == 0 for weight in packed)

    @property
    def kept_as(self) -> tuple[bool, bool] | None:
        """Whether inputs of a convolution are kept of its tokens, and keys of a window; None for neither, nor keys."""
        return (self.convolves, self.window > 0) if self.convolves or self.attends else None

    def _struct(
        self, mixer: int, place: int, cosine: Sequence[Tensor], sine: Sequence[Tensor], scales: Tensor | None
    ) -> LayerStruct:
        pointers = [field[0] for field in LayerStruct._fields_ if field[1] is ctypes.c_void_p]
        given = {name: getattr(self, name, None) for name in pointers}
        if self.rotary is not None:
            given |= {"cosine": cosine[self.rotary], "sine": sine[self.rotary]}
        given["query_scales"] = scales if self.sharpens else None
        heads = self.heads or Heads(0, 0, 0, 0)
        return LayerStruct(
            **{name: t.data_ptr() for name, t in given.items() if t is not None},
            **{name: weight.struct() for name, weight in self.matrices().items()},
            delta=None if self.delta is None else ctypes.pointer(self.delta.struct),
            whole_norms=int(self.whole_norms), own_norms=int(self.own_norms),
            norms_last=int(self.norms_last), parallel=int(self.parallel),
            gates=int(self.gates), softplus=int(self.softplus), chunked=int(self.chunked),
            mixes=int(self.mixes), mixer=mixer, place=place,
            reads_aside=int(self.reads_aside), window=self.window, replaces=int(self.keeps is not None),
            **dict(zip(("attention_keeps", "mlp_keeps"), self.keeps or ())),
            turned=0 if self.rotary is None else 2 * cosine[self.rotary].shape[-1], heads=heads.count,
            key_value_heads=heads.shared, head_dim=heads.key_dim, value_dim=heads.value_dim,
            output_scale=self.output_scale, positive=self.bends[0], negative=self.bends[1],
        )  # fmt: skip
