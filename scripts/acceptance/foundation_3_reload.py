#!/usr/bin/env python3
"""Foundation 3: a fresh process loads the artifact to the very logits of the in-memory model, as small as on disk.

Three processes: the run; one that builds the compressed model from the run folder's packed blocks; and one that
knows only the artifact and ``import llmcompress.hf``. They share nothing but files.

    python scripts/acceptance/foundation_3_reload.py [KEY=VALUE ...]     overrides of the recipe
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import llmcompress, verdict

RECIPE = "smoke/eac_moe_tiny"
DTYPES = ("auto", "float32")
WINDOWS = 4
TOLERANCE = 0.05


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        {"in-memory": in_memory, "loaded": loaded}[sys.argv[2]](Path(sys.argv[3]))
        return
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-reload-"))
    llmcompress("run", RECIPE, *sys.argv[1:], f"run.dir={folder / 'run'}", stderr=subprocess.DEVNULL)
    for part in ("in-memory", "loaded"):
        subprocess.run([sys.executable, __file__, "--part", part, str(folder)], check=True)
    found = json.loads((folder / "loaded.json").read_text())
    stored = sum(path.stat().st_size for path in (folder / "run" / "artifact").glob("*.safetensors"))
    shutil.rmtree(folder)
    report(found, stored)


def report(found: dict[str, Any], stored: int) -> None:
    """Print every figure and the verdict."""
    excess = found["resident"] / stored - 1
    for name, equal in found["equal"].items():
        print(f"{name}: {equal['same']} of {equal['values']} logits equal")
    print(f"weights in memory {found['resident']:,} bytes, on disk {stored:,} ({excess:+.2%})")
    print(f"a further copy of the model adds {found['growth']:,} resident bytes by the kernel's account")
    exact = all(equal["same"] == equal["values"] for equal in found["equal"].values())
    compared = sum(equal["values"] for equal in found["equal"].values())
    figure = f"{compared:,} logits {'exactly equal' if exact else 'DIFFER'}; weights in memory {excess:+.2%} of disk"
    verdict(exact and abs(excess) <= TOLERANCE and compared > 0, figure)


def in_memory(folder: Path) -> None:
    """Build the model from the packed blocks of the run, save tokens and logits."""
    import torch
    from safetensors.torch import save_file

    from llmcompress.cli.run import load_job, quoted
    from llmcompress.models.assemble import compressed_model
    from llmcompress.pipeline.runner import Runner, RunOptions

    run = folder / "run"
    job = load_job(str(run / "recipe.lock.json"), [f"run.dir={quoted(str(run))}"])
    with Runner(job, RunOptions()).restored("reload") as (state, _):
        assert state.model is not None
        assert state.packed is not None
        assert state.calibration is not None
        tensors = {"tokens": state.calibration.tokens[:WINDOWS].clone()}
        for name in DTYPES:
            dtype = None if name == "auto" else getattr(torch, name)
            model = compressed_model(state.model, state.packed, state.policies, dtype=dtype)
            with torch.inference_mode():
                tensors[name] = model(input_ids=tensors["tokens"]).logits.clone()
        save_file(tensors, folder / "expected.safetensors")


def loaded(folder: Path) -> None:
    """Load the artifact as a user would, compare logits, weigh the model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import llmcompress.hf  # noqa: F401 - teaches transformers the format

    logging.disable_progress_bar()

    artifact = folder / "run" / "artifact"
    expected = load_file(folder / "expected.safetensors")
    equal = {}
    for name in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(artifact, dtype=name)
        with torch.inference_mode():
            logits = model(input_ids=expected["tokens"]).logits
        same = int((logits == expected[name]).sum()) if logits.dtype == expected[name].dtype else 0
        equal[name] = {"same": same, "values": logits.numel()}
    del model
    # the first load also pays for code, and for the scratch space of a forward pass; a second copy beside a living
    # first one shows the weights alone, once a forward pass has touched every page of them
    first = fresh_copy(artifact, expected["tokens"])
    before = resident_bytes()
    second = fresh_copy(artifact, expected["tokens"])
    growth = resident_bytes() - before
    storages = [tensor.untyped_storage() for tensor in (*second.parameters(), *second.buffers())]
    resident = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    del first
    result = {"equal": equal, "resident": resident, "growth": growth}
    (folder / "loaded.json").write_text(json.dumps(result))


def fresh_copy(artifact: Path, tokens: Any) -> Any:
    """Load the artifact and run it once; memory that is free afterwards goes back to the system."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto")
    with torch.inference_mode():
        model(input_ids=tokens)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    return model


def resident_bytes() -> int:
    """Resident memory of this process now."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
