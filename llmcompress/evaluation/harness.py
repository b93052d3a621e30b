"""lm-evaluation-harness, embedded: task scores of a model object, from local files or the hub.

Local task files come from ``llmcompress/data/tasks``: the harness's own task definitions with their data source
replaced. The harness's full task index, which takes many seconds to build, is loaded only when a recipe names a task
that is not among them. Standard errors are computed here from the per-row scores, which also gives the standard error
of the difference between two models on the same rows; the harness's bootstrap would start processes and print.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import yaml

from llmcompress.data.hub import hub_silence, offline, out_of_reach, why_not_loaded
from llmcompress.errors import EnvironmentProblem, InputError, RecipeError, first_line
from llmcompress.evaluation.batching import task_batch
from llmcompress.evaluation.config import TaskConfig, require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.inference.greedy import GreedyWriter

TASKS = Path(__file__).resolve().parent.parent / "data" / "tasks"
_SUFFIXES = (".jsonl.gz", ".jsonl.xz", ".jsonl")
_SEED = 1234
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one task for one model.

    Attributes:
        task, metric: Names; a metric under a filter is ``exact_match.strict-match``.
        value: The figure.
        stderr: Standard error, None where there is no closed form.
        n: Rows.
        higher_is_better: Direction.
        rows: Per-row values when the figure is their mean, for paired comparison. For a perplexity, which is not,
            its linearisation ``value · nll``: differences of those have the right spread. Empty otherwise.
        asked: SHA-256 of the rows and of the prompts they became, in their order: two models were asked the same where
            this is equal. Empty where it is not known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    rows: tuple[float, ...] = ()
    asked: str = ""


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


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of a task what its scores do not say.

    Attributes:
        line: Receives a line where requests were too long.
        written: Of a task whose answers are written, receives what wrote them: ``native``, or reasons why not.
        samples: Receives lm-eval's own record of every request, by task.
    """

    line: Callable[[str], None] = lambda _text: None
    written: Callable[[set[str]], None] = lambda _by: None
    samples: Callable[[Mapping[str, Any]], None] = lambda _rows: None


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
        if config.path is not None:
            own, local = _own(config.task, Path(config.path))
            configs: list[dict[str, Any] | str] = [own]
        elif config.task == "eval_smoke":
            configs, local = [_smoke()], True
        elif config.task in known and (tasks_dir is not None or config.subjects):
            configs = list(_catalogued(config, known[config.task], tasks_dir))
            local = tasks_dir is not None
        elif config.task in known:
            entry_data = known[config.task]
            # the whole of mmlu is a group that only the harness's index knows
            configs = [config.task] if "subject" in entry_data else [_load(_base_folder() / entry_data["base"])]
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


def _base_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem("the lm-eval package is missing", "pip install lm-eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def _load(path: Path) -> dict[str, Any]:
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise EnvironmentProblem(
            f"this lm-eval cannot be embedded: {error}", "pip install -U 'lm-eval>=0.4.10'"
        ) from error
    if not path.exists():
        raise EnvironmentProblem(f"lm-eval lacks {path.name}", "pip install -U lm-eval")
    return dict(load_yaml(path))


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
        config = _load(path)
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


def _smoke() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((TASKS / "eval_smoke.yaml").read_text(encoding="utf-8"))
    return config | {"dataset_kwargs": {"data_files": {"test": str(TASKS / "eval_smoke.jsonl")}}}


def _catalogued(config: TaskConfig, entry: dict[str, Any], tasks_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Configurations of a catalogue task: one, or one per subject; data from ``tasks_dir`` when given."""
    source = _local_source(config.task, entry, tasks_dir) if tasks_dir is not None else {}
    if "subject" not in entry:
        if config.subjects:
            raise RecipeError(f"tasks: {config.task} has no subjects", "remove subjects")
        yield _load(_base_folder() / entry["base"]) | source
        return
    pattern = entry["subject"]
    prefix, suffix = pattern.split("{subject}")
    known = sorted(p.as_posix()[len(prefix) : -len(suffix)] for p in _subject_files(prefix, suffix))
    for subject in config.subjects or known:
        if subject not in known:
            raise RecipeError(f"tasks: {config.task} has no subject {subject!r}", f"one of {', '.join(known)}")
        base = _load(_base_folder() / pattern.format(subject=subject)) | source
        if source:
            base["process_docs"] = functools.partial(_only_subject, subject=subject)
        yield base


def _subject_files(prefix: str, suffix: str) -> Iterator[Path]:
    root = _base_folder()
    return (path.relative_to(root) for path in root.glob(f"{prefix}*{suffix}"))


def _only_subject(documents: Any, subject: str) -> Any:
    """Rows of a ``datasets.Dataset`` that belong to one subject."""
    return documents.select([i for i, name in enumerate(documents["subject"]) if name == subject])


def _local_source(task: str, entry: dict[str, Any], tasks_dir: Path) -> dict[str, Any]:
    """Fields of a task configuration that replace its data source by local files."""
    files = {}
    for split, stem in entry["files"].items():
        candidates = [tasks_dir / f"{stem}{suffix}" for suffix in _SUFFIXES]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            raise InputError(
                f"task {task}: no {candidates[0]} (nor {' or '.join(_SUFFIXES[1:])})",
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


def build(spec: TaskSpec) -> dict[str, Any]:
    """Build the lm-eval task objects of a specification and try every row of local files; loads their data.

    Returns:
        What ``lm_eval.evaluator.evaluate`` takes: ``tasks``, ``groups``, ``group_map``.

    Raises:
        InputError: The data cannot be loaded, lm-eval does not know the task or cannot read a row, or it runs code.
    """
    loaded = _built(spec)
    if spec.local:
        _check_rows(spec, loaded["tasks"])
    return loaded


def _built(spec: TaskSpec) -> dict[str, Any]:
    """As :func:`build`, of rows only the first."""
    import datasets
    from lm_eval.tasks import TaskManager

    by_name = any(isinstance(config, str) for config in spec.configs)
    # what is not here is known at once then, and not after five tries with growing pauses
    silence = None if spec.local else hub_silence()
    with _quiet(), offline(spec.local or silence is not None):
        manager = TaskManager(include_defaults=by_name)
        try:
            # deep copies: lm-eval keeps and changes what it is given
            loaded: dict[str, Any] = dict(manager.load([copy.deepcopy(config) for config in spec.configs]))
        except Exception as error:
            if spec.local:
                raise _bad_rows(spec, error) from error
            if isinstance(error, KeyError):
                what = f"task {spec.name}: lm-eval does not know it"
                raise InputError(what, "list its tasks with: lm-eval ls tasks") from error
            if isinstance(error, OSError | ValueError | datasets.exceptions.DatasetsError):
                what = f"task {spec.name}: its data cannot be loaded: {why_not_loaded(error, silence)}"
                raise InputError(what, _local_hint(spec.name)) from error
            raise
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not spec.settings.run_code:
            words = "set run_code: true in its entry, and run it where that can do no harm"
            raise InputError(f"task {spec.name} runs code that the model writes", words)
        for key, value in spec.settings.overrides.items() if by_name else ():
            task.set_config(key=key, value=value)
        if spec.settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=spec.settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=spec.settings.fewshot_seed)
    return loaded


def scored_names(spec: TaskSpec) -> list[str]:
    """Names under which the figures of a task will be: its own, and those of its subtasks; loads its data.

    Raises:
        InputError: The data cannot be loaded, or lm-eval does not know the task.
    """
    return list(dict.fromkeys([spec.name, *_built(spec)["tasks"]]))


def _check_rows(spec: TaskSpec, tasks: Mapping[str, Any]) -> None:
    """Put every row that will be asked, or serve as an example, to the task: lm-eval tries the first of each only.

    Raises:
        InputError: The task cannot read a row.
    """
    for name, task in tasks.items():
        config = task.config
        asked = config.test_split if task.has_test_docs() else config.validation_split
        parts = [(asked, (row for _, row in task.doc_iterator(limit=spec.limit)))]
        if task.get_config("num_fewshot"):
            parts.append((config.fewshot_split, task.fewshot_docs()))
        for split, rows in parts:
            for number, row in enumerate(rows, 1):
                if problem := _row_problem(task, row):
                    files = config.dataset_kwargs["data_files"]
                    where = f"row {number}" if len(tasks) == 1 else f"row {number} of {name}"
                    raise InputError(f"task {spec.name}: {files[split]}: {where}: {problem}", _ROWS_HINT)


def _row_problem(task: Any, row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, None when the task can read it."""
    config = task.config
    templates = [t for t in (config.doc_to_text, config.doc_to_target, config.doc_to_choice) if isinstance(t, str)]
    # a field that a row lacks is null beside rows that have it, and would be asked as the word None
    lacking = [f for f, value in row.items() if value is None and any(re.search(rf"\b{f}\b", t) for t in templates)]
    if lacking:
        return f"no {lacking[0]!r}"
    try:
        text, target = task.doc_to_text(row), task.doc_to_target(row)
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        choices = task.doc_to_choice(row)
    except Exception as error:  # templates and lm-eval's functions raise whatever they come across
        return _said(error)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        return f"choices are {choices!r}"
    answer = text if task.multiple_input else target
    for one in answer if isinstance(answer, list) else [answer]:
        if one not in (choices if isinstance(one, str) else range(len(choices))):
            return f"the answer {one!r} is none of its {len(choices)} choices"
    return None


def _said(error: BaseException) -> str:
    """The first line of what was wrong with a row."""
    text = str(error).splitlines()[0] if str(error) else "no rows" if isinstance(error, StopIteration) else repr(error)
    return f"no field {text}" if isinstance(error, KeyError) else text


_ROWS_HINT = "give one JSON object a line, with the fields of the hub's data set"


def _bad_rows(spec: TaskSpec, error: Exception) -> InputError:
    """The error for local files that cannot be read as rows, or whose first row the task cannot read."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    files = sorted(
        {
            path
            for config in spec.configs
            if isinstance(config, dict)
            for path in config["dataset_kwargs"]["data_files"].values()
        }
    )
    return InputError(f"task {spec.name}: {' or '.join(files)}: {_said(cause)}", _ROWS_HINT)


def _local_hint(task: str) -> str:
    """How to give a task its data without a network."""
    entry = catalogue().get(task)
    if entry is None:
        local = ", ".join(sorted(catalogue()))
        return f"run it once with a network, which fills the cache; tasks that take local files: {local}"
    files = " and ".join(f"TASKS/{stem}.jsonl" for stem in entry["files"].values())
    return f"put the rows of its data set into {files}, then: --tasks-dir TASKS (tasks_dir in a recipe)"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and remarks of lm-eval and datasets: progress is this project's own business."""
    import datasets
    import lm_eval.models.huggingface  # noqa: F401 - so that its progress bar is among those found below
    from tqdm import tqdm

    def silent(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **(kwargs | {"disable": True}))

    bars_on = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("lm_eval.") and "tqdm" in vars(module):
                stack.enter_context(mock.patch.object(module, "tqdm", silent))
        datasets.disable_progress_bars()
        # what datasets calls an error comes as an exception too, which becomes one message
        for logger, level in zip(loggers, (logging.ERROR, logging.CRITICAL)):
            logger.setLevel(level)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if bars_on:
                datasets.enable_progress_bars()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    batch: int | None = None,
    state_mode: Literal["per_token", "decode_only"] = "per_token",
    writer: GreedyWriter | None = None,
    listener: Listener | None = None,
) -> list[Score]:
    """Score a model on one task.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        spec: What :func:`specify` gave.
        batch: Requests per forward pass; automatic when None.
        state_mode: Where low-bit states are rounded, see :class:`~llmcompress.stages.evaluate.EvaluateConfig`.
        writer: Writes greedy answers natively; without one transformers writes all.
        listener: Hears what there is to say beside the scores.

    Returns:
        All figures of the task, in the task's order. A task of several subjects also gets pooled figures under its
        own name, first.

    Raises:
        InputError: The data cannot be had, chats are asked of a model without a chat template, or answers would leave
            no room for questions.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate as run

    from llmcompress.evaluation.recurrent_tasks import RecurrentLM, request_limit, require_room, written_tokens

    settings = spec.settings
    require_chat_template([settings], None, getattr(tokenizer, "chat_template", None))
    loaded = _built(spec)  # rows have been tried where a command opens its tasks
    written = written_tokens(loaded["tasks"].values())
    with _quiet(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        adapter = RecurrentLM(
            state_mode=state_mode,
            writer=writer,
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch or task_batch(256, int(model.config.get_text_config().vocab_size)),
            device=str(model.device),
            max_length=settings.max_length or request_limit(model, written),
        )
        require_room(spec.name, adapter.max_length, written)
        turns = settings.fewshot_as_multiturn
        results = run(
            lm=adapter, task_dict=loaded, limit=spec.limit, bootstrap_iters=0, log_samples=True,
            system_instruction=settings.system_instruction, apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template if turns is None else turns,
            confirm_run_unsafe_code=settings.run_code,
        )  # fmt: skip
    if results is None:
        raise InputError(f"task {spec.name}: lm-eval returned nothing", "run on a single process")
    if listener is not None:
        if adapter.wrote:
            listener.written(adapter.wrote)
        if adapter.cut:
            limit = f"{adapter.max_length} tokens (max_length)"
            few = f"{adapter.cut} of {adapter.asked} requests lost their beginning"
            listener.line(f"{spec.name}: {few}: they are longer than {limit}")
        listener.samples(results["samples"])
    return normalise(spec.name, loaded["tasks"], results)


def normalise(name: str, tasks: Mapping[str, Any], results: Mapping[str, Any]) -> list[Score]:
    """Turn lm-eval's result dictionary into scores.

    Args:
        name: What the recipe calls the task.
        tasks: lm-eval task objects by name.
        results: What ``evaluate`` returned, with samples.

    Returns:
        Scores; pooled over subtasks first when there are several.
    """
    scores: list[Score] = []
    for task_name, task in tasks.items():
        # a single task goes by the recipe's name
        label = name if len(tasks) == 1 else task_name
        directions = task.higher_is_better()
        samples = results.get("samples", {}).get(task_name, [])
        for key, value in results["results"][task_name].items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [s for s in samples if s.get("filter", "none") == filter_name and metric in s]
            rows = [s[metric] for s in own]
            # the same row is another question behind other examples, or in a chat
            asked = _digest([s.get(key) for s in own for key in ("doc_hash", "prompt_hash")])
            full = metric if filter_name == "none" else f"{metric}.{filter_name}"
            score = _score(label, full, float(value), rows, len(samples), _direction(metric, directions))
            scores.append(replace(score, asked=asked))
    return _pooled(name, scores) + scores if len(tasks) > 1 else scores


def _digest(parts: Sequence[str | None]) -> str:
    """One hash of several; empty where one is missing."""
    return hashlib.sha256("\n".join(filter(None, parts)).encode()).hexdigest() if parts and all(parts) else ""


def _score(task: str, metric: str, value: float, rows: list[Any], fallback: int, higher: bool | None) -> Score:
    numbers = [float(row) for row in rows if isinstance(row, int | float)]
    n = len(rows) or fallback
    if len(numbers) == len(rows) and numbers and math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9):
        return Score(task, metric, value, _stderr(numbers), n, higher, tuple(numbers))
    if metric == "perplexity" and len(numbers) == len(rows) > 1:
        # rows are log-likelihoods; delta method for exp(−mean)
        spread = _stderr(numbers)
        linear = tuple(-value * number for number in numbers)
        return Score(task, metric, value, None if spread is None else value * spread, n, higher, linear)
    return Score(task, metric, value, None, n, higher)


def _direction(metric: str, directions: Mapping[str, Any]) -> bool | None:
    if metric in directions:
        return bool(directions[metric])
    return False if metric.endswith(_LOWER_IS_BETTER) else None


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _pooled(name: str, scores: Sequence[Score]) -> list[Score]:
    """Mean over all rows of all subtasks, for every metric that is a mean."""
    pooled = []
    for metric in dict.fromkeys(score.metric for score in scores):
        parts = [score for score in scores if score.metric == metric]
        if all(part.rows and math.isclose(math.fsum(part.rows) / len(part.rows), part.value) for part in parts):
            rows = [row for part in parts for row in part.rows]
            mean = math.fsum(rows) / len(rows)
            direction, asked = parts[0].higher_is_better, _digest([part.asked for part in parts])
            pooled.append(Score(name, metric, mean, _stderr(rows), len(rows), direction, tuple(rows), asked))
    return pooled


def paired_stderr(dense: Sequence[float], compressed: Sequence[float]) -> float | None:
    """Standard error of the mean difference of two models on the same rows; None when the rows do not pair up."""
    if len(dense) != len(compressed) or len(dense) < 2:
        return None
    return _stderr([c - d for d, c in zip(dense, compressed)])
