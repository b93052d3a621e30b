"""A whole decode step and a whole prompt of a Mamba2-2.7B on a GPU, with packed weights beside bf16 ones.

A step has 4-bit weights and states, beside bf16 weights and fp16 states; a prompt 8-bit weights and activations.

Random weights, true shapes, all 64 layers and the head (bf16 in both) in one CUDA graph. Both sides share every launch
that is neither a projection nor the update of the state. Within a replay window a graph has all of its tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from gpu_matrix import nbytes, packed
from gpu_state import HEADS, WINDOWS, N, P, empty_window, traffic
from gpu_timing import replay
from llmcompress_kernels import ops, state
from llmcompress_kernels.cuda import state as cuda_state
from llmcompress_kernels.triton import int8_gemm, mixer

LAYERS, HIDDEN, VOCABULARY, WIDTH = 64, 2560, 50288, 4
INNER = HEADS * P
CHANNELS = INNER + 2 * N
ROWS = INNER + CHANNELS + HEADS
# rows and columns of a layer's projections
SHAPES = ((ROWS, HIDDEN), (HIDDEN, INNER))
SAMPLES = 12
# whether steps whose launches overlap are timed as well: candidates, on compute capability 9.0 only
EARLY = False
# runs of a forward that no graph can hold
RUNS = 5


class Model:
    """Operands of every layer for ``batch`` sequences.

    Args:
        batch: Sequences.
    """

    def __init__(self, batch: int) -> None:
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02  # noqa: E731
        self.wide = [(draw(ROWS, HIDDEN), draw(HIDDEN, INNER)) for _ in range(LAYERS)]
        self.narrow = [(packed(ROWS, HIDDEN, bits=4), packed(HIDDEN, INNER, bits=4)) for _ in range(LAYERS)]
        self.head, self.norm = draw(VOCABULARY, HIDDEN), torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.x = draw(batch, HIDDEN)
        self.conv = [draw(batch, CHANNELS, WIDTH) for _ in range(LAYERS)]
        fp32 = lambda *shape: torch.rand(*shape, device="cuda")  # noqa: E731
        gain = torch.ones(INNER, device="cuda")
        self.weights = (draw(CHANNELS, WIDTH), draw(CHANNELS), fp32(HEADS) - 4, -fp32(HEADS), fp32(HEADS), gain)
        first = torch.randn(batch, HEADS, P, N, device="cuda", dtype=torch.float16)
        self.floats = [first.clone() for _ in range(LAYERS)]
        one = state.dsq_pack(first.float(), None, 4)
        self.codes = [tuple(t.clone() for t in one) for _ in range(LAYERS)]
        self.windows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def bytes(self, window: int = 1) -> float:
        """What a 4-bit step has to move, on average over a window: weights and head, convolutions, states."""
        weights = sum(nbytes(stack) for pair in self.narrow for stack in pair) + self.head.nbytes
        return weights + 2 * sum(held.nbytes for held in self.conv) + LAYERS * traffic(len(self.x), 4, window)

    def keep(self, tokens: int) -> None:
        """Begin windows of so many tokens, in place of earlier ones."""
        self.windows = []  # before there is room for the next
        self.windows = [empty_window(len(self.x), tokens) for _ in range(LAYERS)]

    def step(
        self, narrow_weights: bool, narrow_states: bool, window: bool = False, early: bool = False
    ) -> torch.Tensor:
        """Logits of one token of every sequence; ``early``: launches of mixers overlap those in front of them."""
        residual = self.x
        for layer in range(LAYERS):
            x = torch.nn.functional.rms_norm(residual, (HIDDEN,), self.norm, 1e-5)
            projected = self._project(layer, 0, x, narrow_weights)
            update = self._update(layer, narrow_states, window, early)
            mixed = mixer.mamba2_decode(projected, self.conv[layer], self.weights, 1, N, 1e-5, update, early)
            residual = residual + self._project(layer, 1, mixed, narrow_weights)
        return torch.nn.functional.linear(torch.nn.functional.rms_norm(residual, (HIDDEN,), self.norm, 1e-5), self.head)

    def _project(self, layer: int, side: int, x: torch.Tensor, narrow: bool) -> torch.Tensor:
        if not narrow:
            return torch.nn.functional.linear(x, self.wide[layer][side])
        w = self.narrow[layer][side]
        assert w.scale is not None
        return ops.group_gemm(x, w.weight, w.scale, w.zero, w.bits, w.group_size, x.shape[-1])

    def _update(self, layer: int, narrow: bool, window: bool, early: bool = False) -> Callable[..., torch.Tensor]:
        if not narrow:
            return lambda *step: mixer.state_update(self.floats[layer], *step)
        codes, channel, scale = self.codes[layer]
        kernels: Any = cuda_state if early else state
        how = {"dither": True, **({"overlap": True} if early else {})}
        if window:
            held = (codes, channel, scale, None, *self.windows[layer])
            return lambda *step: kernels.dsq_replay_update(*held, *step, 4, **how)
        return lambda *step: kernels.dsq_state_update(codes, channel, scale, None, *step, 4, **how)


def step(batch: int, rate: float) -> dict[str, Any]:
    """Microseconds of one step of ``batch`` sequences, and the share of the byte floor at ``rate`` bytes a second."""
    with torch.inference_mode():
        model = Model(batch)
        kinds = {"w16s16": (False, False), "w4s16": (True, False), "w16s4": (False, True), "w4s4": (True, True)}
        calls = {name: [lambda k=kind: model.step(*k)] for name, kind in kinds.items()}
        if EARLY:
            calls["w4s4_early"] = [lambda: model.step(True, True, early=True)]
        times = replay(calls, SAMPLES)
        for tokens in WINDOWS:
            model.keep(tokens)
            calls = {f"w4s4_w{tokens}": [lambda: model.step(True, True, True)] * tokens}
            if tokens == WINDOWS[0] and EARLY:
                calls[f"w4s4_w{tokens}_early"] = [lambda: model.step(True, True, True, True)] * tokens
            times |= replay(calls, SAMPLES)
        floors = {tokens: model.bytes(tokens) / rate * 1e6 for tokens in (1, *WINDOWS)}
    found: dict[str, Any] = {"op": "mamba2-2.7b step", "batch": batch, "floor_us": round(floors[1], 1)}
    found |= {f"{name}_us": round(each.median, 1) for name, each in times.items()}
    for tokens, floor in floors.items():
        end = "" if tokens == 1 else f"_w{tokens}"
        took = times[f"w4s4{end}"].median
        found[f"floor_share{end}"] = round(floor / took, 3)
        found[f"over_w16s16{end}"] = round(times["w16s16"].median / took, 3)
    return found


def parts(batch: int, rate: float) -> dict[str, Any]:
    """Microseconds a layer of what a step is made of, each alone in a graph of all layers."""
    del rate  # no floor: these say where time goes, and what they leave of a step is between them
    with torch.inference_mode():
        model = Model(batch)
        projected = torch.randn(batch, ROWS, device="cuda", dtype=torch.bfloat16)
        mixed, y = model.x.new_zeros(batch, INNER), torch.zeros(batch, HEADS, P, device="cuda")
        drive, decay = torch.randn_like(y), torch.rand(batch, HEADS, device="cuda")
        b, c = torch.randn(batch, 1, N, device="cuda"), torch.randn(batch, 1, N, device="cuda")

        def around(layer: int) -> torch.Tensor:
            return mixer.mamba2_decode(projected, model.conv[layer], model.weights, 1, N, 1e-5, lambda *_: y)

        calls: dict[str, Callable[[int], object]] = {
            "norm": lambda _: torch.nn.functional.rms_norm(model.x, (HIDDEN,), model.norm, 1e-5),
            "add": lambda _: model.x + model.x,
            "around the state": around,
        }
        for kind, narrow in (("w16", False), ("w4", True)):
            calls[f"in {kind}"] = lambda layer, n=narrow: model._project(layer, 0, model.x, n)
            calls[f"out {kind}"] = lambda layer, n=narrow: model._project(layer, 1, mixed, n)
        for kind, narrow in (("s16", False), ("s4", True)):
            calls[f"state {kind}"] = lambda layer, n=narrow: model._update(layer, n, False)(drive, decay, b, c)
        times = replay({name: [lambda f=call: [f(i) for i in range(LAYERS)]] for name, call in calls.items()}, SAMPLES)
    found = {name: round(each.median / LAYERS, 2) for name, each in times.items()}
    return {"op": "mamba2-2.7b parts of a step", "batch": batch, "us_a_layer": found}


class Prompt:
    """Operands of every layer for a prompt of one sequence.

    Args:
        tokens: Its length.
    """

    def __init__(self, tokens: int) -> None:
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02  # noqa: E731
        self.wide = [(draw(ROWS, HIDDEN), draw(HIDDEN, INNER)) for _ in range(LAYERS)]
        self.bytes = [(_bytes(ROWS, HIDDEN), _bytes(HIDDEN, INNER)) for _ in range(LAYERS)]
        self.norm, self.x = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16), draw(1, tokens, HIDDEN)
        rates = -torch.rand(HEADS, device="cuda")
        gain = torch.ones(INNER, device="cuda", dtype=torch.bfloat16)
        self.weights = (draw(CHANNELS, WIDTH), draw(CHANNELS), draw(HEADS) - 4, rates, draw(HEADS), gain)
        self.state = torch.zeros(1, HEADS, P, N, device="cuda")

    def run(self, project: Callable[[int, int, torch.Tensor], torch.Tensor], layers: int = LAYERS) -> torch.Tensor:
        """Hidden states after the layers; ``project`` takes layer, side and inputs. States are packed at the end."""
        residual = self.x
        for layer in range(layers):
            x = torch.nn.functional.rms_norm(residual, (HIDDEN,), self.norm, 1e-5)
            projected = project(layer, 0, x)
            self.state.zero_()
            mixed = state.mamba2_prefill(
                projected[..., :-HEADS], projected[..., -HEADS:], None, *self.weights, self.state, 1,
                (0.0, float("inf")), 1e-5,
            )  # fmt: skip
            state.dsq_pack(self.state, None, 4, dither=True)
            residual = residual + project(layer, 1, mixed)
        return residual

    def bf16(self, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        """The product with bf16 weights."""
        return torch.nn.functional.linear(x, self.wide[layer][side])

    def chunked(self, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        """With 8-bit weights, and a scale per token and 64 columns of the activations: what the recipes make."""
        w = self.bytes[layer][side]
        assert w.scale is not None
        return ops.group_gemm(x, w.weight, w.scale, None, 8, x.shape[-1], x.shape[-1], int8=True)

    def per_token(self, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        """With one scale per token."""
        w = self.bytes[layer][side]
        assert w.scale is not None
        return int8_gemm.token_gemm(x, w.weight, w.scale, 8, x.shape[-1])


def _bytes(rows: int, columns: int) -> ops.Stack:
    """A weight of 8 bits per row, symmetric."""
    drawn = packed(rows, columns, bits=8, group=columns)
    return ops.Stack(drawn.weight, drawn.scale, None, None, 8, columns)


def prompt(tokens: int, rate: float) -> dict[str, Any]:
    """Milliseconds of a prompt of one sequence through all layers, without embedding and head."""
    del rate  # arithmetic bounds a prompt, not bytes
    with torch.inference_mode():
        model = Prompt(tokens)
        kinds = {"w16a16": model.bf16, "w8a8": model.chunked, "w8a8_token": model.per_token}
        times = replay({name: [lambda p=project: model.run(p)] for name, project in kinds.items()}, SAMPLES)
        parts = replay(
            {
                "projections_w16a16": [lambda: _projections(model, model.bf16)],
                "projections_w8a8": [lambda: _projections(model, model.chunked)],
                "projections_w8a8_token": [lambda: _projections(model, model.per_token)],
            },
            SAMPLES,
        )
        found: dict[str, Any] = {"op": "mamba2-2.7b prompt", "tokens": tokens}
        found |= {f"{name}_ms": round(each.median / 1e3, 3) for name, each in (times | parts).items()}
        for name in ("w8a8", "w8a8_token"):
            found[f"{name}_over_w16a16"] = round(times["w16a16"].median / times[name].median, 3)
        own = _milliseconds(lambda: model.run(model.bf16, 1))
        found |= {"one_layer_w16a16_ms": round(own, 3), **_transformers(model.x)}
    return found


def _projections(model: Prompt, project: Callable[[int, int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A layer's two products."""
    return project(0, 1, project(0, 0, model.x)[..., :INNER].contiguous())


def _transformers(x: torch.Tensor) -> dict[str, Any]:
    """One mixer of transformers in bf16, by mamba_ssm's kernels where they are installed; nothing without it."""
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2 import modeling_mamba2
    except ImportError:
        return {}
    config = Mamba2Config(
        num_heads=HEADS, head_dim=P, hidden_size=HIDDEN, state_size=N, n_groups=1, num_hidden_layers=1, expand=2
    )
    mixer_of = modeling_mamba2.Mamba2Mixer(config, layer_idx=0).to("cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = _milliseconds(lambda: mixer_of(x))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    name = "mamba_ssm" if find_spec("mamba_ssm") else "torch"
    return {f"one_layer_transformers_{name}_ms": round(took, 3), "transformers_peak_gb": round(peak, 2)}


def _milliseconds(call: Callable[[], object]) -> float:
    """Median of a few runs, launches included."""
    taken = []
    for _ in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken[1:])
