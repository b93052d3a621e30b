"""Collect what a run directory says about itself, tolerating whatever is missing.

Only files in the run directory are read: ``recipe.lock.json``, ``run.json``, ``events.jsonl``,
``stages/<name>/state.json``, the ``*.json`` results beside them, ``blocks/*.json`` records and the
headers (never the data) of ``blocks/*.safetensors`` and ``artifact*/*.safetensors``. An
interrupted run, an older one or one without evaluation still gives a report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.durable import read_json
from llmcompress.errors import InputError
from llmcompress.models.tensor_file import header_of
from llmcompress.quant.tensor_writer import DTYPES
from llmcompress.report.self_correction import collect_self_correction

Json = dict[str, Any]

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point")


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One measured figure, as :class:`~llmcompress.stages.state.Metric`, and the stage that measured it."""

    stage: str
    task: str
    metric: str
    dense: float | None
    compressed: float | None
    stderr: float | None = None
    n: int = 0
    higher_is_better: bool | None = None
    difference_stderr: float | None = None

    @property
    def name(self) -> str:
        """``task.metric``."""
        return f"{self.task}.{self.metric}"

    @property
    def difference(self) -> float | None:
        """Compressed minus dense."""
        return None if self.dense is None or self.compressed is None else self.compressed - self.dense

    @property
    def relative(self) -> float | None:
        """Difference as a share of the dense value."""
        return None if self.difference is None or not self.dense else self.difference / abs(self.dense)


@dataclass(frozen=True, slots=True)
class BlockRow:
    """Record of one decoder layer from a quantizing stage."""

    index: int
    seconds: float | None
    errors: dict[str, float]
    tokens: list[float]
    router: Json


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage: what it was, whether it finished, and what it cost."""

    name: str
    type: str
    status: str
    seconds: float | None
    peak_bytes: float | None
    gate_failure: str
    blocks: list[BlockRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SizeParts:
    """Bytes and parameters by part of the model.

    Attributes:
        bytes: Part → stored bytes (``expert codes``, ``attention codes``, ``scales and zeros`` …).
        quantized_values, code_bits: Number of quantized values and the sum of their code widths.
        dense_values, dense_bytes: What stays dense in the blocks.
        outside_values, outside_bytes: Embedding, final norm and head.
        dense_width: Bytes per value of the dense tensors.
    """

    bytes: dict[str, int]
    quantized_values: int
    code_bits: int
    dense_values: int
    dense_bytes: int
    outside_values: int
    outside_bytes: int
    dense_width: float

    @property
    def code_average(self) -> float | None:
        """Average bits over the weights in the blocks without scales and zeros (the papers' convention)."""
        total = self.quantized_values + self.dense_values
        return (self.code_bits + 16 * self.dense_values) / total if self.quantized_values else None

    @property
    def all_in_average(self) -> float | None:
        """Average bits over the same weights with everything that is stored for them."""
        total = self.quantized_values + self.dense_values
        inside = sum(self.bytes.values()) - self.outside_bytes
        return 8 * inside / total if self.quantized_values else None

    @property
    def stored(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes.values())

    @property
    def original(self) -> float:
        """Bytes of the same model with every value in the dense width."""
        return self.dense_width * (self.quantized_values + self.dense_values + self.outside_values)


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows."""

    name: str
    model: str
    source: str
    lock: Json
    run: Json
    recipe: Json
    stages: list[StageRow]
    metrics: list[MetricRow]
    gates: list[Json]
    samples: list[Json]
    decoding: list[Json]
    pesf: list[Json]
    states: list[Json]
    forced_routing: list[Json]
    shift: list[Json]
    self_correction: list[Json]
    warnings: list[str]
    size: SizeParts | None
    artifacts: list[tuple[str, int]]
    finished: bool


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_events(path: Path) -> list[Json]:
    """Read the event log; a last line cut short by a kill is dropped."""
    events = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def dig(data: Mapping[str, Any], *keys: str) -> Any:
    """What lies below these keys, None where one of them is missing."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def collect(run_dir: Path) -> ReportData:
    """Read a run directory.

    Args:
        run_dir: Folder made by ``llmcompress run``, finished or not.
    """
    lock = _mapping(read_json(run_dir / "recipe.lock.json"))
    recipe = _mapping(lock.get("recipe")) or (lock if "stages" in lock else {})
    events = read_events(run_dir / "events.jsonl")
    stages = _stages(run_dir, recipe, events)
    found = _Results()
    for stage in stages:
        found.add_folder(stage.name, run_dir / "stages" / stage.name)
    model = _mapping(recipe.get("model")).get("path", "")
    return ReportData(
        name=str(recipe.get("name") or run_dir.name),
        model=_model_name(str(model)),
        source=_text(run_dir / "recipe.yaml"),
        lock=lock,
        run=_mapping(read_json(run_dir / "run.json")),
        recipe=recipe,
        stages=stages,
        metrics=found.metrics or _metrics_from_events(events),
        gates=found.gates,
        samples=found.samples,
        decoding=found.decoding,
        pesf=found.pesf,
        states=found.states,
        forced_routing=found.forced_routing,
        shift=found.shift,
        self_correction=collect_self_correction(run_dir, [stage.name for stage in stages]),
        warnings=_warnings(events),
        size=_sizes(run_dir, stages),
        artifacts=_artifacts(run_dir),
        finished=all(stage.status == "finished" for stage in stages),
    )


def _mapping(value: Any) -> Json:
    return dict(value) if isinstance(value, Mapping) else {}


def _model_name(path: str) -> str:
    if path.startswith("asset:"):
        return path.removeprefix("asset:")
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    return parts[-1] if path.startswith(("/", ".", "~")) and parts else path


def _stages(run_dir: Path, recipe: Json, events: list[Json]) -> list[StageRow]:
    """Stages in recipe order; those only found on disk follow."""
    folder = run_dir / "stages"
    names = list(_mapping(recipe.get("stages")))
    on_disk = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    names += [name for name in on_disk if name not in names]
    rows = []
    for name in names:
        state = _mapping(read_json(folder / name / "state.json"))
        config = _mapping(_mapping(recipe.get("stages")).get(name))
        ends = [_mapping(e.get("data")) for e in events if e.get("kind") == "stage_end" and e.get("stage") == name]
        seconds = _first_number([state, *ends[::-1]], ("seconds",))
        if seconds is None:
            seconds = _event_span(events, name)
        peak = _first_number([state, *ends[::-1]], ("peak_rss_bytes", "peak_rss", "peak_bytes"))
        status = str(state.get("status") or ("finished" if ends else "not run"))
        blocks = _blocks(folder / name / "blocks")
        kind = str(config.get("type") or state.get("type") or name)
        rows.append(StageRow(name, kind, status, seconds, peak, str(state.get("gate_failure") or ""), blocks))
    return rows


def _first_number(sources: list[Json], keys: tuple[str, ...]) -> float | None:
    for source in sources:
        for key in keys:
            value = number(source.get(key))
            if value is not None:
                return value
    return None


def _event_span(events: list[Json], name: str) -> float | None:
    times = [
        number(e.get("time"))
        for e in events
        if e.get("stage") == name and e.get("kind") in ("stage_start", "stage_end")
    ]
    known = [t for t in times if t is not None]
    return known[-1] - known[0] if len(known) > 1 else None


def _blocks(folder: Path) -> list[BlockRow]:
    rows = []
    for path in sorted(folder.glob("[0-9]*.json")):
        record = _mapping(read_json(path))
        if not path.stem.isdigit() or not record:
            continue
        errors = {str(k): _mean(v) for k, v in _mapping(record.get("errors")).items()}
        tokens = record.get("tokens_per_expert")
        counts = [number(t) or 0.0 for t in tokens] if isinstance(tokens, list) else []
        rows.append(
            BlockRow(
                int(path.stem),
                number(record.get("seconds")),
                {k: v for k, v in errors.items() if v is not None},
                counts,
                _mapping(record.get("router")),
            )
        )
    return rows


def _mean(value: Any) -> float | None:
    if isinstance(value, list):
        known = [v for v in (number(item) for item in value) if v is not None]
        return sum(known) / len(known) if known else None
    return number(value)


class _Results:
    """Results of evaluating stages, recognised by their shape so that file names may change."""

    def __init__(self) -> None:
        self.metrics: list[MetricRow] = []
        self.gates: list[Json] = []
        self.samples: list[Json] = []
        self.decoding: list[Json] = []
        self.pesf: list[Json] = []
        self.states: list[Json] = []
        self.forced_routing: list[Json] = []
        self.shift: list[Json] = []

    def add_folder(self, stage: str, folder: Path) -> None:
        """Take in every JSON result of a stage."""
        for path in sorted(folder.glob("*.json")):
            self._add(stage, path.stem, read_json(path))

    def _add(self, stage: str, key: str, value: Any) -> None:
        rows = [_mapping(v) for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []
        if rows:
            self._add_rows(stage, key, rows)
        elif isinstance(value, Mapping):
            if key == "states" and "heads" in value:
                self.states.append(dict(value))
            elif key.startswith("pesf") and "metrics" not in value:
                self.pesf.append(dict(value))
            elif key.startswith(("forced_routing", "shift_cost")):
                self.forced_routing.append(dict(value))
            else:
                for inner, item in value.items():
                    self._add(stage, str(inner), item)

    def _add_rows(self, stage: str, key: str, rows: list[Json]) -> None:
        first = rows[0]
        if "metric" in first and "compressed" in first:
            self._add_metrics(stage, rows)
        elif "prompt" in first:
            self.samples += rows
        elif "written_by" in first:
            self.decoding += [{**row, "stage": stage} for row in rows]
        elif "gate" in first:
            self.gates += rows
        elif key.startswith(("forced_routing", "shift_cost")):
            self.forced_routing += rows
        elif key in ("expert_shift", "shift", "layers") and {"cr_any", "overlap"} & set(first):
            self.shift += rows
        elif key.startswith("pesf"):
            self.pesf += rows

    def _add_metrics(self, stage: str, rows: list[Json]) -> None:
        known = {(m.stage, m.name) for m in self.metrics}
        for row in rows:
            better = row.get("higher_is_better")
            metric = MetricRow(
                stage,
                str(row.get("task", "")),
                str(row.get("metric", "")),
                number(row.get("dense")),
                number(row.get("compressed")),
                number(row.get("stderr")),
                int(number(row.get("n")) or 0),
                better if isinstance(better, bool) else None,
                number(row.get("difference_stderr")),
            )
            if (stage, metric.name) not in known:
                self.metrics.append(metric)
                known.add((stage, metric.name))


def _metrics_from_events(events: list[Json]) -> list[MetricRow]:
    """Metrics announced so far by a run whose evaluation has not finished."""
    rows: dict[str, MetricRow] = {}
    for event in events:
        data = _mapping(event.get("data"))
        if event.get("kind") == "metric" and "compressed" in data:
            task, _, metric = str(data.get("name", "")).rpartition(".")
            rows[f"{task}.{metric}"] = MetricRow(
                str(event.get("stage", "")), task, metric, number(data.get("dense")), number(data.get("compressed"))
            )
    return list(rows.values())


def _warnings(events: list[Json]) -> list[str]:
    texts = (str(_mapping(e.get("data")).get("text", "")) for e in events if e.get("kind") == "warning")
    return list(dict.fromkeys(text for text in texts if text))


def safetensors_header(path: Path) -> Json:
    """Header of a safetensors file, empty when it is damaged; the tensor data is not touched."""
    try:
        return header_of(path)
    except InputError:
        return {}


def _artifacts(run_dir: Path) -> list[tuple[str, int]]:
    found = []
    for folder in sorted(run_dir.glob("artifact*")):
        if folder.is_dir() and not folder.name.endswith(".partial"):
            found.append((folder.name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())))
    return found


def _sizes(run_dir: Path, stages: list[StageRow]) -> SizeParts | None:
    """Sizes from the native artifact's headers, or from the last quantizing stage's blocks."""
    artifact = sorted((run_dir / "artifact").glob("*.safetensors"))
    if artifact:
        bits = _artifact_bits(run_dir / "artifact")
        return _add_up((safetensors_header(path) for path in artifact), bits)
    for stage in reversed(stages):
        files = sorted((run_dir / "stages" / stage.name / "blocks").glob("[0-9]*.safetensors"))
        if files:
            headers = [safetensors_header(path) for path in files]
            return _add_up(iter(headers), _block_bits(headers))
    return None


def _artifact_bits(folder: Path) -> dict[str, int]:
    """Code width by module from the native ``quantization_config``."""
    config = _mapping(_mapping(read_json(folder / "config.json")).get("quantization_config"))
    specs = [_mapping(s) for s in config.get("specs") or []]
    found = {}
    for name, index in _mapping(config.get("modules")).items():
        if isinstance(index, int) and 0 <= index < len(specs):
            found[name] = int(number(specs[index].get("bits")) or 0)
    return found


def _block_bits(headers: list[Json]) -> dict[str, int]:
    found = {}
    for header in headers:
        try:
            packed = json.loads(_mapping(header.get("__metadata__")).get("packed", "{}"))
        except (TypeError, ValueError):
            continue
        for name, entry in _mapping(packed).items():
            found[name] = int(number(_mapping(_mapping(entry).get("spec")).get("bits")) or 0)
    return found


def _part(name: str) -> str:
    if "shared_expert" in name:
        return "shared experts"
    if ".experts." in name:
        return "experts"
    return "attention" if "attn" in name else "dense layers"


def _tensors(headers: Iterator[Json]) -> Iterator[tuple[str, int, int, str]]:
    """Yield ``(name, bytes, values, dtype)`` of every tensor."""
    for header in headers:
        for name, entry in header.items():
            shape = _mapping(entry).get("shape")
            if name != "__metadata__" and isinstance(shape, list):
                count = math.prod(int(size) for size in shape)
                dtype = str(_mapping(entry).get("dtype"))
                yield name, count * DTYPES[dtype][1] if dtype in DTYPES else 0, count, dtype


def _add_up(headers: Iterator[Json], bits: dict[str, int]) -> SizeParts | None:
    parts: dict[str, int] = {}
    quantized = code_bits = inside = inside_bytes = outside = outside_bytes = 0
    for name, size, count, _ in _tensors(headers):
        module, _, kind = name.rpartition(".")
        if kind in PACKED_PARTS and bits.get(module):
            label = f"{_part(name)}: codes" if kind == "weight_packed" else "scales and zeros"
            if kind == "weight_packed":
                quantized += 8 * size // bits[module]
                code_bits += 8 * size
        elif ".layers." in name:
            label = "norms, routers, biases"
            inside, inside_bytes = inside + count, inside_bytes + size
        else:
            label = "embedding and head"
            outside, outside_bytes = outside + count, outside_bytes + size
        parts[label] = parts.get(label, 0) + size
    if not parts:
        return None
    # the embedding shows the checkpoint's width; routers and norms may be kept wider
    width = outside_bytes / outside if outside else 2.0
    return SizeParts(parts, quantized, code_bits, inside, inside_bytes, outside, outside_bytes, width)
