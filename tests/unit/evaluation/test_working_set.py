"""Memory of evaluation beside the models, against products worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.evaluation.working_set import peak_bytes
from llmcompress.models.registry import layout_from_config
from llmcompress.stages.evaluate import EvaluateConfig

VOCABULARY = 50_000
SOURCE = {"kind": "inline", "texts": ["some text"]}
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def peak(**section: Any) -> int:
    config = EvaluateConfig.model_validate({"type": "evaluate", **section})
    return peak_bytes(config, layout_from_config(LLAMA), 4)


def text(**values: Any) -> dict[str, Any]:
    return {"heldout": {"source": SOURCE, "length": 128, **values}}


def test_nothing_measured_needs_nothing():
    assert peak() == 0


def test_perplexity_holds_logits_two_copies_of_the_scored_rows_and_activations():
    rows = 2 * 128
    expected = rows * VOCABULARY * 4 + 2 * 128 * VOCABULARY * 4 + rows * 4 * 64 * 4
    assert peak(perplexity=text(), batch=2) == expected


def test_a_short_text_does_not_fill_the_batch():
    assert peak(perplexity=text(max_tokens=256), batch=32) == peak(perplexity=text(), batch=2)
    assert peak(perplexity=text(max_tokens=256, stride=64), batch=32) == peak(perplexity=text(), batch=4)


def test_fidelity_holds_both_models_logits():
    fidelity = {"source": SOURCE, "length": 128, "samples": 3}
    expected = 2 * 384 * VOCABULARY * 4 + 5 * 128 * VOCABULARY * 4 + 384 * 4 * 64 * 4
    assert peak(fidelity=fidelity, batch=32) == expected


def test_greedy_samples_keep_a_copy_in_bfloat16():
    values = 2 * VOCABULARY * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert peak(generation={"prompts": ["a"]}) == 2 * values
    assert peak(generation={"prompts": ["a"], "temperature": 1.0}) == 0


@pytest.mark.parametrize("tasks", [["piqa"]])
def test_tasks_normalise_a_batch_at_once(tasks):
    assert peak(tasks=tasks) == 2 * 256 * VOCABULARY * 4 * 5


def test_expert_shift_adds_what_the_routers_said(tiny):
    layout = layout_from_config(tiny.config("mixtral").to_dict())

    def mixtral(shift: bool) -> int:
        section = {"type": "evaluate", "perplexity": text(max_tokens=256), "batch": 2, "expert_shift": shift}
        return peak_bytes(EvaluateConfig.model_validate(section), layout, 4)

    assert mixtral(True) - mixtral(False) == 2 * 256 * 4 * 2 * (8 + 3 * 2)
