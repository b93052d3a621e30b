"""Parts of a batch add up to the batch, the anchor alone computes no more of the reference than it reads, a verdict
weighs what it is told to, and rows have the tokens and targets that responses have.
"""

import copy
from dataclasses import replace

import pytest
import torch

from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY, response
from llmcompress.data.problems.base import BOX
from llmcompress.data.problems.word_problems import WordProblems
from llmcompress.data.trajectories import Trajectory, by_problem
from llmcompress.errors import InputError, UsageError
from llmcompress.evaluation.self_correction import Reader
from llmcompress.training.policy import Policy
from llmcompress.training.rows import by_length
from llmcompress.training.sft import (
    Counts,
    SftRow,
    SftSettings,
    held_out_loss,
    is_best,
    sft_loss,
    to_row,
    train_sft,
    worn_out,
)

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


def test_the_held_out_loss_is_that_of_all_rows_together_and_leaves_no_gradient(policy):
    whole = held_out_loss(policy, ROWS, PAD, settings(kl=0.5, anchor=0.5, verdict_weight=8.0))
    _, figures = sft_loss(policy, ROWS, PAD, settings(), COUNTS)
    assert whole["validation"] == pytest.approx(float(figures["cross_entropy"]) / COUNTS.trained, rel=1e-6)
    assert whole["validation_verdict"] == pytest.approx(float(figures["verdict"]) / COUNTS.verdict, rel=1e-6)
    parts = held_out_loss(policy, ROWS, PAD, replace(settings(), micro_batch=1))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert all(parameter.grad is None for parameter in policy.trainable.values())


def test_a_held_out_loss_that_is_no_number_ends_the_training(policy):
    with torch.no_grad():
        next(iter(policy.trainable.values())).fill_(torch.nan)
    with pytest.raises(InputError, match="held-out loss of the training is not finite"):
        held_out_loss(policy, ROWS, PAD, settings())


def test_when_to_stop_by_hand():
    losses = [3.0, 2.0, 2.5, 2.0, 1.9, 1.9, 2.1]
    assert [is_best(losses[:n]) for n in range(1, 8)] == [True, True, False, False, True, False, False]
    assert [worn_out(losses[:n], 2) for n in range(1, 8)] == [False, False, False, True, False, False, True]
    assert not worn_out(losses, None) and not worn_out([], 1) and not worn_out([1.0], 1)
    assert worn_out([1.0, 1.0], 1)


def trained(policy, tmp_path, name, stop_after=None, **fields):
    """Weights and curve of a training whose held-out row says the opposite of what is trained."""
    told = []

    def on_step(step, total, figures):
        told.append(figures)
        if step == stop_after:
            raise KeyboardInterrupt

    plan = SftSettings(6, 1, 3e-2, 0.0, 0.0, 0, "constant", None, 3, None, 1, 0, **fields)
    contrary = [row([3, 4], [20, 21, 22, 23, 20, 21], 0)]
    curve = train_sft(policy, ROWS, PAD, plan, tmp_path / name, on_step, contrary)
    return {name: value.detach().clone() for name, value in policy.trainable.items()}, curve, told


def test_training_ends_where_the_held_out_loss_falls_no_more_with_the_best_weights(policy, tmp_path):
    start = copy.deepcopy(policy.model.state_dict())
    best, curve, told = trained(policy, tmp_path, "a", validate_every=1, patience=3)
    losses = [record["validation"] for record in curve]
    assert worn_out(losses, 3) and not worn_out(losses[:-1], 3) and len(curve) < 18
    kept = [record["step"] for record in curve if record.get("kept")]
    assert kept == [1 + losses.index(min(losses))]
    assert all("tokens_per_second" in figures and "tokens_per_second" not in record
               for figures, record in zip(told, curve, strict=True))  # fmt: skip
    # the same steps without the end give these weights
    policy.model.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        trained(policy, tmp_path, "b", stop_after=kept[0])
    for name, value in policy.trainable.items():
        assert torch.equal(value, best[name]), name


def test_a_training_killed_between_held_out_losses_ends_as_it_would_have(policy, tmp_path):
    start = copy.deepcopy(policy.model.state_dict())
    whole, expected, _ = trained(policy, tmp_path, "whole", validate_every=2, patience=2, weight_decay=0.1)
    for stop in range(1, len(expected)):
        policy.model.load_state_dict(start)
        path = f"killed {stop}"
        with pytest.raises(KeyboardInterrupt):
            trained(policy, tmp_path, path, stop, validate_every=2, patience=2, weight_decay=0.1)
        policy.model.load_state_dict(start)
        found, curve, _ = trained(policy, tmp_path, path, validate_every=2, patience=2, weight_decay=0.1)
        assert curve == expected
        assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_without_a_period_an_epoch_ends_in_a_held_out_loss(policy, tmp_path):
    _, curve, _ = trained(policy, tmp_path, "epochs")
    assert [record["step"] for record in curve if "validation" in record] == [3, 6, 9, 12, 15, 18]
    assert len(curve) == 18 and not any("kept" in record for record in curve)


def test_problems_of_the_validation_are_in_no_training_row():
    rows = [Trajectory(f"p{number % 9}", "q", f"{number}", 1, "trajectory") for number in range(40)]
    kept, aside = by_problem(rows, 0.25, 5)
    assert len({found.problem for found in aside}) == 2 and len(kept) + len(aside) == 40
    assert not {found.problem for found in kept} & {found.problem for found in aside}
    assert (kept, aside) == by_problem(rows, 0.25, 5) != by_problem(rows, 0.25, 6)
    assert len(by_problem(rows, 0.001, 0)[1]) >= 4, "one problem at least"
    assert len({found.problem for found in by_problem(rows, 0.99, 0)[0]}) == 1
    assert by_problem(rows[::9], 0.5, 0) == (rows[::9], [])


def test_recompute_is_asked_for_in_the_recipe_and_planned(tiny, tmp_path):
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.base import PlanInputs
    from llmcompress.stages.s2r.config import open_policy
    from llmcompress.stages.s2r.init import S2RInit, S2RInitConfig
    from llmcompress.stages.state import RunState

    state = RunState(model=ModelHandle.open("asset:reference_reasoner"))
    inputs, peaks = PlanInputs(state.model.layout, 4, 4, 0, 0, {}, "cpu"), []
    for recompute in (False, True):
        config = S2RInitConfig(type="s2r_init", task={"kind": "countdown"}, recompute=recompute)
        blocks = open_policy(config, state, tiny.context(tmp_path, "s")).model.model.layers
        assert all(("forward" in block.__dict__) == recompute for block in blocks)
        peaks.append(S2RInit("s", config).estimate(inputs).ram)
    assert peaks[1] < peaks[0]


def test_plans_count_the_checkpoints_that_lie_beside_each_other():
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.sizes import parameters
    from llmcompress.stages.base import PlanInputs
    from llmcompress.stages.s2r.init import S2RInit, S2RInitConfig

    layout = ModelHandle.open("asset:reference_reasoner").layout

    def disk(**fields):
        config = S2RInitConfig(type="s2r_init", task={"kind": "countdown"}, **fields)
        return S2RInit("s", config).estimate(PlanInputs(layout, 4, 4, 0, 0, {}, "cpu")).disk

    weights, checkpoint = 4 * parameters(layout), 12 * parameters(layout)
    assert disk(checkpoint_every=None) == weights and disk() == weights + checkpoint
    assert disk(pair_epochs=2) == weights + 2 * checkpoint and disk(pair_epochs=2, data="program") == disk()


@pytest.fixture(scope="module")
def byte_reader():
    """Reads bytes, and two line feeds that no text follows as one token, as SmolLM2's and GPT-2's tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: place for place, piece in enumerate([*alphabet, "ĊĊ", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), WordProblems(brief=True))


def told(row, reader):
    """(Given, trained) text of a row's response."""
    pieces = reader.pieces(row.response)
    return tuple(
        "".join(p for p, t in zip(pieces, row.trained, strict=True) if t is trained) for trained in (False, True)
    )


def test_the_marker_behind_a_rejected_attempt_has_the_tokens_it_has_in_front_of_the_next(byte_reader):
    wrong, right = (f"2+2={n}. {BOX}{n}}}" for n in (5, 4))
    checks = f"2+2=4. {INCORRECT}", f"2+2=4. {CORRECT}"
    whole = Trajectory("", "2+2?", response([(wrong, checks[0]), (right, checks[1])]), 2, "trajectory")
    pair = Trajectory("", "2+2?", f"{wrong}{CHECK}{checks[0]}{RETRY}", 1, "pair", ends=False)
    alone = byte_reader.tokenizer(pair.response, add_special_tokens=False)["input_ids"]
    row, longer = (to_row(text, byte_reader, 1000) for text in (pair, whole))
    assert row.response == longer.response[: len(row.response)] != tuple(alone)
    assert byte_reader.text(row.response) == pair.response
    # what ends is tokenized as it is
    ended = Trajectory("", "2+2?", f"{right}{CHECK}{checks[1]}", 1, "pair")
    assert to_row(ended, byte_reader, 1000).response[-1] == byte_reader.end


def test_a_verification_alone_teaches_neither_when_to_verify_nor_what_follows(byte_reader):
    text = f"2+2=5. {BOX}5}}{CHECK}2+2=4. {INCORRECT}"
    row = to_row(Trajectory("", "2+2?", text, 1, "verification", ends=False), byte_reader, 1000)
    assert told(row, byte_reader) == (f"2+2=5. {BOX}5}}{CHECK}", f"2+2=4. {INCORRECT}")
    assert byte_reader.end not in row.response
    said = [piece for piece, says in zip(byte_reader.pieces(row.response), row.verdict, strict=True) if says]
    assert "".join(said) == "incorrect"
