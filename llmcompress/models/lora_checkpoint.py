"""A LoRA adapter in PEFT's format, read over its base as the checkpoint that merging them would write.

Nothing is written and no second copy of the base is held: a weight is changed as it is read
(:mod:`~llmcompress.models.lora_edits`). Beside ``W + scale · B A`` there are DoRA, adapters of stacked experts and of
embeddings, weights and rows of embeddings that were trained whole.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.lora_edits import (
    Addition,
    Edit,
    InTurn,
    PartAdditions,
    Replacement,
    RowReplacement,
    StackedAddition,
)

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.layout import ExpertBank, ModelLayout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# ends of keys; what is below belongs to a module and is no weight of it
_PARTS = {
    DOWN: "low", UP: "high", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "low of rows", ".lora_embedding_B": "high of rows",
    ".token_adapter.trainable_tokens_delta": "rows",
}  # fmt: skip
# the module under an adapter, which may be an adapter itself
_INNER = ".base_layer"
# starts that change the base as well, so that the adapter alone does not say what the model is
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# settings under which the model is something else, or that cannot be told from the files
_OTHER_MODELS = (
    "lora_bias", "fan_in_fan_out", "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MERGE = (
    "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER), "
    "then name that folder"
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model; trainers may leave the base's ``config.json`` beside it."""
    return (folder / CONFIG).is_file() and not any((folder / name).exists() for name in _MODELS)


def not_a_model(folder: Path) -> InputError:
    """The error where a whole model is needed."""
    return InputError(f"{folder}: an adapter ({CONFIG}), not a model", _MERGE)


def read_adapter(folder: Path, layout: ModelLayout) -> dict[str, Callable[[Tensor], Tensor]]:
    """Run-time name of each weight that the adapter changes, and how.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: Layout of the base.

    Raises:
        InputError: A file is missing or damaged, the adapter is of a kind that does not say alone what each weight
            becomes, or it belongs to a model of other names or shapes; all problems of one kind at once.
    """
    config, tensors = _read(folder)
    refused = _refusals(config)
    if refused:
        raise InputError(f"{folder}: an adapter with {', '.join(refused)} is not read", _MERGE)
    reading = _Reading(config, layout)
    wrapped: dict[tuple[str, int], dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for key, value in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        end = next((end for end in _PARTS if name.endswith(end)), None)
        if end is None:
            reading.replace(key, name.replace(f"{_INNER}.", "."), value)
        else:
            module = name.removesuffix(end)
            depth = module.count(_INNER)
            wrapped[module.replace(_INNER, ""), depth][_PARTS[end]] = (key, value)
    for (module, _), parts in wrapped.items():
        reading.wrap(module, parts)
    problems = reading.problems
    if problems or not reading.edits:
        shown = [*problems[:3], *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])]
        lines = "\n".join(f"{folder}: {problem}" for problem in shown or ["holds no weights"])
        base = config.get("base_model_name_or_path") or "its config does not say which"
        raise InputError(lines, f"an adapter needs the base it was trained on ({base}); or {_MERGE}")
    return {name: edits[0] if len(edits) == 1 else InTurn(edits) for name, edits in reading.edits.items()}


@dataclass
class _Reading:
    """What is found of one adapter.

    Attributes:
        config: ``adapter_config.json``.
        layout: Layout of the base.
        edits: By run-time name, in the order in which PEFT makes them.
        problems: What does not belong to the base.
    """

    config: Mapping[str, Any]
    layout: ModelLayout
    edits: dict[str, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the base's weights by run-time name."""
        return {view.name: tuple(view.shape) for view in self.layout.tensors()}

    @cached_property
    def runtime(self) -> dict[str, str]:
        """Names on disk → run-time names, where they differ: adapters may be older than transformers' own names."""
        found = {self.layout.disk.name(name): name for name in self.shapes}
        return {theirs: ours for theirs, ours in found.items() if theirs != ours}

    @cached_property
    def pieces(self) -> dict[str, tuple[str, int, slice]]:
        """Name of each projection of a single expert → its stack, its number, its rows."""
        disk, found = self.layout.disk, {}
        for name, bank in self.layout.banks.items():
            for expert in range(bank.num_experts) if disk.experts is not None else ():
                for part, place in disk.expert(bank, name, expert).items():
                    found[place] = found[f"{bank.module}.{expert}.{getattr(disk, part)}"] = (
                        name, expert, bank.parts(name)[part]
                    )  # fmt: skip
        return found

    def name(self, name: str) -> str:
        """Run-time name of a weight that the base has, or ``name`` as it is."""
        return name if name in self.shapes else self.runtime.get(name, name)

    def replace(self, key: str, name: str, value: Tensor) -> None:
        """A weight saved whole."""
        self._edit(key, self.name(name), tuple(value.shape), Replacement(value))

    def wrap(self, module: str, parts: Mapping[str, tuple[str, Tensor]]) -> None:
        """What is saved of one adapted module."""
        key, first = next(iter(parts.values()))
        name = self.name(f"{module}.weight")
        tensors = {part: value for part, (_, value) in parts.items()}
        if set(tensors) == {"rows"}:
            self._rows(key, module, name, first)
        elif set(tensors) == {"low of rows", "high of rows"}:
            low, high = tensors["low of rows"], tensors["high of rows"]
            if self.layout.tied:
                # merged, PEFT changes the head as well; before, it does not
                self.problems.append(f"{key}: the base's head is its embedding")
                return
            self._matrix(key, module, name, high.T, low.T, None)
        elif set(tensors) in ({"low", "high"}, {"low", "high", "magnitude"}):
            low, high, magnitude = tensors["low"], tensors["high"], tensors.get("magnitude")
            if f"{module}.weight" in self.pieces and name not in self.shapes:
                stack, expert, rows = self.pieces[f"{module}.weight"]
                self._part(key, module, (stack, expert, rows), low, high, magnitude)
            elif stacks := [stack for stack, bank in self.layout.banks.items() if bank.module == module]:
                self._stack(key, stacks, low, high)
            else:
                self._matrix(key, module, name, low, high, magnitude)
        else:
            self.problems.append(f"{key}: the base has no such weight")

    def _edit(self, key: str, name: str, shape: tuple[int, ...], edit: Edit) -> None:
        if name not in self.shapes:
            self.problems.append(f"{key}: the base has no such weight")
        elif self._fits(key, shape, self.shapes[name]):
            self.edits[name].append(edit)

    def _fits(self, key: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
        """Whether a weight has the shape of the base's; a problem where not."""
        if shape != own:
            self.problems.append(f"{key}: for a weight of shape {list(shape)}, the base's has {list(own)}")
        return shape == own

    def _matrix(self, key: str, module: str, name: str, low: Tensor, high: Tensor, magnitude: Tensor | None) -> None:
        addition = self._addition(key, module, low, high, magnitude)
        if addition is not None:
            self._edit(key, name, (high.shape[0], low.shape[1]), addition)

    def _addition(self, key: str, module: str, low: Tensor, high: Tensor, magnitude: Tensor | None) -> Addition | None:
        if high.shape[1] != low.shape[0] or (magnitude is not None and tuple(magnitude.shape) != high.shape[:1]):
            self.problems.append(f"{key}: its parts do not fit each other")
            return None
        return Addition(low, high, _scale(self.config, module, low.shape[0]), magnitude)

    def _part(
        self, key: str, module: str, place: tuple[str, int, slice], low: Tensor, high: Tensor, magnitude: Tensor | None
    ) -> None:
        stack, expert, rows = place
        _, height, width = self.shapes[stack]
        own = (len(range(*rows.indices(height))), width)
        addition = self._addition(key, module, low, high, magnitude)
        if addition is None or not self._fits(key, (high.shape[0], low.shape[1]), own):
            return
        edits = self.edits[stack]
        last = edits[-1] if edits else None
        if not isinstance(last, PartAdditions):
            last = PartAdditions()
            edits.append(last)
        last.parts.append((expert, rows, addition))

    def _stack(self, key: str, stacks: list[str], low: Tensor, high: Tensor) -> None:
        """Stacked experts: shapes tell which of them an adapter is for, as the files do not."""
        bank: ExpertBank = self.layout.banks[stacks[0]]
        axes = (high.shape[0], low.shape[1])
        fitting = [
            (name, swapped)
            for name in stacks
            for swapped in (False, True)
            if self.shapes[name][1:] == (axes[::-1] if swapped else axes)
        ]
        if len(fitting) == 2 and fitting[0][0] == fitting[1][0]:
            # square matrices
            fitting = [(fitting[0][0], self._swaps(bank))]
        if len(fitting) != 1 or low.shape[0] % bank.num_experts or low.shape[0] != high.shape[1]:
            sizes = ", ".join(f"{name}: {list(self.shapes[name])}" for name in stacks)
            parts = f"{list(low.shape)} and {list(high.shape)} fit {'several' if len(fitting) > 1 else 'none'}"
            self.problems.append(f"{key}: {parts} of the base's experts ({sizes})")
            return
        name, swapped = fitting[0]
        scale = _scale(self.config, name, low.shape[0] // bank.num_experts)
        self.edits[name].append(StackedAddition(low, high, scale, swapped))

    def _swaps(self, bank: ExpertBank) -> bool:
        """Whether A goes with the second axis of ``[E, …, …]``: in PEFT 0.18 always, later where inputs lie there."""
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("peft_version")))
        old = version is None or (int(version[1]), int(version[2])) < (0, 19)
        return old or bank.transposed

    def _rows(self, key: str, module: str, name: str, values: Tensor) -> None:
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((rows for end, rows in given.items() if module == end or module.endswith(f".{end}")), None)
        shape = self.shapes.get(name)
        if shape is None or len(shape) != 2:
            self.problems.append(f"{key}: the base has no such weight")
        elif not isinstance(given, list) or any(not isinstance(row, int) or not 0 <= row < shape[0] for row in given):
            self.problems.append(f"{key}: {CONFIG} does not say which tokens, or some that the base lacks")
        elif tuple(values.shape) != (len(given), shape[1]):
            self.problems.append(
                f"{key}: for {len(given)} rows of {shape[1]} values, the file holds {list(values.shape)}"
            )
        else:
            self.edits[name].append(RowReplacement(tuple(given), values))


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
    """Settings under which an adapter and its base do not say what each weight becomes."""
    found = [] if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')}"]
    found += [key for key in _OTHER_MODELS if config.get(key)]
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
