#!/usr/bin/env python3
"""Names of the arguments of the parts of vLLM that S2R calls, read from its sources without importing them.

    python scripts/vllm_signatures.py VERSION=FOLDER … > tests/data/vllm_signatures.json

FOLDER is an unpacked source distribution of vLLM.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

METHODS = {
    "vllm/entrypoints/llm.py": ("__init__", "generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up"),
    "vllm/v1/worker/gpu_worker.py": ("reload_weights",),
}
# class → file; of fields that are arguments
FIELDS = {
    "EngineArgs": "vllm/engine/arg_utils.py", "SamplingParams": "vllm/sampling_params.py",
    "CompletionOutput": "vllm/outputs.py", "Logprob": "vllm/logprobs.py", "TokensPrompt": "vllm/inputs/data.py",
}  # fmt: skip
# where later versions have them
MOVED = {"TokensPrompt": "vllm/inputs/llm.py"}


def arguments(function: ast.FunctionDef) -> dict[str, list[str]]:
    """Names of a method's arguments: by place, by name alone, and those that must be given."""
    own = function.args
    placed = [a.arg for a in (*own.posonlyargs, *own.args)][1:]
    needed = placed[: len(placed) - len(own.defaults)]
    needed += [a.arg for a, default in zip(own.kwonlyargs, own.kw_defaults) if default is None]
    return {
        "placed": placed, "named": [a.arg for a in own.kwonlyargs], "needed": needed,
        "rest": [a.arg for a in (own.vararg, own.kwarg) if a],
    }  # fmt: skip


def class_of(path: Path, name: str) -> ast.ClassDef | None:
    """A class of a file, None if it is not there."""
    if not path.exists():
        return None
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    return next((node for node in found if node.name == name), None)


def read(folder: Path) -> dict[str, object]:
    """All of a source tree."""
    found: dict[str, object] = {}
    for file, wanted in METHODS.items():
        for node in ast.walk(ast.parse((folder / file).read_text())):
            # of overloads the last is the method itself
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                known = found.get(node.name)
                if node.name != "__init__" or known is None:
                    found[node.name] = arguments(node)
    for name, file in FIELDS.items():
        own = class_of(folder / file, name) or class_of(folder / MOVED.get(name, file), name)
        if own is None:
            raise SystemExit(f"{folder}: no class {name} in {file}")
        names = [n.target.id for n in own.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        found[name] = [field for field in names if not field.startswith("_")]
    return found


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    print(json.dumps({version: read(Path(folder)) for version, folder in given.items()}, indent=1))


if __name__ == "__main__":
    main()
