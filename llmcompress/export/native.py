"""The native format: packed tensors as they are in memory, under run-time names, plus ``quantization_config``.

Read with ``import llmcompress.hf`` and ``AutoModelForCausalLM.from_pretrained``. Written block by
block from the source and the store, never from a whole model; equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

from llmcompress.errors import ExportError
from llmcompress.export.base import (
    FROM_PRETRAINED,
    SHARD_BYTES,
    Exporter,
    dense_config,
    require_equal,
    require_no_other,
    write_model_folder,
)
from llmcompress.models import sizes
from llmcompress.models.quantization_config import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.quant.store import PackedStore

_QUANTIZED, _SOURCE = "from what was quantized", "from the source"


class NativeExporter(Exporter):
    """Our own format: every spec, mixed bits and run-time policies; read with ``import llmcompress.hf``."""

    name = "native"
    loading = (
        "```python\n"
        "import llmcompress.hf  # registers the format with transformers; without it the weights would not be read\n"
        + FROM_PRETRAINED
    )

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Never refuses: the format is made for whatever the pipeline produces."""
        return []

    def losses(self, policies: Policies) -> list[str]:
        """Loses nothing."""
        return []

    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """Packed tensors as they are in memory, and the dense rest."""
        return sizes.model_bytes(layout, plan, weight_bytes, policies)

    def working_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """One block as it is packed, the largest tensor that stays dense, and a shard on its way out, or that tensor
        once more as it is read back.
        """
        blocks = max((sizes.packed_block_bytes(block, plan) for block in layout.blocks), default=0)
        views = [*layout.outside, *(view for block in layout.blocks for view in block.tensors())]
        quantized = {f"{name}.weight" for name in plan} | set(plan)
        dense = weight_bytes * max((prod(view.shape) for view in views if view.name not in quantized), default=0)
        output = self.output_bytes(layout, plan, weight_bytes, policies)
        return blocks + dense + max(dense, min(SHARD_BYTES, output))

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write block by block, see :func:`write_native`."""
        write_native(handle, store, policies, out, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Compare every tensor in the files, and the config's plan and policies, with the model that was measured.

        What the files hold is what :func:`~llmcompress.models.assemble.compressed_model` puts in memory: packed tensors
        byte for byte, those that a stage replaced by value, and the dense rest as in the source.

        Raises:
            ExportError: Something differs, is missing, or is not part of the model.
        """
        from llmcompress.export.readers import SafetensorsFolder
        from llmcompress.models.assemble import block_tensors, outside_tensors

        policies = policies or {}
        saved = json.loads((out / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        if saved != json.loads(json.dumps(to_json(store.plan(), policies))):
            raise ExportError(f"{out}: config.json reads back another plan or other policies")
        with SafetensorsFolder(out) as files:
            left = files.names()
            for name, tensor in outside_tensors(handle, policies):
                require_equal(out, name, files.tensor(name), tensor, _SOURCE)
                left.discard(name)
            for block in handle.layout.blocks:
                for name, tensor in block_tensors(handle, store, block):
                    require_equal(out, name, files.tensor(name), tensor, _QUANTIZED)
                    left.discard(name)
                for name, tensor in store.read_block(block.index).replaced.items():
                    # the files hold it in the checkpoint's data type
                    require_equal(out, name, files.tensor(name).to(tensor.dtype), tensor, _QUANTIZED)
        require_no_other(out, left)


def write_native(
    handle: ModelHandle,
    store: PackedStore,
    policies: Policies,
    out: Path,
    provenance: dict[str, Any],
) -> None:
    """Write an artifact; ``out`` appears only when it is complete.

    Args:
        handle: The source.
        store: What the quantizing stages made of it.
        policies: Run-time policies by name, saved in the config and active after loading.
        out: Folder to create; must not exist.
        provenance: Written beside the weights.

    Raises:
        ExportError: ``out`` exists or cannot be written.
        InputError: The store does not belong to the source.
    """
    from llmcompress.models.assemble import block_tensors, outside_tensors

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from outside_tensors(handle, policies)
        for block in handle.layout.blocks:
            yield from block_tensors(handle, store, block)

    config = {**dense_config(handle), "quantization_config": to_json(store.plan(), policies)}
    write_model_folder(out, handle, tensors(), config, provenance)
