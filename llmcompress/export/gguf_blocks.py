"""Our group-wise codes as GGML blocks of 32, without re-quantizing.

Legend: N rows, K columns (a multiple of 32), B = K/32 blocks per row. A group's scale is repeated
for each of its blocks. ``Q4_0`` (``d·(q−8)``) and ``Q8_0`` (``d·q``) hold symmetric weights
exactly. ``Q4_1`` (``d·q + m``) stores ``m = −scale·zero`` in fp16: exact where that product fits
into eleven significant bits, otherwise off by at most half a unit in the last place of ``m``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.quant.packed import PackedWeight
    from llmcompress.quant.spec import QuantSpec

BLOCK = 32
TYPE_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def block_type(spec: QuantSpec) -> str | None:
    """GGML type that represents ``spec``, None when there is none."""
    if spec.codec != "int_group":
        return None
    if spec.bits == 4:
        return "Q4_0" if spec.symmetric else "Q4_1"
    return "Q8_0" if spec.bits == 8 and spec.symmetric else None


def fits_blocks(spec: QuantSpec, in_features: int) -> bool:
    """Whether groups consist of whole blocks of 32 columns."""
    return in_features % BLOCK == 0 and spec.group(in_features) % BLOCK == 0


def to_blocks(packed: PackedWeight) -> Any:
    """Rewrite codes and scales as GGML blocks.

    Args:
        packed: ``[N, K]`` or ``[E, N, K]``, of a spec that :func:`block_type` and :func:`fits_blocks` accept.

    Returns:
        numpy uint8 ``[..., N, B * bytes per block]``.

    Raises:
        ExportError: ``scale * zero`` does not fit into fp16.
    """
    import numpy as np
    import torch

    from llmcompress.quant.codecs.int_group import unpack_parts

    kind = block_type(packed.spec)
    columns = packed.shape[-1]
    if kind is None or not fits_blocks(packed.spec, columns):
        raise ExportError(f"{packed.spec} with {columns} columns has no exact GGML type")
    codes, scale, zero = unpack_parts(packed)
    blocks = columns // BLOCK
    per_block = _per_block(packed.spec, columns)
    codes = codes.unflatten(-1, (blocks, BLOCK)).contiguous()
    parts = [_bytes(scale.to(torch.float16)[..., per_block])]
    if zero is not None:
        offset = -(scale.float() * zero.float()).to(torch.float16)
        if not bool(torch.isfinite(offset).all()):
            raise ExportError("a zero point times its scale exceeds fp16, which Q4_1 cannot hold")
        parts.append(_bytes(offset[..., per_block]))
    if kind == "Q8_0":
        parts.append((codes.to(torch.int16) - packed.spec.midpoint).to(torch.int8).numpy().view(np.uint8))
    else:
        # the first half of a block lies in the low nibbles, the second in the high ones
        low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        parts.append((low | (high << 4)).numpy())
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def blocks_value(packed: PackedWeight) -> Tensor:
    """The weight as the blocks hold it, in fp32: equal to its decoded form, for ``Q4_1`` up to fp16 of ``m``."""
    import torch

    from llmcompress.quant.codecs.int_group import decode, unpack_parts

    if packed.spec.symmetric:
        return decode(packed, torch.float32)
    codes, scale, zero = unpack_parts(packed)
    assert zero is not None
    offset = -(scale.float() * zero.float()).to(torch.float16).float()
    per_column = torch.arange(packed.shape[-1]) // packed.spec.group(packed.shape[-1])
    return codes.float() * scale.float()[..., per_column] + offset[..., per_column]


def _per_block(spec: QuantSpec, columns: int) -> Tensor:
    import torch

    return torch.arange(columns // BLOCK) * BLOCK // spec.group(columns)


def _bytes(values: Tensor) -> Any:
    """fp16 ``[..., B]`` → uint8 ``[..., B, 2]``."""
    import numpy as np

    return values.contiguous().numpy().view(np.uint8).reshape(*values.shape, 2)
