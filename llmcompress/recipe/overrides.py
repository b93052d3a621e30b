"""Command-line overrides: ``key=value`` changes, ``+key=value`` adds, ``key~`` deletes.

Order matters among stages and rules: ``+key=value`` adds behind its neighbours, ``+key@NAME=value`` in front of the one
that is called NAME.

Keys are dotted paths (``stages.quantize.rules.experts.bits``). Values are YAML 1.2 core scalars, or lists and
mappings in brackets. A key must exist in the recipe or be known to the schema, so that a typo is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmcompress.recipe.diagnose import did_you_mean, renamed
from llmcompress.recipe.documents import KeyPath, Problem, parse_value

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

AllowedKeys = Callable[[Any, KeyPath], "list[str] | None"]


@dataclass(frozen=True, slots=True)
class Override:
    """One parsed override.

    Attributes:
        number: Position on the command line, from 1.
        action: What to do.
        path: Keys from the top.
        value: New value; None for ``delete``.
        before: Neighbour in front of which ``add`` puts the key; None for the end.
    """

    number: int
    action: Literal["set", "add", "delete"]
    path: KeyPath
    value: Any = None
    before: str | None = None


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Parse overrides in order.

    Returns:
        The overrides that could be read, and a problem for each that could not.
    """
    parsed, problems = [], []
    for number, text in enumerate(texts, 1):
        try:
            parsed.append(parse_override(text, number))
        except ValueError as error:
            problems.append(Problem((), f"override #{number}: {text!r}: {error}"))
    return parsed, problems


def parse_override(text: str, number: int = 1) -> Override:
    """Parse one override.

    Raises:
        ValueError: It is not ``key=value``, ``+key=value``, ``+key@NAME=value`` or ``key~``.
    """
    key, equals, value = text.partition("=")
    key, placed, before = key.strip().partition("@")
    if text.strip() == "=":
        raise ValueError("write key=value without spaces")
    if not equals:
        if not key.endswith("~"):
            raise ValueError("expected key=value, +key=value or key~")
        return Override(number, "delete", _path(key[:-1]))
    action: Literal["set", "add"] = "add" if key.startswith("+") else "set"
    path = _path(key.removeprefix("+"))
    if placed and (action == "set" or not _KEY.fullmatch(before) or "." in before):
        raise ValueError("@ is for what is added, in front of a neighbour: +stages.NAME@evaluate=value")
    try:
        parsed = parse_value(value)
    except ValueError as error:
        raise ValueError(f"the value is not valid YAML ({error}); put text with special signs in quotes") from error
    return Override(number, action, path, parsed, before if placed else None)


def apply_override(data: dict[Any, Any], override: Override, allowed: AllowedKeys) -> None:
    """Change ``data`` in place.

    Args:
        data: The composed recipe, before interpolation.
        override: What to do.
        allowed: ``allowed(data, path)`` lists the keys the schema knows for the mapping at ``path``; None when any
            name may be given there (stages, rules) or nothing is known.

    Raises:
        ValueError: The key does not exist, or with ``+`` exists already; or the neighbour does not exist.
    """
    *parents, last = override.path
    node: Any = data
    for depth, key in enumerate(parents):
        here = override.path[:depth]
        child = _child(node, key)
        if child is _ABSENT or child is None:
            creates = override.action == "add" or (override.action == "set" and _known(allowed, data, here, key))
            if not (isinstance(node, dict) and creates):
                raise ValueError(_unknown(node, key, here, allowed, data))
            child = node[_as_key(node, key)] = {}
        elif isinstance(child, str) and {"path", override.path[depth + 1]} <= set(allowed(data, (*here, key)) or ()):
            # the name of a file stands for a section with this path
            child = {"path": child}
            node[int(key) if isinstance(node, list) else _as_key(node, key)] = child
        node = child
    if not isinstance(node, dict | list):
        raise ValueError(f"{'.'.join(parents)} is a single value, it has no keys")
    present = _child(node, last) is not _ABSENT
    if override.action == "add" and present:
        raise ValueError("the key exists already: leave out the +")
    may_create = override.action == "add" or (override.action == "set" and _known(allowed, data, tuple(parents), last))
    if not present and not may_create:
        raise ValueError(_unknown(node, last, tuple(parents), allowed, data))
    if isinstance(node, list):
        if override.before is not None:
            raise ValueError("@ is for stages, rules and other sections, not for lists")
        _change_item(node, last, override)
    elif override.action == "delete":
        del node[_as_key(node, last)]
    else:
        behind = [] if override.before is None else _from(node, override.before)
        node[_as_key(node, last)] = override.value
        for name in behind:
            node[name] = node.pop(name)


_ABSENT = object()


def _from(node: dict[Any, Any], before: str) -> list[Any]:
    """The keys that come behind what is put in front of ``before``."""
    names = list(node)
    if _as_key(node, before) not in names:
        raise ValueError(f"no {before!r} to put it in front of (here: {', '.join(map(str, names))})")
    return names[names.index(_as_key(node, before)) :]


def _change_item(node: list[Any], last: str, override: Override) -> None:
    index = int(last) if last.isdigit() else -1
    if 0 <= index < len(node):
        if override.action == "delete":
            del node[index]
        else:
            node[index] = override.value
    elif override.action == "add" and index == len(node):
        node.append(override.value)
    else:
        raise ValueError(f"the list has items 0 to {len(node) - 1}")


def _path(key: str) -> KeyPath:
    if not _KEY.fullmatch(key):
        raise ValueError("the key must be names joined by dots, such as stages.quantize.damp")
    return tuple(key.split("."))


def _as_key(node: dict[Any, Any], key: str) -> Any:
    """The key as it stands in ``node``: layer indices are numbers there, text on the command line."""
    if key in node or not key.isdigit():
        return key
    return int(key) if int(key) in node or all(isinstance(k, int) for k in node) else key


def _child(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        return node.get(_as_key(node, key), _ABSENT)
    if isinstance(node, list):
        return node[int(key)] if key.isdigit() and int(key) < len(node) else _ABSENT
    return _ABSENT


def _known(allowed: AllowedKeys, data: Any, path: KeyPath, key: str) -> bool:
    return key in (allowed(data, path) or ())


def _unknown(node: Any, key: str, path: KeyPath, allowed: AllowedKeys, data: Any) -> str:
    """Message for a key that does not exist, with the nearest that does."""
    if isinstance(node, list):
        return f"the list {'.'.join(path)} has items 0 to {len(node) - 1}"
    names = [str(k) for k in node] if isinstance(node, dict) else []
    fields = allowed(data, path)
    candidates = list(dict.fromkeys([*names, *(fields or ())]))
    where = f" in {'.'.join(path)}" if path else ""
    add = "" if fields is not None else "; +key=value adds a new one"
    hint = did_you_mean(key, candidates)
    if "did you mean" not in hint:
        below = list(_below(node, renamed(key), path, allowed, data))[:4]
        hint = f" (did you mean {' or '.join(below)}?)" if below else hint
    return f"no key {key!r}{where}{hint}{add}"


def _below(node: Any, key: str, path: KeyPath, allowed: AllowedKeys, data: Any) -> Iterator[str]:
    """Dotted paths further down where ``key`` may stand: ``bits`` of ``stages.quantize`` is one of each rule."""
    for name, child in node.items() if isinstance(node, dict) else ():
        here = (*path, str(name))
        if isinstance(child, dict):
            if key in child or _known(allowed, data, here, key):
                yield ".".join((*here, key))
            yield from _below(child, key, here, allowed, data)
