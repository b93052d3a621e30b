"""Writes a family's artifact, node by node, and reads it back; the layout is that of ``models/family_artifact.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import ExportError, InputError
from llmcompress.export.base import (
    atomic_folder,
    copy_side_files,
    dense_config,
    write_json,
    write_provenance,
)
from llmcompress.models.family_artifact import (
    FAMILY,
    METHOD,
    PRIVATE,
    SHARED,
    FamilyArtifact,
    node_file,
    private_names,
)
from llmcompress.quant.codecs import codec, delta_tree, int_group
from llmcompress.quant.family import FamilyPlan, entry
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block
    from llmcompress.stages.state import FamilyState

OUTSIDE_SPEC = QuantSpec(8, -1, symmetric=True)
ROWS_AT_ONCE = 1 << 14


def write_family(state: FamilyState, out: Path, provenance: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the artifact so that ``out`` exists only when complete; equal inputs give equal bytes.

    Args:
        state: The quantized family.
        out: Folder to create.
        provenance: Written beside the weights.
        facts: Errors and retention by member, for ``inspect``.

    Raises:
        ExportError: ``out`` exists or cannot be written.
    """
    family, plan = state.family, state.plan
    specs = outside_specs(family.base, state.outside)
    with atomic_folder(out) as part:
        (part / "nodes").mkdir()
        for node in plan.node_names():
            save_tensors(node_tensors(state, node), node_file(part, node))
        common = _common(state, specs)
        if common:
            save_tensors(common, part / SHARED)
        for member, handle in family.members.items():
            write_member(handle, specs, set(common), part / "members" / member)
        write_json(part / FAMILY, family_json(state, specs, facts))
        write_json(part / "config.json", dense_config(family.base))
        write_provenance(part, provenance)


def family_json(state: FamilyState, specs: Mapping[str, QuantSpec], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``family.json``."""
    return {
        "quant_method": METHOD,
        "dtype": str(state.family.base.checkpoint.dtype).removeprefix("torch."),
        "outside": {name: spec.to_dict() for name, spec in specs.items()},
        "plan": state.plan.to_dict(),
        "facts": dict(facts),
    }


def outside_specs(base: ModelHandle, outside: str) -> dict[str, QuantSpec]:
    """How embedding and head are packed; tensors that are absent stay dense."""
    if outside == "dense":
        return {}
    return {view.name: OUTSIDE_SPEC for view in base.layout.outside if len(view.shape) == 2}


def node_tensors(state: FamilyState, node: str) -> dict[str, Tensor]:
    """One node's tensors over all weights."""
    found: dict[str, Tensor] = {}
    for block in state.family.layout.blocks:
        patch = state.store.read_block(block.index)
        for linear in block.linears():
            packed = patch.packed.get(entry(node, linear.name))
            if packed is not None:
                found |= {f"{linear.name}.{key}": tensor for key, tensor in packed.tensors.items()}
    return found


def member_tensors(handle: ModelHandle, specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """A member's tensors outside the trees, as they are stored."""
    found: dict[str, Tensor] = {}
    for name in private_names(handle.layout):
        tensor = handle.checkpoint.tensor(name)
        if name in specs:
            packed = pack_outside(tensor, specs[name])
            found |= {f"{name.removesuffix('.weight')}.{key}": part for key, part in packed.tensors.items()}
        else:
            found[name] = tensor
    return found


def pack_outside(tensor: Tensor, spec: QuantSpec) -> PackedWeight:
    """Round an embedding or head to nearest, ``[V, H]``, some rows at a time."""
    from llmcompress.algorithms.grids import round_to_nearest

    codes, scales = [], []
    for rows in tensor.split(ROWS_AT_ONCE):
        code, scale, _ = round_to_nearest(rows.to(torch.float32), spec, "minmax")
        codes.append(code)
        scales.append(scale)
    return int_group.encode(torch.cat(codes), torch.cat(scales), None, spec)


def write_member(handle: ModelHandle, specs: Mapping[str, QuantSpec], common: set[str], folder: Path) -> None:
    """Write a member's folder: what is its own, its config and its tokenizer."""
    folder.mkdir(parents=True)
    own = {name: tensor for name, tensor in member_tensors(handle, specs).items() if name not in common}
    if own:
        save_tensors(own, folder / PRIVATE)
    write_json(folder / "config.json", dense_config(handle))
    copy_side_files(handle, folder)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, names sorted."""
    from safetensors.torch import save_file

    ready = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(ready, path, metadata={"format": "pt"})


def _common(state: FamilyState, specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """Tensors outside the trees that are equal in all members."""
    handles = list(state.family.members.values())
    common = mine = member_tensors(handles[0], specs)
    for handle in handles[1:]:
        mine = member_tensors(handle, specs)
        common = {n: t for n, t in common.items() if n in mine and torch.equal(t, mine[n])}
    whole = whole_tensors(set(common), mine, specs)
    return {name: tensor for name, tensor in common.items() if name in whole}


def whole_tensors(equal: set[str], names: Iterable[str], specs: Mapping[str, QuantSpec]) -> set[str]:
    """What of ``equal`` may lie in the common file: codes and scales of one tensor are read from one file, and
    fine-tunes may differ in codes alone, or in scales.

    Args:
        equal: Names whose values are the same.
        names: All of a member.
        specs: Tensors that are packed.
    """
    torn: set[str] = set()
    for stem in [name.removesuffix(".weight") for name in specs]:
        parts = {name for name in names if name.rpartition(".")[0] == stem}
        if not parts <= equal:
            torn |= parts
    return equal - torn


def read_back(out: Path, state: FamilyState) -> None:
    """Open ``out`` as any reader would and compare every node and every other tensor with what the store holds.

    Equal nodes on equal paths have equal sums, so sums are formed for one weight of each block only.

    Raises:
        ExportError: A value differs or is missing.
    """
    try:
        artifact = FamilyArtifact(out)
        for block in state.family.layout.blocks:
            _read_back_block(artifact, state, block)
        specs = outside_specs(state.family.base, state.outside)
        for member, handle in state.family.members.items():
            expected = {name: handle.checkpoint.tensor(name) for name in private_names(handle.layout)}
            for name, tensor in artifact.private(member):
                spec = specs.get(name)
                wanted = expected[name]
                if spec is not None:
                    wanted = codec(spec.codec).decode(pack_outside(wanted, spec), tensor.dtype)
                if not torch.equal(tensor, wanted):
                    raise ExportError(f"{out}: {name} of {member} reads back differently")
    except InputError as error:
        raise ExportError(f"{out}: cannot be read back: {error.message}", error.hint) from error


def _read_back_block(artifact: FamilyArtifact, state: FamilyState, block: Block) -> None:
    patch, plan = state.store.read_block(block.index), state.plan
    for linear in block.linears():
        paths = {member: plan.path(linear.name, member) for member in plan.order}
        if paths != {member: artifact.plan.path(linear.name, member) for member in artifact.plan.order}:
            raise ExportError(f"{artifact.folder}: {linear.name} reads back with other nodes")
        for node in plan.stored(linear.name):
            if not _equal(artifact.node(node, linear.name), patch.packed[entry(node, linear.name)]):
                raise ExportError(f"{artifact.folder}: {linear.name} of {node} reads back differently")
    first = next(iter(block.linears())).name
    for member in plan.order:
        nodes = [patch.packed[entry(node, first)] for node in plan.path(first, member)]
        if not torch.equal(artifact.weight(first, member), delta_tree.reconstruct(nodes)):
            raise ExportError(f"{artifact.folder}: {first} of {member} reads back differently")


def _equal(found: PackedWeight, expected: PackedWeight) -> bool:
    same = (found.shape, found.spec) == (
        expected.shape,
        expected.spec,
    ) and found.tensors.keys() == expected.tensors.keys()
    return same and all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())


def artifact_bytes(folder: Path) -> dict[str, int]:
    """Bytes on disk by part: ``nodes``, ``members``, ``shared`` and ``rest`` (configs, tokenizers, JSON)."""
    found = {"nodes": 0, "members": 0, "shared": 0, "rest": 0}
    for path in Path(folder).rglob("*"):
        if not path.is_file():
            continue
        size = path.stat().st_size
        kind = "rest"
        if path.suffix == ".safetensors":
            kind = {"nodes": "nodes", SHARED: "shared"}.get(path.relative_to(folder).parts[0], "members")
        found[kind] += size
    return found


def stored_bits(plan: FamilyPlan, folder: Path) -> float:
    """Bits per weight and member of the trees, from the sizes of the node files."""
    return 8 * artifact_bytes(folder)["nodes"] / (plan.weights * len(plan.order))


def write_card(out: Path, plan: FamilyPlan, name: str) -> None:
    """Write ``README.md`` into an artifact; depends on the plan alone."""
    from llmcompress.durable import write_durably
    from llmcompress.quant.tree import drawn

    main = plan.trees.get("model") or next(iter(plan.trees.values()))
    picture = drawn(main, {node: f"{plan.mean_bits(node):.2f} bits" for node in main.ids})
    first = plan.order[0]
    bits = f"{plan.linear_bits():.2f} stored bits per weight and model in the trees"
    text = f"""---
library_name: transformers
tags: [llmcompress, family]
---
# {name}

{len(plan.order)} models of one family in a residual tree, {bits}.

```
{chr(10).join(picture)}
```

    llmcompress generate {out.name} --member {first} --prompt 'Once upon a time'

```python
import llmcompress.hf

model, tokenizer = llmcompress.hf.load("{out.name}", member="{first}")
```

Licences: those of the models it was made from.
"""
    write_durably(out / "README.md", text.encode())
