"""The ``dense`` format: decoded weights under hub names, for any tool that reads the original model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.export.base import (
    FROM_PRETRAINED,
    Exporter,
    block_tensors,
    cast,
    decoded,
    dense_config,
    hub_weights,
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
    from llmcompress.models.layout import ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.quant.store import PackedStore


_THAN = "from the decoded weight"


class DenseExporter(Exporter):
    """Writes an ordinary Hugging Face folder; the weights cost as much as the original's.

    Args:
        dense_dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what each tensor has in the source: biases
            of routers and decays of states often stay in fp32 beside bf16 weights.
    """

    name = "dense"
    loading = "```python\n" + FROM_PRETRAINED

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Never refuses."""
        return []

    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """As many values as the original."""
        return sizes.parameters(layout) * sizes.DTYPE_BYTES.get(self.dense_dtype, weight_bytes)

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write shards block by block, config, tokenizer and provenance."""
        layout, dtype_of = handle.layout, self._dtype_of(handle)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in outside_tensors(handle):
                yield layout.disk.name(name), cast(name, tensor, dtype_of(name))
            for block in layout.blocks:
                rounded = (
                    (name, cast(name, _dense(value), dtype_of(name)))
                    for name, value in block_tensors(handle, store, block).items()
                )
                for name, value in hub_weights(layout, block, rounded):
                    yield name, _dense(value)

        config = dense_config(handle, None if self.dense_dtype == "auto" else self.dense_dtype)
        write_model_folder(out, handle, tensors(), config, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Open the folder as a fresh checkpoint of the same family and compare by run-time name.

        The reader is the one that loads source models, so it gathers the experts itself.
        """
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
                expected = _dense(value)
                if bank is not None and name in bank.names:
                    expected = family_orientation(bank, name, expected)
                require_equal(out, name, written.tensor(name), cast(name, expected, dtype_of(name)), _THAN)

    def _dtype_of(self, handle: ModelHandle) -> Callable[[str], torch.dtype]:
        """Type of each tensor, by run-time name."""
        import torch

        if self.dense_dtype == "auto":
            return handle.checkpoint.dtype_of
        wanted: torch.dtype = getattr(torch, self.dense_dtype)
        return lambda _: wanted


def _dense(value: Tensor | PackedWeight) -> Tensor:
    """A weight as it is, or decoded in fp32."""
    import torch

    return decoded(value, torch.float32) if isinstance(value, PackedWeight) else value
