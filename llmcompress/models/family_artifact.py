"""A family's artifact on disk: ``family.json``, one file per node, one folder per member.

family.json                    trees, bits, how embeddings are stored
nodes/<node>.safetensors       residuals of one node, all weights
shared.safetensors             tensors that are equal in all members
members/<name>/                config, tokenizer and private.safetensors (norms, embedding, head)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.layout import ModelLayout
from llmcompress.models.registry import layout_from_config
from llmcompress.models.tensor_file import TensorFile
from llmcompress.quant.codecs import codec, delta_tree
from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILY = "family.json"
METHOD = "llmcompress-family"
SHARED = "shared.safetensors"
PRIVATE = "private.safetensors"
NODE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,200}$")


def is_family(folder: Path) -> bool:
    """Whether a folder holds a family."""
    return (Path(folder) / FAMILY).is_file()


def private_names(layout: ModelLayout) -> list[str]:
    """Tensors of a member outside the trees: embedding, norms, head, biases."""
    names = [view.name for view in layout.outside] + [v.name for block in layout.blocks for v in block.kept]
    biases = [f"{linear.name}.bias" for block in layout.blocks for linear in block.linears() if linear.bias]
    return list(dict.fromkeys([*names, *biases]))


def node_file(folder: Path, node: str) -> Path:
    """File of a node.

    Raises:
        InputError: The name could leave the folder.
    """
    if not NODE_NAME.match(node):
        raise InputError(f"{folder / FAMILY}: {node!r} is not the name of a node", "export the family again")
    return folder / "nodes" / f"{node}.safetensors"


class FamilyArtifact:
    """An opened family.

    Args:
        folder: Where it is.

    Raises:
        InputError: It is missing, damaged or from a newer version.

    Attributes:
        folder: Where it is.
        data: ``family.json``.
        plan: Trees and bits.
        outside: Tensor name → how it is packed; others are dense.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / FAMILY
        try:
            self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.data.get("quant_method") != METHOD:
                raise ValueError(f"quant_method is {self.data.get('quant_method')!r}, not {METHOD!r}")
            outside: Mapping[str, Any] = self.data["outside"]
            self.outside = {str(name): QuantSpec.from_dict(spec) for name, spec in outside.items()}
        except FileNotFoundError as error:
            raise InputError(
                f"{self.folder}: no family here ({FAMILY} is missing)", "give the artifact's folder"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read: {error}", "export the family again") from error
        self.plan = FamilyPlan.from_dict(self.data.get("plan") or {}, str(path))
        for node in self.plan.node_names():
            node_file(self.folder, node)
        self._files: dict[Path, TensorFile] = {}

    @property
    def members(self) -> tuple[str, ...]:
        """The members, in the family's order."""
        return self.plan.order

    @property
    def dtype(self) -> torch.dtype:
        """Type of the members' dense tensors."""
        import torch

        found: torch.dtype = getattr(torch, str(self.data.get("dtype", "bfloat16")))
        return found

    def require(self, member: str | None) -> str:
        """The member that is meant.

        Raises:
            InputError: None or an unknown one is named.
        """
        known = ", ".join(self.members)
        if member is None:
            raise InputError(f"{self.folder}: a family of {len(self.members)} models", f"--member NAME, one of {known}")
        if member not in self.members:
            raise InputError(f"{self.folder}: no member {member!r}", f"choose one of {known}")
        return member

    def member_folder(self, member: str) -> Path:
        """Folder with a member's config and tokenizer."""
        return self.folder / "members" / self.require(member)

    def layout(self, member: str) -> ModelLayout:
        """Layout of a member."""
        from llmcompress.models.checkpoint import read_config

        return layout_from_config(read_config(self.member_folder(member)))

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def node(self, node: str, linear: str) -> PackedWeight:
        """One node's residual of one weight.

        Raises:
            InputError: It is missing or damaged.
        """
        spec = delta_tree.node_spec(self.plan.bits[linear][node], self.plan.group_size)
        return self._packed(node_file(self.folder, node), linear, self.plan.shapes[linear], spec)

    def nodes(self, linear: str, members: frozenset[str] | None = None) -> dict[str, PackedWeight]:
        """Stored nodes of a weight, parents first; only those above any of ``members`` when given."""
        below = self.plan.members_of(linear)
        wanted = [name for name in self.plan.stored(linear) if members is None or members & below[name]]
        return {name: self.node(name, linear) for name in wanted}

    def weight(self, linear: str, member: str) -> Tensor:
        """A member's weight, the sum of its nodes; ``[N, K]`` fp32."""
        return delta_tree.reconstruct([self.node(name, linear) for name in self.plan.path(linear, member)])

    def private(self, member: str) -> Iterator[tuple[str, Tensor]]:
        """Yield a member's tensors outside the trees, decoded to their own type."""
        for name in private_names(self.layout(member)):
            spec = self.outside.get(name)
            path = self._home(member, name if spec is None else f"{name}_packed")
            if spec is None:
                yield name, self._file(path).read(name)
            else:
                shape = self._outside_shape(member, name)
                stem = name.removesuffix(".weight")
                yield name, codec(spec.codec).decode(self._packed(path, stem, shape, spec), self.dtype)

    def _home(self, member: str, name: str) -> Path:
        """The file that holds a member's tensor: its own, else the shared one."""
        own = self.member_folder(member) / PRIVATE
        for path in (own, self.folder / SHARED):
            if path.is_file() and name in self._file(path).entries:
                return path
        raise InputError(f"{own}: {name} is missing", "export the family again")

    def _outside_shape(self, member: str, name: str) -> tuple[int, ...]:
        return next(view.shape for view in self.layout(member).outside if view.name == name)

    def _packed(self, path: Path, stem: str, shape: tuple[int, ...], spec: QuantSpec) -> PackedWeight:
        file, tensors = self._file(path), {}
        for key, (dims, dtype) in codec(spec.codec).tensor_shapes(shape, spec).items():
            name = f"{stem}.{key}"
            entry = file.entries.get(name)
            if entry is None or entry.shape != dims:
                got = "missing" if entry is None else f"of shape {list(entry.shape)}"
                raise InputError(f"{path}: {name} is {got}, needed {list(dims)} {dtype}", "export the family again")
            tensors[key] = file.read(name)
        return PackedWeight(tuple(shape), spec, tensors)
