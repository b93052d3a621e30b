"""What to evaluate: the recipe sections of the evaluate stage's parts, also used by ``eval`` and ``compare``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmcompress.data.sources import SourceConfig, Template, require_window
from llmcompress.errors import InputError
from llmcompress.section import Section


class PerplexityConfig(Section):
    """Perplexity of one text."""

    source: SourceConfig
    """The text; it must not overlap the calibration text."""

    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window."""

    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens between window starts; by default ``length``, the usual non-overlapping protocol. With a smaller stride
    only the tokens that are new in a window count."""

    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Use only the first tokens of the text."""

    template: Template = "auto"
    """``auto`` renders chat rows through the tokenizer's chat template; ``none`` takes the source's field."""

    separator: str = "\n\n"
    """Put between rows; the WikiText-2 protocol uses two newlines."""

    tail: Literal["drop", "keep"] = "drop"
    """Whether the last, shorter window counts. The usual non-overlapping protocol drops it."""

    @model_validator(mode="after")
    def _stride_fits(self) -> PerplexityConfig:
        if self.stride is not None and self.stride > self.length:
            raise ValueError(f"stride {self.stride} exceeds length {self.length}: tokens would be left out")
        if self.source.kind == "synthetic":
            raise ValueError("perplexity of random tokens says nothing; give real text")
        return self


class FidelityConfig(Section):
    """How closely the compressed model follows the dense one, token by token."""

    source: SourceConfig
    """The text; it must not overlap the calibration text."""

    length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window."""

    samples: Annotated[int, Field(ge=1)] = 16
    """Number of windows."""

    template: Template = "auto"
    """``auto`` renders chat rows through the tokenizer's chat template; ``none`` takes the source's field."""

    allow_fewer: bool = False
    """Go on with the windows there are when the text is too short for ``samples``."""

    seed: int = 0
    """Chooses the windows. Not tied to the run's seed, so that runs with different seeds see the same text."""


class TaskConfig(Section):
    """One lm-evaluation-harness task with its own settings."""

    task: str
    """Name: one of the local tasks (``llmcompress/data/tasks``) or any task lm-eval knows; with ``path`` any name."""

    path: str | None = None
    """A task of your own: lm-eval's YAML. Files that its ``data_files`` name may lie beside it."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows; overrides the stage's ``limit``."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; by default what the task says."""

    fewshot_seed: int = 1234
    """Chooses the examples where the task draws them; the default is lm-eval's."""

    apply_chat_template: bool = False
    """Ask as a user of a chat, by the tokenizer's template: what lm-eval's option of this name does."""

    fewshot_as_multiturn: bool | None = None
    """Examples as turns of the chat; by default with ``apply_chat_template``, as in lm-eval."""

    system_instruction: str | None = None
    """Put before everything; as a system's message with ``apply_chat_template``."""

    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of the longest request, with what is written to it. Longer ones lose their beginning, which is told. By
    default the model's context, at most 4096 beside what is written."""

    run_code: bool = False
    """Whether a task may run what the model writes on this machine, as humaneval and mbpp do; lm-eval asks for
    ``HF_ALLOW_CODE_EVAL=1`` in the environment too."""

    subjects: tuple[str, ...] | None = None
    """Subjects, for ``mmlu`` from a local folder; all when absent."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Any field of an lm-eval task configuration, set as given."""

    @model_validator(mode="after")
    def _whole(self) -> TaskConfig:
        if self.path is not None and self.subjects is not None:
            raise ValueError("subjects are for mmlu from a local folder, not for a task with a path")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn needs apply_chat_template: true")
        return self


class RecallConfig(Section):
    """Facts to be remembered over growing distances."""

    source: SourceConfig
    """Running text that is put between statement and question."""

    distances: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] = (64, 128, 256, 512)
    """Tokens between the stated word and the question."""

    samples: Annotated[int, Field(ge=2)] = 64
    """Questions per distance."""

    candidates: Annotated[int, Field(ge=2, le=64)] = 16
    """Words to choose from; chance is one in this many."""

    seed: int = 0
    """Chooses names, words and text."""


class GenerationConfig(Section):
    """Samples written by both models side by side."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Length of the continuation."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; otherwise sampled, with the same seed for both models."""

    seed: int = 0
    """Seed of sampling."""

    chat: bool = False
    """Put prompts through the chat template as a user's message."""


def require_chat_template(
    tasks: Iterable[str | TaskConfig], generation: GenerationConfig | None, template: object
) -> None:
    """Refuse chats without a template.

    Args:
        tasks: Tasks of lm-eval.
        generation: Prompts.
        template: Template of the tokenizer; None or empty where it has none.

    Raises:
        InputError: One of them is to be asked through a chat template.
    """
    chats = [task.task for task in tasks if isinstance(task, TaskConfig) and task.apply_chat_template]
    asked = [f"task {name}: apply_chat_template" for name in chats]
    asked += ["generation.chat is set"] if generation is not None and generation.chat else []
    if asked and not template:
        raise InputError(
            f"{asked[0]}, and the tokenizer has no chat template",
            "leave it out, or put the chat_template.jinja that the model is to be used with beside its tokenizer",
        )


def require_windows(
    perplexity: Mapping[str, PerplexityConfig], fidelity: FidelityConfig | None, recall: RecallConfig | None,
    tasks: Iterable[str | TaskConfig], context: object,
) -> None:  # fmt: skip
    """Refuse windows and requests that are longer than the model's sequences may be.

    Args:
        perplexity: Texts by name.
        fidelity: Windows of the comparison.
        recall: Facts over distances.
        tasks: Tasks of lm-eval.
        context: See :func:`~llmcompress.data.sources.require_window`.

    Raises:
        InputError: One of them is.
    """
    for name, text in perplexity.items():
        require_window(f"perplexity.{name}.length", text.length, context)
    if fidelity is not None:
        require_window("fidelity.length", fidelity.length, context)
    if recall is not None:
        require_window("recall.distances", max(recall.distances), context)
    for task in tasks:
        if isinstance(task, TaskConfig) and task.max_length is not None:
            require_window(f"tasks: {task.task}: max_length", task.max_length, context)


Overlap = Literal["refuse", "warn", "ignore"]
"""What to do when evaluation text was also calibration text."""
