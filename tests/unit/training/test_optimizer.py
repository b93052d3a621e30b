import pytest
import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.training.optimizer import Trainer, due


def make(steps=6, **more):
    torch.manual_seed(0)
    parameters = {"w": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(3))}
    return Trainer(parameters, 0.1, 2, steps, **more)


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
