"""The recipe as pydantic sees it, and its JSON schema for editors.

Everything is frozen and refuses unknown keys. Stages are an ordered mapping name → config, told apart by ``type``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, model_validator

from llmcompress.stages import stage_types
from llmcompress.stages.base import Stage, StageConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"

# no budget is meant to be smaller
_NO_BUDGET = 100_000
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}


def parse_size(value: Any) -> Any:
    """Bytes from ``24GB``, ``16 GiB`` or a number.

    Raises:
        ValueError: The text is not a size, or a number without a unit was meant to have one.
    """
    if not isinstance(value, str):
        if type(value) is int and 0 < value < _NO_BUDGET:
            raise ValueError(f"{value} bytes hold nothing: write {value}GB for gigabytes")
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", value.lower())
    if found is None:
        raise ValueError("expected a size such as 24GB, 16GiB or a number of bytes")
    number, unit = found.groups()
    return int(float(number) * ({**_UNITS, **_BINARY_UNITS}[unit or ""]))


Size = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]}),
]


class Section(BaseModel):
    """Base of the recipe's sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelSpec(Section):
    """Which model."""

    path: Annotated[str, Field(min_length=1)]
    """Folder with config.json and safetensors; ``asset:NAME`` is a model shipped with llmcompress."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type the weights are read in; ``auto`` is the checkpoint's."""

    tokenizer: str | None = None
    """Folder of the tokenizer, when it is not the model's."""


class RunSpec(Section):
    """Where and how the pipeline runs."""

    dir: Annotated[str, Field(min_length=1)]
    """Run directory; by default ``runs/<name>``."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Every stage derives its own seed from it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU if there is one."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of calibration and evaluation; ``auto`` is float32 on the CPU and bfloat16 on a GPU."""

    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of each process; by default what torch chooses, with several processes their share of the cores."""

    deterministic: bool = False
    """Sum calibration statistics in eight parts and a fixed order, so that 1 to 8 processes give the same bytes (with
    the same ``threads``, 1 unless given). Costs a few percent of time."""


class HostSpec(Section):
    """Budget of the machine; ``plan`` and ``run`` refuse work that does not fit."""

    ram: Size | None = None
    """Main memory, such as ``64GB``."""

    disk: Size | None = None
    """Space for the run directory and the artifacts, such as ``200GB``."""


class DeviceSpec(Section):
    """Budget of the accelerator."""

    vram: Size | None = None
    """Memory of one device, such as ``24GB``."""


StageName = Annotated[str, Field(pattern=NAME_PATTERN)]


class Recipe(Section):
    """A whole recipe after composition. Build it with ``recipe.load.load_recipe``."""

    version: Literal[1]
    """Version of the recipe format."""

    name: StageName
    """Name of the recipe, used for the run directory."""

    description: str = ""
    """One line about what it is for."""

    vars: dict[str, Any] = Field(default_factory=dict)
    """Free values for ``${vars.NAME}``."""

    model: ModelSpec
    """Which model."""

    run: RunSpec
    """Where and how the pipeline runs."""

    host: HostSpec = HostSpec()
    """Budget of the machine."""

    device: DeviceSpec = DeviceSpec()
    """Budget of the accelerator."""

    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    """The pipeline, in order."""

    @model_validator(mode="before")
    @classmethod
    def _default_run_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("run", {}) or {}, dict):
            run = {"dir": f"runs/{data.get('name', 'run')}", **(data.get("run") or {})}
            return {**data, "run": run}
        return data

    def build_stages(self) -> list[Stage]:
        """The stages, built, in order."""
        types = stage_types()
        return [types[config.type](name, config) for name, config in self.stages.items()]


@cache
def recipe_model() -> type[Recipe]:
    """:class:`Recipe` with the union of all stage configs that are installed."""
    configs = tuple(stage.Config for stage in stage_types().values())
    union: Any = Annotated[Union.__getitem__(configs), Field(discriminator="type")]  # type: ignore[valid-type]
    stages: Any = Annotated[dict[StageName, union], Field(min_length=1, description="The pipeline, in order.")]
    return create_model("Recipe", __base__=Recipe, __module__=__name__, __doc__=Recipe.__doc__, stages=stages)


@cache
def strict_schema() -> dict[str, Any]:
    """JSON schema of a complete recipe, as pydantic checks it."""
    found = recipe_model().model_json_schema()
    run = found["$defs"]["RunSpec"]
    run["required"] = [name for name in run.get("required", []) if name != "dir"]
    found["required"] = [name for name in found["required"] if name != "run"]
    return found


def schema() -> dict[str, Any]:
    """JSON schema for editors: a recipe file may extend others, so nothing is required and ``${…}`` fits anywhere."""
    relaxed = _relax(strict_schema())
    one = {"type": "string", "description": "A file relative to this one, or a shipped recipe such as base/eac_moe."}
    extends = {"anyOf": [one, {"type": "array", "items": one}], "description": "Recipes to start from, in order."}
    relaxed["properties"] = {"extends": extends, **relaxed["properties"]}
    return {"$schema": SCHEMA_URL, **relaxed, "title": "llmcompress recipe"}


_INTERPOLATION = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
_SCALARS = {"integer", "number", "boolean", "null", "array", "object"}


def _relax(node: Any) -> Any:
    """Copy of a schema in which keys may be absent, deleted (``key~``) or interpolated."""
    if isinstance(node, list):
        return [_relax(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _relax(value) for key, value in node.items() if key not in ("required", "discriminator")}
    if "oneOf" in found and not isinstance(node.get("properties"), dict):
        found["anyOf"] = found.pop("oneOf")
    found.pop("minProperties", None)
    if isinstance(node.get("properties"), dict):
        found["properties"] = {key: _or_interpolated(_relax(value)) for key, value in node["properties"].items()}
    named = found.pop("patternProperties", {})
    if node.get("type") == "object":
        # a name with ~ behind it removes an inherited key
        found["patternProperties"] = {**named, "~$": {}}
    return found


def _or_interpolated(node: Any) -> Any:
    if isinstance(node, dict) and (node.get("type") in _SCALARS or "enum" in node or "anyOf" in node or "$ref" in node):
        texts = {key: node.pop(key) for key in ("description", "title", "default") if key in node}
        return {"anyOf": [node, _INTERPOLATION], **texts}
    return node
