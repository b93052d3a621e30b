"""lm-evaluation-harness, embedded: tasks are built, their rows tried, and a model object is scored on them.

What a recipe's tasks are is in :mod:`~llmcompress.evaluation.task_specs`, what becomes of the harness's results in
:mod:`~llmcompress.evaluation.scores`. The harness's full task index, which takes many seconds to build, is loaded only
when a recipe names a task that is not in the catalogue.
"""

from __future__ import annotations

import copy
import difflib
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from llmcompress.data.hub import hub_silence, offline, why_not_loaded
from llmcompress.errors import InputError
from llmcompress.evaluation.batching import task_batch
from llmcompress.evaluation.config import require_chat_template
from llmcompress.evaluation.scores import Score, normalise
from llmcompress.evaluation.task_facts import require_room
from llmcompress.evaluation.task_specs import TaskSpec, local_hint, runs_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.inference.greedy import GreedyWriter

_SEED = 1234


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of a task what its scores do not say.

    Attributes:
        line: Receives a line where requests were too long.
        written: Receives by task what wrote its answers, if it has some: ``native``, or reasons why not.
        samples: Receives lm-eval's own record of every request, by task.
    """

    line: Callable[[str], None] = lambda _text: None
    written: Callable[[set[str]], None] = lambda _by: None
    samples: Callable[[Mapping[str, Any]], None] = lambda _rows: None


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
                near = difflib.get_close_matches(spec.name, manager.all_tasks, 1, 0.75)
                guess = f" (did you mean {near[0]}?)" if near else ""
                what = f"task {spec.name}: lm-eval does not know it{guess}"
                raise InputError(what, "list its tasks with: lm-eval ls tasks") from error
            if isinstance(error, OSError | ValueError | datasets.exceptions.DatasetsError):
                what = f"task {spec.name}: its data cannot be loaded: {why_not_loaded(error, silence)}"
                raise InputError(what, local_hint(spec.name)) from error
            raise
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not spec.settings.run_code:
            raise runs_code(spec.name)
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

    from llmcompress.evaluation.lm_eval_model import LMEvalModel, request_limit, written_tokens

    settings = spec.settings
    require_chat_template([settings], None, getattr(tokenizer, "chat_template", None))
    loaded = _built(spec)  # rows have been tried where a command opens its tasks
    written = written_tokens(loaded["tasks"].values())
    with _quiet(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        adapter = LMEvalModel(
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
