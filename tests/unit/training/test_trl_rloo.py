"""Our reinforcement at outcome level and trl's ``RLOOTrainer`` compute the same; where they do not is pinned down."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.algorithms import rl_objectives as rl
from llmcompress.data.problems.config import CountdownTask
from llmcompress.distributed.world import World
from llmcompress.errors import EnvironmentProblem, UsageError
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.s2r.rl import S2RRl, S2RRlConfig
from llmcompress.stages.state import RunState

TASK = CountdownTask(kind="countdown", high=15, limit=60, compact=True)
COMMON = {
    "type": "s2r_rl", "task": TASK, "level": "outcome", "measure": None, "steps": 3, "prompts": 4, "samples": 4,
    "problems": 10, "ratio": "sum", "kl": 0.0, "lr": 1e-3, "warmup": 2, "micro_batch": 8, "checkpoint_every": 1,
    "sampling": {"temperature": 0.9, "max_new_tokens": 14, "batch": 64},
}  # fmt: skip
RESPONSES = [[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13], [14, 2], [6, 6, 2], [7, 8, 9, 2], [3, 2], [4, 5, 6, 7]]
REWARDS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
SAMPLES = 4


def test_the_other_loop_must_be_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "llmcompress.training.trl_rloo", raising=False)
    stage = S2RRl("r", S2RRlConfig(engine="trl", **COMMON))
    with pytest.raises(EnvironmentProblem, match=r"stages.r.engine: trl is not installed") as found:
        stage.run(state(), tiny.context(tmp_path, "r"))
    assert "llmcompress[trl]" in found.value.hint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"level": "process"}, "level: process"), ({"mode": "offline"}, "mode: offline"),
        ({"ratio": "mean"}, "ratio: mean"), ({"kl_mean": True}, "kl_mean: true"),
        ({"train_end": False}, "train_end: false"), ({"weigh_by_length": True}, "weigh_by_length: true"),
        ({"anchor": 0.1}, "an anchor"),
        ({"micro_tokens": 512}, "micro_tokens"), ({"kl": 0.1}, "skip_agreeing: true"), ({"updates": 5}, "updates"),
    ],
)  # fmt: skip
def test_what_trl_cannot_express_is_refused_by_name(changes, named):
    S2RRlConfig(engine="own", **{**COMMON, **changes})
    with pytest.raises(ValueError, match=f"engine: trl cannot express {named}"):
        S2RRlConfig(engine="trl", **{**COMMON, **changes})


def test_parts_are_of_equal_size():
    from llmcompress.training.trl_model import rows_at_once

    assert [rows_at_once(12, limit) for limit in (1, 5, 7, 64)] == [1, 4, 6, 12]
    assert rows_at_once(7, 4) == 1


def state():
    return RunState(model=ModelHandle.open("asset:reference_reasoner"))


def shake(model, size, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=size)


@pytest.fixture
def fixed(tmp_path):
    """Makes trl's own trainer on given responses: only what it samples is replaced."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    class Fixed(RLOOTrainer):
        def _send_telemetry(self):
            pass

        def _generate_single_turn(self, prompt_ids, *_):
            return RESPONSES

    source = tmp_path / "reference"
    ModelHandle.open("asset:reference_reasoner").dense_model(torch.float32).save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(ModelHandle.open("asset:reference_reasoner").path)

    def make(beta):
        model = AutoModelForCausalLM.from_pretrained(source)
        shake(model, 0.02, 1)
        arguments = RLOOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, num_generations=SAMPLES, beta=beta,
            bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, temperature=0.8,
            max_completion_length=8, gradient_checkpointing=False, save_strategy="no",
        )  # fmt: skip
        return Fixed(
            model=model, reward_funcs=lambda **_: REWARDS, args=arguments, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["1 2 3", "4 5 6"]}),
        )  # fmt: skip

    return make


def own_logp(model, prompts, temperature=0.8):
    """Log-probabilities of the responses as our loop computes them, ``[8, 4]``, with 0 behind the end."""
    from llmcompress.training.rows import pad_rows

    padded = pad_rows(prompts, RESPONSES, 1, "cpu")
    logits = model(input_ids=padded.ids, attention_mask=padded.mask).logits
    return rl.token_logp(padded.select(logits), padded.targets, temperature) * padded.inside, padded.inside


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_advantages_loss_and_gradient_are_those_of_trl(fixed, beta):
    trainer = fixed(beta)
    model = trainer.model.train()
    rows = [{"prompt": text} for text in ("1 2 3", "4 5 6") for _ in range(SAMPLES)]
    batch = trainer._generate_and_score_completions(rows)
    prompts = [trainer.processing_class(row["prompt"])["input_ids"] for row in rows]
    with torch.no_grad():
        old, inside = own_logp(model, prompts)
    rewards, kl = torch.tensor(REWARDS), torch.zeros(len(REWARDS))
    if beta:
        with torch.no_grad():
            kl = (old - own_logp(trainer.ref_model, prompts)[0]).sum(1)
        assert kl.abs().min() > 1e-3
    advantages = rl.leave_one_out((rewards - beta * kl).view(-1, SAMPLES)).flatten()
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), advantages, rtol=1e-4, atol=1e-5)
    # ours takes the KL off after the baseline: another number wherever there is a KL
    ours = rl.leave_one_out(rewards.view(-1, SAMPLES)).flatten() - beta * kl
    assert torch.allclose(ours, advantages, atol=1e-4) == (beta == 0)
    # a policy that has moved, so that some ratios leave the range
    shake(model, 0.002, 2)
    parameter = model.model.layers[1].mlp.up_proj.weight
    theirs = trainer.compute_loss(model, batch)
    (expected,) = torch.autograd.grad(theirs, parameter)
    logp, _ = own_logp(model, prompts)
    units = torch.where(inside, 0, -1)
    each, clipped = rl.clipped_loss(logp, old, units, advantages[:, None], 0.2, "sum")
    (found,) = torch.autograd.grad(each.mean(), parameter)
    assert 0 < float(clipped) < 1
    torch.testing.assert_close(each.mean(), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_whole_runs_end_in_the_same_weights_and_resume_to_the_same_bytes(tiny, tmp_path):
    pytest.importorskip("trl")

    class Killed(BaseException):
        pass

    def die(event):
        if event.kind == "metric" and event.data["name"] == "r.loss" and event.data["step"] == 2:
            raise Killed

    def run(name, engine, context=None, **changes):
        context = context or tiny.context(tmp_path / name, "r")
        S2RRl("r", S2RRlConfig(engine=engine, **{**COMMON, "updates": 2, **changes})).run(state(), context)
        kept = load_file(context.stage_dir / "model" / "model.safetensors")
        return kept, json.loads((context.stage_dir / "curve.json").read_text())

    # one step on a round: the order that each engine deals its responses in does not matter
    (own, curve), (trl, other) = (run(engine, engine, updates=1) for engine in ("own", "trl"))
    start = ModelHandle.open("asset:reference_reasoner").checkpoint
    apart = sum(float((own[name] - trl[name]).square().sum()) for name in own)
    moved = sum(float((own[name] - start.tensor(name)).square().sum()) for name in own)
    assert moved > 1e-3 and apart < 1e-4 * moved
    for one, two in zip(curve, other, strict=True):
        for key in set(one) - {"clipped"}:
            assert two[key] == (one[key] if one[key] is None else pytest.approx(one[key], rel=1e-3, abs=1e-4)), key
    whole = run("whole", "trl")
    broken = tiny.context(tmp_path / "broken", "r")
    with pytest.raises(Killed):
        run("broken", "trl", replace(broken, emit_event=die))
    again = run("broken", "trl", broken)
    assert all(torch.equal(value, again[0][name]) for name, value in whole[0].items())
    assert whole[1] == again[1]
    assert not torch.equal(whole[0]["model.norm.weight"], trl["model.norm.weight"])


def test_several_processes_are_refused():
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from llmcompress.training.trl_rloo import train_trl

    with pytest.raises(UsageError, match="one process"):
        train_trl(SimpleNamespace(world=World(0, 2)), None, [], None, None, None, None)
