"""``experts``: how alike texts use the experts of a model (EAC-MoE, Eq. 3 and 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import (
    LENGTH,
    DeviceOption,
    DtypeOption,
    FieldOption,
    LengthOption,
    ModelArgument,
    settings,
)
from llmcompress.cli.output import Output, table
from llmcompress.errors import InputError
from llmcompress.models.paths import model_folder

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from llmcompress.evaluation.perplexity import Text

SHIPPED = [f"asset:text/{name}.jsonl.gz" for name in ("calibration", "heldout", "heldout_maths")]

TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="Text (.txt, .jsonl, .parquet); two or more are compared."),
]
SamplesOption = Annotated[
    int, typer.Option("--samples", min=1, help="Windows taken from each text, evenly spread over it.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "experts")(experts)


def experts(
    out: Output,
    path: ModelArgument,
    text: TextOption = None,
    field: FieldOption = None,
    length: LengthOption = None,
    samples: SamplesOption = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Show how alike texts use a model's experts, such as calibration text and what the model is for.

    1 is the same use. The diagonal holds each text's even windows against its odd ones: what so much text of one kind
    reaches. Without --text the shipped texts are compared.
    """
    from llmcompress.cli.models import open_model
    from llmcompress.evaluation.expert_preference import preference_report
    from llmcompress.evaluation.expert_shift import moe_blocks
    from llmcompress.evaluation.measure import prepare
    from llmcompress.models.registry import layout_from_config

    length = length or LENGTH
    config = settings(text or SHIPPED, length=length, field=field)
    model_folder(path)
    out.note(f"loading {path}")
    opened = open_model(path, dtype, device)
    layout = layout_from_config(opened.model.config.to_dict())
    if not moe_blocks(layout):
        raise InputError(f"{path}: {layout.model_type} has no experts", "name a mixture of experts")
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    prepared = prepare(config, opened.tokenizer, None, context, out.warning)
    windows = {name: spread(found, length, samples) for name, found in prepared.texts.items()}
    report = preference_report(opened.model, layout, windows, out.note)
    out.result({"path": path, "length": length, **report}, lambda screen: _show(report, screen))


def spread(text: Text, length: int, samples: int) -> Tensor:
    """``[S, L]``: at most ``samples`` windows, evenly spread over a text; one short window where it fills none."""
    import torch

    from llmcompress.evaluation.perplexity import window_parts

    whole = torch.cat(window_parts(text, length))
    count = min(samples, len(whole))
    return whole[[i * len(whole) // count for i in range(count)]]


def _show(report: dict[str, Any], screen: Console) -> None:
    names = [row["name"] for row in report["texts"]]
    cells = [
        (row["name"], f"{row['windows']}", f"{row['tokens']}",
         *(_share(row["own"] if name == row["name"] else value) for name, value in zip(names, values)))
        for row, values in zip(report["texts"], report["similarity"])
    ]  # fmt: skip
    screen.print(table(("text", "windows", "tokens", *names), cells, right="windows|tokens|" + "|".join(names)))
    if len(names) > 1:
        worst = min(report["layers"], key=lambda row: row["lowest"])
        screen.print(f"  least alike in layer {worst['block']}: {worst['lowest']:.3f}", highlight=False)
    for name in names:
        idle = sum(row["unused"][name] for row in report["layers"])
        if idle:
            few = "expert" if idle == 1 else "experts"
            screen.print(f"  {name} leaves {idle} {few} in all layers without a token", markup=False, highlight=False)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
