"""Run folders, budgets, disks and memory that cannot do the job; runs that were damaged; experts without tokens."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from malformed.bench import BLOCKS, HIDDEN, Bench, Case, Run

USAGE, RECIPE, ENVIRONMENT, RESOURCES = (2,), (3,), (4,), (5,)


def _at(folder: str) -> Callable[[Bench], Run]:
    """Run in this folder, given relative to the case's."""

    def build(bench: Bench) -> Run:
        (bench.folder / "file").write_text("a file", encoding="utf-8")
        path = bench.folder / folder
        return Run(["run", bench.recipe({"run": {"dir": str(path)}})])

    return build


def _foreign_folder(bench: Bench) -> Run:
    bench.run_dir.mkdir()
    thesis = bench.run_dir / "thesis.tex"
    thesis.write_text("five years of work", encoding="utf-8")

    def inspect(code: int, stderr: str) -> list[str]:
        return [] if thesis.exists() and len(list(bench.run_dir.iterdir())) == 1 else ["the folder was changed"]

    return bench.run(bench.recipe(), inspect=inspect)


def _mounted(bench: Bench, options: str) -> bool:
    """Mount a small file system at the run folder; False where that is not allowed."""
    bench.run_dir.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(bench.run_dir)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _unmount(bench: Bench) -> None:
    subprocess.run(["umount", str(bench.run_dir)], capture_output=True)


def _read_only(bench: Bench) -> Run:
    """A read-only file system; without the right to mount one, a folder without write permission."""
    recipe = bench.recipe()
    if _mounted(bench, "ro,size=1m"):
        return bench.run(recipe, cleanup=partial(_unmount, bench))
    bench.run_dir.chmod(0o555)
    return bench.run(recipe, cleanup=lambda: bench.run_dir.chmod(0o755))


def _no_such_device(bench: Bench) -> Run:
    """A place where not even root can create a folder."""
    return Run(["run", bench.recipe({"run": {"dir": "/proc/llmcompress/run"}})])


def _full_disk(size: str, *words: str) -> Callable[[Bench], Run]:
    """A disk that fills up on the way; without the right to mount one, a limit on the size of files.

    Args:
        size: Of the disk.
        words: ``--no-preflight``, or the run would not begin.
    """

    def build(bench: Bench) -> Run:
        recipe = bench.recipe()
        if _mounted(bench, f"size={size}"):
            # judge what is there before it is unmounted: inspect runs first, cleanup last
            return bench.run(recipe, *words, cleanup=partial(_unmount, bench))
        bench.run_dir.rmdir()
        return bench.run(recipe, *words, before=partial(_limit_files, 20_000))

    return build


def _absent_text(command: str) -> Callable[[Bench], Run]:
    """A command that does not run the recipe, which would fail for want of a text."""

    def build(bench: Bench) -> Run:
        source = {"kind": "jsonl", "path": "gone.jsonl"}
        return Run([command, bench.recipe({"stages": {"calibrate": {"source": source}}})])

    return build


def _limit_files(size: int) -> None:
    """Let every write beyond ``size`` bytes fail instead of ending the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _file_limit(size: int) -> Callable[[Bench], Run]:
    return lambda bench: bench.run(bench.recipe(), before=partial(_limit_files, size))


def _budget(**limits: Any) -> Callable[[Bench], Run]:
    return lambda bench: bench.run(bench.recipe(limits))


def _no_memory(bench: Bench) -> Run:
    """More random tokens than any machine can hold."""
    calibrate = {"source": {"kind": "synthetic", "path": ...}, "samples": 10**13, "length": 128}
    return bench.run(bench.recipe({"stages": {"calibrate": calibrate}}), "--no-preflight")


def _little_memory(bench: Bench) -> Run:
    """An address space too small for the activations; the process itself fits."""
    calibrate = {"source": {"kind": "synthetic", "path": ...}, "samples": 200_000, "length": 128}
    recipe = bench.recipe({"stages": {"calibrate": calibrate, "quantize": {"diagnose_experts": False}}})
    return bench.run(recipe, "--no-preflight", before=_limit_memory)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 900_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_use(bench: Bench) -> Run:
    """Another process is running in the folder; it is held alive until this one has ended."""
    recipe = bench.recipe()
    bench.run_dir.mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmcompress.pipeline.run_dir import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    Path(sys.argv[2]).touch()\n    time.sleep(300)\n"
    )
    ready = bench.folder / "locked"
    holder = subprocess.Popen([sys.executable, "-c", code, str(bench.run_dir), str(ready)])
    while not ready.exists():
        if holder.poll() is not None:
            raise RuntimeError("the process that should hold the lock has ended")
        time.sleep(0.05)

    def cleanup() -> None:
        holder.kill()
        holder.wait()

    return bench.run(recipe, cleanup=cleanup)


def _not_a_run(bench: Bench) -> Run:
    bench.run_dir.mkdir()
    (bench.run_dir / "notes.txt").write_text("nothing", encoding="utf-8")
    return Run(["resume", str(bench.run_dir)], run_dir=bench.run_dir)


def _resumed(change: Callable[[Path], None], *words: str) -> Callable[[Bench], Run]:
    """Damage a run that was stopped after quantizing, then resume it."""

    def build(bench: Bench) -> Run:
        bench.prepared(bench.recipe(), "--until", "quantize")
        change(bench.run_dir)
        damaged = ("00000.safetensors", "00001.safetensors")
        return Run(["resume", str(bench.run_dir), *words], run_dir=bench.run_dir, damaged=damaged)

    return build


def _cut(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def _cut_block(run: Path) -> None:
    _cut(next(iter(sorted((run / "stages" / "quantize").rglob("00001.safetensors")))))


def _empty_block(run: Path) -> None:
    next(iter(sorted((run / "stages" / "quantize").rglob("00000.safetensors")))).write_bytes(b"")


def _flipped_tokens(run: Path) -> None:
    path = run / "stages" / "calibrate" / "tokens.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1
    path.write_bytes(bytes(raw))
    # the quantizing stage is done again, so that the tokens are needed
    record = run / "stages" / "quantize" / "state.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"finished"', '"running"'), encoding="utf-8")


def _text_in(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: print(text, file=(run / name).open("w", encoding="utf-8"))


def _newer_state(run: Path) -> None:
    path = run / "stages" / "quantize" / "state.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "version": 99}), encoding="utf-8")


def _changed_recipe(bench: Bench) -> Run:
    bench.prepared(bench.recipe(), "--until", "quantize")
    return Run(["run", bench.recipe(), "stages.quantize.damp=0.05"], run_dir=bench.run_dir)


def _changed_model(bench: Bench) -> Run:
    """The same path, other weights of the same size."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] *= 2

    bench.prepared(bench.recipe(), "--until", "quantize")
    return Run(["run", bench.recipe(model=bench.with_tensors(change))], run_dir=bench.run_dir)


def _damaged_artifact(change: Callable[[Path], None], *words: str) -> Callable[[Bench], Run]:
    """Use an artifact that has been damaged."""

    def build(bench: Bench) -> Run:
        bench.prepared(bench.recipe())
        folder = bench.run_dir / "artifact"
        change(folder)
        return Run([word.format(folder=folder) for word in words])

    return build


def _config_edit(**values: Any) -> Callable[[Path], None]:
    """Change quantization_config of an artifact."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] |= values
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def _without_tensor(folder: Path) -> None:
    """Take one packed tensor out of an artifact."""
    from safetensors.numpy import load_file, save_file

    path = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if name.endswith("scale"))]
    save_file(tensors, path, metadata={"format": "pt"})


def _starved_expert(bench: Bench) -> Run:
    """A router that never chooses expert 3: it must be rounded to nearest, with a warning, never become NaN."""

    def starve(tensors: dict[str, np.ndarray]) -> None:
        # feature 0 is large and positive in every hidden state, and expert 3 dislikes it
        tensors["model.embed_tokens.weight"][:, 0] = 20.0
        for layer in range(BLOCKS):
            gate = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
            gate[:, 0] = 0.0
            gate[3] = 0.0
            gate[3, 0] = -50.0
        assert gate.shape[1] == HIDDEN

    recipe = bench.recipe({"stages": {"quantize": {"type": "qesc"}}}, model=bench.with_tensors(starve))

    def inspect(code: int, stderr: str) -> list[str]:
        return [] if code else _whole_artifact(bench.run_dir)

    return bench.run(recipe, inspect=inspect)


def _whole_artifact(run: Path) -> list[str]:
    """Whether expert 3 saw no token, and every stored number is finite."""
    from safetensors.numpy import load_file

    found = []
    records = sorted((run / "stages" / "quantize" / "blocks").glob("*.json"))
    counts = [json.loads(path.read_text(encoding="utf-8"))["tokens_per_expert"][3] for path in records]
    if counts != [0] * BLOCKS:
        found.append(f"expert 3 was to see no token, it saw {counts}")
    files = sorted((run / "artifact").glob("*.safetensors"))
    for path in files:
        bad = [n for n, t in load_file(path).items() if t.dtype.kind == "f" and not np.isfinite(t).all()]
        found += [f"{name} is not finite" for name in bad]
    return found if files else [*found, "no artifact"]


_run = partial(Case, torch=True)
_load = partial(Case, torch=True, stage="load")

FOLDERS = [
    _run("run folder is a file", (2, 4), r"file: .*(is a file|not a run folder)", _at("file")),
    _run("run folder below a file", ENVIRONMENT, r"file/run", _at("file/run")),
    _run("run folder that not even root can make", ENVIRONMENT, r"/proc/llmcompress", _no_such_device),
    _run("run folder on a read-only file system", ENVIRONMENT, r"run.*(read-only|cannot write|permission)", _read_only),
    _run("run folder full of other things", USAGE, r"thesis\.tex", _foreign_folder),
    _run("run folder in use", ENVIRONMENT, r"process \d+ .*is running in this folder", _in_use),
    _run("resume what is no run", ENVIRONMENT, r"not a run folder", _not_a_run),
    _run("resume what is not there", ENVIRONMENT, r"not a run folder", lambda b: Run(["resume", str(b.run_dir)])),
]  # fmt: skip

LIMITS = [
    _run("memory budget too small", RESOURCES, r"host\.ram: .*needed.*100 MB allowed", _budget(host={"ram": "100MB"}), stage="load"),
    _run("disk budget too small", RESOURCES, r"host\.disk: .*needed.*allowed", _budget(host={"disk": "1kB"}), stage="load"),
    _run("no machine has this memory", RESOURCES, r"memory", _no_memory, stage="calibrate"),
    _run("memory ends in the middle", RESOURCES, r"memory", _little_memory, stage="quantize"),
    _run("disk full at the start", RESOURCES, r"no space left|disk is full", _full_disk("16k", "--no-preflight"), stage="export"),
    _run("disk full while quantizing", RESOURCES, r"no space left|disk is full", _full_disk("72k", "--no-preflight"), stage="export"),
    _run("disk full while exporting", RESOURCES, r"no space left|disk is full", _full_disk("190k", "--no-preflight"), stage="export"),
    _run("disk too small, seen before the run", RESOURCES, r"are still to be written|too large", _full_disk("72k"), stage="load"),
    _run("validate, a text that is not there", ENVIRONMENT, r"calibrate\.source\.path: no such file", _absent_text("validate")),
    _run("plan, a text that is not there", ENVIRONMENT, r"calibrate\.source\.path: no such file", _absent_text("plan")),
    _run("file size limit while quantizing", RESOURCES, r"(file too large|no space left|size limit)", _file_limit(6_000), stage="quantize"),
    _run("file size limit while exporting", RESOURCES, r"(file too large|no space left|size limit)", _file_limit(90_000), stage="export"),
]  # fmt: skip

DAMAGE = [
    _run("finished block cut short", ENVIRONMENT, r"00001\.safetensors: ", _resumed(_cut_block), stage="export"),
    _run("finished block empty", ENVIRONMENT, r"00000\.safetensors: ", _resumed(_empty_block), stage="export"),
    _run("calibration tokens altered", ENVIRONMENT, r"tokens do not match their hash", _resumed(_flipped_tokens), stage="quantize"),
    _run("stage record damaged", ENVIRONMENT, r"state\.json: damaged", _resumed(_text_in("stages/quantize/state.json", '{"name": '))),
    _run("stage record of another version", ENVIRONMENT, r"another version", _resumed(_newer_state)),
    _run("run record damaged", ENVIRONMENT, r"run\.json: damaged", _resumed(_text_in("run.json", "[]"))),
    _run("lock damaged", RECIPE, r"recipe\.lock\.json", _resumed(_text_in("recipe.lock.json", "{"))),
    _run("resume with another recipe", RECIPE, r"made with another recipe.*(quantize).*damp", _changed_recipe, stage="export"),
    _run("resume with another model", RECIPE, r"made with another recipe.*model", _changed_model, stage="export"),
    _run("artifact cut short", ENVIRONMENT, r"(damaged|cannot be loaded)", _damaged_artifact(lambda f: _cut(f / "model.safetensors"), "generate", "{folder}", "-p", "Hello")),
    _run("artifact without one tensor", ENVIRONMENT, r"missing: .*scale", _damaged_artifact(_without_tensor, "generate", "{folder}", "-p", "Hello")),
    _run("artifact of a later format", ENVIRONMENT, r"version", _damaged_artifact(_config_edit(version=99), "generate", "{folder}", "-p", "Hello")),
    _run("artifact with an unknown codec", ENVIRONMENT, r"codec|spec", _damaged_artifact(_config_edit(specs=[{"bits": 4, "group_size": 32, "symmetric": False, "codec": "wavelets"}]), "generate", "{folder}", "-p", "Hello")),
    _run("artifact with a rule for a weight that is not there", ENVIRONMENT, r"no_such_weight|modules", _damaged_artifact(_config_edit(modules={"no_such_weight": 0}), "generate", "{folder}", "-p", "Hello")),
    _run("artifact with an unknown policy", ENVIRONMENT, r"teleport", _damaged_artifact(_config_edit(policies={"teleport": {}}), "generate", "{folder}", "-p", "Hello")),
]  # fmt: skip

SOUND = [
    _run("expert without tokens", (0,), r"warning.*(token|expert)", _starved_expert),
]  # fmt: skip

CASES = [*FOLDERS, *LIMITS, *DAMAGE, *SOUND]
