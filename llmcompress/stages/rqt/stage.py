"""Stage ``rqt``: one residual tree for a base's fine-tunes (our variant of RQT, Findings of ACL 2025, paper 554)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmcompress.data.sources import SourceConfig, Template
from llmcompress.section import Section
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState

MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class MemberConfig(Section):
    """One fine-tune."""

    path: Annotated[str, Field(min_length=1)]
    """Folder with config.json and safetensors, of the base's architecture, or of a LoRA adapter of the base in PEFT's
    format; ``asset:NAME`` is shipped."""

    calibration: SourceConfig | None = None
    """Text of what this model was tuned for; without it only ``general`` text is used."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How much this model's error counts in shared nodes and in the choice of bits."""


def _member(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Member = Annotated[MemberConfig, BeforeValidator(_member, json_schema_input_type=MemberConfig | str)]
"""A fine-tune; its folder alone stands for a section."""


class CalibrationConfig(Section):
    """Tokens on which each member's activations are measured."""

    samples: Annotated[int, Field(ge=1)] = 128
    """Windows per member."""

    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window."""

    general: SourceConfig | None = None
    """Text for all members, mixed with each one's own."""

    general_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of windows from ``general``, where a member has text of its own."""

    template: Template = "auto"
    """``auto`` renders chat rows through the member's chat template."""

    allow_fewer: bool = False
    """Go on with the windows there are when a text is too short."""


class TreeConfig(Section):
    """Which models share."""

    scope: Literal["model", "layer", "matrix"] = "model"
    """One tree for the whole model, for each decoder layer, or for each weight."""

    linkage: Literal["ward", "average", "cosine"] = "ward"
    """When two groups are close: least common error, mean distance, or angle between differences to the base."""

    similarity: Literal["hessian", "plain"] = "hessian"
    """Weigh distances by what the inputs look like, or compare weights alone, without a calibration pass."""


class BitsConfig(Section):
    """How many bits each node gets."""

    mode: Literal["auto", "preset"] = "auto"
    """``auto`` spends ``budget`` where it lowers the predicted error most."""

    budget: Annotated[float, Field(gt=0, le=12)] = 2.2
    """Stored bits per weight and model, codes, scales and exponents of all nodes included."""

    widths: Annotated[tuple[Annotated[int, Field(ge=0, le=6)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4, 5, 6)
    """Widths that nodes may take; 0 is no node."""

    min_leaf_bits: Annotated[int, Field(ge=0, le=6)] = 1
    """Least bits of a member's own node. With 0 small fine-tunes are merged away, because their error is small; the
    root then stores something in any case."""

    importance: Literal["loss", "relative"] = "loss"
    """How much an error in a weight counts for ``auto``: by what the member's loss feels of it, from gradients on a few
    windows, or relative to the weight's own output. Without any text it is the latter."""

    solver: Literal["lagrange", "greedy"] = "lagrange"
    """How ``auto`` chooses; both come to nearly the same."""

    preset: Annotated[str, Field(pattern=r"^[0-6](-[0-6])+$")] = "4-1"
    """Widths from the root to the leaves for ``preset``: ``4-1`` is a star, ``4-1-1`` has groups below the root."""


class RqtConfig(StageConfig):
    """Recipe section of the stage. The recipe's ``model`` is the base."""

    type: Literal["rqt"] = "rqt"
    members: Annotated[dict[MemberName, Member], Field(min_length=2)]
    """The fine-tunes by name; a folder alone stands for ``{path: FOLDER}``."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Tokens for the members' activations."""
    tree: TreeConfig = TreeConfig()
    """Which models share."""
    bits: BitsConfig = BitsConfig()
    """How many bits each node gets."""
    group_size: Annotated[int, Field(ge=8)] = 128
    """Columns that share a scale."""
    node_target: Literal["mean", "hmean", "auto"] = "mean"
    """What a shared node stands for: the mean of its models, the mean weighted by their inputs, or the better one."""
    internal_solver: Literal["rtn", "gptq"] = "rtn"
    """How shared nodes are rounded. GPTQ there widens what the leaves have to cover."""
    leaf_solver: Literal["gptq", "rtn"] = "gptq"
    """How members' own nodes are rounded."""
    leaf_scale: Literal["mse", "unbiased"] = "mse"
    """``unbiased`` keeps the size of each difference instead of the least error."""
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal, relative to its mean."""
    act_order: bool | Literal["groups"] = "groups"
    """Order of columns in GPTQ, as in the stage ``gptq``."""
    static_groups: bool = False
    """Fix scales before the first column, as in the stage ``gptq``."""
    refit_scales: bool = True
    """Improve the leaves' scales by least squares once their codes are chosen."""
    sweeps: Annotated[int, Field(ge=0, le=64)] = 4
    """Rounds of coordinate descent over the codes of GPTQ's nodes: at one or two bits a column that should make up for
    others is often clipped, and going through the columns again finds better codes."""
    outside: Literal["int8", "dense"] = "int8"
    """How each member's embedding and head are stored: 8 bits with a scale per row, or as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = self.bits.widths
        if self.bits.mode == "auto":
            least = max(1, self.bits.min_leaf_bits)
            if max(widths) < least:
                raise ValueError(f"bits.widths holds nothing of {least} bits or more")
            if self.bits.budget <= self.least_budget:
                what = "the leaves alone take" if self.bits.min_leaf_bits else "the root alone takes"
                raise ValueError(f"bits.budget {self.bits.budget} must exceed {self.least_budget:g}, which {what}")
        elif self.bits.preset.startswith("0-") and self.bits.preset.endswith("-0"):
            raise ValueError(
                f"bits.preset {self.bits.preset}: give the root or the leaves a width, or nothing is stored"
            )
        if self.act_order is True and not self.static_groups:
            raise ValueError("act_order needs static_groups: true, or the value groups")
        bare = [name for name, member in self.members.items() if member.calibration is None]
        if self.needs_text and bare and self.calibration.general is None:
            raise ValueError(f"members.{bare[0]} has no calibration text, and calibration.general is not set")
        return self

    @property
    def least_budget(self) -> float:
        """Bits that a budget must exceed: those of the leaves alone, or of a root where leaves may store nothing."""
        leaf = min(width for width in self.bits.widths if width >= self.bits.min_leaf_bits)
        beside = 16 / self.group_size
        if leaf:
            return leaf + beside
        return (min((width for width in self.bits.widths if width), default=1) + beside) / len(self.members)

    @property
    def needs_text(self) -> bool:
        """Whether activations are measured at all."""
        return any(
            (self.leaf_solver == "gptq", self.internal_solver == "gptq", self.tree.similarity == "hessian",
             self.node_target != "mean")
        )  # fmt: skip

    @property
    def asks_loss(self) -> bool:
        """Whether gradients decide what an error counts."""
        return self.bits.mode == "auto" and self.bits.importance == "loss" and self.needs_text


class Rqt(Stage):
    """Builds the tree and quantizes its nodes, block by block, each member on its own activations."""

    Config: ClassVar[type[StageConfig]] = RqtConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.FAMILY})
    config: RqtConfig

    def check(self, layout: ModelLayout) -> list[str]:
        """Architectures that cannot be in a tree."""
        from llmcompress.models.family import unsupported

        return [f"stages.{self.name}: {problem}" for problem in unsupported(layout)]

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of every member, its shared nodes and Hessians, and one activation stream per member."""
        from llmcompress.stages.rqt.estimate import estimate_rqt

        return estimate_rqt(self.config, inputs)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Survey, plan, build; what is finished is kept.

        Raises:
            InputError: A member is missing, damaged or of another architecture, or a text is too short.
        """
        from llmcompress.stages.rqt.engine import run_rqt

        run_rqt(self.config, state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Open the members again and re-attach the finished blocks."""
        from llmcompress.stages.rqt.engine import attach_family

        attach_family(self.config, state, ctx)
