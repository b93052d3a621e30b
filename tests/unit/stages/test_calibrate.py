from __future__ import annotations

import shutil

import pytest
import torch
from pydantic import ValidationError

from llmcompress.errors import InputError
from llmcompress.models.handle import ModelHandle
from llmcompress.models.registry import layout_from_config
from llmcompress.stages.calibrate import Calibrate, CalibrateConfig
from llmcompress.stages.s2r.traces import S2RTraces, S2RTracesConfig
from llmcompress.stages.state import RunContext, RunState

TEXTS = [f"The cat number {i} sat on the warm stone and looked at the sea." for i in range(20)]


def stage(**fields):
    base = {"type": "calibrate", "source": {"kind": "inline", "texts": TEXTS}, "samples": 4, "length": 16}
    return Calibrate("calibrate", CalibrateConfig.model_validate({**base, **fields}))


@pytest.fixture
def ctx(tmp_path):
    stage_dir = tmp_path / "stages" / "calibrate"
    stage_dir.mkdir(parents=True)
    events = []
    return RunContext(tmp_path, "calibrate", stage_dir, 7, "cpu", "float32", {}, events.append), events


@pytest.fixture
def state(tiny_folder):
    return RunState(model=ModelHandle.open(str(tiny_folder)))


def test_run_keeps_the_windows_and_restore_reads_them(ctx, state):
    ctx, _ = ctx
    stage().run(state, ctx)
    first = state.calibration
    assert first.tokens.shape == (4, 16)
    data = (ctx.stage_dir / "tokens.safetensors").read_bytes()
    again = RunState(model=state.model)
    stage().restore(again, ctx)
    assert torch.equal(again.calibration.tokens, first.tokens) and again.calibration.hash == first.hash
    (ctx.stage_dir / "tokens.safetensors").unlink()
    stage().run(RunState(model=state.model), ctx)
    assert (ctx.stage_dir / "tokens.safetensors").read_bytes() == data


def test_a_resumed_run_uses_the_windows_on_disk(ctx, state):
    ctx, _ = ctx
    stage().run(state, ctx)
    kept = state.calibration.hash
    other = stage(source={"kind": "inline", "texts": [t.upper() for t in TEXTS]})
    other.run(state, ctx)
    assert state.calibration.hash == kept


def test_fewer_windows_warns(ctx, state):
    ctx, events = ctx
    with pytest.raises(InputError, match="samples is 5000"):
        stage(samples=5000).run(state, ctx)
    assert not (ctx.stage_dir / "tokens.safetensors").exists()
    stage(samples=5000, allow_fewer=True).run(state, ctx)
    assert any(e.kind == "warning" and "of 5000" in e.data["text"] for e in events)


def test_synthetic_needs_no_tokenizer_and_warns(ctx, tiny_folder, tmp_path):
    ctx, events = ctx
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("token*", "special*"))
    state = RunState(model=ModelHandle.open(str(bare)))
    stage(source={"kind": "synthetic"}).run(state, ctx)
    assert state.calibration.tokens.max() < state.model.layout.vocab
    assert any(e.kind == "warning" for e in events)
    (ctx.stage_dir / "tokens.safetensors").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        stage().run(state, ctx)


def test_length_beyond_the_model(ctx, state):
    ctx, _ = ctx
    with pytest.raises(InputError, match="calibrate.length is 4096, but the model was built for 128"):  # noqa: RUF043
        stage(length=4096).run(state, ctx)


def test_windows_longer_than_what_an_earlier_layer_chooses_are_refused_from_the_layout(tiny):
    # every layer of the one has an indexer, the second one of the other takes over the first one's choice
    apart, handed = (layout_from_config(tiny.config(f).to_dict()) for f in ("deepseek_v32", "glm_moe_dsa"))
    assert (apart.longest, handed.longest) == (None, 64)
    assert stage(length=65).check(apart) == stage(length=64).check(handed) == []
    (problem,) = stage(length=65).check(handed)
    assert problem.startswith("stages.calibrate.length: 65 tokens")
    task = {"kind": "countdown"}
    traces = [S2RTraces("traces", S2RTracesConfig(type="s2r_traces", task=task, length=n)) for n in (64, 65)]
    assert [len(each.check(handed)) for each in traces] == [0, 1] and traces[1].check(apart) == []


def test_config_rejects_zero_samples():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        stage(samples=0)


def test_estimate_is_the_size_of_the_tokens():
    assert stage().estimate(None).disk == 4 * 16 * 8
