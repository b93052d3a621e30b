"""S2R stages on the shipped reasoner: kill and resume to the same bytes, adapters on packed weights, what is
refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.data.actions import CHECK, RETRY
from llmcompress.data.problems.config import CountdownTask, WordTask
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.rtn import Rtn, RtnConfig
from llmcompress.stages.s2r.evaluate import S2REvaluate, S2REvaluateConfig
from llmcompress.stages.s2r.init import GiveUpConfig, S2RInit, S2RInitConfig
from llmcompress.stages.s2r.rl import S2RRl, S2RRlConfig
from llmcompress.stages.s2r.traces import S2RTraces, S2RTracesConfig
from llmcompress.stages.state import RunState

TASK = CountdownTask(kind="countdown", high=15, limit=60, compact=True)
COMMON = {"task": TASK, "measure": {"problems": 8, "max_new_tokens": 40}}
INIT = S2RInitConfig(
    type="s2r_init", problems=40, samples=3, sampling={"temperature": 0.8, "max_new_tokens": 14}, epochs=1,
    pair_epochs=1, pair_share=0.3, batch=8, lr=1e-3, anchor=0.5, checkpoint_every=2, **COMMON,
)  # fmt: skip
RL = {
    "type": "s2r_rl", "steps": 3, "prompts": 4, "samples": 2, "updates": 2, "lr": 1e-4, "checkpoint_every": 1,
    "sampling": {"temperature": 1.0, "max_new_tokens": 30}, **COMMON,
}  # fmt: skip
VALIDATED = S2RInitConfig(
    **{
        **INIT.model_dump(), "pair_epochs": 0, "epochs": 3, "decay": "cosine", "weight_decay": 0.1, "adapter": None,
        "validation": {"share": 0.3, "every": 1, "patience": 3},
    }
)  # fmt: skip
STAGES = {
    "init": S2RInit("s", INIT),
    "validated": S2RInit("s", VALIDATED),
    "outcome": S2RRl("s", S2RRlConfig(level="outcome", **RL)),
    "credit": S2RRl("s", S2RRlConfig(level="outcome", credit="action", average=0.9, **RL)),
    "process": S2RRl("s", S2RRlConfig(level="process", baseline={"scope": "running", "min_group": 1}, **RL)),
    "offline": S2RRl(
        "s",
        S2RRlConfig(level="process", mode="offline", problems=24, offline={"min_accuracy": 0, "max_accuracy": 1}, **RL),
    ),
}


@pytest.fixture(scope="module")
def taught(tiny, tmp_path_factory) -> Path:
    """A model that knows the format a little: after the init stage."""
    folder = tmp_path_factory.mktemp("taught")
    INIT_LONG = INIT.model_copy(update={"pair_epochs": 6, "epochs": 4, "problems": 120})
    S2RInit("s", INIT_LONG).run(RunState(model=ModelHandle.open("asset:reference_reasoner")), tiny.context(folder, "s"))
    return folder / "stages" / "s" / "model"


def state(model="asset:reference_reasoner"):
    return RunState(model=ModelHandle.open(model))


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_killed_training_ends_in_the_same_weights(tiny, tmp_path, taught, name):
    source = taught if isinstance(STAGES[name], S2RRl) else "asset:reference_reasoner"
    events = []
    whole = tiny.context(tmp_path / "whole", "s", events)
    STAGES[name].run(state(source), whole)
    broken = tiny.context(tmp_path / "broken", "s")
    updates = [e.data for e in events if e.kind == "metric" and "step" in e.data]
    # once in the middle of training, once when all is trained and nothing kept
    for point in (updates[len(updates) // 2], updates[-1]):

        def die(event, point=point):
            # by name and step: a speed has another value in every run
            if event.kind == "metric" and all(event.data.get(key) == point[key] for key in ("name", "step")):
                raise Killed

        object.__setattr__(broken, "emit_event", die)
        with pytest.raises(Killed):
            STAGES[name].run(state(source), broken)
    object.__setattr__(broken, "emit_event", lambda event: None)
    after = state(source)
    STAGES[name].run(after, broken)
    files = [c.stage_dir / "model" / "model.safetensors" for c in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    curves = [json.loads((c.stage_dir / "curve.json").read_text()) for c in (whole, broken)]
    assert curves[0] == curves[1]
    assert after.model.path == broken.stage_dir / "model"
    # what training went on from is gone with it
    assert [*whole.stage_dir.glob("*progress*"), *broken.stage_dir.glob("*progress*")] == []
    # training did something, and a restored stage hands on the same model
    original = ModelHandle.open(source).checkpoint.tensor("model.norm.weight")
    assert not torch.equal(original, load_file(files[0])["model.norm.weight"])
    again = state(source)
    STAGES[name].restore(again, broken)
    assert again.model.path == after.model.path
    assert [m.name for m in again.metrics] == [m.name for m in after.metrics]


def test_held_out_rows_are_measured_and_not_trained(tiny, tmp_path):
    """In the curve, the metrics, the live lines and the report; what is kept is the best."""
    from llmcompress.report.self_correction import collect_self_correction, self_correction_section
    from llmcompress.training import sft

    events, seen = [], []
    context = tiny.context(tmp_path, "s", events)
    train = sft.train_sft

    def spied(policy, rows, pad, settings, checkpoint, on_step, held_out=()):
        seen.append((rows, held_out))
        return train(policy, rows, pad, settings, checkpoint, on_step, held_out)

    after = state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "train_sft", spied)
        STAGES["validated"].run(after, context)
    ((rows, held_out),) = seen
    assert held_out and not {row.prompt for row in rows} & {row.prompt for row in held_out}
    told = [json.loads(line) for line in (context.stage_dir / "trajectories.jsonl").read_text().splitlines()]
    assert len(rows) + len(held_out) == len(told)
    curve = json.loads((context.stage_dir / "curve.json").read_text())
    (kept,) = (record for record in curve if record.get("kept"))
    assert kept["validation"] == min(record["validation"] for record in curve)
    metrics = {m.name: m.compressed for m in after.metrics}
    assert metrics["s.held_out.cross_entropy"] == kept["validation"]
    assert metrics["s.held_out.verdict_cross_entropy"] == kept["validation_verdict"]
    names = {e.data["name"] for e in events if e.kind == "metric" and "step" in e.data}
    assert {"s.training.validation", "s.training.tokens_per_second", "s.training.grad_norm"} <= names
    lines = [e.data["text"] for e in events if e.kind == "note"]
    assert any("held out" in line and "tokens/s" in line and "gradient norm" in line for line in lines)
    (chart,) = self_correction_section(collect_self_correction(tmp_path, ["s"]))["curves"]
    assert chart["what"] == "Cross-entropy of rows in nats a token" and "held-out rows" in str(chart["chart"])


def quantized(tiny, folder):
    found = state()
    config = RtnConfig(type="rtn", rules={"all": {"role": ["attention", "mlp"], "bits": 3, "group_size": 32}})
    Rtn("quantize", config).run(found, tiny.context(folder, "quantize"))
    return found


def test_codes_are_not_trained(tiny, tmp_path):
    with pytest.raises(RecipeError, match="codes cannot be trained"):
        STAGES["init"].run(quantized(tiny, tmp_path), tiny.context(tmp_path, "s"))


@pytest.mark.slow
def test_adapters_on_packed_weights_are_trained_measured_and_exported(tiny, tmp_path):
    from llmcompress import hf
    from llmcompress.stages.export import Export, ExportConfig
    from llmcompress.stages.s2r.config import open_model

    found = quantized(tiny, tmp_path)
    before = open_model(found, tiny.context(tmp_path, "probe"))
    name = "model.layers.0.mlp.up_proj"
    codes = before.state_dict()[f"{name}.weight_packed"].clone()
    config = INIT.model_copy(update={"adapter": S2RInitConfig.model_fields["adapter"].annotation.__args__[0](rank=4)})
    S2RInit("s", config).run(found, tiny.context(tmp_path, "s"))
    assert found.adapter is not None
    tuned = open_model(found, tiny.context(tmp_path, "probe"))
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        assert not torch.equal(tuned(ids).logits, before(ids).logits)
    assert torch.equal(tuned.state_dict()[f"{name}.base.weight_packed"], codes)
    # reinforcement goes on with the same adapter
    S2RRl("r", S2RRlConfig(level="process", **{**RL, "steps": 1})).run(found, tiny.context(tmp_path, "r"))
    assert found.adapter == tmp_path / "stages" / "r" / "adapter"
    final = open_model(found, tiny.context(tmp_path, "probe"))
    Export("export", ExportConfig(type="export")).run(found, tiny.context(tmp_path, "export"))
    loaded, _ = hf.load(tmp_path / "artifact", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, final(ids).logits)
    with pytest.raises(Exception, match="no place for the trained adapter"):
        Export("e", ExportConfig(type="export", formats=("dense",))).run(found, tiny.context(tmp_path, "e"))


def test_a_weak_verifier_is_not_reinforced(tiny, tmp_path, taught):
    config = S2RRlConfig(level="outcome", min_verdict_recall=0.999, **RL)
    with pytest.raises(InputError, match="too weak to reinforce"):
        S2RRl("r", config).run(state(taught), tiny.context(tmp_path, "r"))
    with pytest.raises(InputError, match="judged none"):
        S2RRl("b", config).run(state(), tiny.context(tmp_path, "b"))


def test_written_solutions_need_no_samples(tiny, tmp_path):
    config = INIT.model_copy(update={"data": "program", "problems": 20, "measure": None, "checkpoint_every": None})
    context = tiny.context(tmp_path, "s")
    S2RInit("s", config).run(state(), context)
    rows = [json.loads(line) for line in (context.stage_dir / "trajectories.jsonl").read_text().splitlines()]
    problems = TASK.build()
    assert {row["problem"] for row in rows} <= {problem.key for problem in problems.problems("pretrain")}
    assert len(rows) == 20 and all(row["kind"] == "solution" for row in rows)
    assert not (context.stage_dir / "samples").exists()
    # no checkpoint was asked for
    assert [path.name for path in context.stage_dir.glob("*progress*")] == []
    with pytest.raises(ValueError, match="no program writes"):
        S2RInitConfig(type="s2r_init", data="program", task={"kind": "file", "path": "x.jsonl"})


def test_answers_put_back_are_a_share_of_the_written_rows(tiny, tmp_path):
    words = WordTask(kind="word_problems", count=400, brief=True)
    config = INIT.model_copy(
        update={"data": "program", "task": words, "read_back": 0.5, "problems": 60, "measure": None}
    )
    context = tiny.context(tmp_path, "s")
    S2RInit("s", config).run(state(), context)
    rows = [json.loads(line) for line in (context.stage_dir / "trajectories.jsonl").read_text().splitlines()]
    assert not list(context.stage_dir.glob("*progress*"))
    back = [row for row in rows if row["kind"] == "verification"]
    assert 15 < len(back) < 45 and len(rows) == 60
    said = Counter(row["response"].rsplit(" ", 1)[1] for row in back)
    assert min(said["correct."], said["incorrect."]) > 3 and said.total() == len(back)
    assert all(row["response"].count(CHECK) == 1 and RETRY not in row["response"] for row in back)
    assert all(row["response"].endswith("}") for row in rows if row not in back)
    with pytest.raises(ValueError, match="read_back"):
        S2RInitConfig(type="s2r_init", data="program", read_back=0.5, task=TASK)
    with pytest.raises(ValueError, match="read_back"):
        S2RInitConfig(type="s2r_init", read_back=0.5, task=words)


def test_single_trials_and_searches_that_are_given_up_stand_beside_trajectories(tiny, tmp_path):
    plain, more = (tiny.context(tmp_path / name, "s") for name in ("plain", "more"))
    given = INIT.model_copy(update={"pair_epochs": 0, "pair_share": 0.0, "measure": None, "checkpoint_every": None})
    S2RInit("s", given).run(state(), plain)
    asked = given.model_copy(update={"single_trials": True, "give_up": GiveUpConfig(after=3, share=0.25)})
    S2RInit("s", asked).run(state(), more)
    few, many = (
        [json.loads(line) for line in (c.stage_dir / "trajectories.jsonl").read_text().splitlines()]
        for c in (plain, more)
    )
    by_problem = {row["problem"]: row for row in few}
    added = [row for row in many if row not in few]
    singles = [row for row in added if row["kind"] == "trajectory"]
    given_up = [row for row in added if row["kind"] == "given up"]
    assert singles and all(row["trials"] == 1 < by_problem[row["problem"]]["trials"] for row in singles)
    assert len(given_up) == round((len(few) + len(singles)) / 3) and all(row["trials"] == 3 for row in given_up)


def test_a_recipe_trains_with_the_loop_of_trl(tmp_path, capsys):
    pytest.importorskip("trl")
    from llmcompress.cli.app import invoke

    short = ["stages.init.measure=null", "stages.reinforce.measure.problems=8", "stages.init.pair_epochs=0"]
    assert invoke(["run", "smoke/s2r_trl", f"run.dir={tmp_path / 'run'}", *short, "--quiet"]) == 0
    stage = tmp_path / "run" / "stages" / "reinforce"
    assert [record["step"] for record in json.loads((stage / "curve.json").read_text())] == [1, 2]
    before = load_file(tmp_path / "run" / "stages" / "init" / "model" / "model.safetensors")
    after = load_file(stage / "model" / "model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert (tmp_path / "run" / "report.html").exists()
    # trl leaves nothing of its own behind and says nothing
    assert sorted(path.name for path in stage.iterdir() if "trl" in path.name) == []
    assert "{'loss'" not in capsys.readouterr().out


def test_reinforcement_ends_by_the_clock(tiny, tmp_path, taught):
    events = []
    config = S2RRlConfig(level="outcome", guard={"seconds": 1e-6}, **{**RL, "checkpoint_every": None, "measure": None})
    S2RRl("s", config).run(state(taught), tiny.context(tmp_path, "s", events))
    assert [e.data["text"].split(":")[0] for e in events if e.kind == "warning"] == ["s stopped after step 1"]


def test_traces_become_calibration_windows(tiny, tmp_path):
    config = S2RTracesConfig(
        type="s2r_traces", task=TASK, problems=60, keep="all", samples=4, length=32,
        sampling={"temperature": 0.8, "max_new_tokens": 16},
    )  # fmt: skip
    found, context = state(), tiny.context(tmp_path, "t")
    S2RTraces("t", config).run(found, context)
    assert found.calibration.tokens.shape == (4, 32)
    again = state()
    S2RTraces("t", config).restore(again, context)
    assert again.calibration.hash == found.calibration.hash
    few = config.model_copy(update={"samples": 5000})
    with pytest.raises(InputError, match="windows of 32 need"):
        S2RTraces("t", few).run(state(), tiny.context(tmp_path, "t2"))


def test_evaluation_measures_both_sides_and_the_vote(tiny, tmp_path):
    found = quantized(tiny, tmp_path)
    config = S2REvaluateConfig(
        type="s2r_evaluate", majority=True, sampling={"temperature": 0.7, "max_new_tokens": 14}, **COMMON
    )
    S2REvaluate("e", config).run(found, tiny.context(tmp_path, "e"))
    by_name = {metric.name: metric for metric in found.metrics}
    accuracy = by_name["e.accuracy"]
    assert accuracy.dense is not None and accuracy.compressed is not None and accuracy.n == 8
    assert by_name["e.majority.tokens"].compressed >= by_name["e.tokens"].compressed
    assert by_name["e.majority.best_of"].compressed >= by_name["e.majority.accuracy"].compressed
