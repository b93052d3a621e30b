"""Speed of llama.cpp, measured on request: a process of another environment, which has llama-cpp-python.

    PYTHON llamacpp_worker.py FILE.gguf THREADS POSITIONS SEQUENCES [plain]

Reads one JSON request per line, ``{"phase": "prefill" | "decode", "context": C, "batch": B, "steps": S}``, does it
and answers with the seconds it took. Low-level API, no sampling, no text. A context that was filled once stays:
what a request appends is removed again. ``plain`` leaves out repacked and AMX weight buffers. This file imports
nothing of this project, because the other environment does not have it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any


class Worker:
    """A model in llama.cpp.

    Args:
        path: The GGUF file.
        threads: Threads of every phase.
        positions: Tokens that one sequence may reach.
        sequences: Decoded together, at most.
        plain: See above.
    """

    def __init__(self, path: str, threads: int, positions: int, sequences: int, plain: bool) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = not plain
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            sys.exit(f"{path}: llama.cpp cannot load it")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = positions * sequences, 512, 512
        context.n_threads = context.n_threads_batch = threads
        context.n_seq_max, context.kv_unified = sequences, True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(512, 0, sequences)
        self.held = (0, 0)

    def feed(self, tokens: list[int], positions: list[int], sequences: list[int]) -> None:
        """Run one batch; logits of the last token of each sequence."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = int(i + 1 == len(tokens) or sequences[i + 1] != sequences[i])
        if self.api.llama_decode(self.context, batch) != 0:
            sys.exit("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def prompt(self, length: int, sequence: int) -> None:
        """Fill a sequence."""
        for first in range(0, length, 512):
            count = min(512, length - first)
            tokens = [(i * 7919) % 20000 + 100 for i in range(first, first + count)]
            self.feed(tokens, list(range(first, first + count)), [sequence] * count)

    def run(self, phase: str, context: int, batch: int, steps: int) -> float:
        """Seconds of one request."""
        clear = self.api.llama_memory_clear
        if phase == "prefill":
            clear(self.memory, True)
            self.held = (0, 0)
            began = time.perf_counter()
            self.prompt(context, 0)
            return time.perf_counter() - began
        if self.held != (context, batch):
            clear(self.memory, True)
            for sequence in range(batch):
                self.prompt(context, sequence)
            self.held = (context, batch)
        sequences = list(range(batch))
        began = time.perf_counter()
        for step in range(steps):
            self.feed([200 + step + s for s in sequences], [context + step] * batch, sequences)
        seconds = time.perf_counter() - began
        for sequence in sequences:
            self.api.llama_memory_seq_rm(self.memory, sequence, context, -1)
        return seconds


def quantize(source: str, target: str, kind: str) -> None:
    """Write ``target`` in another type (``Q2_K``, ``Q4_0``), by llama.cpp's own quantizer."""
    import llama_cpp

    api: Any = llama_cpp
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)) != 0:
        sys.exit(f"{source}: llama.cpp cannot quantize it to {kind}")


def main() -> None:
    """Serve requests until standard input ends."""
    if sys.argv[1] == "--quantize":
        return quantize(*sys.argv[2:5])
    threads, positions, sequences = (int(x) for x in sys.argv[2:5])
    worker = Worker(sys.argv[1], threads, positions, sequences, "plain" in sys.argv[5:])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(f"{worker.run(**json.loads(line))}\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    main()
