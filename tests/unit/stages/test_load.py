from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmcompress.errors import InputError, RecipeError
from llmcompress.models.registry import layout_from_config
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.load import Load, LoadConfig
from llmcompress.stages.state import RunContext, RunState


def context(tmp_path, **model):
    stage_dir = tmp_path / "stages" / "load"
    stage_dir.mkdir(parents=True, exist_ok=True)
    events = []
    ctx = RunContext(tmp_path, "load", stage_dir, 0, "cpu", "float32", {"model": model}, events.append)
    return ctx, events


def stage(**fields):
    return Load("load", LoadConfig(type="load", **fields))


def test_opens_the_model_and_restores_it(tmp_path, tiny_folder):
    ctx, events = context(tmp_path, path=str(tiny_folder))
    state = RunState()
    stage().run(state, ctx)
    assert state.model is not None and state.model.layout.model_type == "mixtral"
    assert "mixtral" in events[-1].data["text"]
    again = RunState()
    stage().restore(again, ctx)
    assert again.model is not None and again.model.parameters == state.model.parameters


def test_nan_weights_are_refused_unless_told_otherwise(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("o_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ctx, _ = context(tmp_path, path=str(folder))
    with pytest.raises(InputError, match="NaN") as caught:
        stage().run(RunState(), ctx)
    assert name in caught.value.message
    stage(check_finite=False).run(RunState(), ctx)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "1e-6"),
        ("dtype", "floaty"),
        ("pad_token_id", 10**6),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": "a"}),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 0, "factor": 0},
        ),
    ],
)
def test_a_config_that_transformers_cannot_use_is_refused_by_the_first_stage(tmp_path, tiny_folder, key, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    ctx, _ = context(tmp_path, path=str(folder))
    with pytest.raises(InputError, match="transformers") as caught:
        stage().run(RunState(), ctx)
    assert f"{folder}/config.json" in caught.value.message


def test_quantized_models_are_refused(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    ctx, _ = context(tmp_path, path=str(folder))
    with pytest.raises(InputError, match="gptq"):
        stage().run(RunState(), ctx)


def test_missing_model(tmp_path):
    ctx, _ = context(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.path: missing"):
        stage().run(RunState(), ctx)
    ctx, _ = context(tmp_path, path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError):
        stage().run(RunState(), ctx)


def test_estimate_is_the_largest_tensor(tiny):
    layout = layout_from_config(tiny.config("mixtral").to_dict())
    largest = max(v[0] * v[1] * v[2] for _, _, v, _ in layout.quantizable() if len(v) == 3)
    inputs = PlanInputs(layout, 2, 4, 0, 0, {}, "cpu")
    assert stage().estimate(inputs).ram == 2 * largest
    assert stage(check_finite=False).estimate(inputs).ram == 0
