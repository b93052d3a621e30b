"""The ``export`` stage: write the compressed model in one or more formats and read each back.

A format that cannot hold the model refuses before anything is written, with its reasons. What was
written counts only once an independent reader has returned the very values this project decodes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmcompress.durable import write_durably
from llmcompress.errors import ExportError
from llmcompress.export.base import artifact_folder
from llmcompress.export.registry import formats
from llmcompress.models.paths import ADAPTER
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmcompress.export.base import Exporter
    from llmcompress.models.layout import ModelLayout
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.stages.state import RunContext, RunState

if TYPE_CHECKING:
    FormatName = str
else:
    # those of other packages by name alone, which loads none of them
    FormatName = Literal[formats()]


class ExportConfig(StageConfig):
    """Recipe section of the export stage."""

    type: Literal["export"]

    formats: Annotated[tuple[FormatName, ...], Field(min_length=1)] = ("native",)
    """Formats to write. ``native`` holds everything; the others refuse what they cannot represent exactly."""

    dir: str | None = None
    """Folder of the native artifact; other formats go beside it as ``<dir>-<format>``. Default: ``artifact`` in
    the run directory."""

    dense_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the ``dense`` format; ``auto`` is the source's, tensor by tensor."""


class Export(Stage):
    """Writes artifacts, reads them back, adds a model card."""

    Config = ExportConfig
    consumes = frozenset({Kind.MODEL, Kind.PACKED})
    produces = frozenset({Kind.ARTIFACT})
    config: ExportConfig

    def refusals(
        self, layout: ModelLayout, plan: QuantPlan, policies: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[str]]:
        """Reasons for which each format cannot hold this model, by format; formats without any are left out.

        Args:
            layout: The model's layout.
            plan: How each weight is quantized.
            policies: Run-time policies (PESF), by name.
        """
        found = {e.name: e.refusals(layout, plan, policies) for e in self._exporters()}
        return {name: reasons for name, reasons in found.items() if reasons}

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Size of everything that will be written; refusals and remarks appear among the notes."""
        plan, notes, total, largest = dict(inputs.specs), [], 0, 0
        refused: list[str] = []
        for exporter in self._exporters():
            reasons = exporter.refusals(inputs.layout, plan, inputs.policies)
            notes += [f"{exporter.name} would be refused: {reason}" for reason in reasons]
            refused += [f"export {exporter.name}: {reason}" for reason in reasons]
            if not reasons:
                notes += [f"{exporter.name}: {remark}" for remark in exporter.remarks(inputs.layout, plan)]
                facts = (inputs.layout, plan, inputs.weight_bytes, inputs.policies)
                total += exporter.output_bytes(*facts)
                largest = max(largest, exporter.working_bytes(*facts))
        return Estimate(ram=largest, disk=total, output=total, notes=tuple(notes), refusals=tuple(refused))

    def require_source(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> None:
        """Refuse a source model whose config or tokenizer a format cannot translate; needs no torch.

        Args:
            folder: The source model.
            config: Its ``config.json``.
            tokenizer: Folder of the tokenizer, if it is another one.

        Raises:
            ExportError: With every reason of every format.
        """
        self._raise({e.name: e.source_refusals(folder, config, tokenizer) for e in self._exporters()})

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Write every format; formats finished by an interrupted earlier attempt are only read back again.

        Raises:
            ExportError: A format refuses the model, the target exists, or what was written reads back differently.
        """
        from llmcompress.export.card import write_card
        from llmcompress.export.provenance import provenance

        self.require(state)
        assert state.model is not None and state.packed is not None
        layout, plan = state.model.layout, state.packed.plan()
        facts = provenance(state, ctx)
        for exporter in self._exporters():
            for loss in exporter.losses(state.policies):
                ctx.emit("warning", text=f"export {exporter.name}: {loss}")
            for remark in exporter.remarks(layout, plan):
                ctx.emit("note", text=f"{exporter.name}: {remark}")
            out = self._target(exporter.name, ctx)
            self._write_once(exporter, state, out, facts, ctx)
            exporter.read_back(out, state.model, state.packed, state.policies)
            if state.adapter is not None:
                _put_adapter(state.adapter, out)
            write_card(out, exporter, state, facts)
            size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
            ctx.emit("metric", name=f"export.{exporter.name}.bytes", value=size)
            ctx.emit("note", text=f"{exporter.name}: {out} ({bytes_text(size)}, read back equal)")
            state.artifacts[exporter.name] = out

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Point the state at the artifacts written earlier.

        Raises:
            ExportError: An artifact has been removed since.
        """
        for exporter in self._exporters():
            out = self._target(exporter.name, ctx)
            if not out.is_dir():
                raise ExportError(
                    f"{out}: the artifact of a finished stage is gone", f"--redo {ctx.stage} writes it again"
                )
            state.artifacts[exporter.name] = out

    def _exporters(self) -> list[Exporter]:
        from llmcompress.export.registry import exporter

        return [exporter(name, dense_dtype=self.config.dense_dtype) for name in dict.fromkeys(self.config.formats)]

    def require(self, state: RunState, advice: str | None = None) -> None:
        """Refuse a model that a format cannot hold, naming every reason of every format.

        Args:
            state: The model and its packed weights.
            advice: What to do where no recipe asked for the formats.

        Raises:
            ExportError: A format cannot, or there is nothing to export.
        """
        model = state.model
        if model is None or state.packed is None:
            raise ExportError("export needs a loaded model and a quantizing stage before it")
        reasons = self.refusals(model.layout, state.packed.plan(), state.policies)
        for exporter in self._exporters():
            if state.adapter is not None and exporter.name != "native":
                # an artifact without it would be a model nobody has measured
                reasons.setdefault(exporter.name, []).append("it has no place for the trained adapter")
            found = exporter.source_refusals(model.path, model.config, model.tokenizer_path)
            reasons[exporter.name] = reasons.get(exporter.name, []) + found
        self._raise(reasons, advice)

    def _raise(self, reasons: Mapping[str, list[str]], advice: str | None = None) -> None:
        lines = [f"export {name}: {reason}" for name, found in reasons.items() for reason in found]
        if lines:
            refused = ", ".join(name for name, found in reasons.items() if found)
            raise ExportError("\n".join(lines), advice or f"take {refused} out of stages.{self.name}.formats")

    def _target(self, name: str, ctx: RunContext) -> Path:
        base = Path(self.config.dir) if self.config.dir else ctx.run_dir / "artifact"
        return artifact_folder(base, name)

    def _write_once(
        self, exporter: Exporter, state: RunState, out: Path, facts: dict[str, Any], ctx: RunContext
    ) -> None:
        """Write ``out`` unless this stage already did so before it was interrupted.

        Exporters write beside ``out`` and rename, so that ``out`` is complete whenever it exists; the
        note in the stage's folder tells an artifact of ours from somebody else's.
        """
        assert state.model is not None
        assert state.packed is not None
        begun = ctx.stage_dir / f"{exporter.name}.begun.json"
        if out.exists():
            if begun.exists():
                return
            if not out.is_relative_to(ctx.run_dir):
                raise ExportError(f"{out}: already exists", f"remove it or set stages.{self.name}.dir to a new folder")
            shutil.rmtree(out)
        write_durably(begun, json.dumps({"out": out.name}).encode())
        exporter.write(state.model, state.packed, state.policies, out, facts)


def _put_adapter(adapter: Path, out: Path) -> None:
    """Copy the adapter into the artifact, where loading finds it; merging it into codes would quantize them again."""
    target = out / ADAPTER
    if not target.exists():
        part = out / f"{ADAPTER}.partial"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(adapter, part)
        part.rename(target)
