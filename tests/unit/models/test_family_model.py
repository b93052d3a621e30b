"""What members of a family must agree on to be in one batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.inference.random_family import RandomFamily
from llmcompress.models.family_model import _numbers, _require_alike
from llmcompress.models.handle import meta_model
from llmcompress.quant.tree import Tree

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "one", "other"),
    [
        ("gemma2", {}, {"hidden_activation": "relu"}),
        ("qwen2", WINDOWS, {**WINDOWS, "max_window_layers": 0}),
        ("llama", {}, {"rms_norm_eps": 1e-3}),
    ],
)
def test_what_changes_a_row_is_seen(model_type: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    from transformers import AutoConfig

    def numbers(changes: dict[str, Any]) -> str:
        return _numbers(meta_model(AutoConfig.for_model(model_type, **{**SMALL, **changes}), torch.float32))

    assert numbers(one) == numbers(dict(one)) != numbers(other)


def members(model_type: str, **changes: Any) -> dict[str, Any]:
    """Two random models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SMALL, "pad_token_id": 0, **changes}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in sizes.items() if value is not None})
    found = {}
    for seed, name in enumerate(("ant", "bee")):
        torch.manual_seed(seed)
        found[name] = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in found[name].parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return found


@pytest.mark.parametrize(
    ("model_type", "changes", "tensor"),
    [
        ("granite_swa", {"head_dim": None}, "model.layers.1.self_attn.sinks"),
        ("gemma4_text", {"hidden_size_per_layer_input": 0}, "model.layers.1.layer_scalar"),
        ("lfm2", {"head_dim": None, "layer_types": ["full_attention", "conv"]}, "model.layers.1.conv.conv.weight"),
    ],
)
def test_members_who_differ_in_what_a_batch_shares_are_refused(
    model_type: str, changes: dict[str, Any], tensor: str
) -> None:
    models: Any = members(model_type, **changes)
    ours, theirs = (models[name].state_dict() for name in ("ant", "bee"))
    for name in ours:
        if name.endswith(tensor.removeprefix("model.layers.1")):
            theirs[name].copy_(ours[name])
    artifact: Any = SimpleNamespace(folder="family")
    _require_alike(artifact, models)
    theirs[tensor].add_(1)
    with pytest.raises(InputError, match=f"ant, bee differ in {tensor}, which a batch must share"):
        _require_alike(artifact, models)


def test_sinks_that_members_share_stay_where_attention_reads_them() -> None:
    models = members("granite_swa", head_dim=None)
    for name, own in models["bee"].named_parameters():
        if name.endswith("sinks"):
            own.copy_(models["ant"].get_parameter(name))
    tree = Tree.of(("ant", "bee"), ((frozenset(["ant"]), frozenset(["bee"])),))
    family = RandomFamily(models, tree, {2: 4, 1: 2}, 16)
    ids = torch.arange(24).reshape(2, 12) % 60 + 3
    family.batch.assign(["ant", "bee"])
    found = family.model(ids).logits
    for row, name in enumerate(("ant", "bee")):
        expected = family.dense(name)(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("model_type", ["opt", "gpt_neo"])
def test_rows_have_their_members_positions(model_type: str) -> None:
    """OPT's are asked with a mask, GPT-Neo's once for all rows."""
    own = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gpt_neo": {"attention_types": [[["global"], 2]]}}
    models = members(model_type, **own[model_type])
    family = RandomFamily(models, Tree.star(list(models)), {1: 4, 2: 4}, 16)
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    family.batch.assign(["ant", "bee", "bee"])
    found = family.model(ids).logits
    for row, member in enumerate(["ant", "bee", "bee"]):
        expected = family.dense(member)(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
