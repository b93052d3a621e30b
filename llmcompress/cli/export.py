"""``export``: write a finished run's model in a further format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.output import Output
from llmcompress.cli.run import load_job, quoted
from llmcompress.errors import ExportError, InputError, UsageError, command_line
from llmcompress.units import bytes_text


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "export")(export)


def export(
    out: Output,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Run folder, or the artifact in it.")],
    formats: Annotated[
        list[str], typer.Option("--format", "-f", help="native, compressed-tensors, gguf or dense; may be repeated.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--out", help="Folder of the native artifact; other formats go to <out>-<format>."),
    ] = None,
    member: Annotated[
        str | None, typer.Option("--member", help="Which member of a family of fine-tunes; needs --out.")
    ] = None,
) -> None:
    """Write the compressed model of a run in other formats, each read back and compared."""
    from llmcompress.export.registry import formats as known
    from llmcompress.pipeline.runner import Runner, RunOptions
    from llmcompress.stages.export import Export, ExportConfig

    wrong = [name for name in formats if name not in known()]
    if wrong:
        raise UsageError(f"--format {wrong[0]}: unknown", f"choose from {', '.join(known())}")
    if member is not None:
        _export_member(out, path, formats, target, member)
        return
    run_dir = run_folder(path)
    lock = str(run_dir / "recipe.lock.json")
    job = load_job(lock, [f"run.dir={quoted(str(run_dir))}"], source=run_dir / "recipe.yaml")
    out.run_dir = run_dir
    folders = _free_folders(Path(target) if target else run_dir / "artifact", formats)
    config: dict[str, Any] = {"type": "export", "formats": list(formats), "dir": target}
    stage = Export("export", ExportConfig.model_validate(config))
    with Runner(job, RunOptions(), out.sinks()).restored("export") as (state, ctx):
        if state.packed is None:
            raise InputError(f"{run_dir}: its quantizing stage is not finished", command_line("resume", run_dir))
        stage.require(
            state, "--format native holds any model; other formats need other rules in the recipe, and its run"
        )
        stage.run(state, ctx)
    sizes = {name: folder_bytes(folder) for name, folder in folders.items()}
    rows = {name: {"path": str(folder), "bytes": sizes[name]} for name, folder in folders.items()}
    text = "\n".join(f"{n}: {folder} ({bytes_text(sizes[n])}, read back equal)" for n, folder in folders.items())
    out.result({"run_dir": str(run_dir), "artifacts": rows}, text)


def _free_folders(base: Path, formats: list[str]) -> dict[str, Path]:
    """Format → its folder.

    Raises:
        ExportError: One is there, such as of a command that was stopped after its first format.
    """
    from llmcompress.export.base import artifact_folder

    folders = {name: artifact_folder(base, name) for name in formats}
    if taken := {name: str(folder) for name, folder in folders.items() if folder.exists()}:
        rest = f"leave out --format {' and '.join(taken)}, " if len(taken) < len(folders) else ""
        raise ExportError(
            f"{', '.join(taken.values())}: exists already", f"{rest}remove it, or give another folder with --out"
        )
    return folders


def _export_member(out: Output, path: Path, formats: list[str], target: str | None, member: str) -> None:
    """One member of a family as a model of its own."""
    from llmcompress.cli.family import family_folder
    from llmcompress.export.family_edit import write_dense_member, write_native_member
    from llmcompress.export.family_formats import write_other_member
    from llmcompress.models.family_artifact import FamilyArtifact

    if target is None:
        raise UsageError("--member needs --out", "give a folder for the member's model")
    artifact = FamilyArtifact(family_folder(path))
    artifact.require(member)
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in _free_folders(Path(target), formats).items():
        remark = "weights bit for bit" if name == "native" else "weights rebuilt and rounded"
        if name in ("native", "dense"):
            (write_native_member if name == "native" else write_dense_member)(artifact, member, folder)
        else:
            remark = write_other_member(artifact, member, name, folder)
        rows[name] = {"path": str(folder), "bytes": folder_bytes(folder), "remark": remark}
    text = "\n".join(f"{n}: {row['path']} ({bytes_text(row['bytes'])}, {row['remark']})" for n, row in rows.items())
    out.result({"member": member, "artifacts": rows}, text)


def run_folder(path: Path) -> Path:
    """The run folder that ``path`` is, or lies in.

    Raises:
        InputError: It is neither.
    """
    from llmcompress.pipeline.run_dir import RunDir

    if not path.exists():
        raise InputError(f"{path}: no such folder", "give the folder of a run")
    for folder in (path, path.resolve().parent):
        if RunDir(folder).is_run():
            return folder
    raise InputError(
        f"{path}: not a run folder, nor an artifact in one; other formats are written from the run",
        "keep the run folder and export from it: llmcompress export RUN_DIR --format gguf",
    )


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
