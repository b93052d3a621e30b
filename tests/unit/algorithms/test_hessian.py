from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms import hessian as module
from llmcompress.algorithms.hessian import Gram, blend_rare, inverse_factor


@pytest.mark.parametrize("width", [24, 130])
def test_gram_equals_the_definition(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NARROWEST", 50)
    torch.manual_seed(0)
    first, second, other = torch.randn(70, width), torch.randn(33, width), torch.randn(9, width)
    gram = Gram(3, width)
    gram.add(first, 0)
    gram.add(second, 0)
    gram.add(other, 2)
    gram.add(other[:0], 1)
    x = torch.cat([first, second])
    result = gram.hessian()
    assert gram.tokens.tolist() == [103, 0, 9]
    torch.testing.assert_close(result[0], 2 * x.T @ x / 103, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[2], 2 * other.T @ other / 9, rtol=1e-4, atol=1e-5)
    assert torch.equal(result[1], torch.zeros(width, width))
    assert torch.equal(result, result.transpose(1, 2))
    assert torch.equal(gram.hessian(slice(2, 3)), result[2:])


def test_gram_weights_tokens() -> None:
    x, weight = torch.randn(40, 8), torch.rand(40)
    gram = Gram(2, 8)
    for part in (slice(0, 25), slice(25, 40)):
        gram.add(x[part], weight=weight[part])
    expected = 2 * (x * weight[:, None]).T @ x / weight.sum()
    torch.testing.assert_close(gram.hessian()[0], expected, rtol=1e-4, atol=1e-5)
    assert gram.tokens.tolist() == [40, 0]
    torch.testing.assert_close(gram.mass, torch.tensor([weight.double().sum(), 0.0], dtype=torch.float64))
    again = Gram.of(gram.total, gram.tokens, gram.mass)
    assert torch.equal(again.hessian(), gram.hessian())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_all_alike_change_nothing(dtype: torch.dtype) -> None:
    """Or the layer's plain mean, blended in for rare experts, would count more than its share."""
    x = torch.randn(3, 8).to(dtype)
    plain, weighted = Gram(1, 8), Gram(1, 8)
    plain.add(x)
    weighted.add(x, weight=torch.full((3,), 0.07))
    torch.testing.assert_close(weighted.hessian(), plain.hessian(), rtol=1e-5, atol=1e-6)


def test_gram_of_bf16_keeps_small_eigenvalues_beside_a_large_mean() -> None:
    torch.manual_seed(0)
    x = (0.05 * torch.randn(4000, 40) + 3).bfloat16()
    gram, exact, plain = Gram(1, 40, fast=True), Gram(1, 40), torch.zeros(40, 40)
    for part in x.split(400):
        gram.add(part)
        exact.add(part.float())
        plain += torch.mm(part.T, part)
    smallest = [float(torch.linalg.eigvalsh(m)[0]) for m in (gram.hessian()[0], exact.hessian()[0], plain * 2 / 4000)]
    assert smallest[0] == pytest.approx(smallest[1], rel=0.2)
    # what multiplying in bf16 without care would give
    assert smallest[2] < 0
    assert not torch.equal(gram.total, exact.total)


def test_gram_of_bf16_is_exact_unless_asked_to_be_fast() -> None:
    x = (torch.randn(600, 24) + 2).bfloat16()
    gram, exact = Gram(1, 24), Gram(1, 24)
    for part in x.split(200):
        gram.add(part)
        exact.add(part.float())
    assert torch.equal(gram.total, exact.total)


def test_factor_is_the_one_gptq_needs() -> None:
    x = torch.randn(2, 200, 16, dtype=torch.float64)
    curvature = x.transpose(1, 2) @ x
    factor, damp = inverse_factor(curvature.float(), 0.01)
    damped = curvature + 0.01 * curvature.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(16)
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), textbook, rtol=1e-4, atol=1e-6)
    assert damp == [0.01, 0.01]


def test_factor_survives_useless_matrices() -> None:
    good = torch.eye(6) + 0.1
    dead = good.clone()
    dead[2, :] = dead[:, 2] = 0
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.2]))
    hopeless = torch.full((6, 6), float("nan"))
    stack = torch.stack([good, torch.zeros(6, 6), dead, indefinite, hopeless, good])
    kept = stack.clone()
    factor, damp = inverse_factor(stack, 0.01, [True, True, True, True, True, False])
    assert torch.isfinite(factor).all()
    assert torch.equal(stack.nan_to_num(7.0), kept.nan_to_num(7.0))
    for rounded in (1, 4, 5):
        assert torch.equal(factor[rounded], torch.eye(6))
        assert damp[rounded] == 0.0
    assert damp[0] == damp[2] == 0.01
    assert torch.equal(factor[2][2, 3:], torch.zeros(3))


def test_failed_factorization_raises_damping() -> None:
    x = torch.randn(40, 5)
    curvature = x.T @ x
    curvature -= torch.linalg.eigvalsh(curvature)[0] * 1.05 * torch.eye(5)
    mean = float(curvature.diagonal().mean())
    lowest = float(torch.linalg.eigvalsh(curvature)[0])
    assert lowest < 0
    _, damp = inverse_factor(curvature[None], -lowest / mean / 3)
    assert damp[0] == pytest.approx(10 * -lowest / mean / 3)


def test_one_token_is_a_mean_too() -> None:
    x = torch.randn(1, 6)
    gram = Gram(1, 6)
    gram.add(x)
    torch.testing.assert_close(gram.hessian()[0], 2 * x.T @ x)


def test_blend() -> None:
    own = torch.rand(5, 4, 4)
    shared = torch.rand(4, 4)
    mixed = blend_rare(own.clone(), torch.tensor([0, 1, 25, 100, 300]), shared, 100)
    torch.testing.assert_close(mixed[1:3], own[1:3] + torch.tensor([0.99, 0.75])[:, None, None] * shared)
    for alone in (0, 3, 4):
        assert torch.equal(mixed[alone], own[alone])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_factor_knows_no_unit(size: float) -> None:
    """Inputs of any magnitude are damped alike, and a dead input gets the mean energy."""
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = 0
    curvature = size * x.T @ x
    factor, damp = inverse_factor(curvature.float()[None], 0.01)
    assert damp == [0.01]
    mean = curvature.diagonal().mean()
    damped = curvature + 0.01 * mean * torch.eye(6, dtype=torch.float64)
    damped[2, 2] += mean
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor[0].double(), textbook, rtol=1e-4, atol=1e-6 / size**0.5)


@pytest.mark.parametrize("width", [1, 128, 129, 300])
def test_upper_inverse_by_halves(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 2 * width, width, generator=generator)
    upper = torch.linalg.cholesky(x.transpose(1, 2) @ x / width, upper=True)
    found = module.upper_inverse(upper)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found.double(), torch.linalg.inv(upper.double()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [100, 129, 300])
def test_cholesky_by_block_columns(width: int) -> None:
    x = torch.randn(3, 2 * width, width, generator=torch.Generator().manual_seed(width))
    matrix = x.transpose(1, 2) @ x / width
    matrix[1, width - 2, width - 2] = -1.0
    exact = torch.linalg.cholesky(matrix[[0, 2]].double())
    factor, info = module.cholesky(matrix.clone())
    assert (info == 0).tolist() == [True, False, True]
    torch.testing.assert_close(factor[[0, 2]].tril().double(), exact, rtol=1e-4, atol=1e-5)


def test_taken_hessian_is_the_same_and_leaves_nothing() -> None:
    gram = Gram(2, 300)
    for expert, tokens in ((0, 40), (1, 70)):
        gram.add(torch.randn(tokens, 300), expert)
    kept = gram.hessian()
    assert torch.equal(kept, kept.mT)
    torch.testing.assert_close(gram.hessian(slice(1, 2)), kept[1:])
    assert torch.equal(gram.take_hessian(), kept)
    assert gram.total.numel() == 0
    assert gram.tokens.tolist() == [40, 70]


def test_root_in_memory_that_was_given() -> None:
    x = torch.randn(2, 400, 200, generator=torch.Generator().manual_seed(0))
    curvature = x.transpose(1, 2) @ x
    order = torch.stack([torch.randperm(200), torch.randperm(200)])
    memory = torch.empty(2, 200, 200)
    found, damp = module.reversed_root(curvature, 0.01, None, order, memory)
    expected, _ = module.reversed_root(curvature, 0.01, None, order)
    assert torch.equal(found.tril(), expected.tril())
    assert damp == [0.01, 0.01]
    upper, _ = inverse_factor(curvature, 0.01, None, order)
    root = found.tril().flip(-1, -2)
    torch.testing.assert_close(root @ upper, torch.eye(200).expand(2, -1, -1), rtol=0, atol=1e-3)
