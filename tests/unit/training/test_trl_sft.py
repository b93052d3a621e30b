"""Our supervised training and trl's ``SFTTrainer`` compute the same; what it cannot express is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.data.problems.config import CountdownTask
from llmcompress.distributed.world import World
from llmcompress.errors import EnvironmentProblem, UsageError
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.s2r.init import S2RInit, S2RInitConfig
from llmcompress.stages.state import RunState
from llmcompress.training.policy import Policy
from llmcompress.training.sft import Counts, SftRow, SftSettings, sft_loss

COMMON = {
    "type": "s2r_init", "task": CountdownTask(kind="countdown", high=15, limit=60, compact=True), "measure": None,
    "problems": 30, "samples": 3, "sampling": {"temperature": 0.8, "max_new_tokens": 14}, "pair_epochs": 1,
    "pair_share": 0.3, "epochs": 2, "batch": 8, "micro_batch": 4, "lr": 1e-3, "warmup": 2, "decay": "linear",
    "clip_grad": 1.0, "kl": 0.0, "checkpoint_every": 1,
    "keep": {"all_right": 1.0, "few_wrong": 1.0, "some_wrong": 1.0, "most_wrong": 1.0},
}  # fmt: skip
PAD = 0


def state():
    return RunState(model=ModelHandle.open("asset:reference_reasoner"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kl": 0.1}, "kl: 0.1 .it has no reference policy"), ({"anchor": 0.5}, "an anchor"),
        ({"verdict_weight": 8.0}, "verdict_weight"), ({"micro_tokens": 512}, "micro_tokens"),
    ],
)  # fmt: skip
def test_what_trl_cannot_express_is_refused_by_name(changes, named):
    S2RInitConfig(engine="own", **{**COMMON, **changes})
    with pytest.raises(ValueError, match=f"engine: trl cannot express {named}"):
        S2RInitConfig(engine="trl", **{**COMMON, **changes})


def test_the_other_loop_must_be_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "llmcompress.training.trl_sft", raising=False)
    stage = S2RInit("teach", S2RInitConfig(engine="trl", **COMMON))
    with pytest.raises(EnvironmentProblem, match=r"stages.teach.engine: trl is not installed") as found:
        stage.run(state(), tiny.context(tmp_path, "teach"))
    assert "llmcompress[trl]" in found.value.hint


def test_the_plan_says_where_trl_is_missing(monkeypatch):
    from llmcompress.stages.s2r import training as s2r_training

    inputs = PlanInputs(state().model.layout, 4, 4, 0, 0, {}, "cpu")
    for engine, there, said in (("trl", None, 1), ("trl", object(), 0), ("own", None, 0)):
        monkeypatch.setattr(s2r_training, "find_spec", lambda name, there=there: there)
        notes = S2RInit("teach", S2RInitConfig(engine=engine, **COMMON)).estimate(inputs).notes
        assert len([note for note in notes if "trl is not installed" in note]) == said


def rows():
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return tuple(torch.randint(3, 20, (count,), generator=generator).tolist())

    def made(prompt, response):
        trained = (*(torch.rand(response - 1, generator=generator) < 0.5).tolist(), True)
        return SftRow(tokens(prompt), tokens(response), trained, (False,) * response, (False,) * response)

    return [made(3, 9), made(1, 4), made(5, 14), made(2, 6), made(4, 1), made(2, 11)]


def test_loss_and_gradient_of_a_batch_are_those_of_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset

    from llmcompress.training import trl_sft

    handle = ModelHandle.open("asset:reference_reasoner")
    policy, batch = Policy(handle.dense_model(torch.float32)), rows()
    settings = SftSettings(1, 6, 1e-3, 0.0, 0.0, 0, "constant", None, 6, None, None, 0)
    loss, _ = sft_loss(policy, batch, PAD, settings, Counts.of(batch))
    parameter = policy.model.model.layers[1].mlp.up_proj.weight
    (expected,) = torch.autograd.grad(loss, parameter)
    labelled = [trl_sft.labelled(row) for row in batch]
    loop = trl_sft._Loop(policy, settings, 1, tmp_path / "none", lambda *_: None)
    with trl_sft.lent(policy, trl_sft.SFTTrainer, ()) as folder:
        trainer = trl_sft._trainer(policy, handle.tokenizer(), PAD, loop, Dataset.from_list(labelled), folder)
        count = torch.tensor(sum(sum(row.trained) for row in batch))
        # as a whole, and in two parts that are divided by the targets of both
        for parts in ([labelled], [labelled[:4], labelled[4:]]):
            found, gradient = 0.0, torch.zeros_like(parameter)
            for part in parts:
                theirs = trainer.compute_loss(policy.model, trainer.data_collator(part), num_items_in_batch=count)
                found += float(theirs.detach())
                gradient += torch.autograd.grad(theirs, parameter)[0]
            assert found == pytest.approx(float(loss.detach()), rel=1e-5)
            assert float((gradient - expected).norm()) < 1e-5 * float(expected.norm())
    # the model comes back as it was lent: trl's forward is gone, and so is training mode
    assert "forward" not in policy.model.__dict__ and not policy.model.training
    assert policy.model.config.pad_token_id == handle.dense_model(torch.float32).config.pad_token_id


def test_whole_runs_end_in_the_same_weights_and_resume_to_the_same_bytes(tiny, tmp_path):
    pytest.importorskip("trl")

    class Killed(BaseException):
        pass

    def die(event):
        # in the second epoch, which begins in the middle
        if event.kind == "note" and event.data["text"].startswith(f"training {killed}/"):
            raise Killed

    def run(name, engine, context=None):
        context = context or tiny.context(tmp_path / name, "s")
        S2RInit("s", S2RInitConfig(engine=engine, **COMMON)).run(state(), context)
        kept = load_file(context.stage_dir / "model" / "model.safetensors")
        return kept, json.loads((context.stage_dir / "curve.json").read_text())

    (own, curve), (trl, other) = (run(engine, engine) for engine in ("own", "trl"))
    start = ModelHandle.open("asset:reference_reasoner").checkpoint
    apart = sum(float((own[name] - trl[name]).square().sum()) for name in own)
    moved = sum(float((own[name] - start.tensor(name)).square().sum()) for name in own)
    assert moved > 1e-3 and apart < 1e-4 * moved
    assert [record["phase"] for record in curve] == [record["phase"] for record in other]
    assert {record["phase"] for record in curve} == {"warm-up", "training"}
    for one, two in zip(curve, other, strict=True):
        for key in ("step", "cross_entropy", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    steps = [record["step"] for record in curve if record["phase"] == "training"]
    trajectories = json.loads((tmp_path / "own" / "stages" / "s" / "rows.json").read_text())
    assert (trajectories["rows"] + trajectories["pairs"]) % COMMON["batch"], "the last batch of an epoch is a small one"
    killed = len(steps) // 2 + 1
    broken = tiny.context(tmp_path / "broken", "s")
    with pytest.raises(Killed):
        run("broken", "trl", replace(broken, emit_event=die))
    again = run("broken", "trl", broken)
    assert all(torch.equal(value, again[0][name]) for name, value in trl.items())
    assert again[1] == other


def test_several_processes_are_refused():
    pytest.importorskip("trl")
    from llmcompress.training.trl_sft import train_trl_sft

    with pytest.raises(UsageError, match="one process"):
        train_trl_sft(SimpleNamespace(world=World(0, 2)), rows(), PAD, SimpleNamespace(batch=4), None, None, None)
