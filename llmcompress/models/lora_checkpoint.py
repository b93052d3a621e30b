"""A LoRA adapter in PEFT's format, read over its base as the checkpoint that merging them would write.

Nothing is written and no second copy of the base is held: ``W + scale · B A`` is made as a weight is read, in fp32, and
rounded to the type of the base's file as PEFT's own ``merge_and_unload`` does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.layout import ModelLayout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# starts that change the base as well, so that the adapter alone does not say what the model is
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
_MERGE = (
    "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER), "
    "then name that folder"
)


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to one weight.

    Attributes:
        low: A, ``[r, K]``.
        high: B, ``[N, r]``.
        scale: α/r, or α/√r with rank-stabilised adapters.
    """

    low: Tensor
    high: Tensor
    scale: float

    def __call__(self, weight: Tensor) -> Tensor:
        """``[N, K]`` → ``[N, K]`` in the same type."""
        return (weight.float() + self.scale * (self.high.float() @ self.low.float())).to(weight.dtype)


@dataclass(frozen=True)
class Replacement:
    """A weight that was trained whole beside the adapter (``modules_to_save``)."""

    value: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """The new weight in the type of the old one."""
        return self.value.to(weight.dtype)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def not_a_model(folder: Path) -> InputError:
    """The error where a whole model is needed."""
    return InputError(f"{folder}: an adapter ({CONFIG}), not a model", _MERGE)


def read_adapter(folder: Path, layout: ModelLayout) -> dict[str, Callable[[Tensor], Tensor]]:
    """Run-time name of each weight that the adapter changes, and how.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: Of the base.

    Raises:
        InputError: A file is missing or damaged, the adapter is of a kind that is no sum with the base's weights, or it
            belongs to a model of other names or shapes; all problems of one kind at once.
    """
    config, tensors = _read(folder)
    refused = _refusals(config)
    if refused:
        raise InputError(f"{folder}: an adapter with {', '.join(refused)} is not read", _MERGE)
    shapes = {view.name: tuple(view.shape) for view in layout.tensors()}
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    problems = []
    for key, value in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        if key.endswith(UP) and key.removesuffix(UP) + DOWN in tensors:
            continue
        if key.endswith(DOWN) and (high := tensors.get(key.removesuffix(DOWN) + UP)) is not None:
            name = name.removesuffix(DOWN) + ".weight"
            shape: tuple[int, ...] = (high.shape[0], value.shape[1])
            found[name] = Addition(value, high, _scale(config, name.removesuffix(".weight"), value.shape[0]))
            fits = high.shape[1] == value.shape[0]
        else:
            shape, fits, found[name] = tuple(value.shape), True, Replacement(value)
        if name not in shapes:
            problems.append(f"{key}: the base has no such weight")
        elif not fits or shape != shapes[name]:
            problems.append(f"{key}: for a weight of shape {list(shape)}, the base's has {list(shapes[name])}")
    if problems or not found:
        shown = [*problems[:3], *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])]
        lines = "\n".join(f"{folder}: {problem}" for problem in shown or ["holds no weights"])
        base = config.get("base_model_name_or_path") or "its config does not say which"
        raise InputError(lines, f"an adapter needs the base it was trained on ({base}); or {_MERGE}")
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: no {WEIGHTS}; pickle files can run code and are refused", _MERGE)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot read the adapter: {error}", "download or train it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: is not a JSON object", "download or train it again")
    return config, tensors


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """Settings under which the model is not base plus ``scale · B A``."""
    found = [] if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')}"]
    found += [key for key in ("use_dora", "lora_bias", "fan_in_fan_out", "alora_invocation_tokens") if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        found.append(f"init_lora_weights {start}")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α/r of one module; patterns are matched against the end of its name, as PEFT does.

    Raises:
        InputError: ``lora_alpha`` is missing or no number.
    """
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise InputError(f"{CONFIG}: lora_alpha is {alpha!r}, not a number", "download or train the adapter again")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
