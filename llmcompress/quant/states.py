"""How recurrent states are stored, and how many bytes that takes. Torch-free; the arithmetic is in
``algorithms/decoupled_scales.py``.

Legend: P channels of a head, N states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

CompressedCodec = Literal[
    "dsq",
    "dsq_refit",
    "dsq_static_p",
    "dsq_als",
    "dsq_t",
    "per_head",
    "per_channel",
    "per_state",
    "group32",
    "rotate",
]
Codec = Literal[CompressedCodec, "none"]
CODECS: tuple[str, ...] = get_args(Codec)
BITS = (4, 6, 8)
# widths that the kernels of decoding know, one for all heads
DECODED_BITS = (4, 8)
Rounding = Literal["rtn", "stochastic", "dither"]
# codecs whose state scale is fresh at every token, and stored
DITHERED = ("dsq", "dsq_static_p")
# codecs that llmcompress_kernels.state implements
IN_KERNELS: tuple[str, ...] = ("dsq", "dsq_refit", "dsq_static_p")
GROUP = 32
# buffer of a mixer that holds its calibrated scale
SCALE = "state_scale"


@dataclass(frozen=True, slots=True)
class StateSpec:
    """How states are quantized.

    Attributes:
        bits: 4, 6 or 8; 16 leaves the state in float.
        codec: ``dsq``; ``dsq_refit`` (channel scale fitted to the codes by least squares); ``dsq_static_p`` (channel
            scale calibrated, state scale dynamic); ``dsq_als`` (both scales refitted in turns); ``dsq_t`` (state scale
            calibrated, channel scale dynamic); one scale ``per_head``, ``per_channel``, ``per_state`` or per 32 states
            of a channel (``group32``); ``rotate`` (Hadamard on both axes, one scale per head); ``none``.
        alpha: Exponent of the first scale.
        sqrt_axis: Which axis gets the mean to the power of alpha; the other gets the maximum.
        rounding: ``rtn``, ``stochastic``, or ``dither`` (to nearest after adding what the bits of the state scale
            gives), which needs codec ``dsq`` or ``dsq_static_p``.
        seed: Seed of stochastic rounding.
        refits: Alternating least-squares passes of ``dsq_als``.
    """

    bits: int = 4
    codec: Codec = "dsq"
    alpha: float = 0.5
    sqrt_axis: Literal["channel", "state"] = "channel"
    rounding: Rounding = "rtn"
    seed: int = 0
    refits: int = 3

    def __post_init__(self) -> None:
        """Refuse what no function here can do."""
        assert self.codec in CODECS, self.codec
        assert self.bits in (*BITS, 16), self.bits
        assert self.rounding != "dither" or self.codec in DITHERED, self.codec

    @classmethod
    def of(cls, policy: Mapping[str, Any]) -> Self:
        """The codec part of a saved policy, whose other words are left out."""
        return cls(**{part.name: policy[part.name] for part in fields(cls) if part.name in policy})

    def without_noise(self) -> Self:
        """To nearest instead of stochastically: what is fitted to one draw would be worse with the next."""
        return replace(self, rounding="rtn") if self.rounding == "stochastic" else self

    @property
    def active(self) -> bool:
        """Whether the state is changed at all."""
        return self.codec != "none" and self.bits < 16

    @property
    def has_kernel(self) -> bool:
        """Whether ``llmcompress_kernels.state`` rounds states of Mamba-2 in this way; sizes are another question."""
        plain = self.alpha == 0.5 and self.sqrt_axis == "channel" and self.rounding != "stochastic"
        return self.active and plain and self.codec in IN_KERNELS

    @property
    def refit(self) -> bool:
        """Whether the channel scale is fitted to the codes."""
        return self.codec == "dsq_refit"

    @property
    def dither(self) -> bool:
        """Whether a dither is added before rounding."""
        return self.rounding == "dither"


def packed_length(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes."""
    if bits == 8:
        return count
    return -(-count // 2) if bits == 4 else 3 * -(-count // 4)


def scale_count(spec: StateSpec, channels: int, states: int) -> int:
    """fp16 scales stored per head and sequence."""
    groups = -(-states // GROUP)
    return {
        "dsq": channels + states,
        "dsq_refit": channels + states,
        "dsq_als": channels + states,
        "dsq_static_p": states,
        "dsq_t": channels,
        "per_head": 1,
        "rotate": 1,
        "per_channel": channels,
        "per_state": states,
        "group32": channels * groups,
        "none": 0,
    }[spec.codec]


def state_bytes(spec: StateSpec, channels: int, states: int, bits: int | None = None) -> int:
    """Bytes of one head's packed state ``[P, N]`` and its scales; fp32 when the spec is inactive.

    Args:
        spec: How states are stored.
        channels: P.
        states: N.
        bits: Width of this head instead of ``spec.bits``.
    """
    if not spec.active:
        return 4 * channels * states
    return channels * packed_length(states, bits or spec.bits) + 2 * scale_count(spec, channels, states)


def window_bytes(spec: StateSpec, window: int, row: int) -> int:
    """Bytes that a replay window adds to a sequence of one layer: fp32 rows of the tokens since the last rounding.

    Args:
        spec: How states are quantized; states in float need no window.
        window: R, tokens between two roundings.
        row: Values of a token: ``dt x``, decay or dt, B.

    Returns:
        ``R - 1`` rows and an int32 number of tokens; 0 where every token rounds.
    """
    return (window - 1) * 4 * row + 4 if spec.active and window > 1 else 0
