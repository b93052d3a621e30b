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
    from collections.abc import Callable, Iterator
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
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what each tensor has in the source: biases of
            routers and decays of states often stay in fp32 beside bf16 weights.
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
        layout, dtype_of = handle.layout, self._dtype_of(handle)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in outside_tensors(handle):
                yield layout.disk.name(name), cast(name, tensor, dtype_of(name))
            for block in layout.blocks:
                yield from hub_dense(layout, block, block_tensors(handle, store, block), dtype_of)

        config = dense_config(handle, None if self._dtype == "auto" else self._dtype)
        write_model_folder(out, handle, tensors(), config, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Open the folder as a fresh checkpoint of the same family and compare by run-time name.

        The reader is the one that loads source models, so it gathers the experts itself.
        """
        import torch

        from llmcompress.models.checkpoint import Checkpoint
        from llmcompress.models.orientation import family_orientation

        dtype_of = self._dtype_of(handle)
        written = Checkpoint(out, handle.layout)
        written.verify()
        for name, tensor in outside_tensors(handle):
            require_equal(out, name, written.tensor(name), cast(name, tensor, dtype_of(name)), _THAN)
        for block in handle.layout.blocks:
            bank = block.bank
            for name, value in block_tensors(handle, store, block).items():
                expected = decoded(value, torch.float32) if isinstance(value, PackedWeight) else value
                if bank is not None and name in bank.names:
                    expected = family_orientation(bank, name, expected)
                require_equal(out, name, written.tensor(name), cast(name, expected, dtype_of(name)), _THAN)

    def _dtype_of(self, handle: ModelHandle) -> Callable[[str], torch.dtype]:
        """Type of each tensor, by run-time name."""
        import torch

        if self._dtype == "auto":
            return handle.checkpoint.dtype_of
        wanted: torch.dtype = getattr(torch, self._dtype)
        return lambda _: wanted


def hub_dense(
    layout: ModelLayout, block: Block, tensors: BlockTensors, dtype_of: Callable[[str], torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's tensors decoded, in the shape and under the names hub checkpoints use.

    Args:
        layout: The model's layout.
        block: The block the tensors belong to.
        tensors: From :func:`~llmcompress.export.base.block_tensors`.
        dtype_of: Wanted floating-point type of a tensor, by run-time name.

    Raises:
        ExportError: A value is beyond that type.
    """
    import torch

    from llmcompress.models.orientation import family_orientation

    bank = block.bank
    for name, value in tensors.items():
        tensor = cast(name, decoded(value, torch.float32) if isinstance(value, PackedWeight) else value, dtype_of(name))
        if bank is None or name not in bank.names:
            for piece, own in layout.disk.pieces(name).items():
                yield piece, tensor[own] if tensor.ndim else tensor
        elif layout.disk.experts is None:
            yield layout.disk.name(name), family_orientation(bank, name, tensor)
        else:
            for expert in range(bank.num_experts):
                names = layout.disk.expert(bank, name, expert)
                for key, rows in bank.parts(name).items():
                    yield names[key], tensor[expert, rows]
