"""``serve``: an OpenAI-compatible HTTP server over an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import DeviceOption, DtypeOption
from llmcompress.cli.output import Output
from llmcompress.errors import InputError, UsageError
from llmcompress.serving.limits import Limits
from llmcompress.serving.thoughts import PARSERS
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from llmcompress.serving.served import Batch, Served

KEY = "LLMCOMPRESS_API_KEY"
_LIMITS = Limits()


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "serve")(serve)


def _bound(name: str, text: str) -> object:
    return typer.Option(f"--{name}", min=1, help=text, rich_help_panel="Limits")


HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; any but loopback needs a key.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of a single model; by default that of its folder.")
]
ParserOption = Annotated[
    str,
    typer.Option(
        "--reasoning-parser", metavar="NAME",
        help=f"Tell thoughts from answers: auto, as the chat template says; none; as vLLM's {', '.join(PARSERS)}.",
    ),
]  # fmt: skip
PrefixOption = Annotated[
    bool,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Reuse what finished answers leave in the cache for prompts that begin alike.",
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin", metavar="URL",
        help="Of web pages whose scripts may read answers, http://localhost:3000, say; may be repeated; '*' is all.",
    ),
]  # fmt: skip
ReadOption = Annotated[
    float, _bound("read-seconds", "Seconds for a request's head to arrive, and then for its body; beyond: 408.")
]
WriteOption = Annotated[float, _bound("write-seconds", "Seconds a client may read nothing.")]


def serve(
    out: Output,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Artifacts, model or run folders.")],
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 chooses a free one.")] = 8000,
    name: NameOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="auto, or transformers to keep the native engine out.")
    ] = "auto",
    parser: ParserOption = "auto",
    origins: OriginOption = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line on stderr for each request: time, path, status, seconds.")
    ] = False,
    rows: Annotated[int, _bound("max-sequences", "Sequences that decode together.")] = _LIMITS.rows,
    queue: Annotated[int, _bound("max-waiting", "Sequences that wait; beyond: 429.")] = _LIMITS.queue,
    cache_tokens: Annotated[int, _bound("cache-tokens", "Tokens of all that decode.")] = _LIMITS.cache_tokens,
    prompt_chunk: Annotated[
        int, _bound("prompt-chunk", "Prompt tokens that running answers wait for at a time.")
    ] = _LIMITS.prompt_chunk,
    prefix_caching: PrefixOption = _LIMITS.prefix_caching,
    snapshot_bytes: Annotated[
        int, _bound("snapshot-bytes", "Bytes that models with states keep of prompts.")
    ] = _LIMITS.snapshot_bytes,
    prompt_tokens: Annotated[int, _bound("max-prompt-tokens", "Tokens of one prompt.")] = _LIMITS.prompt_tokens,
    new_tokens: Annotated[int, _bound("max-new-tokens", "Tokens of one answer.")] = _LIMITS.new_tokens,
    body_bytes: Annotated[int, _bound("max-body-bytes", "Bytes of one request.")] = _LIMITS.body_bytes,
    connections: Annotated[
        int, _bound("max-connections", "Connections open at once; beyond: 503.")
    ] = _LIMITS.connections,
    read_seconds: ReadOption = _LIMITS.read_seconds,
    write_seconds: WriteOption = _LIMITS.write_seconds,
    drain_seconds: Annotated[
        float, _bound("drain-seconds", "Seconds answers go on after SIGTERM.")
    ] = _LIMITS.drain_seconds,
) -> None:
    """Serve families and other artifacts to OpenAI clients.

    /v1/completions and /v1/chat/completions with streaming, /v1/models, /health, /metrics. Requests for all members
    of a family decode in one batch, other models each in its own. A request that names no temperature or top_p gets
    those of the model's generation_config.json, else 1 as at OpenAI. The native engine reads long prompts in parts,
    between the steps of running answers, and a prompt that begins like another one goes on from there. Whoever has the
    key may notice that by the time it takes: those who must not know of each other need servers of their own. The API
    key is read from the environment variable LLMCOMPRESS_API_KEY.
    SIGTERM ends it when running answers are complete.
    """
    _check(paths, name, engine, parser, origins or ())
    from llmcompress.serving.served import together
    from llmcompress.serving.server import Server, bind, check_access

    api_key = os.environ.get(KEY) or None
    check_access(host, api_key)
    limits = Limits(
        rows=rows, queue=queue, cache_tokens=cache_tokens, prompt_chunk=prompt_chunk, prefix_caching=prefix_caching,
        snapshot_bytes=snapshot_bytes, prompt_tokens=prompt_tokens, new_tokens=new_tokens, body_bytes=body_bytes,
        connections=connections, read_seconds=read_seconds, write_seconds=write_seconds, drain_seconds=drain_seconds,
    )  # fmt: skip
    # before the model is loaded, which takes longer
    with bind(host, port) as bound:
        place = f"http://{host if ':' not in host else f'[{host}]'}:{bound.getsockname()[1]}"
        out.note(f"loading {', '.join(paths)}")
        served = together([open_served(path, name, dtype, device, limits, native=engine == "auto") for path in paths])
        for batch in served.batches:
            out.note(_described(batch))
        server = Server(served, limits, api_key, access_log, parser, origins or ())
        data = {
            "paths": paths, "url": f"{place}/v1", "models": list(served.models), "needs_key": api_key is not None,
            "batches": served.batches,
        }  # fmt: skip
        out.result(data, f"{place}/v1 serves {', '.join(served.models)}")
        server.run(bound)
    out.note("all answers are complete; stopped")


def _check(paths: list[str], name: str | None, engine: str, parser: str, origins: Sequence[str]) -> None:
    """Refuse options before anything is loaded.

    Raises:
        UsageError: One has a value that is none, or does not go with the others.
    """
    if engine not in ("auto", "transformers"):
        raise UsageError(f"--engine {engine}: unknown", "choose auto or transformers")
    if parser not in ("auto", "none", *PARSERS):
        raise UsageError(f"--reasoning-parser {parser}: unknown", f"choose auto, none, {', '.join(PARSERS)}")
    if name is not None and len(paths) > 1:
        raise UsageError("--name: for one model only", "leave it out; the folders' names tell several apart")
    for origin in origins:
        # browsers compare letter by letter: one with a path, if only a slash, would never be it
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(
                f"--allow-origin {origin}: no origin of a page",
                "give scheme, host and port as http://localhost:3000, without a slash behind them, or '*'",
            )


def _described(batch: Batch) -> str:
    """How much decodes at once, what it takes, and why not faster."""
    size = f"{batch.kind} batches of up to {batch.sequences} sequences of up to {batch.tokens} tokens"
    size += f", {batch.together} together, whose caches take up to {bytes_text(batch.cache_bytes)}"
    return f"{', '.join(batch.models)}: {size}{f'; {batch.reason}' if batch.reason else ''}"


def open_served(path: str, name: str | None, dtype: str, device: str, limits: Limits, native: bool) -> Served:
    """Load what a path names.

    Raises:
        InputError: Nothing that can be served is there, or a family got a name.
    """
    from llmcompress.cli.family import family_folder
    from llmcompress.models.family_artifact import FamilyArtifact, is_family
    from llmcompress.models.paths import model_folder
    from llmcompress.serving.served import model_name, serve_family, serve_model

    folder = family_folder(Path(path))
    if is_family(folder):
        import torch

        from llmcompress.pipeline.device import resolve_device

        if name is not None:
            raise InputError(f"{folder}: a family's models have names already", "leave out --name")
        place = resolve_device(device)
        wanted = "float32" if dtype == "auto" and place == "cpu" else dtype
        return serve_family(FamilyArtifact(folder), limits, None if wanted == "auto" else getattr(torch, wanted), place)
    from llmcompress.cli.models import open_model

    opened = open_model(path, dtype, device)
    assert opened.tokenizer is not None
    return serve_model(opened.model, opened.tokenizer, name or model_name(model_folder(path)), limits, native)
