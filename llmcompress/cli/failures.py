"""Errors of Python, torch and safetensors that a user can do something about, in our own words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from llmcompress.errors import EnvironmentProblem, InputError, LLMCompressError, ResourceError

# package that is missing → what brings it
EXTRAS = {
    "compressed_tensors": "pip install 'llmcompress[export]'",
    "gguf": "pip install 'llmcompress[export]'",
    "llama_cpp": "pip install llama-cpp-python",
    "trl": "pip install 'llmcompress[trl]'",
    "vllm": "pip install 'llmcompress[vllm]'",
    "tensorboard": "pip install 'llmcompress[track]'",
    "trackio": "pip install 'llmcompress[track]'",
    "wandb": "pip install 'llmcompress[track]'",
    "starlette": "pip install 'llmcompress[serve]'",
    "uvicorn": "pip install 'llmcompress[serve]'",
    "prometheus_client": "pip install 'llmcompress[serve]'",
    "llguidance": "pip install 'llmcompress[structured]'",
    "triton": "pip install 'llmcompress[triton]'",
}
LESS_MEMORY = (
    "look at `llmcompress plan RECIPE`, then lower stages.<calibrate>.samples or .length, "
    "set run.compute_dtype=bfloat16, or free memory on this machine; finished blocks are kept"
)
_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory")


# what else the system says → whose it is, and what to do
_OF_THE_SYSTEM: dict[int | None, tuple[type[LLMCompressError], str]] = {
    errno.ENAMETOOLONG: (InputError, "choose a shorter path"),
    errno.ELOOP: (InputError, "check the symbolic links of the path"),
    errno.EIO: (EnvironmentProblem, "check the disk or the share that holds it; finished blocks are kept"),
    errno.ESTALE: (EnvironmentProblem, "mount the share again; finished blocks are kept"),
    errno.EMFILE: (ResourceError, "raise the limit on open files (ulimit -n)"),
}
_LONGEST = 200


def shorten_path(path: object) -> str:
    """A path for a message: of a very long one its beginning and end."""
    text = str(path)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and everything it was raised from or while handling."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def translate(error: BaseException, run_dir: Path | None = None) -> LLMCompressError | None:
    """Our error for a foreign one, None when it is a bug of ours.

    Args:
        error: What escaped from a command.
        run_dir: Folder of the run, named where the error itself names no file.
    """
    for link in chain(error):
        found = _memory(link) or _disk(link, run_dir)
        if found is not None:
            return found
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llmcompress"):
        name = error.name.split(".")[0]
        return EnvironmentProblem(f"the package {name} is missing", EXTRAS.get(name, f"pip install {name}"))
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and error.filename:
        return InputError(f"{error.filename}: {(error.strerror or 'cannot be read').lower()}", "check the path")
    if isinstance(error, PermissionError) and error.filename:
        return EnvironmentProblem(f"{error.filename}: permission denied", "check who owns it, or use another folder")
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        kind, hint = _OF_THE_SYSTEM[error.errno]
        where = f"{shorten_path(error.filename)}: " if error.filename else ""
        return kind(f"{where}{(error.strerror or '').lower()}", hint)
    if type(error).__name__ == "SafetensorError":
        return InputError(f"damaged safetensors file: {error}", "fetch or write the file again")
    return None


def _memory(error: BaseException) -> LLMCompressError | None:
    text = str(error).lower()
    gpu = type(error).__name__ == "OutOfMemoryError" or "cuda out of memory" in text
    if gpu:
        return ResourceError("the GPU ran out of memory", LESS_MEMORY)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in text for t in _MEMORY_TEXTS)):
        return ResourceError("this machine ran out of memory", LESS_MEMORY)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return ResourceError("this machine ran out of memory", LESS_MEMORY)
    return None


def _disk(error: BaseException, run_dir: Path | None) -> LLMCompressError | None:
    place = error.filename if isinstance(error, OSError) and error.filename else run_dir
    where = f"{place}: " if place else ""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in str(error).lower():
        again = "free some space, then the same command again"
        in_a_run = "free some space and resume, set run.dir to another disk, or export fewer formats"
        return ResourceError(f"{where}no space left on the disk", again if run_dir is None else in_a_run)
    if number == errno.EFBIG:
        return ResourceError(
            f"{where}file too large for this file system or for the limit on file sizes (ulimit -f)",
            "raise the limit, or set run.dir to another file system, then resume",
        )
    if number == errno.EROFS or "read-only file system" in str(error).lower():
        return EnvironmentProblem(f"{where}the file system is read-only", "name a folder that you can write to")
    return None
