"""What stages share: the mutable RunState with typed slots and the frozen RunContext."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.distributed.world import ALONE, World
from llmcompress.errors import RecipeError
from llmcompress.events import Emit, Event

if TYPE_CHECKING:
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.family import ModelFamily
    from llmcompress.models.handle import ModelHandle
    from llmcompress.quant.family import FamilyPlan
    from llmcompress.quant.store import PackedStore


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured figure.

    Attributes:
        task: ``heldout``, ``piqa`` …
        metric: ``perplexity``, ``acc``, ``kl`` …
        dense: Value of the dense twin, None where it has no meaning (KL).
        compressed: Value of the compressed model.
        stderr: Standard error of ``compressed``, if known.
        n: Number of items (tokens or requests).
        higher_is_better: Direction, None for neutral.
        difference_stderr: Standard error of ``compressed − dense``, paired by row; None where it is not known.
    """

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
        """``task.metric``, the name quality gates use."""
        return f"{self.task}.{self.metric}"


@dataclass(frozen=True, slots=True)
class FamilyState:
    """A quantized family.

    Attributes:
        family: Base and members, opened.
        plan: Trees and bits.
        store: Blocks whose entries are ``node|weight`` (:func:`llmcompress.quant.family.entry`).
        outside: How embeddings and heads are stored, ``int8`` or ``dense``.
        calibration: Name → windows each member was calibrated on; empty without activations.
    """

    family: ModelFamily
    plan: FamilyPlan
    store: PackedStore
    outside: str
    calibration: dict[str, CalibrationSet]


@dataclass
class RunState:
    """Slots filled by stages. One slot per :class:`~llmcompress.stages.base.Kind`."""

    model: ModelHandle | None = None
    calibration: CalibrationSet | None = None
    packed: PackedStore | None = None
    adapter: Path | None = None
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    artifacts: dict[str, Path] = field(default_factory=dict)
    family: FamilyState | None = None

    @property
    def changed(self) -> bool:
        """Whether the model at hand is another than the source's: packed weights, an adapter or a policy."""
        return self.packed is not None or self.adapter is not None or bool(self.policies)

    def calibrated(self, stage: str) -> CalibrationSet:
        """The calibration set; a recipe's chain is checked before, a stage that is called by itself is not.

        Args:
            stage: Name of the stage that needs it.

        Raises:
            RecipeError: There is none.
        """
        if self.calibration is None:
            raise RecipeError(f"stages.{stage}: needs calibration data", "put a calibrate stage before it")
        return self.calibration


@dataclass(frozen=True, slots=True)
class RunContext:
    """Everything a stage may know about the run it is in.

    Attributes:
        run_dir: Folder of the whole run.
        stage: Name of the running stage.
        stage_dir: ``run_dir/stages/<name>``, exists.
        seed: Seed of this stage, derived from the run's seed and the stage's name.
        device: ``cpu`` or ``cuda``.
        dtype: Compute dtype name for calibration and evaluation (``float32`` or ``bfloat16``).
        recipe: The resolved recipe as plain data.
        emit_event: Where events go.
        ram: Memory a stage may use above the empty interpreter, None for as much as it likes.
        world: The processes of the run.
    """

    run_dir: Path
    stage: str
    stage_dir: Path
    seed: int
    device: str
    dtype: str
    recipe: dict[str, Any]
    emit_event: Emit
    ram: int | None = None
    world: World = ALONE

    def emit(self, kind: Any, **data: Any) -> None:
        """Send an event of this stage."""
        self.emit_event(Event(kind, self.stage, data))
