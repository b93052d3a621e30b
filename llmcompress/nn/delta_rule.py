"""Quantized states in transformers' mixers with the gated delta rule: what takes the place of their two functions.

A mixer calls one function over a sequence and one for a token, with the state ``[S, H, K, V]`` of its cache; ours is
kept packed and lies across, ``[S, H, V, K]`` (:mod:`llmcompress.nn.states`).

Legend: S sequences, T tokens, H value heads, G key heads, V and K columns of a value and of a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress_kernels.reference.delta import unit
from torch import Tensor

from llmcompress.algorithms.gated_delta import DeltaInputs

if TYPE_CHECKING:
    from llmcompress.nn.mixers import Mixer

FUNCTIONS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
# those of Kimi Delta Attention, whose decays differ along a key
KIMI = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


def gathered(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> DeltaInputs:
    """The rule's inputs from what transformers' functions get, which make queries and keys of length one.

    Args:
        query: ``[S, T, G, K]``.
        key: Likewise.
        value: ``[S, T, H, V]``.
        g: ``[S, T, H]`` or ``[S, T, H, K]``, logarithm of the decay.
        beta: ``[S, T, H]``.
    """
    scaled = unit(query.float()) * query.shape[-1] ** -0.5
    return DeltaInputs(scaled, unit(key.float()), value.float(), g.float().exp(), beta.float())


class DeltaRule:
    """The two functions of one mixer, with states as its quantizer keeps them.

    Args:
        mixer: The mixer that has them.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer

    def over_sequence(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Any = None, **rest: Any
    ) -> tuple[Tensor, Any]:
        """In float as transformers does it, or token by token where states are stored after each."""
        mixer = self.mixer
        state = None if mixer.held is None else mixer.held.load()
        if not mixer.simulates:
            before = None if state is None else state.mT
            found: tuple[Tensor, Any] = mixer.whole(query, key, value, g=g, beta=beta, initial_state=before, **rest)
            return found
        inputs = gathered(query, key, value, g, beta)
        if mixer.runtime.inspect is not None:
            mixer.runtime.inspect(mixer.quantizer.layer, inputs)
        output, state = inputs.run(state, mixer.store)
        return output.to(query.dtype), state.mT

    def one_token(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Any = None, **_: Any
    ) -> tuple[Tensor, Any]:
        """One token from the packed state, which stays the cache's."""
        inputs = gathered(query, key, value, g, beta)
        numbers = (inputs.value, inputs.decay, inputs.step, inputs.key, inputs.query)
        output = initial_state.decode_delta(*(part[:, 0] for part in numbers))
        return output.unsqueeze(1).to(query.dtype), initial_state
