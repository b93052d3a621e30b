"""How fast a model reads and writes: native engine, transformers and llama.cpp, sample by sample in turn.

Speed does not depend on what the cache or the weights hold, so contexts of the native engine are declared and not
computed, and the dense twin of a packed model has random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompress_kernels import bench
from llmcompress_kernels.build import BuildError

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import InputError
from llmcompress.inference import llamacpp_worker
from llmcompress.inference.caches import arguments, prompt_cache
from llmcompress.inference.native import NativeEngine
from llmcompress.models.layout import Role
from llmcompress.models.orientation import canonical
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.swap import swap_modules
from llmcompress.quant.codecs import codec
from llmcompress.quant.codecs.int_group import SCALE
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

PEER_VARIABLE = "LLMCOMPRESS_PEER_LLAMACPP"


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        phase: ``prefill`` reads ``context`` tokens; ``decode`` writes ``steps`` tokens after them.
        context: Tokens.
        batch: Sequences; 1 for ``prefill``.
        steps: Tokens of each sequence in one sample; 1 for ``prefill``.
    """

    phase: Literal["prefill", "decode"]
    context: int
    batch: int = 1
    steps: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.context if self.phase == "prefill" else self.batch * self.steps

    @property
    def name(self) -> str:
        """Name for tables."""
        return f"prefill {self.context}" if self.phase == "prefill" else f"decode at {self.context}, batch {self.batch}"


# makes the function that runs one sample of a case
Candidate = Callable[[Case], Callable[[], Any]]


def native(engine: NativeEngine) -> Candidate:
    """The native engine; its cache has to hold every context and its steps."""

    def of(case: Case) -> Callable[[], Any]:
        engine.reserve(case.context + case.steps + 1, case.batch)
        ids = _ids(engine.vocabulary, case.context)
        tokens, slots = _ids(engine.vocabulary, case.batch), range(case.batch)

        def decode() -> None:
            engine.lengths = [case.context] * engine.slots
            best = tokens
            for _ in range(case.steps):
                best = engine.greedy(best, slots)

        return decode if case.phase == "decode" else lambda: engine.prompt(0, ids.tolist())

    return of


def transformers(model: Any) -> Candidate:
    """Transformers' own forward with a cache, greedy."""

    def of(case: Case) -> Callable[[], Any]:
        vocabulary = int(model.config.get_text_config().vocab_size)
        ids = _ids(vocabulary, case.context).expand(case.batch, -1).to(model.device)

        positions = torch.arange(case.context, device=model.device).expand(case.batch, -1)

        @torch.inference_mode()
        def prefill(**cache: Any) -> Any:
            return model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)

        held: list[Any] = []

        @torch.inference_mode()
        def decode() -> None:
            if not held:
                held.append(prompt_cache(model))
                prefill(**arguments(model, held[0], positions))
            word = ids[:, -1:]
            for step in range(case.steps):
                at = positions[:, -1:] + 1 + step
                out = model(input_ids=word, use_cache=True, **arguments(model, held[0], at))
                word = out.logits[:, -1:].argmax(-1)
            # a state stands where it is: that costs the next sample as much
            for layer in held[0].layers:
                if not hasattr(layer, "recurrent_states") and layer.get_seq_length():
                    layer.crop(-case.steps)

        return prefill if case.phase == "prefill" else decode

    return of


class LlamaCpp:
    """llama.cpp in a process of its own environment.

    Args:
        gguf: The model.
        threads: Threads of every phase.
        positions: Tokens that one sequence may reach.
        sequences: Decoded together, at most.
        plain: Without repacked and AMX weight buffers, which crash on some machines.

    Raises:
        InputError: The environment names no interpreter, or llama.cpp does not start with the file.
    """

    def __init__(self, gguf: Path, threads: int, positions: int, sequences: int = 8, plain: bool = False) -> None:
        python = peer()
        if python is None:
            raise InputError(
                f"{PEER_VARIABLE} names no Python interpreter",
                f"install llama-cpp-python into an environment of its own and set {PEER_VARIABLE} to its python",
            )
        command = [python, llamacpp_worker.__file__, str(gguf), *map(str, (threads, positions, sequences))]
        self._process = subprocess.Popen(
            [*command, *(["plain"] if plain else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._name = str(gguf)
        self._answer("ready")

    def __call__(self, case: Case) -> Callable[[], Any]:
        """See :data:`Candidate`."""
        request = json.dumps({"phase": case.phase, "context": case.context, "batch": case.batch, "steps": case.steps})

        def run() -> None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(request + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass
            self._answer()

        return run

    def _answer(self, expected: str | None = None) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            code = self._process.wait()
            raise InputError(f"{self._name}: llama.cpp ended with exit code {code}", "try it with plain buffers")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def peer() -> str | None:
    """Python interpreter of the environment that holds llama-cpp-python, if the environment variable names one."""
    return os.environ.get(PEER_VARIABLE) or None


def quantize_gguf(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF in another type by llama.cpp's quantizer.

    Raises:
        InputError: It fails.
    """
    command = [peer() or sys.executable, llamacpp_worker.__file__, "--quantize", str(source), str(target), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(f"{source}: not quantized to {kind}: {done.stderr.strip()[-300:]}")


def dense_twin(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A dense model of the same shape with random weights, for speed only."""
    kept = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    return random_model(type(model.config).from_dict(kept), dtype)


def random_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A dense model of a config's sizes for speed only: a million random numbers, used again and again."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(len(drawn)):
                part.copy_(drawn[: len(part)])
    model.tie_weights()
    return model.eval()


def random_packed(config: Any, spec: QuantSpec, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A packed model of a config's sizes for speed only: random codes, spread about as those of trained weights."""
    model = random_model(config, dtype)
    layout = layout_from_config(model.config.to_dict())
    swap_modules(model, layout, {name: spec for name, *_ in layout.quantizable()}, model.dtype)
    with torch.no_grad():
        for module in (module for module in model.modules() if isinstance(module, PackedTensors)):
            for name, tensor in module._buffers.items():
                # any word holds valid codes or zero points
                if tensor is not None and tensor.dtype == torch.int32:
                    tensor.random_(-(2**31), 2**31 - 1)
                elif tensor is not None and name == SCALE:
                    tensor.fill_(3.5 * module.shape[-1] ** -0.5 / (1 << spec.bits))
                elif tensor is not None:
                    tensor.fill_(module.shape[-1] ** -0.5)
    return model.eval()


def dense_experts() -> Any:
    """Transformers' experts in bfloat16 with random weights, sized and called as the block of ``bench.bench_moe``."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = bench.moe
    config = MixtralConfig(
        hidden_size=sizes.HIDDEN,
        intermediate_size=sizes.INTERMEDIATE,
        num_local_experts=sizes.EXPERTS,
        num_experts_per_tok=sizes.SLOTS,
    )
    config._experts_implementation = "grouped_mm"
    experts: Any = MixtralSparseMoeBlock(config).bfloat16().eval().experts
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.02)
    return experts


def rounded(model: Any, spec: QuantSpec, experts: QuantSpec | None = None) -> Any:
    """Pack every quantizable weight of a dense model in place, rounded to nearest: for speed and tests, not for use.

    Args:
        model: A dense causal language model.
        spec: Spec of every linear.
        experts: Spec of stacked experts; ``spec`` if None.
    """
    layout = layout_from_config(model.config.to_dict())
    parameters = dict(model.named_parameters())
    packed: dict[str, PackedWeight] = {}
    banks = layout.banks
    for name, role, *_ in layout.quantizable():
        values = parameters[name if name in parameters else f"{name}.weight"].detach().float()
        if name in banks:
            values = canonical(banks[name], name, values)
        own = experts if experts is not None and role is Role.EXPERTS else spec
        scale, zero = find_grid(values, own, "minmax")
        packed[name] = codec(own.codec).encode(round_codes(values, scale, zero, own), scale, zero, own)
    # of linears, and in the family's own order of experts
    owners = {f"{name}.bias": name for name in packed} | {f"{name}_bias": name.rpartition(".")[0] for name in banks}
    biases = {name: parameters[name] for name in owners if parameters.get(name) is not None}
    swap_modules(model, layout, {name: weight.spec for name, weight in packed.items()}, model.dtype)
    for name, weight in packed.items():
        for key, tensor in weight.tensors.items():
            setattr(model.get_submodule(name), key, tensor)
    for name, bias in biases.items():
        setattr(model.get_submodule(owners[name]), name.rpartition(".")[2], bias)
    return model.eval()


def measure(
    candidates: Mapping[str, Candidate], cases: list[Case], rounds: int, budget: float, threads: int
) -> list[dict[str, Any]]:
    """Time every candidate in every case.

    Args:
        candidates: By name.
        cases: What.
        rounds: Samples of each that are to count.
        budget: Seconds per case after which what there is counts.
        threads: For the probe of the memory's bandwidth, which is taken among the candidates.

    Returns:
        A row per case and candidate: ``case``, ``candidate``, ``tokens_per_second`` (median), ``best``, ``seconds``
        per sample, ``clean`` of ``total`` samples, ``bandwidth`` bytes per second or None.
    """
    rows = []
    for case in cases:
        functions = {name: candidate(case) for name, candidate in candidates.items()}
        probes = _probes(threads)
        timings = bench.interleave({**functions, **probes}, rounds=rounds, budget=budget, warm=1)
        bandwidth = bench.read_bandwidth(timings) if probes else None
        for name in functions:
            timing = timings[name]
            rows.append(
                {
                    "case": case.name, "phase": case.phase, "context": case.context, "batch": case.batch,
                    "candidate": name, "tokens_per_second": case.tokens / timing.median,
                    "best": case.tokens / timing.best, "seconds": timing.median, "clean": timing.clean,
                    "total": timing.total, "bandwidth": bandwidth,
                }
            )  # fmt: skip
    return rows


def _probes(threads: int) -> dict[str, Callable[[], Any]]:
    try:
        return bench.bandwidth_probes(threads)
    except BuildError:
        return {}


def _ids(vocabulary: int, count: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(0))
