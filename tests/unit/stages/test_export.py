from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmcompress.errors import ExportError
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.base import Kind, PlanInputs
from llmcompress.stages.export import Export, ExportConfig
from llmcompress.stages.state import RunContext, RunState

LLAMA = layout_from_config(
    {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }
)  # fmt: skip


def stage(**fields: object) -> Export:
    return Export("export", ExportConfig.model_validate({"type": "export", **fields}))


def plan(spec: QuantSpec) -> dict[str, QuantSpec]:
    return {name: spec for name, _, _, _ in LLAMA.quantizable()}


def inputs(spec: QuantSpec) -> PlanInputs:
    return PlanInputs(LLAMA, 2, 4, 0, 0, plan(spec), "cpu")


@pytest.mark.parametrize("bad", [{"formats": []}, {"formats": ["onnx"]}, {"format": "native"}, {"dense_dtype": "int8"}])
def test_malformed_sections_are_rejected(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        stage(**bad)


def test_defaults() -> None:
    config = stage().config
    assert config.formats == ("native",)
    assert Export.produces == frozenset({Kind.ARTIFACT})


def test_refusals_are_known_without_weights() -> None:
    found = stage(formats=["native", "compressed-tensors", "gguf"]).refusals(LLAMA, plan(QuantSpec(3, 32)), {})
    assert set(found) == {"compressed-tensors", "gguf"}


def test_plan_prices_what_can_be_written_and_says_what_cannot() -> None:
    good = stage(formats=["native", "dense"]).estimate(inputs(QuantSpec(4, 32, True)))
    linears = 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 96 * 64)
    rest = 2 * 96 * 64 + 5 * 64
    packed = linears // 2 + linears // 32 * 2
    assert good.output == (packed + 2 * rest) + 2 * (linears + rest)
    bad = stage(formats=["native", "gguf"]).estimate(inputs(QuantSpec(3, 32, True)))
    assert bad.output < good.output
    assert any("gguf would be refused" in note for note in bad.notes)
    assert good.refusals == ()
    assert "3-bit symmetric weights have no GGML type" in bad.refusals[0]


def test_plan_counts_packed_embeddings_where_a_format_has_them() -> None:
    every = replace(inputs(QuantSpec(4, 32, True)), policies={"embeddings": {"bits": 8, "group_size": 32}})
    rows, codes = 2 * 96, 2 * 96 * 64
    for name in ("native", "gguf"):
        plain = stage(formats=[name]).estimate(inputs(QuantSpec(4, 32, True)))
        # two groups of a row, with a scale of two bytes each, in either format
        assert stage(formats=[name]).estimate(every).output == plain.output - 2 * codes + codes + rows * 2 * 2
    assert stage(formats=["dense"]).estimate(every) == stage(formats=["dense"]).estimate(inputs(QuantSpec(4, 32, True)))
    short = replace(every, policies={"embeddings": {"bits": 8, "group_size": 16}})
    assert "embeddings in groups of 16 columns" in stage(formats=["gguf"]).estimate(short).refusals[0]


def test_the_source_is_judged_before_any_work(tmp_path: Path) -> None:
    stage(formats=["native", "dense"]).require_source(tmp_path, {})
    config = {"rope_scaling": {"type": "yarn"}, "sliding_window": 128, "max_position_embeddings": 512}
    with pytest.raises(ExportError) as caught:
        stage(formats=["native", "gguf"]).require_source(tmp_path, config)
    for reason in ("no tokenizer.json", "rotary scaling 'yarn'", "window of 128"):
        assert reason in caught.value.message
    assert caught.value.hint == "take gguf out of stages.export.formats"


def test_targets_are_siblings(tmp_path: Path) -> None:
    context = RunContext(tmp_path, "export", tmp_path, 0, "cpu", "float32", {}, lambda event: None)
    (tmp_path / "artifact").mkdir()
    state = RunState()
    with pytest.raises(ExportError, match="artifact-gguf: the artifact of a finished stage is gone"):
        stage(formats=["native", "gguf"]).restore(state, context)
    (tmp_path / "artifact-gguf").mkdir()
    stage(formats=["native", "gguf"]).restore(state, context)
    assert state.artifacts == {"native": tmp_path / "artifact", "gguf": tmp_path / "artifact-gguf"}


def test_without_a_model_the_stage_says_what_is_missing(tmp_path: Path) -> None:
    context = RunContext(tmp_path, "export", tmp_path, 0, "cpu", "float32", {}, lambda event: None)
    with pytest.raises(ExportError, match="quantizing stage"):
        stage().run(RunState(), context)


def test_config_refusals_and_estimates_need_no_torch() -> None:
    code = (
        "import sys; from llmcompress.stages.export import Export, ExportConfig;"
        "from llmcompress.models.registry import layout_from_config; from llmcompress.stages.base import PlanInputs;"
        "layout = layout_from_config({'model_type': 'llama', 'num_hidden_layers': 1});"
        "stage = Export('e', ExportConfig(type='export', formats=('native', 'compressed-tensors', 'gguf', 'dense')));"
        "stage.estimate(PlanInputs(layout, 2, 4, 0, 0, {}, 'cpu')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
