"""YAML files with line numbers: YAML 1.2 core scalars, duplicate keys refused, every path mapped to its line.

PyYAML reads YAML 1.1, where ``off`` is false, ``0123`` is 83 and ``1e-4`` is text. Recipes are read by the
rules of the YAML 1.2 core schema instead, in files and in overrides alike.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str, ...]

MOST_VALUES = 100_000
"""Values of a file, each as often as aliases repeat it: ten lines of aliases of aliases would fill any memory."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe.

    Attributes:
        path: Keys from the top; empty for the file as a whole.
        message: What is wrong, without place.
        file, line: Where, if the reader of the file knows better than the path.
    """

    path: KeyPath
    message: str
    file: Path | None = None
    line: int | None = None


@dataclass(slots=True)
class Document:
    """One parsed file.

    Attributes:
        file: Where it came from.
        data: Plain data; an empty mapping when the file could not be parsed.
        lines: Line of every key and list item.
        problems: Syntax errors, duplicate keys, keys that are not text.
        values: How many were seen, each as often as aliases repeat it, merged ones too.
        buildable: False when an alias contains itself or there are too many values, so that no data can be built.
    """

    file: Path
    data: dict[Any, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    values: int = 0
    buildable: bool = True


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema, plus ``<<`` merge keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - the attribute PyYAML reads


_FLOAT = r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
_INT = r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_value(text: str) -> Any:
    """Parse one override value: a YAML 1.2 core scalar, or a list or mapping in brackets.

    Raises:
        ValueError: The text is not valid YAML.
    """
    if "${" in text and not text.lstrip().startswith(("[", "{", '"', "'")):
        return text
    try:
        if text.lstrip().startswith(("[", "{", '"')):
            # JSON is YAML, but PyYAML limits the length of keys and reads surrogate pairs differently
            with suppress(json.JSONDecodeError):
                return json.loads(text)
        return yaml.load(text, CoreLoader)
    except yaml.YAMLError as error:
        raise ValueError(_first_line(error)) from error
    except RecursionError as error:
        raise ValueError("too many brackets within one another") from error


def parse_document(file: Path, text: str) -> Document:
    """Parse a recipe file (YAML, or JSON, which is YAML).

    Args:
        file: Named in messages.
        text: Its content.

    Returns:
        The document; whatever is wrong is in its ``problems``.
    """
    document = Document(file)
    loader: CoreLoader | None = None
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            document.problems.append(Problem((), "the file is empty", file, 1))
        elif not isinstance(node, yaml.MappingNode):
            document.problems.append(
                Problem((), "a recipe must be a mapping of keys to values", file, node.start_mark.line + 1)
            )
        else:
            _map_lines(node, (), document, [])
            if file.suffix == ".json":
                document.data = json.loads(text)  # YAML reads the surrogate pairs of JSON differently
            elif document.buildable:
                document.data = _plain_keys(loader.construct_document(node))
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(file, text, error))
    except json.JSONDecodeError as error:
        document.problems.append(Problem((), f"not valid JSON: {error.msg}", file, error.lineno))
    except RecursionError:
        document.problems.append(Problem((), "brackets or indentation within one another, too deep to read", file, 1))
    except ValueError as error:  # Python's own limit on the digits of a number
        document.problems.append(Problem((), f"cannot be read: {error}", file, 1))
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _map_lines(node: yaml.Node, path: KeyPath, document: Document, above: list[yaml.Node]) -> None:
    """Record the line of everything below ``node``; report keys that are duplicate or not plain."""
    if any(node is other for other in above):
        document.problems.append(
            Problem(path, "an alias that contains itself", document.file, node.start_mark.line + 1)
        )
        document.buildable = False
        return
    document.values += 1
    if document.values > MOST_VALUES:
        if document.buildable:
            text = f"more than {MOST_VALUES} values: aliases of aliases"
            document.problems.append(Problem((), text, document.file, node.start_mark.line + 1))
        document.buildable = False
        return
    inside = [*above, node]
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            document.lines[here] = item.start_mark.line + 1
            _map_lines(item, here, document, inside)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            plain = isinstance(key, yaml.ScalarNode) and key.tag.rsplit(":", 1)[-1] in ("str", "int", "merge")
            if not plain:
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                document.problems.append(
                    Problem(path, f"the key {shown!r} is not text: put it in quotes", document.file, line)
                )
                continue
            if key.tag.endswith(":merge"):
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for item in merged:
                    _map_lines(item, path, document, inside)
                continue
            name = str(key.value)
            here = (*path, name)
            if name in seen:
                document.problems.append(
                    Problem(here, f"duplicate key, first given in line {seen[name]}", document.file, line)
                )
                continue
            seen[name] = line
            document.lines[here] = line
            _map_lines(value, here, document, inside)


def _plain_keys(data: Any) -> Any:
    """Copy without the keys that were reported as not being text."""
    if isinstance(data, dict):
        kept = ((key, value) for key, value in data.items() if isinstance(key, str | int) and not isinstance(key, bool))
        return {key: _plain_keys(value) for key, value in kept}
    if isinstance(data, list):
        return [_plain_keys(item) for item in data]
    return data


def _first_line(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    # PyYAML splits some sentences: "expected a single document in the stream" "but found another document"
    return f"{getattr(error, 'context', '')}, {problem}" if problem.startswith("but ") else problem


def _syntax_problem(file: Path, text: str, error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.character, int):
        sign = f"the character U+{error.character:04X}, which YAML does not allow"
        return Problem((), f"not valid YAML: {sign}", file, text.count("\n", 0, error.position) + 1)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    message = f"not valid YAML: {_first_line(error)}"
    if mark is None:
        return Problem((), message, file, 1)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "${" in line and "{" in line.replace("${", ""):
        message += ' (inside { } write values with ${…} in quotes: {dir: "runs/${name}"})'
    elif "???" in line:
        message += ' (write "???" in quotes)'
    elif "\t" in line:
        message += " (the line contains a tab; YAML is indented with spaces)"
    return Problem((), message, file, mark.line + 1)
