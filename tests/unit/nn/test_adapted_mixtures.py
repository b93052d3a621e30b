"""Mixtures that transformers writes otherwise, wherever a model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.hf import load
from llmcompress.inference.speed import rounded
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.adapted_mixtures import adapt_mixtures
from llmcompress.nn.experts import PackedExperts
from llmcompress.quant.spec import QuantSpec

IDS = torch.arange(24).reshape(2, 12) % 60 + 3


def plain(tiny: Any, family: str) -> Any:
    """A random model with transformers' own modules."""
    from transformers import AutoModelForCausalLM

    source = tiny.model(family)
    model = AutoModelForCausalLM.from_config(source.config).float().eval()
    model.load_state_dict(source.state_dict())
    return model.requires_grad_(False)


def bank_of(model: Any) -> Any:
    return next(b.bank for b in layout_from_config(model.config.to_dict()).blocks if b.bank is not None)


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text"])
def test_dense_folders_are_loaded_with_routers_like_all_others(tiny: Any, family: str, tmp_path: Path) -> None:
    model = plain(tiny, family)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    bank = bank_of(loaded)
    router, x = Router(loaded, bank.router), torch.randn(7, bank.width)
    logits, weights, index = router(x)
    assert (logits.shape, weights.shape, index.shape) == ((7, 8), (7, bank.top_k), (7, bank.top_k))
    # what calibration solves for: the matrix times what it reads
    matrix = router.parameters()[bank.router.weight]
    torch.testing.assert_close(logits, router.entered(x) @ matrix.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text"])
def test_weights_are_packed_in_place_and_stay_so(tiny: Any, family: str) -> None:
    expected = plain(tiny, family)(IDS).logits
    model = rounded(plain(tiny, family), QuantSpec(8, 16))
    found = model(IDS).logits
    # of 8 bits; a token at a routing boundary may change experts
    assert float((found - expected).norm(dim=-1).div(expected.norm(dim=-1)).median()) < 2e-2
    adapt_mixtures(model, layout_from_config(model.config.to_dict()))
    assert isinstance(model.get_submodule(bank_of(model).module), PackedExperts)
    assert torch.equal(model(IDS).logits, found)


def test_the_inner_model_is_found_without_experts(tiny: Any) -> None:
    model = tiny.model("llama4_text", moe_layers=[])
    model.base_model_prefix = "language_model"  # as transformers has it
    adapt_mixtures(model, layout_from_config(model.config.to_dict()))
    assert model.base_model is model.model
