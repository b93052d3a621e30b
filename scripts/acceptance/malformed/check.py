"""What every case must hold: exit code, one clear message, a next step, and nothing that looks finished."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

from malformed.bench import Case, Run

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def problems(case: Case, run: Run, code: int, stdout: str, stderr: str) -> list[str]:
    """Everything that is not as it must be; empty when the case holds."""
    found = []
    if code not in case.codes:
        found.append(f"exit code {code}, not {' or '.join(map(str, case.codes))}")
    if "Traceback" in stdout + stderr:
        found.append("a traceback")
    found += _message_problems(case, code, stderr)
    if code != 0 and run.run_dir is not None and not case.finishes:
        found += unfinished_problems(run.run_dir, case.stage, run.damaged)
    if case.untouched and run.run_dir is not None and run.run_dir.exists():
        found.append("the run folder exists")
    if code != 0:
        found += [f"{folder.name} exists" for folder in run.outputs if folder.exists()]
    if run.inspect is not None:
        found += run.inspect(code, stderr)
    return found


def _message_problems(case: Case, code: int, stderr: str) -> list[str]:
    """One error with its next step, and the words that tell what is wrong."""
    lines = stderr.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    steps = [i for i, line in enumerate(lines) if line.startswith("next:")]
    if code == 0:
        found = [] if not errors else ["an error message in spite of exit code 0"]
        return found + ([] if re.search(case.message, stderr, re.S) else [f"no match of {case.message!r}"])
    found = []
    if len(errors) != 1:
        found.append(f"{len(errors)} error lines")
    if len(steps) != 1 or not lines[steps[0]].removeprefix("next:").strip():
        found.append(f"{len(steps)} next steps")
    message = "\n".join(lines[errors[0] : steps[0] if steps else None]) if errors else ""
    if not re.search(case.message, message, re.S):
        found.append(f"no match of {case.message!r}")
    if re.search(r"unexpected \w+:", message):
        found.append("reported as unexpected")
    return found


def unfinished_problems(folder: Path, stage: str | None, damaged: tuple[str, ...] = ()) -> list[str]:
    """What in a run folder looks finished though the run failed in ``stage``; ``damaged`` files are passed over."""
    if not folder.is_dir():
        return []
    found = [f"{path.name}/ exists" for path in folder.glob("artifact*") if not path.name.endswith(".partial")]
    if _status(folder / "run.json") == "finished":
        found.append("run.json says finished")
    if stage is not None and _status(folder / "stages" / stage / "state.json") == "finished":
        found.append(f"stage {stage} says finished")
    for path in folder.rglob("*.safetensors"):
        aside = path.name in damaged or any(part.endswith(".partial") for part in path.parts)
        if not aside and not complete(path):
            found.append(f"{path.relative_to(folder)} is cut short")
    return found


def _status(path: Path) -> str | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("status") if isinstance(data, dict) else None


def complete(path: Path) -> bool:
    """Whether a safetensors file holds every byte its header promises."""
    raw = path.read_bytes()
    if len(raw) < 8:
        return False
    length = struct.unpack("<Q", raw[:8])[0]
    try:
        header = json.loads(raw[8 : 8 + length])
    except ValueError:
        return False
    header.pop("__metadata__", None)
    size = sum(math.prod(entry["shape"]) * _WIDTHS[entry["dtype"]] for entry in header.values())
    return len(raw) == 8 + length + size
