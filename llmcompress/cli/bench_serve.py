"""``bench serve``: load on a server that speaks OpenAI's protocol, and how long its clients wait."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.output import Output, table
from llmcompress.cli.serve import KEY
from llmcompress.errors import EnvironmentProblem, InputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.serving.load import Measured, Target

# ids of random prompts: the first three are special tokens in most vocabularies
FIRST_ID = 3
# requests at once where nobody says how many, or how often
AT_ONCE = 8
NAMES = {
    "ttft": "first text (TTFT)", "tpot": "a token after it (TPOT)", "itl": "between pieces (ITL)",
    "e2el": "whole request (E2EL)",
}  # fmt: skip

ConcurrencyOption = Annotated[
    int | None,
    typer.Option("--concurrency", "-c", min=1, help="Requests at once, at most. Default: 8, with --rate no bound."),
]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", help="Requests per second on average, at random times. Default: as soon as they may."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A prompt a line; or .jsonl with prompt or messages, and max_tokens. Default: random token ids.",
        dir_okay=False,
    ),
]
GoodputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--goodput", metavar="KIND:MS", help="Bound of ttft, tpot or e2el that good requests keep; may be repeated."
    ),
]
PercentileOption = Annotated[
    list[float] | None,
    typer.Option("--percentile", min=0, max=100, help="Of times; may be repeated. Default: 50, 90 and 99."),
]


def bench_serve(
    out: Output,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, with /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option("--model", help="Default: the one that the server lists.")] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many.")] = 64,
    concurrency: ConcurrencyOption = None,
    rate: RateOption = None,
    prompts: PromptsOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send prompts as chats; needs --prompts.")] = False,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1, help="Of a random prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Of an answer.")] = 64,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=FIRST_ID + 1, help="Ids of random prompts are below this.")
    ] = 1000,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for answers of full length, as vLLM has it.")
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of random prompts, times and answers.")] = 0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Requests before, which do not count.")] = 1,
    goodput: GoodputOption = None,
    percentiles: PercentileOption = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds after which a request failed.")] = 600.0,
) -> None:
    """Send requests to a running server and tell how long they took: our own, vLLM's, or another of OpenAI's protocol.

    Words are those of vLLM's bench serve: time to the first text, between pieces, per token after the first, of whole
    requests; requests and tokens per second; and goodput, the requests per second within given bounds. The key is read
    from LLMCOMPRESS_API_KEY. The client needs a core of its own: it says by how much it was late.
    """
    from llmcompress.serving.load import Load, summary, target_of

    if rate is not None and not rate > 0:
        raise UsageError(f"--rate {rate:g}: must be above 0", "leave it out to send without pauses")
    if chat and prompts is None:
        raise UsageError("--chat: random token ids are no chat", "give --prompts FILE")
    bounds = _bounds(goodput)
    if concurrency is None:
        # what a bound holds back has not been sent, and its waiting would not count
        concurrency = AT_ONCE if rate is None else requests
    target = target_of(url, os.environ.get(KEY) or None)
    name = _model(target, url, timeout) if model is None else model
    drawn, both = random.Random(seed), requests + warmup
    asked = (
        [{"prompt": [drawn.randrange(FIRST_ID, vocabulary) for _ in range(input_tokens)]} for _ in range(both)]
        if prompts is None
        else read_prompts(prompts, chat)
    )
    common = {
        "model": name, "temperature": temperature, "seed": seed, "stream": True,
        "stream_options": {"include_usage": True}, **({"ignore_eos": True} if ignore_eos else {}),
    }  # fmt: skip
    # those to warm up are drawn last: random prompts of theirs are nobody else's, which a server would remember
    bodies = [{"max_tokens": output_tokens, **asked[index % len(asked)], **common} for index in range(both)]
    path = "/chat/completions" if chat else "/completions"
    shown = f"{requests} requests to {name} at {url}, {'' if rate is None else f'{rate:g} per second, '}"
    out.note(f"{shown}at most {concurrency} at once")

    async def send() -> Measured:
        if warmup:
            await Load(target, path, timeout).run(bodies[requests:], concurrency)
        return await Load(target, path, timeout).run(bodies[:requests], concurrency, rate, seed)

    measured = asyncio.run(send())
    found = summary(measured, percentiles or (50, 90, 99), bounds)
    if found["failed"] == requests:
        (error, count), *_ = sorted(found["errors"].items(), key=lambda pair: -pair[1])
        raise EnvironmentProblem(f"{url}: no request succeeded; {count} times: {error}", _advice(error))
    for error, count in found["errors"].items():
        out.warning(f"{count} of {requests} requests failed: {error}")
    how = {"concurrency": concurrency, "rate": rate, "seed": seed, "chat": chat, "warmup": warmup}
    out.result({"url": url, "model": name, **how, **found}, lambda screen: _show(found, screen))


def _advice(error: str) -> str:
    if "ignore_eos" in error:
        return "--no-ignore-eos leaves out what this server does not know"
    if "token ids are" in error:
        return "lower --vocabulary"
    return "look at the server's log; a key is read from LLMCOMPRESS_API_KEY"


def _bounds(given: list[str] | None) -> dict[str, float] | None:
    if not given:
        return None
    found = {}
    for text in given:
        kind, _, value = text.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = -1.0
        if kind not in ("ttft", "tpot", "e2el") or not bound > 0:
            raise UsageError(f"--goodput {text}: not a bound", "write it like --goodput ttft:500, in milliseconds")
        found[kind] = bound
    return found


def _model(target: Target, url: str, timeout: float) -> str:
    """The only model that a server lists."""
    from aiohttp import ClientError

    from llmcompress.serving.load import Refused, served_models

    try:
        names = asyncio.run(asyncio.wait_for(served_models(target), timeout))
    except (OSError, ClientError, ValueError, Refused) as error:
        said = str(error) or f"no list of models within {timeout:g} s"
        raise EnvironmentProblem(f"{url}: {said}", "start the server first, or correct the address") from error
    if len(names) != 1:
        raise UsageError(f"{url} serves {', '.join(names) or 'no model'}", "choose one with --model")
    return names[0]


def read_prompts(path: Path, chat: bool) -> list[dict[str, Any]]:
    """Parts of requests that a file's lines ask for.

    Args:
        path: Text, or JSON lines where its name ends in ``.jsonl``.
        chat: Whether for the endpoint of chats.

    Raises:
        InputError: There is no such file, or a line of it is no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}", "give a text file") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        asked: dict[str, Any] = {"prompt": line}
        if path.suffix == ".jsonl":
            asked = _asked(line, f"{path}:{number}")
        if chat and "prompt" in asked:
            asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
        if not chat and "messages" in asked:
            raise InputError(f"{path}:{number}: messages are for chats", "add --chat")
        found.append(asked)
    if not found:
        raise InputError(f"{path}: no prompts", "write one a line")
    return found


def _asked(line: str, where: str) -> dict[str, Any]:
    """One line of JSON."""
    hint = 'write it like {"prompt": "Once upon a time", "max_tokens": 64}'
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}", hint) from error
    fields = {"prompt": str, "messages": list, "max_tokens": int}
    given = data if isinstance(data, dict) else {}
    right = all(isinstance(given[key], kind) for key, kind in fields.items() if key in given)
    if not right or ("prompt" in given) == ("messages" in given) or given.get("max_tokens", 1) < 1:
        raise InputError(f"{where}: no prompt", hint)
    return {key: given[key] for key in fields if key in given}


def _show(found: dict[str, Any], screen: Console) -> None:
    rows = [(NAMES[kind], *found[f"{kind}_ms"].items()) for kind in NAMES if found[f"{kind}_ms"]]
    heads = ["mean", *[key for key in found["ttft_ms"] if key not in ("mean", "max")], "max"]
    cells = [(name, *(f"{dict(pairs)[head]:.1f}" for head in heads)) for name, *pairs in rows]
    screen.print(table(("milliseconds", *heads), cells, right="|".join(heads)))
    good = found.get("good_requests_per_second")
    lines = [
        f"{found['requests'] - found['failed']} requests in {found['seconds']:.2f} s, "
        f"{found['most_at_once']} at once at most: {found['requests_per_second']:.2f} per second"
        + ("" if good is None else f", {good:.2f} of them within the bounds"),
        f"{found['completion_tokens']} tokens written{' (pieces)' if found['tokens_are_pieces'] else ''}: "
        f"{found['completion_tokens_per_second']:.1f} per second; {found['total_tokens_per_second']:.1f} with those of "
        f"prompts ({found['prompt_tokens']})",
        f"the client was late by {found['client_late_ms']:.1f} ms at most",
    ]
    screen.print("\n".join(lines), highlight=False, soft_wrap=True)
