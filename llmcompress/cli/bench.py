"""``bench kernels | model``: how fast, by a protocol that can be repeated.

Warm-up first, then repetitions that alternate between the things compared, so that a slow spell of the machine hits
all of them; medians with the smallest and largest value; load and threads are recorded beside them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import DeviceOption, DtypeOption, ModelArgument
from llmcompress.cli.output import Output, bytes_text, table
from llmcompress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.cli.models import OpenedModel

RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Timed repetitions.")]
# out, in features of typical expert and attention projections, small enough for a laptop
KERNEL_SHAPES = ((1024, 1024), (2048, 1024))
KERNEL_TOKENS = (1, 64)
GROUP = 128


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
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens read at once.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens written one by one.")] = 32,
    repeats: RepeatsOption = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Tokens per second of reading a prompt (prefill) and of writing (decode), batch 1, random token ids."""
    from llmcompress.cli.models import open_model
    from llmcompress.pipeline.device import set_threads

    set_threads(threads)
    names = [path] if against is None else [path, against]
    opened: dict[str, OpenedModel] = {}
    for name in names:
        out.note(f"loading {name}")
        opened[name] = open_model(name, dtype, device, need_tokenizer=False)
        _check_context(opened[name], prompt_tokens + new_tokens, name)
    actions: dict[str, Callable[[], float]] = {}
    for name, model in opened.items():
        prefill, decode = _actions(model, prompt_tokens, new_tokens)
        actions |= {f"{name}\0prefill": prefill, f"{name}\0decode": decode}
    out.note(f"timing {len(names)} model(s): {repeats} repetitions")
    found = medians(actions, repeats)
    counts = {"prefill": prompt_tokens, "decode": new_tokens}
    rows = []
    for name in names:
        row: dict[str, Any] = {"path": name, "weight_bytes": opened[name].weight_bytes}
        for phase, count in counts.items():
            spread = found[f"{name}\0{phase}"]
            row[phase] = {
                "tokens": count, "tokens_per_second": count / spread["median"],
                "slowest": count / spread["max"], "fastest": count / spread["min"], "seconds": spread["median"],
            }  # fmt: skip
        rows.append(row)
    data = {
        "machine": machine(),
        "repeats": repeats,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "models": rows,
    }
    out.result(data, lambda screen: _show_models(rows, screen))


def _check_context(opened: OpenedModel, tokens: int, name: str) -> None:
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UsageError(f"{name}: {tokens} tokens exceed the model's context of {context}", "lower --prompt-tokens")


def _actions(opened: OpenedModel, prompt: int, new: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Timed prefill, and timed decoding of ``new`` tokens after an untimed prefill."""
    import torch

    model = opened.model
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, prompt), generator=generator).to(model.device)

    def settle() -> None:
        if opened.device == "cuda":
            from llmcompress.pipeline.device import synchronize

            synchronize()

    def prefill() -> float:
        with torch.inference_mode():
            settle()
            begun = time.perf_counter()
            model(input_ids=ids, use_cache=True)
            settle()
        return time.perf_counter() - begun

    def decode() -> float:
        with torch.inference_mode():
            state = model(input_ids=ids, use_cache=True)
            word = state.logits[:, -1:].argmax(-1)
            settle()
            begun = time.perf_counter()
            for _ in range(new):
                state = model(input_ids=word, past_key_values=state.past_key_values, use_cache=True)
                word = state.logits[:, -1:].argmax(-1)
            settle()
        return time.perf_counter() - begun

    return prefill, decode


def _show_models(rows: list[dict[str, Any]], screen: Console) -> None:
    cells = [
        (row["path"], bytes_text(row["weight_bytes"]), *(_speed(row[phase]) for phase in ("prefill", "decode")))
        for row in rows
    ]
    screen.print(table(("model", "weights", "prefill tokens/s", "decode tokens/s"), cells, right="weights"))


def _speed(phase: dict[str, float]) -> str:
    return f"{phase['tokens_per_second']:.1f} ({phase['slowest']:.1f}–{phase['fastest']:.1f})"


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
