from __future__ import annotations

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.experts import PackedExperts
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.packed import PackedTensors
from llmcompress.nn.swap import swap_modules
from llmcompress.quant.spec import QuantSpec


def test_only_what_the_plan_names_is_replaced(tiny) -> None:
    model = tiny.model("qwen2_moe")
    layout = layout_from_config(model.config.to_dict())
    plan = {
        "model.layers.0.self_attn.q_proj": QuantSpec(4, 16),
        "model.layers.1.mlp.experts.down_proj": QuantSpec(2, 16),
    }
    swap_modules(model, layout, plan, torch.bfloat16)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedTensors | PackedExperts)}
    assert packed == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts", "model.layers.1.mlp.experts.down_proj",
    }  # fmt: skip
    query = model.model.layers[0].self_attn.q_proj
    assert isinstance(query, PackedLinear)
    assert query.bias.dtype == torch.bfloat16
    assert query.spec == QuantSpec(4, 16)
    assert not query.training


def test_constants_of_gpt_oss_come_from_the_model(tiny) -> None:
    model = tiny.model("gpt_oss", swiglu_limit=3.0, swiglu_alpha=1.5)
    layout = layout_from_config(model.config.to_dict())
    swap_modules(model, layout, {"model.layers.0.mlp.experts.gate_up_proj": QuantSpec(4, 16)})
    experts = model.model.layers[0].mlp.experts
    assert (experts.alpha, experts.limit) == (1.5, 3.0)


def test_unknown_names_are_refused(tiny) -> None:
    model = tiny.model("mixtral")
    with pytest.raises(InputError, match="q_prj") as caught:
        plan = {"model.layers.0.self_attn.q_prj": QuantSpec(4)}
        swap_modules(model, layout_from_config(model.config.to_dict()), plan)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value.hint)
