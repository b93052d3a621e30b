from __future__ import annotations

import hashlib
import json
import platform
import struct

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe import lock as locks
from llmcompress.recipe.load import load_recipe
from llmcompress.recipe.lock import changes_since, file_record, make_lock


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + b"weights")
    (folder / "notes.txt").write_text("not read by any run")
    return folder


def lock_file(path, loaded):
    path.write_text(json.dumps(make_lock(loaded), indent=1))
    return path


def test_a_lock_reproduces_the_recipe(write, tmp_path):
    write("child.yaml", 'extends: good\nvars: {a: "x\\u00e9\\U0001F600"}\nstages: {quantize: {damp: "${vars.d}"}}\n')
    loaded = load_recipe("child.yaml", ["+vars.d=0.02", "run.seed=7"])
    again = load_recipe(lock_file(tmp_path / "recipe.lock.json", loaded))
    assert again.recipe == loaded.recipe and again.data == loaded.data
    assert list(again.recipe.stages) == list(loaded.recipe.stages)
    assert again.lock["recipe_sha256"] == make_lock(again)["recipe_sha256"]
    assert load_recipe(tmp_path, ["run.seed=8"]).recipe.run.seed == 8


def test_a_lock_records_files_overrides_versions_and_machine(write, model):
    loaded = load_recipe("good.yaml", ["model.path=m"])
    lock = make_lock(loaded)
    files = lock["inputs"]["model.path"]["files"]
    assert set(files) == {"config.json", "model.safetensors"}
    assert files["config.json"]["sha256"] == hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    assert lock["composition"]["overrides"] == ["model.path=m"]
    assert list(lock["composition"]["files"]) == ["good.yaml"]
    assert {"python", "torch", "transformers", "llmcompress"} <= set(lock["versions"])
    assert lock["hardware"]["cores"] >= 1 and lock["hardware"]["ram_bytes"] > 0


def test_the_hash_depends_on_the_order_of_stages_and_on_values(write):
    write("other.yaml", "extends: good\nstages: {prune: {type: pesf}, export: {}}\n")
    write("third.yaml", "extends: good\nstages: {prune: {type: pesf}, quantize: {}}\n")
    hashes = {make_lock(load_recipe(name))["recipe_sha256"] for name in ("good.yaml", "other.yaml", "third.yaml")}
    assert len(hashes) == 3


def test_values_of_the_environment_stay_out(write, monkeypatch, tmp_path):
    write("child.yaml", 'extends: good\nmodel: {path: "${oc.env:WHERE}"}\n')
    monkeypatch.setenv("WHERE", "m-of-mine")
    path = lock_file(tmp_path / "recipe.lock.json", load_recipe("child.yaml"))
    assert "m-of-mine" not in path.read_text()
    monkeypatch.setenv("WHERE", "elsewhere")
    assert load_recipe(path).recipe.model.path == "elsewhere"


def test_text_that_only_looks_like_an_interpolation_survives(write, tmp_path):
    write("child.yaml", "extends: good\nstages: {calibrate: {source: {texts: ['costs \\${x} dollars']}}}\n")
    loaded = load_recipe("child.yaml")
    assert loaded.recipe.stages["calibrate"].source.texts == ("costs ${x} dollars",)
    again = load_recipe(lock_file(tmp_path / "recipe.lock.json", loaded))
    assert again.data == loaded.data


def test_changed_inputs_are_named(write, model, tmp_path):
    path = lock_file(tmp_path / "recipe.lock.json", load_recipe("good.yaml", ["model.path=m"]))
    assert changes_since(load_recipe(path)) == []
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + b"Weights")
    (model / "config.json").unlink()
    (model / "tokenizer.model").write_bytes(b"x")
    data = json.loads(path.read_text())
    data["versions"]["torch"] = "0.4"
    path.write_text(json.dumps(data))
    lines = changes_since(load_recipe(path))
    assert "model.path: config.json is missing" in lines
    assert "model.path: model.safetensors has changed" in lines
    assert "model.path: tokenizer.model is new" in lines
    assert any(line.startswith("torch: 0.4 then, ") for line in lines)
    assert changes_since(load_recipe("good.yaml")) == []


def test_large_weights_are_identified_by_their_header(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WHOLE_FILE_LIMIT", 10)
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}" + b"0" * 20)
    record = file_record(file)
    assert record == {"bytes": 30, "safetensors_header_sha256": hashlib.sha256(b"{}").hexdigest()}
    other = tmp_path / "other.bin"
    other.write_bytes(b"0" * 20)
    assert "sha256" in file_record(other)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "not a recipe lock|required"), ('{"recipe": 3}', "not a recipe lock"), ('{"a"', "not valid")],
)
def test_damaged_locks_are_refused(tmp_path, text, words):
    path = tmp_path / "recipe.lock.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


def test_macos_tells_its_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(locks, "CPUINFO", tmp_path / "cpuinfo")
    sysctl = tmp_path / "sysctl"
    sysctl.write_text("#!/bin/sh\ntest \"$*\" = '-n machdep.cpu.brand_string' && echo 'Apple M3'\n")
    sysctl.chmod(0o755)
    monkeypatch.setattr(locks.shutil, "which", lambda *_, **__: str(sysctl))
    assert locks.processor() == "Apple M3"
    # a system that knows no such name, and one without the program
    sysctl.write_text("#!/bin/sh\nexit 1\n")
    assert locks.processor() == (platform.processor() or platform.machine())
    monkeypatch.setattr(locks.shutil, "which", lambda *_, **__: None)
    assert locks.processor() == (platform.processor() or platform.machine())
