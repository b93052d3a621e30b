"""Members of a family in memory: packed, shared nodes once, one member or a mixed batch of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.alignment import align
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.handle import (
    assign_all,
    fill_constants,
    generation_settings,
    load_tokenizer,
    meta_model,
    transformers_config,
)
from llmcompress.nn.packed import replace_module
from llmcompress.nn.tree_linear import BatchRows, PerMember, TreeLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_members(
    artifact: FamilyArtifact, members: Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> FamilyModel:
    """Load members of a family; nodes above none of them are not read.

    Args:
        artifact: The family.
        members: Which; all by default.
        dtype: Type of dense tensors and activations.

    Raises:
        InputError: A member is unknown, or members cannot be in one batch.
    """
    chosen = list(artifact.members if members is None else [artifact.require(m) for m in members])
    ordered = [m for m in artifact.members if m in chosen]
    dtype = dtype or artifact.dtype
    batch = BatchRows()
    batch.assign(ordered[:1])
    shells = {m: _shell(artifact, m, dtype) for m in ordered}
    model = shells[ordered[0]]
    if len({_numbers(shell) for shell in shells.values()}) > 1:
        raise InputError(
            f"{artifact.folder}: {', '.join(ordered)} differ in settings that a batch must share (rotary embedding, "
            "activation or normalisation constants)",
            "load one member at a time",
        )
    _require_alike(artifact, shells)
    for linear in artifact.plan.linears:
        biases = {m: b for m, s in shells.items() if (b := getattr(s.get_submodule(linear), "bias", None)) is not None}
        nodes = artifact.nodes(linear, frozenset(ordered))
        replace_module(model, linear, TreeLinear(nodes, artifact.plan.members_of(linear), batch, biases))
    if len(ordered) > 1:
        for name in private_modules(model):
            replace_module(model, name, PerMember({m: s.get_submodule(name) for m, s in shells.items()}, batch))
    align(model)
    return FamilyModel(artifact, model.eval(), ordered, batch)


def load_member(artifact: FamilyArtifact, member: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """One member as an ordinary model whose linear layers hold the nodes on its path."""
    return load_members(artifact, [member], dtype).model


def dense_member(artifact: FamilyArtifact, member: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """One member as an ordinary dense model, its weights rebuilt; in evaluation mode on the CPU."""
    model = _shell(artifact, member, dtype or artifact.dtype)
    assign_all(model, ((f"{linear}.weight", artifact.weight(linear, member)) for linear in artifact.plan.linears))
    align(model)
    return model.eval()


def _shell(artifact: FamilyArtifact, member: str, dtype: torch.dtype) -> PreTrainedModel:
    """A member's model with everything but the weights in the trees, which stay on the meta device."""
    folder = artifact.member_folder(member)
    model = meta_model(transformers_config(folder), dtype)
    # what ends a turn of a chat is often said there only
    model.generation_config = generation_settings(folder)
    fill_constants(model)
    assign_all(model, artifact.private(member))
    model.tie_weights()
    return model


def _numbers(model: PreTrainedModel) -> str:
    """What rows of one batch must agree on, as text."""
    config = model.config.get_text_config().to_dict()
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act", "hidden_activation",
            "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
            "query_pre_attn_scalar", "vocab_size")  # fmt: skip
    return repr({key: config.get(key) for key in keys})


def private_modules(model: nn.Module) -> list[str]:
    """Modules with weights of their own outside the trees: embedding, norms, head; none that a batch shares."""
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, TreeLinear | nn.Conv1d)
        and not any(isinstance(part, TreeLinear) for part in module.children())
    ]


def _require_alike(artifact: FamilyArtifact, shells: Mapping[str, nn.Module]) -> None:
    """Refuse members in one batch who differ in tensors that it shares: those of modules with others in them (sinks,
    factors of layers), and of convolutions, whose weights mixers read without calling them.

    Raises:
        InputError: They differ.
    """
    first, *others = shells.values()
    for name, module in first.named_modules():
        if not isinstance(module, nn.Conv1d) and not any(True for _ in module.children()):
            continue
        buffers = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **buffers}.items():
            theirs = [getattr(other.get_submodule(name), key) for other in others]
            if tensor is not None and not all(torch.equal(tensor, value) for value in theirs):
                raise InputError(
                    f"{artifact.folder}: {', '.join(shells)} differ in {name}.{key}, which a batch must share",
                    "load one member at a time",
                )


class FamilyModel:
    """Several members behind one model object; each row of a batch has its own.

    Attributes:
        artifact: Where it was loaded from.
        model: A transformers model; what its rows mean is set by :meth:`rows`.
        members: The members loaded, in the family's order.
        batch: Which rows belong to whom.
    """

    def __init__(self, artifact: FamilyArtifact, model: PreTrainedModel, members: list[str], batch: BatchRows) -> None:
        self.artifact, self.model, self.members, self.batch = artifact, model, members, batch
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def tokenizer(self, member: str) -> PreTrainedTokenizerBase:
        """A member's tokenizer."""
        if member not in self._tokenizers:
            self._tokenizers[member] = load_tokenizer(self.artifact.member_folder(member))
        return self._tokenizers[member]

    def order(self, member: Sequence[str]) -> list[int]:
        """Positions of requests in the order in which a batch must hold them: by place of their member in the tree.

        Raises:
            InputError: A member is not loaded.
        """
        unknown = sorted(set(member) - set(self.members))
        if unknown:
            raise InputError(f"no member {unknown[0]!r} is loaded", f"choose from {', '.join(self.members)}")
        return sorted(range(len(member)), key=lambda i: (self.members.index(member[i]), i))

    def rows(self, member: Sequence[str]) -> None:
        """Say whose the rows of the next calls are; they must be in :meth:`order`."""
        self.batch.assign(member)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, member: Sequence[str], **arguments: Any) -> Any:
        """Forward ``input_ids [B, L]`` whose rows may belong to different members, in any order.

        Args:
            input_ids: ``[B, L]``.
            member: Member of each row.
            arguments: Passed to the model (``attention_mask`` …); a cache must stay in the batch's sorted order.

        Returns:
            The model's output with logits ``[B, L, V]`` in the order of ``member``.
        """
        order = self.order(member)
        self.rows([member[i] for i in order])
        index = torch.tensor(order, device=input_ids.device)
        moved = {
            k: v[index] if isinstance(v, Tensor) and v.shape[:1] == index.shape else v for k, v in arguments.items()
        }
        output = self.model(input_ids=input_ids[index], **moved)
        output.logits = output.logits[index.argsort()]
        return output

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        member: Sequence[str],
        max_new_tokens: int,
        stop: Mapping[str, int] | None = None,
    ) -> list[list[int]]:
        """Continue prompts of several members greedily in one batch.

        Args:
            prompts: Token ids of each request.
            member: Member of each request.
            max_new_tokens: Longest continuation.
            stop: Member → token that ends its text.

        Returns:
            New tokens of each request, without the stop token.
        """
        from transformers import DynamicCache

        order = self.order(member)
        names = [member[i] for i in order]
        self.rows(names)
        width = max(len(prompts[i]) for i in order)
        device = next(self.model.parameters()).device
        ids = torch.zeros((len(order), width), dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(order):
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        cache, finished = DynamicCache(), [False] * len(order)
        found: list[list[int]] = [[] for _ in order]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for _ in range(max_new_tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = output.logits[:, -1:].argmax(-1)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not finished[row]:
                    finished[row] = (stop or {}).get(names[row]) == token
                    if not finished[row]:
                        found[row].append(token)
            if all(finished):
                break
            mask = torch.cat([mask, mask.new_ones(len(order), 1)], 1)
            positions = positions[:, -1:] + 1
        placed: list[list[int]] = [[] for _ in order]
        for row, i in enumerate(order):
            placed[i] = found[row]
        return placed
