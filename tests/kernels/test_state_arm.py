"""On Arm the kernels of states leave every bit that they leave on x86; elsewhere than there under an emulator.

The calls are those of other tests, which hold the same code to the definition.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import build, cpu_state

ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = shutil.which("g++" if ARM else "aarch64-linux-gnu-g++")
EMULATOR = None if ARM else shutil.which("qemu-aarch64")
HERE = Path(__file__).parent


class Recorder:
    """In the place of ``cpu_state._call``: notes what a kernel is given and what it leaves, see state_calls.cpp."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.left, self.names = bytearray(), bytearray(), set[str]()
        self.original = cpu_state._call
        monkeypatch.setattr(cpu_state, "_call", self.call)

    def call(
        self,
        name: str,
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int, ...],
        last: tuple[torch.Tensor, ...] = (),
    ) -> None:
        self.names.add(name)
        arguments = (*tensors, *numbers, *last)
        self.calls += f"{name} {len(arguments)}\n".encode()
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                held = held_bytes(argument)
                self.calls += f"t {len(held)}\n".encode() + held
            else:
                self.calls += f"n {int(argument or 0)}\n".encode()
        self.original(name, tensors, numbers, last)
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.left += held_bytes(argument)


def held_bytes(tensor: torch.Tensor) -> bytes:
    """Of a tensor whose rows may lie apart: all between its first and its last number."""
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    size = size if tensor.numel() else 0
    return bytes(tensor.as_strided((size,), (1,)).view(torch.uint8).numpy().tobytes())


def make_calls() -> None:
    """Calls of tests, every kernel and every way to round among them."""
    states, windows = (module(name) for name in ("test_state_ops", "test_replay_ops"))
    for bits in (4, 8):
        for codec, rounding in (("dsq", "rtn"), ("dsq_refit", "rtn"), ("dsq_static_p", "rtn"), ("dsq", "dither")):
            states.test_packed_update_gives_the_definitions_codes(bits, codec, rounding, 32, 128)
        states.test_pack_gives_the_definitions_codes(bits, False)
        states.test_pack_gives_the_definitions_codes(bits, True)
        states.test_decode_step_of_a_mixer(bits, 16, 32, 2)
    states.test_float_update(16, 256)
    for kind in ("dsq", "fixed", "refit", "dither"):
        states.test_scan_and_its_gradients((4, 6, 8, 16), 2, 3, kind)
    states.test_prompt_through_a_mixer(32, 64, 2, True)
    for kind in ("random", "subnormal", "cancelling"):
        windows.test_codes_are_the_definitions_to_the_last_bit(kind, 4)


def module(name: str) -> Any:
    """A module of tests beside this one."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None or not (ARM or EMULATOR), reason="no Arm compiler (g++-aarch64-linux-gnu, qemu-user)"
)
@pytest.mark.parametrize("state_kernels", ["portable"], indirect=True)
@pytest.mark.usefixtures("state_kernels")
def test_arm_leaves_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    recorder = Recorder(monkeypatch)
    make_calls()
    assert len(recorder.names) == 8
    family = cpu_state.family("portable")
    flags = [flag for flag in (*build.Cpp.flags, *family.flags) if flag not in ("-fPIC", "-O3")]
    includes = [f"-I{build.SOURCES / 'cpu' / 'include'}"]
    sources = [path for path in family.files() if not path.name.startswith("model")]
    program = tmp_path / "calls"
    command = [COMPILER, *flags, "-O1", "-static", *includes, HERE / "state_calls.cpp", *sources, "-o", program]
    subprocess.run([str(word) for word in command], check=True)
    (tmp_path / "in").write_bytes(recorder.calls)
    emulator = [] if ARM else [str(EMULATOR), "-cpu", "max"]
    run = [*emulator, str(program), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").read_bytes() == bytes(recorder.left)
