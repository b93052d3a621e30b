"""What a quantized state costs, head by head, measured on real inputs.

The error of a state is read by all later tokens, so it is measured where it is read: on the scan's outputs, with the
recurrence run token by token in float and with each width. Spending an average width by these errors
(``algorithms/bit_allocation.py``) is this project's; STEPQuant (arXiv 2609.38169) weighs one-shot errors by lifetime.

Legend: S sequences, T tokens, H heads, P channels, N states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.algorithms.decoupled_scales import fake_quantize, static_channel_scale, static_state_scale
from llmcompress.algorithms.gated_delta import DeltaInputs
from llmcompress.algorithms.selective_scan import ScanInputs, half_life
from llmcompress.quant.states import StateSpec

Inputs = ScanInputs | DeltaInputs


@dataclass
class HeadStatistics:
    """Sums over everything a layer was shown.

    Attributes:
        heads: H.
        tokens: Positions seen.
        log_decay: fp64 ``[H]`` sum of ``dt A`` over positions (mean over channels and states where they differ).
        energy: fp64 ``[H]`` sum of squared float outputs.
        errors: Label → fp64 ``[H]`` sum of squared output errors.
        mean_abs: fp32 ``[H, P]`` sum of ``|u|`` over tokens, mean over states.
        log_max: fp32 ``[H, P, N]`` logarithm of the largest ``|u|``.
    """

    heads: int
    tokens: int = 0
    log_decay: Tensor = field(init=False)
    energy: Tensor = field(init=False)
    errors: dict[str, Tensor] = field(default_factory=dict)
    mean_abs: Tensor | None = None
    log_max: Tensor | None = None

    def __post_init__(self) -> None:
        """Start from zero."""
        self.log_decay = torch.zeros(self.heads, dtype=torch.float64)
        self.energy = torch.zeros(self.heads, dtype=torch.float64)

    def add_float(self, inputs: Inputs) -> Tensor:
        """Run the float recurrence, add to everything but the errors; returns its outputs ``[S, T, H, P]``."""
        sequences, tokens = inputs.tokens
        mean_abs: Tensor | None = None
        largest: Tensor | None = None

        def watch(fresh: Tensor, t: int) -> Tensor:
            nonlocal mean_abs, largest
            size = fresh.abs()
            if mean_abs is None:
                # in one piece: small rows kept between states that come and go would leave holes in the heap
                mean_abs = size.new_empty(tokens, *size.shape[1:3])
            mean_abs[t] = size.mean((0, -1))
            top = size.amax(0)
            largest = top if largest is None else torch.maximum(largest, top)
            return fresh

        outputs, _ = inputs.run(None, watch)
        assert mean_abs is not None and largest is not None
        self.log_decay += inputs.log_decay.sum((0, 1)).cpu()
        self.energy += outputs.double().square().sum((0, 1, 3)).cpu()
        self.tokens += sequences * tokens
        summed = mean_abs.sum(0) * sequences
        self.mean_abs = summed if self.mean_abs is None else self.mean_abs + summed
        log_max = largest.clamp(min=torch.finfo(torch.float32).tiny).log()
        self.log_max = log_max if self.log_max is None else torch.maximum(self.log_max, log_max)
        return outputs

    def add_error(
        self, label: str, inputs: Inputs, exact: Tensor, spec: StateSpec, static: Tensor | None, window: int = 1
    ) -> None:
        """Run the recurrence with a state that is rounded every ``window`` tokens, add its error under ``label``."""
        outputs = _quantized_outputs(inputs, spec, static, window)
        error = (outputs - exact).double().square().sum((0, 1, 3)).cpu()
        self.errors[label] = self.errors.get(label, torch.zeros_like(error)) + error

    def static(self, spec: StateSpec) -> Tensor | None:
        """The calibrated scale that the codec needs, fp16 ``[H, P]`` or ``[H, N]``."""
        if spec.codec == "dsq_static_p":
            assert self.mean_abs is not None
            return static_channel_scale(self.mean_abs / max(1, self.tokens), spec.alpha)
        if spec.codec == "dsq_t":
            assert self.log_max is not None
            return static_state_scale(self.log_max)
        return None

    def half_lives(self) -> list[float]:
        """Tokens after which each head has forgotten half; a state that never forgets gives infinity."""
        return [float(v) for v in half_life(self.log_decay / max(1, self.tokens))]

    def relative_errors(self) -> dict[str, list[float]]:
        """Label → relative output error per head, ``||ŷ - y|| / ||y||``."""
        energy = self.energy.clamp(min=torch.finfo(torch.float64).tiny)
        return {label: (error / energy).sqrt().tolist() for label, error in self.errors.items()}


def _quantized_outputs(inputs: Inputs, spec: StateSpec, static: Tensor | None, window: int) -> Tensor:
    """``[S, T, H, P]``, the state rounded every ``window`` tokens, by the operator where it knows codec and kind."""
    if not isinstance(inputs, ScanInputs) or not spec.has_kernel or inputs.a.shape[1:] != (1, 1):
        return inputs.run(None, lambda fresh, t: fresh if t % window else fake_quantize(fresh, spec, static))[0]
    from llmcompress_kernels.state import selective_scan_q

    sequences, _, heads, channels = inputs.x.shape
    start = inputs.x.new_zeros(sequences, heads, channels, inputs.b.shape[-1])
    bits = torch.full((heads,), spec.bits, dtype=torch.int32, device=start.device)
    decay = (inputs.dt[..., 0] * inputs.a[:, 0, 0]).exp()
    given = (inputs.dt * inputs.x, decay, inputs.b, inputs.c, start, bits, static)
    return selective_scan_q(*given, window=window, refit=spec.refit, dither=spec.dither)[0]


def shares(errors: Mapping[str, Tensor], energy: Tensor, labels: list[str]) -> list[list[float]]:
    """Errors for the allocation: per head and width, as a share of the layer's output energy."""
    total = float(energy.sum()) or 1.0
    return [[float(errors[label][head]) / total for label in labels] for head in range(len(energy))]
