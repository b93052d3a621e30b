"""The build of native kernels: once, announced, safe against kills and races, readable when it fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from llmcompress_kernels import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# a compiler that logs every call and may take its time
WRAPPER = """#!/bin/sh
case "$*" in *--version*) exec g++ "$@";; esac
echo "$$" >> "$COMPILER_LOG"
sleep "${COMPILER_SLEEP:-0}"
exec g++ "$@"
"""
BUILD = """
import sys
from pathlib import Path
from llmcompress_kernels import build
build.SOURCES = Path(sys.argv[1])
build.register(build.Family("tiny", ("tiny.cpp",), headers=("tiny.h",)))
print(build.load("tiny").answer())
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> build.Family:
    """A family of one small file, a cache of its own and a compiler that logs."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "tiny.h").write_text("#define ANSWER 42\n")
    export = 'extern "C" __attribute__((visibility("default")))'
    (sources / "tiny.cpp").write_text(f'#include "{sources}/tiny.h"\n{export} int answer() {{ return ANSWER; }}\n')
    compiler = tmp_path / "compiler"
    compiler.write_text(WRAPPER)
    compiler.chmod(0o755)
    for key, value in {
        "CXX": compiler,
        build.CACHE_VARIABLE: tmp_path / "cache",
        "COMPILER_LOG": tmp_path / "log",
    }.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_LOADED", {})
    monkeypatch.setattr(build, "_FAILED", {})
    tiny = build.Family("tiny", ("tiny.cpp",), headers=("tiny.h",))
    monkeypatch.setattr(build, "FAMILIES", {"tiny": tiny})
    return tiny


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(tmp_path / "csrc")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def compilations(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().split())


def test_builds_once_and_says_so(family: build.Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.load("tiny").answer() == 42
    said = capfd.readouterr().err
    assert "compiling the tiny kernels" in said
    assert str(build.cache_folder()) in said
    assert compilations(tmp_path) == 2  # compile, link
    assert build.build(family).is_file()
    assert build.finished(family) == build.build(family)
    assert compilations(tmp_path) == 2
    assert capfd.readouterr().err == ""
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".so"]  # nothing else is left


def test_another_checkout_or_venv_finds_the_same_library(
    family: build.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch = build.Family("tiny", ("tiny.cpp",), headers=("tiny.h",), torch=True)
    first, key = build.build(family), build._tool_hash(with_torch)
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(tmp_path / "csrc", tmp_path / "elsewhere"))
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path / "site-packages" / "torch")
    assert build.build(family) == first and compilations(tmp_path) == 2
    assert build._tool_hash(with_torch) == key
    # but not another build of torch under the same version
    monkeypatch.setattr(build, "_torch_build", lambda: ["another commit", "None", "True"])
    assert build._tool_hash(with_torch) != key


def test_changed_header_gives_another_library(family: build.Family, tmp_path: Path) -> None:
    first = build.build(family)
    (tmp_path / "csrc" / "tiny.h").write_text("#define ANSWER 43\n")
    assert build.build(family) != first
    assert build.load("tiny").answer() == 43


def test_error_is_readable_and_remembered(family: build.Family, tmp_path: Path) -> None:
    (tmp_path / "csrc" / "tiny.cpp").write_text('extern "C" int answer() { return nonsense; }\n')
    with pytest.raises(build.BuildError, match="nonsense") as caught:
        build.load("tiny")
    assert "plain PyTorch definitions run instead" in str(caught.value)
    log = build.cache_folder() / "tiny.log"
    assert str(log) in str(caught.value)
    assert "nonsense" in log.read_text()
    assert "do not compile" in str(build.unavailable("tiny"))
    calls = compilations(tmp_path)
    with pytest.raises(build.BuildError):
        build.load("tiny")
    assert compilations(tmp_path) == calls
    assert not list(build.cache_folder().glob("*.so"))


def test_no_compiler_is_a_reason(family: build.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "not an executable" in str(build.unavailable("tiny"))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler" in str(build.unavailable("tiny"))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.load("tiny")


def test_a_finished_library_needs_no_compiler(family: build.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build(family)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.unavailable("tiny") is None
    assert build.finished(family) == path


def test_unwritable_cache_is_a_reason(family: build.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.CACHE_VARIABLE, "/proc/nowhere")
    with pytest.raises(build.BuildError, match=build.CACHE_VARIABLE):
        build.load("tiny")


def test_on_macos_openmp_is_torchs(family: build.Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "APPLE", True)
    compile_one = build.cpp.compile(Path("a.cpp"), Path("a.o"), family)
    at = compile_one.index("-fopenmp")
    assert compile_one[at - 1] == "-Xclang"
    assert f"-isystem{build.torch_folder() / 'include'}" in compile_one
    link = build.cpp.link([Path("a.o")], Path("a.so"), build.Family("t", ("t.cpp",), torch=True, libraries=("-lc10",)))
    assert "dynamic_lookup" in link
    # nothing that would bring a second runtime, or that Apple's linker does not know
    assert not [word for word in link if word.startswith(("-fopenmp", "-l", "-L", "-Wl"))]
    key = build._tool_hash(family)
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path / "site-packages" / "torch")
    assert build._tool_hash(family) == key
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "xcode-select --install" in str(build.unavailable("tiny"))


def test_several_families_are_built_at_the_same_time(family: build.Family, tmp_path: Path) -> None:
    (tmp_path / "csrc" / "broken.cpp").write_text("int answer() { return nonsense; }\n")
    build.register(build.Family("broken", ("broken.cpp",)))
    failed = build.prepare(("tiny", "broken"))
    assert list(failed) == ["broken"] and "nonsense" in failed["broken"]
    calls = compilations(tmp_path)
    assert build.load("tiny").answer() == 42
    with pytest.raises(build.BuildError, match="nonsense"):
        build.load("broken")
    assert compilations(tmp_path) == calls


def test_a_silent_family_says_nothing(family: build.Family, capfd: pytest.CaptureFixture[str]) -> None:
    build.build(build.Family("tiny", ("tiny.cpp",), silent=True))
    assert capfd.readouterr().err == ""


def test_two_processes_build_once(family: build.Family, tmp_path: Path) -> None:
    both = [start(tmp_path, COMPILER_SLEEP="1") for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [out.strip() for out, _ in outputs] == ["42", "42"]
    assert compilations(tmp_path) == 2
    assert sum("waiting for it" in err for _, err in outputs) <= 1


def test_a_killed_build_does_not_stop_the_next(family: build.Family, tmp_path: Path) -> None:
    victim = start(tmp_path, COMPILER_SLEEP="3600")
    log, deadline = tmp_path / "log", time.monotonic() + 600
    # the file is there before the line in it is
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    compiler = psutil.Process(int(log.read_text().split()[0]))
    victim.kill()
    victim.wait()
    try:
        assert list((tmp_path / "cache" / "kernels").glob(".tiny-*"))
        out, err = start(tmp_path).communicate(timeout=600)
    finally:
        for orphan in (compiler, *compiler.children()):
            orphan.kill()
    assert out.strip() == "42", err
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".so"]


def test_waiting_ends(family: build.Family, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    path = build.cache_folder() / f"tiny-{build._source_hash(family)}-{build._tool_hash(family)}.lock"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv(build.LOCK_VARIABLE, "0.3")
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(build.BuildError, match="another process has been compiling"):
            build.build(family)
    assert "waiting for it" in capfd.readouterr().err
    assert build.build(family).is_file()  # the file that was left behind is not in the way
