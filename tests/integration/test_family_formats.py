"""Members in other tools' formats: exact where a weight has a single node, dense in GGUF, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmcompress.errors import ExportError
from llmcompress.export.family_edit import write_dense_member
from llmcompress.export.family_formats import on_one_grid, write_other_member
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.handle import ModelHandle
from llmcompress.quant.codecs import codec

pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")


@pytest.fixture
def lonely(family_run: Path, tmp_path: Path) -> FamilyArtifact:
    """The family with every weight cut to the first node on its path."""
    import shutil

    folder = tmp_path / "family"
    shutil.copytree(family_run / "run/artifact", folder)
    data = json.loads((folder / "family.json").read_text())
    whole = FamilyArtifact(folder).plan
    for name, entry in data["plan"]["weights"].items():
        first = {whole.path(name, member)[0] for member in whole.order}
        entry["bits"] = {node: bits for node, bits in entry["bits"].items() if node in first}
    (folder / "family.json").write_text(json.dumps(data))
    return FamilyArtifact(folder)


def test_a_single_node_is_exact_in_compressed_tensors(lonely: FamilyArtifact, tmp_path: Path) -> None:
    found, reasons = on_one_grid(lonely, "cat")
    assert not reasons and set(found) == set(lonely.plan.linears)
    for linear, packed in found.items():
        assert packed.spec.symmetric and packed.spec.bits in (4, 8)
        assert torch.equal(codec(packed.spec.codec).decode(packed), lonely.weight(linear, "cat"))
    assert write_other_member(lonely, "cat", "compressed-tensors", tmp_path / "cat") == "every weight exact"
    assert json.loads((tmp_path / "cat/config.json").read_text())["quantization_config"]["quant_method"]


def test_sums_of_nodes_are_refused_by_name(family_run: Path, tmp_path: Path) -> None:
    artifact = FamilyArtifact(family_run / "run/artifact")
    with pytest.raises(ExportError, match=r"_proj is a sum of \d nodes"):
        write_other_member(artifact, "ant", "compressed-tensors", tmp_path / "ant")
    assert list(tmp_path.iterdir()) == []


def test_gguf_holds_a_member_dense(family_run: Path, tmp_path: Path) -> None:
    artifact = FamilyArtifact(family_run / "run/artifact")
    try:
        said = write_other_member(artifact, "ant", "gguf", tmp_path / "ant")
    except ExportError as error:
        # the tiny tokenizer's byte order is not one that llama.cpp knows
        assert "tokenizer" in error.message or "pre-tokenizer" in error.message, error.message
        return
    assert "dense" in said
    write_dense_member(artifact, "ant", tmp_path / "dense")
    assert ModelHandle.open(tmp_path / "dense").layout.blocks
    assert (tmp_path / "ant/model.gguf").stat().st_size > 0
