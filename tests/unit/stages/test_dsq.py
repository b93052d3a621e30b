"""Stage dsq on tiny models: what it measures, the policy, resume, and an artifact that switches it on by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import InputError, RecipeError
from llmcompress.export.dense import DenseExporter
from llmcompress.export.native import write_native
from llmcompress.export.readers import SafetensorsFolder
from llmcompress.models.assemble import compressed_model
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import runtime_of
from llmcompress.nn.states import cache_bytes
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.dsq import Dsq, DsqConfig
from llmcompress.stages.gptq import Gptq, GptqConfig

RULES = {"all": {"match": ".", "bits": 8, "group_size": -1, "symmetric": True}}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def stage(**options: Any) -> Dsq:
    return Dsq("states", DsqConfig(**{"samples": 3, "tokens": 24, **options}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_it_measures_every_head(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "bamba")
    stage().run(state, tiny.context(tmp_path, "states"))
    records = [state.packed.read_block(index).record.get("states") for index in range(3)]
    assert records[1] is None, "block 1 is attention"
    for record in (records[0], records[2]):
        errors = record["errors"]
        assert len(record["half_lives"]) == len(errors["4"]) == 8
        assert all(life > 0 for life in record["half_lives"])
        assert sum(errors["8"]) < sum(errors["6"]) < sum(errors["4"])
    assert state.policies["state_cache"]["bits"] == 4


def test_errors_are_those_of_the_replay_window(tiny: Any, tmp_path: Path) -> None:
    errors = {}
    for window in (1, 6):
        for family in ("mamba", "mamba2"):
            state = tiny.state(tmp_path / family, family)
            stage(replay_window=window).run(state, tiny.context(tmp_path / f"{family}{window}", "states"))
            assert state.policies["state_cache"]["window"] == window
            errors[family, window] = sum(state.packed.read_block(0).record["states"]["errors"]["4"])
    assert errors["mamba", 6] < 0.8 * errors["mamba", 1]
    assert errors["mamba2", 6] < 0.8 * errors["mamba2", 1]


def test_half_lives_are_those_of_the_weights(tiny: Any, tmp_path: Path) -> None:
    """With in_proj's time-step rows at zero, dt is softplus(dt_bias) for every token."""
    model = tiny.model("mamba2")
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.weight[-8:] = 0
    model.save_pretrained(tmp_path / "model")
    state = tiny.state(tmp_path / "model", "mamba2")
    stage().run(state, tiny.context(tmp_path, "states"))
    for index, layer in enumerate(model.backbone.layers):
        rate = torch.nn.functional.softplus(layer.mixer.dt_bias) * layer.mixer.A_log.exp()
        found = state.packed.read_block(index).record["states"]["half_lives"]
        torch.testing.assert_close(torch.tensor(found), 0.6931472 / rate.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "mamba", "granitemoehybrid", "qwen3_5_text"])
@pytest.mark.parametrize("codec", ["dsq", "dsq_static_p", "dsq_t"])
def test_artifact_loads_with_states_and_activations_on(family: str, codec: str, tiny: Any, tmp_path: Path) -> None:
    from llmcompress import hf

    state = tiny.state(tmp_path / "model", family, samples=8)
    Gptq("quantize", GptqConfig(rules=RULES, diagnose_experts=False)).run(state, tiny.context(tmp_path))
    stage(codec=codec).run(state, tiny.context(tmp_path, "states"))
    Activations("activations", ActivationsConfig()).run(state, tiny.context(tmp_path, "activations"))
    compressed = compressed_model(state.model, state.packed, state.policies)
    write_native(state.model, state.packed, state.policies, tmp_path / "artifact", {})
    loaded, _ = hf.load(tmp_path / "artifact", dtype=torch.float32)
    assert runtime_of(loaded) is not None
    assert torch.equal(logits(loaded), logits(compressed))
    without = compressed_model(state.model, state.packed, {"activations": state.policies["activations"]})
    assert not torch.equal(logits(without), logits(compressed))
    assert not torch.equal(logits(without), logits(compressed_model(state.model, state.packed, {})))
    result = loaded.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = getattr(result, "past_key_values", None) or result.cache_params
    held = next(layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states"))
    assert held.packed
    assert 0 < cache_bytes(cache).states < 2 * held.quantizer.scan.values * 4 * 2


def test_widths_per_head_keep_to_the_budget(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    stage(head_bits="auto", avg_bits=5.0).run(state, tiny.context(tmp_path, "states"))
    widths = state.policies["state_cache"]["head_bits"]
    every = [bits for layer in widths.values() for bits in layer]
    assert len(every) == 16
    assert sum(every) <= 5.0 * 16
    assert len(set(every)) > 1
    again = tiny.state(tmp_path / "model", "mamba2")
    stage(head_bits="auto", avg_bits=5.0).restore(again, tiny.context(tmp_path, "states"))
    assert again.policies == state.policies
    compressed_model(state.model, state.packed, state.policies).generate(IDS, max_new_tokens=2)


def test_a_stopped_stage_goes_on_and_ends_in_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    stage(codec="dsq_static_p").run(state, tiny.context(tmp_path / "whole", "states"))
    broken = tiny.context(tmp_path / "broken", "states")
    again = tiny.state(tmp_path / "model", "mamba2")
    stage(codec="dsq_static_p").run(again, broken)
    for name in ("00001.safetensors", "00001.json"):
        (broken.stage_dir / "blocks" / name).unlink()
    again = tiny.state(tmp_path / "model", "mamba2")
    stage(codec="dsq_static_p").run(again, broken)
    for index in (0, 1):
        file = f"stages/states/blocks/{index:05d}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()


def test_models_without_states_are_refused(tiny: Any) -> None:
    layout = layout_from_config(tiny.config("mixtral").to_dict())
    assert "has no state-space layers" in stage().check(layout)[0]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="sqrt_axis has no meaning"):
        DsqConfig(codec="per_head", sqrt_axis="state")
    with pytest.raises(ValueError, match="fixed codes"):
        DsqConfig(codec="dsq_als", rounding="stochastic")
    for wrong in ({"codec": "per_channel"}, {"codec": "dsq_refit"}, {"sqrt_axis": "state"}):
        with pytest.raises(ValueError, match="dither needs a codec of dsq, dsq_static_p"):
            DsqConfig(rounding="dither", **wrong)


def test_a_saved_dither_without_a_state_scale_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    stage(rounding="dither").run(state, tiny.context(tmp_path, "states"))
    policy = state.policies["state_cache"]
    assert policy["rounding"] == "dither"
    with pytest.raises(InputError, match="dither with codec per_channel"):
        compressed_model(state.model, state.packed, {"state_cache": {**policy, "codec": "per_channel"}})


def test_four_bits_on_mamba_1_are_warned_of(tiny: Any) -> None:
    layout = layout_from_config(tiny.config("mamba").to_dict())
    assert "8 bits are recommended" in stage().warnings(layout)[0]
    assert stage(bits=8).warnings(layout) == []


def test_a_dither_on_delta_rules_is_warned_of(tiny: Any) -> None:
    rules, mamba = (layout_from_config(tiny.config(name).to_dict()) for name in ("qwen3_5_text", "mamba2"))
    assert "rtn is recommended" in stage(rounding="dither").warnings(rules)[0]
    assert stage().warnings(rules) == stage(rounding="dither").warnings(mamba) == []


def test_windows_that_take_more_than_they_are_worth_are_warned_of(tiny: Any) -> None:
    layout = layout_from_config(tiny.config("mamba").to_dict())
    assert "replay_window of 4 takes" in stage(bits=8, replay_window=4).warnings(layout)[0]
    sizes = {"hidden_size": 768, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
    wide = layout_from_config(tiny.config("mamba2", **sizes).to_dict())
    assert stage(replay_window=4).warnings(wide) == []


def test_missing_calibration_is_named(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    state.calibration = None
    with pytest.raises(RecipeError, match="needs calibration data"):
        stage().run(state, tiny.context(tmp_path, "states"))


def test_an_unknown_policy_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    stage().run(state, tiny.context(tmp_path, "states"))
    with pytest.raises(InputError, match="unknown policy later"):
        compressed_model(state.model, state.packed, {"later": {}})


@pytest.mark.parametrize("codec", ["dsq_static_p", "dsq_t"])
def test_calibrated_scales_do_not_stand_in_the_way_of_dense_weights(codec: str, tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    stage(codec=codec).run(state, tiny.context(tmp_path, "states"))
    exporter, out = DenseExporter(), tmp_path / "dense"
    exporter.write(state.model, state.packed, state.policies, out, {})
    exporter.read_back(out, state.model, state.packed)
    assert not any("state_scale" in name for name in SafetensorsFolder(out).names())
