from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.errors import ExportError
from llmcompress.export.gguf import GGUFExporter, _rotate_rows
from llmcompress.export.gguf_blocks import block_type, blocks_value, to_blocks
from llmcompress.export.gguf_tokenizer import _LLAMA3, _QWEN2, CONTROL, NORMAL, UNUSED, pre_tokenization, read_tokenizer
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.codecs.int_group import decode, encode
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def packed(shape: tuple[int, ...], spec: QuantSpec) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    grid = (*shape[:-1], spec.groups(shape[-1]))
    scale = (torch.rand(grid, generator=generator) * 0.1 + 1e-3).half()
    zero = None
    if not spec.symmetric:
        zero = torch.randint(0, spec.levels, grid, dtype=torch.uint8, generator=generator)
    return encode(codes, scale, zero, spec)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec(4, 32, True), (5, 96)),
        (QuantSpec(4, 64, True), (2, 5, 96)),  # the last group is half as long
        (QuantSpec(4, -1, True), (5, 96)),
        (QuantSpec(8, 32, True), (2, 3, 64)),
        (QuantSpec(4, 32, False), (5, 96)),
        (QuantSpec(4, 128, False), (2, 5, 256)),
    ],
    ids=str,
)
def test_blocks_decode_to_our_values_in_the_gguf_package(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    gguf = pytest.importorskip("gguf")
    weight = packed(shape, spec)
    blocks = to_blocks(weight)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[block_type(spec)])
    assert found.shape == shape
    assert torch.equal(torch.from_numpy(found), blocks_value(weight))
    difference = (torch.from_numpy(found) - decode(weight)).abs().max()
    assert difference == 0 if spec.symmetric else difference < 2e-3


def test_one_block_by_hand() -> None:
    spec = QuantSpec(4, 32, True)
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).unsqueeze(0)
    data = to_blocks(encode(codes, torch.tensor([[0.5]]), None, spec))
    assert data.dtype == np.uint8
    # fp16 0.5 is 0x3800; element i and element i+16 are both i, in the low and in the high nibble
    assert data[0].tolist() == [0x00, 0x38, *(i * 17 for i in range(16))]


def test_an_offset_beyond_fp16_is_an_error() -> None:
    spec = QuantSpec(4, 32)
    weight = encode(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[60000.0]]), torch.tensor([[15]]), spec)
    with pytest.raises(ExportError, match="exceeds fp16"):
        to_blocks(weight)


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, 32, True), QuantSpec(8, 32)], ids=str)
def test_other_widths_have_no_type(spec: QuantSpec) -> None:
    assert block_type(spec) is None
    layout = layout_from_config({**SIZES, "model_type": "llama"})
    (reason,) = GGUFExporter().refusals(layout, {"model.layers.0.self_attn.q_proj": spec}, {})
    assert "no GGML type" in reason


@pytest.mark.parametrize("group", [24, 48, 16])
def test_groups_must_be_made_of_whole_blocks(group: int) -> None:
    layout = layout_from_config({**SIZES, "model_type": "llama"})
    (reason,) = GGUFExporter().refusals(layout, {"model.layers.0.self_attn.q_proj": QuantSpec(4, group, True)}, {})
    assert "multiples of 32" in reason


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma", "head_dim": 16}, "gemma is not among the families"),
        ({"model_type": "qwen2_moe", "num_experts": 4, "norm_topk_prob": True}, "does not divide"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": False, "head_dim": 16}, "divides"),
        (
            {
                "model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, "head_dim": 16,
                "mlp_only_layers": [1], "num_hidden_layers": 2,
            },
            "experts in every layer",
        ),
    ],
)  # fmt: skip
def test_families_llama_cpp_computes_differently(config: dict[str, Any], words: str) -> None:
    (reason,) = GGUFExporter().refusals(layout_from_config({**SIZES, **config}), {}, {})
    assert words in reason


def test_row_order_of_rotary_heads() -> None:
    """llama.cpp rotates neighbouring rows, transformers rows half a head apart."""
    rows = torch.arange(8.0).reshape(8, 1).expand(8, 32).contiguous()
    assert _rotate_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # type: ignore[index]
    weight = packed((8, 64), QuantSpec(4, 32, False))
    turned = _rotate_rows(weight, 2)
    assert isinstance(turned, PackedWeight)
    assert torch.equal(decode(turned), _rotate_rows(decode(weight), 2))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTE_LEVEL, "use_regex": False}]}


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        ({**BYTE_LEVEL, "add_prefix_space": True}, None),
        (split(_LLAMA3), "llama-bpe"),
        (split(_QWEN2), "qwen2"),
        (split(r"\s+"), None),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
            "smollm",
        ),
        ({"type": "Metaspace"}, None),
        ({}, None),
    ],
)
def test_pre_tokenization_is_known_by_its_rules(rules: dict[str, Any], name: str | None) -> None:
    assert pre_tokenization(rules) == name


def write_tokenizer(folder: Path, **changes: Any) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    data = {
        "model": model,
        "pre_tokenizer": BYTE_LEVEL,
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        **changes,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))


def test_vocabulary_types_and_special_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    facts = read_tokenizer(tmp_path, 5, {"eos_token_id": [2, 3]})
    assert facts.tokens == ["a", "b", "ab", "<s>", "[PAD4]"]
    assert facts.types == [NORMAL, NORMAL, NORMAL, CONTROL, UNUSED]
    assert facts.merges == ["a b"]
    assert facts.special == {"bos": 3, "eos": 2}
    assert (facts.add_bos, facts.add_eos) == (True, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "not byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}}, "not byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenization"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_tokenizer(tmp_path, **changes)
    with pytest.raises(ExportError, match=words):
        read_tokenizer(tmp_path, 5, {})


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ExportError, match="only 3 rows"):
        read_tokenizer(tmp_path, 3, {})
