"""Quality gates: limits on metrics that decide the exit code of a run."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from llmcompress.errors import RecipeError
from llmcompress.section import Section

if TYPE_CHECKING:
    from llmcompress.stages.state import Metric


class GateConfig(Section):
    """A limit on one metric. Exactly one kind of limit is given."""

    metric: str
    """``task.metric``, such as ``heldout.perplexity``, ``fidelity.kl`` or ``piqa.acc``."""

    max_rel_increase: Annotated[float, Field(ge=0)] | None = None
    """The compressed value may exceed the dense one by this fraction at most (0.03 means 3 %)."""

    max_abs_drop: Annotated[float, Field(ge=0)] | None = None
    """The compressed value may lie below the dense one by this much at most (0.02 is two points of accuracy)."""

    max: float | None = None
    """The compressed value may not exceed this."""

    min: float | None = None
    """The compressed value may not lie below this."""

    @model_validator(mode="after")
    def _one_limit(self) -> GateConfig:
        limits = (self.max_rel_increase, self.max_abs_drop, self.max, self.min)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("give exactly one of max_rel_increase, max_abs_drop, max, min")
        return self


@dataclass(frozen=True, slots=True)
class GateResult:
    """Outcome of one gate.

    Attributes:
        gate: Its name in the recipe.
        metric: What it looked at.
        limit: The limit in words.
        value: What was compared with the limit.
        passed: Whether it held. A value that is not a number never passes.
    """

    gate: str
    metric: str
    limit: str
    value: float
    passed: bool

    @property
    def message(self) -> str:
        """One line for the end of a run."""
        return f"gate {self.gate}: {self.metric} is {self.value:.6g}, must be {self.limit}"


def unknown_metrics(gates: Mapping[str, GateConfig], exact: Iterable[str], prefixes: Iterable[str] = ()) -> list[str]:
    """Problems with metric names, found before anything is measured.

    Args:
        gates: The gates.
        exact: Names that will be measured.
        prefixes: Tasks whose metric names are not known yet; anything below them passes here.

    Returns:
        One line for each gate whose metric will not be measured.
    """
    names, tasks = sorted(exact), tuple(f"{prefix}." for prefix in prefixes)
    return [
        _unknown(gate, config.metric, [*names, *(f"{task}acc" for task in tasks)])
        for gate, config in gates.items()
        if config.metric not in names and not config.metric.startswith(tasks)
    ]


def _unknown(gate: str, metric: str, names: list[str]) -> str:
    near = difflib.get_close_matches(metric, names, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}?" if near else f"measured are: {', '.join(names) or 'none'}"
    return f"gates.{gate}: no metric {metric!r} ({known})"


def judge(gates: Mapping[str, GateConfig], metrics: Iterable[Metric], reference: str = "dense") -> list[GateResult]:
    """Compare metrics with limits.

    Args:
        gates: Gates by name.
        metrics: What was measured.
        reference: What relative limits compare with, for messages.

    Returns:
        One result per gate, in order.

    Raises:
        RecipeError: A gate names a metric that was not measured, or a relative limit has no dense value.
    """
    by_name = {metric.name: metric for metric in metrics}
    missing = [_unknown(g, c.metric, sorted(by_name)) for g, c in gates.items() if c.metric not in by_name]
    if missing:
        raise RecipeError("\n".join(missing), "correct the metric names under gates, or measure what they name")
    return [_judge_one(name, config, by_name[config.metric], reference) for name, config in gates.items()]


def _judge_one(gate: str, config: GateConfig, metric: Metric, reference: str) -> GateResult:
    value = metric.compressed if metric.compressed is not None else metric.dense
    if value is None:
        raise RecipeError(f"gates.{gate}: {metric.name} has no value", "measure it, or remove the gate")
    if config.max is not None:
        return GateResult(gate, metric.name, f"at most {config.max:g}", value, value <= config.max)
    if config.min is not None:
        return GateResult(gate, metric.name, f"at least {config.min:g}", value, value >= config.min)
    if metric.dense is None:
        raise RecipeError(
            f"gates.{gate}: {metric.name} has no dense value to compare with",
            "set dense: true in the evaluate stage, or use max or min",
        )
    if config.max_rel_increase is not None:
        increase = (value - metric.dense) / abs(metric.dense) if metric.dense else math.copysign(math.inf, value)
        if value == metric.dense:
            increase = 0.0
        name = f"{metric.name}'s relative increase over {reference}"
        return GateResult(
            gate, name, f"at most {config.max_rel_increase:g}", increase, increase <= config.max_rel_increase
        )
    allowed = config.max_abs_drop if config.max_abs_drop is not None else 0.0
    drop = metric.dense - value
    return GateResult(gate, f"{metric.name}'s drop below {reference}", f"at most {allowed:g}", drop, drop <= allowed)


def failed(stage_dir: Path) -> list[str]:
    """Messages of the gates that did not hold, as an evaluate stage recorded them.

    Args:
        stage_dir: Folder of the evaluate stage.

    Returns:
        One line per failed gate; empty when all held or the stage has no gates.
    """
    path = stage_dir / "gates.json"
    if not path.exists():
        return []
    return [entry["message"] for entry in json.loads(path.read_text(encoding="utf-8")) if not entry["passed"]]
