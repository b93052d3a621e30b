"""Write a trained model as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.export.base import ShardWriter, atomic_folder, copy_side_files, dense_config, write_json
from llmcompress.models.handle import DTYPES
from llmcompress.nn import lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.handle import ModelHandle


def save_model(model: PreTrainedModel, source: ModelHandle, out: Path, dtype: str = "auto") -> None:
    """Write weights under run-time names with config and tokenizer; ``out`` appears only when it is complete.

    Of a model with adapters the source's own weights are written, with what the adapters add: those in memory are of
    the compute type, which may hold less of them.

    Args:
        model: All of it in memory, of the source's layout.
        source: Where config and tokenizer come from.
        out: Folder to create.
        dtype: Type of the floating tensors; ``auto`` is what each of them has in the source.
    """
    adapters = lora.adapters(model)
    state = {} if adapters else model.state_dict()
    with atomic_folder(out) as part:
        shards = ShardWriter(part)
        for view in source.layout.tensors():
            adapter = adapters.get(view.name.removesuffix(".weight"))
            if not adapters:
                tensor = state[view.name].detach().cpu()
            else:
                tensor = source.checkpoint.tensor(view.name)
                tensor = tensor if adapter is None else tensor.float() + lora.added(adapter)
            wanted = source.checkpoint.dtype_of(view.name) if dtype == "auto" else DTYPES[dtype]
            shards.add(view.name, tensor.to(wanted) if tensor.is_floating_point() else tensor)
        shards.close()
        write_json(part / "config.json", dense_config(source, None if dtype == "auto" else dtype))
        copy_side_files(source, part)
