"""The native artifact: exact in a fresh process, packed in memory, deterministic on disk, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress import hf
from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import ExportError, InputError
from llmcompress.export.native import NativeExporter, write_native
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.models.orientation import canonical
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantPlan, QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore

IDS = torch.tensor([[5, 9, 1, 33, 60, 2, 17, 8]])
LINEARS, EXPERTS = QuantSpec(4, 16, symmetric=True), QuantSpec(3, 16)


def quantize(handle: ModelHandle, root: Path, plan: QuantPlan) -> PackedStore:
    store = PackedStore(root)
    for block in handle.layout.blocks:
        packed, bank = {}, block.bank
        names = [linear.name for linear in block.linears()] + ([] if bank is None else [bank.gate_up, bank.down])
        for name in names:
            if name not in plan:
                continue
            expert = bank is not None and name in (bank.gate_up, bank.down)
            weight = handle.checkpoint.tensor(name if expert else f"{name}.weight").float()
            weight = canonical(bank, name, weight) if expert else weight
            scale, zero = find_grid(weight, plan[name], "minmax")
            codes = round_codes(weight, scale, zero, plan[name])
            packed[name] = codec("int_group").encode(codes, scale, zero, plan[name])
        replaced = {}
        if bank is not None:
            router = f"{bank.router.module}.weight"
            replaced[router] = handle.checkpoint.tensor(router).float() + 0.01
        store.write_block(block.index, BlockPatch(packed, replaced))
    return store


def whole_plan(handle: ModelHandle) -> QuantPlan:
    return {n: EXPERTS if ".experts." in n else LINEARS for n, *_ in handle.layout.quantizable()}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def resident_bytes(model: Any) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelHandle, PackedStore, Path]:
    """A handle, a store with everything quantized, and the artifact."""
    folder = tmp_path_factory.mktemp("native")
    handle = ModelHandle.open(tiny_folder)
    store = quantize(handle, folder / "blocks", whole_plan(handle))
    write_native(handle, store, {}, folder / "artifact", {"recipe": "test"})
    return handle, store, folder / "artifact"


@pytest.fixture
def copy(made: tuple[ModelHandle, PackedStore, Path], tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(made[2], tmp_path / "copy"))


FRESH = """
import sys, torch
import llmcompress.hf
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = torch.tensor([[5, 9, 1, 33, 60, 2, 17, 8]])
with torch.inference_mode():
    torch.save(model(ids).logits, sys.argv[2])
print(model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())
"""


def test_a_fresh_process_computes_the_same_bits(made, tmp_path: Path) -> None:
    handle, store, artifact = made
    model = compressed_model(handle, store, {})
    command = [sys.executable, "-c", FRESH, str(artifact), str(tmp_path / "logits.pt")]
    # sums are exact only between equal numbers of threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, logits(model))
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)[0].tolist()
    assert result.stdout.strip().splitlines()[-1] == str(expected)


def test_weights_stay_packed_in_memory(made) -> None:
    _, _, artifact = made
    model, tokenizer = hf.load(artifact)
    on_disk = sum(t.numel() * t.element_size() for t in load_file(artifact / "model.safetensors").values())
    rotary = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "inv_freq" in n)
    assert resident_bytes(model) == on_disk + rotary
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_stay_fp16_in_every_dtype(made, dtype: torch.dtype) -> None:
    handle, store, artifact = made
    model, _ = hf.load(artifact, dtype=dtype)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight_scale.dtype == torch.float16
    assert layer.mlp.experts.gate_up_proj.weight_scale.dtype == torch.float16
    assert layer.mlp.gate.weight.dtype == model.lm_head.weight.dtype == dtype
    assert torch.equal(logits(model), logits(compressed_model(handle, store, {}, dtype)))


def test_changing_the_dtype_later_leaves_packed_tensors_alone(made) -> None:
    model, _ = hf.load(made[2])
    before = model.model.layers[0].self_attn.q_proj.weight_scale.clone()
    model.to(torch.bfloat16)
    scale = model.model.layers[0].self_attn.q_proj.weight_scale
    assert scale.dtype == torch.float16
    assert torch.equal(scale, before)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_writing_twice_gives_the_same_bytes(made, tmp_path: Path) -> None:
    handle, store, artifact = made
    write_native(handle, store, {}, tmp_path / "again", {"recipe": "test"})
    names = sorted(path.name for path in artifact.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        digests = {hashlib.sha256((root / name).read_bytes()).digest() for root in (artifact, tmp_path / "again")}
        assert len(digests) == 1, name


def test_shards_load_like_one_file(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.export import base

    handle, store, artifact = made
    original = base.ShardWriter.__init__
    monkeypatch.setattr(base.ShardWriter, "__init__", lambda self, folder: original(self, folder, 20_000))
    write_native(handle, store, {}, tmp_path / "sharded", {})
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(hf.load(tmp_path / "sharded")[0]), logits(hf.load(artifact)[0]))


def test_save_pretrained_of_a_loaded_model_loads_again(made, tmp_path: Path) -> None:
    model, _ = hf.load(made[2])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(hf.load(tmp_path / "saved")[0]), logits(model))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.1.mlp.experts.down_proj.weight_packed",
        "model.layers.1.mlp.gate.weight",
    ],
)  # fmt: skip
def test_read_back_notices_one_changed_bit_anywhere(made, copy: Path, name: str) -> None:
    handle, store, artifact = made
    NativeExporter().read_back(artifact, handle, store)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=rf"{name} reads back different"):
        NativeExporter().read_back(copy, handle, store)


def test_read_back_wants_every_tensor_and_no_other_and_the_same_plan(made, copy: Path) -> None:
    handle, store, _ = made
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(1)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"unexpected tensors: model\.extra"):
        NativeExporter().read_back(copy, handle, store)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.norm\.weight is missing"):
        NativeExporter().read_back(copy, handle, store)
    save_file({**tensors, "model.norm.weight": norm}, copy / "model.safetensors", metadata={"format": "pt"})
    NativeExporter().read_back(copy, handle, store)
    with pytest.raises(ExportError, match="other policies"):
        NativeExporter().read_back(copy, handle, store, {"pesf": {"alpha": 0.9}})
    edit_config(copy, modules={})
    with pytest.raises(ExportError, match="another plan"):
        NativeExporter().read_back(copy, handle, store)


@pytest.mark.parametrize("policy", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 16}])
def test_read_back_compares_an_embedding_in_low_bits(made, tmp_path: Path, policy: dict[str, int]) -> None:
    handle, store, _ = made
    exporter, policies = NativeExporter(), {"embeddings": policy}
    exporter.write(handle, store, policies, tmp_path / "artifact", {})
    exporter.read_back(tmp_path / "artifact", handle, store, policies)
    file = tmp_path / "artifact" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight_packed"][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"embed_tokens\.weight_packed reads back different"):
        exporter.read_back(tmp_path / "artifact", handle, store, policies)


def test_nothing_is_overwritten(made) -> None:
    handle, store, artifact = made
    with pytest.raises(ExportError, match="already exists"):
        write_native(handle, store, {}, artifact, {})


@pytest.mark.parametrize("kept", ["gate_up_proj", "down_proj", "experts", "self_attn"])
def test_partly_quantized_models(tiny, kept: str, tmp_path: Path) -> None:
    """One side of the experts, all experts, or the attention stay dense; gpt_oss turns and interleaves experts."""
    tiny.model("gpt_oss").save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source")
    plan = {name: spec for name, spec in whole_plan(handle).items() if kept not in name}
    store = quantize(handle, tmp_path / "blocks", plan)
    model = compressed_model(handle, store, {})
    write_native(handle, store, {}, tmp_path / "artifact", {})
    loaded, _ = hf.load(tmp_path / "artifact")
    assert torch.equal(logits(loaded), logits(model))
    dense = logits(handle.dense_model())
    assert torch.nn.functional.cosine_similarity(logits(model).flatten(), dense.flatten(), dim=0) > 0.8


def test_policies_are_active_after_loading(made, tmp_path: Path) -> None:
    handle, store, _ = made
    write_native(handle, store, {"pesf": {"alpha": 0.9, "min_len": 1}}, tmp_path / "artifact", {})
    model, _ = hf.load(tmp_path / "artifact")
    in_memory = compressed_model(handle, store, {"pesf": {"alpha": 0.9, "min_len": 1}})
    assert torch.equal(logits(model), logits(in_memory))
    assert model.llmcompress_skipping.statistics()["total"]["slots_dropped"] > 0
    assert not torch.equal(logits(model), logits(compressed_model(handle, store, {})))


def test_an_unknown_policy_is_refused(made, tmp_path: Path) -> None:
    handle, store, _ = made
    write_native(handle, store, {"tomorrow": {}}, tmp_path / "artifact", {})
    with pytest.raises(InputError, match="tomorrow"):
        hf.load(tmp_path / "artifact")


def test_a_store_of_another_model_is_refused(made, tiny, tmp_path: Path) -> None:
    _, store, _ = made
    tiny.model("mixtral", num_hidden_layers=1, intermediate_size=32).save_pretrained(tmp_path / "other")
    handle = ModelHandle.open(tmp_path / "other")
    with pytest.raises(InputError):
        compressed_model(handle, store, {})


def test_load_reads_dense_folders(tiny_folder: Path) -> None:
    model, tokenizer = hf.load(tiny_folder)
    assert torch.equal(logits(model), logits(ModelHandle.open(tiny_folder).dense_model()))
    assert tokenizer is not None


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_load_refuses_other_quantization(copy: Path) -> None:
    edit_config(copy, quant_method="gptq")
    with pytest.raises(InputError, match="gptq"):
        hf.load(copy)


def test_load_refuses_a_newer_format(copy: Path) -> None:
    edit_config(copy, version=99)
    with pytest.raises(InputError, match="version 99"):
        hf.load(copy)


def test_load_refuses_names_the_model_does_not_have(copy: Path) -> None:
    edit_config(copy, modules={"model.layers.9.self_attn.q_proj": 0})
    with pytest.raises(InputError, match=r"layers\.9"):
        hf.load(copy)


def test_load_refuses_missing_tensors(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj.weight_scale"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: model\.layers\.1\.mlp\.experts\.down_proj\.weight_scale"):
        hf.load(copy)


def test_load_refuses_a_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        hf.load(copy)


def test_load_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        hf.load(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        hf.load(tmp_path / "absent")


def test_an_artifact_is_not_a_source(copy: Path) -> None:
    with pytest.raises(InputError, match="already quantized"):
        ModelHandle.open(copy)
