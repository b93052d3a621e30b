"""``recipes``, ``schema``, ``validate``, ``plan`` and completion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmcompress.cli.app import invoke
from llmcompress.cli.completion import complete_override, complete_recipe, override_keys
from llmcompress.models.paths import assets_folder

CONFIG = Path(__file__).parent.parent / "data" / "hub_configs" / "mixtral_8x7b.json"


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert invoke([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_list_hides_fragments_until_asked(capsys: pytest.CaptureFixture[str]) -> None:
    names = [info["name"] for info in told(capsys, "recipes", "ls")["recipes"]]
    assert {"quickstart", "eac_moe_mixtral"} <= set(names)
    assert not any(name.startswith("base/") for name in names)
    assert any(i["name"].startswith("base/") for i in told(capsys, "recipes", "ls", "--all")["recipes"])


def test_the_list_has_a_heading_for_each_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(":")[0] for line in lines if line.startswith(("EAC-MoE:", "GPTQ:", "Q-Mamba:", "RQT:", "S2R:"))]
    assert heads == ["EAC-MoE", "GPTQ", "Q-Mamba", "RQT", "S2R"]
    place = {line.split()[0]: number for number, line in enumerate(lines) if line.strip()}
    assert place["GPTQ:"] < place["gptq_smollm2"] < place["Q-Mamba:"] < place["q_mamba_tiny"] < place["RQT:"]
    assert "base/eac_moe" not in place and "smoke/gptq_tiny" in place


def test_show_and_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["recipes", "show", "quickstart"]) == 0
    assert "type: qesc" in capsys.readouterr().out
    assert invoke(["recipes", "show", "quickstrat"]) == 2
    assert "did you mean quickstart" in capsys.readouterr().err


def test_copy_gives_a_recipe_that_validates_anywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["recipes", "cp", "smoke/gptq_tiny"]) == 0
    assert (tmp_path / "gptq_tiny.yaml").exists()
    assert invoke(["recipes", "cp", "smoke/gptq_tiny"]) == 2
    assert "--force" in capsys.readouterr().err
    assert invoke(["recipes", "cp", "smoke/gptq_tiny", "mine.yaml"]) == 0
    capsys.readouterr()
    found = told(capsys, "validate", "mine.yaml")
    # a run folder of its own, and the header's command runs this file
    assert found["valid"] and found["name"] == "mine"
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert Path(lines[0].partition("$schema=")[2]).is_file()
    assert "# run: llmcompress run mine.yaml" in lines
    assert told(capsys, "validate", "gptq_tiny.yaml")["name"] == "gptq_tiny"
    assert invoke(["recipes", "cp", "gptq", "not a name.yaml"]) == 0
    capsys.readouterr()
    assert "# run: llmcompress run 'not a name.yaml' model.path=FOLDER" in (tmp_path / "not a name.yaml").read_text()
    assert told(capsys, "validate", "not a name.yaml")["name"] == "gptq"
    assert invoke(["recipes", "cp", "quickstart", "no/where/x.yaml"]) == 4


def test_full_copies_stand_alone_and_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.recipe.load import load_recipe

    monkeypatch.chdir(tmp_path)
    for name in ("smoke/gptq_tiny", "eac_moe_mixtral", "q_mamba_bamba"):
        assert invoke(["recipes", "cp", name, "mine.yaml", "--full", "--force"]) == 0
        copied, shipped = load_recipe("mine.yaml", allow_missing=True), load_recipe(name, allow_missing=True)
        assert len(copied.files) == 1 < len(shipped.files)
        assert copied.recipe.name == "mine" and copied.data["stages"] == shipped.data["stages"]
        assert list(copied.data["stages"]) == list(shipped.data["stages"])
        assert copied.missing == shipped.missing and copied.text.startswith("# yaml-language-server: ")
    capsys.readouterr()
    assert invoke(["recipes", "show", "smoke/gptq_tiny", "--full"]) == 0
    assert "samples: 8" in capsys.readouterr().out
    # a header may say more than what a recipe is, how to run it and what it needs
    assert invoke(["recipes", "show", "q_mamba_tiny", "--full"]) == 0
    assert "# needs: 2 CPU cores" in capsys.readouterr().out


def test_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "schema")
    assert found["$schema"].startswith("https://json-schema.org/")
    assert "stages" in found["properties"]


def test_validate_reports_what_is_still_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nname: r\nmodel: {path: '???'}\nstages:\n  load: {type: load}\n")
    found = told(capsys, "validate", str(recipe))
    assert found["missing"] == ["model.path"]
    assert found["stages"] == [{"name": "load", "type": "load"}]
    assert found["absent"] == []


def test_validate_refuses_what_run_would_and_tells_a_folder_without_a_model_from_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nname: r\nmodel: {{path: {tmp_path}}}\nstages:\n  load: {{type: load}}\n")
    for command in ("validate", "run"):
        assert invoke([command, str(recipe)]) == 4
        assert f"{tmp_path / 'config.json'}: missing" in capsys.readouterr().err
        assert invoke([command, str(recipe), f"model.path={tmp_path}/gone"]) == 4
        assert "gone: no such model folder" in capsys.readouterr().err
    # nothing is wrong with the recipe itself, which is said too
    assert invoke(["validate", str(recipe), f"model.path={tmp_path}/gone"]) == 4
    assert "r: valid (load)" in capsys.readouterr().out


def test_absent_texts_and_tasks_end_validate_and_plan_unless_the_run_will_be_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes(CONFIG.read_bytes())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nname: r\nmodel: {{path: {model}}}\nstages:\n  load: {{type: load}}\n"
        "  calibrate: {type: calibrate, source: gone.txt}\n"
        "  evaluate: {type: evaluate, tasks: [arc_easy], tasks_dir: nowhere}\n"
    )
    for command in ("validate", "plan"):
        assert invoke([command, str(recipe)]) == 4
        said = capsys.readouterr()
        assert f"{recipe}:6: stages.calibrate.source.path: no such file or folder: gone.txt" in said.err
        assert f"{recipe}:7: stages.evaluate.tasks_dir: no such file or folder: nowhere" in said.err
        assert "--config" in said.err
        assert said.out  # what is known all the same
        assert invoke([command, str(recipe), "--config", str(CONFIG)]) == 0
        capsys.readouterr()
    found = told(capsys, "validate", str(recipe), "--config", str(CONFIG))
    assert found["valid"] and len(found["absent"]) == 2


def test_plan_and_validate_refuse_weights_that_run_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(assets_folder() / "reference_moe", model)
    weights = model / "model.safetensors"
    for command in ("validate", "plan"):
        assert invoke([command, "smoke/rtn_tiny", f"model.path={model}"]) == 0
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-2])
    for command in ("validate", "plan"):
        capsys.readouterr()
        assert invoke([command, "smoke/rtn_tiny", f"model.path={model}"]) == 4
        said = capsys.readouterr()
        assert "cut short" in said.err and "--config" in said.err
        assert said.out  # what the config alone tells
        assert invoke([command, "smoke/rtn_tiny", f"model.path={model}", "--config", str(model)]) == 0
    # an error without a next step of its own
    weights.write_bytes(whole.replace(b'"F32"', b'"F99"', 1).replace(b'"BF16"', b'"BF99"', 1))
    for command in ("validate", "plan"):
        assert invoke([command, "smoke/rtn_tiny", f"model.path={model}"]) == 4
        said = capsys.readouterr().err
        assert "99, which is not supported" in said and "--config" in said and "None" not in said
    weights.write_bytes(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for command in ("validate", "plan"):
        assert invoke([command, "smoke/rtn_tiny", f"model.path={model}"]) == 4
        assert "quantized" in capsys.readouterr().err


def test_validate_gives_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nname: r\nmodel: {path: x}\nstages:\n  load: {type: loda}\n")
    assert invoke(["validate", str(recipe)]) == 3
    text = capsys.readouterr().err
    assert f"{recipe}:5" in text
    assert "did you mean load" in text
    assert invoke(["validate", str(tmp_path / "absent.yaml")]) == 3


def test_plan_needs_only_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "plan", "eac_moe_mixtral", "--config", str(CONFIG))
    assert found["model_type"] == "mixtral"
    assert 2.9 < found["bits_codes"] < 3.1
    assert found["stages"][0]["name"] == "load"
    assert invoke(["plan", "eac_moe_mixtral", "--config", str(CONFIG)]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert invoke(["plan", "eac_moe_mixtral", "model.path=absent"]) == 4


def test_plan_fails_when_a_budget_is_exceeded(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["plan", "eac_moe_mixtral", "+host.ram=1GB", "--config", str(CONFIG)]) == 5
    captured = capsys.readouterr()
    assert "bits per weight" in captured.out
    assert "host.ram" in captured.err


def test_completion_knows_recipes_files_and_stage_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("extends: quickstart\n")
    (tmp_path / "quiet.txt").write_text("")
    found = complete_recipe("qui")
    assert "quickstart" in found
    assert "quick.yaml" in found
    assert "quiet.txt" not in found
    keys = override_keys("quick.yaml")
    assert {
        "run.seed",
        "stages.quantize.rules.experts.bits",
        "stages.calibrate.samples",
        "stages.quantize.damp",
    } <= set(keys)
    context: Any = SimpleNamespace(params={"recipe": "quickstart"})
    assert "stages.calibrate.samples=" in complete_override(context, "stages.cal")
    assert complete_override(context, "run.seed=") == []
    assert override_keys("not/there") == sorted(override_keys("not/there"))


def test_shell_completion_answers_without_torch() -> None:
    import os
    import subprocess
    import sys

    line = "llmcompress run quickst"
    environment = {
        **os.environ, "_LLMCOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": line,
    }  # fmt: skip
    code = "import sys; from llmcompress.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert "quickstart" in done.stdout.split()
