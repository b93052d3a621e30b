"""Write a trained model as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.export.base import ShardWriter, atomic_folder, copy_side_files, dense_config, write_json
from llmcompress.models.handle import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.handle import ModelHandle


def save_model(model: PreTrainedModel, source: ModelHandle, out: Path, dtype: str = "auto") -> None:
    """Write weights under run-time names with config and tokenizer; ``out`` appears only when it is complete.

    Args:
        model: All of it in memory, of the source's layout.
        source: Where config and tokenizer come from.
        out: Folder to create.
        dtype: Of the floating tensors; ``auto`` is the source's.
    """
    wanted = source.checkpoint.dtype if dtype == "auto" else DTYPES[dtype]
    state = model.state_dict()
    with atomic_folder(out) as part:
        shards = ShardWriter(part)
        for view in source.layout.tensors():
            tensor = state[view.name].detach().cpu()
            shards.add(view.name, tensor.to(wanted) if tensor.is_floating_point() else tensor)
        shards.close()
        write_json(part / "config.json", dense_config(source, str(wanted).removeprefix("torch.")))
        copy_side_files(source, part)
