"""The stage interface: a config class, what it consumes and produces, estimate, run, restore.

Stage modules import no torch at top level, so that recipes validate and plans compute in
milliseconds; ``run`` imports what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from llmcompress.errors import RecipeError
from llmcompress.section import Section

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState


class Kind(StrEnum):
    """What can pass from stage to stage; each is a slot of :class:`RunState`."""

    MODEL = "model"
    CALIBRATION = "calibration"
    PACKED = "packed"
    ADAPTER = "adapter"
    POLICY = "policy"
    METRICS = "metrics"
    ARTIFACT = "artifact"
    FAMILY = "family"


class StageConfig(Section):
    """Base of every stage's recipe section. ``type`` is the discriminator of the union."""

    type: str


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What an estimate may look at: facts from ``config.json`` and the recipe, never weights.

    Attributes:
        layout: The model's layout.
        weight_bytes: Bytes per parameter in the checkpoint (2 for bf16).
        compute_bytes: Bytes per value in calibration compute (4 for fp32).
        samples, length: Calibration set size, zeros before a calibrate stage.
        specs: Plan name → spec accumulated by the stages before.
        device: ``cpu`` or ``cuda``.
        ram: Memory a stage may use above the empty interpreter, None for as much as it likes.
        exact: Whether what is computed in holds the checkpoint's weights exactly; otherwise quantizers read them again.
        positions: Tokens that the model's sequences may have, None where the config does not say.
        policies: Run-time policies that change sizes, by name, accumulated by the stages before.
    """

    layout: ModelLayout
    weight_bytes: int
    compute_bytes: int
    samples: int
    length: int
    specs: dict[str, Any]
    device: str
    ram: int | None = None
    exact: bool = True
    positions: int | None = None
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted needs of a stage, in bytes; ``ram`` is the peak above the empty interpreter.

    ``refusals`` are reasons for which an export stage will not write a format, ``policies`` those that the stage adds
    and that change sizes.
    """

    ram: int = 0
    vram: int = 0
    disk: int = 0
    output: int = 0
    flops: float = 0.0
    notes: tuple[str, ...] = ()
    specs: dict[str, Any] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)


class Stage(ABC):
    """One step of a pipeline.

    A stage is built from its config alone. It reads and writes ``RunState`` slots it declared
    in ``consumes`` and ``produces``, and keeps what must survive a kill under ``ctx.stage_dir``.
    ``produces`` may repeat a kind that exists already: then the stage refines it.
    """

    Config: ClassVar[type[StageConfig]]
    distributed: ClassVar[bool] = False
    """Whether all ranks of a run work on it together; otherwise rank 0 does it and the others wait."""
    consumes: ClassVar[frozenset[Kind]] = frozenset()
    produces: ClassVar[frozenset[Kind]] = frozenset()
    judging: ClassVar[frozenset[str]] = frozenset()
    """Config keys that only judge what the stage has kept: other values of them throw nothing away, but judge again."""
    refuses: ClassVar[frozenset[Kind]] = frozenset()
    """What no stage before it may have produced."""

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config

    def check(self, layout: ModelLayout) -> list[str]:
        """Return problems that can be seen from the model's layout alone (rules that match nothing …)."""
        return []

    def require_model(self, layout: ModelLayout) -> None:
        """Refuse a model that :meth:`check` finds fault with; a stage may run without a recipe's checks.

        Raises:
            RecipeError: All that it finds.
        """
        if problems := self.check(layout):
            raise RecipeError("\n".join(problems), "change the recipe, then: llmcompress validate RECIPE")

    def lacks(self) -> list[str]:
        """Return what the stage will need and this machine does not have (data, packages); asked before a run begins.

        In seconds, and only what is certain: what is returned ends the run.
        """
        return []

    def reads_text(self) -> bool:
        """Whether it needs the tokenizer of the recipe's model; asked before a run begins."""
        return False

    def require_source(  # noqa: B027 - most stages take every source
        self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None
    ) -> None:
        """Refuse a source model for what lies beside its weights; asked before a run begins, needs no torch.

        Args:
            folder: The source model.
            config: Its ``config.json``.
            tokenizer: Folder of the tokenizer, if it is another one.

        Raises:
            ExportError: A format cannot translate its config or tokenizer.
            InputError: It lacks what the stage needs.
        """

    def require_members(self, contexts: Mapping[str, object]) -> None:  # noqa: B027 - few stages work on families
        """Refuse what does not fit a family's members; asked before a run begins.

        Args:
            contexts: ``max_position_embeddings`` of each member of the recipe's families; None where none is known.

        Raises:
            InputError: Windows are too long for a member.
            RecipeError: Something is named after no member.
        """

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Predict memory, disk and output of this stage."""
        return Estimate()

    @abstractmethod
    def run(self, state: RunState, ctx: RunContext) -> None:
        """Do the work. Must continue from whatever ``ctx.stage_dir`` already holds."""

    @abstractmethod
    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put this finished stage's outputs back into ``state`` without redoing the work."""
