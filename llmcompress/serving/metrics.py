"""Counters and times for Prometheus, in a registry of their own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Everything is named ``llmcompress_…``; label values are names of served models and fixed words only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "llmcompress"}
        self._requests = Counter("requests", "Requests by endpoint and status", ("endpoint", "status"), **own)
        self._seconds = Histogram("request_seconds", "Whole requests", ("endpoint",), buckets=_SECONDS, **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", ("model",), **own)
        self._reused = Counter("reused_prompt_tokens", "Those that were held already", ("model",), **own)
        self._written = Counter("generated_tokens", "Tokens written", ("model",), **own)
        self._errors = Counter("failed_sequences", "Answers that ended with an error", ("model",), **own)
        self._first = Histogram("first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **own)
        self._step_seconds = Histogram("step_seconds", "Steps of a batch", buckets=_SECONDS, **own)
        self._step_rows = Histogram("step_rows", "Sequences of a step", buckets=_ROWS, **own)
        self._waiting = Gauge("waiting_sequences", "Answers that wait for a place", **own)
        self._running = Gauge("running_sequences", "Answers that decode", **own)
        self._reserved = Gauge("reserved_tokens", "Tokens that running answers may reach", **own)
        self._cache = Gauge("cache_bytes", "Bytes of keys, values and states", **own)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_token(self, model: str, prompt: int, reused: int, seconds: float) -> None:
        """A prompt has been read, but for those of its tokens that were held already."""
        self._prompt.labels(model).inc(prompt)
        self._reused.labels(model).inc(reused)
        self._first.observe(seconds)

    def token(self, model: str) -> None:
        """A token has been written."""
        self._written.labels(model).inc()

    def failed(self, model: str) -> None:
        """An answer has ended with an error."""
        self._errors.labels(model).inc()

    def step(self, rows: int, seconds: float) -> None:
        """A batch has taken a step."""
        self._step_seconds.observe(seconds)
        self._step_rows.observe(rows)

    def state(self, waiting: int, running: int, reserved: int, cache: int) -> None:
        """What is held now."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._reserved.set(reserved)
        self._cache.set(cache)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
