"""What members of a family must agree on to be in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.models.family_model import _numbers
from llmcompress.models.handle import meta_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "one", "other"),
    [
        ("gemma2", {}, {"hidden_activation": "relu"}),
        ("qwen2", WINDOWS, {**WINDOWS, "max_window_layers": 0}),
        ("llama", {}, {"rms_norm_eps": 1e-3}),
    ],
)
def test_what_changes_a_row_is_seen(model_type: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    from transformers import AutoConfig

    def numbers(changes: dict[str, Any]) -> str:
        return _numbers(meta_model(AutoConfig.for_model(model_type, **{**SMALL, **changes}), torch.float32))

    assert numbers(one) == numbers(dict(one)) != numbers(other)
