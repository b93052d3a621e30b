#!/usr/bin/env python3
"""What running answers and second turns wait for in the server's scheduler, on the native engine.

1. A few answers are being written when a long prompt comes. Shown by `--chunks` (tokens of a prompt that are read
   between two steps; 0 reads it whole): the median pause between two tokens of a running answer before the prompt came,
   the longest one while it was read, and how long the prompt waited for its own first token.
2. A conversation: the time to the first token of a first turn of as many tokens, and of the second, which is the first
   with its answer and a short question, without and with prefix caching.

The model has SmolLM2-135M's shape, random weights and `--bits` bits, unless `--model` names one: speed does not depend
on what weights hold. Nothing of HTTP or tokenizers is in the figures.

    python scripts/measure_serving.py [--model FOLDER] [--prompt 2000] [--streams 4] [--chunks 0 128 64 32]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from llmcompress.inference.generate import Sampling
from llmcompress.inference.speed import rounded
from llmcompress.quant.spec import QuantSpec
from llmcompress.recipe.lock import hardware
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.rows import NativeRows
from llmcompress.serving.scheduler import Group, Job, Piece, Scheduler

# tokens that running answers have written when the prompt comes, and those of an answer of the conversation
WARM, ANSWER, QUESTION = 40, 64, 20


class Text:
    """A token is a sign: what a tokenizer takes is not measured."""

    stopped = False

    def put(self, token: int) -> str:
        """One sign."""
        return "."

    def end(self) -> str:
        """Nothing is held back."""
        return ""


class Heard:
    """When the tokens of an answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.asked = time.perf_counter()
        self.ended = False
        self.error: str | None = None

    def take(self, piece: Piece) -> None:
        """One more piece, on the scheduler's thread."""
        self.error = piece.error
        self.times.append(time.perf_counter())
        self.tokens += [choice.token for choice in piece.choices]
        self.ended = piece.reason is not None or piece.error is not None

    def wait(self, count: int | None = None) -> None:
        """Until this many tokens are there, or the last."""
        while not self.ended and (count is None or len(self.times) < count):
            time.sleep(0.001)
        if self.error is not None:
            raise RuntimeError(self.error)


def model_of(path: str | None, bits: int) -> Any:
    """A checkpoint, or random weights in SmolLM2-135M's shape."""
    if path is not None:
        from llmcompress.hf import load

        return load(path)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return rounded(LlamaForCausalLM(config).eval(), QuantSpec(bits, 64, symmetric=False))


class Bench:
    """One model behind schedulers with limits of their own."""

    def __init__(self, model: Any, prompt: int, streams: int) -> None:
        from llmcompress.inference.native import open_engine

        self.streams, self.longest = streams, prompt + 2 * ANSWER + 1024
        self.engine = open_engine(model, streams + 1, self.longest)
        draws = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(3, self.engine.vocabulary, (prompt + streams,), generator=draws).tolist()

    def scheduler(self, **limits: Any) -> Scheduler:
        """A server's; call its ``stop``."""
        bounds = Limits(cache_tokens=(self.streams + 1) * self.longest, **limits)
        rows = NativeRows(self.engine, self.streams + 1, self.longest, bounds.prefix_caching)
        return Scheduler([Group(rows, {"m": None})], bounds, Metrics())

    def ask(self, scheduler: Scheduler, prompt: Sequence[int], tokens: int) -> tuple[Job, Heard]:
        """Queue one greedy answer."""
        heard, text = Heard(), Text()
        stream: Any = text
        job = Job("m", list(prompt), Sampling(tokens), (), stream, heard.take, logprobs=0)
        scheduler.submit([job])
        return job, heard

    def beside(self, chunk: int) -> tuple[float, float, float]:
        """Seconds: the usual pause, the longest one beside the prompt, and the prompt's wait for its first token."""
        scheduler = self.scheduler(prompt_chunk=chunk or len(self.prompt), prefix_caching=False)
        try:
            running = [self.ask(scheduler, self.prompt[i : i + 8], 1000) for i in range(self.streams)]
            for _, heard in running:
                heard.wait(WARM)
            _, heard = self.ask(scheduler, self.prompt[self.streams :], 8)
            heard.wait(4)
            scheduler.cancel([job for job, _ in running])
            heard.wait()
        finally:
            scheduler.stop()
        usual, longest = [], []
        for _, other in running:
            pauses = list(zip(other.times[1:], (b - a for a, b in zip(other.times, other.times[1:]))))
            usual += [pause for at, pause in pauses[8:] if at < heard.asked]
            longest.append(max(pause for at, pause in pauses if heard.asked < at))
        return statistics.median(usual), max(longest), heard.times[0] - heard.asked

    def turns(self, caching: bool) -> tuple[float, float, int]:
        """Seconds to the first token of both turns, and the tokens of the second's prompt that were held."""
        scheduler = self.scheduler(prefix_caching=caching)
        try:
            prompt = self.prompt[self.streams :]
            _, first = self.ask(scheduler, prompt, ANSWER)
            first.wait()
            job, second = self.ask(scheduler, [*prompt, *first.tokens, *self.prompt[:QUESTION]], 4)
            second.wait()
        finally:
            scheduler.stop()
        return first.times[0] - first.asked, second.times[0] - second.asked, job.reused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; random weights by default")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 128, 64, 32])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    bench = Bench(model_of(given.model, given.bits), given.prompt, given.streams)
    threads = torch.get_num_threads()
    print(f"{hardware()['cpu']}, threads: {threads}; {given.streams} answers, a prompt of {given.prompt} tokens")
    for chunk in given.chunks:
        found = [bench.beside(chunk) for _ in range(given.repeats)]
        usual, longest, first = (1e3 * statistics.median(column) for column in zip(*found))
        print(
            f"chunk {chunk or 'whole'}: pause {usual:.1f} ms, longest {longest:.0f} ms, prompt read in {first:.0f} ms"
        )
    for caching in (False, True):
        turns = [bench.turns(caching) for _ in range(given.repeats)]
        first, second, held = (statistics.median(column) for column in zip(*turns))
        word = "with" if caching else "without"
        print(f"{word} prefix caching: first turn {1e3 * first:.0f} ms, second {1e3 * second:.0f} ms, {held:.0f} held")


if __name__ == "__main__":
    main()
