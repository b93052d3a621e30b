"""Between a family's way of storing experts and the canonical ``[E, 2I, H]``, ``[E, H, I]``."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.models.layout import ExpertBank


def canonical(bank: ExpertBank, name: str, tensor: Tensor) -> Tensor:
    """Bring an expert tensor into ``[E, N, K]`` with gate rows before up rows.

    Args:
        bank: Says how the family stores it.
        name: Plan name of the tensor.
        tensor: In the family's orientation.
    """
    if bank.transposed:
        tensor = tensor.transpose(1, 2)
    if bank.interleaved and name == bank.gate_up:
        tensor = torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)
    return tensor.contiguous()


def family_orientation(bank: ExpertBank, name: str, tensor: Tensor) -> Tensor:
    """Inverse of :func:`canonical`."""
    if bank.interleaved and name == bank.gate_up:
        gate, up = tensor.chunk(2, dim=1)
        tensor = torch.stack((gate, up), dim=2).flatten(1, 2)
    if bank.transposed:
        tensor = tensor.transpose(1, 2)
    return tensor.contiguous()
