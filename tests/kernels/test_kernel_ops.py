"""Operators against independent formulas, PyTorch's operator checks, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from llmcompress_kernels import gpu, ops, select
from llmcompress_kernels.reference.group_gemm import interleave

from llmcompress.quant import bitpack

BITS = (2, 3, 4, 8)


def quantized(shape: tuple[int, ...], bits: int, group: int, symmetric: bool) -> tuple[ops.Stack, torch.Tensor]:
    """Random packed weight and the dense weight it stands for, decoded one column at a time."""
    groups = -(-shape[-1] // group)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    scale = (torch.rand(*shape[:-1], groups) * 0.1 + 0.01).to(torch.float16)
    zero = torch.randint(0, 1 << bits, (*shape[:-1], groups), dtype=torch.uint8)
    dense = torch.empty(shape)
    for column in range(shape[-1]):
        offset = 1 << (bits - 1) if symmetric else zero[..., column // group].float()
        dense[..., column] = (codes[..., column].float() - offset) * scale[..., column // group].float()
    zeros = None if symmetric else ops.pack(zero, bits)
    return ops.Stack(ops.pack(codes, bits), scale, zeros, None, bits, group), dense


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def naive_moe(x, index, weights, gate_up, down, act, biases=(None, None)):
    """Slot by slot."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if expert == gate_up.shape[0]:
                continue
            hidden = gate_up[expert] @ x[token] + (0 if biases[0] is None else biases[0][expert])
            gates, ups = hidden.chunk(2)
            inner = act(gates, ups)
            outer = down[expert] @ inner + (0 if biases[1] is None else biases[1][expert])
            out[token] += weights[token, slot] * outer
    return out


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 45, 128])
def test_pack_is_a_little_endian_bit_stream(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    packed = ops.pack(codes, bits)
    for row in range(3):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        expected = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(packed.shape[1])]
        assert [int(w) & 0xFFFFFFFF for w in packed[row]] == expected
    assert torch.equal(ops.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_pack_agrees_with_the_codec(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 5, 77), dtype=torch.uint8)
    assert torch.equal(ops.pack(codes, bits), bitpack.pack(codes, bits))
    assert torch.equal(ops.unpack(ops.pack(codes, bits), bits, 77), bitpack.unpack(ops.pack(codes, bits), bits, 77))


def test_pack_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ops.pack(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="do not fill"):
        ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 50])
def test_group_gemm(bits: int, symmetric: bool, columns: int) -> None:
    stack, dense = quantized((24, columns), bits, 16, symmetric)
    x = torch.randn(2, 3, columns)
    arguments = (x, stack.weight, stack.scale, stack.zero, bits, 16, columns)
    torch.testing.assert_close(torch.ops.llmcompress.group_gemm_definition(*arguments), x @ dense.T)
    assert distance(ops.group_gemm(*arguments), x @ dense.T) < 5e-6


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("op", ["group_gemm", "group_gemm_definition", "gpu"])
def test_operands_of_a_linear_that_do_not_fit_are_refused(op: str, interleaved: bool) -> None:
    stack, _ = quantized((32, 128), 4, 32, symmetric=False)
    parts = {"packed": stack.weight, "scale": stack.scale, "zero": stack.zero}
    parts = {name: interleave(part) if interleaved else part for name, part in parts.items()}
    call = gpu.group_gemm if op == "gpu" else getattr(torch.ops.llmcompress, op)
    # loads the kernels, which take the definition's place
    ops.group_gemm(torch.randn(1, 128), stack.weight, stack.scale, stack.zero, 4, 32, 128)

    def product(columns: int = 128, group: int = 32, **other: torch.Tensor) -> torch.Tensor:
        return call(torch.ones(2, columns), *{**parts, **other}.values(), 4, group, 128, False)

    assert product().shape == (2, 32)
    half = {name: part[: len(part) // 2] for name, part in parts.items()}
    narrow = {name: part.narrow(1, 0, part.shape[1] - 1).contiguous() for name, part in parts.items()}
    for name in parts:
        with pytest.raises(ValueError, match=f"group_gemm: {name} has shape"):
            product(**{name: narrow[name]})
    for name in ("scale", "zero"):
        with pytest.raises(ValueError, match=f"group_gemm: {name} has shape"):
            product(**{name: half[name]})
    for group in (16, 64):
        with pytest.raises(ValueError, match="group_gemm: scale has shape"):
            product(group=group)
    with pytest.raises(ValueError, match="0 columns per group"):
        product(group=0)
    with pytest.raises(ValueError, match=r"x has shape \[2, 96\], expected \[..., 128\]"):
        product(columns=96)


def test_group_gemm_keeps_the_type_of_its_input() -> None:
    stack, dense = quantized((24, 64), 4, 64, True)
    x = torch.randn(5, 64).to(torch.bfloat16)
    found = ops.group_gemm(x, stack.weight, stack.scale, None, 4, 64, 64)
    assert found.dtype == torch.bfloat16
    assert distance(found, x.float() @ dense.T) < 4e-3


def gpt_oss(gates, ups):
    gates, ups = gates.clamp(max=0.5), ups.clamp(-0.5, 0.5)
    return (ups + 1) * gates / (1 + torch.exp(-1.3 * gates))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("silu", lambda g, u: g / (1 + torch.exp(-g)) * u),
        ("gelu", lambda g, u: 0.5 * g * (1 + torch.erf(g / 2**0.5)) * u),
        ("gelu_pytorch_tanh", lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u),
        ("gpt_oss", gpt_oss),
    ],
)
def test_moe_against_slot_by_slot(activation, formula) -> None:
    torch.manual_seed(1)
    gate_up, dense_up = quantized((4, 24, 32), 3, 16, False)
    down, dense_down = quantized((4, 32, 12), 4, 8, True)
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    index[3] = 4  # every slot of this token is skipped
    found = ops.moe_group_gemm(x, index, weights, gate_up, down, 12, activation, 1.3, 0.5)
    torch.testing.assert_close(found, naive_moe(x, index, weights, dense_up, dense_down, formula), atol=1e-4, rtol=1e-4)
    assert torch.equal(found[3], torch.zeros(32))


def test_moe_with_biases_and_one_dense_side() -> None:
    torch.manual_seed(2)
    gate_up, dense_up = quantized((3, 16, 24), 2, 8, True)
    biases = torch.randn(3, 16), torch.randn(3, 24)
    gate_up = ops.Stack(gate_up.weight, gate_up.scale, None, biases[0], 2, 8)
    dense_down = torch.randn(3, 24, 8)
    x, weights, index = torch.randn(5, 24), torch.rand(5, 1), torch.randint(0, 3, (5, 1))
    found = ops.moe_group_gemm(x, index, weights, gate_up, ops.Stack(dense_down, bias=biases[1]), 8)
    expected = naive_moe(x, index, weights, dense_up, dense_down, lambda g, u: torch.nn.functional.silu(g) * u, biases)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_moe_decodes_only_experts_that_are_hit() -> None:
    gate_up, _ = quantized((4, 16, 16), 4, 16, True)
    down, _ = quantized((4, 16, 8), 4, 8, True)
    poisoned = gate_up.scale.clone()
    poisoned[1:] = float("nan")
    gate_up = ops.Stack(gate_up.weight, poisoned, None, None, 4, 16)
    index = torch.tensor([[0, 4], [4, 0]])
    assert torch.isfinite(ops.moe_group_gemm(torch.randn(2, 16), index, torch.rand(2, 2), gate_up, down, 8)).all()


def test_moe_without_a_gate() -> None:
    up, up_values = quantized((3, 12, 16), 4, 16, True)
    down, down_values = quantized((3, 16, 12), 4, 12, False)
    x, index, weights = (
        torch.randn(6, 16),
        torch.tensor([[0, 1], [2, 3], [3, 3], [1, 0], [2, 0], [1, 2]]),
        torch.rand(6, 2),
    )
    expected = torch.zeros(6, 16)
    for token, slot in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
        expert = int(index[token, slot])
        if expert < 3:
            inner = (up_values[expert] @ x[token]).clamp(min=0) ** 2
            expected[token] += weights[token, slot] * (down_values[expert] @ inner)
    assert distance(ops.moe_group_gemm(x, index, weights, up, down, 12, "relu2"), expected) < 5e-6
    with pytest.raises(ValueError, match=r"gate_up.weight has shape \[3, 12, 2\], expected \[3, 24, 2\]"):
        ops.moe_group_gemm(x, index, weights, up, down, 12, "silu")


def test_moe_refuses_an_unknown_activation() -> None:
    side, _ = quantized((2, 16, 8), 4, 8, True)
    down, _ = quantized((2, 8, 8), 4, 8, True)
    with pytest.raises(ValueError, match="activation"):
        ops.moe_group_gemm(torch.randn(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), side, down, 8, "x")


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "rows of down": (lambda a: a.update(down=side((3, 24, 16), 4, 16)), r"down.weight .*expected \[3, 32, 2\]"),
    "columns of down": (lambda a: a.update(down=side((3, 32, 40), 4, 16)), "down.weight"),
    "rows of gate_up": (lambda a: a.update(gate_up=side((3, 48, 32), 4, 16)), "gate_up.weight"),
    "columns of gate_up": (lambda a: a.update(gate_up=side((3, 32, 64), 4, 16)), "gate_up.weight"),
    "experts of down": (lambda a: a.update(down=side((2, 32, 16), 4, 16)), "down.weight"),
    "dense down": (lambda a: a.update(down=ops.Stack(torch.randn(3, 24, 16))), "down.weight"),
    "groups of a scale": (lambda a: a.update(down=replace(a["down"], group_size=8)), "down.scale"),
    "experts of a scale": (lambda a: a.update(down=replace(a["down"], scale=a["down"].scale[:2])), "down.scale"),
    "no scale": (lambda a: a.update(down=replace(a["down"], scale=None)), "no scale"),
    "zero points": (lambda a: a.update(down=replace(a["down"], zero=a["down"].zero[:, :8])), "down.zero"),
    "bias": (lambda a: a.update(down=replace(a["down"], bias=torch.randn(3, 16))), "down.bias"),
    "intermediate": (lambda a: a.update(intermediate=8), "gate_up.weight"),
    "one order only": (lambda a: a.update(down=replace(a["down"], weight=interleave(a["down"].weight))), "down.scale"),
    "tokens": (lambda a: a.update(index=torch.zeros(4, 2, dtype=torch.int64)), "index"),
    "type of index": (lambda a: a.update(index=torch.zeros(5, 2, dtype=torch.int32)), "int64"),
    "weights": (lambda a: a.update(weights=torch.rand(5, 1)), "weights"),
    "expert too large": (lambda a: a.update(index=torch.full((5, 2), 4)), "0 to 2, or 3 for a slot"),
    "negative expert": (lambda a: a.update(index=torch.full((5, 2), -1)), "experts -1 to -1"),
}


def side(shape: tuple[int, ...], bits: int, group: int) -> ops.Stack:
    return quantized(shape, bits, group, False)[0]


@pytest.mark.parametrize("what", WRONG)
def test_moe_refuses_operands_that_do_not_fit(what: str) -> None:
    """On a GPU they would be read past their ends, so its front refuses them too, before it asks for a device."""
    x, index = torch.randn(5, 32), torch.randint(0, 4, (5, 2))
    operands: dict[str, Any] = {"x": x, "index": index, "weights": torch.rand(5, 2), "intermediate": 16}
    operands |= {"gate_up": side((3, 32, 32), 4, 16), "down": side((3, 32, 16), 4, 16)}
    ops.moe_group_gemm(**operands)
    change, message = WRONG[what]
    change(operands)
    with pytest.raises(ValueError, match=message):
        ops.moe_group_gemm(**operands)
    first, *rest = (operands[key] for key in ("x", "index", "weights", "gate_up", "down", "intermediate"))
    flat = [part for value in rest for part in (value.operand() if isinstance(value, ops.Stack) else [value])]
    with pytest.raises(ValueError, match=message):
        gpu.moe_group_gemm(first, *flat, "silu", 1.702, 7.0, False)


def test_opcheck() -> None:
    codes = torch.randint(0, 8, (3, 40), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.llmcompress.pack.default, (codes, 3))
    torch.library.opcheck(torch.ops.llmcompress.unpack.default, (ops.pack(codes, 3), 3, 40))
    stack, _ = quantized((8, 40), 3, 16, False)
    linear = (torch.randn(2, 40), stack.weight, stack.scale, stack.zero, 3, 16, 40)
    torch.library.opcheck(torch.ops.llmcompress.group_gemm.default, linear)
    up, _ = quantized((3, 16, 40), 3, 16, False)
    down, _ = quantized((3, 40, 8), 4, 8, True)
    index = torch.tensor([[0, 3], [2, 1]])
    sides = [*(up.weight, up.scale, up.zero, None, 3, 16), *(down.weight, down.scale, None, None, 4, 8)]
    arguments = (torch.randn(2, 40), index, torch.rand(2, 2), *sides, 8, "silu", 1.702, 7.0)
    torch.library.opcheck(torch.ops.llmcompress.moe_group_gemm.default, arguments)


def test_operators_stay_whole_in_a_compiled_graph() -> None:
    stack, _ = quantized((8, 32), 4, 32, True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.group_gemm(x, stack.weight, stack.scale, None, 4, 32, 32) + 1

    x = torch.randn(3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_explain_names_one_implementation_per_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(select.VARIABLE, raising=False)
    rows = select.explain("cpu")
    used = [row.op for row in rows if row.used]
    assert sorted(used) == sorted({row.op for row in rows})
    assert {"group_gemm", "moe_group_gemm", "pack", "unpack"} <= set(used)


def test_explain_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_REGISTERED", {})
    select.register(select.Implementation("op", "reference", ("any",)))
    select.register(select.Implementation("op", "cuda", ("cuda",)))
    select.register(select.Implementation("op", "cpu", ("cpu",), lambda: "no compiler"))
    rows = {row.implementation: row for row in select.explain("cpu")}
    assert rows["reference"].used
    assert "cuda only" in rows["cuda"].reason
    assert rows["cpu"].reason == "no compiler"
    select.register(select.Implementation("op", "cpu", ("cpu",)))
    assert [row.implementation for row in select.explain("cpu") if row.used] == ["cpu"]
    monkeypatch.setenv(select.VARIABLE, "reference")
    assert [row.implementation for row in select.explain("cpu") if row.used] == ["reference"]
    monkeypatch.setenv(select.VARIABLE, "fastest")
    with pytest.raises(ValueError, match="fastest"):
        select.explain("cpu")
