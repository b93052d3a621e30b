"""QuantSpec: how one weight is quantized. The only description of it, in recipes, memory and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SUPPORTED_BITS = (2, 3, 4, 8)
# codec of residuals (quant/codecs/delta_tree.py), whose grid has no code for zero
DELTA_TREE = "delta_tree"
DELTA_BITS = (1, 2, 3, 4, 5, 6)


WORD_BITS = 32


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold ``count`` codes; the layout is that of ``quant/bitpack.py``."""
    return -(-count * bits // WORD_BITS)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Group-wise uniform integer quantization of a weight ``[..., N, K]`` along K.

    Attributes:
        bits: Code width, one of 2, 3, 4, 8; 1 to 6 with the codec ``delta_tree``.
        group_size: Columns that share a scale; ``-1`` means one group per row. The last
            group of a row is shorter when K is not a multiple.
        symmetric: With ``True`` the grid is centred, ``w ≈ scale * (code - 2**(bits-1))``, and
            no zero point is stored. With ``False``, ``w ≈ scale * (code - zero)`` with an
            unsigned zero point of ``bits`` bits per group. The codec ``delta_tree`` is always symmetric, about
            the half-integer ``(2**bits - 1) / 2``.
        codec: Name of the codec in ``quant/codecs`` that stores it.
        dense_rows: Rows at the end of N that are stored in fp16 instead (Mamba-2's time steps).
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    codec: str = "int_group"
    dense_rows: int = 0

    def __post_init__(self) -> None:
        allowed = DELTA_BITS if self.half else SUPPORTED_BITS
        if self.bits not in allowed:
            raise ValueError(f"bits must be one of {allowed}, not {self.bits}")
        if self.half and not self.symmetric:
            raise ValueError("delta_tree has no zero points: symmetric must be true")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive or -1, not {self.group_size}")

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def half(self) -> bool:
        """Whether the grid is centred on a half-integer code."""
        return self.codec == DELTA_TREE

    @property
    def midpoint(self) -> float:
        """The code that stands for zero on a symmetric grid, ``2**(bits-1)``, or half a step less."""
        return (self.levels - 1) / 2 if self.half else 1 << (self.bits - 1)

    def group(self, in_features: int) -> int:
        """Group size in columns for a weight with ``in_features`` columns."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Number of groups per row."""
        return -(-in_features // self.group(in_features))

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON, inverse of :meth:`from_dict`."""
        plain = asdict(self)
        if not self.dense_rows:
            del plain["dense_rows"]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Rebuild from :meth:`to_dict` output."""
        return cls(**data)


# run-time tensor name -> spec; a name that is absent stays dense.
# Linears appear under their module name ("model.layers.0.self_attn.q_proj"), stacked experts
# under module and tensor ("model.layers.0.mlp.experts.gate_up_proj").
QuantPlan = dict[str, QuantSpec]
