"""A family with random weights in memory: for tests of equality and of speed, never of quality."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.models.family_model import private_modules
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.packed import replace_module
from llmcompress.nn.tree_linear import BatchRows, PerMember, TreeLinear
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.codecs.int_group import PACKED, SCALE
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RandomFamily:
    """Members whose linear weights are sums of random nodes; embeddings, norms and heads are those of ``models``.

    Args:
        models: Member → a model of the same architecture, which gives what is outside the trees.
        tree: Over the members.
        widths: Members below a node → bits of its codes, 0 for none.
        group_size: Columns per scale.
        seed: Seed of codes and scales.

    Attributes:
        model: Its rows belong to whom ``batch`` says.
        batch: Which rows belong to whom.
        members: In the order of the tree.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        tree: Tree,
        widths: Mapping[int, int],
        group_size: int,
        seed: int = 0,
    ) -> None:
        self.members, self.batch = list(tree.leaves), BatchRows()
        self.batch.assign(self.members[:1])
        self._models, self._tree, self._draws = dict(models), tree, torch.Generator().manual_seed(seed)
        self._below = dict(zip(tree.ids, tree.nodes))
        self._group = group_size
        self.nodes: dict[str, dict[str, PackedWeight]] = {}
        base = models[self.members[0]]
        self.model: Any = copy.deepcopy(base)
        for block in layout_from_config(base.config.to_dict()).blocks:
            for linear in block.linears():
                module: Any = base.get_submodule(linear.name)
                self.nodes[linear.name] = self._random(module.weight.shape, widths)
                biases = {m: models[m].get_submodule(linear.name).bias for m in self.members}
                present: Any = {m: b.detach() for m, b in biases.items() if isinstance(b, Tensor)}
                new = TreeLinear(self.nodes[linear.name], self._below, self.batch, present)
                replace_module(self.model, linear.name, new)
        for name in private_modules(self.model):
            own = {m: self._models[m].get_submodule(name) for m in self.members}
            replace_module(self.model, name, PerMember(own, self.batch))

    def _random(self, shape: Sequence[int], widths: Mapping[int, int]) -> dict[str, PackedWeight]:
        """Residuals whose sum has about the spread of an ordinary weight; a child's are an eighth of its parent's."""
        found = {}
        spec_of = {name: widths.get(len(below), 0) for name, below in self._below.items()}
        for depth, (name, bits) in zip(self._tree.depths, spec_of.items()):
            if bits == 0:
                continue
            spec = delta_tree.node_spec(bits, self._group)
            spread = 3.5 / (1 << bits) * shape[1] ** -0.5
            scale = (1 + 0.1 * torch.rand(shape[0], spec.groups(shape[1]), generator=self._draws)) * spread
            # any words hold valid codes, and drawing them is much faster than packing codes; what is left over of a
            # row's last word is zero, as packing makes it
            words = delta_tree.tensor_shapes(shape, spec)[PACKED][0]
            drawn = torch.randint(-(2**31), 2**31, words, generator=self._draws, dtype=torch.int64).to(torch.int32)
            if (used := shape[1] * bits % 32) != 0:
                drawn[..., -1] &= (1 << used) - 1
            exponent = torch.tensor([-3 * depth], dtype=torch.int32)
            found[name] = PackedWeight(
                (shape[0], shape[1]), spec, {PACKED: drawn, SCALE: scale.half(), delta_tree.EXPONENT: exponent}
            )
        return found

    def dense(self, member: str) -> Any:
        """One member as an ordinary model."""
        model = copy.deepcopy(self._models[member])
        for linear, nodes in self.nodes.items():
            path = [pw for name, pw in nodes.items() if member in self._below[name]]
            module: Any = model.get_submodule(linear)
            module.weight.data = delta_tree.reconstruct(path).to(module.weight.dtype)
        return model
