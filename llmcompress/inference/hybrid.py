"""The native engine of hybrids: attention, Mamba-2, Mamba-1 or convolutions, and experts, one call a token or a prompt.

Layers with attention keep keys and values, layers with a mixer a state of fixed size, in low-bit codes where the
model's states are quantized, short convolutions their last inputs. The decode step computes everything but the mixers;
these are layers of the recurrent engine, which every thread of the step enters in its turn. transformers' modules on
our operators give the same codes and tokens (``tests/unit/inference/test_hybrid.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import mamba1, mamba2, matrix
from llmcompress_kernels.decode_delta import blocked
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.inference import recurrent
from llmcompress.inference.attention import heads_of
from llmcompress.inference.caches import Snapshot, arguments, prompt_cache, rule_left
from llmcompress.inference.coverage import HYBRIDS, decline_config
from llmcompress.inference.decoder import (
    assembled,
    ends_of,
    experts_of,
    final_norm_of,
    mlp_parts,
    number_of,
    routing_of,
)
from llmcompress.inference.engine import Engine, decline_anywhere, decline_module, decline_rest
from llmcompress.inference.weights import linear_matrix, linear_parts, norm_of
from llmcompress.models.layout import Block, ExpertBank, ModelLayout, Sublayer
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.tree_linear import TreeLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decline(model: PreTrainedModel) -> str | None:
    """Why the engine cannot run a model, None if it can.

    Args:
        model: A causal language model, dense or packed.
    """
    config: Any = model.config
    reason = decline_anywhere(model, config, HYBRIDS) or decline_config(config.to_dict())
    if reason is not None:
        return reason
    layout = layout_from_config(config.to_dict())
    reason = (
        _decline_layout(layout, getattr(config, "mamba_dt_rank", 0))
        or recurrent.decline_states(model)
        or _decline_modules(model, layout)
    )
    scans = any(block.scan is not None for block in layout.blocks)
    return reason or native.unavailable() or (mamba2.unavailable() if scans else None)


def _decline_layout(layout: ModelLayout, rank: Any) -> str | None:
    kinds = [(sublayer.kind, sublayer.scan) for block in layout.blocks for sublayer in block.sublayers]
    if not any(kind == "attention" for kind, _ in kinds):
        return "none of its layers has attention"
    if ("ssm", None) in kinds and layout.hidden % LANES != 0:
        return f"a convolution of {layout.hidden} channels, which do not fill vectors"
    views = {block.scan.module: block.scan for block in layout.blocks if block.scan is not None}
    for name, view in views.items():
        reason = recurrent.decline_scan(view, layout.hidden, rank)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _decline_modules(model: PreTrainedModel, layout: ModelLayout) -> str | None:
    heads = {f"{b.scan.module}.in_proj": b.scan.heads for b in layout.blocks if b.scan is not None}
    for name, module in model.named_modules():
        reason = decline_module(name, module, heads.get(name, 0))
        if reason is not None or isinstance(module, TreeLinear):
            return f"{name or 'the model'}{reason or ' is a TreeLinear'}"
    return decline_rest(model)


class HybridEngine(Engine):
    """A hybrid ready to decode natively; arguments and attributes are those of :class:`Engine`.

    Attributes:
        mixer_weights: Weights of the layers with a mixer, None where all have attention.
        states: What these keep of the sequences, None likewise.
        blocks: The model's layer that each of the decoder's belongs to.
    """

    # a prompt is scanned in float, so it cannot go by steps, which round states
    most_by_steps = 0
    least_at_once = 1
    whole = "it counts over the whole prompt, or transformers' modules read it: its weights are not packed"
    keeps_prefixes = False

    mixer_weights: mamba2.Model | None = None
    states: mamba2.States | None = None
    # the slot of a prompt that goes on, and its tokens so far
    _reading: tuple[int, int] | None = None

    _declines = staticmethod(decline)

    def _weights(self, int8_activations: bool, head_bits: int | None) -> native.Decoder:
        model = self.model
        layout = layout_from_config(model.config.to_dict())
        self.mixer_weights = _mixers(model, layout, int8_activations)
        self.blocks = [block.index for block in layout.blocks for _ in _parts(block)]
        return decoder_of(model, layout, head_bits)

    def reserve(self, positions: int, slots: int = 1) -> None:
        """Make room; what sequences hold stays. Arguments and errors as of :meth:`Engine.reserve`."""
        super().reserve(positions, slots)
        held, weights = self.states, self.mixer_weights
        if weights is None or (held is not None and held.slots >= self.slots):
            return
        self.states = mamba2.States(weights, self.slots)
        if held is not None:
            self.states.take(held)
        self.mixers = mamba2.mixers(weights, self.states)

    @property
    def piece(self) -> int | None:
        """See :attr:`Engine.piece`; parts are such that no bit changes."""
        return mamba2.CUT if self.decoder.takes_prompts and super().piece is not None else None

    def prompt(
        self, slot: int, tokens: Sequence[int], member: str | None = None, start: int = 0, last: bool = True
    ) -> Tensor:
        """Start a sequence, or go on with the prompt of the one that was started last; see :meth:`Engine.prompt`.

        Raises:
            InputError: As there, or not the prompt that is being read.
        """
        if start and self._reading != (slot, start):
            raise InputError(f"sequence {slot} cannot go on from token {start}: its state is not at hand")
        self._reading = None
        logits = super().prompt(slot, tokens, member, start, last)
        if not last:
            self._reading = (slot, self.lengths[slot])
        return logits

    @property
    def keeps_snapshots(self) -> bool:  # type: ignore[override]
        """Whether prompts are read in parts, between which :meth:`snapshot` tells what they left."""
        return self.piece is not None

    def snapshot(self, slot: int) -> Snapshot:
        """See :meth:`RecurrentEngine.snapshot`, keys and values included."""
        if self._reading is None or self._reading[0] != slot:
            raise InputError(f"sequence {slot} is not being read", "take a snapshot between parts of its prompt")
        count = self.lengths[slot]
        kept = None if self.mixer_weights is None else mamba2.carried(self.mixer_weights)
        fixed = (part.clone() for part in (self.cache.inputs[:, slot], self.cache.reading(slot)))
        return Snapshot(count, kept, *self.cache.part(slot, count), *fixed)

    def resume(self, slot: int, snapshot: Snapshot) -> None:
        """See :meth:`RecurrentEngine.resume`.

        Raises:
            InputError: There is no room.
        """
        self._check(slot, snapshot.count, 0)
        if self.mixer_weights is not None and snapshot.carried is not None:
            mamba2.carry(self.mixer_weights, snapshot.carried)
        assert snapshot.keys is not None
        assert snapshot.values is not None
        assert snapshot.inputs is not None
        assert snapshot.states is not None
        self.cache.put(slot, snapshot.keys, snapshot.values)
        self.cache.inputs[:, slot] = snapshot.inputs
        self.cache.reading(slot).copy_(snapshot.states)
        self.lengths[slot], self._reading = snapshot.count, (slot, snapshot.count)

    def snapshot_bytes(self, tokens: int) -> int:
        """Bytes of a snapshot of this many tokens."""
        weights = self.mixer_weights
        cache = self.cache
        low = 0 if cache.low is None else cache.reading_bytes - cache.low.nbytes // self.slots
        return cache.held_bytes(tokens) + low + (0 if weights is None else weights.carried_bytes)

    def copy(self, source: int, target: int, count: int) -> None:
        """Never possible: a state cannot be cut short."""
        raise InputError("a state cannot be cut short", "read the whole prompt")

    def _prompt_by_modules(self, slot: int, tokens: Sequence[int], start: int = 0) -> Tensor:
        assert start == 0
        held = prompt_cache(self.model)
        with torch.inference_mode():
            out: Any = self.model(
                input_ids=torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1,
                **arguments(self.model, held, torch.arange(len(tokens))[None]),
            )  # fmt: skip
            both = list(zip(self.decoder.layers, self.blocks))
            for index, kept in enumerate(held.layers[block] for layer, block in both if layer.attends):
                self.cache.fill(index, slot, 0, kept.keys[0], kept.values[0])
            for index, kept in enumerate(held.layers[block] for layer, block in both if layer.mixes):
                self._adopt(index, slot, kept)
            for index, (layer, block) in enumerate((layer, block) for layer, block in both if layer.convolves):
                inputs, state = rule_left(held, block)
                if inputs is not None:
                    self.cache.inputs[index, slot] = inputs[1:]
                if layer.delta is not None:
                    self._adopt_rule(index, slot, state)
        self.lengths[slot] = len(tokens)
        return out.logits[0, -1].float()

    def _adopt_rule(self, index: int, slot: int, state: Any) -> None:
        """Likewise of a layer with a delta rule: a tensor, or a packed state."""
        if self.cache.low is None:
            self.cache.states[index, slot] = blocked(state[0])
            return
        channel = None if state.channel is None else state.channel[0]
        self.cache.low.fill(index, slot, state.codes[0][0], channel, state.state[0])

    def _adopt(self, index: int, slot: int, kept: Any) -> None:
        """Store what transformers' cache keeps of a layer with a mixer after a prompt."""
        states, state = self.states, kept.recurrent_states[0]
        assert states is not None
        states.conv[index, slot] = kept.conv_states[0][0]
        if states.floats is not None:
            assert self.mixer_weights is not None
            states.floats[index, slot] = mamba1.blocked(state[0]) if self.mixer_weights.rank else state[0]
            return
        assert states.codes is not None
        assert states.scale is not None
        states.codes[index, slot], states.scale[index, slot] = state.codes[0][0], state.state[0]
        if states.channel is not None:
            states.channel[index, slot] = state.channel[0]
        if states.count is not None:
            states.count[slot] = 0

    def held_bytes(self, slots: Sequence[int]) -> int:
        """Bytes of the positions that these sequences use, and of their states."""
        states = 0 if self.states is None else self.states.nbytes // self.slots * len(slots)
        return super().held_bytes(slots) + states

    @property
    def reserved_bytes(self) -> int:
        """Bytes of keys, values and states of all slots, used or not."""
        return super().reserved_bytes + (0 if self.states is None else self.states.nbytes)

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step of all slots reads at most."""
        return super().step_bytes + (0 if self.mixer_weights is None else self.mixer_weights.step_bytes())


def decoder_of(model: PreTrainedModel, layout: ModelLayout, head_bits: int | None = None) -> native.Decoder:
    """A hybrid's weights in the decode step's layout, but those of its mixers.

    Args:
        model: A model that is not declined.
        layout: Its layout.
        head_bits: See :class:`~llmcompress.inference.engine.Engine`.

    Returns:
        The decoder, without rotary tables. The model's factor of its logits is in the last norm.
    """
    config: Any = model.config
    ends = ends_of(model.get_input_embeddings(), model.get_output_embeddings(), head_bits)
    attention = next(s for block in layout.blocks for s in block.sublayers if s.kind == "attention")
    final = final_norm_of(model)
    layers = [_layer(model, block, part) for block in layout.blocks for part in _parts(block)]
    factor, scale = (number_of(config, f"{end}_multiplier") for end in ("lm_head", "embedding"))
    last = norm_of(final) * factor, norm_of(final, "bias")
    module, routing = model.get_submodule(attention.module), routing_of(model, layout)
    adds = number_of(config, "residual_multiplier")
    return assembled(config, layers, last, module, [ends], routing, scales=(scale, adds))


_NO_ADAPTERS: Mapping[str, tuple[Any, Any]] = {}
# fields that a layer may lack and that have no defaults
_HALVES = ("attention_norm", "mlp_norm", "query", "key", "value", "output", "gate", "up", "down")


def _parts(block: Block) -> list[list[Sublayer]]:
    """Sublayers of a block by the layers that a decoder has for it: those that lay aside what they say are one."""
    laid = [sublayer for sublayer in block.sublayers if sublayer.writes == "aside"]
    rest = [sublayer for sublayer in block.sublayers if sublayer.writes != "aside"]
    return [part for part in (laid, rest) if part]


def _layer(model: PreTrainedModel, block: Block, sublayers: Sequence[Sublayer]) -> native.Layer:
    given: dict[str, Any] = dict.fromkeys(_HALVES)
    for sublayer in sublayers:
        module: Any = model.get_submodule(sublayer.module)
        norm: Any = None if sublayer.pre_norm is None else model.get_submodule(sublayer.pre_norm)
        if sublayer.kind == "attention":
            factor = float(getattr(model.config, "attention_in_multiplier", 1.0))
            own = _attention(model, module, _adapters(model, sublayer))
            given |= {"attention_norm": norm_of(norm) * factor, **own}
        elif sublayer.scan is not None:
            given |= {"mixes": True, "reads_aside": sublayer.reads == "hidden+aside"}
        elif sublayer.writes == "aside" and norm is None:
            given["aside"] = linear_matrix(module)
        elif sublayer.kind == "ssm":
            given |= {"attention_norm": norm_of(norm), **_convolution(module)}
        elif sublayer.experts is not None:
            given |= {"mlp_norm": norm_of(norm), **_experts(model, sublayer.experts)}
            if sublayer.groups:
                given |= _mlp(model.get_submodule(sublayer.groups[0].module), "shared_")
            if sublayer.experts.entry is not None:
                both = module.fc1_latent_proj, module.fc2_latent_proj
                given |= zip(("entry", "exit"), map(linear_matrix, both))
        else:
            # without experts the MLP beside them is the layer's own
            prefix = "" if block.bank is None else "shared_"
            given |= {"mlp_norm": norm_of(norm), **_mlp(module, prefix, _adapters(model, sublayer))}
    return native.Layer(**given)


def _adapters(model: PreTrainedModel, sublayer: Sublayer) -> dict[str, tuple[Any, Any]]:
    """Both linears of the adapters that a block uses of a shared module, by the names of their lists (Zamba2)."""
    found: dict[str, tuple[Any, Any]] = {}
    for view in (view for group in sublayer.groups for view in group.linears):
        stem, _, _ = view.name.rpartition(".")
        name = stem.rpartition("_adapter_list.")[0].rpartition(".")[2]
        if name:
            first, second = (model.get_submodule(f"{stem}.{place}") for place in range(2))
            found[name] = first, second
    return found


def _attention(model: PreTrainedModel, module: Any, adapters: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What attention has, by the names of :class:`~llmcompress_kernels.decode.Layer`; likewise the functions below."""
    last = module.o_proj if hasattr(module, "o_proj") else module.out_proj
    projections = {name: linear_matrix(getattr(module, f"{name[0]}_proj")) for name in ("query", "key", "value")}
    norms: dict[str, Any] = {
        f"{name}_norm": norm_of(getattr(module, f"{name[0]}_layernorm", None)) for name in ("query", "key")
    }
    norms["heads"] = heads_of(module, model.config)
    for name, plain in projections.items():
        if f"linear_{name[0]}" in adapters:
            low, high = (linear_matrix(part) for part in adapters[f"linear_{name[0]}"])
            projections[name] = matrix.adapted(plain, low, high)
    projections["key"] = matrix.times(projections["key"], getattr(module, "key_multiplier", 1.0))
    factor = getattr(model.config, "attention_out_multiplier", 1.0)
    return {**projections, **norms, "output": matrix.times(linear_matrix(last), factor)}


def _convolution(module: Any) -> dict[str, Any]:
    taps, bias = module.conv.weight.detach()[:, 0], module.conv.bias
    return {
        "conv_in": linear_matrix(module.in_proj),
        "conv_weight": taps.float().mT.contiguous(),
        "conv_bias": None if bias is None else bias.detach().float().contiguous(),
        "output": linear_matrix(module.out_proj),
    }


def _mlp(module: Any, prefix: str, adapters: Mapping[str, tuple[Any, Any]] = _NO_ADAPTERS) -> dict[str, Any]:
    gate, up, down = mlp_parts(module)
    if "gate_up_proj" in adapters:
        assert up is not None
        first, second = adapters["gate_up_proj"]
        # one matrix for both, which the engine multiplies once
        low, of_gate, of_up = linear_matrix(first), *linear_parts(second, [gate.rows, up.rows])
        gate, up = (matrix.adapted(side, low, own) for side, own in ((gate, of_gate), (up, of_up)))
    gate = matrix.times(gate, getattr(module, "gate_multiplier", 1.0))
    down = matrix.times(down, getattr(module, "down_multiplier", 1.0))
    return {f"{prefix}gate": gate, f"{prefix}up": up, f"{prefix}down": down}


def _experts(model: PreTrainedModel, bank: ExpertBank) -> dict[str, Any]:
    decides = Router(model, bank.router)
    weight: Any = decides.module.weight
    correction = decides.rule(bank.top_k).correction
    return {
        **dict(zip(("gate", "up", "down"), experts_of(model.get_submodule(bank.module), bank))),
        "router": matrix.dense(weight.detach()),
        "router_correction": None if correction is None else correction.detach().float().contiguous(),
    }


def _mixers(model: PreTrainedModel, layout: ModelLayout, int8_activations: bool) -> mamba2.Model | None:
    sublayers = [sublayer for block in layout.blocks for sublayer in block.sublayers]
    views = [(sublayer.pre_norm, sublayer.scan) for sublayer in sublayers if sublayer.scan is not None]
    if not views:
        return None
    parts = [(model.get_submodule(str(norm)), model.get_submodule(view.module)) for norm, view in views]
    last: Any = model.get_submodule(str(views[0][0]))
    return recurrent.mixers_of(model, views[0][1], parts, int8_activations, final_norm=norm_of(last))
