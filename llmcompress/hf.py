"""transformers integration: importing this module is enough.

    import llmcompress.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/quickstart/artifact")

Without the import transformers does not know the quantization method, says so in a log line, and
goes on with random weights; :func:`load` cannot fall into that trap. Weights stay packed in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import InputError, first_line
from llmcompress.models.alignment import align
from llmcompress.models.assemble import attach_policies, prepare_policies
from llmcompress.models.checkpoint import read_config
from llmcompress.models.family_artifact import FamilyArtifact, is_family
from llmcompress.models.handle import load_tokenizer, transformers_config
from llmcompress.models.paths import ADAPTER, model_folder
from llmcompress.models.quantization_config import METHOD, VERSION, from_json
from llmcompress.models.registry import layout_from_config
from llmcompress.models.shared import share_modules
from llmcompress.nn import lora
from llmcompress.nn.adapted_mixtures import adapt_mixtures
from llmcompress.nn.skipping import register_experts_function
from llmcompress.nn.swap import swap_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class LLMCompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` with ``quant_method: llmcompress``.

    Args:
        specs: Spec dicts.
        modules: Plan name → index into ``specs``.
        policies: Run-time policies by name.
        version: Version of the format.
    """

    def __init__(
        self,
        specs: list[dict[str, Any]] | None = None,
        modules: dict[str, int] | None = None,
        policies: dict[str, dict[str, Any]] | None = None,
        version: int = VERSION,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.version = version
        self.specs = specs or []
        self.modules = modules or {}
        self.policies = policies or {}


class LLMCompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds packed modules before weights are read and attaches policies after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        plan, policies = from_json(self.quantization_config.to_dict())
        layout = layout_from_config(model.config.to_dict())
        share_modules(model, layout)
        swap_modules(model, layout, plan, model.dtype)
        prepare_policies(model, layout, policies)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        align(model)
        _plan, policies = from_json(self.quantization_config.to_dict())
        attach_policies(model, layout_from_config(model.config.to_dict()), policies)
        folder = Path(str(model.config._name_or_path)) / ADAPTER
        if folder.is_dir():
            lora.load(model, folder)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """None: the files hold run-time names and stacked experts, so nothing is merged."""
        return []

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what can be loaded again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are integers; nothing can be trained."""
        return False


def _register() -> None:
    # a reloaded module must not fail on its own earlier registration
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LLMCompressConfig)
        register_quantizer(METHOD)(LLMCompressQuantizer)
    register_experts_function()


_register()


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    member: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an artifact of this tool, or a plain dense model folder.

    Args:
        path: Folder, the folder of a run, or ``asset:NAME``.
        dtype: Type of dense tensors and activations; that of the files by default. Packed tensors keep theirs.
        device: Where to put the model; the CPU by default.
        member: Which model of a family.

    Returns:
        The model in evaluation mode and its tokenizer, None when the folder holds none.

    Raises:
        InputError: The folder is missing, incomplete, damaged, or quantized by something else.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(str(path))
    if is_family(folder):
        return _load_member(folder, member, dtype, device)
    if member is not None:
        raise InputError(f"{folder}: not a family, so it has no member {member!r}", "leave out the member")
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method != METHOD:
            raise InputError(
                f"{folder}: quantized by {method!r}, not by llmcompress", "load it with transformers directly"
            )
        from_json(quantization)
    layout = layout_from_config(config)
    transformers_config(folder)
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {first_line(error)}", "export or download it again") from error
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    model, info = loaded
    _refuse_incomplete(folder, info)
    adapt_mixtures(model, layout)
    align(model)
    if device is not None:
        model = model.to(device)
    return model, _tokenizer_in(folder)


def _tokenizer_in(folder: Path) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(folder) if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def _load_member(
    folder: Path, member: str | None, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from llmcompress.models.family_model import load_member

    artifact = FamilyArtifact(folder)
    name = artifact.require(member)
    wanted = None if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = load_member(artifact, name, wanted)
    if device is not None:
        moved: Any = model
        model = moved.to(device)
    return model, _tokenizer_in(artifact.member_folder(name))


def _refuse_incomplete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse what transformers only warns about: it fills missing weights with random numbers."""
    kinds = {"missing_keys": "missing", "mismatched_keys": "wrong shape", "unexpected_keys": "not part of the model"}
    problems = []
    for key, word in kinds.items():
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(key) or ())
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{folder}: {word}: {', '.join(names[:5])}{more}")
    if problems:
        raise InputError("\n".join(problems), "export or download it again")
