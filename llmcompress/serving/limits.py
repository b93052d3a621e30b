"""What the server takes in at most. Torch-free: the command line reads the defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of requests and of memory; a request beyond one gets an error, never a crash.

    Attributes:
        rows: Sequences that decode together.
        queue: Sequences that wait for a place; the next one gets status 429.
        cache_tokens: Prompt and new tokens of all sequences that decode, which bounds the key-value cache.
        prompt_chunk: Tokens of prompts that are read between two steps, where they can be read in parts: the larger,
            the longer running answers pause for a prompt, and the sooner it is read.
        prefix_caching: Whether a prompt begins with what other sequences hold or have left of the same tokens. Whoever
            has the key can then tell by the time whether somebody has asked a prompt: all are one tenant.
        snapshot_bytes: Bytes of what models with states keep of prompts for that, for all sequences together.
        prompt_tokens: Tokens of one prompt.
        new_tokens: Tokens of one answer.
        default_new_tokens: Tokens of a chat answer whose request and model name no number, where there is so much room.
        choices: Answers of one request: prompts times ``n``.
        body_bytes: Bytes of one request.
        connections: Open at once; the next one gets status 503.
        read_seconds: How long a client may take to send the head of a request, and how long then for its body, before
            it gets status 408.
        write_seconds: How long a reader may take no bytes before its connection is closed.
        drain_seconds: How long running answers may take after SIGTERM.
    """

    rows: int = 64
    queue: int = 256
    cache_tokens: int = 65536
    prompt_chunk: int = 32
    prefix_caching: bool = True
    snapshot_bytes: int = 1 << 30
    prompt_tokens: int = 8192
    new_tokens: int = 4096
    default_new_tokens: int = 2048
    choices: int = 16
    body_bytes: int = 1 << 20
    connections: int = 512
    read_seconds: float = 60.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
