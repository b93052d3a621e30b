from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llmcompress.pipeline.estimate import plan
from llmcompress.recipe.catalog import ROOT, list_recipes
from llmcompress.recipe.documents import parse_document
from llmcompress.recipe.load import load_recipe
from llmcompress.recipe.lock import locked_recipe
from llmcompress.recipe.schema import schema

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
HUB = {
    "eac_moe_mixtral": "mixtral_8x7b",
    "eac_moe_phi35": "phi35_moe",
    "eac_moe_qwen15": "qwen15_moe_a27b",
    "eac_moe_deepseek_v2_lite": "deepseek_v2_lite",
    "eac_moe_olmoe": "olmoe_1b_7b",
    "gptq_smollm2": "smollm2_135m",
}
EVERY = list_recipes()
TO_RUN = [info for info in EVERY if not info.fragment]


def named(infos):
    return pytest.mark.parametrize("info", infos, ids=[info.name for info in infos])


def test_the_checked_in_schema_is_current():
    stored = json.loads((ROOT / "recipe.schema.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(schema())), "run: llmcompress schema > recipes/recipe.schema.json"


@named(EVERY)
def test_headers_hold_schema_command_and_needs(info):
    first = info.path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found and (info.path.parent / found[1]).resolve() == (ROOT / "recipe.schema.json").resolve()
    assert info.title and info.command and info.needs


@named(TO_RUN)
def test_the_command_in_the_header_runs_this_recipe(info):
    words = shlex.split(info.command)
    assert words[:3] == ["llmcompress", "run", info.name]
    loaded = load_recipe(info.name, words[3:])
    assert not loaded.missing
    assert loaded.recipe.name == info.name.rsplit("/", 1)[-1]


@named(TO_RUN)
def test_every_recipe_round_trips_through_its_lock(info, tmp_path):
    loaded = load_recipe(info.name, allow_missing=True)
    path = tmp_path / "recipe.lock.json"
    path.write_text(json.dumps({"recipe": locked_recipe(loaded)}))
    again = load_recipe(path, allow_missing=True)
    assert again.data == loaded.data
    assert list(again.recipe.stages) == list(loaded.recipe.stages)


@named(EVERY)
def test_every_recipe_passes_the_editor_schema(info):
    jsonschema = pytest.importorskip("jsonschema")
    document = parse_document(info.path, info.path.read_text(encoding="utf-8"))
    assert not document.problems
    jsonschema.validate(document.data, schema())


def test_the_editor_schema_finds_typos():
    jsonschema = pytest.importorskip("jsonschema")
    for wrong in ({"nmae": "x"}, {"run": {"sed": 1}}, {"stages": {"q": {"type": "gptq", "dmp": 0.1}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())
    jsonschema.validate({"run": {"seed": "${vars.s}"}, "stages": {"prune~": None}}, schema())


@pytest.mark.parametrize("name", HUB)
def test_hub_recipes_plan_without_weights_or_network(name):
    config = json.loads((CONFIGS / f"{HUB[name]}.json").read_text())
    found = plan(load_recipe(name, allow_missing=True), config, "cuda")
    assert found.unmatched == 0
    assert found.output_bytes < 0.35 * found.dense_bytes or name == "gptq_smollm2"
    assert all(rule.weights for rule in found.rules)


@pytest.mark.parametrize("name", [name for name in HUB if name.startswith("eac_moe")])
def test_the_other_bit_settings_are_in_the_header_and_work(name):
    config = json.loads((CONFIGS / f"{HUB[name]}.json").read_text())
    text = load_recipe(name, allow_missing=True).text
    settings = dict(re.findall(r"^# ([\d.]+) bit: (.+)$", text, re.MULTILINE))
    assert len(settings) == 2
    for bits, words in settings.items():
        loaded = load_recipe(name, shlex.split(words), allow_missing=True)
        assert plan(loaded, config, "cuda").bits_codes == pytest.approx(float(bits), abs=0.005)


def test_siblings_differ_from_the_quickstart_in_the_method_alone():
    base = load_recipe("quickstart").data["stages"]
    for name, kind in (("quickstart_gptq", "gptq"), ("quickstart_rtn", "rtn")):
        other = load_recipe(name).data["stages"]
        assert other["quantize"]["type"] == kind
        for stage in ("calibrate", "evaluate"):
            assert other[stage] == base[stage]
        assert other["quantize"]["rules"] == base["quantize"]["rules"]
