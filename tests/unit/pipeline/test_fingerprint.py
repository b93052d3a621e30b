from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from llmcompress.evaluation.task_specs import SUFFIXES
from llmcompress.pipeline import fingerprint
from llmcompress.pipeline.fingerprint import difference, digest, file_identity, path_identity, with_contents
from llmcompress.quant.tensor_writer import write_tensors


def test_digest_sees_values_and_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"a": 1, "b": 2})
    # the first rule that matches decides
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_LIMIT", 1 << 16)
    monkeypatch.setattr(fingerprint, "SAMPLE", 1 << 12)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(1 << 18))
    before = file_identity(file)
    assert file_identity(file) == before
    for place in (0, (1 << 18) - 1):
        data = bytearray(1 << 18)
        data[place] = 1
        file.write_bytes(data)
        assert file_identity(file) != before
    file.write_bytes(bytes((1 << 18) + 1))
    assert file_identity(file) != before


def test_a_large_file_is_read_once_as_long_as_it_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "REMEMBERED", 100)
    read, hashed = [], fingerprint._hashed
    monkeypatch.setattr(fingerprint, "_hashed", lambda path: read.append(path.name) or hashed(path))
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    large.write_bytes(bytes(100))
    small.write_bytes(bytes(99))
    first = [file_identity(large), file_identity(small), file_identity(large), file_identity(small)]
    assert first[:2] == first[2:] and read == ["large.txt", "small.txt", "small.txt"]
    # other content of the same size; its time is set back, which leaves a trace in the other time
    times = large.stat()
    time.sleep(0.02)
    large.write_bytes(b"1" * 100)
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_identity(large) != first[0]
    # another file in its place
    large.rename(tmp_path / "old.txt")
    large.write_bytes(bytes(100))
    assert file_identity(large) == first[0]


def test_one_tensor_of_a_large_checkpoint_that_differs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_LIMIT", 1 << 10)
    monkeypatch.setattr(fingerprint, "SAMPLE", 16)
    monkeypatch.setattr(fingerprint, "TENSOR_SAMPLE", 64)
    file = tmp_path / "model.safetensors"

    def identity(changed: int | None) -> str:
        tensors = {f"w{n}": torch.full((64, 16), float(n == changed)) for n in range(40)}
        with file.open("wb") as handle:
            write_tensors(handle, tensors)
        return file_identity(file)

    assert len({identity(changed) for changed in (None, *range(40))}) == 41
    # one that is no checkpoint is sampled all the same
    file.write_bytes(bytes(1 << 12))
    assert file_identity(file)


def test_paths_count_by_content_not_by_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("same")
    two.write_text("same")
    section = {"source": {"kind": "text", "path": str(one)}, "samples": 4}
    moved = {"source": {"kind": "text", "path": str(two)}, "samples": 4}
    assert with_contents(section) == with_contents(moved)
    before = with_contents(section)
    one.write_text("other")
    assert with_contents(section) != before
    assert with_contents({"test_path": str(two)}) != {"test_path": str(two)}
    assert with_contents({"path": "not/there"}) == {"path": "not/there"}
    assert with_contents({"note": str(one)}) == {"note": str(one)}
    # of several files each counts
    several = with_contents({"path": [str(one), str(two)]})
    two.write_text("changed")
    assert with_contents({"path": [str(one), str(two)]}) != several


def test_patterns_count_all_files_they_match(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    section = {"path": str(tmp_path / "*.txt")}
    before = with_contents(section)
    (tmp_path / "b.txt").write_text("b")
    both = with_contents(section)
    assert both != before
    (tmp_path / "b.txt").write_text("changed")
    assert with_contents(section) != both


def test_model_folder_ignores_what_no_run_reads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = path_identity(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    assert path_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert path_identity(tmp_path) != before


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "chat_templates/default.jinja"])
def test_what_lies_in_folders_of_a_model_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("old")
    before = path_identity(tmp_path)
    (tmp_path / name).write_text("new")
    assert path_identity(tmp_path) != before


def test_files_of_one_name_in_several_folders_all_count(tmp_path: Path) -> None:
    seen = set()
    for first, second in (("a", "b"), ("b", "b"), ("a", "a"), ("b", "a")):
        for folder, text in (("one", first), ("two", second)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "rows.jsonl").write_text(text)
        seen.add(path_identity(tmp_path))
    assert len(seen) == 4


def test_a_run_folder_stands_for_its_artifact(tmp_path: Path) -> None:
    for name in ("artifact", "stages/quantize/blocks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "artifact/config.json").write_text("{}")
    (tmp_path / "artifact/model.safetensors").write_bytes(b"weights")
    before = path_identity(tmp_path)
    assert before == path_identity(tmp_path / "artifact")
    # a report or a resume writes here, and no model is another for it
    (tmp_path / "events.jsonl").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    assert path_identity(tmp_path) == before
    (tmp_path / "artifact/model.safetensors").write_bytes(b"WEIGHTS")
    assert path_identity(tmp_path) != before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_tasks_count_in_every_form_that_is_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"test{suffix}").write_bytes(b"old")
    before = path_identity(tmp_path)
    (tmp_path / f"test{suffix}").write_bytes(b"new")
    assert path_identity(tmp_path) != before


@pytest.mark.parametrize("changed", ["mine.yaml", "rows.jsonl", "base.yaml"])
def test_a_task_of_ones_own_counts_with_its_rows(tmp_path: Path, changed: str) -> None:
    (tmp_path / "mine.yaml").write_text(
        "include: base.yaml\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl, dev: not_here.jsonl}}\n"
        "process_results: !function code.process\n"
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "base.yaml").write_text("output_type: generate_until\n")
    section = {"task": "mine", "path": str(tmp_path / "mine.yaml")}
    before = with_contents(section)
    with (tmp_path / changed).open("a") as handle:
        handle.write("\n")
    assert with_contents(section) != before


@pytest.mark.parametrize("changed", ["deep/base.yaml", "deep/own.yaml", "rows.jsonl", "elsewhere/dev.jsonl"])
def test_a_task_stands_for_what_it_includes_names_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    for folder in ("deep", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "mine.yaml").write_text("include: [deep/base.yaml]\n")
    (tmp_path / "deep" / "base.yaml").write_text("include: own.yaml\noutput_type: generate_until\n")
    (tmp_path / "deep" / "own.yaml").write_text(
        "include: ../mine.yaml\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl, dev: dev.jsonl}}\n"
    )
    for name in ("rows.jsonl", "elsewhere/dev.jsonl"):
        (tmp_path / name).write_text("{}\n")
    section = {"task": "mine", "path": str(tmp_path / "mine.yaml")}
    before = with_contents(section)
    with (tmp_path / changed).open("a") as handle:
        handle.write("\n")
    assert with_contents(section) != before


def test_difference_names_every_change() -> None:
    before = {"bits": 3, "rules": {"a": {"bits": 4}}, "source": {"path": {"contents": "x"}}}
    after = {"bits": 2, "rules": {"b": {"bits": 4}}, "source": {"path": {"contents": "y"}}}
    assert difference(before, after, "stages.quantize") == [
        "stages.quantize.bits: 3 → 2",
        'stages.quantize.rules.a: {"bits": 4} → (not set)',
        'stages.quantize.rules.b: (not set) → {"bits": 4}',
        "stages.quantize.source.path: another file, or its contents have changed",
    ]
    assert len(difference({}, {"texts": ["long" * 1000]}, "")[0]) < 200
    assert difference(before, before, "") == []
