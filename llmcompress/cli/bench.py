"""``bench kernels | model``: how fast, by a protocol that can be repeated.

Warm-up first, then repetitions that alternate between the things compared, so that a slow spell of the machine hits
all of them; medians with the smallest and largest value; load and threads are recorded beside them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import DeviceOption, DtypeOption, ModelArgument
from llmcompress.cli.generate import HeadBitsOption, Int8Option, Speed
from llmcompress.cli.output import Output, table
from llmcompress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.cli.models import OpenedModel

RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Timed repetitions.")]
# out, in features of typical expert and attention projections, small enough for a laptop
KERNEL_SHAPES = ((1024, 1024), (2048, 1024))
KERNEL_TOKENS = (1, 64)
GROUP = 128
# seconds per case after which what was measured counts
BUDGET = 30.0
ROUNDINGS = {"int8_activations": "int8 activations", "head_bits": "8-bit head"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Measure speed.", no_args_is_help=True)
    command(group, "model")(bench_model)
    command(group, "kernels")(bench_kernels)
    app.add_typer(group, name="bench")


def medians(actions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, float]]:
    """Run every action once to warm up, then ``repeats`` times in turn.

    Args:
        actions: Name → function that does the work and returns its seconds.
        repeats: Timed repetitions.

    Returns:
        Name → ``median``, ``min`` and ``max`` seconds.
    """
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(action())
    return {
        name: {"median": statistics.median(found), "min": min(found), "max": max(found)}
        for name, found in seconds.items()
    }


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
        str | None, typer.Option("--against", metavar="PATH", help="Another model to time in alternation.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", metavar="FILE", help="llama.cpp beside it; LLMCOMPRESS_PEER_LLAMACPP names its python."),
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", min=1, help="Tokens before; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, max=8, help="Sequences; may be repeated.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens read at once.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of a sample.")] = 8,
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
    from llmcompress.inference.engine import Engine

    found: dict[str, Any] = {}
    declined = {}
    for name, one in opened.items():
        try:
            found[f"{name} native"] = speed.native(Engine(one.model))
            if how.options["int8_activations"] or how.options["head_bits"]:
                options: dict[str, Any] = {key: value for key, value in how.options.items() if value}
                words = ", ".join(ROUNDINGS[key] for key in options)
                found[f"{name} native, {words}"] = speed.native(Engine(one.model, **options))
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
    repeats: RepeatsOption = 20,
    bits: Annotated[list[int] | None, typer.Option("--bits", help="Code widths; may be repeated.")] = None,
) -> None:
    """Packed matrix products of this machine's best implementation against torch's dense product in float32."""
    rows = []
    for width in bits or [2, 3, 4, 8]:
        for out_features, in_features in KERNEL_SHAPES:
            for tokens in KERNEL_TOKENS:
                rows.append(_kernel_row(width, out_features, in_features, tokens, repeats))
                out.note(f"{width}-bit {out_features}×{in_features}, {tokens} tokens")
    columns = ("op", "bits", "out × in", "tokens", "packed µs", "dense µs", "speed-up")
    cells = [
        (r["op"], r["bits"], f"{r['out_features']} × {r['in_features']}", r["tokens"],
         f"{1e6 * r['packed']['median']:.0f}", f"{1e6 * r['dense']['median']:.0f}", f"{r['speedup']:.2f} ×")
        for r in rows
    ]  # fmt: skip
    right = "bits|tokens|packed µs|dense µs|speed-up"
    data = {"machine": machine(), "repeats": repeats, "rows": rows}
    out.result(data, lambda screen: screen.print(table(columns, cells, right=right)))


def _kernel_row(bits: int, out_features: int, in_features: int, tokens: int, repeats: int) -> dict[str, Any]:
    import torch
    from llmcompress_kernels import ops

    from llmcompress.quant.codecs import codec
    from llmcompress.quant.spec import SUPPORTED_BITS, QuantSpec

    if bits not in SUPPORTED_BITS:
        raise UsageError(f"--bits {bits}: not supported", f"choose from {', '.join(map(str, SUPPORTED_BITS))}")
    generator = torch.Generator().manual_seed(0)
    spec = QuantSpec(bits, GROUP, symmetric=True)
    codes = torch.randint(0, spec.levels, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out_features, spec.groups(in_features), generator=generator).half()
    packed = codec("int_group").encode(codes, scale, None, spec)
    x = torch.randn(tokens, in_features, generator=generator)
    dense = codec("int_group").decode(packed).float()

    def run_packed() -> float:
        begun = time.perf_counter()
        ops.group_gemm(
            x, packed.tensors["weight_packed"], packed.tensors["weight_scale"], None, bits, GROUP, in_features
        )
        return time.perf_counter() - begun

    def run_dense() -> float:
        begun = time.perf_counter()
        x @ dense.T
        return time.perf_counter() - begun

    with torch.inference_mode():
        found = medians({"packed": run_packed, "dense": run_dense}, repeats)
    speedup = found["dense"]["median"] / found["packed"]["median"]
    return {
        "op": "group_gemm", "bits": bits, "out_features": out_features, "in_features": in_features, "tokens": tokens,
        **found, "speedup": speedup,
    }  # fmt: skip
