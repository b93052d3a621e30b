from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmcompress.errors import ExportError, ResourceError
from llmcompress.export import base
from llmcompress.export.base import (
    ShardWriter,
    atomic_folder,
    cast,
    copy_side_files,
    expert_rows,
    some,
)
from llmcompress.export.dense import DenseExporter
from llmcompress.export.native import NativeExporter
from llmcompress.export.readers import SafetensorsFolder
from llmcompress.models.registry import layout_from_config
from llmcompress.models.sizes import packed_block_bytes
from llmcompress.quant.codecs.int_group import decode, encode
from llmcompress.quant.spec import QuantSpec


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(3, 24), QuantSpec(2, 5)], ids=str)
def test_cutting_packed_experts_equals_cutting_their_values(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, spec.levels, (3, 10, 48), dtype=torch.uint8, generator=generator)
    groups = spec.groups(48)
    scale = torch.rand(3, 10, groups, generator=generator).half()
    zero = None
    if not spec.symmetric:
        zero = torch.randint(0, spec.levels, (3, 10, groups), dtype=torch.uint8, generator=generator)
    packed = encode(codes, scale, zero, spec)
    whole = decode(packed)
    assert torch.equal(decode(expert_rows(packed, slice(5, 10), 2)), whole[2, 5:10])
    assert torch.equal(decode(expert_rows(packed, slice(0, 5))), whole[:, :5])


def test_shards_split_at_the_limit_and_list_every_tensor(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=100)
    tensors = {name: torch.full((10,), float(i)) for i, name in enumerate("abcde")}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json",
    ]  # fmt: skip
    with SafetensorsFolder(tmp_path) as files:
        assert files.names() == set("abcde")
        assert all(torch.equal(files.tensor(name), tensor) for name, tensor in tensors.items())
        with pytest.raises(ExportError, match="z is missing"):
            files.tensor("z")


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(2))
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_name_written_twice_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1)
    writer.add("a", torch.zeros(2))
    writer.add("b", torch.zeros(2))
    with pytest.raises(ExportError, match="a: written twice"):
        writer.add("a", torch.zeros(2))


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), atomic_folder(out) as part:
        (part / "half").write_text("x")
        raise KeyError("interrupted")
    assert not out.exists()
    with atomic_folder(out) as part:
        assert list(part.iterdir()) == []
        (part / "file").write_text("x")
        assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="already exists"), atomic_folder(out):
        pass


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    monkeypatch.setattr(base, "_sync", lambda path: synced.append((path.name, out.exists())))
    with atomic_folder(out) as part:
        for name in ("a", "b/c"):
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text("x")
    assert synced == [("a", False), ("c", False), (tmp_path.name, True)]


def test_memory_of_an_export_counts_one_shard_at_most() -> None:
    layout = layout_from_config(
        {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
    )  # fmt: skip
    largest = 4 * max(sum(math.prod(v.shape) for v in block.tensors()) for block in layout.blocks)
    exporter = DenseExporter()
    assert exporter.working_bytes(layout, {}, 2) == largest + exporter.output_bytes(layout, {}, 2)
    # a parameter of so many bytes stands for a model of many shards
    assert exporter.working_bytes(layout, {}, base.SHARD_BYTES) == largest + base.SHARD_BYTES
    # the native format holds one tensor that stays dense, and reads it back beside the source's where it is larger
    plan = {name: QuantSpec(4, 32, True) for name, *_ in layout.quantizable()}
    blocks, embedding = max(packed_block_bytes(block, plan) for block in layout.blocks), 96 * 64
    native, size = NativeExporter(), 2 * base.SHARD_BYTES
    output = native.output_bytes(layout, plan, 2)
    assert native.working_bytes(layout, plan, 2) == blocks + 2 * embedding + output
    assert native.working_bytes(layout, plan, size) == blocks + 2 * size * embedding


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "no"), ResourceError),
        (OSError(errno.EACCES, "no"), ExportError),
        # numpy's, on a full disk
        (OSError("221184 requested and 95552 written"), ResourceError),
    ],
)
def test_system_errors_get_their_exit_code(tmp_path: Path, error: OSError, kind: type[Exception]) -> None:
    with pytest.raises(kind), atomic_folder(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_beyond_fp16_are_an_error_and_not_infinite(dtype: torch.dtype) -> None:
    fits = torch.tensor([65504.0, -3.0]).to(dtype)
    if dtype is torch.float32:
        assert cast("w", fits, torch.float16).tolist() == [65504.0, -3.0]
    with pytest.raises(ExportError, match=r"w: holds 131072, and float16 ends at 65504") as caught:
        cast("w", torch.tensor([1.0, -131072.0], dtype=dtype), torch.float16)
    assert "bfloat16" in str(caught.value.hint)
    # infinities of the source are the source's; wider types and integers take everything
    assert cast("w", torch.tensor([float("inf")], dtype=dtype), torch.float16).isinf().all()
    assert cast("w", torch.tensor([131072.0], dtype=dtype), torch.bfloat16).item() == 131072.0
    assert cast("w", torch.tensor([131072]), torch.float16).dtype == torch.int64


def test_everything_a_tokenizer_needs_comes_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    wanted = [
        "tokenizer_config.json", "vocab.txt", "tokenizer.model", "spiece.model", "qwen.tiktoken", "chat_template.jinja",
        "generation_config.json", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    for name in [*wanted, "notes.txt", "model.safetensors", "config.json"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    copy_side_files(SimpleNamespace(path=source, tokenizer_path=None), out)  # type: ignore[arg-type]
    found = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert found == {name: name for name in wanted}


def test_lists_of_names_are_short() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b", "c"]) == "a and 2 more"
