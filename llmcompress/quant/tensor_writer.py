"""Writing a safetensors file straight from the tensors' own memory.

``safetensors.torch.save`` copies every tensor into Python bytes and these into one more piece before anything reaches
the disk: three times the data at the peak. Here the header is made from shapes and the bytes follow tensor by tensor;
the result is the same to the byte (``tests/unit/quant/test_tensor_writer.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# code in the file → name in torch and bytes, in the order in which the format's own library puts them, the last first
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "I16": ("int16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I32": ("int32", 4), "F32": ("float32", 4), "F64": ("float64", 8), "I64": ("int64", 8),
}  # fmt: skip
_CODES = {name: code for code, (name, _) in DTYPES.items()}
_RANK = {code: rank for rank, code in enumerate(DTYPES)}
# the system call's buffers are one copy more; a piece bounds it
_PIECE = 64 << 20


def write_tensors(handle: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file.

    Args:
        handle: Open for writing in binary mode.
        tensors: By name, contiguous, on the CPU.
        metadata: Text by key, for the header.

    Raises:
        KeyError: A data type that this project does not store.
    """
    import torch

    codes = {name: _CODES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-_RANK[codes[name]], name.encode()))
    header: dict[str, object] = {} if not metadata else {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": codes[name], "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].numel():
            # numpy has no bfloat16, bytes of any type it has
            data = memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(data), _PIECE):
                handle.write(data[start : start + _PIECE])
