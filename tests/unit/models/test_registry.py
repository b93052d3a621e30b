from __future__ import annotations

import subprocess
import sys

import pytest

from llmcompress.errors import InputError
from llmcompress.models import registry
from llmcompress.models.families.dense import FAMILIES
from llmcompress.models.layout import Role
from llmcompress.models.registry import families, layout_from_config


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
        given = {"num_experts_per_tok": 2} if model_type == "deepseek_v2" else {}
        names = [name for name, *_ in layout_from_config({"model_type": model_type, **given}).quantizable()]
        assert not [n for n in names if n.endswith((".gate", ".router", "shared_expert_gate", "lm_head", "norm"))]


def test_a_plug_in_may_add_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.plugins.discover", lambda group: {"llamoid": FAMILIES[0]})
    assert len(layout_from_config({"model_type": "llamoid", "num_hidden_layers": 3}).blocks) == 3
    monkeypatch.setattr("llmcompress.plugins.discover", lambda group: {"llamoid": "not a family"})
    with pytest.raises(InputError, match="llamoid"):
        registry.layout_from_config({"model_type": "llamoid"})
