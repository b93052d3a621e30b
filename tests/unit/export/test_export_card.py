from __future__ import annotations

from typing import Any

import pytest
import yaml

from llmcompress.export.card import card_text, results_table, weights_table
from llmcompress.export.native import NativeExporter
from llmcompress.export.provenance import front_matter
from llmcompress.export.registry import exporter
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.state import Metric

FACTS: dict[str, Any] = {
    "recipe": {"name": "quick", "stages": {"q": {"type": "qesc", "damp": 0.01}}},
    "source": {"name": "org/model", "model_type": "mixtral", "license": "apache-2.0"},
    "calibration": {"sha256": "ab12", "file": "books.txt"},
    "versions": {"llmcompress": "0.1.0"},
}


def test_card_holds_all_sections_and_valid_front_matter() -> None:
    plan = {"a": QuantSpec(3, 128, False), "b": QuantSpec(4, -1, True)}
    metrics = [Metric("wiki", "perplexity", 5.0, 5.5), Metric("fidelity", "kl", None, 0.01)]
    text = card_text(exporter("native"), FACTS, plan, metrics, {"pesf": {"alpha": 0.3, "scope": "batch"}})
    front = front_matter(text)
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "org/model"
    for heading in (
        "Loading",
        "Weights",
        "Results",
        "Run-time policies",
        "Deviations",
        "Recipe",
        "Provenance",
        "Licence",
    ):
        assert f"\n## {heading}" in text
    assert "import llmcompress.hf" in text
    assert "| wiki | perplexity | 5 | 5.5 | +0.5 |" in text
    assert "| fidelity | kl |  | 0.01 |  |" in text
    assert "- calibration sha256: ab12" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == FACTS["recipe"]


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "dense"])
def test_other_formats_say_that_policies_are_lost(name: str) -> None:
    text = card_text(exporter(name), FACTS, {}, [], {"pesf": {"alpha": 0.3}})
    assert "Not carried by this format" in text
    assert "import llmcompress.hf" not in text


def test_what_a_format_carries_and_what_it_lacks_stand_apart() -> None:
    text = card_text(exporter("gguf"), FACTS, {}, [], {"pesf": {"alpha": 0.3}, "embeddings": {"bits": 8}})
    carried, lost = text.split("Active after loading.")[1].split("Not carried by this format.")
    assert "`embeddings`" in carried and "`pesf`" not in carried
    assert "`pesf`" in lost and "`embeddings`" not in lost.split("##")[0]
    native = card_text(exporter("native"), FACTS, {}, [], {"pesf": {"alpha": 0.3}})
    assert "Active after loading." in native and "Not carried" not in native


def test_a_format_that_does_not_say_how_it_is_loaded_has_a_card() -> None:
    class Mine(NativeExporter):
        name, loading = "mine", ""

    text = card_text(Mine(), FACTS, {}, [], {})
    assert "format `mine`" in text
    assert "## Loading" not in text


def test_timings_stay_out_of_the_table() -> None:
    table = results_table([Metric("e", "seconds", 1.0, 2.0), Metric("e", "acc", 0.5, 0.5)])
    assert "seconds" not in table
    assert "acc" in table


def test_tables_count_schemes() -> None:
    table = weights_table({"a": QuantSpec(3), "b": QuantSpec(3), "c": QuantSpec(4, -1, True)})
    assert "| 2 | 3 | 128 | asymmetric |" in table
    assert "| 1 | 4 | row | symmetric |" in table


@pytest.mark.parametrize(("name", "carries"), [("native", True), ("gguf", True), ("dense", False)])
def test_embeddings_in_low_bits_are_not_called_dense(name: str, carries: bool) -> None:
    for plan in ({}, {"a": QuantSpec(4, -1, True)}):
        text = card_text(exporter(name), FACTS, plan, [], {"embeddings": {"bits": 8, "group_size": -1}})
        weights = text.split("## Weights")[1].split("##")[0]
        assert ("mbedding and head have 8 bits, everything else is stored dense." in weights) == carries


def test_text_cannot_break_the_table() -> None:
    assert "a\\|b" in results_table([Metric("a|b", "acc", 0.5, 0.5)])
