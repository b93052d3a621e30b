"""What would end a run after an hour and can be known before it: disk, memory, a GPU's memory, data out of reach.

Budgets of the recipe are held against the prediction by :meth:`Plan.require_budget`; this is about the machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmcompress.data.sources import JsonlSource, ParquetSource
from llmcompress.errors import EnvironmentProblem, InputError, ResourceError
from llmcompress.models.paths import matches
from llmcompress.pipeline.device import resolve_device
from llmcompress.pipeline.estimate import on_machine
from llmcompress.pipeline.fingerprint import inputs_of
from llmcompress.pipeline.run_dir import RunDir
from llmcompress.stages.base import Kind
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from llmcompress.pipeline.estimate import Plan
    from llmcompress.recipe.load import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Ways:
    """What a command offers where this machine has not enough, in its own words.

    Attributes:
        folder: How another folder is given.
        anyway: How it begins all the same; empty where it never does.
    """

    folder: str = "run.dir=FOLDER"
    anyway: str = "--no-preflight begins all the same"

    def numbered(self, *lines: str) -> str:
        """Next steps, a line each."""
        offered = [*lines, self.anyway] if self.anyway else lines
        return "\n".join(f"{number}. {text}" for number, text in enumerate(offered, 1))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a recipe a command will run here.

    Attributes:
        until: Last stage, None for all.
        only: The one stage, before which all must be finished; None for all.
        redo: The first stage that is done again although it is finished, None for none.
        force: Whether all are, and what the folder holds of an earlier run is deleted.
        processes: On this machine.
    """

    until: str | None = None
    only: str | None = None
    redo: str | None = None
    force: bool = False
    processes: int = 1

    def names(self, loaded: LoadedRecipe) -> list[str]:
        """The stages in question, in order, finished or not; all of them where ``until`` or ``only`` names none."""
        every = list(loaded.recipe.stages)
        if self.only in every:
            return [str(self.only)]
        return every[: every.index(self.until) + 1] if self.until in every else every

    def reached(self, loaded: LoadedRecipe) -> list[str]:
        """Those of them and all before, which are read again where they are finished."""
        every = list(loaded.recipe.stages)
        return every[: every.index(self.names(loaded)[-1]) + 1]

    def pending(self, loaded: LoadedRecipe) -> list[str]:
        """Those of them that will run: without what an earlier command has finished by the same settings."""
        names, kept = self.names(loaded), []
        folder = RunDir(Path(loaded.recipe.run.dir))
        for stage in () if self.force else loaded.stages():
            record = folder.read_stage(stage.name)
            if stage.name == self.redo or record is None or not record.finished():
                break
            # files that it names are read for this
            if record.inputs != inputs_of(stage):
                break
            kept.append(stage.name)
        return [name for name in names if name not in kept]


def preflight(
    loaded: LoadedRecipe, predicted: Plan, config: Mapping[str, Any], extent: Extent | None = None, ways: Ways = Ways()
) -> list[str]:
    """Hold a prediction against this machine, and look for data that no cache holds and no network brings.

    Args:
        loaded: The recipe, whose named files are there.
        predicted: What all of it needs on one process.
        config: The model's ``config.json``.
        extent: What of it will run, in how many processes; by default all, in one.
        ways: What the command offers, for next steps.

    Returns:
        Remarks: memory that is there, but in use now.

    Raises:
        ResourceError: Disk or memory do not suffice for what is predicted, which is good to a tenth or so.
        InputError: Data cannot be had or has not the field that is named, or a member of a family is damaged.
        EnvironmentProblem: A package that compares answers, or trains, is missing.
    """
    extent = extent or Extent()
    pending = extent.pending(loaded)
    require_companions(loaded, extent.reached(loaded))
    require_packages(loaded, pending)
    require_rows(loaded, pending)
    require_data(loaded, pending, ways)
    # what finished stages have written is looked for in the folder
    if disks := _short_disks(loaded, predicted, extent.names(loaded), extent.force):
        room = f"free some space, or {ways.folder} on another disk"
        raise ResourceError("\n".join(disks), ways.numbered(*predicted.suggest("host.disk"), room))
    here = on_machine(predicted, loaded, config, pending, extent.processes)
    if memory := _short_memory(loaded, here):
        fewer = ["--nproc with fewer processes"] if extent.processes > 1 else []
        raise ResourceError(memory, ways.numbered(*here.suggest("host.ram"), *fewer, "a machine with more memory"))
    return [*_memory_in_use(here), *_gpu_memory(loaded, here, ways)]


def shortfalls(loaded: LoadedRecipe, predicted: Plan) -> list[str]:
    """What of a prediction this machine has not: lines for ``plan``, which refuses nothing. Torch-free.

    Args:
        loaded: The recipe.
        predicted: What it needs on one process.
    """
    memory = _short_memory(loaded, predicted)
    return [*([memory] if memory else []), *_short_disks(loaded, predicted, list(loaded.recipe.stages))]


def require_companions(loaded: LoadedRecipe, names: Collection[str]) -> None:
    """Open, by their headers, the models that stages name beside the recipe's, and look for what compares answers.

    Otherwise a damaged member is found when its family is begun, and a missing checker after hours of training.

    Args:
        loaded: The recipe, whose named files are there.
        names: The stages. What is not here is left out, and what lies in the run folder: a stage may write it first.

    Raises:
        InputError: A member is damaged, or of another architecture than the base; all of them at once. Or windows are
            too long for one.
        RecipeError: Something is named after no member.
        EnvironmentProblem: A task's checker, or math-verify, is not installed.
    """
    own = Path(loaded.recipe.run.dir).resolve()
    contexts: dict[str, object] = {}
    for stage in (stage for stage in loaded.stages() if stage.name in names):
        task = getattr(stage.config, "task", None)
        if name := getattr(task, "checker", None):
            from llmcompress.data.problems.files import checker

            checker(name)
        if getattr(task, "math", False):
            from llmcompress.data.problems.mathematics import require_math

            require_math()
        members = getattr(stage.config, "members", None) or {}
        contexts |= dict.fromkeys(members)
        paths = {
            name: member.path
            for name, member in members.items()
            if matches(member.path) and not Path(member.path).resolve().is_relative_to(own)
        }
        if paths:
            from llmcompress.models.family import ModelFamily
            from llmcompress.models.handle import ModelHandle

            model = loaded.recipe.model
            family = ModelFamily.open(ModelHandle.open(model.path, model.dtype), paths, model.dtype)
            contexts |= family.contexts()
        stage.require_members(contexts)


def require_packages(loaded: LoadedRecipe, names: Collection[str]) -> None:
    """Refuse stages whose engine is a package that is not installed.

    Args:
        loaded: The recipe.
        names: The stages.

    Raises:
        EnvironmentProblem: It is not.
    """
    for stage in (stage for stage in loaded.stages() if stage.name in names):
        engines = {"engine": stage.config, "sampler.engine": getattr(stage.config, "sampler", None)}
        for field, section in engines.items():
            asked = getattr(section, "engine", None)
            if asked in ("trl", "vllm") and find_spec(asked) is None:
                raise EnvironmentProblem(
                    f"stages.{stage.name}.{field}: {asked} is not installed",
                    f"pip install 'llmcompress[{asked}]', or {field}: own",
                )


def require_rows(loaded: LoadedRecipe, names: Collection[str]) -> None:
    """Read the first row of every local file of rows that stages name.

    Args:
        loaded: The recipe.
        names: The stages. Files that are not here are left out, and what lies in the run folder.

    Raises:
        InputError: A row has not the field that is named, or cannot be read.
    """
    from llmcompress.data.documents import require_first

    own = Path(loaded.recipe.run.dir).resolve()
    for stage in (stage for stage in loaded.stages() if stage.name in names):
        for source, template in text_sources(stage.config):
            if not Path(source.path).resolve().is_relative_to(own):
                require_first(source, template)


def text_sources(section: Any, template: Any = "auto") -> Iterator[tuple[JsonlSource | ParquetSource, Any]]:
    """Every local file of rows in a section of a recipe, with how its rows become text."""
    if isinstance(section, JsonlSource | ParquetSource):
        yield section, template
    elif isinstance(section, BaseModel):
        template = getattr(section, "template", template)
        for name in type(section).model_fields:
            yield from text_sources(getattr(section, name), template)
    elif isinstance(section, Mapping | tuple | list):
        for part in section.values() if isinstance(section, Mapping) else section:
            yield from text_sources(part, template)


def require_data(loaded: LoadedRecipe, names: Collection[str], ways: Ways = Ways()) -> None:
    """Refuse stages that name data of the hub which is in no cache while the hub is silent.

    Args:
        loaded: The recipe.
        names: The stages.
        ways: What the command offers, for the next step.

    Raises:
        InputError: With a line for each.
    """
    from llmcompress.data.hub import NOT_HERE, out_of_reach

    sections = {name: section for name, section in loaded.data.get("stages", {}).items() if name in names}
    named = dict(hub_sources(sections, "stages"))
    lost = out_of_reach(named.values()) if named else {}
    lines = [
        f"{', '.join(path for path, other in named.items() if other == name)}: hub {name}: {why}"
        for name, why in lost.items()
    ]
    lines += [line for stage in loaded.stages() if stage.name in names for line in stage.lacks()]
    if not lines:
        return
    # the reason is the same for all, and said once
    parts = [line.partition(f": {NOT_HERE}") for line in lines]
    silences = dict.fromkeys(silence for _, _, silence in parts if silence)
    told = [what for what, _, _ in parts] + [f"not in the cache of datasets, and {silence}" for silence in silences]
    own = [f"{path}=FILE" for path, name in named.items() if name in lost]
    asking = dict.fromkeys(what.partition(": task ")[0] for what in told if ": task " in what)
    own += [f"{stage}.tasks_dir=FOLDER (or tasks=[])" for stage in asking]
    step = f"fetch it on a machine with a network, or name files of your own: {' '.join(own)}"
    raise InputError("\n".join(told), "; ".join(filter(None, (step, ways.anyway))))


def hub_sources(data: Any, path: str) -> Iterator[tuple[str, str]]:
    """Dotted path and name of every data set of the hub in plain recipe data."""
    if isinstance(data, Mapping):
        if data.get("kind") == "hub" and isinstance(data.get("id"), str):
            yield path, data["id"]
        for key, value in data.items():
            yield from hub_sources(value, f"{path}.{key}")
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from hub_sources(value, f"{path}.{index}")


def _short_disks(loaded: LoadedRecipe, predicted: Plan, names: Collection[str], emptied: bool = False) -> list[str]:
    """A line for file systems with less room than the named stages will still write there; ``emptied`` is what
    ``--force`` does to the run folder before.
    """
    import shutil

    run = Path(loaded.recipe.run.dir)
    exporting = {stage.name: stage.config for stage in loaded.stages() if Kind.ARTIFACT in stage.produces}
    needs: dict[int, tuple[Path, int]] = {}
    for stage in (stage for stage in predicted.stages if stage.name in names):
        out = _export_folders(exporting[stage.name], run) if stage.name in exporting else []
        # what an interrupted run has written already counts as written, of these stages alone: beside what another
        # one has written there is no room
        written = 0 if emptied else _held(run / "stages" / stage.name, *out)
        folder = _existing(out[0] if out else run)
        device = folder.stat().st_dev
        first, bytes_there = needs.get(device, (folder, 0))
        needs[device] = (first, bytes_there + max(0, stage.disk - written))
    lines, home = [], _existing(run).stat().st_dev
    for device, (folder, needed) in needs.items():
        rest = needed - (_held(run) if emptied and device == home else 0)
        usage = shutil.disk_usage(folder)
        # a file system such as /proc has no room at all: what writes there says what is wrong with it
        if rest > usage.free and usage.total > 0:
            room = bytes_text(usage.free)
            lines.append(f"{folder}: {room} free on this disk, {bytes_text(rest)} are still to be written")
    return lines


def short_together(root: Path, runs: Sequence[tuple[LoadedRecipe, Plan]]) -> list[str]:
    """A line where runs that all stay on one disk have less room there together than each of them alone.

    Args:
        root: The folder that holds their folders.
        runs: Their recipes, and what each needs.
    """
    import shutil

    needed = sum(max(0, predicted.disk - _held(Path(loaded.recipe.run.dir))) for loaded, predicted in runs)
    usage = shutil.disk_usage(_existing(root))
    if needed <= usage.free:
        return []
    return [f"{root}: all runs together write {bytes_text(needed)}, {bytes_text(usage.free)} are free on this disk"]


def require_memory_together(runs: Sequence[tuple[LoadedRecipe, Plan, Mapping[str, Any]]], jobs: int) -> list[str]:
    """Hold what runs take at the same time against this machine's memory.

    Args:
        runs: Those that are to run: recipe, what it needs in one process, the model's ``config.json``.
        jobs: How many at a time.

    Returns:
        Remarks: memory that is there, but in use now.

    Raises:
        ResourceError: The largest of them do not fit together.
    """
    from llmcompress.models.memory_limits import available_ram

    needs = sorted(
        (on_machine(plan, loaded, config, Extent().pending(loaded), 1).ram for loaded, plan, config in runs),
        reverse=True,
    )[:jobs]
    if len(needs) < 2:
        return []
    needed = sum(needs)
    said = f"--jobs {jobs}: {len(needs)} runs at the same time take {bytes_text(needed)} of memory"
    if needed > (there := _memory_here()):
        fit = max((count for count in range(1, len(needs)) if sum(needs[:count]) <= there), default=1)
        raise ResourceError(f"{said}, this machine has {bytes_text(there)}", f"--jobs {fit}")
    return [f"{said}, {bytes_text(free)} are free"] if needed > (free := available_ram()) else []


def _export_folders(config: Any, run: Path) -> list[Path]:
    """Where an export writes: its artifact, other formats beside it, and what is left of unfinished ones."""
    base = Path(getattr(config, "dir", None) or run / "artifact")
    folders = [base, *(base.with_name(f"{base.name}-{name}") for name in getattr(config, "formats", ()))]
    return folders + [folder.with_name(f"{folder.name}.partial") for folder in folders]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _held(*folders: Path) -> int:
    found = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found += path.stat().st_size
    return found


def _short_memory(loaded: LoadedRecipe, predicted: Plan) -> str:
    """A line where the machine has less memory than is needed; with a budget the recipe itself says what it takes."""
    there = _memory_here()
    if predicted.ram <= there or loaded.recipe.host.ram is not None:
        return ""
    return (
        f"{bytes_text(predicted.ram)} of memory are needed in stage {predicted.worst('ram')}, "
        f"this machine has {bytes_text(there)}"
    )


def _memory_here() -> int:
    import psutil

    from llmcompress.models.memory_limits import total_ram

    return total_ram() + psutil.swap_memory().total


def _memory_in_use(predicted: Plan) -> Iterator[str]:
    from llmcompress.models.memory_limits import available_ram

    if predicted.ram > (free := available_ram()):
        yield (
            f"{bytes_text(free)} of memory are free, {bytes_text(predicted.ram)} are needed in stage "
            f"{predicted.worst('ram')}: close other programs, or set host.ram"
        )


def _gpu_memory(loaded: LoadedRecipe, predicted: Plan, ways: Ways) -> Iterator[str]:
    if predicted.device != "cuda" or resolve_device(loaded.recipe.run.device) != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info()
    if predicted.vram > total:
        raise ResourceError(
            f"{bytes_text(predicted.vram)} of GPU memory are needed in stage {predicted.worst('vram')}, "
            f"the GPU has {bytes_text(total)}",
            ways.numbered(*predicted.suggest("device.vram"), "a larger GPU"),
        )
    if predicted.vram > free:
        yield f"{bytes_text(free)} of the GPU's memory are free, {bytes_text(predicted.vram)} are needed"
