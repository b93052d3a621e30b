"""Embedding and output head in low bits: how a saved policy is read, and how many bytes it makes. Torch-free; the
modules are in ``nn/embedding.py``.

Legend: V vocabulary, V' V rounded up to 16, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout

EMBEDDINGS = "embeddings"
"""Name of the policy."""
ROWS = 16
"""Rows are padded to a multiple of what the CPU kernels take together."""


def spec_of(policy: Mapping[str, Any]) -> QuantSpec:
    """The spec of a saved policy.

    Raises:
        InputError: It holds words or values that this version does not know.
    """
    bits, size = policy.get("bits"), policy.get("group_size")
    if (
        set(policy) != {"bits", "group_size"}
        or bits not in (4, 8)
        or not isinstance(size, int)
        or not (size == -1 or size > 0)
    ):
        raise InputError(
            "quantization_config.policies.embeddings: not understood", "upgrade llmcompress, or export the model again"
        )
    return QuantSpec(bits, size, symmetric=True)


def matrices(layout: ModelLayout) -> list[str]:
    """Run-time module names of the embedding and, where it is not tied, of the head."""
    shape = (layout.vocab, layout.hidden)
    return [view.name.removesuffix(".weight") for view in layout.outside if tuple(view.shape) == shape]


def parameters(layout: ModelLayout) -> int:
    """Weights of embedding and untied head."""
    return len(matrices(layout)) * layout.vocab * layout.hidden


def packed_bytes(layout: ModelLayout, policy: Mapping[str, Any]) -> int:
    """Bytes of packed embedding and head, ``[V', D]`` each, without tensors."""
    spec = spec_of(policy)
    shape = (layout.vocab + -layout.vocab % ROWS, layout.hidden)
    return len(matrices(layout)) * int(codec(spec.codec).nbytes(shape, spec))
