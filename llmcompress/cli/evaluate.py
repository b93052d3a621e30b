"""``eval`` and ``compare``: measure finished models, outside any run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.completion import complete_recipe
from llmcompress.cli.inspect import look
from llmcompress.cli.output import Output, table, writable, write_csv
from llmcompress.cli.run import difference_text, figure
from llmcompress.errors import GateFailed, RecipeError, UsageError
from llmcompress.models.paths import model_folder, resolve_path
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.cli.models import OpenedModel
    from llmcompress.evaluation.gates import GateConfig
    from llmcompress.evaluation.task_specs import TaskSpec
    from llmcompress.report.data import ReportData
    from llmcompress.stages.evaluate import EvaluateConfig

HELD_OUT = "asset:text/heldout.jsonl.gz"

LENGTH = 512

FieldOption = Annotated[
    str | None,
    typer.Option(
        "--field", metavar="NAME", help="Field of a row that holds the text; chats need none.  [default: text]"
    ),
]
LengthOption = Annotated[int | None, typer.Option("--length", min=2, help=f"Tokens in a window.  [default: {LENGTH}]")]
CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write all figures as CSV.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Type of dense weights: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Device: auto, cpu or cuda.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="RECIPE", help="Measure what this recipe's evaluate stage measures.",
        autocompletion=complete_recipe,
    ),
]  # fmt: skip
MemberOption = Annotated[str | None, typer.Option("--member", help="Which member of a family of fine-tunes.")]
IncreaseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--max-rel-increase",
        metavar="METRIC=SHARE",
        help="Exit with code 6 if the metric of B is higher than that of A by more; 0.01 is 1 %.",
    ),
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        "--max-abs-drop",
        metavar="METRIC=AMOUNT",
        help="Exit with code 6 if the metric of B is lower than that of A by more.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(metavar="PATH", help="Artifact, model folder or run folder.")]


@dataclass(frozen=True)
class Measured:
    """Options by which ``eval`` and ``compare`` choose what is measured."""

    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE", help="Text (.txt, .jsonl, .parquet) for perplexity; may be repeated."),
    ] = None
    field: FieldOption = None
    length: LengthOption = None
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Use only the first tokens of each text.")
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="NAME", help="Task of lm-eval, or the YAML file of a task of your own; may be repeated."
        ),
    ] = None
    tasks_dir: Annotated[str | None, typer.Option("--tasks-dir", help="Folder with local task data.")] = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first rows of each task.")] = None
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="Examples in the prompt; by default as many as each task says."),
    ] = None
    fewshot_seed: Annotated[
        int | None,
        typer.Option("--fewshot-seed", help="Seed by which a task draws its examples.  [default: lm-eval's, 1234]"),
    ] = None
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put each question through the model's chat template.")
    ] = False
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            help="Give examples as turns of the chat; the default with --apply-chat-template.",
        ),
    ] = None
    system_instruction: Annotated[
        str | None,
        typer.Option("--system-instruction", metavar="TEXT", help="System message before every question of a task."),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """Arguments of :func:`settings` that say what is measured; what was not given is None or absent.

        Raises:
            UsageError: Turns without a chat.
        """
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UsageError("--fewshot-as-multiturn: only with --apply-chat-template")
        asking = {
            "num_fewshot": self.num_fewshot, "fewshot_seed": self.fewshot_seed,
            "apply_chat_template": self.apply_chat_template or None,
            "fewshot_as_multiturn": self.fewshot_as_multiturn, "system_instruction": self.system_instruction,
        }  # fmt: skip
        return {
            "text": self.text, "field": self.field, "length": self.length, "max_tokens": self.max_tokens,
            "task": self.task, "tasks_dir": self.tasks_dir, "limit": self.limit,
            **{name: value for name, value in asking.items() if value is not None},
        }  # fmt: skip

    def config(self, fidelity: bool = False) -> EvaluateConfig:
        """The section that these options describe; ``fidelity`` as :func:`settings` has it."""
        return settings(fidelity=fidelity, **self.chosen())


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "eval")(evaluate)
    command(app, "compare")(compare)


def evaluate(
    out: Output,
    path: ModelArgument,
    measured: Measured,
    recipe: RecipeOption = None,
    member: MemberOption = None,
    csv: CsvOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure perplexity and tasks of an artifact or model; the shipped held-out text if nothing is named."""
    config = _from_recipe(recipe, measured.chosen()) if recipe else measured.config()
    if csv is not None:
        writable(csv)
    model_folder(path)
    rows = _measure_one(out, path, config, dtype, device, member)
    figures = [_compact(row, "value") for row in rows]
    data = {"path": path, "metrics": figures}
    if csv is not None:
        write_csv(csv, figures)
    cells = [(f"{r['task']}.{r['metric']}", figure(r["compressed"]), figure(r["stderr"]), r["n"]) for r in rows]
    columns = ("metric", "value", "± stderr", "n")
    out.result(data, lambda screen: screen.print(table(columns, cells, right="value|± stderr|n", named=True)))


def compare(
    out: Output,
    first: Annotated[str, typer.Argument(metavar="A", help="Run folder, or model (the reference).")],
    second: Annotated[str, typer.Argument(metavar="B", help="Run folder, or model.")],
    measured: Measured,
    max_rel_increase: IncreaseOption = None,
    max_abs_drop: DropOption = None,
    csv: CsvOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compare two runs by what they recorded, or two models by measuring both.

    In a pipeline: `compare BEFORE AFTER --max-rel-increase heldout.perplexity=0.01`.
    """
    from llmcompress.pipeline.run_dir import RunDir

    if csv is not None:
        writable(csv)
    limits = [*_limits("max_rel_increase", max_rel_increase), *_limits("max_abs_drop", max_abs_drop)]
    runs = [RunDir(Path(name)).is_run() for name in (first, second)]
    if all(runs):
        placed = {name: None if value == "auto" else value for name, value in (("dtype", dtype), ("device", device))}
        _refuse_idle("two runs are compared by what they recorded", {**measured.chosen(), **placed})
        _compare_runs(out, Path(first), Path(second), limits, csv)
        return
    config = measured.config(fidelity=True)
    _require_names(limits, config)
    rows = _measure_two(out, first, second, config, dtype, device)
    judged = _judged(limits, {f"{row['task']}.{row['metric']}": (row["dense"], row["compressed"]) for row in rows})
    sizes = [look(model_folder(name)) for name in (first, second)]
    figures = [_compact(row, "pair") for row in rows]
    data = {
        "a": {"path": first, "bytes": sizes[0].bytes, "bits": sizes[0].bits},
        "b": {"path": second, "bytes": sizes[1].bytes, "bits": sizes[1].bits},
        "metrics": figures,
        "limits": judged,
    }
    if csv is not None:
        write_csv(csv, figures)

    def show(screen: Console) -> None:
        cells: list[tuple[Any, ...]] = [
            ("bytes", *(bytes_text(s.bytes) for s in sizes), f"{sizes[1].bytes / sizes[0].bytes:.3f} ×"),
            ("bits per parameter", f"{sizes[0].bits:.2f}", f"{sizes[1].bits:.2f}", None),
        ]  # fmt: skip
        for row in rows:
            change = row.get("difference")
            name = f"{row['task']}.{row['metric']}"
            error = row.get("difference_stderr")
            shown = None if change is None else difference_text(change, error, name, row["dense"])
            cells.append((name, figure(row["dense"]), figure(row["compressed"]), shown))
        screen.print(table(("", "A", "B", "B − A"), cells, right="A|B|B − A", named=True))
        _show_limits(judged, screen)

    out.result(data, show)
    _require(judged)


def _limits(kind: str, given: list[str] | None) -> list[GateConfig]:
    """Gates from ``METRIC=NUMBER`` words.

    Raises:
        UsageError: A word is none.
    """
    from llmcompress.evaluation.gates import GateConfig

    found = []
    for text in given or []:
        metric, _, number = text.rpartition("=")
        try:
            found.append(GateConfig.model_validate({"metric": metric, kind: float(number)} if metric else {}))
        except ValueError as error:
            option = f"--{kind.replace('_', '-')}"
            hint = f"such as {option} heldout.perplexity=0.01"
            raise UsageError(f"{option} {text}: not METRIC=NUMBER with a number of 0 or more", hint) from error
    return found


def _require_names(limits: list[GateConfig], config: EvaluateConfig) -> None:
    """Refuse limits on what will not be measured, before two models are.

    Raises:
        UsageError: A limit names no figure that A and B will have each.
        InputError: A task's data cannot be had.
    """
    from llmcompress.evaluation.gates import unknown_metrics
    from llmcompress.evaluation.harness import scored_names
    from llmcompress.evaluation.task_facts import unknown_figures

    exact = [f"{name}.{metric}" for name in config.perplexity for metric in ("perplexity", "bits_per_byte")]
    exact += ["tasks.mean_acc"] if len(config.tasks) > 1 else []
    gates = {f"{number}": limit for number, limit in enumerate(limits, 1)}
    if wrong := unknown_figures(gates, config.tasks):
        raise _no_such_figure("\n".join(wrong))
    if not unknown_metrics(gates, exact):
        return
    # only lm-eval knows what a group of tasks consists of
    if wrong := unknown_metrics(gates, exact, [name for spec in _specs(config) for name in scored_names(spec)]):
        raise _no_such_figure("\n".join(wrong))


def _no_such_figure(lines: str) -> UsageError:
    return UsageError(lines.replace("gates.", "limit "), "take a metric of the table that A and B have each")


def _judged(
    limits: list[GateConfig], figures: Mapping[str, tuple[float | None, float | None]]
) -> list[dict[str, Any]]:  # fmt: skip
    """Hold B against A.

    Args:
        limits: The gates.
        figures: A's and B's by name.

    Returns:
        What each limit looked at, in words and as a number, and whether it holds.

    Raises:
        UsageError: A limit names what was not measured for both.
    """
    from llmcompress.evaluation.gates import judge
    from llmcompress.stages.state import Metric

    measured = []
    for name, (a, b) in figures.items():
        task, _, metric = name.rpartition(".")
        if a is not None and b is not None:
            measured.append(Metric(task, metric, a, b))
    gates = {f"{number}": limit for number, limit in enumerate(limits, 1)}
    try:
        results = judge(gates, measured, "A")
    except RecipeError as error:
        raise _no_such_figure(error.message) from error
    return [
        {"metric": limit.metric, "message": f"{r.metric} is {r.value:.6g}, must be {r.limit}", "value": r.value,
         "passed": r.passed}
        for limit, r in zip(limits, results)
    ]  # fmt: skip


def _show_limits(judged: list[dict[str, Any]], screen: Console) -> None:
    for row in judged:
        if row["passed"]:
            screen.print(f"held: {row['message']}", markup=False, highlight=False, soft_wrap=True)


def _require(judged: list[dict[str, Any]]) -> None:
    """Raise for limits that do not hold.

    Raises:
        GateFailed: One does not.
    """
    if broken := [row["message"] for row in judged if not row["passed"]]:
        raise GateFailed("\n".join(broken), "spend more bits, or relax the limit")


def settings(
    text: list[str] | None,
    *,
    length: int | None = None,
    field: str | None = None,
    max_tokens: int | None = None,
    task: list[str] | None = None,
    tasks_dir: str | None = None,
    limit: int | None = None,
    fidelity: bool = False,
    **asking: Any,
) -> EvaluateConfig:
    """An evaluate section from command-line options; the shipped held-out text where neither text nor task is named.

    Raises:
        UsageError: Options of a task without one, of texts without one, or a field of none that has rows.
    """
    from llmcompress.stages.evaluate import EvaluateConfig

    if not task:
        _refuse_idle("no --task is named", {"tasks_dir": tasks_dir, "limit": limit, **asking})
    files = text or ([] if task else [HELD_OUT])
    if not files:
        _refuse_idle("only tasks are named", {"field": field, "length": length, "max_tokens": max_tokens})
    sources = {_name(file, files): source(file, field or "text") for file in files}
    if not any("field" in section for section in sources.values()):
        _refuse_idle("a plain text has no fields", {"field": field})
    texts = {name: {"source": s, "template": "auto", "length": length or LENGTH} for name, s in sources.items()}
    perplexity = {name: {**section, "max_tokens": max_tokens} for name, section in texts.items()}
    section: dict[str, Any] = {
        "type": "evaluate", "perplexity": perplexity, "tasks_dir": tasks_dir, "limit": limit,
        "tasks": [{**_task(name), **asking} for name in task or []],
    }  # fmt: skip
    if fidelity and files:
        section["fidelity"] = {**texts[_name(files[0], files)], "samples": 16, "allow_fewer": True}
    return EvaluateConfig.model_validate(section)


def _task(name: str) -> dict[str, Any]:
    """Section of a task: its name, or that of the file that defines it."""
    return {"task": Path(name).stem, "path": name} if name.endswith((".yaml", ".yml")) else {"task": name}


def source(file: str, field: str = "text") -> dict[str, Any]:
    """Source section for a text file, by its extension.

    Args:
        file: The file.
        field: Field of its rows that holds the text, where it has rows.

    Raises:
        UsageError: The extension says nothing.
    """
    from llmcompress.data.sources import named_source

    try:
        section = named_source(file)
    except ValueError as error:
        raise UsageError(f"--text {file}: unknown kind of text", "use a .txt, .jsonl or .parquet file") from error
    return section if section["kind"] == "text" else {**section, "field": field}


def _name(file: str, files: list[str]) -> str:
    """Metric name of a text: its file name, made unique by its place."""
    stem = Path(file).name.split(".")[0]
    same = [other for other in files if Path(other).name.split(".")[0] == stem]
    return stem if len(same) == 1 else f"{stem}_{files.index(file) + 1}"


def _refuse_idle(reason: str, chosen: Mapping[str, Any]) -> None:
    """Refuse options that would be read and forgotten.

    Raises:
        UsageError: One of ``chosen`` is given.
    """
    if more := [f"--{key.replace('_', '-')}" for key, value in chosen.items() if value is not None]:
        raise UsageError(f"{reason}, so {', '.join(more)} would change nothing", "leave one out")


def _from_recipe(name: str, chosen: Mapping[str, Any]) -> EvaluateConfig:
    from llmcompress.recipe.load import load_recipe
    from llmcompress.stages.evaluate import EvaluateConfig

    _refuse_idle("--recipe says what is measured", chosen)
    recipe = load_recipe(name, allow_missing=True).recipe
    for config in recipe.stages.values():
        if isinstance(config, EvaluateConfig):
            return config
    raise RecipeError(f"{name}: has no evaluate stage", "name another recipe, or use --text and --task")


def _open(path: str, dtype: str, device: str, out: Output, member: str | None = None) -> OpenedModel:
    from llmcompress.cli.models import open_model

    out.note(f"loading {path}")
    return open_model(path, dtype, device, member=member)


def _specs(config: EvaluateConfig) -> list[TaskSpec]:
    from llmcompress.evaluation.task_specs import specify

    return specify(config.tasks, resolve_path(config.tasks_dir) if config.tasks_dir else None, config.limit)


def _try_tasks(config: EvaluateConfig) -> None:
    """Build every task before a model is loaded: most mistakes are in their names and data.

    Raises:
        InputError: lm-eval does not know a task, or its data cannot be had.
    """
    if config.tasks:
        from llmcompress.evaluation.harness import build

        for spec in _specs(config):
            build(spec)


def _prepare(config: EvaluateConfig, opened: OpenedModel, out: Output) -> Any:
    from llmcompress.evaluation.measure import prepare

    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    return prepare(config, opened.tokenizer, None, context, out.warning)


def _measure_one(
    out: Output, path: str, config: EvaluateConfig, dtype: str, device: str, member: str | None
) -> list[dict[str, Any]]:
    from llmcompress.evaluation.ledger import Ledger
    from llmcompress.evaluation.measure import measure_side
    from llmcompress.evaluation.results import pair_scores, side_scores, task_mean

    _try_tasks(config)
    opened, ledger = _open(path, dtype, device, out, member), Ledger()
    prepared = _prepare(config, opened, out)
    # there is one model, compressed or not
    measure_side(
        "compressed", opened.model, opened.tokenizer, config, prepared, ledger, out.note, label=""  # type: ignore[arg-type]
    )  # fmt: skip
    rows = pair_scores(None, side_scores("compressed", config, prepared, ledger))
    return rows + task_mean(rows, config.task_names())


def _measure_two(
    out: Output, first: str, second: str, config: EvaluateConfig, dtype: str, device: str
) -> list[dict[str, Any]]:
    """Measure A as the reference and B against it; both stay in memory for the token-by-token comparison."""
    from llmcompress.evaluation.ledger import Ledger
    from llmcompress.evaluation.measure import measure_pair, measure_side
    from llmcompress.evaluation.results import fidelity_scores, pair_scores, side_scores, task_mean

    for name in (first, second):
        model_folder(name)
    _try_tasks(config)
    one, two, ledger = _open(first, dtype, device, out), _open(second, dtype, device, out), Ledger()
    words = (one.model.config.get_text_config().vocab_size, two.model.config.get_text_config().vocab_size)
    if words[0] != words[1]:
        raise UsageError(f"the vocabularies differ ({words[0]} and {words[1]} tokens)", "compare models of one family")
    prepared = _prepare(config, one, out)
    # neither is dense or compressed by its place
    for side, opened, label in (("dense", one, "A"), ("compressed", two, "B")):
        measure_side(side, opened.model, one.tokenizer, config, prepared, ledger, out.note, label)  # type: ignore[arg-type]
    pair = measure_pair(one.model, two.model, config, prepared, ledger, out.note)
    rows = pair_scores(
        side_scores("dense", config, prepared, ledger), side_scores("compressed", config, prepared, ledger)
    )
    return [*rows, *task_mean(rows, config.task_names()), *pair_scores(None, fidelity_scores(pair))]


def _compact(row: dict[str, Any], shape: str) -> dict[str, Any]:
    kept = {"name": f"{row['task']}.{row['metric']}"}
    kept |= {key: row[key] for key in ("task", "metric", "stderr", "n", "higher_is_better")}
    if shape == "value":
        return {**kept, "value": row["compressed"]}
    from llmcompress.evaluation.significance import within_noise

    change, error = row.get("difference"), row.get("difference_stderr")
    return {
        **kept, "a": row["dense"], "b": row["compressed"], "difference": change, "difference_stderr": error,
        "within_noise": within_noise(change, error),
    }  # fmt: skip


def _compare_runs(out: Output, first: Path, second: Path, limits: list[GateConfig], csv: Path | None) -> None:
    from llmcompress.evaluation.significance import asked_otherwise, difference_stderr, stages_of, within_noise
    from llmcompress.pipeline.fingerprint import difference
    from llmcompress.report.data import collect

    one, two = collect(first), collect(second)
    left, right = _figures(one), _figures(two)
    names = list(dict.fromkeys([*left, *right]))
    kept = [stages_of(data_dir, [s.name for s in data.stages]) for data_dir, data in ((first, one), (second, two))]
    rows = []
    for name in names:
        a, b = left.get(name), right.get(name)
        change = None if a is None or b is None else b - a
        error = difference_stderr(kept[0].get(name), kept[1].get(name))
        rows.append(
            {"name": name, "a": a, "b": b, "difference": change, "difference_stderr": error,
             "within_noise": within_noise(change, error)}
        )  # fmt: skip
    unpaired = [name for name in names if asked_otherwise(kept[0].get(name), kept[1].get(name))]
    changes = [line for line in difference(one.recipe, two.recipe, "") if not line.startswith("run.dir: ")]
    judged = _judged(limits, {name: (left.get(name), right.get(name)) for name in names if "." in name})

    def show(screen: Console) -> None:
        cells = [(row["name"], *_compared(row)) for row in rows]
        screen.print(table(("", "A", "B", "B − A"), cells, right="A|B|B − A", named=True))
        if unpaired:
            text = f"without ±, for texts, rows or prompts of A and B differ: {', '.join(unpaired)}"
            screen.print(text, markup=False, highlight=False, soft_wrap=True)
        screen.print("recipes:", highlight=False)
        for line in changes or ["the same"]:
            screen.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        _show_limits(judged, screen)

    data = {
        "a": str(first), "b": str(second), "figures": rows, "asked_otherwise": unpaired, "recipe_changes": changes,
        "limits": judged,
    }  # fmt: skip
    if csv is not None:
        write_csv(csv, rows)
    out.result(data, show)
    _require(judged)


def _figures(data: ReportData) -> dict[str, float]:
    """Every figure two runs can be compared by, in the order of the report."""
    found = {m.name: m.compressed for m in data.metrics if m.compressed is not None}
    if data.size is not None:
        for name in ("code_average", "all_in_average"):
            value = getattr(data.size, name)
            if value is not None:
                found[f"bits.{name}"] = value
        found["bytes"] = float(data.size.stored)
    for stage in data.stages:
        if stage.seconds is not None:
            found[f"seconds.{stage.name}"] = stage.seconds
    return found


def _compared(row: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """A figure of two runs and what lies between, as text."""
    a, b, change = row["a"], row["b"], row["difference"]
    if row["name"] == "bytes":
        return bytes_text(a), bytes_text(b), None if not a or b is None else f"{b / a:.3f} ×"
    shown = None if change is None else difference_text(change, row["difference_stderr"], row["name"], a)
    return figure(a), figure(b), shown
