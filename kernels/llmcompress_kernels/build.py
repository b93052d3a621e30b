"""Compile a family of native kernels at first use and keep the library in the user's cache.

A family is a folder below ``csrc`` that becomes one shared library. Its file name holds two hashes,
one of the sources and one of the toolchain, so nothing is ever stale and nothing is ever overwritten:

    ~/.cache/llmcompress/kernels/<family>-<sources>-<toolchain>.so

The compiler writes into a private folder and the finished library is renamed into place. A lock keeps
two processes from doing the same work; it is an ``flock``, which ends with the process that holds it,
so a killed build never blocks the next one. Instruction sets are chosen at run time by CPU flags,
never with ``-march=native``: a cache may be shared by different machines.

    python -m llmcompress_kernels build            # what `make kernels` runs: all families, ahead of time
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llmcompress_kernels import processors

try:
    import fcntl
except ImportError:  # not a POSIX system: no native kernels
    fcntl = None  # type: ignore[assignment]

SOURCES = Path(__file__).resolve().parent / "csrc"
CACHE_VARIABLE = "LLMCOMPRESS_CACHE"
LOCK_VARIABLE = "LLMCOMPRESS_BUILD_TIMEOUT"
FLAGS_VARIABLE = "LLMCOMPRESS_CXXFLAGS"  # appended to every command, for sanitizers and profilers
LOCK_SECONDS = 300.0
COMPILE_SECONDS = 600.0
SHOWN_LINES = 12
APPLE = sys.platform == "darwin"


class BuildError(RuntimeError):
    """A family cannot be had on this machine; the text says why and what to do."""


class Toolchain(Protocol):
    """How sources become a library: ``cpp`` below, ``cuda.toolchain.nvcc``."""

    def find(self) -> str:
        """Path of the compiler.

        Raises:
            BuildError: There is none.
        """

    def version(self) -> str:
        """The compiler's own description of its version, for the cache key."""

    def compile(self, source: Path, target: Path, family: Family) -> list[str]:
        """Command that compiles one source file."""

    def link(self, objects: list[Path], target: Path, family: Family) -> list[str]:
        """Command that links the library."""


class Cpp:
    """The system's C++ compiler: ``$CXX``, or g++, c++, clang++."""

    suffixes = (".cpp",)
    flags = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-ffp-contract=off")

    def find(self) -> str:
        """See :class:`Toolchain`."""
        asked = os.environ.get("CXX")
        for name in (asked,) if asked else ("g++", "c++", "clang++"):
            path = shutil.which(name)
            if path:
                return path
        if asked:
            raise BuildError(f"CXX={asked} is not an executable")
        raise BuildError(f"no C++ compiler ({'xcode-select --install' if APPLE else 'install g++'}, or set CXX)")

    def version(self) -> str:
        """See :class:`Toolchain`."""
        return compiler_version(self.find())

    def compile(self, source: Path, target: Path, family: Family) -> list[str]:
        """See :class:`Toolchain`."""
        includes = [f"-I{SOURCES / 'cpu' / 'include'}"]
        # Apple's clang has no omp.h; torch brings its own
        if family.torch or APPLE:
            includes += [f"-isystem{path}" for path in torch_includes()]
        flags = [*self.flags, *family.flags, *extra_flags()]
        if APPLE:
            # Apple's driver knows no OpenMP, its compiler does
            at = flags.index("-fopenmp")
            flags[at:at] = ["-Xclang"]
        return [self.find(), *flags, *includes, "-c", str(source), "-o", str(target)]

    def link(self, objects: list[Path], target: Path, family: Family) -> list[str]:
        """See :class:`Toolchain`."""
        if APPLE:
            # what is undefined, torch and its OpenMP runtime have when this is loaded: one runtime in the process
            shared = ("-shared", "-undefined", "dynamic_lookup")
            return [self.find(), *shared, *extra_flags(), *map(str, objects), "-o", str(target)]
        # libgomp is named by its plain soname, which is the one that torch has loaded: one runtime in the process
        torch = [f"-L{torch_folder() / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu"] if family.torch else []
        command = [self.find(), "-shared", "-fopenmp", *extra_flags(), *map(str, objects), "-o", str(target)]
        return [*command, *torch, *family.libraries]


cpp = Cpp()


@dataclass(frozen=True)
class Family:
    """Sources that become one library.

    Attributes:
        name: Its name in messages and in the cache.
        sources: Patterns below ``csrc``.
        headers: Patterns below ``csrc`` that the sources include; part of the key.
        torch: Whether it includes torch's headers; then torch's version is part of the key.
        flags: Extra compiler flags.
        libraries: Extra linker arguments.
        toolchain: What compiles it.
        optional: Most machines cannot build it and miss nothing: `make kernels` passes over it with the reason.
        isa: The instruction set that it is compiled for, "" where that is chosen within or does not matter.
        silent: Building it takes no time worth telling.
    """

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...] = ("cpu/include/**/*",)
    torch: bool = False
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    toolchain: Toolchain = field(default=cpp)
    optional: bool = False
    isa: str = ""
    silent: bool = False

    def files(self) -> list[Path]:
        """Source files to compile, sorted."""
        return sorted({path for pattern in self.sources for path in SOURCES.glob(pattern)})


FAMILIES: dict[str, Family] = {}
_LOADED: dict[str, ctypes.CDLL] = {}
_FAILED: dict[str, str] = {}


def register(family: Family) -> None:
    """Make a family known to :func:`load` and to ``make kernels``."""
    FAMILIES[family.name] = family


def cache_folder() -> Path:
    """Where libraries are kept: ``$LLMCOMPRESS_CACHE``, else the XDG cache folder, in ``kernels``."""
    root = os.environ.get(CACHE_VARIABLE)
    if root:
        return Path(root).expanduser() / "kernels"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path("~/.cache").expanduser()) / "llmcompress" / "kernels"


def load(name: str) -> ctypes.CDLL:
    """The library of a family, built if it has to be.

    Operators that the library registers with PyTorch are registered by loading it. A second call
    returns the same handle; a failure is remembered until the process ends.

    Raises:
        BuildError: There is no compiler, the sources do not compile, or the cache cannot be written.
    """
    if name in _LOADED:
        return _LOADED[name]
    if name in _FAILED:
        raise BuildError(_FAILED[name])
    try:
        path = build(FAMILIES[name])
        library = ctypes.CDLL(str(path))
    except BuildError as error:
        _FAILED[name] = str(error)
        raise
    except OSError as error:
        _FAILED[name] = f"the library {name} does not load: {error}"
        raise BuildError(_FAILED[name]) from error
    _LOADED[name] = library
    return library


def prepare(names: Iterable[str]) -> dict[str, str]:
    """Build several families at the same time.

    Returns:
        Why some cannot be had, by name; :func:`load` says it again.
    """
    names = list(names)
    missing = [name for name in names if name not in _LOADED and name not in _FAILED]
    with ThreadPoolExecutor(max(1, len(missing))) as pool:
        building = [(name, pool.submit(build, FAMILIES[name])) for name in missing]
        for name, done in building:
            try:
                done.result()
            except BuildError as error:
                _FAILED[name] = str(error)
    return {name: _FAILED[name] for name in names if name in _FAILED}


def unavailable(name: str) -> str | None:
    """Why a family cannot be had, or None. Starts no build: a family that was not tried is judged by its compiler."""
    if name in _LOADED:
        return None
    if name in _FAILED:
        return _FAILED[name].splitlines()[0]
    family = FAMILIES[name]
    try:
        found = finished(family)
        if found is None:
            family.toolchain.find()
    except BuildError as error:
        return str(error).splitlines()[0]
    return None


def finished(family: Family) -> Path | None:
    """The cached library, or None. Without a compiler any library of these very sources will do."""
    folder, stem = cache_folder(), f"{family.name}-{_source_hash(family)}"
    try:
        path = folder / f"{stem}-{_tool_hash(family)}.so"
        return path if path.is_file() else None
    except BuildError:
        return next(iter(sorted(folder.glob(f"{stem}-*.so"))), None)


def build(family: Family) -> Path:
    """The library of a family, from the cache or compiled now; announced on stderr when compiled.

    Raises:
        BuildError: See :func:`load`.
    """
    found = finished(family)
    if found is not None:
        return found
    folder = cache_folder()
    compiler = family.toolchain.find()
    path = folder / f"{family.name}-{_source_hash(family)}-{_tool_hash(family)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock"), family.name):
            if path.is_file():  # another process was faster
                return path
            _remove_leftovers(folder, path.stem)
            say = _silence if family.silent else _say
            began = time.perf_counter()
            say(f"compiling the {family.name} kernels with {Path(compiler).name} (once) ...")
            _compile(family, path)
            say(f"compiled the {family.name} kernels in {time.perf_counter() - began:.1f} s, kept in {folder}")
    except OSError as error:
        raise BuildError(
            f"cannot write {folder} ({error.strerror}): set {CACHE_VARIABLE} to a writable folder"
        ) from error
    return path


def _compile(family: Family, path: Path) -> None:
    """Compile and link in a private folder, then rename into place."""
    sources = family.files()
    if not sources:
        raise BuildError(f"the sources of the {family.name} kernels are missing below {SOURCES}")
    private = path.parent / f".{path.stem}.{os.getpid()}"
    private.mkdir()
    try:
        jobs = []
        for number, source in enumerate(sources):
            target = private / f"{number}.o"
            jobs.append((target, family.toolchain.compile(source, target, family)))
        with ThreadPoolExecutor(max(1, min(len(jobs), processors.count()))) as pool:
            for done in [pool.submit(_run, command, family) for _, command in jobs]:
                done.result()
        library = private / "library.so"
        _run(family.toolchain.link([target for target, _ in jobs], library, family), family)
        library.replace(path)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _run(command: list[str], family: Family) -> None:
    """Run the compiler; its complaint becomes a short error, with all of it in a file.

    Raises:
        BuildError: It failed.
    """
    try:
        with _COMPILERS:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_SECONDS,
                stdin=subprocess.DEVNULL,
            )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish the {family.name} kernels in {COMPILE_SECONDS:.0f} s") from error
    if done.returncode == 0:
        return
    log = cache_folder() / f"{family.name}.log"
    text = f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"
    log.write_text(text)
    lines = done.stderr.splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines[-SHOWN_LINES:]
    shown = "\n".join(f"  {line}" for line in errors[:SHOWN_LINES])
    raise BuildError(
        f"the {family.name} kernels do not compile with {command[0]} (exit code {done.returncode}); "
        f"the plain PyTorch definitions run instead\n{shown}\n  all of it: {log}"
    )


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock, waiting for at most the time-out.

    Raises:
        BuildError: Another process holds it for longer than that, or the system has no such locks.
    """
    if fcntl is None:
        raise BuildError("native kernels need a POSIX system")
    limit = float(os.environ.get(LOCK_VARIABLE, LOCK_SECONDS))
    deadline, told = time.monotonic() + limit, False
    while True:
        # the file is removed by its last holder, so it may have changed between opening and locking
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            if not told:
                _say(f"another process compiles the {name} kernels, waiting for it ...")
                told = True
            if time.monotonic() > deadline:
                handle.close()
                raise BuildError(f"another process has been compiling the {name} kernels for {limit:.0f} s") from None
            time.sleep(0.05)
        except FileNotFoundError:
            pass
        handle.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Folders of killed builds of the same library; whoever holds the lock is the only builder alive."""
    for left in folder.glob(f".{stem}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _source_hash(family: Family) -> str:
    """Hash of everything that is compiled and how, but for the toolchain."""
    digest = hashlib.sha256()
    headers = {path for pattern in family.headers for path in SOURCES.glob(pattern) if path.is_file()}
    for path in sorted({*family.files(), *headers}):
        digest.update(str(path.relative_to(SOURCES)).encode())
        digest.update(path.read_bytes())
    digest.update(json.dumps([family.flags, family.libraries]).encode())
    if family.torch:
        digest.update(importlib.import_module("torch").__version__.encode())
    return digest.hexdigest()[:12]


def _tool_hash(family: Family) -> str:
    """Hash of the compiler, its version, the commands, and how torch was built; another checkout or venv is the same.

    What lies in the folders counts by content or version, so that moving them compiles nothing again.
    """
    tool, place = family.toolchain, Path("-")
    commands = [*tool.compile(place, place, family), *tool.link([], place, family)]
    folders = {str(SOURCES): "csrc", **({str(torch_folder()): "torch"} if family.torch or APPLE else {})}
    for folder, name in folders.items():
        commands = [word.replace(folder, name) for word in commands]
    text = json.dumps([tool.version(), platform.machine(), commands, _torch_build() if family.torch else None])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _torch_build() -> list[str]:
    """What tells two builds of one torch version apart."""
    torch = importlib.import_module("torch")
    return [str(torch.version.git_version), str(torch.version.cuda), str(torch.compiled_with_cxx11_abi())]


@functools.cache
def compiler_version(path: str) -> str:
    """First line of ``--version``."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{path} --version fails: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{path} --version fails with exit code {done.returncode}")
    return done.stdout.split("\n", 1)[0]


def extra_flags() -> list[str]:
    """What the user adds to every command."""
    return os.environ.get(FLAGS_VARIABLE, "").split()


def torch_folder() -> Path:
    """Where torch is installed."""
    return Path(str(importlib.import_module("torch").__file__)).parent


def torch_includes() -> list[str]:
    """Torch's header folders, found without importing its build machinery."""
    root = torch_folder() / "include"
    return [str(root), str(root / "torch" / "csrc" / "api" / "include")]


# one to a core, of all the families that are being built
_COMPILERS = threading.BoundedSemaphore(processors.count())


def _say(text: str) -> None:
    sys.stderr.write(f"llmcompress: {text}\n")
    sys.stderr.flush()


def _silence(text: str) -> None:
    """In the place of :func:`_say`."""
