"""``bench tune``: which launch configurations of the GPU kernels are fastest here, kept in a table that calls read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.output import Output, table
from llmcompress.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from llmcompress_kernels.bench.tune import Case, Outcome
    from rich.console import Console

DTYPES = ("bfloat16", "float16")
BITS = (2, 3, 4, 8)
TOKENS = (1, 2, 4, 8, 16)
SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
# replays of a candidate
SAMPLES = 15


def bench_tune(
    out: Output,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Take the shapes of this model; a folder or asset:NAME.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="INxOUT", help="Inputs and outputs of a layer; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Tokens multiplied at once; may be repeated.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option("--bits", help="Code widths; may be repeated.")] = None,
    group: Annotated[int, typer.Option("--group", min=1, help="Columns per scale.")] = 128,
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of activations: {' or '.join(DTYPES)}.")] = "bfloat16",
) -> None:
    """Time launch configurations of the GPU kernels and keep the fastest in the cache, from where calls take them.

    A table belongs to one GPU, to the kernels and to the version of Triton that it was measured with; with others it is
    left alone, and `llmcompress doctor` says so. Every candidate is checked before it is timed. Without options three
    layers of a Mixtral or Llama at 1 to 16 tokens and 4, 3 and 2 bits. Needs a GPU that does nothing else meanwhile.
    """
    widths, counts = bits or [4, 3, 2], tokens or list(TOKENS)
    _check(widths, dtype, model, shape)
    shapes = [(columns, rows) for columns, rows in (map(parse_shape, shape) if shape else SHAPES)]
    banks: list[tuple[int, int, int, int]] = []
    if model is not None:
        shapes, banks = shapes_of(model)
    import torch
    from llmcompress_kernels import tables
    from llmcompress_kernels.cuda import library

    missing = library.no_device()
    if missing is not None:
        raise EnvironmentProblem(
            f"launches can only be timed on a GPU: {missing}", "run it on the machine that will serve the model"
        )
    from llmcompress_kernels.bench import replay, tune

    def timer(calls: Any) -> float:
        return float(replay.replay({"": calls}, SAMPLES)[""].median)

    gpu = torch.cuda.get_device_name()
    cases = list(_cases(shapes, banks, widths, counts, group, getattr(torch, dtype)))
    out.note(f"searching for {len(cases)} products on {gpu}")
    found = []
    for outcome in tune.tune(cases, gpu, torch.device("cuda"), timer, replay.rotations):
        found.append(outcome)
        out.note(_line(outcome))
    rows, states = [row_of(outcome) for outcome in found], tables.describe([gpu])
    data = {"gpu": gpu, "tables": states, "versions": tables.versions("triton"), "rows": rows}
    out.result(data, lambda screen: _show(rows, states, screen))


def parse_shape(text: str) -> tuple[int, int]:
    """``576x1536`` as (in features, out features)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape {text}: not two sizes", "write it like --shape 4096x14336, in features first")
    return int(parts[0]), int(parts[1])


def _check(widths: list[int], dtype: str, model: str | None, shape: list[str] | None) -> None:
    wrong = [width for width in widths if width not in BITS]
    if wrong:
        raise UsageError(f"--bits {wrong[0]}: no kernel", f"choose from {', '.join(map(str, BITS))}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: not a type of activations", f"choose {' or '.join(DTYPES)}")
    if model is not None and shape:
        raise UsageError("--shape: the model already says which shapes", "leave one of them out")


def shapes_of(model: str) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Distinct products of a model: dense ``(in, out)``, and banks ``(experts, slots, intermediate, hidden)``.

    Raises:
        InputError: There is no configuration to read, or the family is unknown.
    """
    from llmcompress.cli.look_ahead import read_object
    from llmcompress.models.paths import model_folder
    from llmcompress.models.registry import layout_from_config

    folder: Path = model_folder(model)
    layout = layout_from_config(read_object(folder / "config.json"))
    dense: dict[tuple[int, int], None] = {}
    banks: dict[tuple[int, int, int, int], None] = {}
    for block in layout.blocks:
        for linear in block.linears():
            dense[linear.in_features, linear.out_features] = None
        if block.bank is not None and block.bank.gated:
            bank = block.bank
            banks[bank.num_experts, bank.top_k, bank.intermediate, bank.hidden] = None
    return list(dense), list(banks)


def _cases(
    shapes: list[tuple[int, int]],
    banks: list[tuple[int, int, int, int]],
    widths: list[int],
    counts: list[int],
    group: int,
    dtype: Any,
) -> Iterator[Case]:
    from llmcompress_kernels.bench.tune import Case

    for width in widths:
        for count in counts:
            for columns, rows in shapes:
                yield Case(width, count, rows, columns, group, dtype)
            for experts, slots, intermediate, hidden in banks:
                yield Case(width, count, intermediate, hidden, group, dtype, experts, slots)


def row_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values."""
    row = asdict(outcome)
    case = row.pop("case")
    case["dtype"] = str(case["dtype"]).removeprefix("torch.")
    return {**case, **row}


def _line(outcome: Outcome) -> str:
    case = outcome.case
    what = f"{case.rows} x {case.columns}, {case.bits} bits, {case.tokens} tokens, {outcome.part}"
    if outcome.reason:
        return f"{what}: nothing to search, {outcome.reason}"
    return f"{what}: {outcome.microseconds:.1f} us instead of {outcome.default_microseconds:.1f} ({outcome.backend})"


def _show(rows: list[dict[str, Any]], states: list[dict[str, str]], screen: Console) -> None:
    cells = [
        (f"{r['columns']} × {r['rows']}", r["part"], r["bits"], r["tokens"], r["backend"] or "–",
         f"{r['microseconds']:.1f}", f"{r['default_microseconds']:.1f}", r["tried"], r["reason"] or r["chosen"])
        for r in rows
    ]  # fmt: skip
    head = ("layer", "part", "bits", "tokens", "backend", "µs", "default µs", "tried", "configuration")
    screen.print(table(head, cells, right="bits|tokens|µs|default µs|tried"))
    for state in states:
        screen.print(f"{state['backend']}: {state['table']}", highlight=False, markup=False)
