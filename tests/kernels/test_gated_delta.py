"""The gated delta rule: its definition, transformers' code, and the decode step's layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llmcompress_kernels import cpu, matrix
from llmcompress_kernels import decode as native
from llmcompress_kernels.decode_cache import Cache
from llmcompress_kernels.decode_delta import Delta, DeltaSizes, StateCodec, blocked
from llmcompress_kernels.reference.delta import (
    gated_delta_mix,
    gated_delta_rule,
    kimi_delta_mix,
    lightning_attention,
    lightning_mix,
)

HIDDEN, TOKENS = 32, 9


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of size one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("known", [True, False])
def test_the_definition_is_transformers_rule(known: bool) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    heads, keys, values = 3, 8, 16
    query, key, value = (random(TOKENS, heads, size, seed=i) for i, size in enumerate((keys, keys, values)))
    key = key / key.norm(dim=-1, keepdim=True)
    decay, step = random(TOKENS, heads, seed=3).sigmoid(), random(TOKENS, heads, seed=4).sigmoid()
    state = random(heads, keys, values, seed=5) if known else torch.zeros(heads, keys, values)
    found, last = gated_delta_rule(query * keys**-0.5, key, value, decay, step, state)
    told, after = torch_recurrent_gated_delta_rule(
        *(part.unsqueeze(0) for part in (query, key, value, decay.log(), step)),
        initial_state=state.unsqueeze(0) if known else None, output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(found, told[0])
    torch.testing.assert_close(last, after[0])


@dataclass(frozen=True)
class Mixer:
    """A layer's weights, which the definition and the step read."""

    sizes: DeltaSizes
    taps: int
    grouped: bool

    def rows(self) -> dict[str, torch.Tensor]:
        """Projections of queries, keys and values ``[C, H]``, gates ``[H V, H]`` and step sizes ``[2 H, H]``."""
        values = self.sizes.heads * self.sizes.value_dim
        counts = {"mixed": self.sizes.channels, "gates": values, "steps": 2 * self.sizes.heads}
        return {name: random(count, HIDDEN, seed=count) * HIDDEN**-0.5 for name, count in counts.items()}

    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first two as a model stores them: key head by key head in one, or apart."""
        rows, sizes = self.rows(), self.sizes
        if not self.grouped:
            return rows["mixed"], rows["gates"]
        keys = sizes.key_heads * sizes.key_dim
        parts = (*rows["mixed"].split([keys, keys, sizes.heads * sizes.value_dim]), rows["gates"])
        return torch.cat([part.unflatten(0, (sizes.key_heads, -1)) for part in parts], 1).flatten(0, 1), None


def small() -> dict[str, torch.Tensor]:
    """What does not depend on the number of heads: norms, embedding, head."""
    return {"norm": 1 + 0.1 * random(HIDDEN, seed=20), "words": random(50, HIDDEN, seed=21)}


def by_steps(layer: native.Layer, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Cache]:
    """Logits ``[T, 50]`` of a model of this layer, token by token, and what it keeps in the second of two slots."""
    ends = matrix.dense(given["words"])
    decoder = native.Decoder([layer], given["norm"], [torch.empty(16, 0)], [torch.empty(16, 0)], ends, ends, 1e-6, 1.0)
    try:
        cache = Cache(decoder, 2, 16)
        found, slot = torch.empty(TOKENS, 50), torch.tensor([1], dtype=torch.int32)
        for position in range(TOKENS):
            ids = torch.tensor([position])
            native.step(decoder, cache, ids, ids, slot, found[position : position + 1], threads=1)
    finally:
        native.set_isa(None)
    return found, cache


def read(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[T, H]`` and their norm."""
    hidden = given["words"][:TOKENS]
    return hidden, torch.nn.functional.rms_norm(hidden, (HIDDEN,), given["norm"], 1e-6)


def written(given: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states after the layer."""
    return torch.nn.functional.rms_norm(hidden, (HIDDEN,), given["norm"], 1e-6) @ given["words"].T


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize(("heads", "size", "taps"), [(2, 16, 4), (3, 48, 2)])
def test_decays_along_keys(isa: str, heads: int, size: int, taps: int) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    sizes, given, inner, rank = DeltaSizes(heads, heads, size, size), small(), heads * size, 12

    def rows(count: int, columns: int, seed: int) -> torch.Tensor:
        return random(count, columns, seed=seed) * columns**-0.5

    sides = [rows(inner, HIDDEN, seed) for seed in (30, 31, 32)]
    low, high = [rows(rank, HIDDEN, seed) for seed in (33, 34)], [rows(inner, rank, seed) for seed in (35, 36)]
    steps, output = rows(heads, HIDDEN, 37), rows(HIDDEN, inner, 38)
    weight, decay = random(taps, sizes.channels, seed=22), -random(heads, seed=23).exp()
    dt_bias, gain = random(inner, seed=24), random(size, seed=25)
    layer = native.Layer(
        given["norm"], None, None, None, None, matrix.dense(output), None, None, None,
        **{name: matrix.dense(side) for name, side in zip(("conv_in", "conv_key", "conv_value"), sides)},
        gates_low=matrix.dense(low[0]), conv_gates=matrix.dense(high[0]), decays_low=matrix.dense(low[1]),
        decays=matrix.dense(high[1]), steps=matrix.dense(steps), conv_weight=weight, rotary=None,
        delta=Delta(sizes, dt_bias, decay, gain, "split", epsilon=1e-5, rule="columns", sigmoid=True),
    )  # fmt: skip
    found, cache = by_steps(layer, given)
    hidden, normed = read(given)
    gates, times = (normed @ first.T @ second.T for first, second in zip(low, high))
    mixed, inputs, state = kimi_delta_mix(
        normed @ torch.cat(sides).T, gates, normed @ steps.T, times, weight, dt_bias, decay, gain, 1e-5,
        torch.zeros(taps - 1, sizes.channels), torch.zeros(heads, size, size),
    )  # fmt: skip
    torch.testing.assert_close(found, written(given, hidden + mixed @ output.T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.inputs[0, 1], inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.states[0, 1], blocked(state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("keeps", [None, 1.3])
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (3, 48)])
def test_lightning_attention(isa: str, heads: int, size: int, keeps: float | None) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    sizes, given, inner = DeltaSizes(heads, heads, size, size), small(), heads * size
    first, gates = (random(count, HIDDEN, seed=count) * HIDDEN**-0.5 for count in (3 * inner, inner))
    output, decay = random(HIDDEN, inner, seed=26) * inner**-0.5, -random(heads, seed=23).exp()
    gain = random(inner, seed=25)
    layer = native.Layer(
        given["norm"], None, None, None, None, matrix.dense(output), None, None, None, conv_in=matrix.dense(first),
        conv_gates=matrix.dense(gates), conv_weight=torch.ones(1, sizes.channels), rotary=None,
        keeps=None if keeps is None else (keeps, 0.0),
        delta=Delta(
            sizes, None, decay, gain, "without_gates", epsilon=1e-5, rule="lightning", sigmoid=True, whole=True
        ),
    )  # fmt: skip
    found, cache = by_steps(layer, given)
    hidden, normed = read(given)
    mixed, state = lightning_mix(
        normed @ first.T, normed @ gates.T, decay, gain, 1e-5, torch.zeros(heads, size, size)
    )  # fmt: skip
    stays = hidden if keeps is None else keeps * normed
    torch.testing.assert_close(found, written(given, stays + mixed @ output.T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.states[0, 1], blocked(state), rtol=1e-4, atol=1e-5)


def test_decays_along_keys_are_transformers_rule() -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    heads, size = 3, 8
    query, key, value = (random(TOKENS, heads, size, seed=i) for i in range(3))
    decay, step = random(TOKENS, heads, size, seed=3).sigmoid(), random(TOKENS, heads, seed=4).sigmoid()
    state = random(heads, size, size, seed=5)
    key = key / key.norm(dim=-1, keepdim=True)
    found, last = gated_delta_rule(query * size**-0.5, key, value, decay, step, state)
    told, after = recurrent_kimi_delta_attention(
        *(part.unsqueeze(0) for part in (query, key, value)), g=decay.log()[None], beta=step[None],
        initial_state=state[None], output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(found, told[0])
    torch.testing.assert_close(last, after[0])


def test_lightning_attention_is_the_sum_over_all_earlier_tokens() -> None:
    """Equation 1 of arXiv 2401.04658 written out: weights fall by the distance of two tokens."""
    heads, size = 2, 8
    query, key, value = (random(TOKENS, heads, size, seed=i) for i in range(3))
    decay = random(heads, seed=3).sigmoid()
    found, _ = lightning_attention(query, key, value, decay, torch.zeros(heads, size, size))
    far = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    falls = torch.where(far >= 0, decay[:, None, None] ** far.clamp(min=0), 0.0)
    expected = torch.einsum("hts,thk,shk,shv->thv", falls, query, key, value)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize(
    ("heads", "key_heads", "keys", "values", "taps", "grouped", "most"),
    [
        (4, 2, 16, 32, 4, True, 1.0),
        (4, 4, 12, 16, 4, False, 2.0),
        (6, 2, 7, 48, 2, True, 2.0),
        (2, 1, 33, 64, 8, False, 1.0),
    ],
)
def test_a_layer_of_the_step(
    isa: str, heads: int, key_heads: int, keys: int, values: int, taps: int, grouped: bool, most: float
) -> None:
    if not native.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    mixer = Mixer(DeltaSizes(heads, key_heads, keys, values), taps, grouped)
    given, rows, inner = small(), mixer.rows(), heads * values
    weight, decay = random(taps, mixer.sizes.channels, seed=22), -random(heads, seed=23).exp()
    dt_bias, gain = random(heads, seed=24), random(values, seed=25)
    output = random(HIDDEN, inner, seed=26) * inner**-0.5
    stored, gates = mixer.stored()
    layer = native.Layer(
        given["norm"], None, None, None, None, matrix.dense(output), None, None, None, conv_in=matrix.dense(stored),
        conv_gates=None if gates is None else matrix.dense(gates), steps=matrix.dense(rows["steps"]),
        conv_weight=weight, rotary=None,
        delta=Delta(mixer.sizes, dt_bias, decay, gain, "with_gates" if grouped else "apart", most=most, epsilon=1e-5),
    )  # fmt: skip
    found, cache = by_steps(layer, given)
    hidden, normed = read(given)
    mixed, inputs, state = gated_delta_mix(
        *(normed @ rows[name].T for name in ("mixed", "gates", "steps")), weight, dt_bias, decay, gain, 1e-5, key_heads,
        torch.zeros(taps - 1, mixer.sizes.channels), torch.zeros(heads, keys, values), most,
    )  # fmt: skip
    torch.testing.assert_close(found, written(given, hidden + mixed @ output.T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.inputs[0, 1], inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.states[0, 1], blocked(state), rtol=1e-4, atol=1e-5)
    # nothing of the other sequence
    assert not cache.states[0, 0].any()


def test_wrong_sizes_are_named() -> None:
    sizes = DeltaSizes(4, 2, 8, 16)
    assert sizes.decline(4) is None
    assert "20 columns are no multiple of 16" in str(DeltaSizes(4, 2, 8, 20).decline(4))
    assert "5 value heads do not share 2 key heads" in str(DeltaSizes(5, 2, 8, 16).decline(4))
    assert "over 1 tokens" in str(sizes.decline(1))
    with pytest.raises(ValueError, match=r"float32 \(4,\)"):
        Delta(sizes, torch.zeros(3), -torch.ones(4), torch.ones(16), "apart")
    with pytest.raises(ValueError, match="not kept in low bits"):
        Delta(sizes, None, -torch.ones(4), torch.ones(16), "apart", StateCodec(4), rule="lightning")
    with pytest.raises(ValueError, match="a key head for each of 4 heads, not 2"):
        Delta(sizes, torch.zeros(32), -torch.ones(4), torch.ones(16), "split", rule="columns")
    with pytest.raises(ValueError, match="biases of decays"):
        Delta(sizes, None, -torch.ones(4), torch.ones(16), "apart")
