"""Fixtures of the kernel tests."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmcompress_kernels import build, cpu, cpu_state, ops, select


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter puts its own functions in the place of the language's for every launch, and again for every
    call of a helper inside, which finds them there already; that took a third of the time of these tests.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter") if _interpreted() else None
    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which takes longer
        yield
        return
    original = interpreter._patch_lang
    done: set[int] = set()  # modules whose functions the launch that runs has called

    def once(function: Any) -> Any:
        module, outermost = id(function.__globals__), not done
        if module in done:
            return None  # a helper's call, which asks for nothing
        scope = original(function)
        done.add(module)

        def restore() -> None:
            done.clear()
            scope.restore()

        return SimpleNamespace(restore=restore) if outermost else scope

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = original


def _interpreted() -> bool:
    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@pytest.fixture(scope="session")
def on_host() -> Callable[[str, str], ctypes.CDLL]:
    """Compile CUDA C++ for the host, ``name`` and a source of ``csrc/cuda``; skips where there is no compiler."""

    def compiled(name: str, source: str) -> ctypes.CDLL:
        if shutil.which("g++") is None and "CXX" not in os.environ:
            pytest.skip("no C++ compiler")
        headers = (f"{Path(source).parent}/*", "cuda/common/*")
        flags = ("-Og", "-Wno-unknown-pragmas")
        return ctypes.CDLL(str(build.build(build.Family(name, (source,), headers=headers, flags=flags))))

    return compiled


@pytest.fixture
def packed() -> Callable[..., ops.Stack]:
    """Make random packed weights of any shape ``[..., N, K]``."""

    def make(shape: tuple[int, ...], bits: int, group: int, symmetric: bool, device: str = "cpu") -> ops.Stack:
        if bits == 16:
            return ops.Stack(torch.randn(shape, device=device) / 4)
        groups = -(-shape[-1] // group)
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
        scale = (torch.rand(*shape[:-1], groups) * 0.1 + 0.01).to(torch.float16)
        zero = torch.randint(0, 1 << bits, (*shape[:-1], groups), dtype=torch.uint8)
        zeros = None if symmetric else ops.pack(zero, bits).to(device)
        return ops.Stack(ops.pack(codes, bits).to(device), scale.to(device), zeros, None, bits, group)

    return make


@pytest.fixture(params=("avx512", "avx2", "portable"))
def state_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of states, compiled for an instruction set that this machine has; its name."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    if cpu_state.instructions() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    family = cpu_state.family(request.param)
    if request.param == "portable" and cpu.architecture() != "aarch64":
        # nothing but tests runs it here; -O3 takes minutes, and the same operations give the same bits
        family = dataclasses.replace(family, flags=(*family.flags, "-O1"))
    monkeypatch.setitem(build.FAMILIES, cpu_state.FAMILY, family)
    for name, value in (("_library", None), ("_tried", False), ("_functions", {})):
        monkeypatch.setattr(cpu_state, name, value)
    monkeypatch.setattr(build, "_LOADED", {k: v for k, v in build._LOADED.items() if k != cpu_state.FAMILY})
    if cpu_state.unavailable() is not None or select.requested() not in ("auto", "cpu"):
        pytest.skip(f"no native state kernels: {cpu_state.unavailable() or select.requested()}")
    assert cpu_state._kernels() is not None, "they do not compile"
    return str(request.param)
