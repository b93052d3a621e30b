"""Errors of weights at every width, which decide how an average of bits is spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.models import sizes
from llmcompress.models.activation_cache import ActivationCache
from llmcompress.models.capture import expert_weight
from llmcompress.models.memory_limits import DEFAULT, Limits
from llmcompress.models.walker import Walker
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.rules import AutoBits, Rule, auto_units
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.blockwise.bit_measurement import ErrorMeter, choose_widths
from llmcompress.stages.gptq import Gptq, GptqConfig

SPECS = [QuantSpec(bits, 16) for bits in (2, 3, 4)]


def rules(model: Any) -> dict[Rule, Any]:
    rule = Rule("all", "proj", (), AutoBits(2.75), 16)
    return auto_units((rule,), model.layout)


def lost(weight: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> tuple[float, float]:
    """Squared error of outputs and their energy, from the inputs themselves."""
    rounded = dequantize(*round_to_nearest(weight, spec, "mse"), spec)
    return float((x @ (weight - rounded).T).square().sum()), float((x @ weight.T).square().sum())


def test_errors_are_those_of_the_outputs(tiny: Any, tmp_path: Any) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    model, block = state.model.skeleton(torch.float32), state.model.layout.blocks[0]
    bank = block.bank
    query, value = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    wanted = dict.fromkeys((query, value, bank.gate_up), SPECS)
    meter, walker = ErrorMeter(model, wanted), Walker(model, state.calibration.tokens)
    hidden = walker.embed([each.name for each in state.model.layout.blocks])
    state.model.load_block(model, 0)
    layer = model.get_submodule(block.name)
    inputs, routed = {}, {}
    hook = lambda key: lambda _module, args: inputs.setdefault(key, []).append(args[0].flatten(0, -2))  # noqa: E731
    handles = [model.get_submodule(query).register_forward_pre_hook(hook(query))]
    router = layer.mlp.gate
    handles.append(router.register_forward_hook(lambda _m, args, out: routed.setdefault("all", []).append((args, out))))
    walker.forward(block, hidden, meter)
    for handle in handles:
        handle.remove()
    # the attention's input does not depend on what is measured, and nothing is changed
    x = torch.cat(inputs[query][: len(walker.batches)])
    for name in (query, value):
        weight = model.get_parameter(f"{name}.weight").detach()
        expected = [above / below for above, below in (lost(weight, x, spec) for spec in SPECS)]
        assert meter.error([name]) == pytest.approx(expected, rel=1e-4)
    assert meter.error([name])[0] > meter.error([name])[1] > meter.error([name])[2] > 0
    # experts count by the tokens they get
    above, below = [0.0] * 3, 0.0
    tokens = torch.cat([args[0].flatten(0, -2) for args, _ in routed["all"]])
    index = torch.cat([out[2] for _, out in routed["all"]])
    weights = expert_weight(layer.mlp.experts, bank, bank.gate_up, slice(0, bank.num_experts))
    for expert, weight in enumerate(weights):
        own = tokens[(index == expert).any(-1)]
        pairs = [lost(weight, own, spec) for spec in SPECS]
        above = [total + pair[0] for total, pair in zip(above, pairs)]
        below += pairs[0][1]
    assert meter.error([bank.gate_up]) == pytest.approx([total / below for total in above], rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_budget_of_memory_moves_activations_into_files_and_changes_no_width(
    family: str, tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, context = tiny.state(tmp_path / "model", family), tiny.context(tmp_path)
    units = rules(state.model)
    expected = choose_widths(units, state, context, second_order=True, limits=DEFAULT)
    assert len(set(expected.values())) > 1
    files, in_file = [], ActivationCache._in_file
    monkeypatch.setattr(ActivationCache, "_in_file", lambda self, *what: files.append(what) or in_file(self, *what))
    assert choose_widths(units, state, context, second_order=True, limits=Limits(1, 1, 0)) == expected
    assert files


def test_weights_alone_are_measured_without_data(tiny: Any, tmp_path: Any) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    model, block = state.model.skeleton(torch.float32), state.model.layout.blocks[1]
    state.model.load_block(model, 1)
    bank = block.bank
    meter = ErrorMeter(model, {bank.down: SPECS})
    meter.measure_without_data(block)
    module = model.get_submodule(bank.module)
    weights = expert_weight(module, bank, bank.down, slice(0, bank.num_experts)).flatten(0, 1)
    pairs = [lost(weights, torch.eye(weights.shape[1]), spec) for spec in SPECS]
    assert meter.error([bank.down]) == pytest.approx([above / below for above, below in pairs], rel=1e-5)


def test_blocks_behind_the_last_measured_one_are_not_read(
    tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny.state(tmp_path / "model", "mixtral", num_hidden_layers=3)
    units = auto_units((Rule("first", r"layers\.[01]\..*proj", (), AutoBits(2.75), 16),), state.model.layout)
    read, load = [], state.model.load_block
    monkeypatch.setattr(state.model, "load_block", lambda *what: read.append(what[1]) or load(*what))
    chosen = choose_widths(units, state, tiny.context(tmp_path), second_order=True, limits=DEFAULT)
    assert read == [0, 1] and {name.split(".")[2] for name in chosen} == {"0", "1"}


def test_plans_count_the_pass_that_measures(tiny: Any, tmp_path: Any) -> None:
    layout = tiny.state(tmp_path / "model", "mixtral").model.layout

    def flops(bits: Any) -> float:
        rules = {"all": {"match": "proj", "bits": bits, "group_size": 16}}
        config = GptqConfig.model_validate({"rules": rules, "diagnose_experts": False})
        return Gptq("quantize", config).estimate(PlanInputs(layout, 2, 4, 6, 32, {}, "cpu")).flops

    plan = {name: QuantSpec(3, 16) for name, *_ in layout.quantizable()}
    passes = sizes.forward_flops(layout, 6 * 32, 32) + sizes.hessian_flops(layout, plan, 6 * 32)
    # the energy of a weight and of its errors at three widths, each from half of a symmetric matrix
    energies = sum(4.0 * torch.Size(shape).numel() * shape[-1] for _, _, shape, _ in layout.quantizable())
    assert flops({"auto": 3}) - flops(3) == pytest.approx(passes + energies)
