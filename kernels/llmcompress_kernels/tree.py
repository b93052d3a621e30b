"""Weights of a residual tree in the order of the CPU kernels, and ``delta_decode`` on them.

``csrc/cpu/include/llmcompress/tree.h`` describes the order. Stored codes of 1, 2 and 4 bits become one plane each; 3, 5
and 6 bits become two (2 + 1, 4 + 1, 4 + 2), which is exact because a half-integer grid splits like its codes:
``q - (2^b - 1)/2 = (l - (2^k - 1)/2) + 2^k (h - (2^(b-k) - 1)/2)``. The planes hold the same bits in all, in another
order, so they replace the stored form in memory and are never saved.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu, select
from llmcompress_kernels.reference.group_gemm import LANES

FAMILY = "tree"
UNIT = 32
# stored width → widths of its planes, low bits first
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
for _isa in cpu.float_isas():
    build.register(
        build.Family(
            cpu.variant(FAMILY, _isa),
            ("cpu/tree/product.cpp", f"cpu/tree/tree_{_isa}.cpp"),
            headers=("cpu/include/**/*", "cpu/tree/*.inc"),
            isa=_isa,
        )
    )


class Node(ctypes.Structure):
    """``TreeNode`` of tree.h."""

    _fields_ = (
        ("words", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("members", ctypes.c_uint64),
        ("multiplier", ctypes.c_float), ("bits", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plane:
    """One node, or some bits of one, ready for the kernels.

    Attributes:
        words: int32 ``[N / 16, units * bits, 16]``.
        scale: fp16 ``[N / 16, G, 16]``; planes of one node share it.
        multiplier: Multiplier of the scales.
        bits: 1, 2 or 4.
        node: Which node of the weight it belongs to.
    """

    words: Tensor
    scale: Tensor
    multiplier: float
    bits: int
    node: int

    def struct(self, members: int = 0) -> Node:
        """For C++; the tensors must stay alive. ``members`` has a bit for each model below the node."""
        return Node(self.words.data_ptr(), self.scale.data_ptr(), members, self.multiplier, self.bits)


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None; starts no build."""
    return cpu.unavailable(FAMILY)


select.register(select.Implementation("delta_decode", "cpu", ("cpu",), unavailable))


def ready() -> bool:
    """Whether the kernels run here; builds them at the first call."""
    if select.requested() not in ("auto", "cpu") or unavailable() is not None:
        return False
    try:
        _library()
    except build.BuildError:
        return False
    return True


# the instruction set in use, None before it is known
_in_use: str | None = None


def _library() -> ctypes.CDLL:
    global _in_use  # noqa: PLW0603 - one choice per process
    _in_use = _in_use or cpu.wanted()
    library = build.load(cpu.variant(FAMILY, _in_use))
    if not hasattr(library, "llmcompress_checked"):
        assert library.llmcompress_tree_node_size() == ctypes.sizeof(Node)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.llmcompress_tree_product.argtypes = (
            pointer, number, pointer, number, number, number, pointer, number, ctypes.c_int32, ctypes.c_int32, pointer,
        )  # fmt: skip
        library.llmcompress_tree_plane.argtypes = (
            pointer, number, number, number, *(ctypes.c_int32,) * 4, pointer,
        )  # fmt: skip
        library.llmcompress_checked = True  # type: ignore[attr-defined]
    return library


def set_isa(name: str | None) -> bool:
    """Switch the instruction set, one of :data:`cpu.ISAS`, None for the best; False where the CPU cannot run it."""
    global _in_use  # noqa: PLW0603 - one choice per process
    if name is not None and not cpu.runs(name):
        return False
    _in_use = name or cpu.fastest()
    return True


def planes(
    packed: Sequence[Tensor], scale: Sequence[Tensor], bits: Sequence[int], multiplier: Sequence[float],
    group_size: int, columns: int,
) -> list[Plane]:  # fmt: skip
    """Bring the nodes of one weight into the kernels' order.

    Args:
        packed: Per node ``[N, words(K, b)]`` int32, LSB-first.
        scale: Per node ``[N, G]`` fp16.
        bits: Per node, 1 to 6.
        multiplier: Per node.
        group_size: Columns per scale.
        columns: K.

    Returns:
        One or two planes for each node, in order.
    """
    found = []
    for index, (words, steps, width, factor) in enumerate(zip(packed, scale, bits, multiplier)):
        sides = _interleaved(steps.view(torch.int16)).view(torch.float16)
        shift = 0
        for part in PLANES[width]:
            placed = _plane(words.contiguous(), columns, min(group_size, columns), width, shift, part)
            found.append(Plane(placed, sides, factor * 2.0**shift, part, index))
            shift += part
    return found


def _plane(stream: Tensor, columns: int, group: int, bits: int, shift: int, part: int) -> Tensor:
    """Some bits of all codes of a canonical stream ``[N, words(K, bits)]`` as words of tree.h."""
    rows = stream.shape[0]
    units = sum(-(-min(group, columns - first) // UNIT) for first in range(0, columns, group))
    out = torch.empty((-(-rows // LANES), units * part, LANES), dtype=torch.int32)
    _library().llmcompress_tree_plane(
        stream.data_ptr(), rows, columns, group, bits, shift, part, torch.get_num_threads(), out.data_ptr()
    )
    return out


def codes_of(parts: Sequence[Plane], rows: int, group_size: int, columns: int) -> Tensor:
    """Codes ``[N, K]`` uint8 of the planes of one node, low bits first; inverse of :func:`planes`."""
    total = torch.zeros((rows, columns), dtype=torch.uint8)
    shift = 0
    for part in parts:
        words = part.words.transpose(1, 2).flatten(0, 1)[:rows].to(torch.int64) & 0xFFFFFFFF
        shifts = 8 * torch.arange(4) + part.bits * torch.arange(8 // part.bits).unsqueeze(1)
        padded = ((words[..., None, None] >> shifts) & ((1 << part.bits) - 1)).flatten(1)
        groups = padded.split(-(-min(group_size, columns) // UNIT) * UNIT, dim=1)
        widths = [min(group_size, columns - first) for first in range(0, columns, group_size)]
        total |= torch.cat([g[:, :width] for g, width in zip(groups, widths)], 1).to(torch.uint8) << shift
        shift += part.bits
    return total


def _interleaved(rows: Tensor) -> Tensor:
    """``[N, W]`` → ``[N / 16, W, 16]``, rows filled up with zeros."""
    full = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % LANES))
    return full.view(-1, LANES, full.shape[1]).transpose(1, 2).contiguous()


def _require_fit(parts: Sequence[Plane], spans: Sequence[tuple[int, int]], rows: int, group: int, columns: int) -> None:
    if len(spans) != len(parts) or columns < 1:
        raise ValueError(f"delta_decode: {len(spans)} spans for {len(parts)} planes of {columns} columns")
    lanes, groups = -(-rows // LANES) * LANES, -(-columns // group)
    units = (groups - 1) * -(-group // UNIT) + -(-(columns - (groups - 1) * group) // UNIT)
    for part in parts:
        # counted, since both are contiguous, as planes() makes them: at every product of a token
        if part.words.numel() != lanes * units * part.bits or part.scale.numel() != lanes * groups:
            raise ValueError(
                f"delta_decode: a plane of node {part.node} has words {list(part.words.shape)} and scales "
                f"{list(part.scale.shape)}, which are not those of {rows} x {columns} in groups of {group}"
            )


def product(
    x: Tensor, parts: Sequence[Plane], spans: Sequence[tuple[int, int]], rows: int, group_size: int,
    threads: int | None = None,
) -> Tensor:  # fmt: skip
    """``delta_decode`` on prepared weights.

    Args:
        x: ``[T, K]``, fp32, bf16 or fp16, on the CPU.
        parts: From :func:`planes`; some may be left out.
        spans: Rows ``low <= t < high`` of each of ``parts``.
        rows: N.
        group_size: Columns per scale.
        threads: torch's by default.

    Returns:
        ``[T, N]`` in the type of ``x``. fp32 inputs are rounded to 21 bits below the largest of their chunk, others
        to 14, sums are exact within a chunk.

    Raises:
        ValueError: The weights are not of ``rows`` times the columns of ``x``, or there are not as many ``spans``.
    """
    tokens, columns = x.shape
    _require_fit(parts, spans, rows, min(group_size, columns), columns)
    out = torch.empty((tokens, -(-rows // LANES) * LANES), dtype=torch.float32)
    wide = x.to(torch.float32).contiguous()
    nodes = (Node * len(parts))(*(part.struct() for part in parts))
    ranges = (ctypes.c_int64 * (2 * len(parts)))(*(bound for span in spans for bound in span))
    _library().llmcompress_tree_product(
        ctypes.addressof(nodes), len(parts), ctypes.addressof(ranges), rows, columns, min(group_size, columns),
        wide.data_ptr(), tokens, 3 if x.dtype == torch.float32 else 2, threads or torch.get_num_threads(),
        out.data_ptr(),
    )  # fmt: skip
    return out[:, :rows].to(x.dtype)
