import pytest
import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.training.optimizer import Schedule, Trainer, due


def make(steps=6, decay="constant", **more):
    torch.manual_seed(0)
    parameters = {"w": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(3))}
    return Trainer(parameters, Schedule(0.1, 2, steps, decay), **more)


def step(trainer, number):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(number))
    (x @ trainer.parameters["w"].T + trainer.parameters["b"]).square().sum().backward()
    return trainer.update()


def test_continuing_from_a_checkpoint_gives_the_same_bits(tmp_path):
    whole = make(max_norm=1.0, decay="linear")
    for number in range(6):
        step(whole, number)
    half = make(max_norm=1.0, decay="linear")
    for number in range(3):
        step(half, number)
    half.save(tmp_path / "c.safetensors", {"curve": [1, 2, 3]})
    again = make(max_norm=1.0, decay="linear")
    assert again.restore(tmp_path / "c.safetensors") == {"curve": [1, 2, 3]}
    for number in range(again.step, 6):
        step(again, number)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name])


def test_the_mean_of_the_tail_replaces_the_last_values_and_a_checkpoint_keeps_it(tmp_path):
    whole, seen = make(tail=0.5), []
    for number in range(6):
        step(whole, number)
        seen.append({name: parameter.detach().clone() for name, parameter in whole.parameters.items()})
    last = {name: parameter.detach().clone() for name, parameter in whole.parameters.items()}
    whole.finish()
    assert whole.averaged == 3
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter.detach(), sum(values[name] for values in seen[3:]) / 3)
        assert not torch.equal(parameter, last[name])
    # broken off within the tail: the mean goes on where it was, and the steps start from values, not from the mean
    half = make(tail=0.5)
    for number in range(5):
        step(half, number)
    half.save(tmp_path / "c.safetensors", {})
    again = make(tail=0.5)
    assert again.restore(tmp_path / "c.safetensors") == {}
    assert again.averaged == 2
    step(again, 5)
    again.finish()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name])


def test_without_a_tail_the_last_values_stay_and_time_that_runs_out_begins_one():
    plain, hurried = make(), make(steps=100, tail=0.25)
    for number in range(6):
        step(plain, number)
    last = plain.parameters["w"].detach().clone()
    plain.finish()
    assert torch.equal(plain.parameters["w"], last)
    for number, spent in enumerate((0.5, 0.75, 0.8, 0.9)):
        hurried.spent = spent
        step(hurried, number)
    assert hurried.averaged == 2


def test_rates_by_hand():
    trainer = make(steps=4, decay="linear")
    rates = []
    for number in range(4):
        rates.append(trainer.rate())
        step(trainer, number)
    assert rates == pytest.approx([0.05, 0.075, 0.05, 0.025])
    # time that is nearly spent counts as steps do
    hurried = make(steps=100, decay="linear")
    hurried.step, hurried.spent = 10, 0.75
    assert hurried.rate() == pytest.approx(0.025)
    hurried.spent = 1.2
    assert hurried.rate() == 0


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_zero_by_hand():
    schedule = Schedule(0.1, 2, 6, "cosine")
    halves = [0.05, 0.1, 0.1, 0.1 * (2 + 2**0.5) / 4, 0.05, 0.1 * (2 - 2**0.5) / 4, 0.0]
    assert [schedule.rate(step) for step in range(7)] == pytest.approx(halves)
    assert schedule.rate(2, spent=0.5) == pytest.approx(0.05) and schedule.rate(2, spent=1.2) == pytest.approx(0)
    assert [Schedule(0.1, 2, 6).rate(step) for step in (0, 1, 5, 99)] == pytest.approx([0.05, 0.1, 0.1, 0.1])


def test_weight_decay_shrinks_matrices_and_nothing_else():
    """AdamW without a gradient's direction: ``θ ← θ (1 − η λ)``, then the step, which both trainers take alike."""
    plain, decayed = make(), make(weight_decay=0.2)
    start = {name: value.detach().clone() for name, value in plain.parameters.items()}
    rate = plain.rate()
    step(plain, 0)
    step(decayed, 0)
    expected = plain.parameters["w"] - rate * 0.2 * start["w"]
    torch.testing.assert_close(decayed.parameters["w"], expected)
    assert torch.equal(decayed.parameters["b"], plain.parameters["b"])
    # all groups have the rate of the schedule
    assert {group["lr"] for group in decayed.optimizer.param_groups} == {rate}


def test_the_best_values_come_back_and_a_checkpoint_keeps_them(tmp_path):
    trainer = make(weight_decay=0.1)
    step(trainer, 0)
    trainer.remember()
    best = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    step(trainer, 1)
    trainer.save(tmp_path / "c.safetensors", {})
    again = make(weight_decay=0.1)
    again.restore(tmp_path / "c.safetensors")
    step(trainer, 2)
    step(again, 2)
    for one in (trainer, again):
        assert not torch.equal(one.parameters["w"], best["w"])
        one.recall()
        assert all(torch.equal(value, best[name]) for name, value in one.parameters.items())


def test_checkpoints_are_due():
    assert [due(step, 2, step == 5) for step in range(1, 6)] == [False, True, False, True, True]
    assert not any(due(step, None, step == 5) for step in range(1, 6))


def test_nothing_to_restore_and_damage(tmp_path):
    assert make().restore(tmp_path / "none") is None
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"1234")
    with pytest.raises(InputError, match="cannot continue"):
        make().restore(path)


def test_gradients_that_are_not_finite_end_the_training_before_they_reach_a_value():
    trainer = make()
    step(trainer, 0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    (trainer.parameters["w"] * float("nan")).sum().backward()
    with pytest.raises(InputError, match="step 2 of the training"):
        trainer.update()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.parameters.items())
