"""PackedStore: the durable blocks of a quantizing stage, one safetensors file each.

A block file appears under its final name only when complete (written beside, synced, renamed),
so whatever is there after a kill can be trusted and resume starts at the first gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.durable import durably, write_durably
from llmcompress.errors import InputError
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantPlan, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockPatch:
    """What a quantizing stage made of one block.

    Attributes:
        packed: Plan name → packed weight.
        replaced: Run-time tensor name → new dense tensor (calibrated routers).
        record: JSON data for the report: errors, tokens per expert, shift rates, seconds.
    """

    packed: Mapping[str, PackedWeight]
    replaced: Mapping[str, Tensor]
    record: dict[str, Any] = field(default_factory=dict)


class PackedStore:
    """Blocks on disk, optionally on top of an earlier stage's store.

    Args:
        root: Folder that holds ``00000.safetensors`` …; created on first write.
        base: Store whose blocks show through where this one has nothing of the same name.
    """

    def __init__(self, root: Path, base: PackedStore | None = None) -> None:
        self.root = root
        self.base = base

    def path(self, index: int) -> Path:
        """File of block ``index``."""
        return self.root / f"{index:05d}.safetensors"

    def finished(self) -> set[int]:
        """Indices of complete blocks in this store (not its base)."""
        return {int(p.stem) for p in self.root.glob("[0-9]*.safetensors")} if self.root.is_dir() else set()

    def indices(self) -> list[int]:
        """Indices of blocks here or in a base, in order."""
        found = self.finished()
        if self.base is not None:
            found |= set(self.base.indices())
        return sorted(found)

    def write_block(self, index: int, patch: BlockPatch) -> None:
        """Write one finished block durably.

        Tensor bytes depend only on the patch: names are sorted and the record, which may hold
        timings, goes into a JSON file of its own.
        """
        from llmcompress.quant.tensor_writer import write_tensors

        self.root.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{key}": t.contiguous() for n, pw in patch.packed.items() for key, t in pw.tensors.items()}
        tensors.update({name: t.contiguous() for name, t in patch.replaced.items()})
        header = {
            name: {"shape": list(pw.shape), "spec": pw.spec.to_dict(), "tensors": sorted(pw.tensors)}
            for name, pw in sorted(patch.packed.items())
        }
        write_durably(self.path(index).with_suffix(".json"), json.dumps(patch.record, sort_keys=True).encode())
        with durably(self.path(index)) as handle:
            write_tensors(handle, tensors, {"packed": json.dumps(header, sort_keys=True)})

    def read_block(self, index: int) -> BlockPatch:
        """Read block ``index``, merged over the base's block of the same index.

        Raises:
            InputError: The file is damaged.
        """
        below = self.below(index)
        if index not in self.finished():
            return below
        packed, replaced = self._read_own(index)
        record_file = self.path(index).with_suffix(".json")
        record = json.loads(record_file.read_text()) if record_file.exists() else {}
        # a weight that is quantized here was dense until now, whatever a stage below made of it (pruned it, say)
        dense = {name: t for name, t in below.replaced.items() if name.removesuffix(".weight") not in packed}
        return BlockPatch({**below.packed, **packed}, {**dense, **replaced}, {**below.record, **record})

    def below(self, index: int) -> BlockPatch:
        """What earlier stages made of block ``index``."""
        return self.base.read_block(index) if self.base is not None else BlockPatch({}, {})

    def plan(self) -> QuantPlan:
        """Spec of every quantized weight, here and in the bases, from the files' headers alone.

        Raises:
            InputError: A file is damaged.
        """
        found = {} if self.base is None else self.base.plan()
        for index in sorted(self.finished()):
            header, _ = self._read_file(index, tensors=False)
            found.update({name: QuantSpec.from_dict(entry["spec"]) for name, entry in header.items()})
        return found

    def _read_own(self, index: int) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
        header, tensors = self._read_file(index)
        packed = {}
        for name, entry in header.items():
            own = {key: tensors.pop(f"{name}.{key}") for key in entry["tensors"]}
            packed[name] = PackedWeight(tuple(entry["shape"]), QuantSpec.from_dict(entry["spec"]), own)
        return packed, tensors

    def _read_file(self, index: int, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file says of its packed weights, and its tensors where they are asked for."""
        from safetensors import SafetensorError, safe_open

        path = self.path(index)
        try:
            with safe_open(path, framework="pt") as handle:
                header = json.loads((handle.metadata() or {}).get("packed", "{}"))
                names = handle.keys() if tensors else ()
                return header, {name: handle.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: cannot read this block: {error}", "delete it and resume the run") from error

    def blocks(self) -> Iterator[tuple[int, BlockPatch]]:
        """Iterate over all blocks in order, one in memory at a time."""
        for index in self.indices():
            yield index, self.read_block(index)
