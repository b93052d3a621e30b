"""Where an artifact comes from, as plain data without dates, timings or absolute paths.

The same run gives the same bytes, whether it was interrupted or not and wherever its folder is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.models.paths import PATH_KEYS

if TYPE_CHECKING:
    from llmcompress.stages.state import RunContext, RunState


def provenance(state: RunState, ctx: RunContext) -> dict[str, Any]:
    """Facts about source, recipe, calibration and versions.

    Args:
        state: Has a model; calibration is optional.
        ctx: The export stage's context.
    """
    import safetensors
    import torch
    import transformers

    import llmcompress

    assert state.model is not None
    calibration = state.calibration
    return {
        "recipe": portable_recipe(ctx.recipe),
        "source": {
            "name": portable(str(ctx.recipe.get("model", {}).get("path") or state.model.path)),
            "model_type": state.model.layout.model_type,
            "config_sha256": hashlib.sha256(_canonical(dict(state.model.config))).hexdigest(),
            "license": source_license(Path(state.model.path)),
        },
        "calibration": None
        if calibration is None
        else {"sha256": calibration.hash, **_scalars(calibration.provenance)},
        "compute": {"device": ctx.device, "dtype": ctx.dtype},
        "versions": {
            "llmcompress": llmcompress.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def portable(text: str) -> str:
    """Keep only the last part of an absolute or relative folder; hub names and assets stay whole."""
    if text.startswith("asset:") or not (text.startswith(("/", ".", "~")) or "\\" in text or Path(text).exists()):
        return text
    return Path(text.rstrip("/")).name


def portable_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what belongs to one machine (run folder, threads, budgets, absolute paths) or is not set."""

    def clean(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            cleaned = {k: clean(v, k) for k, v in value.items()}
            return {k: v for k, v in cleaned.items() if v is not None and v not in ({}, [], "")}
        if isinstance(value, list | tuple):
            return [clean(item, key) for item in value]
        if isinstance(value, str) and (key in PATH_KEYS or value.startswith(("/", "~"))):
            return portable(value)
        return value

    cleaned: dict[str, Any] = clean({k: v for k, v in recipe.items() if k not in ("host", "device")})
    run = {k: v for k, v in dict(cleaned.get("run") or {}).items() if k not in ("dir", "threads", "device")}
    cleaned.pop("run", None)
    if run:
        cleaned["run"] = run
    stages = {name: dict(stage) for name, stage in dict(cleaned.get("stages") or {}).items()}
    for stage in stages.values():
        if stage.get("type") == "export":
            stage.pop("dir", None)
    if stages:
        cleaned["stages"] = stages
    return cleaned


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the top of a model card; empty when there is none or it is not valid."""
    import yaml

    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def source_license(folder: Path) -> str | None:
    """Licence the source's model card declares, None if it declares none."""
    for name in ("README.md", "readme.md"):
        path = folder / name
        if path.is_file():
            declared = front_matter(path.read_text(encoding="utf-8", errors="replace"))
            value = declared.get("license_name") or declared.get("license")
            return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)
    return None


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _scalars(data: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars of a provenance record, with paths reduced to their names."""
    return {
        key: portable(value) if isinstance(value, str) else value
        for key, value in sorted(data.items())
        if isinstance(value, str | int | float | bool) and key not in ("seconds", "time", "date", "cached", "hash")
    }
