"""An opened source model: config, layout, lazy weights, and modules materialised block by block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, first_line
from llmcompress.models import sizes
from llmcompress.models.checkpoint import Checkpoint, read_config, refuse_quantized
from llmcompress.models.layout import ModelLayout, TensorView
from llmcompress.models.lora_checkpoint import read_adapter
from llmcompress.models.paths import resolve_path
from llmcompress.models.registry import layout_from_config
from llmcompress.models.shared import share_modules
from llmcompress.models.tokenizer_files import TOKENIZER_FILES, no_tokenizer
from llmcompress.nn.adapted_mixtures import adapt_mixtures

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what comes out of transformers where a value is of another type, size or kind than it reckons with
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ModelHandle:
    """A full-precision model that has been opened but not loaded.

    Attributes:
        path: Folder of the model.
        tokenizer_path: Folder of its tokenizer.
        config: ``config.json``.
        layout: What :func:`~llmcompress.models.registry.layout_from_config` made of it.
        checkpoint: Its weights.
        dtype: Data type in which blocks are materialised.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        layout: ModelLayout,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        tokenizer_path: Path | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.layout = layout
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.tokenizer_path = tokenizer_path or path

    @classmethod
    def open(cls, path: str | Path, dtype: str = "auto", tokenizer: str | None = None) -> ModelHandle:
        """Open a model folder: read the config, compute the layout, check names and shapes.

        Args:
            path: Folder in transformers format, or ``asset:NAME``.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for that of the files.
            tokenizer: Folder of the tokenizer if it is not in ``path``.

        Raises:
            InputError: The folder is incomplete, damaged, quantized already, or of an unsupported family.
        """
        if dtype != "auto" and dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}", f"use one of auto, {', '.join(DTYPES)}")
        folder = resolve_path(str(path))
        config = read_config(folder)
        refuse_quantized(folder, config)
        layout = layout_from_config(config)
        checkpoint = Checkpoint(folder, layout)
        checkpoint.verify()
        wanted = checkpoint.dtype if dtype == "auto" else DTYPES[dtype]
        return cls(folder, config, layout, checkpoint, wanted, resolve_path(tokenizer) if tokenizer else None)

    def rescaled(self, scales: Mapping[str, Sequence[tuple[int, Tensor]]]) -> ModelHandle:
        """The same model with weights multiplied as they are read; see :meth:`Checkpoint.rescaled`."""
        found = copy.copy(self)
        found.checkpoint = self.checkpoint.rescaled(scales)
        return found

    def adapted(self, folder: Path) -> ModelHandle:
        """This model with a LoRA adapter in PEFT's format added to its weights as they are read.

        Args:
            folder: The adapter's; its tokenizer is taken where it has one.

        Raises:
            InputError: The adapter cannot be read, or belongs to another model.
        """
        found = copy.copy(self)
        found.checkpoint = self.checkpoint.edited(read_adapter(folder, self.layout))
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            found.tokenizer_path = folder
        return found

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sizes.parameters(self.layout)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            InputError: It is missing or cannot be read without running code from the folder.
        """
        return load_tokenizer(self.tokenizer_path)

    def hf_config(self) -> PretrainedConfig:
        """The config as a transformers object; a fresh copy at every call."""
        return transformers_config(self.path)

    def require_modules(self) -> None:
        """See that transformers can build the model's modules, which most stages ask for later.

        Raises:
            InputError: A value of ``config.json`` does not let it.
        """
        meta_model(self.hf_config(), self.dtype)

    def skeleton(self, dtype: torch.dtype | None = None, head: bool = True) -> PreTrainedModel:
        """The whole model with blocks on the meta device.

        Embedding, final norm, head and computed constants (rotary frequencies) are real and on
        the CPU; decoder layers hold no memory until :meth:`load_block`.

        Args:
            dtype: Instead of the handle's.
            head: With false an untied head stays on the meta device: hidden states do not need it.
        """
        model = meta_model(self.hf_config(), dtype or self.dtype)
        share_modules(model, self.layout)
        adapt_mixtures(model, self.layout)
        fill_constants(model)
        self.load_tensors(model, (v for v in self.layout.outside if head or not v.name.startswith("lm_head.")))
        model.tie_weights()
        return model

    def load_block(self, model: PreTrainedModel, index: int, device: str = "cpu") -> nn.Module:
        """Materialise one decoder layer of :meth:`skeleton` in place, with what it borrows of another.

        Args:
            model: Made by :meth:`skeleton`.
            index: Which block.
            device: Where to put it.

        Returns:
            The decoder layer, every parameter that it uses real.
        """
        block = self.layout.blocks[index]
        self.load_tensors(model, block.tensors())
        if block.loan is not None:
            self.load_tensors(model, block.loan.tensors)
        for module in self._modules(model, index) if device != "cpu" else ():
            # adapters that only other blocks use stay on the meta device
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        return model.get_submodule(block.name)

    def _modules(self, model: PreTrainedModel, index: int) -> list[nn.Module]:
        """A decoder layer and the module that it borrows."""
        block = self.layout.blocks[index]
        names = [block.name] if block.loan is None else [block.name, block.loan.owner]
        return [model.get_submodule(name) for name in names]

    def free_block(self, model: PreTrainedModel, index: int) -> None:
        """Put one decoder layer back on the meta device; its memory is released."""
        for module in (part for whole in self._modules(model, index) for part in whole.modules()):
            for name in list(module._parameters):
                _release(module, name)
            for name in list(module._buffers):
                # computed constants are in no file and could not be loaded again
                if name not in module._non_persistent_buffers_set:
                    _release(module, name)

    def free_embeddings(self, model: PreTrainedModel) -> None:
        """Put embedding and head back on the meta device, once hidden states exist; their memory is released."""
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for name in list(module._parameters) if module is not None else ():
                _release(module, name)
        model.tie_weights()

    def dense_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The full-precision model, all of it in memory, in evaluation mode."""
        model = self.skeleton(dtype)
        self.load_tensors(model, (view for block in self.layout.blocks for view in block.tensors()))
        model.generation_config = generation_settings(self.path)
        return model.eval()

    def load_tensors(self, model: PreTrainedModel, views: Iterable[TensorView]) -> None:
        """Read tensors from the checkpoint into ``model``, each in the type its place asks for."""
        assign_all(model, ((view.name, self.checkpoint.tensor(view.name)) for view in views))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in ``folder``, never running code from it.

    Raises:
        InputError: It is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        # a string that is not a folder would be taken for a model on the hub
        if not Path(folder).is_dir():
            raise OSError("no such folder")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        bare = Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)
        raise no_tokenizer(folder, None if bare else first_line(error)) from error
    return tokenizer


def transformers_config(folder: Path) -> PretrainedConfig:
    """Let transformers parse ``config.json``.

    Raises:
        InputError: transformers rejects a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, StrictDataclassError, *_REFUSALS) as error:
        raise InputError(f"{folder}/config.json: transformers rejects it: {_reason(error)}") from error
    return config


def _reason(error: BaseException) -> str:
    """What transformers said in a line; it puts the field before the reason."""
    return ": ".join(line.strip().rstrip(":") for line in str(error).splitlines()[:2]) or type(error).__name__


def generation_settings(folder: Path) -> GenerationConfig:
    """A model's ``generation_config.json``; what ``config.json`` says where there is none.

    Raises:
        InputError: A file cannot be read.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(transformers_config(folder))
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, *_REFUSALS) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}", "correct it, or remove it") from error


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model with everything on the meta device, in evaluation mode.

    Attention is ``sdpa`` where the family supports it and ``eager`` otherwise, as
    ``from_pretrained`` chooses.

    Raises:
        InputError: A value of the config is one that its modules cannot be built with.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    except _REFUSALS as error:
        place = f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"
        raise InputError(f"{place}: transformers cannot build its modules: {_reason(error)}") from error
    result: PreTrainedModel = model.eval()
    return result


def fill_constants(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, embedding scales).

    transformers recomputes them in ``_init_weights``; parameters are still on the meta device
    then, so nothing else is initialised.
    """
    # Falcon-H1 computes its layers' constants from the model's side
    owners = [model.base_model] if model.config.model_type == "falcon_h1" else []
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if getattr(module, name, None) is not None]
        for name in names:
            buffer = torch.empty_like(getattr(module, name), device="cpu")
            module.register_buffer(name, buffer, persistent=False)
        if names:
            model._init_weights(module)
    for owner in owners:
        model._init_weights(owner)


def assign(model: nn.Module, name: str, tensor: Tensor, dtype_plan: dict[str, torch.dtype] | None = None) -> None:
    """Put a real tensor in the place of a meta parameter or buffer, in that place's data type.

    Args:
        model: Any module.
        name: Full name of the parameter or buffer.
        tensor: Its value; shapes must agree.
        dtype_plan: Name parts that transformers keeps in another type (``_get_dtype_plan``).

    Raises:
        InputError: The model has no such tensor, or of another shape.
    """
    owner_name, _, key = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        place = getattr(owner, key)
    except AttributeError as error:
        raise InputError(f"{name}: the installed transformers has no such tensor in {type(model).__name__}") from error
    if place.shape != tensor.shape:
        raise InputError(f"{name}: shape {list(tensor.shape)} where {list(place.shape)} is needed")
    dtype = next((kept for part, kept in (dtype_plan or {}).items() if f".{part}." in f".{name}."), place.dtype)
    _put(owner, key, tensor.to(dtype))


def assign_all(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put real tensors in their places one by one, in the types that transformers keeps there; see :func:`assign`."""
    plan = model._get_dtype_plan(model.dtype)
    for name, tensor in tensors:
        assign(model, name, tensor, plan)


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace a parameter or buffer by one of the same kind."""
    if key in module._parameters:
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(key, value, persistent=key not in module._non_persistent_buffers_set)


def _release(module: nn.Module, key: str) -> None:
    """Replace a parameter or buffer by one on the meta device; None stays."""
    tensor = getattr(module, key)
    if tensor is not None:
        _put(module, key, torch.empty_like(tensor, device="meta"))
