#!/usr/bin/env python3
"""RQT 4: what a family takes on disk and in memory, beside its members as dense models.

The size of every file counts, headers too. Memory is what a process holds resident after loading all members and one
forward pass of a mixed batch, less what it held after loading them once before and letting them go; the dense models
are in bf16, as they are stored.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from family_runs import MEMBERS, MODELS, artifact, need_models
from harness import verdict

RESIDENT = """
import ctypes, gc, json, sys
import psutil, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.family_model import load_members

torch.set_num_threads(1)
kind, names = sys.argv[1], sys.argv[3:]
ids = torch.arange(8).repeat(len(names), 1) + 5


def hold():
    if kind == "dense":
        held = [AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16").eval() for name in names]
        with torch.inference_mode():
            for model, row in zip(held, ids):
                model(row[None])
        return held
    held = load_members(FamilyArtifact(Path(sys.argv[2])), dtype=torch.bfloat16)
    held(ids, held.members)
    return held


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


# once to load every library and to fill every pool, then what holding takes
held = hold()
del held
before = resident()
held = hold()
print(json.dumps({"rss": resident() - before}))
"""


def resident(kind: str, folder: Path) -> int:
    """Resident bytes that holding the models takes in a process of its own."""
    names = [str(MODELS / name) for name in MEMBERS]
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, kind, str(folder), *names], capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1])["rss"])


def size(folder: Path, pattern: str = "**/*") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def main() -> None:
    need_models()
    from llmcompress.models.family_artifact import FamilyArtifact

    with tempfile.TemporaryDirectory() as temporary:
        folder = artifact(Path(temporary))
        family = FamilyArtifact(folder)
        plan = family.plan
        formula = sum(plan.node_bytes(node) for node in plan.node_names())
        nodes = size(folder, "nodes/*")
        bits = 8 * nodes / (plan.weights * len(plan.order))
        whole, dense = size(folder), sum(size(MODELS / name) for name in MEMBERS)
        tensors = sum(size(MODELS / name, "*.safetensors") for name in MEMBERS)
        memory = {kind: resident(kind, folder) for kind in ("family", "dense")}
    m = len(plan.order)
    print(f"linear weights: {plan.linear_bits():.3f} bits by the plan, {bits:.3f} from file sizes ({nodes} bytes)")
    print(f"on disk: family {whole} bytes, {m} dense models {dense} bytes (tensors {tensors}): 1 : {dense / whole:.2f}")
    print(f"resident: family {memory['family']} bytes, dense models {memory['dense']} bytes")
    conditions = {
        "files within 2.2 bits": bits <= 2.2,
        "files are the plan's bytes and headers": formula <= nodes <= 1.06 * formula,
        "smaller on disk than a third of the dense models": 3 * whole <= dense,
        "smaller in memory than half of the dense models": 2 * memory["family"] <= memory["dense"],
    }
    failed = [name for name, holds in conditions.items() if not holds]
    verdict(
        not failed,
        f"{m} members: {bits:.3f} bits a linear weight stored, disk 1 : {dense / whole:.2f}, resident "
        f"{memory['family'] / 1e6:.1f} MB against {memory['dense'] / 1e6:.1f} MB; short of: {failed or 'nothing'}",
    )


if __name__ == "__main__":
    main()
