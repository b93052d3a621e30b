from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from llmcompress.cli.look_ahead import require_sources
from llmcompress.errors import GateFailed, InputError, RecipeError
from llmcompress.evaluation import gates, measure
from llmcompress.evaluation.working_set import streamed_sides
from llmcompress.models.handle import ModelHandle
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.recipe.load import load_recipe
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.evaluate import Evaluate, EvaluateConfig
from llmcompress.stages.state import RunContext, RunState

TEXTS = [f"The cat number {i} sat on the warm stone and looked at the sea." for i in range(12)]
SOURCE = {"kind": "inline", "texts": TEXTS}
FULL = {
    "perplexity": {"held": {"source": SOURCE, "length": 32, "max_tokens": 128}},
    "fidelity": {"source": SOURCE, "length": 16, "samples": 3},
    "tasks": [{"task": "eval_smoke", "limit": 3}],
    "generation": {"prompts": ["The cat"], "max_new_tokens": 3},
    "offline": True,
}


def config(**fields):
    return EvaluateConfig.model_validate({"type": "evaluate", **fields})


def stage(**fields):
    return Evaluate("evaluate", config(**fields))


@pytest.fixture
def ctx(tmp_path):
    stage_dir = tmp_path / "stages" / "evaluate"
    stage_dir.mkdir(parents=True)
    events = []
    return RunContext(tmp_path, "evaluate", stage_dir, 0, "cpu", "float32", {}, events.append), events


@pytest.fixture
def state(tiny_folder, tmp_path):
    """A model and a store that replaces one router, which is enough to make the two models differ."""
    handle = ModelHandle.open(str(tiny_folder))
    block = handle.layout.blocks[0]
    name = f"{block.bank.router.module}.weight"
    store = PackedStore(tmp_path / "blocks")
    weight = torch.randn(handle.checkpoint.tensor(name).shape, generator=torch.Generator().manual_seed(0))
    store.write_block(0, BlockPatch({}, {name: weight}))
    return RunState(model=handle, packed=store)


def read(ctx, name):
    return json.loads((ctx.stage_dir / f"{name}.json").read_text())


def paired_error(ctx):
    """Standard error of the perplexity difference over the windows that both models saw."""
    left, right = (
        json.loads((ctx.stage_dir / "parts" / f"{side}.perplexity.held.json").read_text())
        for side in ("dense", "compressed")
    )
    change = (
        torch.tensor(right["window_nll"], dtype=torch.float64) * right["perplexity"]
        - torch.tensor(left["window_nll"], dtype=torch.float64) * left["perplexity"]
    )
    return float(change.std() / len(change) ** 0.5)


def test_everything_is_measured_on_both_models(ctx, state):
    ctx, events = ctx
    stage(**FULL, log_samples=True, gates={"kl": {"metric": "fidelity.kl", "max": 100}}).run(state, ctx)
    found = {m.name: m for m in state.metrics}
    ppl = found["held.perplexity"]
    assert ppl.dense > 1 and ppl.compressed > 1 and ppl.dense != ppl.compressed
    assert ppl.n == 4 * 31 and ppl.higher_is_better is False and ppl.stderr > 0
    assert found["eval_smoke.acc"].dense is not None and found["eval_smoke.acc"].n == 3
    assert found["fidelity.kl"].dense is None and found["fidelity.kl"].compressed > 0
    rows = {(r["task"], r["metric"]): r for r in read(ctx, "metrics")}
    assert rows["held", "perplexity"]["difference"] == pytest.approx(ppl.compressed - ppl.dense)
    assert rows["eval_smoke", "acc"]["difference_stderr"] is not None
    assert rows["held", "perplexity"]["difference_stderr"] == pytest.approx(paired_error(ctx))
    for side, value in (("dense", found["eval_smoke.acc"].dense), ("compressed", found["eval_smoke.acc"].compressed)):
        kept = (ctx.stage_dir / "requests" / f"{side}.eval_smoke.jsonl").read_text().splitlines()
        asked = [json.loads(line) for line in kept]
        assert sum(row["acc"] for row in asked) / 3 == pytest.approx(value) and len(asked) == 3
        assert asked[0]["doc"]["question"] in asked[0]["arguments"]["gen_args_0"]["arg_0"]
        # a choice has a log-likelihood each, and the answer is the largest
        chances = [float(choice[0][0]) for choice in asked[0]["resps"]]
        assert (chances.index(max(chances)) == asked[0]["doc"]["answer"]) == bool(asked[0]["acc"])
    (sample,) = read(ctx, "samples")
    assert sample["prompt"] == "The cat" and sample["dense"] and sample["compressed"]
    decoding = read(ctx, "decoding")
    assert [(row["side"], row["part"]) for row in decoding] == [("dense", "samples"), ("compressed", "samples")]
    assert all(row["written_by"].startswith(("the native engine", "transformers: ")) for row in decoding)
    assert read(ctx, "fidelity")["tokens"] == 48
    assert read(ctx, "gates")[0]["passed"] is True and gates.failed(ctx.stage_dir) == []
    assert {e.data["name"] for e in events if e.kind == "metric"} == set(found)
    again = RunState()
    stage(**FULL).restore(again, ctx)
    assert again.metrics == state.metrics


def test_a_killed_run_continues_where_it_stopped(ctx, state, monkeypatch):
    ctx, _ = ctx
    whole = RunState(model=state.model, packed=state.packed)
    real = measure.harness.evaluate
    calls = []

    def dies_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(measure.harness, "evaluate", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        stage(**FULL).run(RunState(model=state.model, packed=state.packed), ctx)
    done = {p.name: p.stat().st_mtime_ns for p in (ctx.stage_dir / "parts").glob("*.json")}
    assert "dense.task.eval_smoke.json" in done and "compressed.task.eval_smoke.json" not in done
    stage(**FULL).run(whole, ctx)
    assert len(calls) == 3
    assert all((ctx.stage_dir / "parts" / name).stat().st_mtime_ns == when for name, when in done.items())
    assert {"held.perplexity", "eval_smoke.acc", "fidelity.kl"} <= {m.name for m in whole.metrics}


def test_failed_gate_ends_the_stage_after_everything_is_stored(ctx, state):
    ctx, _ = ctx
    sections = {"perplexity": FULL["perplexity"], "gates": {"strict": {"metric": "held.perplexity", "max": 1.0}}}
    with pytest.raises(GateFailed, match="gate strict: held.perplexity is") as caught:  # noqa: RUF043
        stage(**sections).run(state, ctx)
    assert caught.value.exit_code == 6
    assert [m.name for m in state.metrics] == ["held.perplexity", "held.bits_per_byte"]
    assert gates.failed(ctx.stage_dir) == [caught.value.message]


def test_dense_only_without_anything_compressed(ctx, state):
    ctx, _ = ctx
    alone = RunState(model=state.model)
    stage(perplexity=FULL["perplexity"], fidelity=FULL["fidelity"]).run(alone, ctx)
    assert {m.name for m in alone.metrics} == {"held.perplexity", "held.bits_per_byte"}
    assert all(m.compressed is None and m.dense is not None for m in alone.metrics)


def test_policy_is_measured_with_and_without(ctx, state):
    ctx, _ = ctx
    policy = {"pesf": {"method": "pesf", "alpha": 0.9, "scope": "sequence", "min_len": 8}}
    state = RunState(model=state.model, policies=policy)
    stage(perplexity=FULL["perplexity"]).run(state, ctx)
    found = {m.name: m for m in state.metrics}
    plain = found["held.perplexity_without_policies"]
    # nothing is quantized: without the policy the model is the dense one
    assert plain.compressed == pytest.approx(plain.dense, rel=1e-5)
    assert found["held.perplexity"].compressed != plain.compressed
    pesf = read(ctx, "pesf")
    assert 0 < pesf["experts_skipped"] < 1 and 0 < pesf["slots_dropped"] < 1
    assert pesf["seconds_with"] > 0 and pesf["seconds_without"] > 0


def test_calibration_text_is_refused_as_held_out(ctx, state, tiny_tokenizer):
    from llmcompress.data.calibration import build
    from llmcompress.data.sources import InlineSource

    ctx, _ = ctx
    state.calibration = build(InlineSource(kind="inline", texts=tuple(TEXTS)), tiny_tokenizer, 4, 64, seed=0)
    section = {"held": {"source": SOURCE, "length": 32, "separator": "</s>"}}
    with pytest.raises(InputError, match="was used for calibration"):
        stage(perplexity=section).run(state, ctx)


def test_missing_task_data_stops_before_measuring(ctx, state):
    ctx, _ = ctx
    with pytest.raises(InputError, match="task piqa"):
        stage(perplexity=FULL["perplexity"], tasks=["piqa"], offline=True).run(state, ctx)
    assert list((ctx.stage_dir / "parts").glob("*.json")) == []


def test_unknown_gate_metric_is_found_without_a_model(ctx, state, tiny):
    layout = layout_from_config(tiny.config("mixtral").to_dict())
    bad = stage(perplexity=FULL["perplexity"], gates={"g": {"metric": "held.perplexty", "max": 1}})
    (problem,) = bad.check(layout)
    assert "stages.evaluate.gates.g" in problem and "did you mean held.perplexity" in problem
    with pytest.raises(RecipeError, match="did you mean"):
        bad.run(state, ctx[0])
    good = stage(**FULL, gates={"g": {"metric": "eval_smoke.acc_norm", "max_abs_drop": 0.1}})
    assert good.check(layout) == []
    bad = stage(tasks=["piqa", "gsm8k"], gates={"g": {"metric": "tasks.mean_acc", "max_abs_drop": 0.1}})
    assert "gsm8k has no acc" in bad.check(layout)[0]


def test_answers_without_room_for_a_question_are_refused_before_a_run(tmp_path):
    with pytest.raises(InputError, match="gsm8k: answers of up to 256 tokens leave no room"):
        stage(tasks=["gsm8k"]).require_source(tmp_path, {"max_position_embeddings": 256})


def test_config_contradictions():
    with pytest.raises(ValidationError, match="dense must be true"):
        config(dense=False, fidelity=FULL["fidelity"])
    with pytest.raises(ValidationError, match="dense must be true"):
        config(dense=False, gates={"g": {"metric": "a.b", "max_rel_increase": 1}})
    with pytest.raises(ValidationError, match="log_samples keeps the requests of tasks"):
        config(perplexity=FULL["perplexity"], log_samples=True)
    with pytest.raises(ValidationError, match="used twice"):
        config(tasks=["piqa", {"task": "piqa", "limit": 3}])
    with pytest.raises(ValidationError, match="random tokens"):
        config(perplexity={"a": {"source": {"kind": "synthetic"}}})
    with pytest.raises(ValidationError, match="exceeds length"):
        config(perplexity={"a": {"source": SOURCE, "length": 8, "stride": 9}})


def test_estimate_counts_both_models_only_when_they_are_compared(tiny):
    from llmcompress.quant.spec import QuantSpec

    layout = layout_from_config(tiny.config("mixtral").to_dict())
    spec = QuantSpec(bits=4, group_size=16)
    specs = {name: spec for name, _, _, _ in layout.quantizable()}
    inputs = PlanInputs(layout, 2, 4, 0, 0, specs, "cpu")
    apart = stage(perplexity=FULL["perplexity"]).estimate(inputs).ram
    together = stage(perplexity=FULL["perplexity"], fidelity=FULL["fidelity"]).estimate(inputs).ram
    nothing = stage(perplexity=FULL["perplexity"]).estimate(PlanInputs(layout, 2, 4, 0, 0, {}, "cpu")).ram
    assert nothing == apart < together


def test_models_whose_layers_see_what_earlier_ones_chose_stay_whole_for_longer_windows(tiny):
    layout = layout_from_config(tiny.config("glm_moe_dsa").to_dict())
    sides = {}
    for length in (64, 65):
        wanted = config(perplexity={"a": {"source": SOURCE, "length": length}})
        sides[length] = streamed_sides(wanted, layout, {"dense": 100, "compressed": 10}, 0, 20)
    assert sides == {64: ["dense"], 65: []}


def test_expert_shift_is_measured_and_restartable(ctx, state):
    ctx, _ = ctx
    wanted = {"perplexity": FULL["perplexity"], "expert_shift": True}
    stage(**wanted).run(state, ctx)
    found = {m.name: m for m in state.metrics}
    assert 0 < found["experts.overlap"].compressed < 1 and 0 < found["experts.cr_any"].compressed <= 1
    rows = read(ctx, "expert_shift")
    # only the first router was replaced, and nothing before it
    assert rows[0]["cr_any"] > 0 and len(rows) == 2
    table = read(ctx, "forced_routing")
    assert table["dense"] != table["dense_shifted"] and table["dense"] != table["compressed"]
    when = (ctx.stage_dir / "parts" / "pair.expert_shift.json").stat().st_mtime_ns
    stage(**wanted).run(RunState(model=state.model, packed=state.packed), ctx)
    assert (ctx.stage_dir / "parts" / "pair.expert_shift.json").stat().st_mtime_ns == when
    with pytest.raises(ValidationError, match="needs text"):
        config(expert_shift=True)


def test_expert_shift_of_a_dense_model_is_a_problem():
    from llmcompress.models.registry import layout_from_config

    dense = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (problem,) = stage(perplexity=FULL["perplexity"], expert_shift=True).check(layout_from_config(dense))
    assert "has no experts" in problem


@pytest.mark.parametrize(
    ("stage_fields", "words"),
    [
        ({"type": "evaluate", "perplexity": {"h": {"source": SOURCE, "length": 129}}}, r"perplexity\.h\.length is 129"),
        ({"type": "evaluate", "fidelity": {"source": SOURCE, "length": 130}}, r"fidelity\.length is 130"),
        ({"type": "evaluate", "recall": {"source": SOURCE, "distances": [64, 256]}}, r"recall\.distances is 256"),
        ({"type": "evaluate", "tasks": [{"task": "eval_smoke", "max_length": 132}]}, "eval_smoke: max_length is 132"),
        ({"type": "calibrate", "source": SOURCE, "length": 131}, r"stages\.it\.length is 131"),
        ({"type": "s2r_traces", "task": {"kind": "countdown"}, "length": 133}, r"stages\.it\.length is 133"),
    ],
)
def test_windows_beyond_the_context_are_refused_before_any_work(stage_fields, words, tmp_path):
    section = {"load": {"type": "load"}, "it": stage_fields}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "name": "x", "model": {"path": str(tmp_path)}, "stages": section}))
    loaded = load_recipe(recipe)
    with pytest.raises(InputError, match=f"{words}, but the model was built for 128 positions"):
        require_sources(loaded, tmp_path, {"max_position_embeddings": 128})
    # a model without positions, such as Mamba, has no limit
    require_sources(loaded, tmp_path, {})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": [{"task": "eval_smoke", "apply_chat_template": True}]}, "task eval_smoke: apply_chat_template"),
        ({"generation": {"prompts": ["The cat"], "chat": True}}, "generation.chat is set"),
    ],
)
def test_chats_without_a_template_are_refused_before_any_work(fields, words, tmp_path):
    """By the files of the model, or of the tokenizer where it is another folder."""
    model, words_of = tmp_path / "model", tmp_path / "words"
    model.mkdir()
    words_of.mkdir()
    (model / "tokenizer_config.json").write_text("{}")
    section = {"load": {"type": "load"}, "evaluate": {"type": "evaluate", **fields}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "name": "x", "model": {"path": str(model)}, "stages": section}))
    loaded = load_recipe(recipe)
    with pytest.raises(InputError, match=f"{words}.*no chat template"):
        require_sources(loaded, model, {})
    (words_of / "chat_template.jinja").write_text("{{ messages }}")
    require_sources(load_recipe(recipe, [f"model.tokenizer={words_of}"]), model, {})
    (model / "chat_template.jinja").write_text("{{ messages }}")
    require_sources(loaded, model, {})
