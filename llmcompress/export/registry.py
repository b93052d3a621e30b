"""Exporters by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.errors import EnvironmentProblem, ExportError
from llmcompress.export.base import SHARD_BYTES, Exporter, Policies, dense_values, values
from llmcompress.plugins import discover, names

if TYPE_CHECKING:
    from pathlib import Path

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import ModelLayout
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.quant.store import PackedStore

FORMATS = ("native", "compressed-tensors", "gguf", "dense")
GROUP = "llmcompress.exporters"


def formats() -> tuple[str, ...]:
    """Every format that can be written: the built-in ones, then those of other packages."""
    return (*FORMATS, *(name for name in names(GROUP) if name not in FORMATS))


class NativeExporter(Exporter):
    """Our own format: every spec, mixed bits and run-time policies; read with ``import llmcompress.hf``."""

    name = "native"

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Never refuses: the format is made for whatever the pipeline produces."""
        return []

    def losses(self, policies: Policies) -> list[str]:
        """Loses nothing."""
        return []

    def output_bytes(self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int) -> int:
        """Packed tensors as they are in memory, and the dense rest."""
        from llmcompress.quant.codecs import codec

        shapes = {name: shape for name, _, shape, _ in layout.quantizable() if name in plan}
        packed = sum(codec(plan[name].codec).nbytes(shape, plan[name]) for name, shape in shapes.items())
        return packed + dense_values(layout, plan) * weight_bytes

    def working_bytes(self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int) -> int:
        """One block as it is packed, the largest tensor that stays dense, and a shard on its way out."""
        from llmcompress.models.sizes import packed_block_bytes

        blocks = max((packed_block_bytes(block, plan) for block in layout.blocks), default=0)
        views = [*layout.outside, *(view for block in layout.blocks for view in block.tensors())]
        quantized = {f"{name}.weight" for name in plan} | set(plan)
        dense = max((values(view.shape) for view in views if view.name not in quantized), default=0)
        output = self.output_bytes(layout, plan, weight_bytes)
        return blocks + dense * weight_bytes + min(SHARD_BYTES, output)

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write through :mod:`llmcompress.export.native`, which streams block by block."""
        from llmcompress.export.native import write_native

        write_native(handle, store, {name: dict(policy) for name, policy in policies.items()}, out, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore) -> None:
        """Compare every packed and replaced tensor in the files with the store's, byte for byte."""
        import torch

        from llmcompress.export.readers import SafetensorsFolder

        with SafetensorsFolder(out) as files:
            for _, patch in store.blocks():
                expected = dict(patch.replaced)
                for name, packed in patch.packed.items():
                    expected.update({f"{name}.{key}": tensor for key, tensor in packed.tensors.items()})
                for name, tensor in expected.items():
                    found = files.tensor(name)
                    if found.shape != tensor.shape or not torch.equal(found.to(tensor.dtype), tensor):
                        raise ExportError(f"{out}: {name} reads back different from what was quantized")


def exporter(name: str, dense_dtype: str = "auto") -> Exporter:
    """Return the exporter called ``name``.

    Args:
        name: One of :func:`formats`.
        dense_dtype: Data type of the ``dense`` format, ``auto`` for the source's.

    Raises:
        ExportError: There is no such format.
        EnvironmentProblem: The package that brings it is broken.
    """
    if name == "native":
        return NativeExporter()
    if name == "compressed-tensors":
        from llmcompress.export.compressed_tensors import CompressedTensorsExporter

        return CompressedTensorsExporter()
    if name == "gguf":
        from llmcompress.export.gguf import GGUFExporter

        return GGUFExporter()
    if name == "dense":
        from llmcompress.export.dense import DenseExporter

        return DenseExporter(dense_dtype)
    if name in names(GROUP):
        return _of_another_package(name)
    raise ExportError(f"unknown export format {name!r}", f"use one of {', '.join(formats())}")


def _of_another_package(name: str) -> Exporter:
    made = discover(GROUP)[name]
    if not (isinstance(made, type) and issubclass(made, Exporter) and made.name == name):
        raise EnvironmentProblem(
            f"plug-in format {name!r} is not an Exporter class of that name",
            "its author should derive it from llmcompress.export.base.Exporter",
        )
    return made()
