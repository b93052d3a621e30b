#!/usr/bin/env python3
"""Check the rules of architecture that no general linter knows.

1. Imports go downward only (LAYERS).
2. Modules that must load without torch import it nowhere at top level (TORCH_FREE).
3. Files stay under 600 lines, functions under 80 (kernels: 150).
4. No file is called utils, helpers, common or misc.

    python scripts/lint_layers.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmcompress"

# each package may import from its own rank or a higher number
LAYERS = {
    "cli": 0, "pipeline": 1, "recipe": 2, "stages": 3, "report": 4, "training": 4, "export": 4, "evaluation": 4,
    "serving": 4, "data": 5, "hf": 5, "inference": 5, "models": 6, "nn": 6, "plugins": 6, "algorithms": 7, "quant": 7,
    "distributed": 8, "events": 8, "durable": 9, "errors": 9, "section": 9, "units": 9, "__init__": 9,
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "safetensors", "tokenizers"}
TORCH_FREE = (
    "cli/", "recipe/", "stages/", "pipeline/", "models/layout.py", "models/families/", "models/registry.py",
    "models/sizes.py", "models/paths.py", "models/tokenizer_files.py", "quant/spec.py", "quant/rules.py",
    "quant/packed.py", "quant/states.py", "quant/store.py", "quant/embeddings.py",
    "serving/limits.py", "distributed/", "durable.py", "errors.py", "events.py", "units.py",
)  # fmt: skip
BANNED = {"utils", "helpers", "common", "misc"}


def top_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of imports executed at import time."""
    for node in tree.body:
        body = [node]
        if isinstance(node, ast.Try):
            body = node.body
        for inner in body:
            if isinstance(inner, ast.Import):
                yield from ((inner.lineno, alias.name) for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                yield inner.lineno, inner.module


def all_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import that can run; imports for type checkers alone are free."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
        yield from all_imports(node)


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def check_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield breaches of rules 1 and 2."""
    relative = path.relative_to(PACKAGE).as_posix()
    own = LAYERS.get(layer(path))
    for line, module in all_imports(tree):
        parts = module.split(".")
        if parts[0] != "llmcompress" or len(parts) < 2 or own is None:
            continue
        target = LAYERS.get(parts[1])
        if target is not None and target < own:
            yield f"{relative}:{line}: {layer(path)} may not import {module} (upward)"
    if relative.startswith(TORCH_FREE):
        for line, module in top_level_imports(tree):
            if module.split(".")[0] in HEAVY:
                yield f"{relative}:{line}: {module} at top level; import it where it is used"


def check_sizes(path: Path, text: str, tree: ast.Module, limit: int) -> Iterator[str]:
    """Yield breaches of rules 3 and 4."""
    relative = path.relative_to(ROOT).as_posix()
    if path.stem in BANNED:
        yield f"{relative}: the name says nothing about what is inside"
    if (lines := text.count("\n")) > 600:
        yield f"{relative}: {lines} lines, at most 600"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                yield f"{relative}:{node.lineno}: {node.name} has {length} lines, at most {limit}"


def main() -> int:
    problems: list[str] = []
    for base, limit in ((PACKAGE, 80), (ROOT / "kernels", 150), (ROOT / "scripts", 80)):
        for path in sorted(base.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            problems += check_sizes(path, text, tree, limit)
            if base is PACKAGE:
                problems += check_imports(path, tree)
    print("\n".join(problems) or "layers, sizes and names are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
