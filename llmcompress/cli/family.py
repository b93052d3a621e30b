"""``family``: look at a family's artifact, add and remove members, merge some into one dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.command import command
from llmcompress.cli.output import Output, table
from llmcompress.cli.run import OverridesArgument, RecipeArgument
from llmcompress.errors import UsageError
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.data.sources import SourceConfig
    from llmcompress.stages.rqt.preview import Preview

# bits per weight and member that are looked at unless others are asked for
BUDGETS = (1.5, 2.0, 2.5, 3.0, 4.0)

FamilyArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of a family, or of its run.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="A family of fine-tunes in one artifact: survey, list, inspect, add, remove, merge.")
    app.add_typer(group, name="family")
    command(group, "survey")(survey)
    command(group, "list")(members)
    command(group, "inspect")(inspect)
    command(group, "add")(add)
    command(group, "remove")(remove)
    command(group, "merge")(merge)


def family_folder(path: Path) -> Path:
    """The artifact that a folder is, or holds."""
    from llmcompress.models.family_artifact import is_family

    return path / "artifact" if not is_family(path) and is_family(path / "artifact") else path


def survey(
    out: Output,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option("--budget", metavar="BITS", help="Bits per weight and member to look at; may be repeated."),
    ] = None,
) -> None:
    """Before a run: how close fine-tunes are, the tree they would make, and the error predicted for some budgets.

    Reads the weights of the recipe's base and members, and no text. Errors are predictions for rounding alone, to rank
    budgets by; a run measures.
    """
    from llmcompress.models.family import ModelFamily, unsupported
    from llmcompress.models.handle import ModelHandle
    from llmcompress.recipe.load import load_recipe
    from llmcompress.stages.rqt.preview import preview
    from llmcompress.stages.rqt.stage import RqtConfig

    loaded = load_recipe(recipe, overrides or [])
    stages = [(name, each) for name, each in loaded.recipe.stages.items() if isinstance(each, RqtConfig)]
    if not stages:
        raise UsageError(f"{recipe}: has no stage of type rqt, so there is no family", "for example the recipe rqt")
    stage, config = stages[0]
    least = config.least_budget
    low = [budget for budget in budgets or [] if not least < budget < float("inf")]
    if low:
        raise UsageError(f"--budget {low[0]:g}: the leaves alone take {least:g} bits", f"give a number above {least:g}")
    base = ModelHandle.open(loaded.recipe.model.path, loaded.recipe.model.dtype)
    problems = unsupported(base.layout)
    if problems:
        raise UsageError("\n".join(f"stages.{stage}: {problem}" for problem in problems))
    paths = {name: member.path for name, member in config.members.items()}
    family = ModelFamily.open(base, paths, loaded.recipe.model.dtype)
    wanted = budgets if budgets is not None else [b for b in BUDGETS if b > least]
    found = preview(config, family, wanted)
    for text in found.warnings:
        out.warning(text)
    data = {
        "members": list(paths), "distance": found.facts["distance"], "delta_energy": found.facts["delta_energy"],
        "tree": found.facts["tree"], "linear_bits": found.plan.linear_bits(), "budgets": found.budgets,
        "warnings": found.warnings,
    }  # fmt: skip
    out.result(data, lambda screen: _show_survey(found, screen))


def _show_survey(found: Preview, screen: Console) -> None:
    from llmcompress.quant.tree import drawn

    names = found.facts["members"]
    base = [f"{share**0.5:.2%}" for share in found.facts["delta_energy"]]
    rows = [
        [name, own, *(None if i == j else f"{found.facts['distance'][i][j]:.2%}" for j in range(len(names)))]
        for i, (name, own) in enumerate(zip(names, base))
    ]
    screen.print(table(["distance", "base", *names], rows, right="|".join(["base", *names])))
    main = found.plan.trees.get("model") or next(iter(found.plan.trees.values()))
    label = {n: f"{found.plan.mean_bits(n):.2f} bits" for n in found.plan.node_names()}
    screen.print("\n".join(drawn(main, label)), markup=False, highlight=False)
    screen.print()
    rows = [
        [f"{row.budget:.2f}", f"{row.bits:.3f}", f"{sum(row.error.values()) / len(row.error):.2%}",
         *(None if row.lost[name] is None else f"{row.lost[name]:.0%}" for name in names)]
        for row in found.budgets
    ]  # fmt: skip
    columns = ["budget", "bits", "error", *(f"{name} lost" for name in names)]
    screen.print(table(columns, rows, right="|".join(columns)))
    screen.print(
        "distance: of weights, as a share of their size; error: predicted, squared, of weights; lost: the same as a "
        "share of a member's difference to the base",
        markup=False, highlight=False,
    )  # fmt: skip


def members(out: Output, path: FamilyArgument) -> None:
    """Name the members."""
    from llmcompress.models.family_artifact import FamilyArtifact

    artifact = FamilyArtifact(family_folder(path))
    out.result({"path": str(artifact.folder), "members": list(artifact.members)}, "\n".join(artifact.members))


def inspect(out: Output, path: FamilyArgument) -> None:
    """Draw the tree with bits, sizes, errors and what one more member would cost."""
    from llmcompress.export.family import artifact_bytes, stored_bits
    from llmcompress.export.family_edit import summary
    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.quant.tree import drawn

    artifact = FamilyArtifact(family_folder(path))
    plan, rows, sizes = artifact.plan, summary(artifact), artifact_bytes(artifact.folder)
    main = plan.trees.get("model") or next(iter(plan.trees.values()))
    label = {n: f"{plan.mean_bits(n):.2f} bits, {bytes_text(plan.node_bytes(n))}" for n in plan.node_names()}
    one_more = sum(row["own_bytes"] for row in rows) / len(rows)
    lines = [*drawn(main, label), ""]
    for row in rows:
        kept = f", {row['retention']:.0%} of its difference kept" if "retention" in row else ""
        error = f", error {row['error']:.2%}" if "error" in row else ""
        lines.append(f"{row['member']}: {row['path_bits']:.2f} bits read alone{error}{kept}")
    lines += [
        "",
        f"{len(plan.order)} members, {plan.linear_bits():.3f} bits per weight and member in the trees "
        f"({stored_bits(plan, artifact.folder):.3f} with file headers), {bytes_text(sum(sizes.values()))} in all",
        f"one more member takes about {bytes_text(round(one_more))}",
        "read alone: bits of all nodes on its path; error: squared, of its weights as its calibration text feels them, "
        "as a share of their size; kept: size of its difference to the base along itself",
    ]
    data = {
        "path": str(artifact.folder), "tree": main.to_dict(), "members": rows, "bytes": sizes,
        "linear_bits": plan.linear_bits(), "node_bits": {n: plan.mean_bits(n) for n in plan.node_names()},
        "one_more_bytes": round(one_more),
    }  # fmt: skip
    out.result(data, "\n".join(lines))


def add(
    out: Output,
    path: FamilyArgument,
    member: Annotated[str, typer.Option("--member", help="Name of the new member.")],
    model: Annotated[str, typer.Option("--model", help="The new member's folder: a model, or a LoRA adapter (PEFT).")],
    base: Annotated[str | None, typer.Option("--base", help="Folder of the base that an adapter belongs to.")] = None,
    bits: Annotated[int, typer.Option("--bits", min=1, max=6, help="Bits per weight of what the new member adds.")] = 2,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="SOURCE",
            help="A .txt, .jsonl or .parquet file, or a source as in a recipe, '{kind: hub, id: …}'; without one, "
            "weights are rounded to nearest.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.")] = 512,
) -> None:
    """Add a fine-tune: its leaf under the closest node. No other member changes."""
    from llmcompress.export.family_edit import add_member
    from llmcompress.models.family import open_member
    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.lora_checkpoint import is_adapter
    from llmcompress.models.paths import resolve_path

    artifact = FamilyArtifact(family_folder(path))
    if base is None and is_adapter(resolve_path(model)):
        raise UsageError(
            f"{model}: an adapter; a family does not keep its base", "name the base's folder: --base FOLDER"
        )
    handle = open_member(model, None if base is None else ModelHandle.open(base))
    tokens = None
    if calibration is not None:
        from llmcompress.data.calibration import build

        source = calibration_source(calibration)
        tokens = build(source, handle.tokenizer(), samples, length, 0, template="auto", allow_fewer=True).tokens
    found = add_member(artifact, member, handle, bits, tokens)
    if found.vocabulary is not None:
        out.warning(
            f"{member}: its tokenizer is not that of {artifact.members[0]}: {found.vocabulary}; it keeps its own"
        )
    place = ", ".join(sorted(set(found.below.values())))
    text = (
        f"{member}: added below {place}, error {found.error:.2%}, {bytes_text(found.new_bytes)}; now {found.bits:.3f} "
        "bits per weight and member. A rebuild may do better: its shared nodes would know the new member"
    )
    data = {"path": str(artifact.folder), "member": member, "below": found.below, "error": found.error,
            "bytes": found.new_bytes, "linear_bits": found.bits}  # fmt: skip
    out.result(data, text)


def calibration_source(text: str) -> SourceConfig:
    """A source as ``stages.calibrate.source`` takes it: a file whose name says what is in it, or a YAML section.

    Raises:
        UsageError: It is neither.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from llmcompress.data.sources import SourceConfig, SyntheticSource

    try:
        section = yaml.safe_load(text) if text.lstrip().startswith("{") else text
        found: SourceConfig = TypeAdapter(SourceConfig).validate_python(section)
    except yaml.YAMLError as error:
        raise UsageError(f"--calibration {text}: not valid YAML", "for example '{kind: hub, id: NAME}'") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        raise UsageError(
            f"--calibration {text}: {what}", "name a .txt, .jsonl or .parquet file, or write '{kind: text, path: FILE}'"
        ) from error
    if isinstance(found, SyntheticSource):
        raise UsageError(f"--calibration {text}: random tokens say nothing of a model", "leave --calibration out")
    return found


def remove(
    out: Output, path: FamilyArgument, member: Annotated[str, typer.Option("--member", help="Name of the member.")]
) -> None:
    """Remove a member and free its bytes; the others keep every bit."""
    from llmcompress.export.family_edit import remove_member
    from llmcompress.models.family_artifact import FamilyArtifact

    folder = family_folder(path)
    freed = remove_member(FamilyArtifact(folder), member)
    bits = FamilyArtifact(folder).plan.linear_bits()
    data = {"path": str(folder), "member": member, "freed_bytes": freed, "linear_bits": bits}
    out.result(data, f"{member}: removed, {bytes_text(freed)} freed; now {bits:.3f} bits per weight and member")


def merge(
    out: Output,
    path: FamilyArgument,
    member: Annotated[
        list[str], typer.Option("--member", help="NAME, or NAME=SHARE for another weight in the mean; may be repeated.")
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder for the merged dense model.")],
) -> None:
    """Write the weighted mean of members as one dense model."""
    from llmcompress.export.family_edit import merge_members
    from llmcompress.models.family_artifact import FamilyArtifact

    shares: dict[str, float] = {}
    for text in member:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share) if share else 1.0
        except ValueError as error:
            raise UsageError(f"--member {text}: {share!r} is not a number", "for example --member a=0.7") from error
    weights = merge_members(FamilyArtifact(family_folder(path)), shares, target)
    named = ", ".join(f"{share:.1%} {name}" for name, share in weights.items())
    out.result({"out": str(target), "shares": weights}, f"{target}: mean of {named}")
