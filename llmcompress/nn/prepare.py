"""Bring the packed weights of a model into the order that this machine's kernels want, ahead of the first call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from llmcompress.nn.packed import PackedTensors


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` did.

    Attributes:
        weights: Packed weights in the model.
        interleaved: Those that are now in the kernels' order; they take the same memory as before.
        bytes: Bytes of these.
        seconds: What bringing them there took, now or before.
        declined: Reason → number of weights that stay in the stored order.
    """

    weights: int
    interleaved: int
    bytes: int
    seconds: float
    declined: dict[str, int]


def prepare(model: nn.Module) -> Prepared:
    """Interleave every packed weight that native kernels can use here.

    Without it each weight is interleaved at its first call, so that the first token pays for it.

    Args:
        model: A model with packed modules, on any device; what is not on the CPU is left alone.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedTensors)]
    done = [module for module in packed if module.prepare()]
    reasons = Counter(str(module.declined) for module in packed if not module.interleaved)
    size = sum(tensor.nbytes for module in done for tensor in module.buffers())
    return Prepared(len(packed), len(done), size, sum(module.seconds for module in done), dict(reasons))
