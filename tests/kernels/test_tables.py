"""Tables of launches count only on the GPU and with the versions that they were measured with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmcompress_kernels import tables

GPU = "Some GPU 80GB"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_entries_are_added(cache: Path) -> None:
    assert tables.read("triton", GPU) == ({}, "no table: llmcompress bench tune makes one")
    path = tables.write("triton", GPU, {"a": {"rows": 1}})
    assert path == cache / "triton" / "some-gpu-80gb.json"
    tables.write("triton", GPU, {"b": {"rows": 2}})
    assert tables.read("triton", GPU) == ({"a": {"rows": 1}, "b": {"rows": 2}}, None)
    assert tables.read("cuda", GPU)[0] == {}
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half-written stays"


@pytest.mark.parametrize("part", ["kernels", "triton"])
def test_a_table_of_other_versions_is_ignored_and_replaced(part: str) -> None:
    path = tables.write("triton", GPU, {"a": {"rows": 1}})
    stored = json.loads(path.read_text())
    stored["versions"][part] = "0.1"
    path.write_text(json.dumps(stored))
    entries, reason = tables.read("triton", GPU)
    assert entries == {}
    assert reason is not None
    assert f"{part} 0.1 instead of {tables.versions('triton')[part]}" in reason
    assert [line["table"] for line in tables.describe([GPU, GPU]) if line["backend"] == "triton"] == [reason]
    tables.write("triton", GPU, {"b": {"rows": 2}})
    assert tables.read("triton", GPU) == ({"b": {"rows": 2}}, None)


def test_what_is_no_table_of_this_gpu_is_ignored(cache: Path) -> None:
    path = tables.write("cuda", GPU, {"a": {}})
    # two names may share a file name
    assert tables.path_of("cuda", "Some-GPU 80GB") == path
    assert tables.read("cuda", "Some-GPU 80GB") == ({}, f"ignored, it was measured on {GPU}")
    for text, reason in (("{broken", "is not readable"), ("[]", "another form"), ('{"dense": {}}', "another form")):
        path.write_text(text)
        entries, told = tables.read("cuda", GPU)
        assert entries == {}
        assert told is not None
        assert reason in told


def test_a_change_of_the_kernels_changes_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.versions("cuda")
    (tmp_path / "csrc" / "cuda" / "skinny").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "skinny" / "skinny.cuh").write_text("// another")
    monkeypatch.setattr(tables, "PACKAGE", tmp_path)
    tables.versions.cache_clear()
    try:
        assert tables.versions("cuda") != before
        assert set(tables.versions("cuda")) == {"kernels"}
    finally:
        tables.versions.cache_clear()
