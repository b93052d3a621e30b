"""A prepared weight: the operator's results bit for bit, and the operator itself for all that needs a dispatcher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from llmcompress_kernels import check, cpu, prepared
from torch.utils._python_dispatch import TorchDispatchMode

GEMM = torch.ops.llmcompress.group_gemm.default
COLUMNS = 100
pytestmark = pytest.mark.skipif(prepared.unavailable() is not None, reason="no direct calls here")


def weight(bits: int = 3, symmetric: bool = False) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    side = check.interleaved(check.random_stack((48, COLUMNS), bits, 32, symmetric, generator))
    return (side.weight, side.scale, side.zero, bits, 32, COLUMNS)


class Seen(TorchDispatchMode):
    """Lists the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gives_what_the_operator_gives(bits: int, symmetric: bool, int8: bool) -> None:
    operands = weight(bits, symmetric)
    layer = prepared.product(*operands, int8)
    assert type(layer).__name__ == "Product"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, COLUMNS), (COLUMNS,), (0, COLUMNS), (2, 3, COLUMNS), (17, COLUMNS)):
            x = torch.randn(shape).to(dtype)
            found, expected = layer(x), GEMM(x, *operands, int8)
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape


def test_what_needs_a_dispatcher_gets_it() -> None:
    operands = weight()
    layer = prepared.product(*operands)
    x = torch.randn(3, COLUMNS)
    expected = GEMM(x, *operands)
    with Seen() as seen:
        layer(x)
    assert seen.names == ["llmcompress.group_gemm.default"]
    assert torch.equal(torch.func.vmap(layer)(x.unsqueeze(1)).squeeze(1), expected)
    assert torch.equal(layer(x.T.contiguous().T), expected)
    assert layer(x.double()).dtype == torch.float64
    assert layer(x.to("meta")).device.type == "meta"
    graded = x.clone().requires_grad_()
    assert layer(graded).requires_grad == GEMM(graded, *operands).requires_grad
    with torch.no_grad():
        assert not layer(graded).requires_grad
    with torch.profiler.profile() as profile:
        layer(x)
    assert "llmcompress::group_gemm" in {event.key for event in profile.key_averages()}


def test_bad_input_is_the_operator_s_error() -> None:
    layer = prepared.product(*weight())
    with pytest.raises(ValueError, match="x has shape"):
        layer(torch.randn(2, COLUMNS - 1))
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        layer(3)  # type: ignore[arg-type]


def test_the_tensors_live_as_long_as_the_object() -> None:
    operands = weight()
    layer, x = prepared.product(*operands), torch.randn(1, COLUMNS)
    expected = GEMM(x, *operands)
    del operands
    junk = [torch.full((3, 10, 16), 7) for _ in range(50)]
    assert torch.equal(layer(x), expected)
    assert len(junk) == 50
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(layer)


def test_operands_that_the_kernels_would_not_take_go_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    side = check.random_stack((48, COLUMNS), 3, 32, False, torch.Generator().manual_seed(0))
    stored = (side.weight, side.scale, side.zero, 3, 32, COLUMNS)
    packed, scale, zero, *rest = weight()
    assert isinstance(packed, torch.Tensor)
    for operands in (stored, (packed[:, :-1], scale, zero, *rest), (packed, scale, zero, 3, 16, COLUMNS)):
        assert type(prepared.product(*operands)).__name__ == "function"
    monkeypatch.setattr(prepared, "_INCLUDE", str(Path("nowhere")))
    reason = prepared.unavailable()
    assert reason is not None
    assert "Python.h" in reason
    assert cpu.ready()
