"""Operators on packed weights and recurrent states: schemas, fakes and plain PyTorch definitions, registered on import.

Importing this package needs torch and nothing else; no CUDA, no compiler.
"""

from __future__ import annotations

from llmcompress_kernels import (
    columns,
    cpu,
    decode,
    delta_state,
    gpu,
    mamba2,
    ops,
    prepared,
    schemas,
    select,
    state,
    tree,
)

__all__ = [
    "columns",
    "cpu",
    "decode",
    "delta_state",
    "gpu",
    "mamba2",
    "ops",
    "prepared",
    "schemas",
    "select",
    "state",
    "tree",
]
