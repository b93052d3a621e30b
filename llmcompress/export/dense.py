"""The ``dense`` format: decoded weights under hub names, for any tool that reads the original model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.export.base import (
    FROM_PRETRAINED,
    BlockTensors,
    Exporter,
    block_tensors,
    cast,
    decoded,
    dense_config,
    outside_tensors,
    require_equal,
    write_model_folder,
)
from llmcompress.models import sizes
from llmcompress.quant.packed import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.quant.store import PackedStore


_THAN = "from the decoded weight"


class DenseExporter(Exporter):
    """Writes an ordinary Hugging Face folder; the weights cost as much as the original's.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the source checkpoint's.
    """

    name = "dense"
    loading = "```python\n" + FROM_PRETRAINED

    def __init__(self, dtype: str = "auto") -> None:
        self._dtype = dtype

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Never refuses."""
        return []

    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """As many values as the original."""
        return sizes.parameters(layout) * sizes.DTYPE_BYTES.get(self._dtype, weight_bytes)

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write shards block by block, config, tokenizer and provenance."""
        layout, dtype = handle.layout, self._torch_dtype(handle)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in outside_tensors(handle):
                yield layout.disk.name(name), cast(name, tensor, dtype)
            for block in layout.blocks:
                yield from hub_dense(layout, block, block_tensors(handle, store, block), dtype)

        write_model_folder(out, handle, tensors(), dense_config(handle, dtype), provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Open the folder as a fresh checkpoint of the same family and compare by run-time name.

        The reader is the one that loads source models, so it gathers the experts itself.
        """
        import torch

        from llmcompress.models.checkpoint import Checkpoint
        from llmcompress.models.orientation import family_orientation

        dtype = self._torch_dtype(handle)
        written = Checkpoint(out, handle.layout)
        written.verify()
        for name, tensor in outside_tensors(handle):
            require_equal(out, name, written.tensor(name), cast(name, tensor, dtype), _THAN)
        for block in handle.layout.blocks:
            bank = block.bank
            for name, value in block_tensors(handle, store, block).items():
                expected = decoded(value, torch.float32) if isinstance(value, PackedWeight) else value
                if bank is not None and name in bank.names:
                    expected = family_orientation(bank, name, expected)
                require_equal(out, name, written.tensor(name), cast(name, expected, dtype), _THAN)

    def _torch_dtype(self, handle: ModelHandle) -> torch.dtype:
        import torch

        return handle.checkpoint.dtype if self._dtype == "auto" else getattr(torch, self._dtype)


def hub_dense(
    layout: ModelLayout, block: Block, tensors: BlockTensors, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's tensors decoded, in the shape and under the names hub checkpoints use.

    Args:
        layout: The model's layout.
        block: The block the tensors belong to.
        tensors: From :func:`~llmcompress.export.base.block_tensors`.
        dtype: Wanted floating-point type.

    Raises:
        ExportError: A value is beyond ``dtype``.
    """
    import torch

    from llmcompress.models.orientation import family_orientation

    bank = block.bank
    for name, value in tensors.items():
        tensor = cast(name, decoded(value, torch.float32) if isinstance(value, PackedWeight) else value, dtype)
        if bank is None or name not in bank.names:
            yield layout.disk.name(name), tensor
        elif layout.disk.experts is None:
            yield layout.disk.name(name), family_orientation(bank, name, tensor)
        else:
            for expert in range(bank.num_experts):
                names = layout.disk.expert(bank, name, expert)
                for key, rows in bank.parts(name).items():
                    yield names[key], tensor[expert, rows]
