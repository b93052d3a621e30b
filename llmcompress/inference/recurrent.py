"""The native engine of Mamba-2, Mamba and Falcon Mamba: a token of many sequences, or a prompt, is one call.

The same interface as :class:`~llmcompress.inference.engine.Engine`, but a sequence holds a state of fixed size instead
of keys and values: low-bit codes where the model's states are quantized, floats where they are not. transformers'
modules on our operators give the same codes and tokens (``tests/unit/inference/test_recurrent.py``); there Python takes
most of the time of a small model.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import mamba1
from llmcompress_kernels import mamba2 as native
from llmcompress_kernels.cpu_state import CONV_WIDTH, MAX_WINDOW
from llmcompress_kernels.decode import INT8_PLANES
from llmcompress_kernels.matrix import Matrix, dense, times
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.inference.caches import Snapshot
from llmcompress.inference.coverage import STATES
from llmcompress.inference.decoder import ends_of, linear_matrix, norm_of, packed_matrix
from llmcompress.inference.engine import HOOKED, decline_anywhere, decline_ends, decline_module, planes_of, refuse
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.mixers import runtime_of
from llmcompress.nn.tree_linear import TreeLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.layout import ModelLayout, ScanView
    from llmcompress.nn.states import StateQuantizer


def decline(model: PreTrainedModel) -> str | None:
    """Why the engine cannot run a model, None if it can.

    Args:
        model: A causal language model, dense or packed.
    """
    config = model.config
    reason = decline_anywhere(model, config, STATES)
    if reason is None:
        layout = layout_from_config(config.to_dict())
        view = _views(layout)[0]
        reason = decline_scan(view, layout.hidden, getattr(config, "time_step_rank", 0))
    reason = reason or decline_states(model) or _decline_modules(model)
    return reason or native.unavailable()


def _views(layout: ModelLayout) -> list[ScanView]:
    return [block.scan for block in layout.blocks if block.scan is not None]


def decline_scan(view: ScanView, hidden: int, rank: Any = 0) -> str | None:
    """Why there are no kernels for a mixer of this size between hidden states of this width.

    Args:
        view: Its sizes.
        hidden: D.
        rank: Rank of Mamba-1's time steps.
    """
    inner = view.heads * view.channels
    if view.conv_width != CONV_WIDTH:
        return f"a convolution of {view.conv_width} tokens, not {CONV_WIDTH}"
    if view.kind == "mamba1":
        known = view.states == mamba1.STATES and view.channels <= mamba1.MOST_CHANNELS
    else:
        known = view.states in native.STATES and view.channels <= 256
    if not known or view.channels % LANES != 0:
        return f"no kernel for states of {view.channels} channels by {view.states}"
    if view.kind == "mamba1" and int(rank) % LANES != 0:
        return f"time steps of rank {rank} do not fill vectors"
    if hidden % LANES != 0 or inner % (view.groups * LANES) != 0:
        return f"hidden size {hidden} or groups of {inner} / {view.groups} channels do not fill vectors"
    return None


def decline_states(model: PreTrainedModel) -> str | None:
    """Why a model's states, as they are stored, cannot be those of an engine."""
    runtime = runtime_of(model)
    if runtime is None:
        return None
    if runtime.resting or runtime.recurrent or not runtime.packed:
        return "states are being evaluated"
    for name, quantizer in runtime.quantizers.items():
        spec = quantizer.spec
        # has_kernel speaks of the operators, which Mamba-1 has none of
        known = spec.has_kernel if quantizer.scan.kind == "mamba1" else quantizer.has_kernel
        if not (known and quantizer.one_width):
            return f"{name}: no kernel for states of codec {spec.codec} as it is set, or of several widths"
        if quantizer.window > MAX_WINDOW:
            return f"{name}: a replay window of {quantizer.window} tokens, more than {MAX_WINDOW}"
    kinds = {(q.spec, q.static is None, q.window) for q in runtime.quantizers.values()}
    return "the states of its layers are stored in different ways" if len(kinds) > 1 else None


def _decline_modules(model: PreTrainedModel) -> str | None:
    heads = getattr(model.config, "num_heads", 0)
    for name, module in model.named_modules():
        reason = decline_module(name, module, heads if name.endswith("in_proj") else 0)
        # of modules that are no projections too: between them is what the step computes by itself
        if reason is None and (module._forward_pre_hooks or module._forward_hooks):
            reason = HOOKED
        if reason is not None or isinstance(module, TreeLinear):
            return f"{name or 'the model'}{reason or ' is a TreeLinear'}"
    return decline_ends(model)


class RecurrentEngine:
    """A model of states ready to decode natively.

    Args:
        model: A causal language model for which :func:`decline` returns None.
        slots: Sequences that are held; a step takes up to ``max_batch`` of them.
        positions: Of no effect: a state does not grow.
        int8_activations: Round the inputs of all packed weights to 8 bits per 64 columns; those that the model itself
            rounds so need not be asked for.
        head_bits: 8 quantizes a dense output head to 8 bits by rounding to nearest, groups of 64: not exact.
        threads: torch's by default, but no more than the machine has.

    Raises:
        InputError: The model is declined.

    Attributes:
        lengths: Tokens that each sequence has taken.
        states: What the sequences hold.
    """

    max_batch = native.MAX_BATCH
    # see Engine. A state stands at one length only, and going on from a rounded one is not what a prompt is defined as:
    # prompts go on from snapshots, which hold states in float
    piece = native.CUT
    keeps_prefixes = False
    keeps_snapshots = True

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 1,
        positions: int = 0,
        int8_activations: bool = False,
        head_bits: int | None = None,
        threads: int | None = None,
    ) -> None:
        refuse(decline(model))
        self.model = model
        self.threads = threads
        with torch.inference_mode():
            self.weights = weights_of(model, int8_activations, head_bits)
        self._logits = self.weights.logits(1)
        # the slot of a prompt that goes on, and its tokens so far
        self._reading: tuple[int, int] | None = None
        self.slots = 0
        self.states: native.States
        self.reserve(positions, slots)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, V."""
        return self.weights.vocabulary

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step reads."""
        return self.weights.step_bytes()

    def reserve(self, positions: int, slots: int = 1) -> None:
        """Make room for sequences; forgets what is held if that needs more.

        Args:
            positions: Of no effect.
            slots: Sequences.

        Raises:
            InputError: No sequences.
        """
        if slots < 1:
            raise InputError(f"{slots} sequences: the native engine takes one or more")
        if slots <= self.slots:
            return
        self.slots, self._reading = slots, None
        self.lengths = [0] * slots
        self.states = native.States(self.weights, slots)

    def prompt(
        self, slot: int, tokens: Sequence[int], member: str | None = None, start: int = 0, last: bool = True
    ) -> Tensor:
        """Start a sequence, or go on with the prompt of the one that was started last.

        Args:
            slot: Which one; what it held is replaced.
            tokens: The prompt from ``start`` on, at least one token.
            member: Member of a family; there are none.
            start: Tokens of the prompt so far, a multiple of :attr:`piece`.
            last: Whether the prompt ends here. Until then steps of others are possible, but no other prompt.

        Returns:
            Logits float32 ``[V]`` after the last token; ``[0]`` where the prompt goes on.

        Raises:
            InputError: No such sequence, no tokens, or not the prompt that is being read.
        """
        if not 0 <= slot < self.slots or len(tokens) == 0:
            raise InputError(f"sequence {slot} of {self.slots} with {len(tokens)} tokens")
        if start and self._reading != (slot, start):
            raise InputError(f"sequence {slot} cannot go on from token {start}: its state is not at hand")
        logits = self.weights.logits(1)
        # torch.tensor takes a list number by number, at 2 % of a small model's prompt
        ids = torch.frombuffer(array("q", tokens), dtype=torch.int64)
        self._reading = None
        native.prompt(self.weights, self.states, slot, ids, logits, self.threads, first=start == 0, last=last)
        self.lengths[slot] = start + len(tokens)
        if last:
            return logits[0, : self.vocabulary]
        self._reading = (slot, self.lengths[slot])
        return logits[0, :0]

    def reusable(self, slot: int, count: int) -> bool:
        """Never: :attr:`keeps_prefixes`."""
        return False

    def snapshot(self, slot: int) -> Snapshot:
        """What a prompt has left that is being read, between two of its parts.

        Args:
            slot: Which sequence's.

        Raises:
            InputError: It is not being read.
        """
        if self._reading is None or self._reading[0] != slot:
            raise InputError(f"sequence {slot} is not being read", "take a snapshot between parts of its prompt")
        return Snapshot(self.lengths[slot], native.carried(self.weights))

    def resume(self, slot: int, snapshot: Snapshot) -> None:
        """Let a sequence begin with the tokens of a snapshot; :meth:`prompt` goes on from there.

        Args:
            slot: What it held is replaced once its prompt ends.
            snapshot: Snapshot of this engine.
        """
        assert snapshot.carried is not None
        native.carry(self.weights, snapshot.carried)
        self.lengths[slot] = snapshot.count
        self._reading = (slot, snapshot.count)

    def snapshot_bytes(self, tokens: int) -> int:
        """Bytes of a snapshot, however many tokens it is of."""
        return self.weights.carried_bytes

    def copy(self, source: int, target: int, count: int) -> None:
        """Never possible: :attr:`keeps_prefixes`."""
        raise InputError("a state cannot be cut short", "read the whole prompt")

    def step(self, tokens: Tensor, slots: Sequence[int] | None = None, best: Tensor | None = None) -> Tensor:
        """Append one token to every sequence.

        Args:
            tokens: int64 ``[B]``, at most ``max_batch``.
            slots: Which sequences, all in order by default.
            best: int64 ``[B]``, filled with the index of each largest logit.

        Returns:
            Logits float32 ``[B, V]``; overwritten by the next call.
        """
        which = list(range(self.slots) if slots is None else slots)
        if self._logits.shape[0] < len(which):
            self._logits = self.weights.logits(len(which))
        chosen = torch.tensor(which, dtype=torch.int32)
        native.step(self.weights, self.states, tokens, chosen, self._logits, best, self.threads)
        for slot in which:
            self.lengths[slot] += 1
        return self._logits[: len(which), : self.vocabulary]

    def greedy(self, tokens: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """Append one token to every sequence and choose the next.

        Args:
            tokens: int64 ``[B]``.
            slots: Which sequences, all in order by default.

        Returns:
            int64 ``[B]``, the index of the largest logit.
        """
        best = torch.empty_like(tokens)
        self.step(tokens, slots, best)
        return best

    def owner(self, slot: int) -> int:
        """Place of a sequence's member in a family: there is none."""
        return 0

    def held_bytes(self, slots: Sequence[int]) -> int:
        """Bytes of the states of these sequences, the tokens of their replay windows included."""
        return self.states.nbytes // self.slots * len(slots)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the states of all slots, used or not."""
        return self.states.nbytes

    def profile(self, tokens: Tensor, repeats: int = 16) -> dict[str, float]:
        """Seconds per step by phase, of the first thread, over ``repeats`` steps of the first sequences, which go on.

        Args:
            tokens: int64 ``[B]``.
            repeats: Steps.
        """
        seconds = torch.zeros(len(native.PHASES), dtype=torch.float64)
        count = tokens.shape[0]
        logits, best = self.weights.logits(count), torch.empty_like(tokens)
        which = torch.arange(count, dtype=torch.int32)
        for _ in range(repeats):
            native.step(self.weights, self.states, tokens, which, logits, best, self.threads, seconds)
        return dict(zip(native.PHASES, (seconds / repeats).tolist()))


def weights_of(model: PreTrainedModel, int8_activations: bool = False, head_bits: int | None = None) -> native.Model:
    """A model's weights as the native step reads them; packed ones are shared with the modules.

    Args:
        model: A model that is not declined.
        int8_activations: See :class:`RecurrentEngine`.
        head_bits: As there.
    """
    base: Any = model.base_model
    embedding, head = ends_of(model.get_input_embeddings(), model.get_output_embeddings(), head_bits)
    return mixers_of(
        model,
        _views(layout_from_config(model.config.to_dict()))[0],
        [(block.norm, block.mixer) for block in base.layers],
        int8_activations,
        final_norm=norm_of(base.norm_f),
        embedding=embedding,
        head=head,
        vocabulary=int(model.config.vocab_size),
    )


@dataclass(frozen=True, slots=True)
class Factors:
    """Constants by which a family multiplies around its mixers (Falcon-H1).

    Attributes:
        inputs: Of what they read.
        projected: float32 ``[I + C + H]``, of what in_proj makes; None for ones.
        outputs: Of what they say.
    """

    inputs: float = 1.0
    projected: Tensor | None = None
    outputs: float = 1.0


def factors_of(model: PreTrainedModel, mixer: Any) -> Factors:
    """Those of a mixer."""
    outputs = float(getattr(model.config, "ssm_out_multiplier", 1.0))
    return Factors(float(getattr(mixer, "ssm_in_multiplier", 1.0)), getattr(mixer, "mup_vector", None), outputs)


def mixers_of(
    model: PreTrainedModel, view: ScanView, parts: Sequence[tuple[Any, Any]], int8_activations: bool,
    final_norm: Tensor, embedding: Matrix | None = None, head: Matrix | None = None, vocabulary: int = 0,
) -> native.Model:  # fmt: skip
    """Mixers as the native step reads them; packed weights are shared with the modules.

    Args:
        model: Model whose mixers they are.
        view: Their sizes, the same of all.
        parts: Norm and mixer of each layer.
        int8_activations: See :class:`RecurrentEngine`.
        final_norm: Final norm of the model, float32 ``[D]``.
        embedding: None where the mixers stand among other layers.
        head: Likewise.
        vocabulary: V, 0 without them.
    """
    runtime = runtime_of(model)
    quantizers = {q.layer: q for q in runtime.quantizers.values()} if runtime is not None else {}
    exact = planes_of(model, int8_activations=False)
    norm, mixer = parts[0]
    first = quantizers.get(mixer.layer_idx)
    per_channel = view.kind == "mamba1"
    return native.Model(
        layers=[
            _layer(n, m, quantizers.get(m.layer_idx), exact, int8_activations, per_channel, factors_of(model, m))
            for n, m in parts
        ],
        final_norm=final_norm,
        embedding=embedding,
        head=head,
        vocabulary=vocabulary,
        heads=view.heads,
        channels=view.channels,
        states=view.states,
        groups=view.groups,
        bits=0 if first is None else first.spec.bits,
        refit=first is not None and first.spec.refit,
        epsilon=norm.variance_epsilon,
        gate_epsilon=_inner_epsilon(mixer) if per_channel else getattr(mixer.norm, "variance_epsilon", 0.0),
        limits=(0.0, math.inf) if per_channel else tuple(mixer.time_step_limit),
        head_planes=exact,
        dither=first is not None and first.spec.dither,
        window=1 if first is None else first.window,
        rank=mixer.time_step_rank if per_channel else 0,
    )


def _inner_epsilon(mixer: Any) -> float:
    """Of the norms of dt, B and C, which Falcon Mamba and Jamba have; negative where there are none."""
    norm = getattr(mixer, "b_layernorm", None)
    return -1.0 if norm is None else float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _inner_gain(mixer: Any) -> Tensor | None:
    """Their weights, None where they have none: Falcon Mamba's are ones of any size that nothing reads."""
    weights = [getattr(mixer, f"{name}_layernorm", None) for name in ("dt", "b", "c")]
    if not all(isinstance(getattr(norm, "weight", None), nn.Parameter) for norm in weights):
        return None
    return torch.cat([norm_of(norm) for norm in weights])


def _float(tensor: Any) -> Tensor:
    found: Tensor = tensor.detach().float().contiguous()
    return found


def _layer(
    norm: Any, mixer: Any, quantizer: StateQuantizer | None, exact: int, int8: bool, per_channel: bool, factors: Factors
) -> native.Layer:
    own = _per_channel(mixer, exact, int8) if per_channel else _per_head(mixer, factors)
    return native.Layer(
        **own,
        norm=norm_of(norm) * factors.inputs,
        out_proj=times(linear_matrix(mixer.out_proj), factors.outputs),
        conv_weight=_float(mixer.conv1d.weight[:, 0]),
        conv_bias=None if mixer.conv1d.bias is None else _float(mixer.conv1d.bias),
        a=-_float(mixer.A_log).exp(),
        d=_float(mixer.D),
        fixed=None if quantizer is None else quantizer.static,
        in_planes=_planes(mixer.in_proj, exact, int8),
        out_planes=_planes(mixer.out_proj, exact, int8),
    )


def _per_head(mixer: Any, factors: Factors) -> dict[str, Any]:
    """What only a Mamba-2 mixer has, by the names of :class:`~llmcompress_kernels.mamba2.Layer`."""
    in_proj, steps = _in_proj(mixer.in_proj, mixer.num_heads)
    if factors.projected is not None:
        rows = factors.projected.detach().float().flatten()
        steps = None if steps is None else times(steps, rows[-mixer.num_heads :])
        in_proj = times(in_proj, rows[: in_proj.rows])
    return {"in_proj": in_proj, "dt_proj": steps, "dt_bias": _float(mixer.dt_bias), "gain": norm_of(mixer.norm)}


def _per_channel(mixer: Any, exact: int, int8: bool) -> dict[str, Any]:
    """The same of a Mamba-1 mixer."""
    steps = mixer.dt_proj
    return {
        "in_proj": linear_matrix(mixer.in_proj),
        "x_proj": linear_matrix(mixer.x_proj),
        "x_planes": _planes(mixer.x_proj, exact, int8),
        "dt_proj": dense(steps.weight.detach()),
        "dt_bias": _float(steps.bias),
        "gain": _inner_gain(mixer),
    }


def _planes(module: Any, exact: int, int8: bool) -> int:
    return INT8_PLANES if int8 or getattr(module, "int8_activations", False) else exact


def _in_proj(module: Any, heads: int) -> tuple[Matrix, Matrix | None]:
    """The projection, and its rows of time steps by themselves where they stay dense beside packed ones."""
    steps = module._buffers.get("weight_dense") if isinstance(module, PackedLinear) else None
    if steps is None:
        return linear_matrix(module), None
    module.prepare()
    bias = module.bias
    parts = (None, None) if bias is None else (bias[:-heads], bias[-heads:])
    return packed_matrix(module, slice(None), parts[0]), dense(steps.detach(), parts[1])
