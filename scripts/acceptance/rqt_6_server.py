#!/usr/bin/env python3
"""RQT 6: 64 streaming clients over all members for two minutes on loopback, and clients that misbehave beside them.

Each stream's text is compared with what its member's dense model writes alone. Meanwhile other clients vanish in the
middle, read slowly, send oversized prompts and bodies, bad JSON, wrong members, no key. The server's resident memory is
sampled all the time. At the end SIGTERM comes while streams run: they must be complete, and the exit code 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from family_runs import MEMBERS, artifact, need_models, prompts
from harness import CLI, verdict

CLIENTS, SECONDS, NEW, PER_MEMBER = 64, 120.0, 40, 2
WARM, GROWTH = 45.0, 48 << 20  # memory: growth after this many seconds, in bytes
KEY = "acceptance-key"


@dataclass
class Seen:
    """What the clients met."""

    streams: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)


def expected(folder: Path) -> dict[tuple[str, str], str]:
    """(member, prompt) → greedy text of the member's dense model, computed alone."""
    import torch

    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.models.family_model import dense_member
    from llmcompress.models.handle import load_tokenizer

    found = {}
    family = FamilyArtifact(folder)
    for member in MEMBERS:
        model, words = dense_member(family, member, torch.float32), load_tokenizer(family.member_folder(member))
        for prompt in prompts(member, PER_MEMBER):
            ids = torch.tensor([words(prompt)["input_ids"]])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
            found[member, prompt] = str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The server and its address."""
    command = [*CLI, "serve", str(folder), "--port", "0", "--json", "--max-prompt-tokens", "128", "--quiet"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LLMCOMPRESS_API_KEY": KEY}
    )
    assert process.stdout is not None
    lines = [""]
    while lines[-1] != "}":
        line = process.stdout.readline()
        if not line:
            verdict(False, f"the server ended with {process.wait()}")
        lines.append(line.rstrip("\n"))
    return process, str(json.loads("\n".join(lines))["url"])


async def stream(client: Any, member: str, prompt: str) -> tuple[str, str | None]:
    """Text and reason of one streamed completion."""
    return await read(await begin(client, member, prompt))


async def begin(client: Any, member: str, prompt: str) -> Any:
    """A completion that the server has accepted, its stream unread."""
    return await client.completions.create(model=member, prompt=prompt, max_tokens=NEW, temperature=0, stream=True)


async def read(chunks: Any) -> tuple[str, str | None]:
    """The rest of a stream."""
    text, reason = "", None
    async for chunk in chunks:
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


async def good_client(number: int, client: Any, wanted: dict[tuple[str, str], str], seen: Seen, until: float) -> None:
    """Stream after stream, each compared."""
    asked = list(wanted)
    turn = number
    while time.monotonic() < until:
        member, prompt = asked[turn % len(asked)]
        turn += CLIENTS + 1
        try:
            text, reason = await stream(client, member, prompt)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        seen.streams += 1
        if text != wanted[member, prompt] or reason not in ("stop", "length"):
            seen.wrong.append(f"{member}: {text[:40]!r} for {wanted[member, prompt][:40]!r}")


async def raw(url: str, body: bytes, key: str | None = KEY) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send one POST to ``/completions``."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()
    return reader, writer


def ask(**changes: Any) -> bytes:
    return json.dumps({"model": MEMBERS[0], "prompt": "Once", "max_tokens": NEW, "temperature": 0, **changes}).encode()


BAD: list[tuple[str, bytes, str | None, int]] = [
    ("oversized prompt", ask(prompt="word " * 1000), KEY, 400),
    ("oversized body", ask(prompt="x" * (2 << 20)), KEY, 413),
    ("bad JSON", b'{"model": ', KEY, 400),
    ("wrong member", ask(model="nobody"), KEY, 404),
    ("missing key", ask(), None, 401),
    ("wrong key", ask(), "no-such-key-here", 401),
    ("unknown argument", ask(frobnicate=1), KEY, 400),
]


async def bad_clients(url: str, seen: Seen, until: float) -> None:
    """Each kind in turn, and one that vanishes after the first bytes of its stream."""
    draws = random.Random(0)
    while time.monotonic() < until:
        for name, body, key, status in BAD:
            try:
                reader, writer = await raw(url, body, key)
                line = (await asyncio.wait_for(reader.readline(), 30)).decode()
                writer.close()
                got = int(line.split()[1])
                seen.statuses[name if got == status else f"{name} got {got}"] += 1
            except (OSError, IndexError, TimeoutError) as error:
                # a server may close on a body that it does not read; the status must still have come
                seen.statuses[f"{name} got {type(error).__name__}"] += 1
        reader, writer = await raw(url, ask(stream=True, n=4, max_tokens=400, temperature=1))
        await reader.read(draws.randrange(1, 2000))
        writer.transport.abort()
        seen.statuses["vanished"] += 1
        await asyncio.sleep(1)


async def slow_reader(url: str, seen: Seen, until: float) -> None:
    """Takes a few bytes twice a second; its answer must still be whole."""
    while time.monotonic() < until:
        reader, writer = await raw(url, ask(stream=True, max_tokens=100))
        text = b""
        while part := await reader.read(700):
            text += part
            await asyncio.sleep(0.5)
        writer.close()
        seen.statuses["slow reader" if b"data: [DONE]" in text else "slow reader lost its end"] += 1


async def watch(process: psutil.Process, seen: Seen, began: float, until: float) -> None:
    while time.monotonic() < until:
        seen.memory.append((time.monotonic() - began, process.memory_info().rss))
        await asyncio.sleep(1)


async def load(url: str, pid: int, wanted: dict[tuple[str, str], str], seen: Seen) -> None:
    """Two minutes of everything."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
        began = time.monotonic()
        until = began + SECONDS
        good = [good_client(i, client, wanted, seen, until) for i in range(CLIENTS)]
        rest = [bad_clients(url, seen, until), slow_reader(url, seen, until)]
        await asyncio.gather(*good, *rest, watch(psutil.Process(pid), seen, began, until))


async def drained(url: str, process: subprocess.Popen[str], wanted: dict[tuple[str, str], str]) -> tuple[int, int]:
    """SIGTERM in the middle of streams: (complete streams, exit code)."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        asked = list(wanted)[:8]
        # a request that arrives after the signal is refused, so all must be under way before it
        streams = await asyncio.gather(*(begin(client, *pair) for pair in asked))
        process.send_signal(signal.SIGTERM)
        found = await asyncio.gather(*map(read, streams), return_exceptions=True)
    whole = sum(isinstance(f, tuple) and f[0] == wanted[pair] for f, pair in zip(found, asked))
    return whole, await asyncio.to_thread(process.wait, 60)


def metric(url: str, name: str) -> float:
    import urllib.request

    request = urllib.request.Request(url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llmcompress_{name}"))


def main() -> None:
    need_models()
    seen = Seen()
    with tempfile.TemporaryDirectory() as temporary:
        folder = artifact(Path(temporary))
        wanted = expected(folder)
        process, url = start(folder)
        try:
            asyncio.run(load(url, process.pid, wanted, seen))
            time.sleep(2)
            tokens = metric(url, "generated_tokens_total")
            left = metric(url, "running_sequences") + metric(url, "waiting_sequences") + metric(url, "cache_bytes")
            whole, code = asyncio.run(drained(url, process, wanted))
        finally:
            process.kill()
    warm = [rss for at, rss in seen.memory if at < WARM]
    late = [rss for at, rss in seen.memory if at >= WARM]
    unexpected = sorted(name for name in seen.statuses if "got" in name or "lost" in name)
    for name, count in sorted(seen.statuses.items()):
        print(f"{name}: {count}")
    print("\n".join([*seen.errors[:5], *seen.wrong[:5]]))
    conditions = {
        "no error": not seen.errors,
        "no wrong or lost token": not seen.wrong and seen.streams >= CLIENTS,
        "statuses": not unexpected and {name for name, *_ in BAD} <= set(seen.statuses),
        "slow readers are served": seen.statuses["slow reader"] > 0,
        "vanished clients leave nothing": left == 0,
        "bounded memory": max(late) <= max(warm) + GROWTH,
        "SIGTERM drains": whole == 8 and code == 0,
    }
    failed = [name for name, holds in conditions.items() if not holds]
    verdict(
        not failed,
        f"{CLIENTS} clients, {SECONDS:.0f} s: {seen.streams} streams, {tokens:.0f} tokens, {len(seen.errors)} errors, "
        f"{len(seen.wrong)} wrong texts; resident at most {max(warm) / 1e6:.0f} MB in the first {WARM:.0f} s, "
        f"{max(late) / 1e6:.0f} MB after; drain: {whole} of 8 streams whole, exit {code}; "
        f"short of: {failed or 'nothing'}",
    )


if __name__ == "__main__":
    main()
