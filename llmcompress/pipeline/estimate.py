"""What a recipe will need and produce, from the recipe and ``config.json`` alone.

Each stage predicts its own peak above the empty interpreter; here these are put in order, the interpreter and its
libraries are added, and the totals are held against the recipe's budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmcompress.errors import ExportError, ResourceError
from llmcompress.models import sizes
from llmcompress.models.layout import ModelLayout
from llmcompress.models.registry import layout_from_config
from llmcompress.models.state_memory import BatchMemory, memory_table
from llmcompress.pipeline.device import BASELINE_VRAM, baseline_ram, ram_above_baseline
from llmcompress.quant.rules import deciding_rules, resolve
from llmcompress.recipe.load import LoadedRecipe
from llmcompress.recipe.schema import Recipe, recipe_model
from llmcompress.stages.base import Kind, PlanInputs, Stage
from llmcompress.stages.blockwise.rules import plain_rules
from llmcompress.units import bytes_text


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Prediction for one stage; bytes.

    Attributes:
        name, type: As in the recipe.
        ram: Peak of the process, libraries included.
        vram: Peak on the device, context included; 0 on the CPU.
        disk: Written and kept.
        output: Size of what the stage delivers.
        flops: Arithmetic work.
        notes: Remarks, such as what an exporter would refuse.
        refusals: Reasons for which an export would fail.
    """

    name: str
    type: str
    ram: int
    vram: int
    disk: int
    output: int
    flops: float
    notes: tuple[str, ...]
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RulePlan:
    """What one rule of one stage decides about.

    Attributes:
        stage, rule: Names in the recipe.
        weights: Number of weights; an expert bank counts as two.
        parameters: Their values.
        bits: Mean code bits, None for weights that the rule keeps dense.
        example: Name of the first.
    """

    stage: str
    rule: str
    weights: int
    parameters: int
    bits: float | None
    example: str


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit of the recipe and what is needed of it; bytes."""

    resource: str
    limit: int
    needed: int

    @property
    def fits(self) -> bool:
        """Whether the need is within the limit."""
        return self.needed <= self.limit


@dataclass(frozen=True, slots=True)
class Plan:
    """Prediction for a whole recipe on one model.

    Attributes:
        recipe, model_type: Names.
        device, compute_dtype, model_dtype: What is computed on and in.
        parameters, unmatched: All parameters; those no rule quantizes although a rule could.
        dense_bytes: Size of the model's weights before.
        output_bytes: Size of the weights after: packed, plus what stays dense.
        bits_codes: Average bits by the papers' convention (no embeddings, scales or zero points).
        bits_weights: Average bits of the quantized weights with their scales and zero points.
        bits_stored: Average bits of everything stored, embeddings and heads included.
        ram, vram: Largest peak of any stage.
        disk: Everything the run writes.
        flops: Sum over the stages.
        stages, rules, budgets: Details.
        memory: Memory of models with recurrent states: bytes of weights and states by batch size, once the run is over.
        suggest: Finds changes that save a resource; see :meth:`require_budget`.
    """

    recipe: str
    model_type: str
    device: str
    compute_dtype: str
    model_dtype: str
    parameters: int
    unmatched: int
    dense_bytes: int
    output_bytes: int
    bits_codes: float
    bits_weights: float
    bits_stored: float
    ram: int
    vram: int
    disk: int
    flops: float
    stages: tuple[StagePlan, ...]
    rules: tuple[RulePlan, ...]
    budgets: tuple[Budget, ...]
    memory: tuple[BatchMemory, ...] = ()
    suggest: Callable[[str], list[str]] = field(default=lambda resource: [], compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        found = {name: getattr(self, name) for name in self.__slots__ if name not in ("suggest", "budgets")}
        found["stages"] = [
            {**asdict(stage), "notes": list(stage.notes), "refusals": list(stage.refusals)} for stage in self.stages
        ]
        found["rules"] = [asdict(rule) for rule in self.rules]
        found["budgets"] = [{**asdict(budget), "fits": budget.fits} for budget in self.budgets]
        found["memory"] = [{**asdict(row), "total": row.total} for row in self.memory]
        return found

    def worst(self, resource: str) -> str:
        """Name of the stage that needs most of ``ram``, ``vram`` or ``disk``."""
        return max(self.stages, key=lambda stage: getattr(stage, resource)).name

    def require_exports(self) -> None:
        """Refuse a recipe whose exports cannot hold what its quantizing stages make.

        Raises:
            ExportError: A format would refuse; with every reason.
        """
        refused = [(stage.name, reason) for stage in self.stages for reason in stage.refusals]
        if refused:
            raise ExportError(
                "\n".join(f"stages.{name}: {reason}" for name, reason in refused),
                f"change the rules, or leave that format out: 'stages.{refused[0][0]}.formats=[native]'",
            )

    def require_budget(self) -> None:
        """Refuse a recipe that does not fit what it declares.

        Raises:
            ResourceError: A budget is exceeded; with the estimate and three suggestions.
        """
        over = [budget for budget in self.budgets if not budget.fits]
        if not over:
            return
        lines = []
        for budget in over:
            disk = budget.resource == "host.disk"
            where = "" if disk else f" in stage {self.worst(budget.resource.rpartition('.')[2])}"
            lines.append(
                f"{budget.resource}: {bytes_text(budget.needed)} needed{where}, {bytes_text(budget.limit)} allowed"
            )
        first = over[0]
        changes = [*self.suggest(first.resource), *_otherwise(first.resource, first.needed)][:3]
        hints = [f"{number}. {text}" for number, text in enumerate(changes, 1)]
        raise ResourceError("\n".join(lines), "\n".join(hints))


def plan(recipe: LoadedRecipe, config: Mapping[str, Any], device: str | None = None) -> Plan:
    """Predict what a recipe needs on a model.

    Args:
        recipe: The loaded recipe.
        config: The model's ``config.json``.
        device: ``cpu`` or ``cuda``; by default the recipe's, and for ``auto`` what this machine seems to have.

    Raises:
        InputError: The model's family is not supported.
        RecipeError: A stage does not suit the model (rules that match nothing …).
    """
    layout = layout_from_config(config)
    recipe.check_layout(layout)
    chosen = device or assumed_device(recipe.recipe)
    found = _plan(recipe.recipe, config, layout, chosen)
    return replace(found, suggest=lambda resource: _suggestions(recipe.recipe, config, layout, chosen, resource))


def assumed_device(recipe: Recipe) -> str:
    """``cpu`` or ``cuda`` without asking torch: what the recipe says, else whether an NVIDIA device is visible."""
    if recipe.run.device != "auto":
        return recipe.run.device
    return "cuda" if recipe.device.vram is not None or Path("/dev/nvidia0").exists() else "cpu"


def plan_inputs_of(
    recipe: Recipe, config: Mapping[str, Any], layout: ModelLayout, device: str
) -> Iterator[tuple[Stage, PlanInputs]]:
    """Yield every stage with what it will find when its turn comes."""
    dtype = sizes.checkpoint_dtype(config, recipe.model.dtype)
    free = ram_above_baseline(recipe.host.ram, device)
    compute = compute_dtype(recipe, device)
    exact = sizes.held_exactly(dtype, compute)
    inputs = PlanInputs(
        layout, sizes.DTYPE_BYTES[dtype], sizes.DTYPE_BYTES[compute], 0, 0, {}, device, free, exact,
        config.get("max_position_embeddings"),
    )  # fmt: skip
    for stage in recipe.build_stages():
        yield stage, inputs
        inputs = after(stage, inputs)


def compute_dtype(recipe: Recipe, device: str) -> str:
    """What is computed in; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    asked = recipe.run.compute_dtype
    return asked if asked != "auto" else "bfloat16" if device == "cuda" else "float32"


def _plan(recipe: Recipe, config: Mapping[str, Any], layout: ModelLayout, device: str) -> Plan:
    dtype, compute = sizes.checkpoint_dtype(config, recipe.model.dtype), compute_dtype(recipe, device)
    stages: list[StagePlan] = []
    rules: list[RulePlan] = []
    for stage, inputs in plan_inputs_of(recipe, config, layout, device):
        stages.append(_stage_plan(stage, inputs))
        rules += _rule_plans(stage, inputs)
    inputs = after(stage, inputs)
    bits = sizes.average_bits(layout, inputs.specs, inputs.weight_bytes, inputs.policies)
    unmatched = sum(prod(shape) for name, _, shape, _ in layout.quantizable() if name not in inputs.specs)
    ram, vram = max(s.ram for s in stages), max(s.vram for s in stages)
    disk = sum(s.disk for s in stages)
    needs = {
        "host.ram": (recipe.host.ram, ram),
        "host.disk": (recipe.host.disk, disk),
        "device.vram": (recipe.device.vram, vram),
    }
    output = sizes.model_bytes(layout, inputs.specs, inputs.weight_bytes, inputs.policies)
    return Plan(
        recipe=recipe.name,
        model_type=layout.model_type,
        device=device,
        compute_dtype=compute,
        model_dtype=dtype,
        parameters=sizes.parameters(layout),
        unmatched=unmatched,
        dense_bytes=sizes.model_bytes(layout, {}, inputs.weight_bytes),
        output_bytes=output,
        bits_codes=bits.codes,
        bits_weights=bits.weights,
        bits_stored=bits.stored,
        ram=ram,
        vram=vram,
        disk=disk,
        flops=sum(s.flops for s in stages),
        stages=tuple(stages),
        rules=tuple(rules),
        budgets=tuple(Budget(name, limit, need) for name, (limit, need) in needs.items() if limit is not None),
        memory=tuple(memory_table(layout, output, inputs.policies.get("state_cache"), inputs.weight_bytes)),
    )


def on_machine(
    predicted: Plan, recipe: LoadedRecipe, config: Mapping[str, Any], names: Collection[str], processes: int
) -> Plan:
    """What some stages of a plan take from a machine on which several processes run.

    Args:
        predicted: The plan of the whole recipe on one process.
        recipe: The loaded recipe.
        config: The model's ``config.json``.
        names: The stages that will run.
        processes: On the machine, each with its share of the calibration windows.

    Returns:
        The plan with these stages alone, where ``ram`` is the memory of all processes together. ``vram`` stays that of
        one, since each has a device of its own.
    """
    layout = layout_from_config(config)
    found = []
    for (stage, inputs), row in zip(plan_inputs_of(recipe.recipe, config, layout, predicted.device), predicted.stages):
        if stage.name in names:
            found.append(replace(row, ram=_together(stage, inputs, row.ram, processes)))
    ram, vram = max((s.ram for s in found), default=0), max((s.vram for s in found), default=0)
    return replace(predicted, stages=tuple(found), ram=ram, vram=vram, disk=sum(s.disk for s in found))


def _together(stage: Stage, inputs: PlanInputs, alone: int, processes: int) -> int:
    """Memory of all processes while one stage runs; those that do not take part in it wait."""
    waiting = baseline_ram(inputs.device)
    if processes == 1 or not stage.distributed:
        return alone + (processes - 1) * waiting
    share = replace(inputs, samples=-(-inputs.samples // processes))
    return processes * (waiting + stage.estimate(share).ram)


def _stage_plan(stage: Stage, inputs: PlanInputs) -> StagePlan:
    estimate = stage.estimate(inputs)
    cuda = inputs.device == "cuda"
    return StagePlan(
        name=stage.name,
        type=stage.config.type,
        ram=baseline_ram(inputs.device) + estimate.ram,
        vram=BASELINE_VRAM + estimate.vram if cuda else 0,
        disk=estimate.disk,
        output=estimate.output,
        flops=estimate.flops,
        notes=estimate.notes,
        refusals=estimate.refusals,
    )


def after(stage: Stage, inputs: PlanInputs) -> PlanInputs:
    """What later stages find: calibration windows, specs of the weights, policies that change sizes."""
    if Kind.CALIBRATION in stage.produces:
        samples, length = getattr(stage.config, "samples", 0), getattr(stage.config, "length", 0)
        inputs = replace(inputs, samples=samples, length=length)
    if Kind.PACKED in stage.produces:
        specs = stage.estimate(inputs).specs
        rules = getattr(stage.config, "rules", None)
        if not specs and rules:
            specs = dict(resolve(plain_rules(rules), inputs.layout))
        inputs = replace(inputs, specs={**inputs.specs, **specs})
    if Kind.POLICY in stage.produces:
        inputs = replace(inputs, policies={**inputs.policies, **stage.estimate(inputs).policies})
    return inputs


def _rule_plans(stage: Stage, inputs: PlanInputs) -> Iterator[RulePlan]:
    """What each rule of a quantizing stage decides about, in recipe order."""
    configs = getattr(stage.config, "rules", None)
    if not configs or Kind.PACKED not in stage.produces:
        return
    rules = plain_rules(configs)
    decided = deciding_rules(rules, inputs.layout)
    shapes = {name: prod(shape) for name, _, shape, _ in inputs.layout.quantizable()}
    specs = resolve(rules, inputs.layout)
    for rule in rules:
        names = [name for name, decider in decided.items() if decider == rule]
        total = sum(shapes[name] for name in names)
        bits = None if rule.keep else sum(specs[name].bits * shapes[name] for name in names) / total
        yield RulePlan(stage.name, rule.name, len(names), total, bits, names[0])


def _suggestions(
    recipe: Recipe, config: Mapping[str, Any], layout: ModelLayout, device: str, resource: str
) -> list[str]:
    """Up to three changes that save ``resource``, the most effective first, each with its predicted need."""
    attribute = resource.rsplit(".", 1)[-1]
    now = getattr(_plan(recipe, config, layout, device), attribute)
    found: list[tuple[int, str]] = []
    for text, changed in _candidates(recipe):
        where = device if changed.run.device == recipe.run.device else changed.run.device
        predicted = _plan(changed, config, layout, where)
        need = getattr(predicted, attribute)
        # a budget that is proposed has to hold
        holds = changed.host.ram in (recipe.host.ram, None) or predicted.ram <= changed.host.ram
        if need < 0.99 * now and holds:
            found.append((need, f"{text} ({bytes_text(need)})"))
    return [text for _, text in sorted(found)[:3]]


def _otherwise(resource: str, need: int) -> list[str]:
    """What is left where a budget is too small and changes of the recipe do not help."""
    machine = {"device.vram": "a GPU", "host.disk": "a disk"}.get(resource, "a machine")
    return [
        f"{resource}={_round_up(need)} on {machine} with {bytes_text(need)} or more",
        "run.dir=FOLDER on another disk" if resource == "host.disk" else "quantize a smaller model",
        "llmcompress plan RECIPE shows which stage needs how much",
    ]


def _round_up(size: int) -> str:
    return f"{-(-size // 10**9)}GB"


def _candidates(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Overrides that may save memory or disk, with the recipe each would make."""
    from llmcompress.models.memory_limits import total_ram

    changes: list[tuple[str, Any]] = []
    if recipe.host.ram is None:
        # with a budget, stages hold less at a time and keep the rest in files
        changes.append(("host.ram", f"{max(1, int(0.9 * total_ram() / 1e9))}GB"))
    if recipe.run.compute_dtype != "bfloat16":
        changes.append(("run.compute_dtype", "bfloat16"))
    if recipe.run.device != "cpu":
        changes.append(("run.device", "cpu"))
    for name, config in recipe.stages.items():
        for key, cheaper in _CHEAPER.items():
            value = getattr(config, key, None)
            if value is not None and cheaper(value) != value:
                changes.append((f"stages.{name}.{key}", cheaper(value)))
    data = recipe.model_dump(mode="json")
    for path, value in changes:
        *parents, last = path.split(".")
        changed: Any = {**data}
        node = changed
        for key in parents:
            node[key] = {**node[key]}
            node = node[key]
        node[last] = value
        with suppress(ValidationError):  # some settings need one another
            yield f"{path}={_yaml(value)}", recipe_model().model_validate(changed)


# recipe field → a value of it that needs less, or the same value
_CHEAPER: dict[str, Callable[[Any], Any]] = {
    "samples": lambda value: value // 2 if value >= 16 else value,
    "length": lambda value: value // 2 if value >= 32 else value,
    "diagnose_experts": lambda value: False,
    "fidelity": lambda value: None,
    "dense": lambda value: False,
    "batch": lambda value: 1,
    "formats": lambda value: ["native"] if len(value) > 1 else value,
}


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
