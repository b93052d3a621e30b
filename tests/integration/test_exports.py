"""Exports of tiny models, read by programs that are not this one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import ExportError, InputError, ResourceError
from llmcompress.events import Event
from llmcompress.export import registry
from llmcompress.export.compressed_tensors import CompressedTensorsExporter
from llmcompress.export.dense import DenseExporter
from llmcompress.export.gguf import GGUFExporter
from llmcompress.export.gguf_tokenizer import _LLAMA3, _QWEN2
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.models.orientation import canonical, family_orientation
from llmcompress.quant.codecs.int_group import decode, encode
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.stages.export import Export, ExportConfig
from llmcompress.stages.state import Metric, RunContext, RunState

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {
    **LLAMA, "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip


def make_model(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> ModelHandle:
    """Save a random model the way the hub stores it."""
    from transformers import AutoConfig

    torch.manual_seed(5)
    kind = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.pop("model_type"), **kind), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.08 + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return ModelHandle.open(folder, "auto")


def quantize(
    handle: ModelHandle, root: Path, spec: QuantSpec, only: str = "", experts: QuantSpec | None = None
) -> PackedStore:
    """Round the weights whose name contains ``only`` to nearest; move the routers as calibration would."""
    store = PackedStore(root)
    for block in handle.layout.blocks:
        bank, packed, replaced = block.bank, {}, {}
        weights = {linear.name: handle.checkpoint.tensor(f"{linear.name}.weight") for linear in block.linears()}
        if bank is not None:
            weights |= {n: canonical(bank, n, handle.checkpoint.tensor(n)) for n in (bank.gate_up, bank.down)}
            name = bank.router.weight
            replaced[name] = handle.checkpoint.tensor(name) + 0.01
        for name, weight in weights.items():
            if only in name:
                chosen = experts if experts is not None and weight.ndim == 3 else spec
                scale, zero = find_grid(weight.float(), chosen, "minmax")
                codes = round_codes(weight.float(), scale, zero, chosen)
                packed[name] = encode(codes, scale, zero, chosen)
        store.write_block(block.index, BlockPatch(packed, replaced))
    return store


def decoded_model(handle: ModelHandle, store: PackedStore) -> torch.nn.Module:
    """The dense model with our decoded weights put in, name by name."""
    model = handle.dense_model()
    state = dict(model.named_parameters())
    with torch.no_grad():
        for index, patch in store.blocks():
            bank = handle.layout.blocks[index].bank
            for name, packed in patch.packed.items():
                if bank is not None and name in (bank.gate_up, bank.down):
                    state[name].copy_(family_orientation(bank, name, decode(packed)))
                else:
                    state[f"{name}.weight"].copy_(decode(packed))
            for name, tensor in patch.replaced.items():
                state[name].copy_(tensor)
    return model


def make_tokenizer(folder: Path, vocab: int = 320) -> None:
    """A byte-level BPE tokenizer of the GPT-2 kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 10, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the rat ran to the hat"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 3 % 96
    with torch.inference_mode():
        return model(input_ids=ids).logits


def check_compressed_tensors(handle: ModelHandle, store: PackedStore, out: Path, atol: float = 0) -> None:
    """Export, read back, and load in transformers alone: the same logits as of the decoded weights."""
    exporter = CompressedTensorsExporter()
    assert exporter.refusals(handle.layout, store.plan(), {}) == []
    exporter.write(handle, store, {}, out, {"recipe": "test"})
    exporter.read_back(out, handle, store)
    sizes = [t.nbytes for file in out.glob("*.safetensors") for t in load_file(file).values()]
    assert sum(sizes) == exporter.output_bytes(handle.layout, store.plan(), 4)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    torch.testing.assert_close(logits(model), logits(decoded_model(handle, store)), rtol=0, atol=atol)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, QWEN_MOE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, -1)])
def test_compressed_tensors_loads_in_plain_transformers(
    tmp_path: Path, config: dict[str, Any], bits: int, group: int
) -> None:
    handle = make_model(tmp_path / "source", config)
    store = quantize(handle, tmp_path / "blocks", QuantSpec(bits, group, symmetric=True))
    check_compressed_tensors(handle, store, tmp_path / "out")


ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
NEWER = {
    "qwen3_next": {**ROUTED, **DELTA, "head_dim": 16, "shared_expert_intermediate_size": 64},
    "qwen3_5_moe_text": {**ROUTED, **DELTA, "head_dim": 16, "shared_expert_intermediate_size": 64},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "glm4_moe_lite": LATENT,
    "deepseek_v32": {
        **LATENT,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "index_topk": 4,
        "num_hidden_layers": 4,
        "n_group": 2,
        "topk_group": 1,
    },
    "glm_moe_dsa": {**LATENT, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 4, "num_hidden_layers": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "lfm2_moe": {**ROUTED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "afmoe": {**ROUTED, "head_dim": 16, "num_shared_experts": 1, "num_dense_layers": 1},
    "mimo_v2_flash": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "v_head_dim": 24,
        "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"],
    },
    "hy_v3": {**ROUTED, "head_dim": 16},
    "laguna": {**ROUTED, "head_dim": 16, "shared_expert_intermediate_size": 64},
    "mellum": {**ROUTED, "head_dim": 16},
    "cohere2_moe": {**ROUTED, "head_dim": 16, "intermediate_size": 64, "num_shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", NEWER)
def test_compressed_tensors_of_newer_families_load_in_plain_transformers(tmp_path: Path, family: str) -> None:
    handle = make_model(tmp_path / "source", {**LLAMA, **NEWER[family], "model_type": family})
    store = quantize(handle, tmp_path / "blocks", QuantSpec(4, 32, symmetric=True))
    # a mapped file puts dense weights anywhere, and last bits of products may depend on that
    check_compressed_tensors(handle, store, tmp_path / "out", atol=1e-5)


CUT = {
    "kimi_linear": {
        **{key: value for key, value in LATENT.items() if key != "n_routed_experts"}, "q_lora_rank": None,
        "num_experts": 4, "linear_num_heads": 2, "linear_head_dim": 32, "num_hidden_layers": 5,
    },
    "olmo_hybrid": {**DELTA, "linear_num_value_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", CUT)
def test_compressed_tensors_hold_convolutions_as_the_hub_cuts_them(tmp_path: Path, family: str) -> None:
    handle = make_model(tmp_path / "source", {**LLAMA, **CUT[family], "model_type": family, "pad_token_id": 0})
    store = quantize(handle, tmp_path / "blocks", QuantSpec(4, 32, symmetric=True))
    exporter, out = CompressedTensorsExporter(), tmp_path / "out"
    assert exporter.refusals(handle.layout, store.plan(), {}) == []
    exporter.write(handle, store, {}, out, {})
    exporter.read_back(out, handle, store)
    module = handle.layout.blocks[0].sublayers[0].module
    files = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    pieces = [files[f"{module}.{word}_conv1d.weight"] for word in "qkv"]
    assert torch.equal(torch.cat(pieces), handle.checkpoint.tensor(f"{module}.conv1d.weight"))
    # transformers 5.23 takes what it puts together for packed; a version that does not may load these too
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def test_w8a8_rounds_activations_in_plain_transformers_too(tmp_path: Path) -> None:
    """Codes and scales are ours; inputs are rounded by the reader, with its scale of 127.5 steps where ours has 127."""
    handle = make_model(tmp_path / "source", LLAMA)
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC8)
    exporter, out = CompressedTensorsExporter(), tmp_path / "out"
    policies = {"activations": {"bits": 8, "roles": ["attention", "mlp"]}}
    assert exporter.refusals(handle.layout, store.plan(), policies) == exporter.losses(policies) == []
    exporter.write(handle, store, policies, out, {})
    exporter.read_back(out, handle, store, policies)
    with pytest.raises(ExportError, match="does not say how activations are rounded"):
        exporter.read_back(out, handle, store)
    found = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))

    def rounded(steps: float) -> torch.Tensor:
        model = decoded_model(handle, store)

        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            scale = inputs[0].abs().amax(-1, keepdim=True) / steps
            return ((inputs[0] / scale).round().clamp(-128, 127) * scale, *inputs[1:])

        for block in handle.layout.blocks:
            for linear in block.linears():
                model.get_submodule(linear.name).register_forward_pre_hook(hook)
        return logits(model)

    weights_alone = logits(decoded_model(handle, store))
    torch.testing.assert_close(found, rounded(127.5), rtol=0, atol=float((found - weights_alone).abs().max()) / 5)
    assert not torch.allclose(found, weights_alone, atol=1e-4)
    ours = compressed_model(handle, store, policies, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), rounded(127.0), rtol=0, atol=1e-4)


def test_compressed_tensors_with_experts_only(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", QWEN_MOE)
    store = quantize(handle, tmp_path / "blocks", QuantSpec(4, 32, symmetric=True), "mlp.experts")
    exporter, out = CompressedTensorsExporter(), tmp_path / "out"
    assert exporter.refusals(handle.layout, store.plan(), {}) == []
    exporter.write(handle, store, {}, out, {})
    exporter.read_back(out, handle, store)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(model), logits(decoded_model(handle, store)))


def test_compressed_tensors_keeps_attention_and_experts_apart(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", MIXTRAL)
    spec, experts = QuantSpec(8, -1, symmetric=True), QuantSpec(4, 32, symmetric=True)
    store = quantize(handle, tmp_path / "blocks", spec, experts=experts)
    exporter, out = CompressedTensorsExporter(), tmp_path / "out"
    exporter.write(handle, store, {}, out, {})
    exporter.read_back(out, handle, store)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(model), logits(decoded_model(handle, store)))


def test_read_back_notices_one_changed_byte(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", MIXTRAL)
    store = quantize(handle, tmp_path / "blocks", QuantSpec(4, 32, symmetric=True))
    for exporter in (CompressedTensorsExporter(), DenseExporter()):
        out = tmp_path / exporter.name
        exporter.write(handle, store, {}, out, {})
        file = out / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
        with pytest.raises(ExportError, match="reads back different"):
            exporter.read_back(out, handle, store)


@pytest.mark.parametrize("name", ["compressed-tensors", "dense"])
def test_read_back_compares_every_tensor_and_wants_no_other(tmp_path: Path, name: str) -> None:
    handle = make_model(tmp_path / "source", {**MIXTRAL, "num_hidden_layers": 1})
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4)
    exporter, out = registry.exporter(name), tmp_path / "out"
    exporter.write(handle, store, {}, out, {})
    exporter.read_back(out, handle, store)
    tensors = load_file(out / "model.safetensors")

    def differs(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ExportError, InputError)):
            exporter.read_back(out, handle, store)

    for key, tensor in tensors.items():
        other = tensor.clone()
        other.view(torch.uint8).view(-1)[-1] ^= 1
        differs({**tensors, key: other})
        differs({k: t for k, t in tensors.items() if k != key})
    differs({**tensors, "model.layers.0.other.weight": torch.zeros(2)})


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, QWEN_MOE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_loads_in_plain_transformers(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    handle = make_model(tmp_path / "source", config, dtype)
    store = quantize(handle, tmp_path / "blocks", QuantSpec(3, 24))
    exporter, out = DenseExporter(), tmp_path / "out"
    exporter.write(handle, store, {}, out, {"recipe": "test"})
    exporter.read_back(out, handle, store)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(decoded_model(handle, store)))


QWEN3_MOE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "head_dim": 16, "norm_topk_prob": True,
}  # fmt: skip
SYMMETRIC4, ASYMMETRIC4, SYMMETRIC8 = QuantSpec(4, 32, True), QuantSpec(4, 64, False), QuantSpec(8, -1, True)


@pytest.mark.parametrize("spec", [SYMMETRIC4, ASYMMETRIC4, SYMMETRIC8], ids=["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, QWEN_MOE, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_gguf_reads_back_equal(tmp_path: Path, config: dict[str, Any], spec: QuantSpec) -> None:
    handle = make_model(tmp_path / "source", {**config, "vocab_size": 320}, torch.bfloat16)
    make_tokenizer(tmp_path / "source")
    store = quantize(handle, tmp_path / "blocks", spec)
    exporter, out = GGUFExporter(), tmp_path / "out"
    assert exporter.refusals(handle.layout, store.plan(), {}) == []
    assert exporter.source_refusals(handle.path, handle.config) == []
    exporter.write(handle, store, {}, out, {"recipe": {"name": "tiny"}})
    exporter.read_back(out, handle, store)


def test_gguf_read_back_compares_every_tensor_and_wants_no_other(tmp_path: Path) -> None:
    from gguf import GGUFReader

    handle = make_model(tmp_path / "source", {**LLAMA, "vocab_size": 320, "num_hidden_layers": 1}, torch.bfloat16)
    make_tokenizer(tmp_path / "source")
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4, "self_attn")
    exporter, out = GGUFExporter(), tmp_path / "out"
    exporter.write(handle, store, {}, out, {})
    file = out / "model.gguf"
    data, tensors = file.read_bytes(), GGUFReader(file).tensors
    for tensor in tensors:
        changed = bytearray(data)
        changed[tensor.data_offset + tensor.n_bytes - 1] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ExportError, match=rf"{tensor.name} reads back different"):
            exporter.read_back(out, handle, store)
    # one name for another of the same length
    file.write_bytes(data.replace(b"output_norm.weight", b"output_nurm.weight"))
    with pytest.raises(ExportError, match=r"output_norm\.weight is missing"):
        exporter.read_back(out, handle, store)
    file.write_bytes(data)
    handle.layout = dataclasses.replace(handle.layout, outside=handle.layout.outside[:-1])
    with pytest.raises(ExportError, match=r"unexpected tensors: output\.weight"):
        exporter.read_back(out, handle, store)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("policy", "kind"), [({"bits": 8, "group_size": -1}, "Q8_0"), ({"bits": 4, "group_size": 32}, "Q4_0")]
)
def test_gguf_carries_an_embedding_in_low_bits(tmp_path: Path, policy: dict[str, int], kind: str, tied: bool) -> None:
    """Its logits are those of the compressed model that an evaluation has measured."""
    from gguf import GGUFReader

    # a vocabulary that is no multiple of the lanes of our own packed form
    handle = make_model(tmp_path / "source", {**LLAMA, "vocab_size": 330, "tie_word_embeddings": tied})
    make_tokenizer(tmp_path / "source", 330)
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4)
    exporter, out, policies = GGUFExporter(), tmp_path / "out", {"embeddings": policy}
    assert exporter.refusals(handle.layout, store.plan(), policies) == []
    assert exporter.losses(policies) == [] and exporter.losses({**policies, "pesf": {}})
    exporter.write(handle, store, policies, out, {"recipe": {"name": "tiny"}})
    exporter.read_back(out, handle, store, policies)
    with pytest.raises(ExportError, match="reads back different"):
        exporter.read_back(out, handle, store)
    tensors = GGUFReader(out / "model.gguf").tensors
    assert sum(tensor.n_bytes for tensor in tensors) == exporter.output_bytes(handle.layout, store.plan(), 4, policies)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds["token_embd.weight"] == kind and kinds.get("output.weight", kind) == kind
    assert ("output.weight" in kinds) != tied
    model = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", config=handle.hf_config(), dtype=torch.float32
    )
    ours = compressed_model(handle, store, policies)
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-5)


def test_gguf_says_how_positions_are_scaled(tmp_path: Path) -> None:
    from gguf import GGUFReader

    scaled = {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000.0}
    handle = make_model(tmp_path / "source", {**LLAMA, "vocab_size": 320, "rope_parameters": scaled})
    make_tokenizer(tmp_path / "source")
    GGUFExporter().write(handle, PackedStore(tmp_path / "blocks"), {}, tmp_path / "out", {})
    fields = GGUFReader(tmp_path / "out/model.gguf").fields
    found = {key: fields[f"llama.rope.{key}"].contents() for key in ("scaling.type", "scaling.factor", "freq_base")}
    assert found == {"scaling.type": "linear", "scaling.factor": 2.5, "freq_base": 5000.0}


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 32)], ids=str)
def test_gguf_says_what_a_dense_file_holds(tmp_path: Path, dtype: torch.dtype, number: int) -> None:
    from gguf import GGUFReader

    handle = make_model(tmp_path / "source", {**LLAMA, "vocab_size": 320}, dtype)
    make_tokenizer(tmp_path / "source")
    GGUFExporter().write(handle, PackedStore(tmp_path / "blocks"), {}, tmp_path / "out", {})
    field = GGUFReader(tmp_path / "out/model.gguf").fields["general.file_type"]
    assert int(field.parts[field.data[0]][0]) == number


def test_gguf_refuses_an_embedding_whose_groups_are_no_blocks(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", LLAMA)
    (problem,) = GGUFExporter().refusals(handle.layout, {}, {"embeddings": {"bits": 8, "group_size": 16}})
    assert "groups of 16 columns" in problem


@pytest.mark.parametrize("config", [LLAMA, QWEN_MOE, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_gguf_gives_the_same_logits_in_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """The reader of transformers undoes row order and stacking by itself, so equal logits check both."""
    handle = make_model(tmp_path / "source", {**config, "vocab_size": 320})
    make_tokenizer(tmp_path / "source")
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4)
    exporter, out = GGUFExporter(), tmp_path / "out"
    exporter.write(handle, store, {}, out, {"recipe": {"name": "tiny"}})
    # its reader of the metadata does not know the sizes of experts, so it gets the config
    model = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", config=handle.hf_config(), dtype=torch.float32
    )
    torch.testing.assert_close(logits(model), logits(decoded_model(handle, store)), rtol=1e-5, atol=1e-6)


def test_gguf_runs_in_llama_cpp(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    handle = make_model(tmp_path / "source", {**MIXTRAL, "vocab_size": 320})
    make_tokenizer(tmp_path / "source")
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC8)
    exporter, out = GGUFExporter(), tmp_path / "out"
    exporter.write(handle, store, {}, out, {"recipe": {"name": "tiny"}})
    ids = [5, 80, 33, 7, 120, 64]
    llama = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=32, logits_all=True, verbose=False, n_gpu_layers=0)
    llama.eval(ids)
    got = torch.tensor(llama.scores[: len(ids)])
    with torch.inference_mode():
        wanted = decoded_model(handle, store)(input_ids=torch.tensor([ids])).logits[0]
    # llama.cpp rounds activations to 8 bits for these products
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > 0.995


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def write_llama3(folder: Path) -> tuple[ModelHandle, dict[str, Any]]:
    """A dense model with Llama 3's scaling as ``out/model.gguf``, and its config."""
    config = {**LLAMA, "vocab_size": 320, "head_dim": 32, "rope_parameters": LLAMA3}
    handle = make_model(folder / "source", config)
    make_tokenizer(folder / "source")
    exporter, store = GGUFExporter(), PackedStore(folder / "blocks")
    assert exporter.source_refusals(handle.path, handle.config) == []
    exporter.write(handle, store, {}, folder / "out", {})
    exporter.read_back(folder / "out", handle, store)
    return handle, config


def test_gguf_divides_frequencies_as_llama_3_does(tmp_path: Path) -> None:
    """The expected factors are written out: high frequencies stay, low ones slow down, between them a blend."""
    from gguf import GGUFReader

    write_llama3(tmp_path)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out/model.gguf").tensors}["rope_freqs.weight"]
    assert found.tensor_type.name == "F32"
    turns = [32 / (2 * math.pi * 500.0 ** (index / 16)) for index in range(16)]
    blends = [min(1.0, max(0.0, (turn - 1.0) / 3.0)) for turn in turns]
    expected = [1 / (blend + (1 - blend) / 8.0) for blend in blends]
    assert min(expected) == 1 and max(expected) == 8 and len(set(expected)) > 3
    torch.testing.assert_close(torch.from_numpy(found.data.copy()), torch.tensor(expected), rtol=1e-5, atol=0)


def test_llama_cpp_turns_positions_as_llama_3_does(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    handle, config = write_llama3(tmp_path)
    ids = [(7 * i * i + 3) % 310 for i in range(60)]
    llama = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    llama.eval(ids)
    got = torch.tensor(llama.scores[: len(ids)])

    def similar(model: torch.nn.Module) -> float:
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([ids])).logits[0]
        return float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min())

    scaled = similar(handle.dense_model())
    # the same weights without the scaling
    plain = make_model(tmp_path / "plain", {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert scaled > 0.9999 > similar(plain.dense_model())


@pytest.mark.parametrize("rules", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx"])
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, rules: str) -> None:
    """Also of a word that is a token which no merges make: Llama 3 takes it whole, others do not."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer

    handle = make_model(tmp_path / "source", {**LLAMA, "vocab_size": 400})
    make_tokenizer(tmp_path / "source")
    file = tmp_path / "source" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["Ġcats"] = 350
    data["model"]["ignore_merges"] = rules == "llama-bpe"
    step = {**data["pre_tokenizer"], "use_regex": rules in ("gpt-2", "smollm")}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    before = {
        "qwen2": [{**split, "pattern": {"Regex": _QWEN2}}], "smollm": [{"type": "Digits", "individual_digits": True}],
    }.get(rules, [] if rules == "gpt-2" else [{**split, "pattern": {"Regex": _LLAMA3}}])  # fmt: skip
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, step]}
    file.write_text(json.dumps(data))
    exporter, out = GGUFExporter(), tmp_path / "out"
    assert exporter.source_refusals(handle.path, handle.config) == []
    exporter.write(handle, PackedStore(tmp_path / "blocks"), {}, out, {})
    llama = llama_cpp.Llama(str(out / "model.gguf"), vocab_only=True, verbose=False)
    ours = Tokenizer.from_file(str(file))
    for text in (
        "the cat's hat, the cats sat",
        "In 2024 there were 31337 rats!\n\n  don't  ",
        "über Größe 東京 <|end|> x",
    ):
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text).ids, text
    whole = ours.encode(" cats").ids == [350]
    assert whole == (rules == "llama-bpe")


def context(run_dir: Path, recipe: dict[str, Any], events: list[Event]) -> RunContext:
    stage_dir = run_dir / "stages" / "export"
    stage_dir.mkdir(parents=True, exist_ok=True)
    return RunContext(run_dir, "export", stage_dir, 0, "cpu", "float32", recipe, events.append)


def run_stage(
    run_dir: Path, handle: ModelHandle, store: PackedStore, formats: list[str]
) -> tuple[RunState, list[Event]]:
    recipe = {
        "name": "tiny",
        "model": {"path": str(handle.path)},
        "run": {"dir": str(run_dir), "seed": 0},
        "stages": {"quantize": {"type": "rtn"}, "export": {"type": "export", "formats": formats}},
    }
    events: list[Event] = []
    state = RunState(model=handle, packed=store, metrics=[Metric("text", "perplexity", 9.5, 10.25, n=99)])
    state.policies["pesf"] = {"alpha": 0.3}
    config = ExportConfig(type="export", formats=tuple(formats))
    Export("export", config).run(state, context(run_dir, recipe, events))
    return state, events


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stage_writes_the_same_bytes_wherever_and_however_often_it_runs(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", {**MIXTRAL, "vocab_size": 320}, torch.bfloat16)
    make_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Source\n")
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4)
    formats = ["native", "compressed-tensors", "gguf", "dense"]
    state, events = run_stage(tmp_path / "a", handle, store, formats)
    assert state.artifacts == {
        name: tmp_path / "a" / ("artifact" if name == "native" else f"artifact-{name}") for name in formats
    }
    warnings = [event.data["text"] for event in events if event.kind == "warning"]
    assert sum("pesf policy acts at run time" in text for text in warnings) == 3
    card = (tmp_path / "a" / "artifact" / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "| text | perplexity | 9.5 | 10.25 | +0.75 |" in card
    assert "import llmcompress.hf" in card
    first = {name: contents(path) for name, path in state.artifacts.items()}
    assert str(tmp_path).encode() not in b"".join(data for files in first.values() for data in files.values())
    # killed after the rename of one artifact and before the next: the first is kept, the rest written
    (tmp_path / "a" / "artifact-gguf" / "model.gguf").unlink()
    (tmp_path / "a" / "artifact-gguf").rename(tmp_path / "a" / "artifact-gguf.partial")
    kept = (tmp_path / "a" / "artifact" / "model.safetensors").stat().st_mtime_ns
    state, _ = run_stage(tmp_path / "a", handle, store, formats)
    assert {name: contents(path) for name, path in state.artifacts.items()} == first
    assert (tmp_path / "a" / "artifact" / "model.safetensors").stat().st_mtime_ns == kept
    other, _ = run_stage(tmp_path / "b", handle, store, formats)
    assert {name: contents(path) for name, path in other.artifacts.items()} == first


def test_stage_refuses_before_it_writes_anything(tmp_path: Path) -> None:
    handle = make_model(tmp_path / "source", MIXTRAL)
    store = quantize(handle, tmp_path / "blocks", QuantSpec(3, 32))
    with pytest.raises(ExportError) as caught:
        run_stage(tmp_path / "run", handle, store, ["native", "compressed-tensors", "gguf"])
    assert caught.value.exit_code == 7
    for reason in ("asymmetric", "2 or 3 bits", "3-bit asymmetric weights have no GGML type", "no tokenizer.json"):
        assert reason in caught.value.message
    assert "compressed-tensors, gguf" in str(caught.value.hint)
    assert not list((tmp_path / "run").glob("artifact*"))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    handle = make_model(tmp_path / "source", LLAMA)
    store = quantize(handle, tmp_path / "blocks", SYMMETRIC4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmcompress.export.base.shutil.copyfile", full)
    with pytest.raises(ResourceError, match="disk is full"):
        run_stage(tmp_path / "run", handle, store, ["dense"])
    assert not list((tmp_path / "run").glob("artifact*"))
