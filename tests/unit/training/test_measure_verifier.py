"""scripts/measure_verifier.py: what a token of a verification is, and that a stopped run goes on as it would have."""

import random
from pathlib import Path

import pytest
import torch

from llmcompress.data.problems.word_problems import WordProblems
from llmcompress.evaluation.self_correction import Reader
from llmcompress.training.sft import to_row

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
TASK = WordProblems(2000, sizes=(1, 8), brief=True)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import measure_verifier

    return measure_verifier


@pytest.fixture(scope="module")
def reader():
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), TASK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reader):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(reader.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    found = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(found)
    return str(found)


def test_every_number_of_a_verification_has_a_kind(script):
    steps = "4*9=36, 4*8=32, 32+3=35, 356; 356+60: 6+0=6, 5+6=11, 3+0+1=4, 416; goal 416."
    kinds = script.kinds(f"{steps} Therefore, the answer is correct.")

    def shown(kind):
        return "".join(char if found == kind else " " for char, found in zip(steps, kinds)).split()

    assert shown("total") == ["356", "416"] and shown("goal") == ["416"] and shown("header") == ["356", "60"]
    assert shown("result") == ["36", "32", "35", "6", "11", "4"]
    assert shown("terms") == [*"4948", "32", *"36056301"]
    assert kinds.count("verdict") == len("correct")
    assert not [char for char, kind in zip(steps, kinds) if char.isdigit() and kind == "text"]


def test_a_plain_verification_is_the_other_without_its_verdict(script):
    problem = TASK.problems("pretrain")[0]
    plain, whole = (script.verification(TASK, problem, random.Random(3), flag) for flag in (True, False))
    assert whole.response.startswith(plain.response) and whole.response != plain.response


def test_held_out_verifications_are_counted_by_token(script, folder, reader):
    rows = [to_row(script.verification(TASK, p, random.Random(1)), reader, 640) for p in TASK.problems("pretrain")[:60]]
    learner = script.Learner(folder, rows, reader.end, 1e-3)
    learner.restore(None)
    told, losses = script.held_out(learner, reader, [8], 6)
    assert len(told) == 6 and not any(found.steps for found in told), "weights that nobody trained know no arithmetic"
    # byte by byte: both words of a verdict, less its ending
    assert losses["verdict"][2] == sum(len("correct" if found.right else "incorrect") for found in told)
    assert all(0 <= mistakes <= count and nats > 0 for nats, mistakes, count in losses.values())


def test_a_stopped_run_goes_on_as_it_would_have(script, folder, reader, tmp_path):
    updates = [script.written(reader, TASK, 0.6, number, number == 0) for number in range(3)]
    seen = [row for rows in updates for row in rows]
    whole, begun, again = (script.Learner(folder, seen, reader.end, 1e-3) for _ in range(3))
    for learner in (whole, begun):
        learner.restore(None)
    losses = [whole.learn(rows, 1e-3, 10.0)[0] for rows in updates]
    for rows in updates[:2]:
        begun.learn(rows, 1e-3, 10.0)
    begun.save(tmp_path / "kept.pt")
    again.restore(tmp_path / "kept.pt")
    assert again.learn(updates[2], 1e-3, 10.0)[0] == losses[2]
    assert (again.step, again.tokens) == (whole.step, whole.tokens)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name]), name
