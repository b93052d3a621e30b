"""Embedding and output head in low bits: rows are decoded as they are looked up; a tied head uses the same codes.

Policy ``embeddings`` (stage of that name). The codes are those of the codec ``int_group``, rounded to nearest, so they
follow from the checkpoint alone and need no data. Rows are padded to a multiple of 16, so that the CPU
kernels take any vocabulary.

Legend: V vocabulary, V' V rounded up to 16, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels.reference.group_gemm import LANES, decode
from torch import Tensor, nn

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import InputError
from llmcompress.nn.packed import PackedTensors, replace_module
from llmcompress.quant.codecs.int_group import encode
from llmcompress.quant.embeddings import matrices, spec_of
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.layout import ModelLayout

# values of an embedding that are rounded together
ROUNDED_AT_ONCE = 1 << 20


def pack_rows(weight: Tensor, spec: QuantSpec, lanes: int = LANES) -> PackedWeight:
    """Round ``[V, D]`` to nearest and pack it as ``[V', D]``; added rows are zeros, with one lane there are none.

    Some rows at a time: in float32, and with what rounding makes of them, the embedding of a small model would be the
    largest thing that a run holds.
    """
    rows, columns = weight.shape
    step = max(1, ROUNDED_AT_ONCE // columns // lanes) * lanes
    codes = torch.empty(rows + -rows % lanes, columns, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, rows, step):
        piece = weight[start : start + step].to(torch.float32)
        piece = torch.nn.functional.pad(piece, (0, 0, 0, -len(piece) % lanes))
        scale, zero = find_grid(piece, spec, "minmax")
        codes[start : start + len(piece)] = round_codes(piece, scale, zero, spec)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return encode(codes, torch.cat(scales), torch.cat(zeros) if zeros else None, spec)


class PackedRows(PackedTensors):
    """``[V', D]`` in low bits, of which the first V rows are used.

    Args:
        rows: V.
        columns: D.
        spec: How it is quantized.
        dtype: Type of what is looked up.
        device: Where to allocate.
    """

    def __init__(
        self, rows: int, columns: int, spec: QuantSpec, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__((rows + -rows % LANES, columns), spec, device)
        self.rows, self.columns, self.dtype = rows, columns, dtype

    @property
    def weight(self) -> Tensor:
        """Nothing but a type: modelling code casts hidden states to that of the head's weight."""
        return torch.empty(0, dtype=self.dtype, device=self.weight_packed.device)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows ``[..., D]`` of ``ids [...]``."""
        flat = ids.reshape(-1)
        parts = (self.weight_packed, self.weight_scale)
        if self.interleaved:
            block, lane = flat // LANES, flat % LANES
            packed, scale = (part[block, :, lane] for part in parts)
        else:
            packed, scale = (part[flat] for part in parts)
        rows = decode(packed, scale, None, self.spec.bits, self.columns_per_group, self.columns)
        return rows.to(self.dtype).view(*ids.shape, self.columns)

    def project(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., V]``: the head."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.prepare()
        shape = (self.spec.bits, self.columns_per_group, self.columns)
        y: Tensor = torch.ops.llmcompress.group_gemm(x, self.weight_packed, self.weight_scale, None, *shape, False)
        return y[..., : self.rows]


class PackedEmbedding(PackedRows):
    """In the place of an ``nn.Embedding``, or of Gemma's, which multiplies what it looks up.

    Args:
        rows, columns, spec, dtype, device: See :class:`PackedRows`.
        factor: Factor of all rows, rounded to ``dtype``.
    """

    def __init__(
        self, rows: int, columns: int, spec: QuantSpec, dtype: torch.dtype, device: torch.device | str | None = None,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(rows, columns, spec, dtype, device)
        # models are put together under a context that makes tensors without storage
        self.factor = float(torch.tensor(factor, dtype=dtype, device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., D]``."""
        return self.look_up(ids) * self.factor


class PackedHead(PackedRows):
    """In the place of an output head of its own."""

    bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., V]``."""
        y = self.project(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TiedHead(nn.Module):
    """In the place of a head that shares the embedding; holds nothing of its own."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # in a tuple, so that it is no submodule and appears once in a state dict
        self._embedding = (embedding,)

    @property
    def weight(self) -> Tensor:
        """See :attr:`PackedRows.weight`."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., V]``."""
        return self._embedding[0].project(x)


def factor_of(embedding: Any) -> float | None:
    """Factor of an embedding of Gemma's kind, None for any other."""
    factor = getattr(embedding, "scalar_embed_scale", None)
    return None if factor is None else float(factor)


def declined(model: PreTrainedModel) -> str | None:
    """Why a model's embedding cannot be packed, None if it can."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding and factor_of(embedding) is None:
        return f"{type(embedding).__name__} does more than look rows up"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    return None


def make_room(model: PreTrainedModel, layout: ModelLayout, policy: Mapping[str, Any]) -> None:
    """Put empty packed modules in the places of embedding and head, before weights are read.

    Raises:
        InputError: The policy or the model's modules are not understood.
    """
    spec, reason = spec_of(policy), declined(model)
    if reason is not None:
        raise InputError(f"quantization_config.policies.embeddings: {reason}", "export without the embeddings stage")
    names, dtype = matrices(layout), model.dtype
    old: Any = model.get_input_embeddings()
    factor = factor_of(old)
    embedding = PackedEmbedding(
        layout.vocab, layout.hidden, spec, dtype, old.weight.device, 1.0 if factor is None else factor
    )
    replace_module(model, names[0], embedding)
    if len(names) == 1:
        model.set_output_embeddings(TiedHead(embedding))
        # nothing is left to be tied
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
        return
    plain: Any = model.get_output_embeddings()
    head = PackedHead(layout.vocab, layout.hidden, spec, dtype, plain.weight.device)
    if plain.bias is not None:
        head.register_parameter("bias", plain.bias)
    replace_module(model, names[1], head)


def packed_tensors(
    name: str, tensor: Tensor, layout: ModelLayout, policy: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """What an outside tensor becomes in the artifact: codes and scales of embedding and head, others as they are."""
    module = name.removesuffix(".weight")
    if module == name or module not in matrices(layout):
        yield name, tensor
        return
    packed = pack_rows(tensor, spec_of(policy))
    for key, value in sorted(packed.tensors.items()):
        yield f"{module}.{key}", value
