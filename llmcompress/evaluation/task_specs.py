"""Which tasks a recipe names and where their data lies: lm-eval's definitions, with data from local files or the hub.

Local task files come from ``llmcompress/data/tasks``: the harness's own task definitions with their data source
replaced. Nothing here loads data, or lm-eval's index of all tasks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.data.hub import out_of_reach
from llmcompress.errors import EnvironmentProblem, InputError, RecipeError, first_line
from llmcompress.evaluation.config import TaskConfig

TASKS = Path(__file__).resolve().parent.parent / "data" / "tasks"
# what the metric code_eval, which lm-eval uses, asks for when it is loaded
_LEAVE = "HF_ALLOW_CODE_EVAL"
SUFFIXES = (".jsonl.gz", ".jsonl.xz", ".jsonl")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task ready to be built.

    Attributes:
        name: What the recipe calls it.
        configs: lm-eval task configurations or names, more than one for subjects.
        limit: Use only the first rows of each.
        local: Whether all data lies on this machine.
        settings: What the recipe says of it.
    """

    name: str
    configs: tuple[dict[str, Any] | str, ...]
    limit: int | None
    local: bool
    settings: TaskConfig


def catalogue() -> dict[str, dict[str, Any]]:
    """Tasks that can run from a local folder: name to base file, splits and few-shot split."""
    data: dict[str, dict[str, Any]] = yaml.safe_load((TASKS / "catalogue.yaml").read_text(encoding="utf-8"))
    return data


def specify(
    tasks: Sequence[str | TaskConfig], tasks_dir: Path | None = None, limit: int | None = None
) -> list[TaskSpec]:
    """Turn recipe entries into task specifications, checking that local data exists.

    Args:
        tasks: Names, or names with settings.
        tasks_dir: Folder with ``<task>/<split>.jsonl.gz``; tasks outside the catalogue always use the hub.
        limit: Default row limit.

    Raises:
        InputError: A local data file is missing, or a task's own file.
        RecipeError: ``subjects`` is given for a task without subjects.
    """
    known = catalogue()
    found = []
    for entry in tasks:
        config = TaskConfig(task=entry) if isinstance(entry, str) else entry
        rows = config.limit if config.limit is not None else limit
        path = TASKS / "eval_smoke.yaml" if config.task == "eval_smoke" else config.path
        if path is not None:
            own, local = _own(config.task, Path(path))
            configs: list[dict[str, Any] | str] = [own]
        elif config.task in known and (tasks_dir is not None or config.subjects):
            configs = list(_catalogued(config, known[config.task], tasks_dir))
            local = tasks_dir is not None
        elif config.task in known:
            entry_data = known[config.task]
            # the whole of mmlu is a group that only the harness's index knows
            configs = [config.task] if "subject" in entry_data else [load_task(base_folder() / entry_data["base"])]
            local = False
        else:
            if config.subjects:
                raise RecipeError(f"tasks: {config.task} has no subjects", "remove subjects")
            configs, local = [config.task], False
        for item in configs:
            if isinstance(item, dict):
                item.pop("tag", None)
                item.update(config.overrides)
                if config.num_fewshot is not None:
                    item["num_fewshot"] = config.num_fewshot
        found.append(TaskSpec(config.task, tuple(configs), rows, local, config))
    return found


def unreachable(specs: Sequence[TaskSpec], off: bool = False) -> list[str]:
    """Tasks whose data is certainly not to be had, a line each: not in a cache, and the hub does not answer.

    Args:
        specs: The tasks; of one that is known by name alone the data set is not known, and nothing is said.
        off: Whether the network must not be asked.
    """
    data = {
        str(config["dataset_path"]): spec.name
        for spec in specs
        if not spec.local
        for config in spec.configs
        if isinstance(config, dict) and config.get("dataset_path")
    }
    return [f"task {data[name]}: data set {name}: {why}" for name, why in out_of_reach(data, off).items()]


def require_code(specs: Sequence[TaskSpec]) -> None:
    """Refuse tasks that run what the model writes where nobody has allowed it, here or where lm-eval asks for it, as
    far as their files tell.

    Args:
        specs: The tasks. One that is known by name alone is looked for in the file of this name; where there is none,
            it is refused when it is built.

    Raises:
        InputError: One of them does.
    """
    for spec in specs:
        configs = [one for one in spec.configs if isinstance(one, dict)]
        named = {f"{one}.yaml" for one in spec.configs if isinstance(one, str)}
        # the index of all tasks would take a minute
        files = [path for path in base_folder().rglob("*.yaml") if path.name in named] if named else []
        configs += [load_task(path, functions=False) for path in files]
        if not any(config.get("unsafe_code") for config in configs):
            continue
        if not spec.settings.run_code:
            raise runs_code(spec.name)
        code = (file.read_text(encoding="utf-8") for path in files for file in path.parent.glob("*.py"))
        if os.environ.get(_LEAVE) != "1" and any("code_eval" in text for text in code):
            raise InputError(f"task {spec.name}: lm-eval runs code only with {_LEAVE}=1 in the environment", "set it")


def runs_code(task: str) -> InputError:
    """The refusal of a task that runs code."""
    words = "set run_code: true in its entry, and run it where that can do no harm"
    return InputError(f"task {task} runs code that the model writes", words)


def base_folder() -> Path:
    """lm-eval's folder of tasks.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem("the lm-eval package is missing", "pip install lm-eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def load_task(path: Path, functions: bool = True) -> dict[str, Any]:
    """A task's file with what it includes; needs no torch.

    Args:
        path: The file.
        functions: Import those that it names, which may ask the hub.

    Raises:
        EnvironmentProblem: lm-eval is another one, or lacks the file.
    """
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise EnvironmentProblem(
            f"this lm-eval cannot be embedded: {error}", "pip install -U 'lm-eval>=0.4.10'"
        ) from error
    if not path.exists():
        raise EnvironmentProblem(f"lm-eval lacks {path.name}", "pip install -U lm-eval")
    return dict(load_yaml(path, resolve_func=functions))


def _own(name: str, path: Path) -> tuple[dict[str, Any], bool]:
    """A task of the user's, and whether all its rows lie on this machine.

    Raises:
        InputError: The file is missing, or is no task of lm-eval.
    """
    if not path.is_file():
        raise InputError(
            f"task {name}: {path}: no such file", "name a task of lm-eval, or a .yaml file that defines one"
        )
    try:
        config = load_task(path)
    except EnvironmentProblem:
        raise
    except Exception as error:  # its !function entries are the user's code
        raise InputError(f"task {name}: {path}: {first_line(error)}", "lm-eval must be able to read it") from error
    if not isinstance(config.get("dataset_path"), str) or not config.get("output_type"):
        raise InputError(f"task {name}: {path}: has no dataset_path or no output_type", "write it as a task of lm-eval")
    settings = dict(config.get("dataset_kwargs") or {})
    files = settings.get("data_files")
    local = isinstance(files, dict) and all(isinstance(file, str) and "://" not in file for file in files.values())
    if isinstance(files, dict) and local:
        places = {split: (path.parent / file).resolve() for split, file in files.items()}
        settings["data_files"] = {split: str(p if p.exists() else files[split]) for split, p in places.items()}
    return {**config, "task": name, **({"dataset_kwargs": settings} if settings else {})}, local


def _catalogued(config: TaskConfig, entry: dict[str, Any], tasks_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Configurations of a catalogue task: one, or one per subject; data from ``tasks_dir`` when given."""
    source = _local_source(config.task, entry, tasks_dir) if tasks_dir is not None else {}
    if "subject" not in entry:
        if config.subjects:
            raise RecipeError(f"tasks: {config.task} has no subjects", "remove subjects")
        yield load_task(base_folder() / entry["base"]) | source
        return
    pattern = entry["subject"]
    prefix, suffix = pattern.split("{subject}")
    known = sorted(p.as_posix()[len(prefix) : -len(suffix)] for p in _subject_files(prefix, suffix))
    for subject in config.subjects or known:
        if subject not in known:
            raise RecipeError(f"tasks: {config.task} has no subject {subject!r}", f"one of {', '.join(known)}")
        base = load_task(base_folder() / pattern.format(subject=subject)) | source
        if source:
            base["process_docs"] = functools.partial(_only_subject, subject=subject)
        yield base


def _subject_files(prefix: str, suffix: str) -> Iterator[Path]:
    root = base_folder()
    return (path.relative_to(root) for path in root.glob(f"{prefix}*{suffix}"))


def _only_subject(documents: Any, subject: str) -> Any:
    """Rows of a ``datasets.Dataset`` that belong to one subject."""
    return documents.select([i for i, name in enumerate(documents["subject"]) if name == subject])


def _local_source(task: str, entry: dict[str, Any], tasks_dir: Path) -> dict[str, Any]:
    """Fields of a task configuration that replace its data source by local files."""
    files = {}
    for split, stem in entry["files"].items():
        candidates = [tasks_dir / f"{stem}{suffix}" for suffix in SUFFIXES]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            raise InputError(
                f"task {task}: no {candidates[0]} (nor {' or '.join(SUFFIXES[1:])})",
                "correct tasks_dir (--tasks-dir), or leave it out to take the data from the hub",
            )
        files[split] = str(file.resolve())
    splits = {f"{kind}_split": (kind if kind in files else None) for kind in ("validation", "test")}
    # a training split that is not there must not be asked for; few-shot examples come from where the catalogue says
    splits["training_split"] = entry["fewshot"] if entry.get("fewshot") == "train" else None
    source: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if entry.get("fewshot"):
        source["fewshot_split"] = entry["fewshot"]
    return source | splits


def local_hint(task: str) -> str:
    """How to give a task its data without a network."""
    entry = catalogue().get(task)
    if entry is None:
        local = ", ".join(sorted(catalogue()))
        return f"run it once with a network, which fills the cache; tasks that take local files: {local}"
    files = " and ".join(f"TASKS/{stem}.jsonl" for stem in entry["files"].values())
    return f"put the rows of its data set into {files}, then: --tasks-dir TASKS (tasks_dir in a recipe)"
