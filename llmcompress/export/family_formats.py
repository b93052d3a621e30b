"""One member of a family in the formats of other tools, where they can hold it.

A sum of nodes lies on no common grid: scales of different nodes have no common factor. A member whose every weight
has a single node above it does: ``s (q - (2^b - 1)/2) = (s/2) (2q - (2^b - 1))``, odd integers of ``b + 1`` bits with
half the scale, which fit 4 bits up to b = 3 and 8 bits above. GGUF can also hold a member dense, its weights rounded to
the family's type as ``--format dense`` rounds them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from llmcompress.errors import ExportError
from llmcompress.export.family_edit import write_dense_member
from llmcompress.export.registry import exporter
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.handle import ModelHandle
from llmcompress.quant.bitpack import unpack
from llmcompress.quant.codecs import codec, delta_tree, int_group
from llmcompress.quant.codecs.int_group import PACKED, SCALE
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore

WIDEST_NARROW = 3


def write_other_member(artifact: FamilyArtifact, member: str, name: str, out: Path) -> str:
    """Write a member as ``compressed-tensors`` or ``gguf``, read back and compared.

    Args:
        artifact: The family.
        member: Which member.
        name: The format.
        out: Folder to create.

    Returns:
        One remark on what was written.

    Raises:
        ExportError: The format cannot hold the member; every reason is named.
    """
    artifact.require(member)
    if out.exists():
        raise ExportError(f"{out}: exists already", "remove it, or give another folder with --out")
    found, reasons = on_one_grid(artifact, member)
    if reasons and name != "gguf":
        raise _refused(member, name, reasons)
    writer = exporter(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".member-") as temporary:
        write_dense_member(artifact, member, Path(temporary) / "dense")
        handle = ModelHandle.open(Path(temporary) / "dense")
        plan = {linear: packed.spec for linear, packed in found.items()}
        if not reasons:
            reasons = writer.refusals(handle.layout, plan, {})
        if reasons and name == "gguf":
            plan, found = {}, {}
            reasons = writer.refusals(handle.layout, plan, {})
        reasons = [*reasons, *writer.source_refusals(handle.path, handle.config)]
        if reasons:
            raise _refused(member, name, reasons)
        store = PackedStore(Path(temporary) / "store")
        for block in handle.layout.blocks:
            own = {linear.name: found[linear.name] for linear in block.linears() if linear.name in found}
            store.write_block(block.index, BlockPatch(own, {}))
        writer.write(handle, store, {}, out, {"member": member, "family": artifact.folder.name})
        writer.read_back(out, handle, store)
    return "every weight exact" if found else f"dense, weights rounded to {str(handle.dtype).removeprefix('torch.')}"


def _refused(member: str, name: str, reasons: list[str]) -> ExportError:
    return ExportError(
        "\n".join(f"{member}: {reason}" for reason in reasons),
        f"--format dense, then compress that folder with a recipe and export it as {name}",
    )


def on_one_grid(artifact: FamilyArtifact, member: str) -> tuple[dict[str, PackedWeight], list[str]]:
    """A member's weights as ordinary group-quantized ones, bit for bit.

    Returns:
        Weight → packed weight for those that have one, and the reasons for the others, one line in all.
    """
    found, several, scales = {}, [], []
    # one width for all: runtimes fuse layers side by side
    widest = max(max(chosen.values()) for chosen in artifact.plan.bits.values())
    for linear in artifact.plan.linears:
        nodes = [artifact.node(node, linear) for node in artifact.plan.path(linear, member)]
        if len(nodes) > 1:
            several.append(linear)
            continue
        packed = _doubled(nodes[0], 4 if widest <= WIDEST_NARROW else 8)
        if packed is None:
            scales.append(linear)
            continue
        assert torch.equal(codec(packed.spec.codec).decode(packed), artifact.weight(linear, member))
        found[linear] = packed
    reasons = []
    if several:
        count = len(artifact.plan.path(several[0], member))
        reasons.append(
            f"{several[0]} is a sum of {count} nodes, as are {len(several)} weights in all: on no single grid"
        )
    if scales:
        reasons.append(f"{scales[0]}: scales do not fit fp16")
    return found, reasons


def _doubled(node: PackedWeight, width: int) -> PackedWeight | None:
    """A node on the integer grid of twice its codes; None where fp16 cannot hold half its scales."""
    bits = node.spec.bits
    exact = node.tensors[SCALE].float() * 2.0 ** (int(node.tensors[delta_tree.EXPONENT][0]) - 1)
    scale = exact.half()
    if not torch.equal(scale.float(), exact):
        return None
    codes = unpack(node.tensors[PACKED], bits, node.shape[-1]).to(torch.int16)
    shifted = (2 * codes - ((1 << bits) - 1) + (1 << (width - 1))).to(torch.uint8)
    return int_group.encode(shifted, scale, None, QuantSpec(width, node.spec.group_size, symmetric=True))
