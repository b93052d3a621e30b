"""What a trained model is written as."""

import json
from dataclasses import replace

import pytest
import torch

from llmcompress.models.checkpoint import Checkpoint
from llmcompress.nn import lora
from llmcompress.stages.s2r import config as shared
from llmcompress.stages.s2r.init import S2RInitConfig

ADAPTED = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("policies", [{}, {"embeddings": {"bits": 8, "group_size": -1}}])
def test_adapters_are_added_to_the_weights_of_the_source(tiny, tmp_path, policies):
    tiny.model("mixtral").to(torch.float16).save_pretrained(tmp_path / "model")
    state = tiny.state(tmp_path / "model", "mixtral")
    state.policies.update(policies)
    # a GPU computes in bfloat16, which holds less of a float16 weight
    ctx = replace(tiny.context(tmp_path, "train"), dtype="bfloat16")
    config = S2RInitConfig.model_validate(
        {"type": "s2r_init", "task": {"kind": "countdown"}, "adapter": {"rank": 2, "targets": "attention"}}
    )
    policy = shared.open_policy(config, state, ctx)
    adapter = lora.adapters(policy.model)[ADAPTED]
    with torch.no_grad():
        adapter.lora_B.normal_(0, 0.1)
    source = state.model.checkpoint
    shared.keep_policy(config, policy, state, ctx)
    found = Checkpoint(ctx.stage_dir / shared.MODEL, state.model.layout)
    for view in state.model.layout.tensors():
        expected = source.tensor(view.name)
        if view.name == f"{ADAPTED}.weight":
            expected = (expected.float() + adapter.scale * adapter.lora_B @ adapter.lora_A).half()
        assert torch.equal(found.tensor(view.name), expected), view.name
    shared.adopt(state, ctx)
    assert state.model.path == ctx.stage_dir / shared.MODEL


def test_every_tensor_keeps_the_type_it_has_in_the_source(tiny, tmp_path):
    state = tiny.state(tmp_path / "model", "mixtral", wide="gate.weight")
    config = S2RInitConfig.model_validate({"type": "s2r_init", "task": {"kind": "countdown"}})
    ctx = tiny.context(tmp_path, "train")
    source = state.model.checkpoint
    shared.keep_policy(config, shared.open_policy(config, state, ctx), state, ctx)
    found = Checkpoint(ctx.stage_dir / shared.MODEL, state.model.layout)
    for view in state.model.layout.tensors():
        assert torch.equal(found.tensor(view.name), source.tensor(view.name)), view.name
        assert found.dtype_of(view.name) == source.dtype_of(view.name)


def test_a_type_that_the_recipe_names_is_that_of_weights_and_config(tiny, tiny_tokenizer, tmp_path):
    state = tiny.state(tmp_path / "model", "mixtral", wide="gate.weight")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    config = S2RInitConfig.model_validate({"type": "s2r_init", "task": {"kind": "countdown"}, "save_dtype": "float16"})
    ctx = tiny.context(tmp_path, "train")
    shared.keep_policy(config, shared.open_policy(config, state, ctx), state, ctx)
    source, folder = state.model.checkpoint, ctx.stage_dir / shared.MODEL
    found = Checkpoint(folder, state.model.layout)
    for view in state.model.layout.tensors():
        assert torch.equal(found.tensor(view.name), source.tensor(view.name).half()), view.name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    # what speaks to the model goes with it
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
