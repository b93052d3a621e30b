"""The native engine: a loaded model's weights in the decode step's layout, its cache, prompt and token steps.

transformers runs about ten Python modules per layer and token, which alone limits a small model to 55–70 tokens per
second. Here a token is one call, and so is the prompt of a packed model, where an expert-skipping policy (PESF) has its
say between the routers and the experts. Other prompts go through transformers' own forward; what its cache holds is
copied over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import cpu
from llmcompress_kernels import decode as native
from llmcompress_kernels.decode_cache import Cache, cache_for
from llmcompress_kernels.reference.group_gemm import LANES
from llmcompress_kernels.select import VARIABLE
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.inference.attention import query_scales
from llmcompress.inference.caches import arguments
from llmcompress.inference.coverage import (
    FAMILIES,
    INDEXED,
    TWICE,
    activation_of,
    decline_config,
    decline_family,
    reach,
)
from llmcompress.inference.decoder import decoder_of, members_of, position_rows_of, screened
from llmcompress.inference.latent import decline_latent, halves, side_by_side
from llmcompress.inference.rotary import rotary_kinds, rotary_of
from llmcompress.nn.embedding import PackedEmbedding, PackedHead, TiedHead, factor_of
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.tree_linear import BatchRows, PerMember, TreeLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# other prompts of up to this many tokens cost less in steps of eight than one pass through transformers' modules
SHORT_PROMPT = 32
# first projections of delta rules
IN_PROJ = tuple(f".in_proj_{name}" for name in ("qkvz", "qkv", "z", "ba", "b", "a"))
PROJECTIONS = (
    "_proj", "_linear", "_proj_with_mqa", ".c_fc", ".fc1", ".fc2", ".fc_in", ".fc_out", ".dense", ".query_key_value",
    ".output_gate", "_h_to_4h", "_4h_to_h", ".w1", ".w2", ".w3",
)  # fmt: skip
# why a step cannot stand for a module, as what follows its name
HOOKED = " has hooks (activations rounded per token, or somebody who looks on)"


def decline(model: PreTrainedModel) -> str | None:
    """Why the native engine cannot run a model, None if it can.

    Args:
        model: A causal language model, dense or packed.
    """
    config: Any = model.config.get_text_config()
    reason = decline_anywhere(model, config, FAMILIES) or decline_config(config.to_dict()) or _decline_modules(model)
    return reason or native.unavailable()


def decline_anywhere(model: PreTrainedModel, config: Any, families: Sequence[str]) -> str | None:
    """What no native engine can run: another implementation wanted, another device, family or activation."""
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in ("auto", "cpu"):
        return f"{VARIABLE}={wanted}"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}; the native step runs on the CPU"
    return decline_family(config.model_type, activation_of(config.to_dict()), families)


def refuse(reason: str | None) -> None:
    """Say why a model is declined, if it is.

    Raises:
        InputError: It is.
    """
    if reason is not None:
        raise InputError(f"the native engine cannot run this model: {reason}", "use engine=transformers")


def planes_of(model: PreTrainedModel, int8_activations: bool) -> int:
    """Bytes of an activation where the native engines multiply packed weights.

    The engines compute in float32 whatever the model's type is. A number of two bytes is off by at most 2^-14 of the
    largest of its group, one in bf16 by 2^-9 of itself: a 16-bit model loses less here than in its own modules.

    Args:
        model: Model whose type decides.
        int8_activations: One byte in any case.
    """
    if int8_activations:
        return native.INT8_PLANES
    return native.FLOAT32_PLANES if model.dtype == torch.float32 else native.FLOAT16_PLANES


def _decline_modules(model: PreTrainedModel) -> str | None:
    members = len(members_of(model))
    if members > native.MAX_MEMBERS:
        return f"a family of {members} members, of which a node of its trees tells {native.MAX_MEMBERS} apart"
    if members and activation_of(model.config.get_text_config().to_dict()) == "xielu":
        return "members of a family have activations of their own (xielu), of which a step knows one a layer"
    if members and position_rows_of(model) is not None:
        return "members of a family have learned positions of their own, of which a step knows one table"
    for name, module in model.named_modules():
        reason = decline_module(name, module)
        if isinstance(module, TreeLinear) and reason is None:
            reason = _decline_tree(name, module, model.config.get_text_config())
        if reason is not None:
            return f"{name or 'the model'}{reason}"
    return decline_rest(model)


def decline_module(name: str, module: nn.Module, dense_rows: int = 0) -> str | None:
    """Why a step cannot stand for a module, as what follows its name; None if it can.

    Args:
        name: Those of projections end in one of :data:`PROJECTIONS` and :data:`IN_PROJ`.
        module: Any module of the model.
        dense_rows: Rows of a packed projection that may be dense.
    """
    if hasattr(module, "_hf_hook"):
        return " is offloaded by accelerate"
    if name.endswith((*PROJECTIONS, *IN_PROJ)):
        # Nemotron-H has a projection that does nothing
        if not isinstance(module, nn.Linear | PackedLinear | PackedTensors | TreeLinear | nn.Identity):
            return f" is a {type(module).__name__}"
        if module._forward_pre_hooks or module._forward_hooks:
            return HOOKED
    if isinstance(module, PackedTensors):
        spec = module.spec
        reason = cpu.declines(spec.bits, module.columns_per_group, LANES, module.shape[-1])
        if reason is not None or spec.dense_rows not in (0, dense_rows):
            return f": {reason or f'{spec.dense_rows} of its rows are dense'}"
    return decline_latent(name, module)


def decline_rest(model: PreTrainedModel) -> str | None:
    """Why a model's embedding, head or expert-skipping policy are not those of a step."""
    policy = getattr(model, "llmcompress_skipping", None)
    if policy is not None and policy.policy.decode != "off":
        return f"the expert-skipping policy acts while decoding (decode: {policy.policy.decode})"
    return decline_ends(model)


def decline_ends(model: PreTrainedModel) -> str | None:
    """Why a model's embedding and head are not those of an engine: they do more than look up and multiply."""
    known = (nn.Embedding, nn.Linear, PerMember, PackedEmbedding, PackedHead, TiedHead)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if type(end) not in known and factor_of(end) is None:
            return f"embedding or head is a {type(end).__name__}"
    return None


def _decline_tree(name: str, module: TreeLinear, config: Any) -> str | None:
    if not module.prepare():
        return ": the kernels of residual trees do not run here"
    if name.endswith(".query_key_value"):
        return ", whose heads are not cut apart"
    rows = [module.out_features]
    # several in one are cut at whole blocks of rows
    if name.endswith("qkv_proj"):
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        rows.append(config.num_key_value_heads * (module.out_features // heads))
    if name.endswith("gate_up_proj"):
        rows.append(module.out_features // 2)
    for count in rows:
        if count % LANES != 0:
            return f": {count} rows are no multiple of {LANES}"
    return None


def longest(model: PreTrainedModel) -> int | None:
    """Tokens that a sequence may have in the engine, None for any number (:func:`~.coverage.reach`)."""
    config: Any = model.config.get_text_config()
    return reach(config.to_dict())


class Engine:
    """A model ready to decode natively, or several members of a family (`members`), each prompt saying whose it is.

    Args:
        model: A causal language model for which :func:`decline` returns None.
        slots: Sequences in the cache; a step takes up to 8 of them.
        positions: Tokens that a sequence may reach, at most :func:`longest`; the cache grows when :meth:`reserve` asks
            for more.
        cache_dtype: ``torch.float32`` or ``torch.bfloat16``; float32 for a float32 model by default, else bfloat16.
        int8_activations: Round the inputs of all packed weights to 8 bits, 64 columns a scale: faster, not exact.
            Otherwise only those that the model itself rounds; others are taken as exactly as the model's own type holds
            them (:func:`planes_of`).
        head_bits: 8 quantizes the output head to 8 bits by rounding to nearest, groups of 64: not exact either.
        threads: torch's by default, but no more than the machine has.
        screen: Keep an 8-bit copy of a dense head, by which :meth:`greedy` finds the few rows that may hold the largest
            logit and computes only those: the same tokens, half the traffic. By default where the head is more than a
            quarter of what a step reads.

    Raises:
        InputError: The model is declined.
    """

    max_batch = native.MAX_BATCH
    # prompts of this many tokens may go by steps, and at once from this many on
    most_by_steps = SHORT_PROMPT
    least_at_once = native.MAX_BATCH + 1
    # why some prompts must stay whole
    whole = "an expert-skipping policy counts over the whole prompt"
    # of layers with recurrent states
    mixers: native.Mixers | None = None
    # whether a prompt may go on from a snapshot of an engine with states
    keeps_snapshots = False

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 1,
        positions: int = 256,
        cache_dtype: torch.dtype | None = None,
        int8_activations: bool = False,
        head_bits: int | None = None,
        threads: int | None = None,
        screen: bool | None = None,
    ) -> None:
        refuse(self._declines(model))
        self.model = model
        self.threads = threads
        self.longest = longest(model)
        # whose modules want what their indexers keep beside keys and values
        self._indexed = model.config.get_text_config().model_type in INDEXED
        self.planes = planes_of(model, int8_activations)
        self.members = members_of(model)
        self.cache_dtype = cache_dtype or (torch.float32 if model.dtype == torch.float32 else torch.bfloat16)
        with torch.inference_mode():
            self.decoder = self._weights(int8_activations, head_bits)
            large = 4 * self.decoder.head.nbytes > self.decoder.step_bytes()
            if not self.members and not self.decoder.head.bits and (large if screen is None else screen):
                self.decoder = screened(self.decoder)
        self._logits = torch.empty((native.MAX_BATCH, self.decoder.vocabulary), dtype=torch.float32)
        self.slots = 0
        self.lengths: list[int] = []
        self._owners: list[int] = []
        self.cache: Cache
        self.reserve(positions if self.longest is None else min(positions, self.longest), slots)

    _declines = staticmethod(decline)

    def _weights(self, int8_activations: bool, head_bits: int | None) -> native.Decoder:
        """The model's weights, without rotary tables."""
        return decoder_of(self.model, head_bits)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, V."""
        return self.decoder.vocabulary

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step of all slots reads at most."""
        return self.decoder.step_bytes(self.slots)

    def reserve(self, positions: int, slots: int = 1) -> None:
        """Make room; what sequences hold stays.

        Args:
            positions: Tokens that a sequence may reach.
            slots: Sequences.

        Raises:
            InputError: No sequences, or some longer than :func:`longest` allows.
        """
        if slots < 1:
            raise InputError(f"{slots} sequences: the native engine takes one or more")
        if self.longest is not None and positions > self.longest:
            raise InputError(
                f"the native engine takes sequences of this model up to {self.longest} tokens, not {positions}",
                "use engine=transformers",
            )
        if slots <= self.slots and positions <= self.cache.positions:
            return
        room, count = max(positions, self.cache.positions if self.slots else 0), max(slots, self.slots)
        grown = cache_for(self.decoder, count, room, self.cache_dtype)
        for slot, tokens in enumerate(self.lengths):
            grown.copy(slot, slot, tokens, self.cache)
        more = [0] * (count - self.slots)
        self.slots, self.lengths, self._owners, self.cache = count, self.lengths + more, self._owners + more, grown
        scales = query_scales(self.model.config.get_text_config(), self.cache.positions)
        self.decoder = self.decoder.with_rotary(*self._rotary(self.cache.positions), scales)

    def _rotary(self, positions: int) -> tuple[list[Tensor], list[Tensor]]:
        """Tables float32 ``[positions, R / 2]`` of each kind, of the R columns of a head that are turned."""
        rotary = rotary_of(self.model)
        if rotary is None:
            # nothing of a head is turned
            return [torch.empty(positions, 0)], [torch.empty(positions, 0)]
        # the cache is rounded up
        count = positions if self.longest is None else min(positions, self.longest)
        given = (torch.empty(0, dtype=torch.float32), torch.arange(count).unsqueeze(0))
        with torch.inference_mode():
            tables = [rotary(*given, *(() if kind is None else (kind,))) for kind in rotary_kinds(self.model)]
        if isinstance(tables[0], Tensor):
            # complex: DeepSeek-V2's, Llama 4's
            return [tables[0][0].real.contiguous()], [tables[0][0].imag.contiguous()]
        cosine, sine = ([self._once(part[0], rotary) for part in parts] for parts in zip(*tables))
        if self.model.config.model_type == "nanochat":
            # turned the other way
            sine = [-table for table in sine]
        return cosine, sine

    def _once(self, table: Tensor, rotary: Any) -> Tensor:
        """A table ``[positions, R / 2]`` of one that says each number twice; gpt_oss's says each once."""
        if self.model.config.model_type in TWICE:
            return table[:, ::2].contiguous()
        once = table.shape[-1] == getattr(rotary, "inv_freq", table[:, :0]).shape[-1]
        return table[:, : table.shape[-1] // (1 if once else 2)].contiguous()

    @property
    def _pairs_stay(self) -> bool:
        """Whether transformers leaves pairs that it has turned side by side in its cache: in DeepSeek-V2 alone."""
        return bool(self.model.config.get_text_config().model_type == "deepseek_v2")

    @property
    def _copies(self) -> int:
        """How often transformers' cache has each head of keys: Falcon's newer architecture has one for every query."""
        if not getattr(self.model.config, "new_decoder_architecture", False):
            return 1
        heads = self.decoder.layers[0].heads
        assert heads is not None
        return heads.count // heads.shared

    @property
    def piece(self) -> int | None:
        """Prompts may be cut at multiples of this many tokens; None where they must stay whole."""
        # an expert-skipping policy counts over the whole prompt
        return 1 if getattr(self.model, "llmcompress_skipping", None) is None else None

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a sequence may go on from any of its earlier tokens, or begin with another one's."""
        return self.piece is not None

    def reusable(self, slot: int, count: int) -> bool:
        """Whether a sequence still has what a token after its first ``count`` sees: layers with windows forget."""
        return self.keeps_prefixes and self.cache.holds(slot, count)

    def snapshot_bytes(self, tokens: int) -> int:
        """Bytes of a snapshot of this many tokens: none, see :attr:`keeps_snapshots`."""
        return 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Let a sequence begin with the first tokens of another; :meth:`prompt` goes on from there.

        Args:
            source: Whose tokens, at least ``count``.
            target: What it held is replaced.
            count: How many.
        """
        self._check(source, 1, 0)
        self._check(target, 1, 0)
        if not 0 < count <= self.lengths[source]:
            raise InputError(f"sequence {source} holds {self.lengths[source]} tokens, not {count}")
        self._check_window(source, count)
        self.cache.copy(source, target, count)
        self.lengths[target], self._owners[target] = count, self._owners[source]

    def prompt(
        self, slot: int, tokens: Sequence[int], member: str | None = None, start: int = 0, last: bool = True
    ) -> Tensor:
        """Start a sequence, or go on with its prompt.

        Args:
            slot: Which one; what it held from ``start`` on is replaced.
            tokens: The prompt from ``start`` on, at least one token.
            member: Whose it is, in a family.
            start: Tokens that the sequence holds already and that stay; a multiple of :attr:`piece`, or a prefix that
                is kept.
            last: Whether the prompt ends here.

        Returns:
            Logits float32 ``[V]`` after the last token; ``[0]`` where the prompt goes on.

        Raises:
            InputError: No such sequence, no room, not this many tokens, or a prompt that must stay whole.
        """
        self._check(slot, len(tokens), start)
        if (start or not last) and self.piece is None:
            raise InputError(self.whole, "give it at once")
        if self.members:
            assert member is not None
            owner = self.members.index(member)
            if start and owner != self._owners[slot]:
                raise InputError(f"sequence {slot} belongs to {self.members[self._owners[slot]]}, not to {member}")
            self._owners[slot] = owner
        policy = getattr(self.model, "llmcompress_skipping", None)
        # one way for all pieces, so that where they end changes no bit
        if self.decoder.takes_prompts and (len(tokens) >= self.least_at_once or start or not last):
            reroute = None if policy is None else policy.prompt(len(tokens))
            return self._prompt_at_once(slot, tokens, reroute, start, last)
        by_steps = len(tokens) <= self.most_by_steps or self._indexed
        if by_steps and (policy is None or not policy.acts_on(len(tokens))):
            if policy is not None:
                policy.enter(len(tokens))
            logits = self._prompt_by_steps(slot, tokens, start)
        else:
            logits = self._prompt_by_modules(slot, tokens, start)
        return logits if last else logits[:0]

    def _check(self, slot: int, count: int, start: int) -> None:
        if not 0 <= slot < self.slots or count == 0:
            raise InputError(f"sequence {slot} of {self.slots} with {count} tokens")
        if not 0 <= start <= self.lengths[slot]:
            raise InputError(f"sequence {slot} holds {self.lengths[slot]} tokens and cannot go on from {start}")
        self._check_window(slot, start)
        if start + count > self.cache.positions:
            raise InputError(f"{start + count} tokens exceed the cache's {self.cache.positions}", "reserve more")

    def _check_window(self, slot: int, count: int) -> None:
        if count and not self.cache.holds(slot, count):
            raise InputError(f"sequence {slot} has forgotten what comes before token {count}", "read the whole prompt")

    def _prompt_by_modules(self, slot: int, tokens: Sequence[int], start: int = 0) -> Tensor:
        """The forward of transformers' modules, on what the cache holds and back into it."""
        if self.members:
            batch_of(self.model).assign([self.members[self._owners[slot]]])
        from transformers import DynamicCache

        end = start + len(tokens)
        held: Any = DynamicCache(config=self.model.config) if self._indexed else DynamicCache()
        with torch.inference_mode():
            for index in range(len(self.decoder.layers) if start else 0):
                keys, values = (part.to(self.model.dtype) for part in self.cache.read(index, slot, start))
                if self._pairs_stay:
                    values = side_by_side(values)
                keys, values = (part.repeat_interleave(self._copies, 0) for part in (keys, values))
                held.update(keys[None], values[None], index)
            out: Any = self.model(
                input_ids=torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1,
                **arguments(self.model, held, torch.arange(start, end)[None]),
            )  # fmt: skip
            near = self.cache.near
            since = start if near is None else near.settle(slot, start, end)
            for index, layer in enumerate(held.layers):
                first = since if self.cache.sees_window(index) else start
                keys, values = (part[0, :: self._copies, first:] for part in (layer.keys, layer.values))
                self.cache.fill(index, slot, first, keys, halves(values) if self._pairs_stay else values)
        self.lengths[slot] = end
        return out.logits[0, -1].float()

    def _prompt_by_steps(self, slot: int, tokens: Sequence[int], start: int = 0) -> Tensor:
        for first in range(0, len(tokens), native.MAX_BATCH):
            part = torch.tensor(tokens[first : first + native.MAX_BATCH])
            positions = torch.arange(start + first, start + first + len(part))
            self.cache.advance(slot, start + first, len(part))
            self._call(part, positions, torch.full((len(part),), slot, dtype=torch.int32))
        self.lengths[slot] = start + len(tokens)
        return self._logits[(len(tokens) - 1) % native.MAX_BATCH].clone()

    def _prompt_at_once(
        self, slot: int, tokens: Sequence[int], reroute: native.Reroute | None = None, start: int = 0, last: bool = True
    ) -> Tensor:
        ids = torch.tensor(list(tokens))
        # layers with windows have no room for all tokens at once
        most = self.cache.most or len(tokens)
        for first in range(0, len(tokens), most):
            part = ids[first : first + most]
            self.cache.advance(slot, start + first, len(part))
            hidden = native.prompt(
                self.decoder, self.cache, part, slot, start + first, self.planes, self.threads,
                member=self._owners[slot], reroute=reroute, mixers=self.mixers, last=last,
            )  # fmt: skip
        self.lengths[slot] = start + len(tokens)
        if not last:
            return self._logits[0, :0]
        at, layers = torch.tensor([self.lengths[slot] - 1]), (len(self.decoder.layers),) * 2
        native.step(
            self.decoder, self.cache, ids[-1:], at, torch.tensor([slot], dtype=torch.int32), self._logits,
            planes=self.planes, threads=self.threads, layers=layers, hidden=hidden, members=self._members([slot]),
            mixers=self.mixers,
        )  # fmt: skip
        return self._logits[0].clone()

    def step(self, tokens: Tensor, slots: Sequence[int] | None = None, best: Tensor | None = None) -> Tensor:
        """Append one token to every sequence.

        Args:
            tokens: int64 ``[B]``, at most 8.
            slots: Which sequences, all in order by default; in a family those of one member side by side.
            best: int64 ``[B]``, filled with the index of each largest logit.

        Returns:
            Logits float32 ``[B, V]``; overwritten by the next call.
        """
        which = range(self.slots) if slots is None else slots
        positions = self._next(which)
        logits = self._call(tokens, positions, torch.tensor(list(which), dtype=torch.int32), best)
        for slot in which:
            self.lengths[slot] += 1
        return logits

    def greedy(self, tokens: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """Append one token to every sequence and choose the next.

        Args:
            tokens: int64 ``[B]``.
            slots: Which sequences, all in order by default.

        Returns:
            int64 ``[B]``, the index of the largest logit.
        """
        which = list(range(self.slots) if slots is None else slots)
        positions = self._next(which)
        best = torch.empty(len(which), dtype=torch.int64)
        logits = self._logits if self.decoder.screen is None else None
        native.step(
            self.decoder, self.cache, tokens, positions, torch.tensor(which, dtype=torch.int32), logits, best,
            self.planes, self.threads, members=self._members(which), mixers=self.mixers,
        )  # fmt: skip
        for slot in which:
            self.lengths[slot] += 1
        return best

    def _call(self, tokens: Tensor, positions: Tensor, slots: Tensor, best: Tensor | None = None) -> Tensor:
        native.step(
            self.decoder, self.cache, tokens, positions, slots, self._logits, best, self.planes,
            self.threads, members=self._members(slots.tolist()), mixers=self.mixers,
        )  # fmt: skip
        return self._logits[: tokens.shape[0]]

    def _next(self, slots: Sequence[int]) -> Tensor:
        """Positions int64 ``[B]`` of the next token of some sequences, for which there is room then."""
        for slot in slots:
            self.cache.advance(slot, self.lengths[slot], 1)
        return torch.tensor([self.lengths[slot] for slot in slots])

    def owner(self, slot: int) -> int:
        """Place of a sequence's member in the family, 0 without one."""
        return self._owners[slot]

    def held_bytes(self, slots: Sequence[int]) -> int:
        """Bytes of the positions that these sequences use."""
        return sum(self.cache.held_bytes(self.lengths[slot]) for slot in slots)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of keys and values of all slots, used or not."""
        return self.cache.nbytes

    def _members(self, slots: Sequence[int]) -> Tensor | None:
        return torch.tensor([self._owners[slot] for slot in slots], dtype=torch.int32) if self.members else None

    def profile(self, tokens: Tensor, repeats: int = 16) -> dict[str, float]:
        """Seconds per step by phase, of the first thread, over ``repeats`` steps that leave the sequences as they were.

        Recurrent states go on.

        Args:
            tokens: int64 ``[B]``.
            repeats: Steps.
        """
        count = tokens.shape[0]
        positions = self._next(range(count))
        seconds = torch.zeros(len(native.PHASES), dtype=torch.float64)
        for _ in range(repeats):
            logits = self._logits if self.decoder.screen is None else None
            native.step(
                self.decoder, self.cache, tokens, positions, torch.arange(count, dtype=torch.int32), logits,
                torch.empty(count, dtype=torch.int64), self.planes, self.threads, seconds=seconds,
                members=self._members(range(count)), mixers=self.mixers,
            )  # fmt: skip
        return dict(zip(native.PHASES, (seconds / repeats).tolist()))


def batch_of(model: PreTrainedModel) -> BatchRows:
    """The object that says whose the rows of a family's modules are."""
    return next(module.batch for module in model.modules() if isinstance(module, TreeLinear))
