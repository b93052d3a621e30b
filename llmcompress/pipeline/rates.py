"""What one process of a machine does per second: the file that ``scripts/measure_cluster_rates.py`` writes. Torch-free.

A file that was measured on the processor it names comes with the package. Rates of matrix work depend on its size: a
product or a factorization of a small matrix is far from what the processor can do. They are measured at several widths
and interpolated; beyond the largest they stay as they are there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError

SHIPPED = Path(__file__).with_name("cluster_rates.json")
Curve = tuple[tuple[float, float], ...]


def rate_at(curve: Curve, width: float) -> float:
    """Rate at a width, linear in the logarithms between measured widths, constant outside them."""
    points = sorted(curve)
    if width <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if width <= high:
            share = log(width / low) / log(high / low)
            return float(slow ** (1 - share) * fast**share)
    return points[-1][1]


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process of a machine does per second.

    Legend: E experts, N rows, K columns, T tokens. A curve holds (width, rate) pairs.

    Attributes:
        machine: Where they were measured.
        device: What computed, ``cpu`` or ``cuda``.
        product: K → operations, two per weight and token, of products with weights.
        attention: Values per head → pairs of tokens that one head relates, masked ones included.
        moved: Hidden size → values that enter or leave a product, of norms, copies, gathers, activations, additions.
        hessian: K → operations of ``XᵀX``, two per value of the square and token.
        factor: K → ``K³`` of Cholesky factors, the reordering of rows and columns included.
        columns: K → ``N K²`` of GPTQ's column loop and of the fit of the scales.
        fit: K → ``K³/3 + 4 N K²`` of fits to the full-precision stream.
        squares: Values of second moments that are mirrored and scaled.
        routed: Pairs of token and expert that a router scores, chooses from and sorts.
        select: Pairs of token and expert of which a fit scores, ranks and compares the choices.
        rounded: Values that are rounded to nearest on the grid of their extremes and packed, and whose errors are
            summed.
        searched: Likewise, the grid searched.
        packed: Values that are checked, packed and put back.
        memory: Bytes of memory that is touched for the first time; the kernel hands it out page by page.
        read: Bytes of weights, in the type that is computed in, brought from the checkpoint.
        disk: Bytes of a checkpoint that is larger than memory, which no cache holds; on top of ``read``.
        cache: Bytes of the machine's memory; a larger checkpoint comes from the disk each time.
        written: Bytes written durably.
        flush: Seconds of a durable write without content.
        batch: Seconds that a batch of a sublayer takes on top of its values and operations: calls.
        piece: Likewise of one projection of one expert on some tokens.
        matrix: Likewise of one solved matrix.
        link: Bytes per second between two processes.
        message: Seconds of a message without content.
        start: Seconds from a stage's start to its first block: the model's code is imported, empty modules are built.
        join: Seconds that the other processes take longer than the first, which has run stages before.
        error: What the prediction was checked on → its relative error in time.
    """

    machine: str
    device: str
    product: Curve
    attention: Curve
    moved: Curve
    hessian: Curve
    factor: Curve
    columns: Curve
    fit: Curve
    squares: float
    routed: float
    select: float
    rounded: float
    searched: float
    packed: float
    memory: float
    read: float
    disk: float
    cache: float
    written: float
    flush: float
    batch: float
    piece: float
    matrix: float
    link: float
    message: float
    start: float
    join: float
    error: dict[str, float]

    @classmethod
    def load(cls, path: Path | None = None) -> Rates:
        """Read a file of ``scripts/measure_cluster_rates.py``; without a path the one that comes with the package.

        Raises:
            InputError: It is missing or not such a file.
        """
        path = SHIPPED if path is None else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            values = {field.name: data[field.name] for field in fields(cls)}
            for name in CURVES:
                values[name] = tuple((float(width), float(rate)) for width, rate in values[name])
                if not values[name] or min(min(point) for point in values[name]) <= 0:
                    raise ValueError(f"{name} has no positive rates")
            for name in NUMBERS:
                if not values[name] > 0:
                    raise ValueError(f"{name} is not positive")
            if values["device"] not in ("cpu", "cuda"):
                raise ValueError("device must be cpu or cuda")
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no file of rates ({error!r})", "python scripts/measure_cluster_rates.py --out rates.json"
            ) from error


def _named(kind: str) -> tuple[str, ...]:
    # annotations are strings here
    names: list[Any] = [field.name for field in fields(Rates) if field.type == kind]
    return tuple(names)


CURVES, NUMBERS = _named("Curve"), _named("float")
