"""The shape of a model as compression sees it: blocks, sublayers, linears, expert banks.

A layout is computed from ``config.json`` alone, without torch and without weights, so that
``plan`` can price a run and ``validate`` can match rules against real names. Names are the
run-time names of transformers 5 (``model.layers.3.mlp.experts.gate_up_proj``); what the
checkpoint on disk calls them is described by :class:`DiskNames`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Literal


class Role(StrEnum):
    """What a weight does in its block; recipes may select by role.

    ``ssm`` are mixers of tokens that are not attention: state spaces, gated delta rules and short convolutions.
    """

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    SSM = "ssm"


@dataclass(frozen=True, slots=True)
class TensorView:
    """A parameter or buffer that stays dense: run-time name and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearView:
    """A linear layer ``y = x Wᵀ (+ b)`` with ``W [out_features, in_features]``.

    The last ``kept_rows`` rows stay dense when the rest is quantized: those that make Mamba-2's time steps,
    whose errors act through an exponential.
    """

    name: str
    out_features: int
    in_features: int
    role: Role
    bias: bool = False
    kept_rows: int = 0


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that read the same input, so that they share one Hessian.

    Attributes:
        linears: In checkpoint order (q, k, v | o | gate, up | down).
        position: ``first`` reads the normed input of its module; ``last`` is the module's
            output projection, whose input is the module's output once the projection is
            replaced by the identity; ``inner`` sits between (MLA's q_b and kv_b) and is
            seen through a hook.
        module: Run-time name of the module the group belongs to
            (``model.layers.0.self_attn``, ``model.layers.0.mlp.shared_experts``).
    """

    linears: tuple[LinearView, ...]
    position: Literal["first", "inner", "last"]
    module: str


@dataclass(frozen=True, slots=True)
class RouterView:
    """The router of an expert bank.

    Attributes:
        module: Run-time module name.
        kind: How logits become weights. ``softmax_topk``: softmax over all, then top-k.
            ``sigmoid_group_topk``: DeepSeek-V3. ``topk_softmax``: softmax over the chosen k
            (gpt_oss). ``sparsemixer``: Phi-MoE.
        renormalizes: Whether the weights of the chosen experts are divided by their sum.
        bias: Whether the router has a trained bias.
        scale: Constant that multiplies the final weights.
        correction: Tensor of E values that is added to softmax or sigmoid for the choice of experts and not for their
            weights, None without one. Where it lies outside ``module`` it is an argument of that.
        matrix: Name in ``module`` of the weight ``[E, H]``.
        floor: Added to the sum by which weights are divided.
        sequences: The module takes ``[S, L, H]`` alone (AFMoE).
        normed: It has a norm and a factor of its own, and reads the hidden states before the norm of the experts
            (Gemma 4).
    """

    module: str
    kind: Literal["softmax_topk", "sigmoid_group_topk", "topk_softmax", "sparsemixer"]
    renormalizes: bool
    bias: bool = False
    scale: float = 1.0
    correction: TensorView | None = None
    matrix: str = "weight"
    floor: float = 1e-20
    sequences: bool = False
    normed: bool = False

    @property
    def weight(self) -> str:
        """Run-time name of the weight ``[E, H]``."""
        return f"{self.module}.{self.matrix}"

    @property
    def handed(self) -> bool:
        """Whether the module gets the correction as a second argument."""
        return self.correction is not None and not self.correction.name.startswith(f"{self.module}.")


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """Stacked experts of one block: a view of two 3-D parameters, not a module.

    The canonical orientation used everywhere in this project is ``gate_up [E, 2I, H]`` (the
    first I rows are gate, the rest up) and ``down [E, H, I]``. ``transposed`` and
    ``interleaved`` say how the family stores them in memory. Experts without a gate have
    ``up [E, I, H]`` in the place of ``gate_up``.

    Attributes:
        module: Run-time module name (``model.layers.3.mlp.experts``).
        num_experts, top_k, hidden, intermediate: E, k, H, I; H is the width that experts read and write.
        router: The router that feeds this bank.
        bias: Whether both projections carry biases (gpt_oss).
        transposed: Stored as ``[E, H, 2I]`` and ``[E, I, H]``.
        interleaved: Gate and up rows alternate instead of following each other.
        activation: ``silu`` means ``silu(gate) * up``; ``gelu`` likewise;
            ``gpt_oss`` is the clamped form of gpt_oss; ``relu2`` means ``relu(up)^2``.
        gated: Whether there is a gate projection.
        entry: Projection from the module's input, which the router reads, to the narrower one of the experts, with
            another back from their sum; both stay dense. None where experts read the module's input.
        scales_inputs: Routing weights multiply what an expert reads, not what it writes (Llama 4).
    """

    module: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    router: RouterView
    bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    activation: str = "silu"
    gated: bool = True
    entry: LinearView | None = None
    scales_inputs: bool = False

    @property
    def gate_up(self) -> str:
        """Plan name of the stacked gate and up projections, or of the up projections alone."""
        return f"{self.module}.{'gate_up_proj' if self.gated else 'up_proj'}"

    @property
    def down(self) -> str:
        """Plan name of the stacked down projections."""
        return f"{self.module}.down_proj"

    @property
    def names(self) -> tuple[str, str]:
        """Plan names of both stacked projections."""
        return self.gate_up, self.down

    @property
    def first_rows(self) -> int:
        """Rows of an expert's first projection: 2I, or I without a gate."""
        return (2 if self.gated else 1) * self.intermediate

    @property
    def width(self) -> int:
        """Width of the module's input, which the router reads."""
        return self.hidden if self.entry is None else self.entry.in_features

    def shape(self, name: str) -> tuple[int, int, int]:
        """Canonical shape ``[E, N, K]`` of ``gate_up`` or ``down``."""
        if name == self.gate_up:
            return (self.num_experts, self.first_rows, self.hidden)
        if name == self.down:
            return (self.num_experts, self.hidden, self.intermediate)
        raise KeyError(name)

    def parts(self, name: str) -> dict[str, slice]:
        """Rows of one expert's projection: ``gate`` and ``up``, ``up`` alone, or ``down`` → slice of N."""
        if name == self.down:
            return {"down": slice(None)}
        half = self.intermediate
        return {"gate": slice(0, half), "up": slice(half, 2 * half)} if self.gated else {"up": slice(None)}

    def stored_shape(self, name: str) -> tuple[int, int, int]:
        """Shape of ``gate_up`` or ``down`` in the family's own orientation, ``[E, K, N]`` when transposed."""
        experts, rows, columns = self.shape(name)
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)


@dataclass(frozen=True, slots=True)
class ScanView:
    """Selective scan of an ``ssm`` sublayer: ``h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t``, ``y_t = h_t C_t + D x_t``.

    A gated delta rule is one too: B is a key, C a query, and ``dt x`` what the state says wrongly of a value.
    The state of one sequence is ``[heads, channels, states]``.

    Attributes:
        module: Run-time name of the mixer.
        kind: ``mamba2``: one decay per head; ``mamba1``: one per channel and state; ``delta``: a gated delta rule;
            ``kda``: one with a decay for each column of a key (Kimi Delta Attention).
        heads: H. For ``mamba1`` these are virtual: groups of ``channels`` neighbouring channels, so that scales
            cost less than a bit per value.
        channels: P, values of ``x`` per head; columns of a value.
        states: N; columns of a key.
        groups: Sets of B and C that the heads share, key heads; 1 for ``mamba1``.
        conv_channels: Channels of the causal convolution before the scan.
        conv_width: Its kernel size, which is also how many inputs its state holds.
    """

    module: str
    kind: Literal["mamba1", "mamba2", "delta", "kda"]
    heads: int
    channels: int
    states: int
    groups: int
    conv_channels: int
    conv_width: int

    @property
    def values(self) -> int:
        """Values of one sequence's state."""
        return self.heads * self.channels * self.states

    @property
    def rule(self) -> bool:
        """Whether it is a delta rule."""
        return self.kind in ("delta", "kda")

    @property
    def rates(self) -> int:
        """Values that make the decays of one token."""
        return self.heads * {"mamba1": self.channels, "kda": self.states}.get(self.kind, 1)

    @property
    def conv_values(self) -> int:
        """Values of one sequence's convolution state."""
        return self.conv_channels * self.conv_width


@dataclass(frozen=True, slots=True)
class Sublayer:
    """``h = h + output_scale * post_norm(module(input_scale * pre_norm(h)))``: attention, dense MLP, MoE or SSM.

    Zamba2's shared transformers have no residual connections: attention reads h beside the embedding, its output goes
    *aside*, is read from there and replaced by the following sublayers, and the mixer reads h plus what lies aside.

    Attributes:
        kind: ``attention``, ``mlp``, ``moe`` or ``ssm``.
        module: Run-time module name.
        pre_norm: Run-time name of the norm before the module, None where there is none.
        post_norm: Norm on the module's output before the residual add (Gemma), or None.
        groups: Quantizable linears in calibration order; for ``moe`` those of the shared experts. Without a group
            ``last`` the module's output projection belongs to an earlier block, see :class:`Loan`.
        experts: The expert bank of a ``moe`` sublayer.
        scan: The scan of an ``ssm`` sublayer, None where its mixer keeps no state (a convolution).
        parallel: Reads the hidden states that the sublayer before it read, not the ones it wrote.
        input_scale: Constant that multiplies the normed input.
        output_scale: Constant that multiplies the output before the residual add.
        reads: What the norm gets: the hidden states, these and the embedding side by side, what lies aside, or the sum
            of hidden states and that.
        writes: Whether the output is added to the hidden states or laid aside.
        numbered: The module is told the number of the block that runs it.
        joins: Norm of the sum of the output and what lies aside, which is then added to the hidden states; None where
            the output is added alone (Gemma 4, whose routed experts are in no module but the block).
        beside: Linears that read the normed input too and always stay dense.
        handed: How many positions a token sees where an earlier layer tells this attention which; 0 for others.
        keeps: Where the normed input takes the place of the hidden states, what multiplies it before the output is
            added (MiniMax-01); None where these stay.
        decays: Attention that keeps a state, which decays by constants, and no keys and values (MiniMax-01).
        activation: Of an MLP whose two linears are in no module but the block: what the block calls the function
            between them (OPT). None for others.
    """

    kind: Literal["attention", "mlp", "moe", "ssm"]
    module: str
    pre_norm: str | None
    post_norm: str | None
    groups: tuple[LinearGroup, ...]
    experts: ExpertBank | None = None
    scan: ScanView | None = None
    parallel: bool = False
    input_scale: float = 1.0
    output_scale: float = 1.0
    reads: Literal["hidden", "hidden|embedding", "aside", "hidden+aside"] = "hidden"
    writes: Literal["hidden", "aside"] = "hidden"
    numbered: bool = False
    joins: str | None = None
    beside: tuple[LinearView, ...] = ()
    handed: int = 0
    keeps: float | None = None
    decays: bool = False
    activation: str | None = None


@dataclass(frozen=True, slots=True)
class Loan:
    """A module of an earlier block that this block runs with the same weights (Zamba2).

    The weights belong to the earlier block, count once, and are quantized there. Low-rank adapters inside the module
    that only this block uses belong to this block.

    Attributes:
        module: Where transformers has a copy of the module in this block.
        owner: Run-time name of the module itself.
        block: Index of the block it belongs to.
        tensors: Those of its tensors that this block uses and does not own.
    """

    module: str
    owner: str
    block: int
    tensors: tuple[TensorView, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer.

    Attributes:
        index: Position in the model, from 0.
        name: Run-time name of the module.
        sublayers: In the order in which they run.
        kept: Every tensor that is never quantized: norms, routers, biases, gates of shared experts.
        loan: A module of another block that this one runs too, None in all families but one.
        scale: Tensor ``[1]`` that multiplies the hidden states after the last sublayer, None without (Gemma 4).
    """

    index: int
    name: str
    sublayers: tuple[Sublayer, ...]
    kept: tuple[TensorView, ...]
    loan: Loan | None = None
    scale: str | None = None

    def linears(self) -> Iterator[LinearView]:
        """All quantizable linears, in calibration order."""
        for sublayer in self.sublayers:
            for group in sublayer.groups:
                yield from group.linears

    @property
    def bank(self) -> ExpertBank | None:
        """The block's expert bank, if it has one."""
        return next((s.experts for s in self.sublayers if s.experts is not None), None)

    @property
    def scan(self) -> ScanView | None:
        """The block's selective scan, if it has one."""
        return next((s.scan for s in self.sublayers if s.scan is not None), None)

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor that belongs to the block, in the family's own orientation, by run-time name."""
        yield from self.kept
        for linear in self.linears():
            yield TensorView(f"{linear.name}.weight", (linear.out_features, linear.in_features))
        bank = self.bank
        if bank is not None:
            yield from (TensorView(name, bank.stored_shape(name)) for name in bank.names)


@dataclass(frozen=True, slots=True)
class DiskNames:
    """How a hub checkpoint names what transformers holds stacked.

    Attributes:
        renames: ``(run-time part, disk part)`` pairs replaced inside names, first match wins
            (Mixtral: ``(".mlp.gate.", ".block_sparse_moe.gate.")``).
        experts: Run-time expert module part and its disk counterpart
            (``(".mlp.experts", ".block_sparse_moe.experts")``), or None when fused on disk.
        gate, up, down: Per-expert tensor names after ``experts.<e>.`` (``w1.weight`` …).
        older: As ``renames``, for names that only some checkpoints have, older ones or those of a model with several
            modalities: they are read and never written.
        cut: Run-time ending of dense tensors that are several in the file, one after the other along the first axis,
            and endings and lengths of those.
    """

    renames: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str] | None = None
    gate: str = "gate_proj.weight"
    up: str = "up_proj.weight"
    down: str = "down_proj.weight"
    older: tuple[tuple[str, str], ...] = ()
    cut: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    def name(self, name: str) -> str:
        """What hub checkpoints call a run-time tensor or module that they hold whole."""
        for ours, theirs in self.renames:
            if ours in name:
                return name.replace(ours, theirs, 1)
        return name

    def pieces(self, name: str) -> dict[str, slice]:
        """What they call a dense run-time tensor, or the pieces of one that is cut, and which rows each has."""
        for ours, parts in self.cut:
            if name.endswith(ours):
                stem, ends = self.name(name.removesuffix(ours)), list(accumulate(length for _, length in parts))
                rows = [slice(start, end) for start, end in zip([0, *ends], ends)]
                return {f"{stem}{part}": own for (part, _), own in zip(parts, rows)}
        return {self.name(name): slice(None)}

    def expert(self, bank: ExpertBank, name: str, expert: int) -> dict[str, str]:
        """What they call the tensors of one expert's projection, by the keys of :meth:`ExpertBank.parts`."""
        assert self.experts is not None, "experts are stacked on disk"
        folder = bank.module.replace(*self.experts, 1)
        return {key: f"{folder}.{expert}.{getattr(self, key)}" for key in bank.parts(name)}


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A whole causal language model.

    Attributes:
        model_type: As in ``config.json``.
        blocks: Decoder layers in order.
        outside: Tensors outside the blocks (embedding, final norm, head), run-time names.
        tied: Whether the head shares the embedding (then it is not listed in ``outside``).
        hidden, vocab: Sizes used by estimates.
        disk: Names in the hub checkpoint.
        ignored: Patterns of tensors that a hub checkpoint may hold and the model does not use
            (DeepSeek-V3's next-token prediction layer).
        norm_adds_one: Whether norms multiply by one plus their weight (Gemma).
    """

    model_type: str
    blocks: tuple[Block, ...]
    outside: tuple[TensorView, ...]
    tied: bool
    hidden: int
    vocab: int
    disk: DiskNames = DiskNames()
    ignored: tuple[str, ...] = ()
    norm_adds_one: bool = False

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor of the model: those outside the blocks, then block by block."""
        yield from self.outside
        for block in self.blocks:
            yield from block.tensors()

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequences that can go through it block by block, None for no limit.

        Layers may be told by an earlier one which positions each token sees, which is not kept from block to block.
        """
        return min((s.handed for b in self.blocks for s in b.sublayers if s.handed), default=None)

    @property
    def decays(self) -> bool:
        """Whether it has attention that keeps a state; transformers has a cache of its own kind for these families."""
        return any(sublayer.decays for block in self.blocks for sublayer in block.sublayers)

    @property
    def banks(self) -> dict[str, ExpertBank]:
        """Plan name of a stacked expert projection → its bank."""
        return {name: bank for block in self.blocks if (bank := block.bank) is not None for name in bank.names}

    @property
    def kept_rows(self) -> dict[str, int]:
        """Plan name → rows at the end of a linear that stay dense, where there are any."""
        return {view.name: view.kept_rows for b in self.blocks for view in b.linears() if view.kept_rows}

    def quantizable(self) -> Iterator[tuple[str, Role, tuple[int, ...], int]]:
        """Yield ``(plan name, role, canonical shape, block index)`` of every quantizable weight."""
        for block in self.blocks:
            for linear in block.linears():
                yield linear.name, linear.role, (linear.out_features, linear.in_features), block.index
            bank = block.bank
            if bank is not None:
                yield from ((name, Role.EXPERTS, bank.shape(name), block.index) for name in bank.names)
