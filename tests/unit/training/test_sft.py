"""Parts of a batch add up to the batch, the anchor alone computes no more of the reference than it reads, and a verdict
weighs what it is told to.
"""

import pytest
import torch

from llmcompress.errors import UsageError
from llmcompress.training.policy import Policy
from llmcompress.training.rows import by_length
from llmcompress.training.sft import Counts, SftRow, SftSettings, sft_loss

PAD = 0


def row(prompt, response, first):
    return SftRow(
        tuple(prompt), tuple(response), tuple(i >= first for i in range(len(response))),
        tuple(i < first for i in range(len(response))), tuple(i == len(response) - 2 for i in range(len(response))),
    )  # fmt: skip


ROWS = [row([3, 4], range(5, 17), 3), row([7], [8, 9, 10], 2), row([5, 6, 7, 8], [9, 1, 2, 3, 4, 5], 4)]
COUNTS = Counts.of(ROWS)


def settings(kl=0.0, anchor=0.0, verdict_weight=1.0):
    return SftSettings(1, 3, 1e-3, kl, anchor, 0, "constant", None, 3, None, None, 0, verdict_weight)


@pytest.fixture
def policy():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    made = Policy(LlamaForCausalLM(config))
    for parameter in made.trainable.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def gradient(policy, parts, kl):
    total = 0.0
    for part in parts:
        loss, _ = sft_loss(policy, [ROWS[i] for i in part], PAD, settings(kl, 0.7, 8.0), COUNTS)
        loss.backward()
        total += float(loss.detach())
    found = torch.cat([p.grad.flatten() for p in policy.trainable.values()])
    policy.model.zero_grad()
    return total, found


def test_parts_and_the_shortened_reference_change_nothing(policy):
    # a vanishing kl takes the reference over the whole rows
    whole, expected = gradient(policy, [[0, 1, 2]], 1e-30)
    for parts in ([[0, 1, 2]], by_length([14, 4, 10], 1), by_length([14, 4, 10], 2)):
        loss, found = gradient(policy, parts, 0.0)
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_verdict_counts_as_many_targets_as_its_weight_says(policy):
    plain, figures = sft_loss(policy, ROWS, PAD, settings(), COUNTS)
    every, verdicts = float(figures["cross_entropy"]), float(figures["verdict"])
    assert float(plain) == pytest.approx(every / COUNTS.trained, rel=1e-6)
    loss, again = sft_loss(policy, ROWS, PAD, settings(verdict_weight=8.0), COUNTS)
    # a verdict repeated eight times among the targets
    assert float(loss) == pytest.approx((every + 7 * verdicts) / (COUNTS.trained + 7 * COUNTS.verdict), rel=1e-6)
    # what is told of a step stays comparable
    assert float(again["cross_entropy"]) == pytest.approx(every, rel=1e-6)
    assert COUNTS.verdict == len(ROWS) and 0 < verdicts < every


def test_blocks_computed_again_keep_less_and_give_the_same_gradients(policy):
    """KL and anchor pass through the reference as well, which is left as it is."""
    from llmcompress.training.policy import recompute_blocks

    def kept_and_gradient():
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = sft_loss(policy, ROWS, PAD, settings(0.3, 0.7), COUNTS)
        loss.backward()
        found = {name: p.grad.clone() for name, p in policy.trainable.items()}
        policy.model.zero_grad()
        return sum(sizes), found

    whole, expected = kept_and_gradient()
    recompute_blocks(policy.model)
    less, found = kept_and_gradient()
    assert less < 0.6 * whole
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
    with policy.reference() as reference:
        assert not any("forward" in module.__dict__ for module in reference.modules())
    with pytest.raises(UsageError, match="recompute: Linear has no blocks"):
        recompute_blocks(torch.nn.Linear(2, 2))


def test_recompute_is_asked_for_in_the_recipe_and_planned(tiny, tmp_path):
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.base import PlanInputs
    from llmcompress.stages.s2r_config import open_policy
    from llmcompress.stages.s2r_init import S2RInit, S2RInitConfig
    from llmcompress.stages.state import RunState

    state = RunState(model=ModelHandle.open("asset:reference_reasoner"))
    inputs, peaks = PlanInputs(state.model.layout, 4, 4, 0, 0, {}, "cpu"), []
    for recompute in (False, True):
        config = S2RInitConfig(type="s2r_init", task={"kind": "countdown"}, recompute=recompute)
        blocks = open_policy(config, state, tiny.context(tmp_path, "s")).model.model.layers
        assert all(("forward" in block.__dict__) == recompute for block in blocks)
        peaks.append(S2RInit("s", config).estimate(inputs).ram)
    assert peaks[1] < peaks[0]
