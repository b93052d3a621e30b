"""Our RQT variant: what the nodes hold, and how other methods come out as special cases."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.gptq import GptqOptions, solve
from llmcompress.algorithms.grids import distortion, half_scale
from llmcompress.algorithms.residual_tree import (
    TreeOptions,
    build,
    exponent_of,
    leaf_report,
    quantize_node,
    reconstruct,
    relative_error,
)
from llmcompress.evaluation.family_baselines import min_max, two_levels
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.tree import Tree


def family(count: int, rows: int, columns: int, share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, columns, generator=generator)
    apart = share**0.5
    return {f"m{i}": common + apart * torch.randn(rows, columns, generator=generator) for i in range(count)}


def moment(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    turned = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spectrum = torch.arange(1, columns + 1).float().pow(-0.6)
    inputs = torch.randn(8 * columns, columns, generator=generator) * spectrum @ turned
    return 2 * inputs.T @ inputs / len(inputs)


def star_bits(tree: Tree, root: int, leaf: int) -> dict[str, int]:
    return {"root": root} | dict.fromkeys(tree.leaves, leaf)


def mean_error(weights, tree, nodes, hessian) -> float:  # type: ignore[no-untyped-def]
    errors = [relative_error(w, w - reconstruct(tree, nodes, name), hessian) for name, w in weights.items()]
    return sum(errors) / len(errors)


def test_distortion_of_gaussian_weights() -> None:
    """Shares of the variance that stay behind at g = 128 with searched scales."""
    expected = {1: 0.3607, 2: 0.1160, 3: 0.0351, 4: 0.0099, 5: 0.0026, 6: 0.00066}
    for bits, value in expected.items():
        assert distortion(bits, 128) == pytest.approx(value, rel=0.05)


def test_extremes_as_range_are_useless_at_one_bit() -> None:
    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))

    def left(search: str) -> float:
        scale = half_scale(values, 1, search).unsqueeze(-1)  # type: ignore[arg-type]
        return float((values - scale / 2 * values.sign()).square().mean())

    assert left("minmax") > 1.8 * left("mse")


def test_one_bit_scale_is_the_best_one() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(3))
    scale = half_scale(values, 1, "mse", weight)

    def error(s: torch.Tensor) -> torch.Tensor:
        return ((values - s.unsqueeze(-1) / 2 * values.sign()).square() * weight).sum(-1)

    for factor in (0.97, 1.03):
        assert bool((error(scale) <= error(scale * factor)).all())


def test_a_single_model_is_plain_gptq() -> None:
    """M = 1: bit for bit what the project's solver makes of the same grid."""
    weight = family(1, 24, 96, 0.0)
    tree, hessian = Tree.of(["m0"], []), moment(96)
    options = TreeOptions(group_size=32)
    nodes = build(weight, tree, {"m0": 3}, options, {"m0": hessian})
    exponent = exponent_of(weight["m0"])
    spec = delta_tree.node_spec(3, 32)
    found = solve(weight["m0"][None] * 2.0**-exponent, hessian[None], spec, options.gptq)
    expected = delta_tree.encode(found.codes[0], found.scale[0], exponent, spec)
    for key, tensor in expected.tensors.items():
        assert torch.equal(nodes["m0"].packed.tensors[key], tensor)


def test_identical_models_get_identical_leaves() -> None:
    one = family(1, 16, 64, 0.0)["m0"]
    weights = {name: one.clone() for name in "abc"}
    tree, hessian = Tree.star(list("abc")), moment(64)
    nodes = build(weights, tree, star_bits(tree, 4, 1), TreeOptions(group_size=32), dict.fromkeys(weights, hessian))
    for name in "bc":
        for key in ("weight_packed", "weight_scale"):
            assert torch.equal(nodes[name].packed.tensors[key], nodes["a"].packed.tensors[key])


def test_order_of_models_changes_nothing() -> None:
    weights, hessian = family(4, 16, 64, 0.05), moment(64)
    tree = Tree.star(list(weights))
    options = TreeOptions(group_size=32)
    plain = build(weights, tree, star_bits(tree, 4, 1), options, dict.fromkeys(weights, hessian))
    turned = dict(reversed(weights.items()))
    other = build(turned, tree, star_bits(tree, 4, 1), options, dict.fromkeys(weights, hessian))
    for node, found in plain.items():
        assert all(torch.equal(other[node].packed.tensors[k], t) for k, t in found.packed.tensors.items())


def test_two_levels_of_ranges_are_rtvq() -> None:
    """The baseline: mean of task vectors at 3 bits, offsets from the rounded mean at 2, one range per tensor."""
    deltas = torch.stack(list(family(3, 8, 16, 0.3).values())) * 0.01
    found = two_levels(deltas, 3, 2)
    shared = min_max(deltas.mean(0), 3)
    assert len(shared.unique()) <= 8
    for each, delta in zip(found, deltas):
        assert len((each - shared).round(decimals=6).unique()) <= 5
        assert torch.allclose(each, shared + min_max(delta - shared, 2))
        # rounding is at most half a step, plus what the mean loses is made up for by the offset
        step = ((delta - shared).max() - (delta - shared).min()) / 3
        assert float((each - delta).abs().max()) <= float(step) / 2 + 1e-7


def test_one_bit_of_the_difference_with_one_scale_is_bitdelta() -> None:
    """A 1-bit node with one group per row of one row equals sign times mean |Δ|."""
    delta = 0.01 * torch.randn(1, 256, generator=torch.Generator().manual_seed(5))
    node = quantize_node(delta, 1, TreeOptions(group_size=256), "rtn")
    expected = delta.sign() * delta.abs().mean()
    assert torch.allclose(node.values, expected, rtol=1e-3)


@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_rounding_at_shared_nodes_beats_gptq_there(share: float) -> None:
    """GPTQ at the root lowers the root's error and widens the leaves' range, which costs more."""
    ratios = []
    for seed in range(3):
        weights, hessian = family(4, 64, 256, share, seed), moment(256, seed)
        tree = Tree.star(list(weights))
        errors = []
        for solver in ("rtn", "gptq"):
            options = TreeOptions(internal_solver=solver)  # type: ignore[arg-type]
            nodes = build(weights, tree, star_bits(tree, 4, 1), options, dict.fromkeys(weights, hessian))
            errors.append(mean_error(weights, tree, nodes, hessian))
        ratios.append(errors[1] / errors[0])
    assert all(ratio > 1 for ratio in ratios), ratios


def test_a_star_beats_independent_models_at_twice_the_bits() -> None:
    """4-1 over four models takes 2.16 bits each and beats 3-bit GPTQ (3.13) while differences are small."""
    weights, hessian = family(4, 64, 256, 1e-2), moment(256)
    tree, options = Tree.star(list(weights)), TreeOptions()
    nodes = build(weights, tree, star_bits(tree, 4, 1), options, dict.fromkeys(weights, hessian))
    alone = {
        n: relative_error(w, w - quantize_node(w, 3, options, "gptq", hessian).values, hessian)
        for n, w in weights.items()
    }
    assert mean_error(weights, tree, nodes, hessian) < 0.6 * sum(alone.values()) / 4


def test_leaves_improve_every_model() -> None:
    weights, hessian = family(4, 32, 128, 0.05), moment(128)
    tree = Tree.star(list(weights))
    bits = star_bits(tree, 4, 1)
    nodes = build(weights, tree, bits, TreeOptions(), dict.fromkeys(weights, hessian))
    for name, weight in weights.items():
        without = relative_error(weight, weight - nodes["root"].values, hessian)
        assert relative_error(weight, weight - reconstruct(tree, nodes, name), hessian) < without


def test_unbiased_leaves_keep_the_size_of_the_difference() -> None:
    weights = family(2, 32, 256, 0.1)
    base = (weights["m0"] + weights["m1"]) / 2
    tree = Tree.star(list(weights))
    kept = {}
    for scale in ("mse", "unbiased"):
        options = TreeOptions(leaf_scale=scale, leaf_solver="rtn")  # type: ignore[arg-type]
        nodes = build(weights, tree, star_bits(tree, 6, 1), options)
        rebuilt = reconstruct(tree, nodes, "m0")
        kept[scale] = leaf_report(weights["m0"], rebuilt, weights["m0"] - base, base, None)[2]
    assert kept["mse"].retention == pytest.approx(1 - distortion(1, 128), abs=0.05)
    assert kept["unbiased"].retention == pytest.approx(1.0, abs=0.05)
    assert kept["mse"].cosine == pytest.approx((1 - distortion(1, 128)) ** 0.5, abs=0.05)


def test_residuals_far_below_half_precision() -> None:
    """Differences of 1e-6: fp16 scales alone would be denormal."""
    target = 1e-6 * torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    node = quantize_node(target, 4, TreeOptions(), "rtn")
    assert float((node.values - target).square().sum() / target.square().sum()) < 0.02
    assert torch.equal(delta_tree.decode(node.packed), node.values)


def test_hmean_needs_moments_and_auto_takes_the_better() -> None:
    weights = family(3, 32, 64, 1e-3)
    hessians = {name: moment(64, i) for i, name in enumerate(weights)}
    tree = Tree.star(list(weights))
    errors = {}
    for target in ("mean", "hmean", "auto"):
        options = TreeOptions(group_size=64, node_target=target, gptq=GptqOptions(act_order="groups", refit=True))  # type: ignore[arg-type]
        nodes = build(weights, tree, star_bits(tree, 4, 1), options, hessians)
        errors[target] = sum(
            relative_error(w, w - reconstruct(tree, nodes, n), hessians[n]) for n, w in weights.items()
        )
    assert errors["auto"] == pytest.approx(min(errors["mean"], errors["hmean"]), rel=1e-6)


@pytest.mark.parametrize("weighed", [True, False])
def test_the_report_of_a_leaf_is_its_parts(weighed: bool) -> None:
    weights = family(2, 12, 40, 0.1)
    weight, base = weights["m0"], weights["m1"]
    hessian = moment(40) if weighed else None
    rest = weight - quantize_node(weight, 3, TreeOptions(group_size=20), "rtn").values
    rebuilt = weight - rest + quantize_node(rest, 1, TreeOptions(group_size=20), "rtn").values
    error, without, kept = leaf_report(weight, rebuilt, rest, base, hessian)
    assert error == pytest.approx(relative_error(weight, weight - rebuilt, hessian), rel=1e-9)
    assert without == pytest.approx(relative_error(weight, rest, hessian), rel=1e-9)
    h = torch.eye(weight.shape[1]).double() if hessian is None else hessian.double()
    delta, after = (weight - base).double(), (rebuilt - base).double()
    size, left, both = ((a @ h * b).sum().item() for a, b in ((delta, delta), (after, after), (after, delta)))
    assert kept.retention == pytest.approx(both / size, rel=1e-4)
    assert kept.cosine == pytest.approx(both / (size * left) ** 0.5, rel=1e-4)
    assert kept.signs == pytest.approx((delta.sign() == after.sign()).double().mean().item())
    assert kept.size == pytest.approx(size / (weight.double() @ h * weight.double()).sum().item(), rel=1e-4)


def test_sweeps_improve_leaves_of_one_bit() -> None:
    """4 bits at the root, 1 at the leaves: coordinate descent after GPTQ takes a tenth of the error or more."""
    weights, hessian = family(3, 32, 96, 1e-2), moment(96)
    tree = Tree.star(list(weights))
    errors = {}
    for sweeps in (0, 4):
        options = TreeOptions(group_size=96, gptq=GptqOptions(act_order="groups", refit=True, sweeps=sweeps))
        nodes = build(weights, tree, star_bits(tree, 4, 1), options, dict.fromkeys(weights, hessian))
        errors[sweeps] = mean_error(weights, tree, nodes, hessian)
    assert errors[4] < 0.9 * errors[0]
