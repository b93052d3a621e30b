"""A quantizer of one's own: a config that says by what method, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llmcompress.algorithms.grids import find_grid
from llmcompress.algorithms.rounding import Rounded, round_weights
from llmcompress.quant.codecs import int_group
from llmcompress.stages import stage_types
from llmcompress.stages.base import Kind
from llmcompress.stages.blockwise.method import Method
from llmcompress.stages.blockwise.quantizer import Quantizer, QuantizerConfig

RULES = {"all": {"match": "_proj$", "bits": 4, "group_size": 16, "symmetric": False}}


@dataclass(frozen=True)
class Down(Method):
    """Rounds towards the lower code."""

    def solve(self, w: Any, hessian: Any, spec: Any, usable: Any, dtype: Any, warn: Any) -> Rounded:
        assert hessian is None and usable is None
        scale, zero = find_grid(w.float(), spec, "minmax")
        steps = torch.repeat_interleave(scale.float(), spec.group(w.shape[-1]), -1)
        middle = torch.repeat_interleave(zero.float(), spec.group(w.shape[-1]), -1)
        codes = (w / steps + middle).floor().clamp(0, spec.levels - 1).to(torch.uint8)
        values = int_group.dequantize(codes, scale, zero, spec)
        warn("rounded down")
        return Rounded(codes, scale, zero, values, (values - w).square().sum(-1), w.square().sum(-1))


class DownConfig(QuantizerConfig):
    """Recipe section of the stage."""

    type: Literal["down"] = "down"

    def method(self) -> Method:
        return Down()


class DownStage(Quantizer):
    """The stage."""

    Config = DownConfig
    consumes = frozenset({Kind.MODEL})


def test_a_method_of_ones_own_chooses_the_codes(tiny: Any, tmp_path: Path) -> None:
    state, events = tiny.state(tmp_path / "model", "mixtral"), []
    stage = DownStage("quantize", DownConfig.model_validate({"rules": RULES}))
    assert stage.check(state.model.layout) == []
    stage.run(state, tiny.context(tmp_path, events=events))
    name = "model.layers.1.self_attn.o_proj"
    weight = state.model.checkpoint.tensor(f"{name}.weight").float()[None]
    spec = state.packed.plan()[name]
    expected = Down().solve(weight, None, spec, None, None, str)
    found = int_group.decode(state.packed.read_block(1).packed[name])
    assert torch.equal(found, expected.quantized[0])
    assert not torch.equal(found, round_weights(weight, spec, "minmax", torch.float32).quantized[0])
    assert any(event.data.get("text") == "model.layers.1: rounded down" for event in events)


def test_a_config_without_a_method_is_no_quantizer() -> None:
    class Nothing(QuantizerConfig):
        """Says nothing."""

        type: Literal["nothing"] = "nothing"

    with pytest.raises(TypeError, match="abstract method"):
        Nothing.model_validate({"rules": RULES})


def test_calibration_is_consumed_where_the_method_looks_at_activations() -> None:
    quantizers = {name: stage for name, stage in stage_types().items() if issubclass(stage, Quantizer)}
    assert set(quantizers) == {"rtn", "gptq", "qesc"}
    for name, stage in quantizers.items():
        config = stage.Config.model_validate({"rules": RULES})
        assert (Kind.CALIBRATION in stage.consumes) == config.method().hessians, name
