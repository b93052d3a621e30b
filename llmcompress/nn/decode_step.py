"""A decode step or a prompt of a Mamba-2 mixer in three calls: in_proj, everything between, out_proj.

For mixers whose forward is that of Mamba-2 without additions (no multipliers, gate before the norm) and a packed state:
on a CPU with fp32 activations, on a GPU with 16 bits too, and a prompt there where Triton takes its sizes. All others
go through transformers' own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels import gpu
from llmcompress_kernels import state as kernels
from torch import Tensor, nn

from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.states import PackedState, StateQuantizer

if TYPE_CHECKING:
    from llmcompress.models.layout import ScanView

PLAIN = frozenset({"Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer"})
CONV_WIDTH = 4
# what activations may be on a device; the C++ kernels know fp32 only
TOKEN_TYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


class DecodeStep:
    """Step and prompt of one mixer.

    Args:
        mixer: Mixer of transformers.
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
        """Whether this pass is one token from a stored state that the operator knows.

        Args:
            hidden: ``[S, L, D]``.
            cache: The cache of the pass.
            held: The stored state, packed or the same values in float; None at the start of a sequence.
            rest: Everything else that the mixer was called with: a mask must be None.
        """
        if held is None or hidden.shape[1] != 1:
            return False
        return self._runs(hidden, cache, held.quantizer, rest)

    def fits_prompt(self, hidden: Tensor, cache: Any, quantizer: StateQuantizer, rest: tuple[Any, ...]) -> bool:
        """Whether this pass is a prompt, or more of one, whose last state is stored in a cache; as :meth:`fits`."""
        return (
            cache is not None
            and hidden.shape[1] > 1
            and self._runs(hidden, cache, quantizer, rest)
            and self._scans(hidden, quantizer.scan)
        )

    def _scans(self, hidden: Tensor, view: ScanView) -> bool:
        """Whether a kernel scans the prompt: a GPU's definition would take it token by token."""
        if hidden.device.type == "cpu":
            return True
        return gpu.prompt_declined(view.heads, view.channels, view.states, self.mixer.n_groups, hidden.dtype) is None

    def _runs(self, hidden: Tensor, cache: Any, quantizer: StateQuantizer, rest: tuple[Any, ...]) -> bool:
        mixer = self.mixer
        return bool(
            self.plain
            and hidden.dtype in TOKEN_TYPES.get(hidden.device.type, ())
            and quantizer.has_kernel
            and quantizer.one_width
            and all(value is None for value in rest)
            and mixer.A_log.dtype in TOKEN_TYPES[hidden.device.type]
            and not torch.is_grad_enabled()
            and not cache.is_recording_past(mixer.layer_idx)
        )

    def prompt(self, hidden: Tensor, cache: Any, held: PackedState | None, view: ScanView) -> Tensor:
        """The mixer's output ``[S, T, D]`` over a prompt scanned in float; convolution and packed states are replaced.

        Args:
            hidden: ``[S, T, D]``.
            cache: The cache of the pass.
            held: The packed state that the prompt goes on from, None at the start of a sequence.
            view: Sizes of the state.
        """
        mixer, index = self.mixer, self.mixer.layer_idx
        rates = self._rates()
        projected, dt = self._project(hidden, view)
        history = None if held is None else cache.layers[index].conv_states[0].clone()
        inner = view.heads * view.channels
        mixed = projected[..., inner : inner + view.conv_channels].transpose(1, 2)
        cache.update_conv_state(mixed, index, conv_kernel_size=mixer.conv_kernel_size)
        shape = (hidden.shape[0], view.heads, view.channels, view.states)
        state = (
            hidden.new_zeros(shape, dtype=torch.float32) if held is None else held.load(rates[:, None, None]).clone()
        )
        out = kernels.mamba2_prefill(
            projected,
            dt,
            history,
            mixer.conv1d.weight[:, 0],
            mixer.conv1d.bias,
            mixer.dt_bias,
            rates,
            mixer.D,
            mixer.norm.weight,
            state,
            mixer.n_groups,
            tuple(mixer.time_step_limit),
            mixer.norm.variance_epsilon,
        )
        cache.update_recurrent_state(state, layer_idx=index)
        result: Tensor = mixer.out_proj(out)
        return result

    def __call__(self, hidden: Tensor, cache: Any, held: PackedState) -> Tensor:
        """The mixer's output ``[S, 1, D]``; convolution and stored states are replaced."""
        mixer, quantizer = self.mixer, held.quantizer
        projected = mixer.in_proj(hidden[:, 0])
        conv = cache.layers[mixer.layer_idx].conv_states[0]
        # states in float take the same steps as packed ones: another order of sums would soon be another text
        codes, floats = (held.codes[0], None) if held.packed else (None, held.load().clone())
        out = kernels.mamba2_decode(
            projected,
            conv,
            mixer.conv1d.weight[:, 0],
            mixer.conv1d.bias,
            mixer.dt_bias,
            self._rates(),
            mixer.D,
            mixer.norm.weight,
            codes,
            held.channel,
            held.state,
            quantizer.static,
            floats,
            mixer.n_groups,
            quantizer.scan.states,
            quantizer.spec.bits,
            mixer.norm.variance_epsilon,
            quantizer.spec.refit,
            quantizer.spec.dither,
            held.recent,
            None if held.recent is None else held.count,
        )
        if floats is None:
            held.tokens += 1
        else:
            held.take(floats)
        result: Tensor = mixer.out_proj(out)
        return result.unsqueeze(1)

    def _project(self, hidden: Tensor, view: ScanView) -> tuple[Tensor, Tensor]:
        """The output of in_proj without and with only the time steps; dense rows of a packed one are those already."""
        linear = self.mixer.in_proj
        if isinstance(linear, PackedLinear) and linear.spec.dense_rows == view.heads and not linear._forward_pre_hooks:
            packed, dense = linear.parts(hidden)
            assert dense is not None
            if linear.bias is None:
                return packed, dense
            return packed + linear.bias[: -view.heads], dense + linear.bias[-view.heads :]
        projected: Tensor = linear(hidden)
        return projected[..., : -view.heads], projected[..., -view.heads :]

    def _rates(self) -> Tensor:
        """``-exp(A_log)``, computed again when the parameter changed."""
        parameter: Tensor = self.mixer.A_log
        seen = (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        if self._decay is None or seen != self._seen:
            self._decay, self._seen = -parameter.detach().float().exp(), seen
        return self._decay
