from __future__ import annotations

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe import catalog


def test_shipped_recipes_come_with_title_command_and_needs():
    found = {info.name: info for info in catalog.list_recipes()}
    assert {"quickstart", "eac_moe_mixtral", "gptq_smollm2", "base/eac_moe", "smoke/eac_moe_tiny"} <= set(found)
    quickstart = found["quickstart"]
    assert quickstart.command == "llmcompress run quickstart"
    assert quickstart.title and quickstart.needs and not quickstart.fragment
    assert found["base/eac_moe"].fragment
    assert not any(info.fragment for info in catalog.list_recipes(fragments=False))


def test_every_recipe_belongs_to_a_system_and_says_what_it_runs_on():
    found = {info.name: info for info in catalog.list_recipes()}
    assert {info.system for info in found.values()} == set(catalog.SYSTEMS)
    expected = {"gptq_then_s2r": "S2R", "gptq_smollm2": "GPTQ", "smoke/rqt_tiny": "tests", "quickstart_rtn": "EAC-MoE"}
    assert {name: found[name].system for name in expected} == expected
    assert found["quickstart"].runs_on == "CPU, 1.5 GB" and found["eac_moe_deepseek_v3"].runs_on == "GPU, 48.1 GB"
    assert found["gptq"].runs_on == "see plan"
    assert [name for name, info in found.items() if not info.runs_on and not info.fragment] == []


def test_names_to_run_come_first():
    names = catalog.recipe_names()
    assert names.index("quickstart") < names.index("smoke/eac_moe_tiny")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "smoke/eac_moe_tiny", "base/eac_moe"])
def test_names_find_shipped_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert catalog.find_recipe(name).is_file()


def test_a_file_wins_over_a_shipped_recipe_and_a_run_folder_stands_for_its_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("x")
    assert catalog.find_recipe("quickstart").resolve() == tmp_path / "quickstart"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / catalog.LOCK_NAME).write_text("{}")
    assert catalog.find_recipe("run").name == catalog.LOCK_NAME


@pytest.mark.parametrize(
    ("name", "words"),
    [("quickstrat", "did you mean quickstart"), ("no/such.yaml", "no such file"), ("../x", "no such")],
)
def test_unknown_names_are_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=words):
        catalog.find_recipe(name)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="a folder without recipe"):
        catalog.find_recipe(tmp_path)
    assert catalog.shipped_path("/etc/passwd") is None and catalog.shipped_path("assets/text/README.md") is None
