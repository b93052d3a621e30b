"""The recipe's sections for text: where calibration and evaluation text comes from. Read by ``data/documents.py``.

Plain pydantic models without torch, because recipes hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmcompress.errors import InputError
from llmcompress.section import Section

Template = Literal["none", "auto"]
"""``auto`` renders chat rows through the tokenizer's chat template: ``messages``; ``conversations`` of ``from`` and
``value`` (ShareGPT); ``prompt`` with ``response`` or ``completion``; ``instruction``, ``input``, ``output`` (Alpaca).
"""


class _Source(Section):
    licence: str | None = None
    """Licence of the text; goes into the report and the model card as given."""


class _RowSource(_Source):
    skip: Annotated[int, Field(ge=0)] = 0
    """Rows to leave out at the start."""

    rows: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows after ``skip``; all when absent."""


class TextSource(_RowSource):
    """Plain UTF-8 text files."""

    kind: Literal["text"]

    path: str
    """A file, or a pattern with ``*``; ``asset:NAME`` is a file shipped with llmcompress. ``.gz`` and ``.xz`` are read
    as they are."""

    split_on: str | None = None
    """String that separates documents inside a file; by default a file is one document."""


class JsonlSource(_RowSource):
    """JSON lines, one object a row, or one JSON list of objects; ``.gz`` and ``.xz`` are read as they are."""

    kind: Literal["jsonl"]

    path: str
    """A file, or a pattern with ``*``; ``asset:NAME`` is a file shipped with llmcompress."""

    field: str = "text"
    """Field that holds the text. A dotted name reaches into nested objects."""


class ParquetSource(_RowSource):
    """Parquet files."""

    kind: Literal["parquet"]

    path: str
    """A file, or a pattern with ``*``."""

    field: str = "text"
    """Column that holds the text."""


class HubSource(_RowSource):
    """A data set of the Hugging Face hub, read through ``datasets``."""

    kind: Literal["hub"]

    id: str
    """Data set id, such as ``Salesforce/wikitext``."""

    config: str | None = None
    """Configuration name, such as ``wikitext-2-raw-v1``."""

    split: str = "train"
    """Split, such as ``test``."""

    field: str = "text"
    """Column that holds the text."""

    revision: str | None = None
    """Git revision; give one to make the run repeatable."""

    streaming: bool = False
    """Read rows as they arrive instead of downloading the whole split; needs ``rows``."""


class InlineSource(_Source):
    """Text written into the recipe."""

    kind: Literal["inline"]

    texts: Annotated[tuple[str, ...], Field(min_length=1)]
    """The documents."""


class SyntheticSource(_Source):
    """Seeded random tokens. For measuring speed only: a model calibrated on noise is not a useful model."""

    kind: Literal["synthetic"]

    seed: int = 0
    """Seed of the tokens, added to the stage's seed."""


_KINDS = {
    ".txt": "text", ".md": "text", ".raw": "text",
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip


def named_source(path: str) -> dict[str, str]:
    """The section that reads a file, told by its name: ``book.txt`` is ``{kind: text, path: book.txt}``.

    Args:
        path: A file, a pattern with ``*``, or ``asset:NAME``; ``.gz`` and ``.xz`` at its end do not count.

    Raises:
        ValueError: The name does not say what is in the file.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path}: the name does not say what is in it ({', '.join(_KINDS)}): give kind and path")
    return {"kind": kind, "path": path}


def kind_of(path: str) -> str | None:
    """Kind of source that reads a file, by its name; None where that does not say it."""
    name = Path(path).name.lower()
    return _KINDS.get(Path(name.removesuffix(".gz").removesuffix(".xz")).suffix)


def _section(value: Any) -> Any:
    if isinstance(value, str):
        return named_source(value)
    if isinstance(value, dict) and "kind" not in value and isinstance(path := value.get("path"), str):
        return {**value, "kind": kind} if (kind := kind_of(path)) else value
    return value


_Section = Annotated[
    TextSource | JsonlSource | ParquetSource | HubSource | InlineSource | SyntheticSource, Field(discriminator="kind")
]
SourceConfig = Annotated[_Section, BeforeValidator(_section, json_schema_input_type=_Section | str)]
"""Any source, told apart by ``kind``. Where the ending of a file's name says the kind, it may be left out, and the name
alone stands for a section."""


def require_window(where: str, length: int, context: object, who: str = "the model") -> None:
    """Refuse windows that are longer than a model's sequences may be.

    Args:
        where: Field of the recipe.
        length: Tokens in a window.
        context: ``max_position_embeddings`` of the model's config; what is no number is no limit.
        who: The model, in the message.

    Raises:
        InputError: They are.
    """
    if isinstance(context, int) and length > context:
        raise InputError(
            f"{where} is {length}, but {who} was built for {context} positions", f"set it to {context} or less"
        )


def describe(source: SourceConfig) -> str:
    """Name a source in messages: ``jsonl data/train.jsonl`` or ``hub Salesforce/wikitext``."""
    if isinstance(source, HubSource):
        return f"hub {source.id}"
    if isinstance(source, InlineSource | SyntheticSource):
        return f"{source.kind} source"
    return f"{source.kind} {source.path}"
