from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmcompress.models.assemble import compressed_model
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.activations import attach, float_activations, round_per_token
from llmcompress.nn.linear import PackedLinear
from llmcompress.quant.store import PackedStore
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.rtn import Rtn, RtnConfig


def test_each_token_has_its_own_scale() -> None:
    x = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    )
    rounded = round_per_token(x)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((rounded - x).abs() <= 0.5001 * scale).all())
    assert torch.equal(round_per_token(torch.zeros(2, 4)), torch.zeros(2, 4))
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)


def test_only_the_named_roles_are_rounded(tiny: Any) -> None:
    model = tiny.model("bamba")
    layout = layout_from_config(model.config.to_dict())
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        plain = model(ids).logits
        attach(model, layout, {"bits": 8, "roles": ["attention"]})
        seen = model(ids).logits
        with float_activations(model):
            assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(seen, plain)
    assert float((seen - plain).norm()) < 0.1 * float(plain.norm())


def test_chunks_are_rounded_inside_packed_linears_and_before_dense_ones(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    ids = torch.randint(3, 64, (2, 9))
    rules = {"projections": {"role": "ssm", "bits": 8, "group_size": -1, "symmetric": True}}
    empty = PackedStore(tmp_path / "nothing")
    with torch.no_grad():
        plain = compressed_model(state.model, empty, {}, torch.float32)(ids).logits
        Activations("activations", ActivationsConfig(granularity="chunk")).run(state, tiny.context(tmp_path))
        seen = compressed_model(state.model, empty, state.policies, torch.float32)(ids).logits
        assert 0 < float((seen - plain).norm()) < 0.05 * float(plain.norm())
        Rtn("weights", RtnConfig.model_validate({"rules": rules})).run(state, tiny.context(tmp_path))
        model = compressed_model(state.model, state.packed, state.policies, torch.float32)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert packed
        assert all(module.int8_activations for module in packed)
        rounded = model(ids).logits
        with float_activations(model):
            exact = compressed_model(state.model, state.packed, {}, torch.float32)(ids).logits
            assert torch.equal(model(ids).logits, exact)
        assert torch.equal(model(ids).logits, rounded)
        assert not torch.equal(rounded, exact)
