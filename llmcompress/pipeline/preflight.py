"""What would end a run after an hour and can be known before it: disk, memory, a GPU's memory, data out of reach.

Budgets of the recipe are held against the prediction by :meth:`Plan.require_budget`; this is about the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, ResourceError
from llmcompress.pipeline.device import resolve_device
from llmcompress.pipeline.estimate import existing, size_text

if TYPE_CHECKING:
    from llmcompress.pipeline.estimate import Plan
    from llmcompress.recipe.load import LoadedRecipe

ANYWAY = "--no-preflight begins all the same"


def preflight(loaded: LoadedRecipe, predicted: Plan) -> list[str]:
    """Hold a prediction against this machine, and look for data that no cache holds and no network brings.

    Args:
        loaded: The recipe, whose named files are there.
        predicted: What it needs.

    Returns:
        Remarks: memory that is there, but in use now.

    Raises:
        ResourceError: Disk or memory do not suffice for what is predicted, which is good to a tenth or so.
        InputError: Data cannot be had.
    """
    require_data(loaded)
    short = list(_short_disks(loaded, predicted))
    if short:
        raise ResourceError(
            "\n".join(short), _ways(predicted, "host.disk", "free some space, or run.dir=FOLDER on another disk")
        )
    return [*_memory(loaded, predicted), *_gpu_memory(loaded, predicted)]


def require_data(loaded: LoadedRecipe) -> None:
    """Refuse a recipe that names data of the hub which is in no cache while the hub is silent.

    Raises:
        InputError: With a line for each.
    """
    from llmcompress.data.hub import out_of_reach

    named = dict(hub_sources(loaded.data.get("stages", {}), "stages"))
    lost = out_of_reach(named.values()) if named else {}
    lines = [f"{path}: hub {name}: {lost[name]}" for path, name in named.items() if name in lost]
    lines += [line for stage in loaded.stages() for line in stage.lacks()]
    if lines:
        raise InputError(
            "\n".join(lines),
            "fetch it on a machine with a network, or name local files (kind: jsonl; tasks_dir for tasks); " + ANYWAY,
        )


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


def _short_disks(loaded: LoadedRecipe, predicted: Plan) -> Iterator[str]:
    """File systems with less room than the stages will still write there."""
    import shutil

    run = Path(loaded.recipe.run.dir)
    needs: dict[int, tuple[Path, int]] = {}
    for stage, section in zip(predicted.stages, loaded.recipe.stages.values()):
        target = getattr(section, "dir", None) if stage.type == "export" else None
        folder = existing(Path(target) if target else run)
        device = folder.stat().st_dev
        first, bytes_there = needs.get(device, (folder, 0))
        needs[device] = (first, bytes_there + stage.disk)
    held = _held(run)
    for device, (folder, needed) in needs.items():
        # what an interrupted run has written already counts as written
        rest = needed - (held if existing(run).stat().st_dev == device else 0)
        usage = shutil.disk_usage(folder)
        # a file system such as /proc has no room at all: what writes there says what is wrong with it
        if rest > usage.free and usage.total > 0:
            yield f"{folder}: {size_text(usage.free)} free on this disk, {size_text(rest)} are still to be written"


def _held(run: Path) -> int:
    found = 0
    for path in run.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found += path.stat().st_size
    return found


def _memory(loaded: LoadedRecipe, predicted: Plan) -> Iterator[str]:
    import psutil

    from llmcompress.models.memory_limits import available_ram, total_ram

    there = total_ram() + psutil.swap_memory().total
    if predicted.ram > there and loaded.recipe.host.ram is None:
        raise ResourceError(
            f"{size_text(predicted.ram)} of memory are needed in stage {predicted.worst('ram')}, "
            f"this machine has {size_text(there)}",
            _ways(predicted, "host.ram", "a machine with more memory"),
        )
    if predicted.ram > (free := available_ram()):
        yield (
            f"{size_text(free)} of memory are free, {size_text(predicted.ram)} are needed in stage "
            f"{predicted.worst('ram')}: close other programs, or set host.ram"
        )


def _gpu_memory(loaded: LoadedRecipe, predicted: Plan) -> Iterator[str]:
    if predicted.device != "cuda" or resolve_device(loaded.recipe.run.device) != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info()
    if predicted.vram > total:
        raise ResourceError(
            f"{size_text(predicted.vram)} of GPU memory are needed in stage {predicted.worst('vram')}, "
            f"the GPU has {size_text(total)}",
            _ways(predicted, "device.vram", "a larger GPU"),
        )
    if predicted.vram > free:
        yield f"{size_text(free)} of the GPU's memory are free, {size_text(predicted.vram)} are needed"


def _ways(predicted: Plan, resource: str, last: str) -> str:
    """Next steps where a resource is short, a line each."""
    lines = [*predicted.suggest(resource), last, ANYWAY]
    return "\n".join(f"{number}. {text}" for number, text in enumerate(lines, 1))
