"""What config.json says about native decoding."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.inference import recurrent
from llmcompress.inference.coverage import FAMILIES, STATES, decline_config


def test_states_are_those_of_their_engine() -> None:
    assert STATES == recurrent.FAMILIES


def test_every_family_has_a_model_in_the_tests_of_the_engine(decoders: Any) -> None:
    assert set(FAMILIES) == set(decoders.families)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "mamba2"}, None),
        ({"model_type": "bamba", "partial_rotary_factor": 0.5}, None),
        ({"model_type": "granitemoehybrid", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"model_type": "gpt_oss"}, "gpt_oss"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mamba2", "hidden_act": "gelu"}, "gelu"),
        # of transformers 4, of older ones, of 5
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"model_type": "qwen2", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "olmoe", "clip_qkv": None}, None),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_a_config_tells(config: dict[str, Any], reason: str | None) -> None:
    told = decline_config(config)
    assert told is None if reason is None else reason in str(told)
