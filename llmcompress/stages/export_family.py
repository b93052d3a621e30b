"""Stage ``export_family``: one artifact for all members, read back and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmcompress.durable import write_durably
from llmcompress.errors import ExportError
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from llmcompress.stages.state import FamilyState, RunContext, RunState


class ExportFamilyConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["export_family"] = "export_family"

    dir: str | None = None
    """Folder of the artifact; by default ``artifact`` in the run directory."""


class ExportFamily(Stage):
    """Writes a family's artifact."""

    Config: ClassVar[type[StageConfig]] = ExportFamilyConfig
    consumes = frozenset({Kind.FAMILY})
    produces = frozenset({Kind.ARTIFACT})
    config: ExportFamilyConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One node over all weights is held while it is written; its size is that of the rqt stage's output."""
        linears = sum(v.out_features * v.in_features for b in inputs.layout.blocks for v in b.linears())
        outside = max((view.shape[0] * view.shape[-1] for view in inputs.layout.outside), default=0)
        return Estimate(ram=linears * 6 // 8 + outside * 8)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Write and read back; an artifact finished by an interrupted attempt is only read back.

        Raises:
            ExportError: The target exists, cannot be written or reads back differently.
        """
        from llmcompress.export.family import artifact_bytes, read_back, stored_bits, write_card, write_family
        from llmcompress.export.provenance import provenance

        assert state.family is not None, "the pipeline checks that an rqt stage comes first"
        out, begun = self._target(ctx), ctx.stage_dir / "begun.json"
        if out.exists() and not begun.exists():
            if not out.is_relative_to(ctx.run_dir):
                raise ExportError(f"{out}: already exists", f"remove it or set stages.{self.name}.dir to a new folder")
            shutil.rmtree(out)
        if not out.exists():
            write_durably(begun, json.dumps({"out": out.name}).encode())
            write_family(state.family, out, provenance(state, ctx), member_facts(state.family))
        read_back(out, state.family)
        sizes = artifact_bytes(out)
        facts = {"bytes": sizes, "linear_bits": stored_bits(state.family.plan, out)}
        write_durably(ctx.stage_dir / "sizes.json", json.dumps(facts, indent=1, sort_keys=True).encode())
        write_card(out, state.family.plan, str(ctx.recipe.get("name", "family")))
        ctx.emit("metric", name="export_family.bytes", value=sum(sizes.values()))
        ctx.emit(
            "note",
            text=f"{out} ({bytes_text(sum(sizes.values()))}, {facts['linear_bits']:.3f} bits per weight and member in "
            "the trees, read back equal)",
        )
        state.artifacts["native"] = out

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Point the state at the artifact.

        Raises:
            ExportError: It has been removed since.
        """
        out = self._target(ctx)
        if not out.is_dir():
            raise ExportError(f"{out}: the artifact of a finished stage is gone", f"--redo {ctx.stage} writes it again")
        state.artifacts["native"] = out

    def _target(self, ctx: RunContext) -> Path:
        return Path(self.config.dir) if self.config.dir else ctx.run_dir / "artifact"


def member_facts(family: FamilyState) -> dict[str, Any]:
    """Mean errors and what is kept of each member's difference to the base, from the blocks' records."""
    sums: dict[str, dict[str, list[float]]] = {}
    for _index, patch in family.store.blocks():
        for member, record in patch.record.get("members", {}).items():
            mine = sums.setdefault(member, {"error": [], "retention": [], "cosine": [], "signs": [], "delta": []})
            mine["error"] += record["errors"].values()
            for retention, cosine, signs, size in record["kept"].values():
                for key, value in zip(("retention", "cosine", "signs", "delta"), (retention, cosine, signs, size)):
                    mine[key].append(value)
    return {
        member: {key: sum(values) / len(values) if values else 0.0 for key, values in mine.items()}
        for member, mine in sorted(sums.items())
    }
