from __future__ import annotations

import pytest

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts


def test_file_beats_alias_beats_default() -> None:
    defaults, aliases = {"experts": 8}, {"experts": "num"}
    assert Facts({}, defaults, aliases).size("experts") == 8
    assert Facts({"num": 4}, defaults, aliases).size("experts") == 4
    assert Facts({"num": 4, "experts": 2}, defaults, aliases).size("experts") == 2


def test_null_is_a_value_of_its_own() -> None:
    facts = Facts({"rank": None, "flag": None, "layers": None}, {"rank": 16, "flag": True, "layers": [1]})
    assert facts.optional_size("rank") is None
    assert facts.flag("flag") is False
    assert facts.indices("layers") == frozenset()


def test_derived_sizes() -> None:
    facts = Facts({"hidden_size": 64, "num_attention_heads": 4}, {})
    assert (facts.kv_heads, facts.head_dim) == (4, 16)
    facts = Facts({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}, {})
    assert (facts.kv_heads, facts.head_dim) == (2, 32)


@pytest.mark.parametrize(
    ("method", "value"),
    [("size", 1.5), ("size", -1), ("flag", 1), ("number", "2"), ("number", True), ("indices", 3), ("indices", ["a"])],
)
def test_wrong_types_are_refused(method: str, value: object) -> None:
    with pytest.raises(InputError, match="key"):
        getattr(Facts({"key": value}, {}), method)("key")


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="relu2"):
        Facts({"hidden_act": "relu2"}, {}).activation()


def test_sizes_beyond_any_model_are_refused() -> None:
    # a damaged file would ask for the names of a billion layers
    for key, most in (("num_hidden_layers", 10_000), ("num_experts", 10_000), ("vocab_size", 2**31 - 1)):
        assert Facts({key: most}, {}).size(key) == most
        with pytest.raises(InputError, match=f"{key} is {most + 1}"):
            Facts({key: most + 1}, {}).size(key)
