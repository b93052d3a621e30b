from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.errors import RecipeError, ResourceError
from llmcompress.pipeline import device
from llmcompress.pipeline.estimate import Budget, assumed_device, on_machine, plan
from llmcompress.recipe.load import load_recipe
from llmcompress.units import bytes_text

CONFIGS = Path(__file__).parents[2] / "data" / "hub_configs"
BITS = {
    2: "stages.quantize.rules.experts.bits=2",
    2.5: "stages.quantize.rules.experts.bits={first_half: 3, second_half: 2}",
    3: "stages.quantize.rules.experts.bits=3",
}


def config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def planned(recipe, name, *overrides, device="cpu"):
    return plan(load_recipe(recipe, overrides, allow_missing=True), config(name), device)


@pytest.mark.parametrize(
    ("recipe", "name", "bits", "sizes"),
    [
        # EAC-MoE, table 12 (bits) and table 4 (GB at 3.03); GB at 2 and 2.5 from the same arithmetic
        ("eac_moe_mixtral", "mixtral_8x7b", (2.058, 2.544, 3.029), (13.29, 16.13, 18.97)),
        ("eac_moe_phi35", "phi35_moe", (2.065, 2.549, 3.033), (12.00, 14.54, 17.07)),
        ("eac_moe_qwen15", "qwen15_moe_a27b", (2.062, 2.547, 3.032), (5.02, 5.85, 6.69)),
    ],
)
def test_bits_and_sizes_of_the_paper(recipe, name, bits, sizes):
    for setting, average, size in zip(BITS, bits, sizes, strict=True):
        found = planned(recipe, name, BITS[setting])
        assert found.bits_codes == pytest.approx(average, abs=0.001)
        assert found.output_bytes / 1e9 == pytest.approx(size, abs=0.02)
        assert found.bits_stored == pytest.approx(8 * found.output_bytes / found.parameters)
        assert found.bits_codes < found.bits_weights < found.bits_stored


def test_parameter_counts_equal_the_published_ones():
    published = {"mixtral_8x7b": 46.70e9, "phi35_moe": 41.87e9, "qwen15_moe_a27b": 14.32e9, "deepseek_v2_lite": 15.71e9}
    for name, count in published.items():
        found = planned("eac_moe_mixtral", name)
        assert found.parameters == pytest.approx(count, rel=0.001)
        assert found.dense_bytes == 2 * found.parameters


def test_rules_say_what_they_matched():
    found = planned("eac_moe_deepseek_v2_lite", "deepseek_v2_lite")
    attention, experts = found.rules
    assert (attention.rule, attention.bits, experts.bits) == ("attention", 4.0, 3.0)
    assert attention.weights == 27 * 4
    assert experts.weights == 3 + 26 * 5  # dense first layer; two banks and three shared linears in the others
    assert found.unmatched == 0
    halves = planned("eac_moe_deepseek_v2_lite", "deepseek_v2_lite", BITS[2.5])
    assert 2.4 < halves.rules[1].bits < 2.6


def test_bits_of_a_rule_are_the_mean_over_its_values():
    found = planned("eac_moe_deepseek_v2_lite", "deepseek_v2_lite", BITS[2.5]).rules[1]
    # the first layer is dense, and smaller than the 26 others
    dense, sparse = 3 * 2048 * 10944, 3 * 2048 * 1408 * (64 + 2)
    values = dense + 26 * sparse
    assert (found.parameters, found.weights) == (values, 133)
    assert found.bits == pytest.approx((3 * (dense + 13 * sparse) + 2 * 13 * sparse) / values)


def test_weights_of_several_stages_count_together():
    """Attention rounded by one stage and experts by another are the model of one stage with both rules."""
    whole = planned("eac_moe_olmoe", "olmoe_1b_7b")
    rules = load_recipe("eac_moe_olmoe", allow_missing=True).data["stages"]["quantize"]["rules"]
    attention, experts = rules["attention"], rules["experts"]
    first = f"+stages.first@quantize={{type: rtn, rules: {{attention: {json.dumps(attention)}}}}}"
    apart = planned("eac_moe_olmoe", "olmoe_1b_7b", first, "stages.quantize.rules.attention~")
    assert len(rules) == 2 and experts["bits"] != attention["bits"]
    assert (apart.output_bytes, apart.unmatched) == (whole.output_bytes, whole.unmatched)
    assert (apart.bits_codes, apart.bits_stored) == (whole.bits_codes, whole.bits_stored)


def test_stages_add_the_interpreter_and_totals_are_the_largest_peak():
    found = planned("gptq_smollm2", "smollm2_135m")
    assert all(stage.ram >= device.BASELINE_RAM for stage in found.stages)
    assert found.ram == max(stage.ram for stage in found.stages)
    assert found.disk == sum(stage.disk for stage in found.stages)
    assert found.vram == 0
    on_gpu = planned("gptq_smollm2", "smollm2_135m", device="cuda")
    assert on_gpu.vram == max(stage.vram for stage in on_gpu.stages) and on_gpu.compute_dtype == "bfloat16"
    assert all(stage.vram >= device.BASELINE_VRAM for stage in on_gpu.stages)


def test_more_calibration_data_needs_more_memory_and_work():
    small = planned("eac_moe_olmoe", "olmoe_1b_7b", "stages.calibrate.samples=32")
    large = planned("eac_moe_olmoe", "olmoe_1b_7b", "stages.calibrate.samples=256")
    by_name = {stage.name: stage for stage in small.stages}
    quantize = next(stage for stage in large.stages if stage.name == "quantize")
    assert quantize.ram > by_name["quantize"].ram
    assert quantize.flops > by_name["quantize"].flops > 0


def test_what_an_exporter_would_refuse_is_said_beforehand():
    found = planned("eac_moe_olmoe", "olmoe_1b_7b", "stages.export.formats=[native, compressed-tensors]")
    notes = "\n".join(note for stage in found.stages for note in stage.notes)
    assert "compressed-tensors" in notes and "refused" in notes


def test_a_plan_is_plain_data():
    found = planned("gptq_smollm2", "smollm2_135m", "+host.ram=64GB").to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["budgets"] == [{"resource": "host.ram", "limit": 64 * 10**9, "needed": found["ram"], "fits": True}]


def test_states_of_the_compressed_model_are_counted_by_batch_size():
    plain = planned("eac_moe_qwen3_next", "qwen3_next_80b_a3b")
    assert plain.memory[0].states == plain.memory[0].float_states == 36 * 32 * 128 * 128 * 4
    assert {row.weights for row in plain.memory} == {plain.output_bytes}
    low = planned("q_mamba_mamba2", "mamba2_2b7").to_dict()["memory"]
    assert all(row["states"] * 6 < row["float_states"] for row in low)
    # one policy beside the other: embeddings in 8 bits and states in 4
    dense = planned("q_mamba_mamba2", "mamba2_2b7", "stages.embeddings~").to_dict()["memory"]
    assert dense[0]["states"] == low[0]["states"] and dense[0]["weights"] > low[0]["weights"]
    assert low[3]["total"] == low[3]["weights"] + 8 * (low[0]["states"] + low[0]["convolution"])
    assert planned("eac_moe_olmoe", "olmoe_1b_7b").memory == ()


def test_states_are_measured_block_by_block():
    """A checkpoint is read tensor by tensor; of 159 GB one block and its largest weight, decoded, are in memory."""
    found = planned("q_mamba_qwen3_next", "qwen3_next_80b_a3b", device="cuda")
    states = next(stage for stage in found.stages if stage.name == "states")
    block, decoded = 512 * 3 * 512 * 2048 * 2, 512 * 2 * 512 * 2048 * 4
    assert block + decoded < states.ram - device.baseline_ram("cuda") < 1.3 * (block + decoded)


@pytest.mark.parametrize(
    ("override", "resource"),
    [("+host.ram=1GB", "host.ram"), ("+host.disk=1MB", "host.disk"), ("+device.vram=1GB", "device.vram")],
)
def test_a_budget_that_is_exceeded_gives_the_estimate_and_three_suggestions(override, resource):
    found = planned("eac_moe_olmoe", "olmoe_1b_7b", override, device="cuda")
    with pytest.raises(ResourceError) as caught:
        found.require_budget()
    assert caught.value.message.startswith(f"{resource}: ")
    assert "allowed" in caught.value.message
    hints = caught.value.hint.splitlines()
    assert [line[:3] for line in hints] == ["1. ", "2. ", "3. "] and len(set(hints)) == 3


def test_suggestions_are_overrides_that_hold_what_they_promise():
    found = planned("eac_moe_olmoe", "olmoe_1b_7b", "+host.ram=1GB")
    text = found.suggest("host.ram")[0]
    override, _, predicted = text.partition(" (")
    again = planned("eac_moe_olmoe", "olmoe_1b_7b", override)
    assert again.ram < found.ram
    assert predicted == f"{bytes_text(again.ram)})"


def test_the_most_effective_suggestion_comes_first():
    found = planned("eac_moe_olmoe", "olmoe_1b_7b", "+host.ram=1GB")
    needs = [planned("eac_moe_olmoe", "olmoe_1b_7b", text.partition(" (")[0]).ram for text in found.suggest("host.ram")]
    assert len(needs) > 1 and needs == sorted(needs)


def test_a_budget_that_is_needed_in_full_fits():
    assert Budget("host.disk", 5, 5).fits and not Budget("host.disk", 5, 6).fits


def test_of_windows_that_do_not_come_out_even_a_process_may_have_one_more():
    def together(samples):
        loaded = load_recipe("eac_moe_olmoe", [f"stages.calibrate.samples={samples}"], allow_missing=True)
        alone = plan(loaded, config("olmoe_1b_7b"), "cpu")
        return on_machine(alone, loaded, config("olmoe_1b_7b"), ["quantize"], 4).ram

    assert together(60) < together(61) == together(64)


def test_what_fits_passes():
    planned("gptq_smollm2", "smollm2_135m", "+host.ram=64GB", "+host.disk=10GB").require_budget()


def test_a_recipe_that_does_not_suit_the_model_is_refused_with_its_line():
    with pytest.raises(
        RecipeError, match=r"(?m)^override #1: stages.quantize.rules.experts.role: .*no experts weights"
    ):
        planned("eac_moe_mixtral", "smollm2_135m", "stages.quantize.rules.experts.role=experts", "stages.prune~")


def test_device_is_guessed_without_torch():
    assert assumed_device(load_recipe("quickstart", ["run.device=cpu"]).recipe) == "cpu"
    assert assumed_device(load_recipe("quickstart", ["+device.vram=8GB"]).recipe) == "cuda"


def test_planning_imports_no_torch():
    file = str(CONFIGS / "qwen15_moe_a27b.json")
    code = (
        "import sys, json; from llmcompress.recipe.load import load_recipe;"
        "from llmcompress.pipeline.estimate import plan;"
        f"plan(load_recipe('eac_moe_qwen15', allow_missing=True), json.load(open({file!r})));"
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
