"""The native Mamba-2 model is, bit for bit, the chain of the operators that it is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu, mamba2
from llmcompress_kernels.matrix import Matrix, dense, packed
from llmcompress_kernels.reference.group_gemm import decode, interleave
from torch import Tensor

from llmcompress.algorithms import decoupled_scales as dsq
from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec

pytestmark = [
    pytest.mark.skipif(mamba2.unavailable() is not None, reason=f"no kernels: {mamba2.unavailable()}"),
    pytest.mark.usefixtures("state_kernels"),
]

HIDDEN, HEADS, VOCABULARY, LAYERS, EPSILON = 48, 4, 75, 2, 1e-5
OPERATORS = torch.ops.llmcompress


def folded_dot(x: Tensor, w: Tensor) -> Tensor:
    """Sums of products along the last axis: sixteen lanes one after the other, then halves of lanes."""
    products = (x * w).unflatten(-1, (-1, 16))
    total = products[..., 0, :]
    for i in range(1, products.shape[-2]):
        total = total + products[..., i, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    mean = folded_dot(x, x) / x.shape[-1]
    # torch's fp32 square root may be off by its last bit
    factor = 1 / (mean + EPSILON).double().sqrt().float()
    return weight * (x * factor.unsqueeze(-1))


class Packed:
    """A packed weight, as the operator and as the model want it."""

    def __init__(self, rows: int, columns: int, bits: int, int8: bool, bias: Tensor | None = None) -> None:
        spec = QuantSpec(bits, -1, symmetric=True)
        values = torch.randn(rows, columns) * columns**-0.5
        scale, zero = find_grid(values, spec, "minmax")
        tensors = codec(spec.codec).encode(round_codes(values, scale, zero, spec), scale, zero, spec).tensors
        self.words, self.scale = interleave(tensors["weight_packed"]), interleave(tensors["weight_scale"])
        self.sizes, self.int8, self.bias = (bits, spec.group(columns), columns), int8, bias
        self.matrix: Matrix = packed(self.words, self.scale, None, *self.sizes, bias, interleaved=True)

    def __call__(self, x: Tensor) -> Tensor:
        y = OPERATORS.group_gemm(x, self.words, self.scale, None, *self.sizes, self.int8)
        return y if self.bias is None else y + self.bias

    def row(self, tokens: Tensor) -> Tensor:
        bits, group, columns = self.sizes
        stored = (self.words[tokens // 16, :, tokens % 16], self.scale[tokens // 16, :, tokens % 16])
        return decode(*stored, None, bits, group, columns)


class Twin:
    """A random model, and its step and prompt as a chain of operators."""

    def __init__(
        self, weights: int = 8, bits: int = 4, groups: int = 1, size: tuple[int, int] = (16, 32), kind: str = "dsq",
        window: int = 1,
    ) -> None:  # fmt: skip
        torch.manual_seed(3)
        assert cpu.ready()
        self.groups, self.bits, self.how = groups, bits, (kind == "dsq_refit", kind == "dither")
        self.channels, self.states = channels, states = size
        self.inner = inner = HEADS * channels
        self.width = inner + 2 * groups * states
        self.embedding, self.head = Packed(80, HIDDEN, 8, False), Packed(80, HIDDEN, 8, False)
        self.layers, structs = [], []
        for _ in range(LAYERS):
            fixed = None
            if kind == "dsq_static_p":
                fixed = dsq.static_channel_scale(torch.rand(HEADS, channels) + 0.01)
            layer: dict[str, Any] = {
                "norm": 1 + 0.1 * torch.randn(HIDDEN),
                "in_proj": Packed(inner + self.width, HIDDEN, weights, True, torch.randn(inner + self.width) * 0.1),
                "times": torch.randn(HEADS, HIDDEN) * HIDDEN**-0.5,
                "times_bias": torch.randn(HEADS) * 0.1,
                "out_proj": Packed(HIDDEN, inner, weights, True),
                "conv_weight": torch.randn(self.width, 4) * 0.5, "conv_bias": torch.randn(self.width) * 0.1,
                "dt_bias": torch.randn(HEADS), "a": -torch.rand(HEADS) * 4, "d": torch.randn(HEADS),
                "gain": 1 + 0.1 * torch.randn(inner), "fixed": fixed,
            }  # fmt: skip
            self.layers.append(layer)
            kept = {k: layer[k] for k in ("norm", "conv_weight", "conv_bias", "dt_bias", "a", "d", "gain", "fixed")}
            structs.append(mamba2.Layer(
                in_proj=layer["in_proj"].matrix, dt_proj=dense(layer["times"], layer["times_bias"]),
                out_proj=layer["out_proj"].matrix, in_planes=1, out_planes=1, **kept,
            ))  # fmt: skip
        self.final = 1 + 0.1 * torch.randn(HIDDEN)
        self.model = mamba2.Model(
            layers=structs, final_norm=self.final, embedding=self.embedding.matrix, head=self.head.matrix,
            vocabulary=VOCABULARY, heads=HEADS, channels=channels, states=states, groups=groups, bits=bits,
            refit=self.how[0], dither=self.how[1], epsilon=EPSILON, gate_epsilon=EPSILON, limits=(0.01, math.inf),
            window=window,
        )  # fmt: skip

    def _mixer(self, layer: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(layer[key] for key in ("conv_weight", "conv_bias", "dt_bias", "a", "d", "gain"))

    def _projected(self, layer: dict[str, Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = norm(hidden, layer["norm"])
        times = folded_dot(normed.unsqueeze(-2), layer["times"]) + layer["times_bias"]
        return layer["in_proj"](normed), times

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(norm(hidden, self.final))[..., :VOCABULARY]

    def step(self, held: mamba2.States, tokens: Tensor, slots: Tensor) -> Tensor:
        hidden = self.embedding.row(tokens)
        for index, layer in enumerate(self.layers):
            all_held = (held.conv, held.codes, held.channel, held.scale, held.floats, held.recent)
            parts = [None if t is None else t[index][slots].clone() for t in all_held]
            conv, codes, channel, scale, floats, recent = parts
            count = None if held.count is None else held.count[slots]
            projected = torch.cat(self._projected(layer, hidden), -1)
            packed_state = (codes, channel, scale, layer["fixed"] if self.bits else None, floats)
            out = OPERATORS.mamba2_decode(
                projected, conv, *self._mixer(layer), *packed_state, self.groups, self.states, self.bits, EPSILON,
                *self.how, recent, count,
            )  # fmt: skip
            hidden = hidden + layer["out_proj"](out)
            for whole, part in zip(all_held, parts):
                if whole is not None:
                    whole[index][slots] = part
        if held.count is not None:
            held.count[slots] = count
        return self._logits(hidden)

    def prompt(self, held: mamba2.States, slot: int, tokens: Tensor) -> Tensor:
        hidden = self.embedding.row(tokens)
        for index, layer in enumerate(self.layers):
            projected, times = self._projected(layer, hidden)
            state = torch.zeros(1, HEADS, self.channels, self.states)
            out = OPERATORS.mamba2_prefill(
                projected[None], times[None], None, *self._mixer(layer), state, self.groups, 0.01, math.inf, EPSILON
            )
            hidden = hidden + layer["out_proj"](out[0])
            inputs = torch.nn.functional.pad(projected[:, self.inner :].T, (4, 0))[:, -4:]
            held.conv[index, slot] = inputs
            if held.count is not None:
                held.count[slot] = 0
            if not self.bits:
                held.floats[index, slot] = state[0]
                continue
            codes, channel, scale = OPERATORS.dsq_pack(state, layer["fixed"], self.bits, *self.how)
            held.codes[index, slot], held.scale[index, slot] = codes[0], scale[0]
            if held.channel is not None:
                held.channel[index, slot] = channel[0]
        return self._logits(hidden[-1])


def same(mine: mamba2.States, theirs: mamba2.States) -> None:
    for name in ("codes", "channel", "scale", "floats", "conv", "recent", "count"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("weights", "bits", "groups", "size", "kind", "window"),
    [
        (8, 4, 1, (16, 32), "dsq", 1),
        (4, 8, 2, (32, 64), "dsq_refit", 1),
        (8, 4, 2, (64, 128), "dsq_static_p", 1),
        (8, 4, 1, (16, 64), "dither", 1),
        (8, 0, 1, (16, 32), "dsq", 4),
        (8, 4, 2, (64, 128), "dither", 4),
        (4, 8, 2, (32, 64), "dsq_refit", 2),
        (8, 4, 1, (16, 64), "dsq_static_p", 3),
    ],
)
def test_it_is_the_chain_of_operators(
    weights: int, bits: int, groups: int, size: tuple[int, int], kind: str, window: int, threads: int
) -> None:
    twin = Twin(weights, bits, groups, size, kind, window)
    mine, theirs = (mamba2.States(twin.model, 12) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for slot in range(11):
        # some shorter than the convolution, one of several segments a team, one that four threads take in two teams
        length = {5: 300, 6: 150}.get(slot, 1 + slot)
        prompt = torch.randint(VOCABULARY, (length,), generator=generator)
        logits = twin.model.logits(1)
        mamba2.prompt(twin.model, mine, slot, prompt, logits, threads)
        assert torch.equal(logits[0, :VOCABULARY], twin.prompt(theirs, slot, prompt))
    same(mine, theirs)
    # a sequence alone, a few in another order, more than one block of tokens
    for slots in ([3], [2, 0, 9], *[list(range(11))] * (2 * window)):
        tokens = torch.randint(VOCABULARY, (len(slots),), generator=generator)
        logits, best = twin.model.logits(len(slots)), torch.empty(len(slots), dtype=torch.int64)
        chosen = torch.tensor(slots, dtype=torch.int32)
        mamba2.step(twin.model, mine, tokens, chosen, logits, best, threads)
        expected = twin.step(theirs, tokens, chosen.long())
        assert torch.equal(logits[:, :VOCABULARY], expected)
        assert torch.equal(best, expected.argmax(-1))
        same(mine, theirs)


def test_a_prompt_begins_a_window() -> None:
    twin = Twin(window=3)
    states, logits, one = mamba2.States(twin.model, 2), twin.model.logits(1), torch.tensor([5])
    assert states.count is not None
    for _ in range(2):
        mamba2.step(twin.model, states, one, torch.tensor([1], dtype=torch.int32), logits)
    assert states.count.tolist() == [0, 2]
    mamba2.prompt(twin.model, states, 1, one, logits)
    assert states.count.tolist() == [0, 0]
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        Twin(window=65)


def test_a_long_prompt_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin()
    tokens = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(2))
    found = []
    for most in (600, 256):
        monkeypatch.setattr(mamba2, "MAX_PROMPT", most)
        states, logits = mamba2.States(twin.model, 2), twin.model.logits(1)
        mamba2.prompt(twin.model, states, 1, tokens, logits)
        found.append((states, logits[0, :VOCABULARY]))
    same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_what_does_not_fit_is_refused() -> None:
    twin = Twin()
    states, logits, two = mamba2.States(twin.model, 2), twin.model.logits(2), torch.tensor([1, 2])
    for tokens, slots in ((two, [0, 0]), (two, [0, 2]), (torch.tensor([1, VOCABULARY]), [0, 1])):
        with pytest.raises(ValueError, match="are not"):
            mamba2.step(twin.model, states, tokens, torch.tensor(slots, dtype=torch.int32), logits)
    with pytest.raises(ValueError, match="sequence 2 of 2"):
        mamba2.prompt(twin.model, states, 2, two, logits)
    with pytest.raises(ValueError, match="room"):
        mamba2.step(twin.model, states, torch.ones(3, dtype=torch.int64), torch.arange(3, dtype=torch.int32), logits)


def test_memory_of_another_type_or_size_is_refused() -> None:
    twin = Twin()
    states, logits, two = mamba2.States(twin.model, 2), twin.model.logits(2), torch.tensor([1, 2])
    places, clock = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(len(mamba2.PHASES))
    for name, given in {
        "slots": {"slots": places.long()}, "logits": {"logits": logits[:, :-16].contiguous()},
        "best": {"best": torch.zeros(1, dtype=torch.int64)}, "seconds": {"seconds": clock},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: "):
            mamba2.step(
                **({"model": twin.model, "states": states, "tokens": two, "slots": places, "logits": logits} | given)
            )
    for name, given in {"logits": {"logits": logits.double()}, "seconds": {"seconds": clock}}.items():
        with pytest.raises(ValueError, match=f"{name}: "):
            mamba2.prompt(
                **({"model": twin.model, "states": states, "slot": 0, "tokens": two, "logits": logits} | given)
            )
