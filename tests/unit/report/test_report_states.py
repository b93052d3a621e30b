from __future__ import annotations

from llmcompress.report.states import life_text, states_section


def test_section_counts_heads_bits_and_memory() -> None:
    entry = {
        "policy": {"bits": 4, "codec": "dsq", "head_bits": {"m": [4, 8, 6]}},
        "heads": {"m": {"half_lives": [10.0, None, 300.0], "errors": [0.1, 0.3, 0.2]}},
        "memory": [{"batch": 8, "weights": 1000, "states": 500, "convolution": 20, "float_states": 4000}],
    }
    found = states_section(entry)
    assert found["bits"] == "4 to 8"
    (row,) = found["rows"]
    assert (row["bits"], row["middle"], row["longest"], row["error"], row["worst"]) == (
        "6.00", "300", "never", "0.200", "0.300",
    )  # fmt: skip
    (memory,) = found["memory"]
    assert memory["batch"] == 8
    assert memory["total"].split()[0] == "1.52"
    policies = ({"bits": 4, "head_bits": {"m": [4, 4, 6]}}, {"bits": 8}, {})
    assert [states_section({**entry, "policy": policy})["bits"] for policy in policies] == [
        "4 to 6", "8", "",
    ]  # fmt: skip


def test_half_lives_read_well() -> None:
    assert life_text(12.345) == "12.3"
