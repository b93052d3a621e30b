"""The report's section on a family: the tree, bits per node, what each member lost, and other methods beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.durable import read_json
from llmcompress.errors import InputError
from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.tree import drawn

Json = dict[str, Any]

METHOD_NAMES = {
    "rqt": "this tree", "gptq-2": "GPTQ, 2 bits, each alone", "gptq-3": "GPTQ, 3 bits, each alone",
    "gptq-4": "GPTQ, 4 bits, each alone", "bitdelta": "BitDelta, 16-bit base", "bitdelta-4": "BitDelta, 4-bit base",
    "low_rank": "low-rank differences, 16-bit base", "rtvq": "RTVQ, 16-bit base",
}  # fmt: skip


def family_section(run_dir: Path) -> Json | None:
    """What the page shows of a family, None when the run has none."""
    for path in sorted((run_dir / "stages").glob("*/plan.json")):
        data = read_json(path)
        if isinstance(data, Mapping) and "trees" in data:
            try:
                plan = FamilyPlan.from_dict(data, str(path))
            except InputError:
                return None
            return _section(run_dir, path.parent, plan)
    return None


def _section(run_dir: Path, folder: Path, plan: FamilyPlan) -> Json:
    main = plan.trees.get("model") or next(iter(plan.trees.values()))
    label = {name: f"{plan.mean_bits(name):.2f} bits" for name in plan.node_names()}
    measured: Json = next((m for p in (run_dir / "stages").glob("*/family.json") if (m := read_json(p))), {})
    kept = _kept(folder)
    members = []
    for name in plan.order:
        figures = measured.get("members", {}).get(name, {})
        members.append(
            {
                "name": name,
                "dense": _number(figures.get("dense")), "compressed": _number(figures.get("compressed")),
                "relative": _percent(figures.get("relative")),
                "retention": _percent(kept.get(name, {}).get("retention")),
                "cosine": _number(kept.get(name, {}).get("cosine"), 2), "bits": f"{plan.path_bits(name):.2f}",
            }
        )  # fmt: skip
    methods = [
        {
            "name": METHOD_NAMES.get(name, name), "bits": f"{row['bits']:.2f}", "loss": _percent(row["mean_relative"]),
            "kl": _number(row["kl"], 4) if "kl" in row else "",
        }
        for name, row in sorted(measured.get("methods", {}).items(), key=lambda item: item[1]["bits"])
    ]  # fmt: skip
    return {
        "tree": "\n".join(drawn(main, label)),
        "trees": len(plan.trees),
        "bits": f"{plan.linear_bits():.3f}",
        "members": members,
        "methods": methods,
        "growth": _growth(plan),
        "strangers": _strangers(measured.get("cross", {}).get("rqt", {})),
    }


def _growth(plan: FamilyPlan) -> list[Json]:
    """Bits per weight and member if the family had more members like these: only leaves are added."""
    total = sum(plan.node_bytes(node) for node in plan.node_names())
    leaves = [plan.node_bytes(member) for member in plan.order]
    leaf = sum(leaves) / len(leaves)
    shared = total - sum(leaves)
    counts = sorted({2, 4, len(plan.order), len(plan.order) + 1, 16, 32})
    return [{"members": m, "bits": f"{8 * (shared / m + leaf) / plan.weights:.2f}"} for m in counts]


def _kept(folder: Path) -> dict[str, dict[str, float]]:
    """Mean retention and cosine of each member from the blocks' records."""
    sums: dict[str, list[list[float]]] = {}
    for path in sorted((folder / "blocks").glob("*.json")):
        record = read_json(path)
        for name, each in (record or {}).get("members", {}).items():
            sums.setdefault(name, []).extend(each.get("kept", {}).values())
    found = {}
    for name, rows in sums.items():
        if rows:
            found[name] = {
                "retention": sum(row[0] for row in rows) / len(rows), "cosine": sum(row[1] for row in rows) / len(rows)
            }  # fmt: skip
    return found


def _strangers(cross: Mapping[str, Mapping[str, float]]) -> str:
    """Whether each member is still the best on its own text."""
    if not cross:
        return ""
    beaten = [n for n in cross if any(cross[o][n] <= cross[n][n] for o in cross if o != n)]
    return f"On their own text another member does better than {', '.join(beaten)}." if beaten else (
        "Every member is better on its own text than every other member."
    )  # fmt: skip


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%".replace("-", "−")
