"""The native format: packed tensors as they are in memory, under run-time names, plus ``quantization_config``.

Read with ``import llmcompress.hf`` and ``AutoModelForCausalLM.from_pretrained``. Written block by
block from the source and the store, never from a whole model; equal inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.export.base import (
    ShardWriter,
    atomic_folder,
    copy_side_files,
    dense_config,
    write_json,
    write_provenance,
)
from llmcompress.models.quantization_config import to_json

if TYPE_CHECKING:
    from llmcompress.models.handle import ModelHandle
    from llmcompress.quant.store import PackedStore


def write_native(
    handle: ModelHandle,
    store: PackedStore,
    policies: Mapping[str, Mapping[str, Any]],
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

    with atomic_folder(out) as part:
        shards = ShardWriter(part)
        for name, tensor in outside_tensors(handle, policies):
            shards.add(name, tensor)
        for block in handle.layout.blocks:
            for name, tensor in block_tensors(handle, store, block):
                shards.add(name, tensor)
        shards.close()
        config = dense_config(handle, str(handle.checkpoint.dtype).removeprefix("torch."))
        config["quantization_config"] = to_json(store.plan(), policies)
        write_json(part / "config.json", config)
        copy_side_files(handle, part)
        write_provenance(part, provenance)
