"""Stage types: one file each, config class and wiring, no mathematics.

The table below is the whole list of built-in stages; other packages add theirs through the entry point
group ``llmcompress.stages`` (name → a :class:`~llmcompress.stages.base.Stage` subclass). Stage modules are
imported when a recipe is first validated, not with this package.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import get_args

from llmcompress.errors import EnvironmentProblem
from llmcompress.plugins import discover
from llmcompress.stages.base import Stage

ENTRY_POINT_GROUP = "llmcompress.stages"

BUILT_IN: dict[str, str] = {
    "load": "llmcompress.stages.load:Load",
    "calibrate": "llmcompress.stages.calibrate:Calibrate",
    "smooth": "llmcompress.stages.smooth:Smooth",
    "rtn": "llmcompress.stages.rtn:Rtn",
    "gptq": "llmcompress.stages.gptq:Gptq",
    "qesc": "llmcompress.stages.qesc:Qesc",
    "router_calibration": "llmcompress.stages.router_calibration:RouterCalibration",
    "esr": "llmcompress.stages.esr:Esr",
    "pesf": "llmcompress.stages.pesf:Pesf",
    "activations": "llmcompress.stages.activations:Activations",
    "embeddings": "llmcompress.stages.embeddings:Embeddings",
    "dsq": "llmcompress.stages.dsq:Dsq",
    "s2r_init": "llmcompress.stages.s2r.init:S2RInit",
    "s2r_rl": "llmcompress.stages.s2r.rl:S2RRl",
    "s2r_traces": "llmcompress.stages.s2r.traces:S2RTraces",
    "s2r_evaluate": "llmcompress.stages.s2r.evaluate:S2REvaluate",
    "rqt": "llmcompress.stages.rqt.stage:Rqt",
    "evaluate": "llmcompress.stages.evaluate:Evaluate",
    "export": "llmcompress.stages.export:Export",
    "evaluate_family": "llmcompress.stages.evaluate_family:EvaluateFamily",
    "export_family": "llmcompress.stages.export_family:ExportFamily",
}


@cache
def stage_types() -> dict[str, type[Stage]]:
    """Stage type → class: built-in stages in pipeline order, then those of other packages by name.

    Raises:
        EnvironmentProblem: Another package's stage cannot be loaded, or takes a name that exists.
    """
    found = {}
    for name, target in BUILT_IN.items():
        module, _, attribute = target.partition(":")
        found[name] = getattr(importlib.import_module(module), attribute)
    for name, stage in sorted(discover(ENTRY_POINT_GROUP).items()):
        if name in found:
            raise EnvironmentProblem(
                f"plug-in stage {name!r}: a stage of that name exists already", "uninstall the package that adds it"
            )
        found[name] = check_stage(name, stage)
    return found


def check_stage(name: str, stage: object) -> type[Stage]:
    """Return ``stage`` if it is a stage class whose config is selected by ``type: name``.

    Raises:
        EnvironmentProblem: It is not.
    """
    origin = f"plug-in stage {name!r}"
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        raise EnvironmentProblem(
            f"{origin} is not a Stage class", "its author should derive it from llmcompress.stages.base.Stage"
        )
    if missing := sorted(getattr(stage, "__abstractmethods__", ())):
        raise EnvironmentProblem(f"{origin} has no {' and no '.join(missing)}", "its author should write them")
    field = getattr(getattr(stage, "Config", None), "model_fields", {}).get("type")
    if field is None or name not in get_args(field.annotation):
        raise EnvironmentProblem(
            f"{origin}: its Config does not declare type: Literal[{name!r}]", "its author should correct the annotation"
        )
    return stage
