"""Turns what pydantic says into lines a person can act on: ``file:line: path: message (did you mean …)``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.recipe.documents import KeyPath, Problem

Origin = tuple[Path, int] | int
"""File and line, or the number of an override."""


@dataclass(slots=True)
class SourceMap:
    """Where each path of a composed recipe was written last.

    Attributes:
        origins: Path → origin.
        main: The recipe file itself, blamed for what is nowhere.
    """

    main: Path
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def where(self, path: Sequence[str]) -> Origin:
        """Origin of ``path``, or of the nearest key above it."""
        for end in range(len(path), 0, -1):
            found = self.origins.get(tuple(path[:end]))
            if found is not None:
                return found
        return (self.main, 1)

    def place(self, path: Sequence[str]) -> str:
        """Origin of ``path`` as text: ``recipes/x.yaml:6`` or ``override #2``."""
        return place(self.where(path))

    def forget(self, path: KeyPath) -> None:
        """Drop ``path`` and everything below it."""
        for known in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[known]


def place(origin: Origin) -> str:
    """An origin as text."""
    if isinstance(origin, int):
        return f"override #{origin}"
    file, line = origin
    return f"{show_path(file)}:{line}"


def show_path(file: Path) -> str:
    """A file as a user would type it: relative to the current directory when it is below it."""
    try:
        return str(file.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(file)


# words of llm-compressor, GPTQModel and lm-eval, and the keys that do the same here
_ELSEWHERE = {
    "actorder": "act_order", "bits_per_weight": "bits", "dampening_frac": "damp", "damp_percent": "damp",
    "dataset": "source", "desc_act": "act_order", "max_seq_length": "length", "max_seq_len": "length",
    "nsamples": "samples", "num_bits": "bits", "num_calibration_samples": "samples", "percdamp": "damp",
    "seqlen": "length", "sequence_length": "length", "sym": "symmetric", "wbits": "bits", "ignore": "rules",
    "dynamic": "rules", "config_groups": "rules", "scheme": "rules", "q_group_size": "group_size",
}  # fmt: skip
_KEPT = "rules, the first with keep: true for what stays dense"


def renamed(word: str) -> str:
    """The key that does what ``word`` does elsewhere, or ``word`` itself."""
    return _ELSEWHERE.get(word.lower(), word)


def did_you_mean(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`` (did you mean …?)``, or the list of candidates when there are few, or nothing."""
    names = [str(name) for name in candidates]
    here = _ELSEWHERE.get(word.lower())
    if here in names:
        return f" (did you mean {_KEPT if word.lower() in ('ignore', 'dynamic') else here}?)"
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), lowered, 1, cutoff)
    if near:
        return f" (did you mean {lowered[near[0]]}?)"
    if 0 < len(names) <= 12:
        return f" (known: {', '.join(names)})"
    return ""


def raise_problems(problems: Sequence[Problem], sources: SourceMap, hint: str) -> None:
    """Raise one error with a line per problem, in file order; return when there are none.

    Raises:
        RecipeError: There is at least one problem.
    """
    if problems:
        raise RecipeError("\n".join(report_lines(problems, sources)), hint)


def report_lines(problems: Sequence[Problem], sources: SourceMap) -> list[str]:
    """``file:line: path: message`` for each problem, without repetitions, in file order."""
    rows: dict[str, tuple[Any, ...]] = {}
    for problem in problems:
        override = re.match(r"override #(\d+): ", problem.message) if not problem.path else None
        if override:
            rows.setdefault(problem.message, (1, "", int(override.group(1))))
            continue
        origin: Origin = sources.where(problem.path)
        if problem.file is not None:
            origin = (problem.file, problem.line or 1)
        shown = ".".join(problem.path)
        line = ": ".join(part for part in (place(origin), shown, problem.message) if part)
        order = (1, "", origin) if isinstance(origin, int) else (0, str(origin[0]), origin[1])
        rows.setdefault(line, order)
    return sorted(rows, key=lambda line: rows[line])


def validation_problems(
    errors: Iterable[Mapping[str, Any]], data: Mapping[Any, Any], schema: Mapping[str, Any]
) -> list[Problem]:
    """Problems from ``ValidationError.errors()``.

    Args:
        errors: What pydantic found.
        data: What it looked at.
        schema: The strict JSON schema, for suggestions.
    """
    grouped: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for error in errors:
        grouped.setdefault(clean_path(error, data), []).append(error)
    for path in [p for p, found in grouped.items() if all(error["type"] == "too_short" for error in found)]:
        # a list whose items are wrong counts as empty too; the items say it better
        if any(other[: len(path)] == path for other in grouped if other != path):
            del grouped[path]
    return [Problem(path, _message(path, found, data, schema)) for path, found in grouped.items()]


def clean_path(error: Mapping[str, Any], data: Any) -> KeyPath:
    """Keys of the recipe that an error is about, without the union tags pydantic puts between them."""
    path: list[str] = []
    node = data
    loc = error["loc"]
    for number, part in enumerate(loc):
        child = _step(node, part)
        if child is not _ABSENT:
            path.append(str(part))
            node = child
        elif number == len(loc) - 1 and error["type"] == "missing":
            path.append(str(part))
        # anything else is the tag of a union, or [key]
    if error["type"] == "union_tag_invalid":
        key = str(error["ctx"]["discriminator"]).strip("'")
        path += [key] if key.isidentifier() else []
    return tuple(path)


def allowed_keys(data: Any, path: Sequence[str], schema: Mapping[str, Any]) -> list[str] | None:
    """Keys the schema knows for the mapping at ``path``; None where names are free or nothing is known."""
    names: dict[str, None] = {}
    free = True
    for node in schema_nodes(data, path, schema):
        if isinstance(node.get("properties"), dict):
            free = False
            names.update(dict.fromkeys(node["properties"]))
    return None if free else list(names)


def schema_nodes(data: Any, path: Sequence[str], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Schemas that may describe the value at ``path``: several when a union cannot be told apart.

    Args:
        data: The recipe as far as it is known; discriminators are read from it.
        path: Keys from the top.
        schema: The strict JSON schema.
    """
    nodes = _expand(schema, data, schema)
    for key in path:
        data = _step(data, key)
        found: list[Mapping[str, Any]] = []
        for node in nodes:
            child = _schema_child(node, key)
            if child is not None:
                found += _expand(child, None if data is _ABSENT else data, schema)
        nodes = found
    return nodes


_ABSENT = object()


def _step(node: Any, part: Any) -> Any:
    if isinstance(node, dict):
        if part in node:
            return node[part]
        if isinstance(part, str) and part.isdigit() and int(part) in node:
            return node[int(part)]
        return _ABSENT
    if isinstance(node, list | tuple) and str(part).isdigit() and int(part) < len(node):
        return node[int(part)]
    return _ABSENT


def _schema_child(node: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    properties = node.get("properties") or {}
    if key in properties:
        return properties[key]
    for pattern, child in (node.get("patternProperties") or {}).items():
        if re.search(pattern, key):
            return child
    for name in ("additionalProperties", "items"):
        if isinstance(node.get(name), dict):
            return node[name]
    return None


def _expand(node: Mapping[str, Any], data: Any, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Follow references and unions."""
    if "$ref" in node:
        return _expand(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], data, schema)
    options = node.get("oneOf") or node.get("anyOf") or node.get("allOf")
    if options is None:
        return [node]
    discriminator = node.get("discriminator")
    if discriminator and isinstance(data, dict):
        target = discriminator["mapping"].get(data.get(discriminator["propertyName"]))
        if target is not None:
            return _expand({"$ref": target}, data, schema)
    return [found for option in options for found in _expand(option, data, schema)]


_EXPECTED = {
    "int_type": "an integer", "int_parsing": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping", "finite_number": "a finite number", "none_required": "null",
}  # fmt: skip
_LIMITS = {
    "greater_than": ("gt", "greater than"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"), "less_than_equal": ("le", "at most"),
}  # fmt: skip


def _message(
    path: KeyPath, errors: Sequence[Mapping[str, Any]], data: Mapping[Any, Any], schema: Mapping[str, Any]
) -> str:
    """One message for all that pydantic says about one path."""
    expected = list(dict.fromkeys(text for error in errors for text in _expectations(error)))
    if expected:
        return f"expected {_either(expected)}, not {_shown(errors[0].get('input'))}{_hint(path, errors, data, schema)}"
    return "; ".join(dict.fromkeys(_single(path, error, data, schema) for error in errors))


def _expectations(error: Mapping[str, Any]) -> list[str]:
    """What would have been right, one entry per alternative; empty for errors that say something else."""
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _EXPECTED:
        return [_EXPECTED[kind]]
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return [f"a number {words} {context[name]}"]
    if kind in ("literal_error", "enum"):
        return [text.strip("'") for text in re.split(r", | or ", str(context["expected"]))]
    return []


def _either(texts: Sequence[str]) -> str:
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _hint(
    path: KeyPath, errors: Sequence[Mapping[str, Any]], data: Mapping[Any, Any], schema: Mapping[str, Any]
) -> str:
    """What to write instead of a single value that stands for a list or a section, or of a misspelt word."""
    value, wanted = errors[0].get("input"), {_EXPECTED.get(error["type"]) for error in errors}
    # a word that is no choice by itself is none in a list either
    of_words = any(error["type"] in ("literal_error", "enum") for error in errors)
    if isinstance(value, str) and "a list" in wanted and not of_words:
        return f" (write [{value}])"
    sections = schema_nodes(data, path, schema) if "a mapping" in wanted and not isinstance(value, list) else ()
    if len(sections) == 1 and (keys := sections[0].get("properties")):
        # `device` is a section of its own, `run.device` what most people mean
        others = (_expand(child, None, schema) for child in schema["properties"].values()) if len(path) == 1 else ()
        names = [name for name, nodes in zip(schema["properties"], others) for node in nodes
                 if path[0] in (node.get("properties") or {})]  # fmt: skip
        return f" (its keys: {', '.join(keys)}{f'; did you mean {names[0]}.{path[0]}?' if names else ''})"
    return _literal_hint(errors)


def _literal_hint(errors: Sequence[Mapping[str, Any]]) -> str:
    choices: list[str] = []
    for error in errors:
        if error["type"] in ("literal_error", "enum"):
            choices += re.findall(r"'([\w.-]+)'", str(error["ctx"]["expected"]))
    value = errors[0].get("input")
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return hint if "did you mean" in hint else ""


def _single(path: KeyPath, error: Mapping[str, Any], data: Mapping[Any, Any], schema: Mapping[str, Any]) -> str:
    """Message for kinds of errors that say more than what was expected."""
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "extra_forbidden":
        names = allowed_keys(data, path[:-1], schema) or []
        present = _at(data, path[:-1])
        unused = [name for name in names if not (isinstance(present, dict) and name in present)]
        hints = [did_you_mean(path[-1], names), *_deeper(path[-1], schema_nodes(data, path[:-1], schema), schema)]
        return f"unknown key{next((h for h in hints if 'did you mean' in h), did_you_mean(path[-1], unused))}"
    if kind.startswith("union_tag") and (key := str(context["discriminator"]).strip("'")).isidentifier():
        return _wrong_tag(path, key, context, data, schema)
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind == "string_pattern_mismatch":
        return f"{error.get('input')!r} is not a name: use letters, digits, ., _ and -"
    if kind in _PLAIN and context.get("min_length", 1) == 1:
        only = [node["const"] for node in schema_nodes(data, path, schema) if "const" in node]
        return _PLAIN[kind] + (f" (write {path[-1]}: {only[0]})" if kind == "missing" and len(only) == 1 else "")
    if kind == "too_short":
        return f"needs {context['min_length']} entries or more, has {context['actual_length']}"
    return re.sub(r"^Input should be", "expected", str(error["msg"])) + f", not {_shown(error.get('input'))}"


def _deeper(word: str, nodes: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> Iterator[str]:
    """Suggestions from the sections below: ``group_size`` belongs under ``rules.NAME``."""
    word = renamed(word)
    for node in nodes:
        for section, child in (node.get("properties") or {}).items():
            for inner in _expand(child, None, schema):
                yield did_you_mean(
                    f"{section}.{word}", [f"{section}.{name}" for name in inner.get("properties") or ()], 0.85
                )
                named = inner.get("additionalProperties")
                for item in _expand(named, None, schema) if isinstance(named, dict) else ():
                    names = [f"{section}.NAME.{name}" for name in item.get("properties") or ()]
                    yield did_you_mean(f"{section}.NAME.{word}", names, 0.9)


_PLAIN = {
    "missing": "required key is missing",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _wrong_tag(
    path: KeyPath, key: str, context: Mapping[str, Any], data: Mapping[Any, Any], schema: Mapping[str, Any]
) -> str:
    """Message for a missing or unknown ``type`` or ``kind``."""
    tag = context.get("tag")
    if tag is None:
        return f"required key {key} is missing (one of {', '.join(_tags(data, path, schema, key))})"
    known = re.findall(r"'([^']+)'", str(context["expected_tags"]))
    hint = did_you_mean(str(tag), known)
    return f"unknown {key} {tag!r}{hint or ' (known: ' + ', '.join(sorted(known)) + ')'}"


def _tags(data: Mapping[Any, Any], path: KeyPath, schema: Mapping[str, Any], key: str) -> list[str]:
    found = [(node.get("properties") or {}).get(key, {}).get("const") for node in schema_nodes(data, path, schema)]
    return [tag for tag in found if tag]


def _at(data: Any, path: Sequence[str]) -> Any:
    for key in path:
        data = _step(data, key)
    return data


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
