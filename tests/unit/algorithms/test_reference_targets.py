"""Fitting weights to the full-precision stream against direct least squares."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.reference_targets import fit_to_reference

E, N, K, T = 3, 5, 8, 200


def streams():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(E, T, K, generator=generator)
    mix = torch.eye(K) + 0.3 * torch.randn(E, K, K, generator=generator)
    x_hat = x @ mix + 0.1 * torch.randn(E, T, K, generator=generator)
    return x, x_hat, torch.randn(E, N, K, generator=generator)


def moments(x, x_hat):
    return x_hat.mT @ x_hat, (x - x_hat).mT @ x_hat


def test_equals_ridge_regression():
    x, x_hat, weight = streams()
    hessian, cross = moments(x, x_hat)
    fitted = fit_to_reference(weight, hessian, cross, 0.05)
    for e in range(E):
        damp = 0.05 * hessian[e].diagonal().mean().double()
        rows = torch.cat((x_hat[e].double(), damp.sqrt() * torch.eye(K, dtype=torch.float64)))
        wanted = torch.cat((x[e].double() @ weight[e].double().T, damp.sqrt() * weight[e].double().T))
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        assert torch.allclose(fitted[e].double(), expected, atol=1e-4)
        before = (x_hat[e] @ weight[e].T - x[e] @ weight[e].T).square().mean()
        assert (x_hat[e] @ fitted[e].T - x[e] @ weight[e].T).square().mean() < 0.5 * before


def test_outputs_gain_what_the_inputs_tell_of_the_drift():
    x, x_hat, weight = streams()
    hessian, cross = moments(x, x_hat)
    map_back = torch.randn(E, N, K, generator=torch.Generator().manual_seed(2))
    told = x_hat @ map_back.mT
    drift = told + torch.randn(E, T, N, generator=torch.Generator().manual_seed(3))
    fitted = fit_to_reference(weight, hessian, cross, 1e-6, drift.mT @ x_hat)
    for e in range(E):
        wanted = x[e].double() @ weight[e].double().T + drift[e].double()
        expected = torch.linalg.lstsq(x_hat[e].double(), wanted).solution.T
        assert torch.allclose(fitted[e].double(), expected, atol=1e-3)


def test_scale_of_the_moments_does_not_matter():
    x, x_hat, weight = streams()
    hessian, cross = moments(x, x_hat)
    assert torch.allclose(
        fit_to_reference(weight, hessian, cross, 0.1), fit_to_reference(weight, hessian / 7, cross / 7, 0.1), atol=1e-5
    )


def test_equal_streams_and_unseen_experts_keep_their_weight():
    x, _, weight = streams()
    hessian, cross = moments(x, x)
    hessian[1] = 0
    assert torch.equal(fit_to_reference(weight, hessian, cross, 0.1), weight)


@pytest.mark.parametrize(("size", "ridge"), [(1.0, 0.05), (1.0, 1e-8), (1e6, 1e-8)])
def test_inputs_that_tell_little_are_damped(size, ridge):
    """The second and third are singular in float32, and are solved in float64."""
    weight = torch.randn(1, N, K, generator=torch.Generator().manual_seed(1))
    hessian = torch.ones(1, K, K) * size
    cross = 0.01 * size * torch.randn(1, K, 1, generator=torch.Generator().manual_seed(2)).expand(1, K, K).contiguous()
    fitted = fit_to_reference(weight, hessian, cross, ridge)
    system = hessian.double() + ridge * size * torch.eye(K, dtype=torch.float64)
    expected = weight + (weight @ cross).double() @ system.inverse()
    assert fitted.dtype == torch.float32
    assert torch.allclose(fitted.double(), expected, rtol=1e-3, atol=1e-4)
