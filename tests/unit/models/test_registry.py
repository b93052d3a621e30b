from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.models import registry
from llmcompress.models.families.dense import FAMILIES
from llmcompress.models.layout import Role
from llmcompress.models.registry import families, layout_from_config

GEMMA4 = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
DOTS1 = {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2}


def test_importing_and_using_it_needs_no_torch() -> None:
    code = (
        "import sys; from llmcompress.models.registry import layout_from_config as f; "
        "f({'model_type': 'mixtral'}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type is missing"),
        ({"model_type": 3}, "model_type is missing"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "dbrx", "num_experts": 16}, "mixture of experts"),
        ({"model_type": "mamba3", "state_size": 16}, "state-space"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "several modalities"),
    ],
)
def test_unknown_families_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout_from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma4_text"}, "hidden_size_per_layer_input 256: .* embeddings of each layer"),
        ({**GEMMA4, "num_kv_shared_layers": 2}, "num_kv_shared_layers 2: .* keys and values of earlier ones"),
        ({**GEMMA4, "use_bidirectional_attention": "all"}, "only causal models"),
        ({**GEMMA4, "per_layer_config": {"full_attention": {}}}, "per_layer_config must be a table of layers"),
        ({"model_type": "laguna", "moe_router_logit_softcapping": 30.0}, "softcapping is not supported"),
        ({"model_type": "cohere2_moe", "expert_selection_fn": "tanh"}, "'tanh' is not known here"),
        ({"model_type": "llama4_text", "moe_layers": "all"}, "moe_layers must be a list of layer indices"),
    ],
)
def test_forms_of_a_family_that_are_not_known_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout_from_config(config)


def test_heads_of_gemma4_as_released_and_as_transformers_writes_them() -> None:
    released = {**GEMMA4, "num_hidden_layers": 12, "attention_k_eq_v": True, "num_global_key_value_heads": 2}
    listed = {"05": {"head_dim": 512, "num_key_value_heads": 2}, "11": {"head_dim": 512, "num_key_value_heads": 2}}
    layout = layout_from_config(released)
    assert layout == layout_from_config({**released, "per_layer_config": listed})
    near, far = (list(layout.blocks[index].linears())[:3] for index in (4, 5))
    assert [view.out_features for view in near] == [8 * 256, 4 * 256, 4 * 256]
    # keys are values too
    assert [view.name.rpartition(".")[2] for view in far] == ["q_proj", "k_proj", "o_proj"]
    assert [view.out_features for view in far[:2]] == [8 * 512, 2 * 512]


def test_a_refusal_lists_what_is_supported_and_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        layout_from_config({"model_type": "mixtrall"})
    assert "did you mean mixtral?" in str(caught.value.hint)
    assert all(name in str(caught.value.hint) for name in families())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "4096"),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("num_hidden_layers", None),
        ("num_local_experts", 2.5),
        ("hidden_act", "swishh"),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_wrong_values_are_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        layout_from_config({"model_type": "mixtral", key: value})


def test_mixtral_sizes() -> None:
    layout = layout_from_config({"model_type": "mixtral"})
    bank = layout.blocks[31].bank
    assert bank is not None
    assert (bank.num_experts, bank.top_k, bank.hidden, bank.intermediate) == (8, 2, 4096, 14336)
    assert bank.router.renormalizes
    assert sum(1 for _ in layout.quantizable()) == 32 * 6


def test_experts_may_be_counted_under_another_name() -> None:
    layout = layout_from_config({"model_type": "mixtral", "num_experts": 4})
    assert layout.blocks[0].bank is not None
    assert layout.blocks[0].bank.num_experts == 4


def test_which_layers_are_sparse() -> None:
    qwen = layout_from_config({"model_type": "qwen2_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [b.index for b in qwen.blocks if b.bank is not None][:3] == [1, 5, 7]
    deepseek = layout_from_config({"model_type": "deepseek_v3"})
    assert [b.index for b in deepseek.blocks if b.bank is None] == [0, 1, 2]


def test_roles() -> None:
    layout = layout_from_config({"model_type": "deepseek_v3"})
    roles = {name.removeprefix("model.layers.3."): role for name, role, _, i in layout.quantizable() if i == 3}
    assert roles["self_attn.kv_b_proj"] is Role.ATTENTION
    assert roles["mlp.shared_experts.up_proj"] is Role.SHARED_EXPERTS
    assert roles["mlp.experts.down_proj"] is Role.EXPERTS
    positions = [g.position for g in layout.blocks[3].sublayers[0].groups]
    assert positions == ["first", "inner", "inner", "last"]


def test_routers_and_gates_are_never_quantized() -> None:
    for model_type in families():
        given = {"deepseek_v2": {"num_experts_per_tok": 2}, "dots1": DOTS1, "gemma4_text": GEMMA4}.get(model_type, {})
        layout = layout_from_config({"model_type": model_type, **given})
        names = [name for name, *_ in layout.quantizable()]
        kept = (".gate", ".wg", ".router", "shared_expert_gate", "lm_head", "norm", "conv1d", ".conv.conv")
        assert not [n for n in names if n.endswith((*kept, "in_proj_ba", "in_proj_a", "in_proj_b"))]
        for block in layout.blocks:
            dense = {f"{view.name}.weight" for sublayer in block.sublayers for view in sublayer.beside}
            assert dense <= {view.name for view in block.kept} - {f"{name}.weight" for name in names}


def test_a_family_that_the_installed_transformers_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mixtral").mkdir()
    monkeypatch.setattr(registry, "_models_folder", lambda: tmp_path)
    assert layout_from_config({"model_type": "mixtral"}).model_type == "mixtral"
    with pytest.raises(InputError, match=r"'qwen3_next' is not in the installed transformers \d") as caught:
        layout_from_config({"model_type": "qwen3_next"})
    assert "pip install -U transformers" in str(caught.value.hint)


def test_every_family_names_its_folder_in_transformers() -> None:
    folder = registry._models_folder()
    assert folder is not None
    for name, family in registry._table().items():
        assert (folder / (family.package or name)).is_dir(), name


@pytest.mark.parametrize(
    ("model_type", "key", "kinds"),
    [
        ("qwen3_next", "layer_types", ["full_attention", "mamba2"]),
        ("lfm2", "layer_types", ["conv", "mamba2"]),
        ("glm4_moe_lite", "mlp_layer_types", ["sparse", "mamba2"]),
    ],
)
def test_unknown_kinds_of_layers_are_named(model_type: str, key: str, kinds: list[str]) -> None:
    with pytest.raises(InputError, match=rf"{key}\[1\] 'mamba2' is not known"):
        layout_from_config({"model_type": model_type, "num_hidden_layers": 2, key: kinds})


def test_experts_per_token_by_layer() -> None:
    config = {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 2, "num_experts": 4}
    layout = layout_from_config({**config, "moe_topk": [1, 3]})
    assert [block.bank.top_k for block in layout.blocks if block.bank is not None] == [1, 3]
    with pytest.raises(InputError, match="moe_topk has no number for layer 1"):
        layout_from_config({**config, "moe_topk": [1]})


def test_where_layers_of_a_delta_rule_and_of_experts_stand() -> None:
    layout = layout_from_config({"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 3})
    assert [b.sublayers[0].kind for b in layout.blocks] == ["ssm", "ssm", "attention"] * 2 + ["ssm", "ssm"]
    ernie = layout_from_config(
        {"model_type": "ernie4_5_moe", "num_hidden_layers": 6, "moe_layer_interval": 2, "moe_layer_start_index": 2}
    )
    assert [b.index for b in ernie.blocks if b.bank is not None] == [3, 5]


def test_a_plug_in_may_add_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.plugins.discover", lambda group: {"llamoid": FAMILIES[0]})
    assert len(layout_from_config({"model_type": "llamoid", "num_hidden_layers": 3}).blocks) == 3
    # its package may bring the model as well, of which transformers then has no folder
    monkeypatch.setattr(
        "llmcompress.plugins.discover", lambda group: {"llamoid": replace(FAMILIES[0], model_type="llamoid")}
    )
    assert layout_from_config({"model_type": "llamoid"}).model_type == "llamoid"
    monkeypatch.setattr("llmcompress.plugins.discover", lambda group: {"llamoid": "not a family"})
    with pytest.raises(InputError, match="llamoid"):
        registry.layout_from_config({"model_type": "llamoid"})
