"""One decode step of a Mamba-2 mixer in three calls: in_proj, everything between, out_proj.

For mixers whose forward is that of Mamba-2 without additions (no multipliers, gate before the norm), with fp32
activations and a packed state. All others decode through transformers' own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from llmcompress_kernels import state as kernels
from torch import Tensor, nn

from llmcompress.nn.states import PackedState

PLAIN = frozenset({"Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer"})
CONV_WIDTH = 4


class DecodeStep:
    """The step of one mixer.

    Args:
        mixer: Of transformers.
    """

    def __init__(self, mixer: nn.Module) -> None:
        self.mixer: Any = mixer
        self.plain = (
            type(mixer).__name__ in PLAIN
            and self.mixer.activation in ("silu", "swish")
            and self.mixer.conv_kernel_size == CONV_WIDTH
        )
        self._decay: Tensor | None = None
        self._seen: tuple[int, int] | None = None

    def fits(self, hidden: Tensor, cache: Any, held: PackedState | None, rest: tuple[Any, ...]) -> bool:
        """Whether this pass is one token from a packed state that the operator knows.

        Args:
            hidden: ``[S, L, D]``.
            cache: The cache of the pass.
            held: The packed state, None at the start of a sequence.
            rest: Everything else that the mixer was called with: a mask must be None.
        """
        if not self.plain or held is None or hidden.shape[1] != 1 or hidden.dtype != torch.float32:
            return False
        mixer, quantizer = self.mixer, held.quantizer
        one_width = quantizer.head_bits is None and quantizer.spec.bits in (4, 8)
        return (
            held.packed
            and quantizer.has_kernel
            and one_width
            and quantizer.window == 1
            and hidden.device.type == "cpu"
            and all(value is None for value in rest)
            and mixer.A_log.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not cache.is_recording_past(mixer.layer_idx)
        )

    def __call__(self, hidden: Tensor, cache: Any, held: PackedState) -> Tensor:
        """The mixer's output ``[S, 1, D]``; convolution and packed states are replaced."""
        mixer, quantizer = self.mixer, held.quantizer
        projected = mixer.in_proj(hidden[:, 0])
        conv = cache.layers[mixer.layer_idx].conv_states[0]
        held.tokens += 1
        out = kernels.mamba2_decode(
            projected,
            conv,
            mixer.conv1d.weight[:, 0],
            mixer.conv1d.bias,
            mixer.dt_bias,
            self._rates(),
            mixer.D,
            mixer.norm.weight,
            held.codes[0],
            held.channel,
            held.state,
            quantizer.static,
            None,
            mixer.n_groups,
            quantizer.scan.states,
            quantizer.spec.bits,
            mixer.norm.variance_epsilon,
        )
        result: Tensor = mixer.out_proj(out)
        return result.unsqueeze(1)

    def _rates(self) -> Tensor:
        """``-exp(A_log)``, computed again when the parameter changed."""
        parameter: Tensor = self.mixer.A_log
        seen = (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        if self._decay is None or seen != self._seen:
            self._decay, self._seen = -parameter.detach().float().exp(), seen
        return self._decay
