"""Responses written by vLLM. It is not there: a stand-in takes the calls that vLLM 0.11.2 and 0.33.0 take
(``tests/data/vllm_signatures.json``, read from their sources by ``scripts/vllm_signatures.py``), reads the weights that
are handed over from disk, and samples with them.
"""

from __future__ import annotations

import json
import sys
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.data.problems.config import CountdownTask
from llmcompress.distributed.world import World
from llmcompress.errors import EnvironmentProblem, RecipeError, UsageError
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.rtn import Rtn, RtnConfig
from llmcompress.stages.s2r.init import S2RInit, S2RInitConfig
from llmcompress.stages.s2r.rl import S2RRl, S2RRlConfig
from llmcompress.stages.state import RunState

KNOWN = json.loads((Path(__file__).parents[2] / "data" / "vllm_signatures.json").read_text())
TASK = CountdownTask(kind="countdown", high=15, limit=60, compact=True)
RL = {
    "type": "s2r_rl", "task": TASK, "level": "outcome", "measure": None, "steps": 3, "prompts": 4, "samples": 4,
    "problems": 10, "lr": 1e-3, "warmup": 0, "updates": 2, "checkpoint_every": 1,
    "sampling": {"temperature": 0.8, "max_new_tokens": 14, "batch": 16}, "sampler": {"engine": "vllm", "memory": 0.3},
}  # fmt: skip
INIT = {
    "type": "s2r_init", "task": TASK, "measure": None, "problems": 20, "samples": 3, "epochs": 1, "batch": 8,
    "sampling": {"temperature": 0.8, "max_new_tokens": 14}, "sampler": {"engine": "vllm"},
}  # fmt: skip


def signature(names):
    placed = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=_default(n, names)) for n in names["placed"]]
    named = [Parameter(n, Parameter.KEYWORD_ONLY, default=_default(n, names)) for n in names["named"]]
    return Signature(placed + named)


def _default(name, names):
    return Parameter.empty if name in names["needed"] else None


class StandIn:
    """``vllm`` of one version, as far as S2R calls it."""

    def __init__(self, version):
        self.names, self.calls, self.engines = KNOWN[version], [], []
        self.stale = False

    def taken(self, method, args, kwargs):
        self.calls.append(method)
        return signature(self.names[method]).bind(*args, **kwargs).arguments

    def SamplingParams(self, **kwargs):
        assert set(kwargs) <= set(self.names["SamplingParams"])
        return SimpleNamespace(**{"top_k": 0, "stop_token_ids": [], "ignore_eos": False, **kwargs})

    def LLM(self, **kwargs):
        explicit = set(self.names["__init__"]["placed"]) | set(self.names["__init__"]["named"])
        # what it does not name itself it passes on
        assert set(kwargs) <= explicit | set(self.names["EngineArgs"])
        self.engines.append(Engine(self, kwargs))
        return self.engines[-1]


class Engine:
    def __init__(self, package, given):
        self.package, self.given = package, given
        self.awake = {"weights", "kv_cache"}
        self.cached = False
        self.model = None
        self.load()

    def load(self):
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.given["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(self.given["model"], dtype=dtype).eval()

    def sleep(self, *args, **kwargs):
        assert self.package.taken("sleep", args, kwargs) == {"level": 2}
        assert self.given["enable_sleep_mode"]
        self.model, self.awake = None, set()

    def wake_up(self, *args, **kwargs):
        self.awake |= set(self.package.taken("wake_up", args, kwargs)["tags"])

    def reset_prefix_cache(self, *args, **kwargs):
        self.package.taken("reset_prefix_cache", args, kwargs)
        self.cached = False

    def collective_rpc(self, *args, **kwargs):
        asked = self.package.taken("collective_rpc", args, kwargs)
        assert asked == {"method": "reload_weights"} and not self.package.names["reload_weights"]["needed"]
        assert self.awake == {"weights"}, "memory for the weights and none for the cache yet"
        self.load()
        if self.package.stale:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(0.5)

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        asked = self.package.taken("generate", args, kwargs)
        assert self.awake == {"weights", "kv_cache"} and self.model is not None
        # keys of other weights
        assert not self.cached
        self.cached = True
        prompts, settings = asked["prompts"], asked["sampling_params"]
        assert len(settings) == len(prompts) and len({own.seed for own in settings}) == len(settings)
        return [self.written(prompt, own) for prompt, own in zip(prompts, settings, strict=True)]

    def written(self, prompt, own):
        assert set(prompt) <= set(self.package.names["TokensPrompt"])
        assert own.logprobs == 0 and own.ignore_eos and own.top_k == 0 and own.top_p == 1
        assert self.given["logprobs_mode"] == "processed_logprobs"
        assert len(prompt["prompt_token_ids"]) + own.max_tokens <= self.given["max_model_len"]
        generator = torch.Generator().manual_seed(own.seed)
        ids, chances = [], []
        while len(ids) < own.max_tokens and not (ids and ids[-1] in own.stop_token_ids):
            logits = self.model(torch.tensor([[*prompt["prompt_token_ids"], *ids]])).logits[0, -1].float()
            logp = (logits / own.temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            chances.append({ids[-1]: SimpleNamespace(logprob=float(logp[ids[-1]]))})
        assert {"token_ids", "logprobs"} <= set(self.package.names["CompletionOutput"])
        assert "logprob" in self.package.names["Logprob"]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=chances)])


@pytest.fixture(params=list(KNOWN))
def vllm(request, monkeypatch):
    made = StandIn(request.param)
    monkeypatch.setitem(sys.modules, "vllm", made)
    return made


def state():
    return RunState(model=ModelHandle.open("asset:reference_reasoner"))


def test_each_round_is_written_with_the_weights_of_its_moment(vllm, tiny, tmp_path):
    context = tiny.context(tmp_path, "r")
    S2RRl("r", S2RRlConfig(**RL)).run(state(), context)
    curve = json.loads((context.stage_dir / "curve.json").read_text())
    # the stand-in computes with what was handed over: other weights would have other log-probabilities
    assert len(curve) == RL["steps"] and all(record["sampler_gap"] < 1e-4 for record in curve)
    round_again = ["wake_up", "collective_rpc", "reset_prefix_cache", "wake_up", "generate", "sleep"]
    assert vllm.calls == ["generate", "sleep", *round_again * 2]
    (engine,) = vllm.engines
    assert engine.given["gpu_memory_utilization"] == 0.3 and engine.given["generation_config"] == "vllm"
    kept = load_file(context.stage_dir / "model" / "model.safetensors")
    start = state().model.checkpoint
    assert any(not torch.equal(kept[name], start.tensor(name)) for name in kept)
    assert not (context.stage_dir / "vllm").exists(), "the weights on their way are removed"


def test_responses_are_cut_and_judged_like_our_own(vllm, tiny, tmp_path):
    from llmcompress.stages.s2r import config as shared
    from llmcompress.training.rl import collect

    config = S2RRlConfig(**RL)
    stage, context = S2RRl("r", config), tiny.context(tmp_path, "r")
    reader = shared.reader_of(config, state(), TASK.build())
    policy = shared.open_policy(config, state(), context)
    problems = reader.problems.problems("train")[:6]
    policy.sampler = shared.open_sampler(config, policy, reader, state(), context)
    rollouts = collect(policy, reader, problems, range(6), stage._settings(context), 5)
    again = collect(policy, reader, problems, range(6), stage._settings(context), 5)
    assert [r.ids for r in rollouts] == [r.ids for r in again], "the seeds are the round's"
    assert [r.ids for r in rollouts] != [
        r.ids for r in collect(policy, reader, problems, range(6), stage._settings(context), 6)
    ]
    ended = [r for r in rollouts if r.response.ended]
    assert ended and all(r.ids[-1] == reader.end for r in ended)
    assert all(len(r.told) == len(r.ids) for r in rollouts)
    assert [r.prompt for r in rollouts] == [reader.prompt(p.question) for p in problems for _ in range(4)]


def test_weights_that_were_lost_on_the_way_end_the_run(vllm, tiny, tmp_path):
    vllm.stale = True
    with pytest.raises(EnvironmentProblem, match="does not write with the policy's weights") as found:
        S2RRl("r", S2RRlConfig(**RL)).run(state(), tiny.context(tmp_path, "r"))
    assert found.value.hint == "sampler.engine: own"
    # the first round, read when the engine started, was right
    assert len(vllm.engines) == 1 and vllm.calls.count("generate") == 2


def test_supervised_training_samples_in_one_waking(vllm, tiny, tmp_path):
    context = tiny.context(tmp_path, "s")
    keep = {"all_right": 1.0, "few_wrong": 1.0, "some_wrong": 1.0, "most_wrong": 1.0}
    S2RInit("s", S2RInitConfig(kl=0.0, keep=keep, **INIT)).run(state(), context)
    assert vllm.calls == ["generate", "sleep"]
    samples = json.loads((context.stage_dir / "samples" / "00000.json").read_text())
    assert len(samples) == 20 and {len(own) for own in samples} == {3}


def test_adapters_go_along(vllm, tiny, tmp_path):
    context = tiny.context(tmp_path, "r")
    S2RRl("r", S2RRlConfig(adapter={"rank": 2}, **{**RL, "lr": 1e-2})).run(state(), context)
    curve = json.loads((context.stage_dir / "curve.json").read_text())
    assert curve[-1]["kl"] != 0 and all(record["sampler_gap"] < 1e-4 for record in curve)


def test_what_vllm_cannot_do_is_refused(tiny, tmp_path):
    stage = S2RRl("r", S2RRlConfig(adapter={"rank": 2}, **RL))
    packed = state()
    rules = {"all": {"role": ["attention", "mlp"], "bits": 4, "group_size": 32}}
    Rtn("q", RtnConfig(type="rtn", rules=rules)).run(packed, tiny.context(tmp_path, "q"))
    with pytest.raises(RecipeError, match=r"stages.r.sampler.engine: vllm reads no packed weights"):
        stage.run(packed, tiny.context(tmp_path, "r"))
    from llmcompress.stages.s2r.config import open_sampler

    context = SimpleNamespace(stage="r", world=World(0, 2))
    with pytest.raises(UsageError, match="writes for one process"):
        open_sampler(stage.config, None, None, state(), context)


def test_vllm_is_never_required(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EnvironmentProblem, match="vllm is not installed") as found:
        S2RRl("r", S2RRlConfig(**RL)).run(state(), tiny.context(tmp_path, "r"))
    assert "llmcompress[vllm]" in found.value.hint and "sampler.engine: own" in found.value.hint
    S2RRl("o", S2RRlConfig(**{**RL, "sampler": {}, "steps": 1})).run(state(), tiny.context(tmp_path, "o"))


def test_an_engine_that_does_not_start_is_one_error(vllm, tiny, tmp_path, monkeypatch):
    def broken(**_):
        raise ValueError("Sleep mode is not supported on current platform.")

    monkeypatch.setattr(vllm, "LLM", broken)
    with pytest.raises(EnvironmentProblem, match="vLLM does not start: Sleep mode is not supported"):
        S2RRl("r", S2RRlConfig(**RL)).run(state(), tiny.context(tmp_path, "r"))


@pytest.mark.parametrize("there", [False, True])
def test_the_plan_says_what_vllm_takes(monkeypatch, there):
    from llmcompress.stages.s2r import training as s2r_training

    monkeypatch.setattr(s2r_training, "find_spec", lambda name: object() if there else None)
    inputs = PlanInputs(state().model.layout, 4, 4, 0, 0, {}, "cuda")
    for stage in (S2RRl("r", S2RRlConfig(**RL)), S2RInit("s", S2RInitConfig(**INIT))):
        notes = " ".join(stage.estimate(inputs).notes)
        assert f"vLLM takes {stage.config.sampler.memory:.0%} of the GPU" in notes
        assert ("vllm is not installed" in notes) != there
