"""The native engine of Mamba-2: a token of many sequences, or a prompt, is one call.

The same interface as :class:`~llmcompress.inference.engine.Engine`, but a sequence holds a state of fixed size instead
of keys and values: low-bit codes where the model's states are quantized, floats where they are not. transformers'
modules on our operators give the same codes and tokens (``tests/unit/inference/test_recurrent.py``); there Python takes
most of the time of a small model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import mamba2 as native
from llmcompress_kernels.cpu_state import CONV_WIDTH, MAX_WINDOW
from llmcompress_kernels.decode import INT8_PLANES
from llmcompress_kernels.matrix import Matrix, dense
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.inference.decoder import linear_matrix, packed_matrix, rounded_matrix
from llmcompress.inference.engine import decline_anywhere, planes_of, refuse
from llmcompress.nn.embedding import PackedEmbedding, PackedHead, TiedHead
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.mixers import runtime_of
from llmcompress.nn.packed import PackedTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.nn.states import StateQuantizer

FAMILIES = ("mamba2",)


def decline(model: PreTrainedModel) -> str | None:
    """Why the engine cannot run a model, None if it can.

    Args:
        model: A causal language model, dense or packed.
    """
    config = model.config
    reason = decline_anywhere(model, config, FAMILIES) or _decline_config(config)
    reason = reason or _decline_states(model) or _decline_modules(model)
    return reason or native.unavailable()


def _decline_config(config: Any) -> str | None:
    inner = config.num_heads * config.head_dim
    if config.conv_kernel != CONV_WIDTH:
        return f"a convolution of {config.conv_kernel} tokens, not {CONV_WIDTH}"
    if config.state_size not in native.STATES or config.head_dim % LANES != 0 or config.head_dim > 256:
        return f"no kernel for states of {config.head_dim} channels by {config.state_size}"
    if config.hidden_size % LANES != 0 or inner % (config.n_groups * LANES) != 0:
        return f"hidden size {config.hidden_size} or groups of {inner} / {config.n_groups} channels do not fill vectors"
    return None


def _decline_states(model: PreTrainedModel) -> str | None:
    runtime = runtime_of(model)
    if runtime is None:
        return None
    if runtime.resting or runtime.recurrent or not runtime.packed:
        return "states are being evaluated"
    for name, quantizer in runtime.quantizers.items():
        spec = quantizer.spec
        if not (quantizer.has_kernel and quantizer.one_width):
            return f"{name}: no kernel for states of codec {spec.codec} as it is set, or of several widths"
        if quantizer.window > MAX_WINDOW:
            return f"{name}: a replay window of {quantizer.window} tokens, more than {MAX_WINDOW}"
    kinds = {(q.spec, q.static is None, q.window) for q in runtime.quantizers.values()}
    return "the states of its layers are stored in different ways" if len(kinds) > 1 else None


def _decline_modules(model: PreTrainedModel) -> str | None:
    heads = model.config.num_heads
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"{name or 'the model'} is offloaded by accelerate"
        if module._forward_pre_hooks or module._forward_hooks:
            return f"{name or 'the model'} has hooks (activations rounded per token, or somebody who looks on)"
        if name.endswith("_proj") and not isinstance(module, nn.Linear | PackedLinear):
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, PackedTensors):
            spec = module.spec
            reason = cpu.declines(spec.bits, module.columns_per_group, LANES, module.shape[-1])
            if reason is not None or spec.dense_rows not in (0, heads if name.endswith("in_proj") else 0):
                return f"{name}: {reason or f'{spec.dense_rows} of its rows are dense'}"
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for end in ends:
        if type(end) not in (nn.Embedding, nn.Linear, PackedEmbedding, PackedHead, TiedHead):
            return f"embedding or head is a {type(end).__name__}"
    return None


class RecurrentEngine:
    """A Mamba-2 model ready to decode natively.

    Args:
        model: A causal language model for which :func:`decline` returns None.
        slots: Sequences that are held; a step takes up to ``max_batch`` of them.
        positions: Of no effect: a state does not grow.
        int8_activations: Round the inputs of all packed weights to 8 bits per 64 columns; those that the model itself
            rounds so need not be asked for.
        head_bits: 8 quantizes a dense output head to 8 bits by rounding to nearest, groups of 64: not exact.
        threads: torch's by default.

    Raises:
        InputError: The model is declined.

    Attributes:
        lengths: Tokens that each sequence has taken.
        states: What the sequences hold.
    """

    max_batch = native.MAX_BATCH
    # see Engine. A state stands at one length only, and going on from a rounded one is not what a prompt is defined as
    piece = native.CUT
    keeps_prefixes = False

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
        """V."""
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
            member: Of a family; there are none.
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
    config: Any = model.config
    base: Any = model.base_model
    runtime = runtime_of(model)
    quantizers = {q.layer: q for q in runtime.quantizers.values()} if runtime is not None else {}
    exact = planes_of(model, int8_activations=False)
    layers = [_layer(block, quantizers.get(i), exact, int8_activations) for i, block in enumerate(base.layers)]
    words: Any = model.get_input_embeddings()
    embedding = _rows(words)
    first, mixer = quantizers.get(0), base.layers[0].mixer
    return native.Model(
        layers=layers,
        final_norm=_float(base.norm_f.weight),
        embedding=embedding,
        head=_head(model, words, embedding, head_bits),
        vocabulary=int(config.vocab_size),
        heads=config.num_heads,
        channels=config.head_dim,
        states=config.state_size,
        groups=config.n_groups,
        bits=0 if first is None else first.spec.bits,
        refit=first is not None and first.spec.refit,
        epsilon=base.layers[0].norm.variance_epsilon,
        gate_epsilon=mixer.norm.variance_epsilon,
        limits=tuple(mixer.time_step_limit),
        head_planes=exact,
        dither=first is not None and first.spec.dither,
        window=1 if first is None else first.window,
    )


def _float(tensor: Any) -> Tensor:
    found: Tensor = tensor.detach().float().contiguous()
    return found


def _layer(block: Any, quantizer: StateQuantizer | None, exact: int, int8: bool) -> native.Layer:
    mixer = block.mixer
    in_proj, times = _in_proj(mixer.in_proj, mixer.num_heads)
    out: Any = mixer.out_proj
    return native.Layer(
        norm=_float(block.norm.weight),
        in_proj=in_proj,
        dt_proj=times,
        out_proj=linear_matrix(out),
        conv_weight=_float(mixer.conv1d.weight[:, 0]),
        conv_bias=None if mixer.conv1d.bias is None else _float(mixer.conv1d.bias),
        dt_bias=_float(mixer.dt_bias),
        a=-_float(mixer.A_log).exp(),
        d=_float(mixer.D),
        gain=_float(mixer.norm.weight),
        fixed=None if quantizer is None else quantizer.static,
        in_planes=_planes(mixer.in_proj, exact, int8),
        out_planes=_planes(out, exact, int8),
    )


def _planes(module: Any, exact: int, int8: bool) -> int:
    return INT8_PLANES if int8 or getattr(module, "int8_activations", False) else exact


def _in_proj(module: Any, heads: int) -> tuple[Matrix, Matrix | None]:
    """The projection, and its rows of time steps by themselves where they stay dense beside packed ones."""
    times = module._buffers.get("weight_dense") if isinstance(module, PackedLinear) else None
    if times is None:
        return linear_matrix(module), None
    module.prepare()
    bias = module.bias
    parts = (None, None) if bias is None else (bias[:-heads], bias[-heads:])
    return packed_matrix(module, slice(None), parts[0]), dense(times.detach(), parts[1])


def _rows(module: Any) -> Matrix:
    """An embedding, dense or packed."""
    if not isinstance(module, PackedTensors):
        return dense(module.weight.detach())
    module.prepare()
    return packed_matrix(module, slice(None))


def _head(model: PreTrainedModel, words: Any, embedding: Matrix, bits: int | None) -> Matrix:
    last: Any = model.get_output_embeddings()
    if isinstance(last, TiedHead):
        return embedding
    if isinstance(last, PackedHead):
        last.prepare()
        return packed_matrix(last, slice(None), last.bias)
    if bits is not None:
        return rounded_matrix(last.weight.detach(), bits)
    tied = not isinstance(words, PackedTensors) and last.weight.data_ptr() == words.weight.data_ptr()
    return embedding if tied and last.bias is None else dense(last.weight.detach(), last.bias)
