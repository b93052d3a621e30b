"""Opens whatever a command is pointed at: native artifacts, dense checkpoints, other formats transformers reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.cli.look_ahead import read_object
from llmcompress.errors import InputError, UsageError
from llmcompress.models.paths import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model in memory.

    Attributes:
        path: Its folder.
        model: In evaluation mode.
        tokenizer: Its tokenizer, None when it has none and none was asked for.
        weight_bytes: Bytes of parameters and buffers.
        device: Where it is.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    weight_bytes: int
    device: str


def open_model(
    text: str,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
    need_tokenizer: bool = True,
    member: str | None = None,
) -> OpenedModel:
    """Load a model for use.

    Args:
        text: Folder, run folder or ``asset:NAME``.
        dtype: Type of the dense parts; ``auto`` is float32 on the CPU, else the checkpoint's.
        device: ``auto``, ``cpu`` or ``cuda``.
        tokenizer: Folder of the tokenizer if it is elsewhere.
        need_tokenizer: Whether a missing tokenizer is an error.
        member: Which model of a family.

    Raises:
        InputError: The folder holds no model that can be read.
        UsageError: The dtype is unknown.
    """
    from llmcompress.pipeline.device import resolve_device

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: unknown", f"choose one of {', '.join(DTYPES)}")
    path, place = model_folder(text), resolve_device(device)
    wanted = "float32" if dtype == "auto" and place == "cpu" else dtype
    model, words = _load(path, wanted, member)
    if tokenizer is not None:
        words = _tokenizer(model_or_tokenizer_folder(tokenizer))
    if words is None:
        try:
            words = _tokenizer(path)
        except InputError:
            if need_tokenizer:
                raise
    model = model.to(place).eval()
    held = {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    return OpenedModel(path, model, words, sum(held.values()), place)


def model_or_tokenizer_folder(text: str) -> Path:
    """Folder that a tokenizer option names."""
    from llmcompress.models.paths import resolve_path

    return resolve_path(text, None)


def _load(path: Path, dtype: str, member: str | None) -> tuple[Any, Any]:
    from llmcompress.models.family_artifact import is_family

    if member is not None or is_family(path):
        from llmcompress.hf import load

        return load(path, dtype=None if dtype == "auto" else dtype, member=member)
    quantization = read_object(path / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is None or method == "llmcompress":
        from llmcompress.hf import load

        return load(path, dtype=None if dtype == "auto" else dtype)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: transformers cannot load this {method} checkpoint: {first}") from error
    return model, None


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from llmcompress.models.handle import load_tokenizer

    return load_tokenizer(path)
