"""``bench kernels | model | serve | tune``: how fast, by the protocol of :mod:`llmcompress_kernels.bench.timing`.

Samples of the things compared alternate, so that a slow spell of the machine meets all of them; those that lost their
core do not count; the memory's bandwidth is probed among them; medians, with load and threads beside them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import DeviceOption, DtypeOption, ModelArgument
from llmcompress.cli.generate import HeadBitsOption, Int8Option, Speed
from llmcompress.cli.output import Output, table
from llmcompress.cli.tune import bench_tune, parse_shape
from llmcompress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.cli.models import OpenedModel

RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Timed repetitions.")]
# in, out features: a large and a medium layer, and one of a small model
KERNEL_SHAPES = ((4096, 14336), (2048, 1408), (576, 1536))
KERNEL_TOKENS = (1, 8, 128)
# seconds per case after which what was measured counts
BUDGET = 30.0
ROUNDINGS = {"int8_activations": "int8 activations", "head_bits": "8-bit head"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    from llmcompress.cli.bench_serve import bench_serve

    group = typer.Typer(help="Measure speed.", no_args_is_help=True)
    command(group, "model")(bench_model)
    command(group, "kernels")(bench_kernels)
    command(group, "serve")(bench_serve)
    command(group, "tune")(bench_tune)
    app.add_typer(group, name="bench")


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch

    from llmcompress.cli.doctor import cpu

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__, "load_average": load}


def bench_model(
    out: Output,
    path: ModelArgument,
    against: Annotated[
        str | None, typer.Option("--against", metavar="PATH", help="Another model, timed in turn with the first.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", metavar="FILE", help="Also time llama.cpp; LLMCOMPRESS_PEER_LLAMACPP names its Python."),
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", min=1, help="Tokens already in the context; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, max=8, help="Sequences in a batch; may be repeated.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt that is read.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens written in each sample.")] = 8,
    repeats: RepeatsOption = 7,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    int8_activations: Int8Option = False,
    head_bits: HeadBitsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Tokens per second of reading a prompt (prefill) and of writing (decode), all engines in turn.

    The native engine runs exactly and, where asked, with rounded activations and head; beside it transformers on the
    same weights and, for a packed model, a dense bfloat16 model of the same shape. Without options contexts 16 and 512,
    batch 1 and 8.
    """
    import torch

    from llmcompress.cli.models import open_model
    from llmcompress.inference import speed
    from llmcompress.pipeline.device import set_threads

    set_threads(threads)
    opened: dict[str, OpenedModel] = {}
    for name in [path] if against is None else [path, against]:
        out.note(f"loading {name}")
        opened[name] = open_model(name, dtype, device, need_tokenizer=False)
    contexts, batches = context or [16, 512], batch or [1, 8]
    longest = max(prompt_tokens, max(contexts) + new_tokens + 1)
    for name, model in opened.items():
        _check_context(model, longest, name)
    candidates, declined = _candidates(opened, Speed("auto", int8_activations, head_bits), out)
    peer = None
    if gguf is not None:
        peer = speed.LlamaCpp(gguf, torch.get_num_threads(), longest)
        candidates[f"llama.cpp {gguf.name}"] = peer
    cases = [speed.Case("prefill", prompt_tokens)]
    cases += [speed.Case("decode", c, b, new_tokens) for b in batches for c in contexts]
    out.note(f"timing {len(candidates)} candidates: {repeats} samples in each of {len(cases)} cases")
    rows = speed.measure(candidates, cases, repeats, BUDGET, torch.get_num_threads())
    if peer is not None:
        peer.close()
    models = [{"path": name, "weight_bytes": model.weight_bytes} for name, model in opened.items()]
    data = {"machine": machine(), "repeats": repeats, "models": models, "declined": declined, "rows": rows}
    out.result(data, lambda screen: _show_models(rows, screen))


def _candidates(opened: dict[str, OpenedModel], how: Speed, out: Output) -> tuple[dict[str, Any], dict[str, str]]:
    """Everything to time, and why the native engine does not run a model."""
    from llmcompress_kernels.build import BuildError

    from llmcompress.errors import InputError
    from llmcompress.inference import speed
    from llmcompress.inference.native import open_engine

    found: dict[str, Any] = {}
    declined = {}
    for name, one in opened.items():
        try:
            found[f"{name} native"] = speed.native(open_engine(one.model))
            if how.options["int8_activations"] or how.options["head_bits"]:
                options: dict[str, Any] = {key: value for key, value in how.options.items() if value}
                words = ", ".join(ROUNDINGS[key] for key in options)
                found[f"{name} native, {words}"] = speed.native(open_engine(one.model, **options))
        except (InputError, BuildError) as error:
            declined[name] = str(error).splitlines()[0]
            out.note(declined[name])
        found[f"{name} transformers"] = speed.transformers(one.model)
    first = next(iter(opened.values()))
    if getattr(first.model.config, "quantization_config", None) is not None:
        twin = speed.dense_twin(first.model).to(first.model.device)
        found["dense bfloat16 transformers"] = speed.transformers(twin)
    return found, declined


def _check_context(opened: OpenedModel, tokens: int, name: str) -> None:
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UsageError(
            f"{name}: {tokens} tokens exceed the model's context of {context}", "lower --context and --prompt-tokens"
        )


def _show_models(rows: list[dict[str, Any]], screen: Console) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by = {(row["case"], row["candidate"]): row for row in rows}
    cells = [
        (name, *(f"{by[case, name]['tokens_per_second']:.1f}" for case in cases))
        for name in dict.fromkeys(row["candidate"] for row in rows)
    ]
    screen.print(table(("tokens per second", *cases), cells, right="|".join(cases)))
    probed = [row["bandwidth"] for row in rows if row["bandwidth"]]
    if probed:
        screen.print(f"memory reads at {max(probed) / 1e9:.1f} GB/s", highlight=False)


def bench_kernels(
    out: Output,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="INxOUT", help="Inputs and outputs of a layer; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Tokens multiplied at once; may be repeated.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option("--bits", help="Code widths; may be repeated.")] = None,
    group: Annotated[int, typer.Option("--group", min=1, help="Columns per scale.")] = 64,
    moe: Annotated[
        bool, typer.Option("--moe", help="Also time a block of 60 experts against transformers' own.")
    ] = False,
    repeats: RepeatsOption = 9,
    budget: Annotated[float, typer.Option("--budget", help="Seconds spent on each layer and number of tokens.")] = 10.0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
) -> None:
    """Packed matrix products beside torch's bf16, int4 and int8 on cold weights, one sample of each in turn.

    Samples that lost their core are dropped and taken again. The memory's bandwidth is probed in the same run. Without
    options a large, a medium and a small layer at 1, 8 and 128 tokens, at 4, 3 and 2 bits.
    """
    from llmcompress_kernels import bench, cpu

    from llmcompress.pipeline.device import set_threads

    shapes = [parse_shape(text) for text in shape] if shape else list(KERNEL_SHAPES)
    widths, counts = bits or [4, 3, 2], tokens or list(KERNEL_TOKENS)
    _check_kernels(shapes, widths, group)
    if not cpu.ready():
        raise UsageError(f"no native kernels: {cpu.unavailable()}", "llmcompress doctor says what is missing")
    set_threads(threads)
    used = int(machine()["threads"])
    out.note(f"timing {len(shapes)} layers at {len(counts)} numbers of tokens, at most {budget:g} s each")
    rows = bench.bench_linear(shapes, counts, widths, group, used, repeats, budget)
    blocks = []
    if moe:
        from llmcompress.inference.speed import dense_experts

        out.note("timing a block of experts")
        blocks = bench.bench_moe(dense_experts(), counts, widths, group, used, repeats, budget)
    data = {
        "machine": machine(),
        "environment": bench.environment(used),
        "repeats": repeats,
        "linear": rows,
        "moe": blocks,
    }
    out.result(data, lambda screen: _show_kernels(rows, blocks, screen))


def _check_kernels(shapes: list[tuple[int, int]], bits: list[int], group: int) -> None:
    from llmcompress_kernels import cpu

    for width in bits:
        for columns, rows in shapes:
            reason = cpu.declines(width, group, rows, columns)
            if reason is None and columns % group != 0:
                reason = f"{columns} columns are no multiple of the group"
            if reason is not None:
                raise UsageError(
                    f"--shape {columns}x{rows} at --bits {width} and --group {group}: {reason}",
                    f"choose widths from {', '.join(map(str, sorted(cpu.STEP_COLUMNS)))}, rows in multiples of 16",
                )


def _show_kernels(rows: list[dict[str, Any]], blocks: list[dict[str, Any]], screen: Console) -> None:
    head = ("layer", "tokens", "candidate", "µs", "GB/s", "of bandwidth", "× bf16", "error", "clean")
    cells = [
        (f"{r['in']} × {r['out']}", r["tokens"], r["candidate"], f"{r['microseconds']:.1f}", f"{r['gb_per_s']:.1f}",
         f"{r['share_of_bandwidth']:.0%}", f"{r['times_bf16']:.2f}", f"{r['relative_error']:.4f}",
         f"{r['clean_samples']}/{r['samples']}")
        for r in rows
    ]  # fmt: skip
    cells += [
        (f"{r['experts']} experts", r["tokens"], r["candidate"], f"{1e3 * r['milliseconds']:.1f}",
         f"{r['gb_per_s']:.1f}", f"{r['share_of_bandwidth']:.0%}", f"{r['times_dense']:.2f}", "",
         f"{r['clean_samples']}/{r['samples']}")
        for r in blocks
    ]  # fmt: skip
    screen.print(table(head, cells, right="tokens|µs|GB/s|of bandwidth|× bf16|error|clean"))
    screen.print(f"memory reads at {max(r['probed_gb_per_s'] for r in rows):.1f} GB/s", highlight=False)
