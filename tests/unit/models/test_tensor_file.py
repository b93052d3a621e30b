from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.errors import InputError
from llmcompress.models.tensor_file import TensorFile, all_finite

TENSORS = {
    "a": torch.randn(3, 4).to(torch.bfloat16),
    "b": torch.randn(5),
    "c": torch.arange(7, dtype=torch.int32),
    "d": torch.tensor(2.5, dtype=torch.float16),
    "e": torch.empty(0, 3),
    "f": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_reads_what_safetensors_wrote(path: Path) -> None:
    file = TensorFile(path)
    assert set(file.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype == file.dtype(name)
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
    assert file.nbytes == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_reads_into_given_memory_and_what_the_kernel_forgets_is_read_again(path: Path) -> None:
    file = TensorFile(path)
    file.once = True
    stack = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    for _ in range(2):
        assert file.read("a", stack[1]).data_ptr() == stack[1].data_ptr()
        assert torch.equal(stack[1], TENSORS["a"])
        assert not bool(stack[0].any())
        assert torch.equal(file.read("c"), TENSORS["c"])


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged"):
        TensorFile(path)


def test_a_file_cut_after_opening_is_refused(path: Path) -> None:
    file = TensorFile(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="has changed"):
        file.read(next(iter(TENSORS)))


def test_a_file_replaced_after_opening_is_refused(path: Path) -> None:
    """Another model with the same names: half of the tensors would be its."""
    file = TensorFile(path)
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    with pytest.raises(InputError, match="has changed"):
        file.read(next(iter(TENSORS)))
    # what is opened now is one file
    assert all(torch.equal(TensorFile(path).read(name), tensor) for name, tensor in TENSORS.items())


def write(path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(64))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "not an object"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed"),
        ({"a": 3}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "cannot span"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "cannot span"),
        ({"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}, "Q7"),
        ({"a": {"dtype": "F32", "shape": [20], "data_offsets": [0, 80]}}, "cut short"),
        (
            {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("b", 12), ("a", 8))},
            "a and b share bytes",
        ),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: object, message: str) -> None:
    write(tmp_path / "x.safetensors", header)
    with pytest.raises(InputError, match=message):
        TensorFile(tmp_path / "x.safetensors")


def test_tensors_without_values_share_nothing(tmp_path: Path) -> None:
    places = {"a": (2, 0, 8), "b": (0, 8, 8), "c": (0, 4, 4), "d": (2, 8, 16)}
    header = {n: {"dtype": "F32", "shape": [size], "data_offsets": [b, e]} for n, (size, b, e) in places.items()}
    write(tmp_path / "x.safetensors", header)
    assert set(TensorFile(tmp_path / "x.safetensors").entries) == set(places)


def test_a_header_too_deep_to_read_is_refused(tmp_path: Path) -> None:
    raw = b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(InputError, match="not JSON"):
        TensorFile(tmp_path / "x.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\n")
    with pytest.raises(InputError, match="not that of a safetensors file"):
        TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="No such file"):
        TensorFile(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_finite_sees_every_kind_of_damage_anywhere(dtype: torch.dtype) -> None:
    assert all_finite(torch.zeros(0, dtype=dtype))
    clean = torch.randn(5, 37).to(dtype)
    clean[2, 3] = torch.finfo(dtype).max
    assert all_finite(clean)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 36, 100, 184):
            damaged = clean.clone()
            damaged.view(-1)[place] = value
            assert not all_finite(damaged)
