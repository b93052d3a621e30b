from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llmcompress.models.registry import layout_from_config
from llmcompress.models.sizes import parameters
from llmcompress.pipeline.estimate import plan
from llmcompress.recipe.catalog import ROOT, list_recipes
from llmcompress.recipe.documents import parse_document
from llmcompress.recipe.load import load_recipe
from llmcompress.recipe.lock import locked_recipe
from llmcompress.recipe.schema import schema

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
HUB = {
    "eac_moe_mixtral": "mixtral_8x7b",
    "eac_moe_mixtral_8x22b": "mixtral_8x22b",
    "eac_moe_deepseek_v3": "deepseek_v3",
    "eac_moe_phi35": "phi35_moe",
    "eac_moe_qwen15": "qwen15_moe_a27b",
    "eac_moe_deepseek_v2_lite": "deepseek_v2_lite",
    "eac_moe_olmoe": "olmoe_1b_7b",
    "eac_moe_qwen3_30b": "qwen3_30b_a3b",
    "eac_moe_qwen3_next": "qwen3_next_80b_a3b",
    "eac_moe_minimax_m2": "minimax_m2",
    "eac_moe_llama4_scout": "llama4_scout",
    "eac_moe_gemma4": "gemma4_26b_a4b",
    "eac_moe_ernie45": "ernie45_21b_a3b",
    "eac_moe_glm47_flash": "glm47_flash",
    "eac_moe_lfm2": "lfm2_8b_a1b",
    "eac_moe_kimi_linear": "kimi_linear_48b_a3b",
    "gptq": "smollm2_135m",
    "gptq_smollm2": "smollm2_135m",
    "gptq_w8a8": "smollm2_135m",
    "rqt": "smollm2_135m",
    "rqt_mistral": "mistral_7b",
    "q_mamba_mamba2": "mamba2_2b7",
    "q_mamba_mamba": "mamba_2b8",
    "q_mamba_bamba": "bamba_9b",
    "q_mamba_nemotron_h": "nemotron_h_8b",
    "q_mamba_granite4": "granite4_h_tiny",
    "q_mamba_nemotron3": "nemotron3_nano_30b",
    "q_mamba_zamba2": "zamba2_7b",
    "q_mamba_qwen3_next": "qwen3_next_80b_a3b",
}
# further sizes of the same recipes
SIZES = [
    *(("q_mamba_mamba2", f"mamba2_{size}") for size in ("130m", "370m", "780m", "1b3")),
    *(("q_mamba_mamba", f"mamba_{size}") for size in ("130m", "370m", "790m", "1b4")),
    ("q_mamba_mamba", "falcon_mamba_7b"),
]
S2R = {
    "s2r_llama31_8b": "llama31_8b",
    "s2r_qwen2_7b": "qwen2_7b",
    "s2r_qwen2_7b_offline": "qwen2_7b",
    "s2r_qwen25_math_7b": "qwen2_7b",
    "s2r_qwen25_math_7b_offline": "qwen2_7b",
    "s2r_smollm2": "smollm2_135m",
    "s2r_smollm2_prl": "smollm2_135m",
    "s2r_smollm2_solutions": "smollm2_135m",
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


JSON_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip


def fits(value, node, root):
    """Whether ``value`` satisfies the part of JSON schema that recipes use; unknown keywords are an error."""
    known = {"$ref", "anyOf", "type", "const", "enum", "pattern", "properties", "patternProperties", "items"}
    known |= {"additionalProperties", "minItems", "minLength", "minimum", "maximum"}
    known |= {"exclusiveMinimum", "exclusiveMaximum", "title", "description", "default", "$defs", "$schema"}
    assert set(node) <= known, set(node) - known
    if "$ref" in node and not fits(value, root["$defs"][node["$ref"].rsplit("/", 1)[-1]], root):
        return False
    if "anyOf" in node and not any(fits(value, option, root) for option in node["anyOf"]):
        return False
    kind = JSON_TYPES.get(node.get("type"))
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, float)))):
        return False
    if ("const" in node and value != node["const"]) or ("enum" in node and value not in node["enum"]):
        return False
    if isinstance(value, str):
        return len(value) >= node.get("minLength", 0) and re.search(node.get("pattern", ""), value) is not None
    if isinstance(value, list):
        inside = all(fits(item, node["items"], root) for item in value) if "items" in node else True
        return inside and len(value) >= node.get("minItems", 0)
    if isinstance(value, dict):
        return all(fits(item, child, root) for key, item in value.items() for child in children(str(key), node))
    if isinstance(value, int | float):
        return (
            node.get("minimum", value) <= value <= node.get("maximum", value)
            and ("exclusiveMinimum" not in node or value > node["exclusiveMinimum"])
            and ("exclusiveMaximum" not in node or value < node["exclusiveMaximum"])
        )
    return True


def children(key, node):
    """Schemas for the value under ``key``; one that nothing fits for an unknown key."""
    found = [node["properties"][key]] if key in node.get("properties", {}) else []
    found += [child for pattern, child in node.get("patternProperties", {}).items() if re.search(pattern, key)]
    rest = node.get("additionalProperties", True)
    if not found and rest is False:
        return [{"enum": []}]
    return found or ([rest] if isinstance(rest, dict) else [])


@named(EVERY)
def test_every_recipe_passes_the_editor_schema(info):
    document = parse_document(info.path, info.path.read_text(encoding="utf-8"))
    assert not document.problems
    assert fits(document.data, schema(), schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"naem": "x"},
        {"run": {"sed": 1}},
        {"run": {"seed": "x"}},
        {"model": {"dtype": "bf16"}},
        {"stages": {"q": {"type": "gptq", "dmp": 0.1}}},
        {"stages": {"q": {"type": "gptq", "damp": 2}}},
        {"stages": {"q": {"type": "no_such"}}},
        {"stages": {"q": {"rules": {"r": {"bits": 5}}}}},
    ],
)
def test_the_editor_schema_finds_mistakes(wrong):
    assert not fits(wrong, schema(), schema())


def test_the_editor_schema_accepts_partial_recipes_interpolations_and_removals():
    text = {"extends": ["a", "b"], "run": {"seed": "${vars.s}"}, "stages": {"prune~": None, "q": {"damp": 0.1}}}
    assert fits(text, schema(), schema())


@pytest.mark.parametrize("name", HUB)
def test_hub_recipes_plan_without_weights_or_network(name):
    config = json.loads((CONFIGS / f"{HUB[name]}.json").read_text())
    found = plan(load_recipe(name, allow_missing=True), config, "cuda")
    family = next((stage for stage in found.stages if stage.type == "rqt"), None)
    if family is not None:
        # a plan's totals are those of one model; the stage accounts for all six
        assert family.output < 0.25 * 6 * found.dense_bytes
        return
    assert found.unmatched == 0
    # 8-bit weights cannot get below half
    share = 0.75 if name.startswith("q_mamba") else 0.35
    assert found.output_bytes < share * found.dense_bytes or HUB[name] == "smollm2_135m"  # half of it is the vocabulary
    assert all(rule.weights for rule in found.rules)


# billions of parameters as the models' cards tell them; MiniMax-M2's, Qwen3-Next's and Kimi-Linear's are rounded
# there, Llama 4's counts its eyes
PUBLISHED = [
    ("qwen3_30b_a3b", 30.5, 0.05), ("qwen3_next_80b_a3b", 80, 0.5), ("minimax_m2", 230, 1.5),
    ("kimi_linear_48b_a3b", 48, 1.5),
    ("llama4_scout", 109, 1.5), ("gemma4_26b_a4b", 25.2, 0.1),
    ("ernie45_21b_a3b", 21.8, 0.1), ("lfm2_8b_a1b", 8.3, 0.05), ("glm47_flash", 30, 0.5),
    ("mixtral_8x7b", 46.7, 0.05), ("deepseek_v3", 671, 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "billions", "within"), PUBLISHED)
def test_layouts_have_as_many_parameters_as_the_released_models(name, billions, within):
    layout = layout_from_config(json.loads((CONFIGS / f"{name}.json").read_text()))
    assert parameters(layout) / 1e9 == pytest.approx(billions, abs=within)


@pytest.mark.parametrize(("name", "config"), SIZES)
def test_every_released_size_plans(name, config):
    found = plan(load_recipe(name, allow_missing=True), json.loads((CONFIGS / f"{config}.json").read_text()), "cuda")
    assert found.unmatched == 0
    assert found.output_bytes < 0.85 * found.dense_bytes


@pytest.mark.parametrize("name", [name for name in HUB if name.startswith("eac_moe")])
def test_the_other_bit_settings_are_in_the_header_and_work(name):
    config = json.loads((CONFIGS / f"{HUB[name]}.json").read_text())
    text = load_recipe(name, allow_missing=True).text
    settings = dict(re.findall(r"^# ([\d.]+) bit: (.+)$", text, re.MULTILINE))
    assert len(settings) == 2
    for bits, words in settings.items():
        loaded = load_recipe(name, shlex.split(words), allow_missing=True)
        assert plan(loaded, config, "cuda").bits_codes == pytest.approx(float(bits), abs=0.0055)


@pytest.mark.parametrize("name", HUB | S2R)
def test_the_needs_in_the_header_are_what_plan_predicts(name):
    config = json.loads((CONFIGS / f"{(HUB | S2R)[name]}.json").read_text())
    needs = next(info.needs for info in TO_RUN if info.name == name)
    gpu = re.search(r"GPU with ([\d.]+) GB", needs)
    found = plan(load_recipe(name, allow_missing=True), config, "cuda" if gpu else "cpu")
    told = {"vram": gpu, "ram": re.search(r"([\d.]+) GB RAM", needs), "disk": re.search(r"([\d.]+) GB disk", needs)}
    for resource, match in told.items():
        if match or resource != "vram":
            assert float(match[1]) * 1e9 == pytest.approx(getattr(found, resource), rel=0.1), resource


def test_make_targets_of_papers_say_what_recipes_need_and_end_with_a_table():
    text = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"^repro-\S+: .*GPU with ([\d.]+) GB.*writes runs/(\w+)\n(?:\t.*\n)*\t(.*)$", text, re.MULTILINE)
    assert len(found) == 4
    for memory, name, command in found:
        needs = next(info.needs for info in TO_RUN if info.name == name)
        assert memory == re.search(r"GPU with ([\d.]+) GB", needs)[1], name
        assert f" run {name} " in command and command.endswith(" $(REPRO_ARGS)")
        stages = load_recipe(name, allow_missing=True).data["stages"].values()
        measuring = [s for s in stages if s["type"].startswith("evaluate") or s.get("measure")]
        assert measuring and not any(s.get("measure", {"split": "test"})["split"] != "test" for s in measuring)


def test_siblings_differ_from_the_quickstart_in_the_method_alone():
    base = load_recipe("quickstart").data["stages"]
    for name, kind in (("quickstart_gptq", "gptq"), ("quickstart_rtn", "rtn")):
        other = load_recipe(name).data["stages"]
        assert other["quantize"]["type"] == kind
        for stage in ("calibrate", "evaluate"):
            assert other[stage] == base[stage]
        assert other["quantize"]["rules"] == base["quantize"]["rules"]


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen15_moe_a27b", "smollm2_135m"])
def test_gptq_quantizes_everything_of_dense_models_and_mixtures_for_other_readers_too(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    found = plan(load_recipe("gptq", allow_missing=True), config, "cpu")
    assert found.unmatched == 0
    assert [stage.refusals for stage in found.stages if stage.refusals] == []


def test_plans_know_whether_rounded_activations_can_be_exported():
    config = json.loads((CONFIGS / "smollm2_135m.json").read_text())
    words = ["stages.activations.granularity=token", "stages.export.formats=[native,compressed-tensors]"]
    for more, refused in ([], False), (["stages.quantize.rules.linears.bits=4"], True):
        found = plan(load_recipe("gptq_w8a8", [*words, *more], allow_missing=True), config, "cpu")
        assert any("rounded per token" in line for stage in found.stages for line in stage.refusals) == refused
