"""What the file of a task tells of it before its data is loaded: names of its figures, tokens that it has written.

Asked by ``validate``, ``plan`` and every run before hours of work, so it needs no torch and no network. A task whose
file is not found, or whose functions decide, tells nothing, and is judged when it has run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from llmcompress.errors import EnvironmentProblem, InputError
from llmcompress.evaluation.config import TaskConfig
from llmcompress.evaluation.gates import GateConfig
from llmcompress.evaluation.scores import ACCURACIES
from llmcompress.evaluation.task_specs import TASKS, base_folder, catalogue, load_task

# tokens of a question, beside what is written, where the model takes more and nobody says what the task wants
LONGEST = 4096
# lm-eval's, by type of output: DEFAULT_METRIC_REGISTRY of lm_eval/api/registry.py
_DEFAULTS = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}
# those whose figure has their own name; what others are called, their code decides
_PLAIN = frozenset({*(name for names in _DEFAULTS.values() for name in names), "f1", "mcc", "brier_score"})
# what lm-eval takes for it, and its default: normalize_gen_kwargs of lm_eval/models/utils.py
_WRITTEN = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WRITTEN_BY_DEFAULT = 256


def definition(entry: str | TaskConfig) -> dict[str, Any] | None:
    """The fields of a task's file, with what it includes and the recipe's overrides; None where it is not found.

    Args:
        entry: Of the recipe.
    """
    config = TaskConfig(task=entry) if isinstance(entry, str) else entry
    try:
        found = _read(config)
    except (EnvironmentProblem, OSError, ValueError, YAMLError):
        # without lm-eval, or a file that it cannot read, a run is refused anyway
        return None
    if found is None:
        return None
    found = found | config.overrides
    # so is what is of another shape
    listed = [each for key in ("metric_list", "filter_list") for each in _list(found.get(key))]
    right = all(isinstance(each, Mapping) for each in [*listed, found.get("generation_kwargs") or {}])
    return found if right and isinstance(found.get("output_type"), str) else None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _read(config: TaskConfig) -> dict[str, Any] | None:
    if path := TASKS / "eval_smoke.yaml" if config.task == "eval_smoke" else config.path:
        return load_task(Path(path), functions=False) if Path(path).is_file() else None
    if entry := catalogue().get(config.task):
        return load_task(base_folder() / entry["base"], functions=False)
    # the index of all tasks would take a minute
    found = [load_task(path, functions=False) for path in base_folder().rglob(f"{config.task}.yaml")]
    return found[0] if len(found) == 1 and found[0].get("task") == config.task else None


def figures(entry: str | TaskConfig) -> frozenset[str] | None:
    """Names of a task's figures, such as ``acc_norm`` or ``exact_match.strict-match``; None where they are not known.

    Args:
        entry: Of the recipe.
    """
    config = definition(entry)
    kind = config.get("output_type") if config is not None else None
    if config is None or kind not in _DEFAULTS or config.get("class"):
        return None
    listed = config.get("metric_list")
    names = _DEFAULTS[kind] if listed is None else [each.get("metric") for each in listed]
    # what a function makes of a row is named as the list says
    if not names or not all(isinstance(n, str) and (n in _PLAIN or config.get("process_results")) for n in names):
        return None
    filters = [str(each.get("name")) for each in config.get("filter_list") or [{"name": "none"}]]
    return frozenset(name if f == "none" else f"{name}.{f}" for name in names for f in filters)


def written_tokens(entry: str | TaskConfig) -> int | None:
    """The most that a task has a model write, in tokens; 0 for choices, None where it is not known.

    Args:
        entry: Of the recipe.
    """
    config = definition(entry)
    if config is None or config.get("output_type") not in _DEFAULTS:
        return None
    if config["output_type"] != "generate_until":
        return 0
    given = config.get("generation_kwargs") or {}
    found = next((given[key] for key in _WRITTEN if given.get(key) is not None), _WRITTEN_BY_DEFAULT)
    return int(found) if isinstance(found, int | float) and math.isfinite(found) else None


def unknown_figures(gates: Mapping[str, GateConfig], tasks: Iterable[str | TaskConfig]) -> list[str]:
    """Gates on figures that the tasks do not give, a line each.

    Args:
        gates: The gates.
        tasks: All tasks of the stage.
    """
    by_name = {(task if isinstance(task, str) else task.task): task for task in tasks}
    lines = []
    for gate, limit in gates.items():
        if limit.metric == "tasks.mean_acc" and len(by_name) > 1:
            given = {name: figures(task) for name, task in by_name.items()}
            without = [name for name, known in given.items() if known is not None and not known & set(ACCURACIES)]
            if without:
                lines.append(f"gates.{gate}: no mean accuracy: {', '.join(without)} has no {' or '.join(ACCURACIES)}")
            continue
        name = next((name for name in by_name if limit.metric.startswith(f"{name}.")), None)
        known = None if name is None else figures(by_name[name])
        if known is not None and limit.metric not in {f"{name}.{figure}" for figure in known}:
            has = ", ".join(f"{name}.{figure}" for figure in sorted(known))
            lines.append(f"gates.{gate}: no metric {limit.metric!r} (measured are: {has})")
    return lines


def require_room(task: str, longest: int, written: int) -> None:
    """Refuse answers that leave no room for a question.

    Args:
        task: Its name.
        longest: Tokens of a request, with what is written to it.
        written: The most that is.

    Raises:
        InputError: They do.
    """
    if written >= longest:
        raise InputError(
            f"task {task}: answers of up to {written} tokens leave no room for a question in {longest}",
            "set a smaller max_gen_toks in generation_kwargs of its overrides, or its max_length",
        )


def require_rooms(tasks: Iterable[str | TaskConfig], context: object) -> None:
    """The same of all tasks of a recipe, as far as their files tell.

    Args:
        tasks: The tasks.
        context: ``max_position_embeddings`` of the model's config; what is no number is no limit.

    Raises:
        InputError: One leaves no room.
    """
    for task in tasks:
        name, own = (task, None) if isinstance(task, str) else (task.task, task.max_length)
        longest = own or (context if isinstance(context, int) else None)
        written = written_tokens(task) if longest is not None else None
        if longest is not None and written:
            require_room(name, longest if own else min(longest, LONGEST + written), written)
