"""No tensor of the CPU meets one of the GPU in the S2R code: shown without a GPU by tensors without values.

Device ``meta`` stands for the GPU. A mode below autograd refuses operations whose tensors are on both sides, and lets
values be read, as zeros.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmcompress.evaluation import sampling
from llmcompress.evaluation.sampling import Sampling
from llmcompress.evaluation.static_decoding import StaticDecoder
from llmcompress.training import rl
from llmcompress.training.optimizer import Schedule, Trainer
from llmcompress.training.policy import Policy
from llmcompress.training.rows import pad_rows
from llmcompress.training.sft import Counts, SftRow, SftSettings, sft_loss

MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Apart(TorchDispatchMode):
    """Refuses what a GPU would refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and tensors[0].is_meta:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and tensors[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        # a single value may be anywhere
        if len({t.device.type for t in tensors if t.dim()}) > 1 and func not in MOVES:
            raise RuntimeError(f"{func}: tensors on both devices")
        return func(*args, **kwargs)


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=1, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    with Apart():
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        yield model


def test_the_case_can_fail(model):
    padded = pad_rows([[3]], [[4]], 1, "cpu")
    with pytest.raises(RuntimeError, match="both devices"):
        model(input_ids=padded.ids, attention_mask=padded.mask)


@pytest.mark.parametrize(("kl", "anchor"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5)])
def test_supervised_loss(model, kl, anchor):
    policy = Policy(model)
    rows = [
        SftRow((3, 4, 5), (6, 7, 2), (False, True, True), (True, False, False), (False, True, False)),
        SftRow((3,), (6, 2), (True, True), (True, True), (False, False)),
    ]
    settings = SftSettings(1, 2, 1e-3, kl, anchor, 0, "constant", None, 2, None, None, 0, 8.0)
    loss, figures = sft_loss(policy, rows, 1, settings, Counts.of(rows))
    loss.backward()
    assert loss.device.type == "meta"
    assert {figure.device.type for figure in figures.values()} == {"meta"}


def rollout(prompt, ids):
    from llmcompress.algorithms.self_verify import cut

    response = cut(["x"] * (len(ids) - 1), True)
    return rl.Rollout(0, prompt, ids, response, SimpleNamespace(), [1], 1, [0.5], [False])


@pytest.mark.parametrize("level", ["outcome", "process"])
def test_scores_and_updates(model, level, monkeypatch):
    policy = Policy(model)
    rollouts = [rollout([3, 4, 5], [6, 7, 2]), rollout([3], [6, 2])]
    settings = rl.RlSettings(
        level=level, steps=1, prompts=1, samples=2, updates=1, lr=1e-3, warmup=0, max_norm=1.0, kl=0.01, kl_mean=False,
        clip=0.2, ratio="mean", sampling=Sampling(4, 0.7), truncation_reward=None, flip_bonus=1.0,
        verify_correct_bonus=1.0, discount=1.0, train_end=True, skip_agreeing=False, micro_batch=2, micro_tokens=None,
        save_every=None, seed=0, anchor=0.5,
    )  # fmt: skip
    scored = rl.score(policy, SimpleNamespace(pad=1), rollouts, settings, same=False)
    assert {t.device.type for t in (*scored.old, *scored.reference)} == {"cpu"}
    monkeypatch.setattr(rl, "unit_advantages", lambda *_: [0.5])
    figures = rl.update(
        policy,
        SimpleNamespace(pad=1),
        scored,
        [0, 1],
        settings,
        Trainer(policy.trainable, Schedule(1e-3, 1, 1), max_norm=1.0),
    )
    assert figures.keys() == {"loss", "clipped", "grad_norm"}


def test_the_writer_is_a_copy_in_the_compute_type(model):
    policy = Policy(model, compute=torch.bfloat16)
    with policy.writer() as first, policy.writer() as second:
        assert first is second is not policy.model
        assert {(p.device.type, p.dtype) for p in first.parameters()} == {("meta", torch.bfloat16)}


def test_decoding(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [[]] * tensor.shape[0])
    monkeypatch.setattr(StaticDecoder, "_record", lambda self, model: None)
    decoder = StaticDecoder(model, 4, 8, 3)
    assert decoder.decode(model, PROMPTS, 2, 1, lambda logits: logits.argmax(-1)) == [[]] * 3
    assert {t.device.type for t in (decoder.bias, decoder.ids, decoder.layers[0].keys)} == {"meta"}
    assert sampling._choose(torch.zeros(2, 5, device="meta"), Sampling(1), torch.Generator()).device.type == "meta"
