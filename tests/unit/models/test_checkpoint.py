from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.errors import InputError
from llmcompress.models.checkpoint import Checkpoint, read_config, refuse_quantized
from llmcompress.models.registry import layout_from_config

CONFIG: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def hub_tensors() -> dict[str, torch.Tensor]:
    """The model under the names of hub checkpoints."""
    torch.manual_seed(0)
    found = {}
    for view in layout_from_config(CONFIG).tensors():
        name, tensor = view.name, torch.randn(view.shape).to(torch.bfloat16)
        folder = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                found[f"{folder}.{expert}.w1.weight"] = both[:12].contiguous()
                found[f"{folder}.{expert}.w3.weight"] = both[12:].contiguous()
        elif name.endswith("experts.down_proj"):
            found.update({f"{folder}.{expert}.w2.weight": w.contiguous() for expert, w in enumerate(tensor)})
        else:
            found[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, layout_from_config(read_config(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, hub_tensors())


def test_per_expert_tensors_are_stacked(folder: Path) -> None:
    checkpoint, hub = open_checkpoint(folder), hub_tensors()
    prefix = "model.layers.1.block_sparse_moe.experts"
    gate_up = checkpoint.tensor("model.layers.1.mlp.experts.gate_up_proj")
    expected = [torch.cat((hub[f"{prefix}.{e}.w1.weight"], hub[f"{prefix}.{e}.w3.weight"])) for e in range(3)]
    assert torch.equal(gate_up, torch.stack(expected))
    down = checkpoint.tensor("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(down, torch.stack([hub[f"{prefix}.{e}.w2.weight"] for e in range(3)]))
    gate = checkpoint.tensor("model.layers.0.mlp.gate.weight")
    assert torch.equal(gate, hub["model.layers.0.block_sparse_moe.gate.weight"])
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.total_bytes == sum(t.numel() * 2 for t in hub.values())
    checkpoint.verify(check_values=True)


def test_run_time_names_on_disk(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder)
    tensors = {view.name: source.tensor(view.name) for view in source.layout.tensors()}
    other = tmp_path / "other"
    other.mkdir()
    found = open_checkpoint(write(other, tensors))
    found.verify()
    for name, tensor in tensors.items():
        assert found.has(name)
        assert torch.equal(found.tensor(name), tensor)


def test_per_expert_tensors_under_run_time_folders(folder: Path) -> None:
    renamed = {name.replace("block_sparse_moe", "mlp"): t for name, t in hub_tensors().items()}
    write(folder, renamed)
    open_checkpoint(folder).verify()


def test_names_without_the_model_prefix(folder: Path) -> None:
    write(folder, {name.removeprefix("model."): t for name, t in hub_tensors().items() if "experts" not in name} | {
        name: t for name, t in hub_tensors().items() if "experts" in name
    })  # fmt: skip
    assert open_checkpoint(folder).tensor("model.norm.weight").shape == (8,)


def test_the_old_name_of_mambas_embedding_is_read_and_not_written(tmp_path: Path) -> None:
    config = {
        "model_type": "mamba2", "vocab_size": 16, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1,
        "num_heads": 2, "head_dim": 8, "n_groups": 1,
    }  # fmt: skip
    layout = layout_from_config(config)
    name, old = "backbone.embeddings.weight", "backbone.embedding.weight"
    tensors = {view.name: torch.randn(view.shape) for view in layout.tensors()}
    tensors[old] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, layout)
    checkpoint.verify()
    assert torch.equal(checkpoint.tensor(name), tensors[old])
    # transformers would not find it there
    assert layout.disk.name(name) == name


def test_shards(folder: Path) -> None:
    hub = sorted(hub_tensors().items())
    half = len(hub) // 2
    (folder / "model.safetensors").unlink()
    where = {}
    for number, part in enumerate((hub[:half], hub[half:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        where.update(dict.fromkeys(dict(part), name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    assert len(checkpoint.files()) == 2
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"shards are missing: model-00002"):
        open_checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="not a shard index"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(InputError, match="outside its folder"):
        open_checkpoint(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    hub = hub_tensors()
    del hub["model.layers.0.input_layernorm.weight"]
    del hub["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    checkpoint = open_checkpoint(write(folder, hub))
    with pytest.raises(InputError) as caught:
        checkpoint.verify()
    assert "layers.0.input_layernorm.weight" in caught.value.message
    assert "layers.1.block_sparse_moe.experts.2.w3.weight" in caught.value.message
    assert not checkpoint.has("model.layers.1.mlp.experts.gate_up_proj")
    assert not checkpoint.has("model.layers.7.input_layernorm.weight")
    with pytest.raises(InputError, match="gate_up_proj is missing"):
        checkpoint.tensor("model.layers.1.mlp.experts.gate_up_proj")
    with pytest.raises(InputError, match="nonsense is missing"):
        checkpoint.tensor("nonsense")


def test_a_config_for_fewer_experts_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_local_experts": 2}))
    with pytest.raises(InputError, match=r"not part of this model: .*experts\.2\.w1"):
        open_checkpoint(folder).verify()


def test_harmless_extras_are_allowed(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "lm_head.weight": torch.ones(16, 8)}
    open_checkpoint(write(folder, hub_tensors() | extra)).verify()


def test_wrong_shapes_are_named(folder: Path) -> None:
    hub = hub_tensors()
    hub["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(9, 8)
    hub["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = torch.zeros(8, 11)
    with pytest.raises(InputError) as caught:
        open_checkpoint(write(folder, hub)).verify()
    assert "q_proj.weight has shape [9, 8], config.json says [8, 8]" in caught.value.message
    assert "w2.weight has shape [8, 11]" in caught.value.message


HYBRID: dict[str, Any] = {
    "model_type": "olmo_hybrid", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "linear_key_head_dim": 2, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3,
}  # fmt: skip
# of queries and keys 4 rows each, of values 8
CONV = "model.layers.0.linear_attn.{}_conv1d.weight"


def cut_model(folder: Path, changes: dict[str, torch.Tensor | None]) -> Checkpoint:
    """A hybrid whose convolutions are three tensors each in the file, some of them others or missing."""
    layout = layout_from_config(HYBRID)
    tensors: dict[str, torch.Tensor | None] = {}
    for view in layout.tensors():
        whole = torch.arange(torch.Size(view.shape).numel(), dtype=torch.float32).reshape(view.shape)
        tensors |= {name: whole[rows].contiguous() for name, rows in layout.disk.pieces(view.name).items()}
    (folder / "config.json").write_text(json.dumps(HYBRID))
    held = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_tensors_that_a_file_cuts_apart_are_joined_wherever_it_cuts(tmp_path: Path) -> None:
    name, whole = "model.layers.0.linear_attn.conv1d.weight", torch.arange(48, dtype=torch.float32).reshape(16, 1, 3)
    for lengths in ((4, 4, 8), (5, 5, 6)):
        pieces = dict(zip((CONV.format(word) for word in "qkv"), (part.clone() for part in whole.split(lengths))))
        checkpoint = cut_model(tmp_path, {**pieces})
        checkpoint.verify(check_values=True)
        assert torch.equal(checkpoint.tensor(name), whole)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("k", None, r"missing: .*layers\.0\.linear_attn\.k_conv1d"),
        ("v", torch.ones(9, 1, 3), r"v_conv1d\.weight has shape \[9, 1, 3\], config\.json says \[8, 1, 3\]"),
        ("q", torch.ones(4, 1, 2), r"q_conv1d\.weight has shape \[4, 1, 2\]"),
        ("q", torch.tensor(1.0), r"q_conv1d\.weight has shape \[\]"),
    ],
)
def test_pieces_that_do_not_fit_are_named(tmp_path: Path, word: str, value: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut_model(tmp_path, {CONV.format(word): value}).verify()


def test_integer_weights_are_refused(folder: Path) -> None:
    hub = hub_tensors()
    hub["model.norm.weight"] = torch.ones(8, dtype=torch.int8)
    with pytest.raises(InputError, match="I8"):
        open_checkpoint(write(folder, hub)).verify()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(folder: Path, bad: float) -> None:
    hub = hub_tensors()
    hub["model.layers.1.block_sparse_moe.experts.0.w1.weight"][3, 2] = bad
    checkpoint = open_checkpoint(write(folder, hub))
    checkpoint.verify()
    with pytest.raises(InputError, match=r"NaN or infinity in: .*layers\.1\.block_sparse_moe\.experts\.0\.w1"):
        checkpoint.verify(check_values=True)


def test_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pickle") as caught:
        open_checkpoint(folder)
    assert "save_pretrained" in str(caught.value.hint)


def test_truncated_weights_are_refused(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match="cut short"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "layers"),
    [({}, [61]), ({"num_hidden_layers": 4, "num_nextn_predict_layers": 2}, [4, 5]), ({"num_hidden_layers": 27}, [27])],
)
def test_deepseek_prediction_layers_are_ignored(config: dict[str, int], layers: list[int]) -> None:
    layout = layout_from_config({"model_type": "deepseek_v3", **config})
    assert layout.ignored == tuple(rf"model\.layers\.{index}\." for index in layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "missing"), ("{", "cannot be read"), ("[]", "not a JSON object"), ("[" * 100_000, "cannot be read")],
)
def test_config_problems(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


def test_config_of_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize("method", ["gptq", "mxfp4", "fp8"])
def test_quantized_sources_are_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match=rf"already quantized \({method}\)"):
        refuse_quantized(tmp_path, {"quantization_config": {"quant_method": method}})
    refuse_quantized(tmp_path, {"model_type": "llama"})


def test_what_is_larger_than_memory_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = open_checkpoint(folder)
    assert not any(file.once for file in kept._files)
    monkeypatch.setattr("llmcompress.models.checkpoint.total_ram", lambda: kept.total_bytes - 1)
    streamed = open_checkpoint(folder)
    assert all(file.once for file in streamed._files)
    for view in streamed.layout.tensors():
        assert torch.equal(streamed.tensor(view.name), kept.tensor(view.name))


def test_edits_of_other_tensors_stay(folder: Path) -> None:
    plain = open_checkpoint(folder)
    first, second = [view.name for view in plain.layout.tensors()][:2]
    both = plain.edited({first: lambda t: t + 1}).edited({second: lambda t: t * 2})
    assert torch.equal(both.tensor(first), plain.tensor(first) + 1)
    assert torch.equal(both.tensor(second), plain.tensor(second) * 2)
