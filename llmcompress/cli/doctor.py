"""``doctor`` and ``version``: what this machine offers. They report problems and never fail because of one."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer

from llmcompress import __version__
from llmcompress.cli.command import command
from llmcompress.cli.output import Output, plain, table
from llmcompress.plugins import installed
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

REQUIRED = (
    "torch", "transformers", "safetensors", "tokenizers", "datasets", "lm-eval", "numpy", "pydantic", "omegaconf",
    "typer", "rich", "psutil", "jinja2", "pyyaml",
)  # fmt: skip
# package → what it is for and how to get it
OPTIONAL = {
    "compressed-tensors": ("export to compressed-tensors", "pip install 'llmcompress[export]'"),
    "gguf": ("export to GGUF", "pip install 'llmcompress[export]'"),
    "math-verify": ("answers in LaTeX", "pip install 'llmcompress[math]'"),
    "trl": ("s2r_init and s2r_rl with engine: trl", "pip install 'llmcompress[trl]'"),
    "vllm": ("s2r_init and s2r_rl with sampler.engine: vllm", "pip install 'llmcompress[vllm]'"),
    "llama-cpp-python": ("read exported GGUF files back with llama.cpp", "pip install llama-cpp-python"),
    "tensorboard": ("run --track tensorboard", "pip install 'llmcompress[track]'"),
    "trackio": ("run --track trackio", "pip install 'llmcompress[track]'"),
    "wandb": ("run --track wandb", "pip install 'llmcompress[track]'"),
    "triton": ("GPU kernels", "pip install 'llmcompress[triton]'"),
}
# the instruction sets that decide how fast low-bit kernels can be
CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni",
             "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "sve", "i8mm", "bf16")  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "doctor")(doctor)
    command(app, "version")(version)


def version(out: Output) -> None:
    """Print the version."""
    out.result({"version": __version__, "python": platform.python_version()}, f"llmcompress {__version__}")


def doctor(out: Output) -> None:
    """Report versions, processor, memory, compiler, GPU, kernels, optional packages and plug-ins."""
    found = examine()
    out.result(found, lambda screen: _show(found, screen))


def examine() -> dict[str, Any]:
    """Everything ``doctor`` reports; each part that cannot be read says so instead of raising."""
    packages = {name: package_version(name) for name in REQUIRED}
    optional = {
        name: {"version": package_version(name), "for": purpose, "install": how}
        for name, (purpose, how) in OPTIONAL.items()
    }
    problems = [f"the package {name} is missing" for name, value in packages.items() if value is None]
    found: dict[str, Any] = {
        "llmcompress": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "optional": optional,
        "cpu": cpu(),
        "memory": memory(),
        "compiler": compiler(),
        "torch": torch_facts(),
        "kernels": kernels(),
        "plugins": installed(),
    }
    problems += [str(plugin["problem"]) for plugin in found["plugins"] if plugin["problem"]]
    if found["compiler"] is None:
        found["compiler_note"] = "no C++ compiler: everything works, with slower kernels (apt install g++)"
    found["problems"] = problems
    return found


def package_version(name: str) -> str | None:
    """Installed version of a distribution, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Processor name, cores this process may use, and the instruction sets that matter."""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:  # noqa: PTH123 - a virtual file
            for line in handle:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except OSError:
        pass
    from llmcompress.pipeline.device import usable_cores
    from llmcompress.recipe.lock import processor

    return {"name": processor(), "cores": usable_cores(), "flags": [flag for flag in CPU_FLAGS if flag in flags]}


def memory() -> dict[str, Any]:
    """Main memory and free disk here, in bytes."""
    from llmcompress.models.memory_limits import total_ram

    try:
        import psutil

        return {
            "total": total_ram(),
            "available": int(psutil.virtual_memory().available),
            "disk_free": shutil.disk_usage(".").free,
        }
    except (ImportError, OSError) as error:
        return {"problem": str(error)}


def compiler() -> dict[str, str] | None:
    """The C++ compiler that kernels are built with, None if there is none."""
    name = os.environ.get("CXX") or "c++"
    for candidate in (name, "g++", "clang++"):
        path = shutil.which(candidate)
        if path is None:
            continue
        try:
            told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        return {"path": path, "version": told.stdout.splitlines()[0] if told.stdout else "unknown"}
    return None


def torch_facts() -> dict[str, Any]:
    """Threads and GPUs as torch sees them."""
    try:
        import torch

        from llmcompress.pipeline.device import describe_gpus

        return {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": describe_gpus()}
    except (ImportError, OSError, RuntimeError) as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def kernels() -> Any:
    """What the kernel package says about each op on the CPU and on a GPU, or why it cannot say anything."""
    try:
        select = importlib.import_module("llmcompress_kernels.select")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "llmcompress_kernels.select":
            return {"explanation": "plain PyTorch definitions only"}
        return {"problem": f"{type(error).__name__}: {error}"}
    try:
        from llmcompress.inference.coverage import DELTAS, FAMILIES, HYBRIDS, STATES
        from llmcompress.pipeline.device import describe_gpus

        tables = importlib.import_module("llmcompress_kernels.tables")
        launches = tables.describe(gpu["name"] for gpu in describe_gpus())
        told = {"explanation": plain(select.explain()), "gpu": plain(select.explain("cuda")), "tables": launches}
        return {**told, "decode_families": [*FAMILIES, *STATES, *HYBRIDS, *DELTAS]}
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def _show(found: dict[str, Any], screen: Console) -> None:
    processor, room = found["cpu"], found["memory"]
    torch_part, built = found["torch"], found["compiler"]
    gpus = ", ".join(f"{g['name']} ({bytes_text(g['bytes'])})" for g in torch_part.get("gpus", [])) or "none"
    rows = [
        ("llmcompress", found["llmcompress"]),
        ("python", f"{found['python']} ({sys.executable})"),
        ("platform", found["platform"]),
        ("processor", f"{processor['name']}, {processor['cores']} cores"),
        ("instructions", " ".join(processor["flags"]) or "unknown"),
        ("memory", f"{bytes_text(room.get('available'))} free of {bytes_text(room.get('total'))}"),
        ("disk here", f"{bytes_text(room.get('disk_free'))} free"),
        ("compiler", built["version"] if built else found["compiler_note"]),
        ("torch threads", torch_part.get("threads", torch_part.get("problem"))),
        ("GPU", gpus),
    ]
    screen.print(table(("", ""), rows))
    screen.print(table(("package", "version"), ((n, v or "missing") for n, v in found["packages"].items())))
    extras = [(n, o["version"] or f"not installed: {o['install']}", o["for"]) for n, o in found["optional"].items()]
    screen.print(table(("optional", "version", "for"), extras))
    if found["plugins"]:
        columns = ("plug-in", "adds", "package", "version")
        cells = [(p["name"], p["kind"], p["package"], p["version"]) for p in found["plugins"]]
        screen.print(table(columns, cells))
    _show_kernels(found["kernels"], bool(torch_part.get("gpus")), screen)
    for problem in found["problems"]:
        screen.print(f"problem: {problem}", markup=False)
    if not found["problems"]:
        screen.print("everything that is needed is here", highlight=False)


def _show_kernels(told: dict[str, Any], gpus: bool, screen: Console) -> None:
    """One row for each op: what runs, and what would be faster but cannot; ``--json`` has every implementation."""
    for part, device in (("explanation", "cpu"), ("gpu", "cuda")):
        rows = told.get(part)
        if isinstance(rows, list) and (gpus or part != "gpu"):
            chosen = {row["op"]: row["implementation"] for row in rows if row["used"]}
            cells = [(op, name, _passed_over(rows, op, device)) for op, name in chosen.items()]
            screen.print(table((f"kernels, {device}", "implementation", "not available here"), cells))
    if "decode_families" in told:
        families = ", ".join(told["decode_families"])
        screen.print(f"the native decode steps cover {families}", markup=False, highlight=False)
    launches = told.get("tables")
    if gpus and isinstance(launches, list) and launches:
        shown = ([row.get(column) for column in launches[0]] for row in launches)
        screen.print(table(list(launches[0]), shown, title="launches of kernels"))
    if not isinstance(told.get("explanation"), list):
        screen.print(f"kernels: {told.get('explanation', told.get('problem'))}", markup=False, highlight=False)


def _passed_over(rows: list[dict[str, Any]], op: str, device: str) -> str:
    """Faster implementations of an op that are made for ``device`` and cannot run, with the reason."""
    reasons = []
    for row in rows:
        if row["op"] == op and row["used"]:
            break
        if row["op"] == op and {device, "any"} & set(row["devices"]):
            reasons.append(f"{row['implementation']}: {row['reason']}")
    return "; ".join(reasons)
