"""Reading text sources, and what exactly was read.

Reading returns :class:`Documents`: rows of text plus a provenance record with the hash of every file, so that a report
can say what a model was calibrated on and a run can be repeated on the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.data.sources import (
    HubSource,
    InlineSource,
    JsonlSource,
    ParquetSource,
    SourceConfig,
    SyntheticSource,
    Template,
    TextSource,
    describe,
    kind_of,
)
from llmcompress.errors import EnvironmentProblem, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSED_COMPRESSION = {
    ".zst": "zstandard",
    ".zstd": "zstandard",
    ".bz2": "bzip2",
    ".zip": "zip",
    ".7z": "7-zip",
    ".lz4": "lz4",
}


# half of a character that JSON writes in two parts; texts that were cut off at this many units end in one
_HALF_ESCAPE, _HALF = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Documents:
    """Text that was read, one string a document.

    Attributes:
        texts: The documents; empty for the synthetic source.
        provenance: JSON-serialisable: kind, what was named, file hashes, rows, licence.
    """

    texts: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)


def read(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: Template = "none",
) -> Documents:
    """Read all documents of a source.

    Args:
        source: What to read.
        tokenizer: Needed only when ``template`` is ``auto`` and rows are chats.
        template: Whether chat rows go through the tokenizer's chat template.

    Returns:
        Documents with at least one non-blank text, except for the synthetic source, which has none.

    Raises:
        InputError: A file is missing, damaged, in an unsupported form or holds no text; a hub data set cannot be had.
    """
    if isinstance(source, SyntheticSource):
        return Documents((), {"kind": "synthetic", "seed": source.seed})
    provenance: dict[str, Any] = {"kind": source.kind}
    if isinstance(source, InlineSource):
        texts = list(source.texts)
        provenance["sha256"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    else:
        texts = _read_rows(source, provenance, tokenizer, template)
    if source.licence:
        provenance["licence"] = source.licence
    provenance |= {"rows": len(texts), "template": template}
    if not any(text.strip() for text in texts):
        raise InputError(
            f"{describe(source)}: no text found in {len(texts)} rows",
            "check path, field, skip and rows of the source",
        )
    return Documents(tuple(texts), provenance)


def require_first(source: SourceConfig, template: Template = "auto") -> None:
    """Read the first row that would be taken of a local file of rows, so that a wrong field is missed before any work.

    Args:
        source: What will be read; other kinds are passed over, and files that are not there.
        template: As in :func:`read`; rows that are chats are left to the tokenizer.

    Raises:
        InputError: The file is damaged, in an unsupported form, or its row has no such text.
    """
    from llmcompress.models.paths import matches

    if not isinstance(source, JsonlSource | ParquetSource) or not matches(source.path):
        return
    rows = itertools.islice(_file_rows(source, _files(source.path)), source.skip, None)
    where, row = next(rows, ("", ""))
    if isinstance(row, dict) and (template == "none" or _messages(row) is None):
        _row_text(row, source.field, where, None, "none")


def _read_rows(
    source: TextSource | JsonlSource | ParquetSource | HubSource,
    provenance: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
) -> list[str]:
    """Rows of a file or hub source as text, with ``skip`` and ``rows`` applied; fills ``provenance``."""
    rows: Iterator[tuple[str, str | dict[str, Any]]] | Iterator[tuple[str, dict[str, Any]]]
    if isinstance(source, HubSource):
        rows = _hub_rows(source)
        provenance |= {"id": source.id, "config": source.config, "split": source.split, "revision": source.revision}
        fields: str = source.field
    else:
        files = _files(source.path)
        provenance |= {"path": source.path, "files": [_file_record(file) for file in files]}
        fields = "" if isinstance(source, TextSource) else source.field
        rows = _file_rows(source, files)
    stop = None if source.rows is None else source.skip + source.rows
    texts = []
    for number, (where, row) in enumerate(rows):
        if stop is not None and number >= stop:
            break
        if number >= source.skip:
            texts.append(row if isinstance(row, str) else _row_text(row, fields, where, tokenizer, template))
    return texts


def _file_rows(
    source: TextSource | JsonlSource | ParquetSource, files: Iterable[Path]
) -> Iterator[tuple[str, str | dict[str, Any]]]:
    for file in files:
        named = kind_of(file.name)
        if named is not None and named != source.kind and "parquet" in (named, source.kind):
            raise InputError(
                f"{file}: its name says {named}, and kind is {source.kind}", f"set the source's kind: {named}"
            )
        if isinstance(source, TextSource):
            whole = _decode(file)
            parts = whole.split(source.split_on) if source.split_on else [whole]
            yield from ((file.name, part) for part in parts if part.strip())
        elif isinstance(source, JsonlSource):
            yield from _json_rows(file)
        else:
            yield from _parquet_rows(file, source.field)


def _files(pattern: str) -> list[Path]:
    """Files that ``pattern`` names, sorted.

    Raises:
        InputError: There are none, or one is compressed in a way that is not read.
    """
    from llmcompress.models.paths import matches

    named = matches(pattern)
    found = [path for path in named if path.is_file()]
    if not found:
        what = "is a folder, not a file" if named else "no such file"
        raise InputError(f"{pattern}: {what}", "name a file, or a pattern such as data/*.jsonl")
    for file in found:
        if file.suffix.lower() in _REFUSED_COMPRESSION:
            raise InputError(
                f"{file}: {_REFUSED_COMPRESSION[file.suffix.lower()]} compression is not read",
                "decompress it, or compress it with gzip or xz",
            )
    return found


def read_objects(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) of JSON lines that are not text to train on but records.

    Args:
        pattern: A file, a pattern with ``*``, or ``asset:NAME``; ``.gz`` and ``.xz`` are read as they are.

    Raises:
        InputError: No such file, or a line is not a JSON object.
    """
    for file in _files(pattern):
        yield from _json_rows(file)


def _file_record(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _open_text(file: Path) -> io.TextIOBase:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(file.suffix.lower(), open)
    # a byte order mark is no text: it would be a token of its own, and no JSON begins with it
    handle: io.TextIOBase = opener(file, "rt", encoding="utf-8-sig", newline="")
    return handle


def _damaged(file: Path, error: Exception) -> InputError:
    what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read to its end"
    return InputError(f"{file}: {what}: {error}", "check that the file is complete and not of another format")


def _decode(file: Path) -> str:
    try:
        with _open_text(file) as handle:
            return handle.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise _damaged(file, error) from error


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    plain, started = kind_of(file.name) == "text", False
    try:
        with _open_text(file) as handle:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                if line.lstrip().startswith("[") and not (plain or started):
                    yield from _listed_rows(file, line + handle.read())
                    return
                started = True
                try:
                    row = _parsed(line)
                except ValueError as error:
                    hint = f"plain text is read with source: {file}" if plain else "repair or remove that line"
                    raise InputError(f"{file}:{number}: not valid JSON: {error}", hint) from error
                if not isinstance(row, dict):
                    raise InputError(
                        f"{file}:{number}: expected an object, found {type(row).__name__}",
                        f"plain text is read with source: {file}" if plain else "write one JSON object on each line",
                    )
                yield f"{file}:{number}", row
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise _damaged(file, error) from error


def _parsed(text: str) -> Any:
    """JSON with U+FFFD for halves of characters, which are no text to a tokenizer.

    Raises:
        ValueError: It is not JSON.
    """
    found = json.loads(text)
    if _HALF_ESCAPE.search(text) is None:
        return found
    return json.loads(_HALF.sub("\ufffd", json.dumps(found, ensure_ascii=False)))


def _listed_rows(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file that is one JSON list."""
    try:
        rows = _parsed(text)
    except ValueError as error:
        raise InputError(
            f"{file}: not valid JSON: {error}", "write one JSON list of objects, or an object on each line"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(
                f"{file}: row {number}: expected an object, found {type(row).__name__}", "write a list of JSON objects"
            )
        yield f"{file}: row {number}", row


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if name in {column.partition(".")[0], *_CHAT_FIELDS}]
            number = 0
            for batch in table.iter_batches(columns=wanted or names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: cannot be read as Parquet: {error}", "check that the download is complete"
        ) from error


def _hub_rows(source: HubSource) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.streaming and source.rows is None:
        raise InputError(f"hub {source.id}: streaming needs rows", "add rows: to the source")
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem("the datasets package is missing", "pip install datasets") from error
    from llmcompress.data.hub import hub_silence, offline, why_not_loaded

    silence = hub_silence()
    try:
        # what is in the cache of datasets is read without asking
        with offline(silence is not None):
            data = datasets.load_dataset(
                source.id, source.config, split=source.split, revision=source.revision, streaming=source.streaming
            )
        for number, row in enumerate(data):
            yield f"hub {source.id}: row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # connection failures of every layer below derive from OSError; an unknown name or split is a ValueError
        raise InputError(
            f"hub {source.id} ({source.split}): cannot be loaded: {why_not_loaded(error, silence)}",
            "without a network use kind: jsonl, parquet or text with a path to a local copy",
        ) from error


_CHAT_FIELDS = ("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output")
# ShareGPT's names of who speaks → those of chat templates
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def _row_text(
    row: dict[str, Any], name: str, where: str, tokenizer: PreTrainedTokenizerBase | None, template: Template
) -> str:
    """Text of one row: through the chat template where asked for and possible, otherwise the field ``name``."""
    messages = _messages(row) if template == "auto" else None
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    # a base model has no template, and many sets of chats hold the text too
    if messages is not None and (_has_template(tokenizer) or not isinstance(value, str)):
        return _rendered(messages, where, tokenizer)
    if not isinstance(value, str):
        others = sorted(key for key, held in row.items() if isinstance(held, str))
        fields = f"set the source's field to one of {', '.join(others) or 'the fields of a row that hold text'}"
        fields += "; in a recipe: source: {path: FILE, field: NAME}"
        chat = _messages(row) is not None
        raise InputError(
            f"{where}: field {name!r} is {'missing' if value is None else 'not text'}"
            + (", but the row is a chat" if chat else ""),
            "put chats through the chat template with template: auto" if chat else fields,
        )
    return value


def _has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Chat messages through the tokenizer's template.

    Raises:
        InputError: There is no template, or it refuses the messages.
    """
    if tokenizer is None or not _has_template(tokenizer):
        raise InputError(
            f"{where}: a chat row, but the tokenizer has no chat template",
            "put the chat_template.jinja that the model is to be used with beside its tokenizer, or write the chats "
            "out as text in a field of the rows",
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: the chat template refuses this row: {error}", "repair or remove the row, or set template: none"
        ) from error


def _messages(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The row as chat messages, or None when it is not a chat."""
    if isinstance(row.get("messages"), list):
        return list(row["messages"])
    turns = row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return [_turn(turn) for turn in turns]
    asked, answered = row.get("prompt"), row.get("response", row.get("completion"))
    if isinstance(asked, list) and isinstance(answered, list):
        return [*asked, *answered]
    if isinstance(row.get("instruction"), str):
        asked, answered = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row.get("output")
    if isinstance(asked, str) and isinstance(answered, str):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return None


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """A message of ShareGPT as one of a chat template; one that is such a message already stays as it is."""
    if "from" not in turn:
        return turn
    return {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
