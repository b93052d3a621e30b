from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress.models.registry import layout_from_config
from llmcompress.models.state_memory import memory_table, sequence_bytes

CONFIGS = Path(__file__).parents[2] / "data" / "hub_configs"
# the specification's table: state elements and convolution states of one sequence
PUBLISHED = {"mamba2_130m": (4_718_592, 0.34), "mamba2_370m": (12_582_912, 0.88), "mamba2_2b7": (41_943_040, 2.75),
             "mamba_2b8": (5_242_880, 2.6)}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_released_models(name: str) -> None:
    layout = layout_from_config(json.loads((CONFIGS / f"{name}.json").read_text()))
    states, convolution, floats = sequence_bytes(layout, None, 2)
    elements, megabytes = PUBLISHED[name]
    assert floats == states == 4 * elements
    assert convolution / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_four_bit_states_cost_4_375_bits() -> None:
    layout = layout_from_config(json.loads((CONFIGS / "mamba2_2b7.json").read_text()))
    states, _, floats = sequence_bytes(layout, {"bits": 4, "codec": "dsq"}, 2)
    assert states * 8 / (floats / 4) == 4.375
    replayed, _, _ = sequence_bytes(layout, {"bits": 4, "codec": "dsq", "window": 17}, 2)
    # the specification counts 11.1 MB for a window of 16 kept tokens in half precision; they are kept in fp32
    assert (replayed - states) / 1e6 == pytest.approx(2 * 11.1, abs=0.4)
    assert sequence_bytes(layout, {"bits": 16, "codec": "none", "window": 17}, 2)[0] == floats
    rows = memory_table(layout, 1000, {"bits": 4, "codec": "dsq"})
    assert [row.batch for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert rows[3].states == 8 * states


def test_gated_delta_rules_keep_a_state_for_every_value_head() -> None:
    layout = layout_from_config(json.loads((CONFIGS / "qwen3_next_80b_a3b.json").read_text()))
    states, convolution, floats = sequence_bytes(layout, None, 2)
    # 36 of 48 layers with 32 heads of 128 by 128, and 4 inputs of 2 x 16 x 128 + 32 x 128 channels each
    assert floats == states == 36 * 32 * 128 * 128 * 4
    assert convolution == 36 * (2 * 16 * 128 + 32 * 128) * 4 * 2
    # a scale for each column of a key and of a value
    assert sequence_bytes(layout, {"bits": 4, "codec": "dsq"}, 2)[0] * 8 / (floats / 4) == 4 + 16 * 256 / 128**2
    row = 32 * 128 + 32 + 16 * 128
    replayed = sequence_bytes(layout, {"bits": 4, "codec": "dsq", "window": 4}, 2)[0]
    assert replayed - sequence_bytes(layout, {"bits": 4, "codec": "dsq"}, 2)[0] == 36 * (3 * row * 4 + 4)


def test_kimi_delta_attention_keeps_a_decay_for_every_column_of_a_key() -> None:
    layout = layout_from_config(json.loads((CONFIGS / "kimi_linear_48b_a3b.json").read_text()))
    states, convolution, floats = sequence_bytes(layout, None, 2)
    # 20 of 27 layers with 32 heads of 128 by 128
    assert floats == states == 20 * 32 * 128 * 128 * 4
    assert convolution == 20 * 3 * 32 * 128 * 4 * 2
    row = 3 * 32 * 128
    replayed = sequence_bytes(layout, {"bits": 4, "codec": "dsq", "window": 4}, 2)[0]
    assert replayed - sequence_bytes(layout, {"bits": 4, "codec": "dsq"}, 2)[0] == 20 * (3 * row * 4 + 4)


def test_models_without_states_have_no_table() -> None:
    layout = layout_from_config(json.loads((CONFIGS / "qwen3_30b_a3b.json").read_text()))
    assert memory_table(layout, 1000, None) == []
