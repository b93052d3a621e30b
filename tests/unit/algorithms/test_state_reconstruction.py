"""What the reconstruction minimises, and when it stops; its engines are in ``tests/paper``."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.state_reconstruction import Group, Objective, Schedule, reconstruct, split


def test_objective_by_hand() -> None:
    """Two sequences of three tokens, of which the first counts a quarter."""
    target = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [[0.0, 2.0], [0.0, 1.0], [1.0, 0.0]]])
    output = target + torch.tensor([[1.0], [0.0], [2.0]])
    scanned = torch.tensor([[[[2.0]], [[1.0]], [[1.0]]], [[[4.0]], [[1.0]], [[2.0]]]])
    moved = scanned + torch.tensor([4.0, 0.0, 1.0])[None, :, None, None]
    # errors 2, 0, 8 of each sequence over energies 1, 4, 4 and 4, 1, 1; then 16, 0, 1 over 4, 1, 1 and 16, 1, 4
    block = 2 * (0.25 * 2 + 0 + 8) / (0.25 * 1 + 4 + 4 + 0.25 * 4 + 1 + 1)
    states = 2 * (0.25 * 16 + 0 + 1) / (0.25 * 4 + 1 + 1 + 0.25 * 16 + 1 + 4)
    found = Objective(state_weight=0.1, warmup=1, early=0.25).loss(output, target, moved, scanned)
    assert float(found) == pytest.approx(block + 0.1 * states)
    alone = Objective(state_weight=0.0, warmup=1, early=0.25).loss(output, target, moved, scanned)
    assert float(alone) == pytest.approx(block)


@pytest.mark.parametrize(
    ("sequences", "share", "held"), [(8, 0.25, [3, 7]), (4, 0.125, [3]), (2, 0.5, [1]), (1, 0.125, [0])]
)
def test_some_sequences_are_held_out_and_some_are_not(sequences: int, share: float, held: list[int]) -> None:
    train, found = split(sequences, share)
    assert found == held
    assert train == ([i for i in range(sequences) if i not in held] or held)


def test_values_stay_within_their_bounds_whatever_their_sign() -> None:
    start = torch.tensor([-5.0, 5.0, 0.1, -0.1])
    value = start.clone()
    reconstruct(
        {"value": value}, [Group(10.0, ("value",), bound=0.1)], lambda _: (value - 100.0).square().sum(), 4,
        Schedule(epochs=1, batch=4),
    )  # fmt: skip
    # a tenth of the value, of 1 where it is smaller
    torch.testing.assert_close(value, start + torch.tensor([0.5, 0.5, 0.1, 0.1]))


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_when_the_held_out_loss_has_not_fallen_for_a_while(patience: int) -> None:
    value = torch.tensor([1.0])

    def loss(rows: list[int]) -> torch.Tensor:
        # what training lowers is what judgement raises
        return (value if torch.is_grad_enabled() else -value).sum()

    found = reconstruct({"value": value}, [Group(0.1, ("value",))], loss, 8, Schedule(epochs=9, patience=patience))
    assert not found.kept
    assert len(found.losses) == len(found.training) == patience
    assert float(value) == 1.0
