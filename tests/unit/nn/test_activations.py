from __future__ import annotations

from typing import Any

import torch

from llmcompress.models.registry import layout_from_config
from llmcompress.nn.activations import attach, float_activations, round_per_token


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
