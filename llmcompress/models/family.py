"""A family: a base and its fine-tunes, opened together, one block of one of them in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcompress.errors import InputError
from llmcompress.models.handle import ModelHandle
from llmcompress.models.lora_checkpoint import is_adapter
from llmcompress.models.paths import resolve_path

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.layout import ModelLayout

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
_SHOWN = 3


@dataclass(frozen=True)
class ModelFamily:
    """Opened models of one architecture.

    Attributes:
        base: The model they were fine-tuned from; differences are measured against it.
        members: Name → fine-tune.
    """

    base: ModelHandle
    members: Mapping[str, ModelHandle]

    @classmethod
    def open(cls, base: ModelHandle, paths: Mapping[str, str], dtype: str = "auto") -> ModelFamily:
        """Open the members and refuse what cannot share a tree.

        Args:
            base: The base, already open.
            paths: Name → folder of a model, or of a LoRA adapter of the base in PEFT's format.
            dtype: As for :meth:`ModelHandle.open`.

        Raises:
            InputError: A member is missing, damaged, or of another architecture; all problems at once.
        """
        members, problems = {}, []
        for name, path in paths.items():
            try:
                members[name] = open_member(path, base, dtype)
                problems += [f"{name} ({path}): {p}" for p in mismatches(base.layout, members[name].layout)]
            except InputError as error:
                problems += [f"{name}: {line}" for line in error.message.splitlines()]
        if problems:
            raise InputError(
                "\n".join(problems), "a family needs models of one architecture, or LoRA adapters of its base"
            )
        return cls(base, members)

    @property
    def layout(self) -> ModelLayout:
        """Layout of the base; blocks are the same in every member."""
        return self.base.layout

    def contexts(self) -> dict[str, object]:
        """Name → ``max_position_embeddings`` of a member's config, None where it has none."""
        return {name: handle.config.get("max_position_embeddings") for name, handle in self.members.items()}

    def weights(self, linear: str) -> dict[str, Tensor]:
        """One linear's weight in every member, ``[N, K]`` fp32."""
        import torch

        return {name: h.checkpoint.tensor(f"{linear}.weight").to(torch.float32) for name, h in self.members.items()}


def open_member(path: str, base: ModelHandle | None, dtype: str = "auto") -> ModelHandle:
    """Open a fine-tune: a model of its own, or a LoRA adapter over ``base``.

    Raises:
        InputError: It is missing, damaged or belongs to another base; or it is an adapter, and there is no base.
    """
    folder = resolve_path(path)
    return base.adapted(folder) if base is not None and is_adapter(folder) else ModelHandle.open(path, dtype)


def mismatches(base: ModelLayout, other: ModelLayout) -> list[str]:
    """Why two models cannot share a tree; empty when they can. Embeddings and heads may differ."""
    if base.model_type != other.model_type:
        return [f"is a {other.model_type} model, the base is {base.model_type}"]
    if len(base.blocks) != len(other.blocks):
        return [f"has {len(other.blocks)} blocks, the base {len(base.blocks)}"]
    found = []
    for ours, theirs in zip(base.blocks, other.blocks):
        if ours == theirs:
            continue
        shapes = {view.name: view.shape for view in theirs.tensors()}
        for view in ours.tensors():
            if shapes.get(view.name) != view.shape:
                found.append(f"{view.name} has shape {shapes.get(view.name)}, in the base {view.shape}")
        if not found:
            found.append(f"{ours.name} differs in structure")
    more = [f"and {len(found) - _SHOWN} more differences"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more


def unsupported(layout: ModelLayout) -> list[str]:
    """Why a layout cannot be compressed as a family at all; empty when it can."""
    if any(block.bank is not None for block in layout.blocks):
        return [f"{layout.model_type}: banks of experts cannot be in a residual tree yet; use a dense family"]
    if any(block.loan is not None for block in layout.blocks):
        return [f"{layout.model_type}: blocks that share weights cannot be in a residual tree yet; use a dense family"]
    return []
