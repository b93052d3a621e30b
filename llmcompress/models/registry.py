"""From ``config.json`` to a layout. A family that is not in the table is refused, never half-handled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.families import (
    afmoe,
    deepseek,
    dense,
    ernie,
    gemma4,
    glm_moe,
    gpt_oss,
    granite_moe,
    hunyuan,
    hybrids,
    kimi,
    learned_positions,
    lfm2,
    llama4,
    mamba,
    mimo,
    minimax,
    mixtral,
    nemotron,
    olmo_hybrid,
    parallel,
    qwen_moe,
    qwen_next,
    zamba,
)
from llmcompress.models.families.parts import Family
from llmcompress.models.layout import ModelLayout

# keys that only mixtures of experts or state-space models have
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_STATE_SPACE_KEYS = ("state_size", "ssm_state_size", "mamba_d_state", "d_state", "conv_kernel")

# how transformers saves the text part of a model of several modalities
_AUTO = "AutoModelForCausalLM.from_pretrained(PATH, dtype='auto').save_pretrained(NEW)"
_TEXT_ALONE = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "llama4"), _AUTO),
    "gemma4": "Gemma4ForCausalLM.from_pretrained(PATH, config=AutoConfig.from_pretrained(PATH).text_config, "
    "dtype='auto', key_mapping={'model.language_model': 'model'}).save_pretrained(NEW)",
}


@cache
def _table() -> dict[str, Family]:
    experts = (
        mixtral,
        qwen_moe,
        deepseek,
        glm_moe,
        gpt_oss,
        minimax,
        ernie,
        hunyuan,
        granite_moe,
        afmoe,
        mimo,
        llama4,
        gemma4,
    )
    modules = (
        *experts,
        qwen_next,
        kimi,
        olmo_hybrid,
        lfm2,
        mamba,
        hybrids,
        nemotron,
        zamba,
        parallel,
        learned_positions,
        dense,
    )
    return {family.model_type: family for module in modules for family in module.FAMILIES}


def families() -> list[str]:
    """Names of the supported model types."""
    return sorted(_table())


def layout_from_config(config: Mapping[str, Any]) -> ModelLayout:
    """Compute the layout of a model from its ``config.json``.

    Args:
        config: The file as a dict.

    Returns:
        Blocks, linears, expert banks and dense tensors under transformers' run-time names.

    Raises:
        InputError: The model type is not supported, here or by the installed transformers, or a value of the config is
            wrong.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("config.json: model_type is missing", "point model.path at a transformers model folder")
    family = _table().get(model_type)
    if family is not None:
        _require_model(family)
    else:
        # whose model its package may bring itself
        family = _from_plugins(model_type)
    if family is None:
        raise _refusal(model_type, config)
    return family.layout(config)


def _require_model(family: Family) -> None:
    """Refuse a family whose model the installed transformers does not have; found out without importing it."""
    folder = _models_folder()
    if folder is not None and not (folder / (family.package or family.model_type)).is_dir():
        raise InputError(
            f"model type {family.model_type!r} is not in the installed transformers {version('transformers')}",
            "upgrade it: pip install -U transformers",
        )


@cache
def _models_folder() -> Path | None:
    """Where transformers keeps its models, None where it is not installed as files."""
    spec = find_spec("transformers")
    folders = [Path(place) / "models" for place in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((folder for folder in folders if folder.is_dir()), None)


def _from_plugins(model_type: str) -> Family | None:
    from llmcompress.plugins import discover

    found = discover("llmcompress.families").get(model_type)
    return found if isinstance(found, Family) else None


def _refusal(model_type: str, config: Mapping[str, Any]) -> InputError:
    supported = f"supported: {', '.join(families())}"
    text = config.get("text_config")
    if isinstance(text, Mapping):
        step = f"save its text part ({text.get('model_type')!r}) as a model of its own first"
        if model_type in _TEXT_ALONE:
            step += f": {_TEXT_ALONE[model_type]}"
        return InputError(
            f"model type {model_type!r} has several modalities; only plain text models are supported",
            f"{step}; {supported}",
        )
    if any(key in config for key in _EXPERT_KEYS):
        kind = "is a mixture of experts whose expert layout is not known here; quantizing it would skip its experts"
    elif any(key in config for key in _STATE_SPACE_KEYS):
        kind = "is a state-space model whose layout is not known here"
    else:
        kind = "is not supported"
    near = difflib.get_close_matches(model_type, families(), 1)
    guess = f"did you mean {near[0]}? " if near else ""
    return InputError(f"model type {model_type!r} {kind}", f"{guess}{supported}")
