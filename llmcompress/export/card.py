"""The model card of an artifact: recipe, results, deviations, provenance, licence and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmcompress.durable import write_durably
from llmcompress.quant.embeddings import EMBEDDINGS

if TYPE_CHECKING:
    from pathlib import Path

    from llmcompress.export.base import Exporter
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.stages.state import Metric, RunState

DEVIATIONS = {
    "qesc": (
        "The paper does not say how routers are optimised, how rare experts are treated or which stream the targets "
        "come from; this project's choices are in the recipe above and in PAPERS.md."
    ),
    "pesf": (
        "Weights of skipped experts are renormalised as the model family does it, where the paper writes one formula "
        "for all families."
    ),
}


def write_card(out: Path, exporter: Exporter, state: RunState, facts: Mapping[str, Any]) -> None:
    """Write ``README.md`` into an artifact; the same run always gives the same bytes.

    Args:
        out: The artifact's folder.
        exporter: Exporter of the format.
        state: Metrics and policies so far, and the packed weights.
        facts: From :func:`~llmcompress.export.provenance.provenance`.
    """
    plan = state.packed.plan() if state.packed is not None else {}
    text = card_text(exporter, facts, plan, state.metrics, state.policies)
    write_durably(out / "README.md", text.encode("utf-8"))


def card_text(
    exporter: Exporter,
    facts: Mapping[str, Any],
    plan: QuantPlan,
    metrics: Iterable[Metric],
    policies: Policies,
) -> str:
    """Compose the card.

    Args:
        exporter: Exporter of the format.
        facts: Provenance.
        plan: How each weight is quantized.
        metrics: What was measured before the export.
        policies: Run-time policies, by name.
    """
    import yaml

    recipe, source = facts["recipe"], facts["source"]
    name = str(recipe.get("name") or source["name"])
    front = {"base_model": source["name"], "library_name": "transformers", "tags": ["llmcompress", exporter.name]}
    if source.get("license"):
        front["license"] = source["license"]
    licence = source.get("license") or "not stated in the source's model card; the source's terms apply"
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=True, allow_unicode=True) + "---",
        f"# {name}",
        f"`{source['name']}` compressed with llmcompress {facts['versions']['llmcompress']}, format `{exporter.name}`.",
        *(["## Loading\n\n" + exporter.loading] if exporter.loading else []),
        "## Weights\n\n" + weights_table(plan, _carried(exporter, policies).get(EMBEDDINGS)),
        "## Results\n\n" + results_table(metrics),
    ]
    if policies:
        parts.append("## Run-time policies\n\n" + "\n\n".join(_policy_lists(exporter, policies)))
    types = {str(stage.get("type")) for stage in dict(recipe.get("stages") or {}).values()}
    deviations = [text for kind, text in sorted(DEVIATIONS.items()) if kind in types]
    if deviations:
        parts.append("## Deviations from the papers\n\n" + "\n".join(f"- {text}" for text in deviations))
    parts += [
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) + "```",
        "## Provenance\n\n" + provenance_list(facts),
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(parts) + "\n"


def _policy_lists(exporter: Exporter, policies: Policies) -> Iterator[str]:
    """The policies that act after loading, then those that the format lacks."""
    lost = policies.keys() - _carried(exporter, policies)
    for heading, keys in (("Active after loading.", policies.keys() - lost), ("Not carried by this format.", lost)):
        if keys:
            yield heading
            yield "\n".join(f"- `{key}`: {_inline(policies[key])}" for key in sorted(keys))


def _carried(exporter: Exporter, policies: Policies) -> dict[str, Mapping[str, Any]]:
    """The policies that the format does not lose."""
    return {key: value for key, value in policies.items() if not exporter.losses({key: value})}


def weights_table(plan: QuantPlan, rounded: Mapping[str, Any] | None = None) -> str:
    """How many weights have which scheme.

    Args:
        plan: How each weight is quantized.
        rounded: The policy by which embedding and head are stored; None where they are dense.
    """
    rest = "everything else is stored dense."
    if rounded is not None:
        rest = f"embedding and head have {rounded['bits']} bits, everything else is stored dense."
    if not plan:
        return "All weights are dense." if rounded is None else rest.capitalize()
    counts: dict[tuple[int, int, bool], int] = {}
    for spec in plan.values():
        key = (spec.bits, spec.group_size, spec.symmetric)
        counts[key] = counts.get(key, 0) + 1
    lines = ["| tensors | bits | group size | grid |", "|---|---|---|---|"]
    for (bits, group, symmetric), count in sorted(counts.items()):
        size = "row" if group == -1 else str(group)
        lines.append(f"| {count} | {bits} | {size} | {'symmetric' if symmetric else 'asymmetric'} |")
    return "\n".join(lines) + "\n\nA stack of experts counts as one tensor; " + rest


def results_table(metrics: Iterable[Metric]) -> str:
    """Dense, compressed and difference of every metric."""
    rows = list(metrics)
    if not rows:
        return "Nothing was evaluated before this export."
    lines = ["| task | metric | dense | compressed | difference |", "|---|---|---|---|---|"]
    for row in rows:
        if _is_timing(row.metric):
            continue
        both = row.dense is not None and row.compressed is not None
        difference = f"{row.compressed - row.dense:+.4g}" if both else ""  # type: ignore[operator]
        lines.append(
            f"| {_cell(row.task)} | {_cell(row.metric)} | {_number(row.dense)} | {_number(row.compressed)} "
            f"| {difference} |"
        )
    return "\n".join(lines)


def provenance_list(facts: Mapping[str, Any]) -> str:
    """Nested facts as a flat list."""
    lines = []
    for section in ("source", "calibration", "compute", "versions"):
        for key, value in dict(facts.get(section) or {}).items():
            if value is not None:
                lines.append(f"- {section} {key.replace('_', ' ')}: {_cell(str(value))}")
    return "\n".join(lines)


def _is_timing(metric: str) -> bool:
    """Timings differ between runs, and the card must not."""
    return any(word in metric for word in ("seconds", "time", "tokens_per", "speed"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _inline(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {item}" for key, item in sorted(value.items()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")
