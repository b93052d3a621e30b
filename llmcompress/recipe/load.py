"""From a recipe file to a validated :class:`Recipe`: extends → merge → overrides → interpolation → validation → chain.

Everything that is wrong is reported at once. omegaconf resolves ``${…}`` and does not leave this file; merging is
done here, because it has to keep track of lines and of the order of stages and rules:

* mappings merge key by key, everything else (lists too) is replaced;
* a key that a recipe adds goes in front of the next inherited key it mentions (``evaluate: {}`` is enough to
  mention one), else to the end, because the order of stages and rules matters;
* ``key~:`` removes an inherited key.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmcompress.errors import InputError
from llmcompress.models.paths import matches, named_paths
from llmcompress.recipe.catalog import ROOT, find_recipe, recipe_names, shipped_path
from llmcompress.recipe.diagnose import (
    SourceMap,
    allowed_keys,
    did_you_mean,
    raise_problems,
    report_lines,
    validation_problems,
)
from llmcompress.recipe.documents import Document, KeyPath, Problem, parse_document
from llmcompress.recipe.overrides import apply_override, parse_overrides
from llmcompress.recipe.schema import Recipe, recipe_model, strict_schema
from llmcompress.stages import stage_types
from llmcompress.stages.base import Kind, Stage

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout

MISSING = "???"
_HINT = "correct the recipe, then: llmcompress validate"


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe that passed validation.

    Attributes:
        path: The file it was read from.
        text: That file's content.
        recipe: The validated recipe.
        data: The recipe as plain data, defaults filled in: what a run records.
        composed: What the files and overrides said, resolved, without defaults.
        overrides: As given.
        files: All files that took part, the recipe itself last.
        environment: Paths whose value came from the environment → the text with ``${oc.env:…}``.
        missing: Paths that are still ``???``; only with ``allow_missing``.
        lock: The lock it was read from, if it was one.
        sources: Where each key was written.
    """

    path: Path
    text: str
    recipe: Recipe
    data: dict[str, Any]
    composed: dict[str, Any]
    overrides: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    lock: dict[str, Any] | None = None
    sources: SourceMap = field(default_factory=lambda: SourceMap(Path()))

    def stages(self) -> list[Stage]:
        """The stages, built, in order."""
        return self.recipe.build_stages()

    def place(self, path: str) -> str:
        """Where the dotted ``path`` was written: ``file:line`` or ``override #n``."""
        return self.sources.place(path.split("."))

    def absent(self) -> dict[str, str]:
        """Files and folders that the recipe names and this machine does not have: dotted path → line of a report.

        In the order of the files. What lies in the run folder is left out: a stage may write there what a later
        one reads.
        """
        problems = []
        own = Path(self.recipe.run.dir).resolve()
        for path, text in named_paths(self.data):
            if path in self.missing or Path(text).resolve().is_relative_to(own):
                continue
            try:
                if not matches(text):
                    what = "no such model folder" if path == "model.path" else "no such file or folder"
                    problems.append(Problem(tuple(path.split(".")), f"{what}: {text}"))
            except InputError as error:
                problems.append(Problem(tuple(path.split(".")), error.message))
        ordered = report_lines(problems, self.sources)
        lines = {".".join(each.path): report_lines([each], self.sources)[0] for each in problems}
        return dict(sorted(lines.items(), key=lambda item: ordered.index(item[1])))

    def check_layout(self, layout: ModelLayout) -> None:
        """Check every stage against a model.

        Raises:
            RecipeError: A rule matches nothing, or a stage does not suit the model; a line per problem.
        """
        problems = []
        for stage in self.stages():
            for message in stage.check(layout):
                for line in message.splitlines():
                    problems.append(_stage_problem(stage.name, line))
        raise_problems(problems, self.sources, "llmcompress inspect MODEL lists the names of all weights")


def load_recipe(source: str | Path, overrides: Sequence[str] = (), allow_missing: bool = False) -> LoadedRecipe:
    """Load, compose and validate a recipe.

    Args:
        source: A file, the name of a shipped recipe, a run folder or a ``recipe.lock.json``.
        overrides: ``key=value``, ``+key=value``, ``+key@NAME=value``, ``key~``.
        allow_missing: Accept ``???`` where text is expected, so that a recipe can be checked before its model
            is at hand; the paths are in ``missing``.

    Raises:
        RecipeError: Anything is wrong; one line per problem.
    """
    path = find_recipe(source)
    reader = _Reader(SourceMap(path))
    data = reader.compose(path)
    raise_problems(reader.problems, reader.sources, _next(source)) if reader.broken else None
    lock = reader.lock
    problems = list(reader.problems)
    problems += _apply_overrides(data, overrides, reader.sources)
    resolved, environment, unresolvable = _resolve(data)
    problems += unresolvable
    missing = sorted(".".join(p) for p, value in _leaves(resolved) if value == MISSING)
    if not allow_missing:
        problems += [Problem(tuple(p.split(".")), f"must be given: {p}=VALUE on the command line") for p in missing]
    recipe, found = _validate(resolved)
    # what could not be resolved or is missing has been reported as such
    known = {problem.path for problem in problems} | (
        {tuple(p.split(".")) for p in missing} if recipe is None else set()
    )
    if allow_missing:
        known -= {tuple(p.split(".")) for p in missing}
    unresolved = [problem.path for problem in unresolvable]
    problems += [
        problem
        for problem in found
        # a section that lacks what could not be resolved is no second mistake
        if problem.path not in known and not any(path[: len(problem.path)] == problem.path for path in unresolved)
    ]
    problems += check_chain(resolved)
    # what an override says cannot be corrected in the recipe
    again = "correct what is named and run the command again"
    raise_problems(problems, reader.sources, again if overrides else _next(source, missing))
    assert recipe is not None
    return LoadedRecipe(
        path=path,
        text=reader.text,
        recipe=recipe,
        data=recipe.model_dump(mode="json"),
        composed=resolved,
        overrides=tuple(overrides),
        files=tuple(reader.files),
        environment=environment,
        missing=tuple(missing),
        lock=lock,
        sources=reader.sources,
    )


def _next(source: str | Path, missing: Sequence[str] = ()) -> str:
    return " ".join([_HINT, shlex.quote(str(source)), *(f"{path}=VALUE" for path in missing)])


def check_chain(data: dict[Any, Any]) -> list[Problem]:
    """Check that each stage gets what it consumes, from plain data.

    Args:
        data: The resolved recipe; stages of unknown type are passed over, they are reported elsewhere.
    """
    stages = data.get("stages")
    if not isinstance(stages, dict):
        return []
    types = stage_types()
    chain = [
        (str(name), types[config["type"]])
        for name, config in stages.items()
        if isinstance(config, dict) and isinstance(config.get("type"), str) and config["type"] in types
    ]
    if len(chain) < len(stages):
        return []
    problems, available = [], set[Kind]()
    for index, (name, stage) in enumerate(chain):
        for kind in sorted(stage.consumes - available):
            later = [other for other, candidate in chain[index + 1 :] if kind in candidate.produces]
            makers = [
                key for key, candidate in types.items() if kind in candidate.produces and kind not in candidate.consumes
            ]
            advice = (
                f"move {later[0]} in front of it" if later else f"add a stage of type {' or '.join(makers)} before it"
            )
            problems.append(
                Problem(("stages", name), f"needs {_SLOTS[kind]}, which no stage before it produces: {advice}")
            )
        for kind in sorted(stage.refuses & available):
            maker = next(other for other, candidate in chain[:index] if kind in candidate.produces)
            problems.append(
                Problem(
                    ("stages", name), f"comes after {maker}, which makes {_SLOTS[kind]}: move it in front of {maker}"
                )
            )
        # do not report what follows from the first gap again
        available |= stage.produces | stage.consumes
        if Kind.POLICY in stage.produces and len(chain) > 1 and not _used_later(chain[index + 1 :]):
            problems.append(
                Problem(
                    ("stages", name),
                    "comes after every evaluate and export stage, so nothing would use its policy: put it in front of "
                    "them, on the command line by +stages.NAME@evaluate=…, in a recipe that extends another by "
                    "`evaluate: {}` behind it",
                )
            )
    return problems


_SLOTS = {
    Kind.MODEL: "a model", Kind.CALIBRATION: "calibration data", Kind.PACKED: "quantized weights",
    Kind.POLICY: "a run-time policy", Kind.ADAPTER: "an adapter", Kind.METRICS: "measurements",
    Kind.ARTIFACT: "an artifact",
    Kind.FAMILY: "a family of models in a tree",
}  # fmt: skip


def _used_later(rest: Sequence[tuple[str, type[Stage]]]) -> bool:
    return any(stage.produces & {Kind.METRICS, Kind.ARTIFACT} for _, stage in rest)


def _stage_problem(name: str, line: str) -> Problem:
    """Give a stage's message the path it starts with, as far as it has one."""
    prefix, _, rest = line.partition(": ")
    keys = tuple(prefix.split("."))
    if rest and " " not in prefix and keys[:2] == ("stages", name):
        return Problem(keys, rest)
    if rest and " " not in prefix and keys[0] == "rules":
        return Problem(("stages", name, *keys), rest)
    return Problem(("stages", name), line)


class _Reader:
    """Reads a recipe and everything it extends.

    Args:
        sources: Filled with the line of every key.
    """

    def __init__(self, sources: SourceMap) -> None:
        self.sources = sources
        self.problems: list[Problem] = []
        self.broken = False
        self.files: list[Path] = []
        self.text = ""
        self.lock: dict[str, Any] | None = None
        self._open: list[Path] = []

    def compose(self, path: Path) -> dict[Any, Any]:
        """Data of ``path`` merged over what it extends."""
        path = path.resolve()
        document = self._read(path)
        if path.name.endswith(".lock.json"):
            document = self._unlock(document)
        self._open.append(path)
        bases = document.data.pop("extends", None)
        bases = [bases] if isinstance(bases, str) else [] if bases is None else bases
        line = document.lines.get(("extends",), 1)
        data: dict[Any, Any] = {}
        if not (isinstance(bases, list) and all(isinstance(b, str) for b in bases)):
            self._broken(path, line, "extends must be the name of a recipe or a list of names")
            bases = []
        for base in bases:
            target = self._base_path(path, base, line)
            if target is not None:
                data = self._merge(data, self.compose(target), None, ())
        self._open.pop()
        merged = self._merge(data, document.data, document, ())
        for key, number in document.lines.items():
            if not any(part.endswith("~") for part in key):
                self.sources.origins[key] = (path, number)
        return merged

    def _read(self, path: Path) -> Document:
        if path not in self.files:
            self.files.append(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            self._broken(path, 1, f"cannot be read: {what}")
            return Document(path)
        if not self._open:
            self.text = text
        document = parse_document(path, text)
        self.problems += document.problems
        self.broken |= not document.data
        return document

    def _unlock(self, document: Document) -> Document:
        """The recipe inside a lock file."""
        inner = document.data.get("recipe")
        if not isinstance(inner, dict):
            if document.data:
                self._broken(document.file, 1, "not a recipe lock: it has no recipe")
            return Document(document.file)
        self.lock = document.data
        lines = {key[1:]: line for key, line in document.lines.items() if key[0] == "recipe" and len(key) > 1}
        return Document(document.file, inner, lines)

    def _base_path(self, path: Path, base: str, line: int) -> Path | None:
        options = [path.parent / base, path.parent / f"{base}.yaml", path.parent / f"{base}.yml"]
        target = next((option for option in options if option.is_file()), shipped_path(base))
        if target is None:
            names = [f.stem for f in path.parent.glob("*.yaml") if f != path] + recipe_names(fragments=True)
            hint = did_you_mean(base, names)
            self._broken(path, line, f"extends: no file {base!r}{hint if 'did you mean' in hint else ''}")
            return None
        target = target.resolve()
        if target in self._open:
            cycle = [*self._open[self._open.index(target) :], target]
            shown = " → ".join(
                f.relative_to(ROOT.resolve()).as_posix() if f.is_relative_to(ROOT.resolve()) else f.name for f in cycle
            )
            self._broken(path, line, f"extends: cycle {shown}")
            return None
        return target

    def _broken(self, path: Path, line: int, message: str) -> None:
        self.problems.append(Problem((), message, path, line))
        self.broken = True

    def _merge(self, base: Any, child: Any, document: Document | None, path: KeyPath) -> Any:
        """``child`` over ``base``; neither is changed. ``document`` is None when ``child`` has no ``key~``."""
        if not isinstance(child, dict) or not isinstance(base, dict):
            if isinstance(child, dict):
                return {
                    k: self._merge({}, v, document, (*path, str(k))) for k, v in self._kept(base, child, document, path)
                }
            return copy.deepcopy(child)
        base = dict(base)
        kept = list(self._kept(base, child, document, path))
        order = _merged_order(list(base), [key for key, _ in kept])
        values = dict(kept)
        merged = {}
        for key in order:
            here = (*path, str(key))
            if key not in values:
                merged[key] = base[key]
            elif key in base:
                if not (isinstance(base[key], dict) and isinstance(values[key], dict)):
                    self.sources.forget(here)
                merged[key] = self._merge(base[key], values[key], document, here)
            else:
                merged[key] = self._merge({}, values[key], document, here)
        return merged

    def _kept(
        self, base: Any, child: dict[Any, Any], document: Document | None, path: KeyPath
    ) -> Iterator[tuple[Any, Any]]:
        """Items of ``child`` without the removals, which are applied to ``base``."""
        for key, value in child.items():
            if document is None or not (isinstance(key, str) and key.endswith("~")):
                yield key, value
                continue
            name = key[:-1]
            if not isinstance(base, dict) or name not in base:
                hint = did_you_mean(name, base if isinstance(base, dict) else ())
                line = document.lines.get((*path, key), 1)
                self.problems.append(Problem((*path, key), f"nothing inherited to remove{hint}", document.file, line))
            else:
                del base[name]
                self.sources.forget((*path, name))


def _merged_order(base: list[Any], child: list[Any]) -> list[Any]:
    """Keys of ``base`` with each new key of ``child`` in front of the next inherited key that ``child`` has."""
    order = list(base)
    for index, key in enumerate(child):
        if key not in base:
            following = next((other for other in child[index + 1 :] if other in base), None)
            order.insert(len(order) if following is None else order.index(following), key)
    return order


def _apply_overrides(data: dict[Any, Any], texts: Sequence[str], sources: SourceMap) -> list[Problem]:
    parsed, problems = parse_overrides(texts)
    for override in parsed:
        try:
            apply_override(data, override, lambda d, p: allowed_keys(d, p, strict_schema()))
        except ValueError as error:
            problems.append(Problem((), f"override #{override.number}: {'.'.join(override.path)}: {error}"))
            continue
        sources.forget(override.path)
        if override.action != "delete":
            sources.origins[override.path] = override.number
    return problems


def _resolve(data: dict[Any, Any]) -> tuple[dict[Any, Any], dict[str, str], list[Problem]]:
    """Resolve ``${…}``.

    Returns:
        Plain data; path → text of values that depend on the environment; what could not be resolved.
    """
    if not any(isinstance(value, str) and "${" in value for _, value in _leaves(data)):
        return data, {}, []
    from omegaconf import OmegaConf

    problems: list[Problem] = []
    texts = {path: value for path, value in _leaves(data) if isinstance(value, str) and "${" in value}
    # text that omegaconf cannot even parse would stop it at the first such value
    parsed = {path for path, value in texts.items() if _parses(path, value, problems)}
    usable = _with(data, {path: None for path in texts if path not in parsed})
    if isinstance(run := usable.setdefault("run", {}), dict):
        run.setdefault("dir", f"runs/{usable.get('name', 'run')}")
    values = _resolve_values(OmegaConf.create(usable), parsed, problems)
    resolved = _with(data, {path: values.get(path) for path in texts})
    environment = {}
    if any("oc.env" in text for text in texts.values()):
        # a value depends on the environment if it changes when the environment is out of reach
        silent = {p: (f"<{p}>" if "oc.env" in text else text) for p, text in texts.items() if p in parsed}
        other = _resolve_values(OmegaConf.create(_with(usable, silent)), parsed, [])
        environment = {".".join(p): texts[p] for p in texts if other.get(p) != values.get(p)}
    return resolved, environment, problems


def _parses(path: KeyPath, value: str, problems: list[Problem]) -> bool:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException as error:
        problems.append(Problem(path, f"cannot parse {value!r}: {str(error).splitlines()[0]}"))
        return False
    return True


def _resolve_values(config: Any, paths: set[KeyPath], problems: list[Problem]) -> dict[KeyPath, Any]:
    """Resolved plain values of ``paths``; those that fail are left out and reported."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = {}
    for path in sorted(paths):
        node = config
        try:
            for part in path:
                # whether a list holds something takes the values of all its items
                at = OmegaConf.is_list(node) or (part.isdigit() and part not in node)
                node = node[int(part)] if at else node[part]
            values[path] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            problems.append(Problem(path, _unresolved(str(error).splitlines()[0], config)))
    return values


def _unresolved(text: str, config: Any) -> str:
    """What omegaconf says of an interpolation, with what was probably meant."""
    if unset := re.search(r"Environment variable '(\w+)' not found", text):
        return f"environment variable {unset[1]} is not set"
    if absent := re.search(r"Interpolation key '([^']+)' not found", text):
        from omegaconf import OmegaConf

        names = [".".join(path) for path, _ in _leaves(OmegaConf.to_container(config, resolve=False))]
        hint = did_you_mean(absent[1], names, 0.75)
        if absent[1] in os.environ:  # written as a shell writes it
            hint = f" (did you mean oc.env:{absent[1]}?)"
        return f"{text}{hint if 'did you mean' in hint else ' (only keys that the recipe writes have a value here)'}"
    if "Unsupported interpolation type env" in text:
        return f"{text} (did you mean oc.env?)"
    return text


def _with(data: Any, values: dict[KeyPath, Any], path: KeyPath = ()) -> Any:
    """Copy of ``data`` with the leaves in ``values`` replaced."""
    if path in values:
        return values[path]
    if isinstance(data, dict):
        return {key: _with(value, values, (*path, str(key))) for key, value in data.items()}
    if isinstance(data, list):
        return [_with(value, values, (*path, str(index))) for index, value in enumerate(data)]
    return data


def _leaves(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield path, data


def _validate(data: dict[Any, Any]) -> tuple[Recipe | None, list[Problem]]:
    try:
        return recipe_model().model_validate(data), []
    except ValidationError as error:
        return None, validation_problems(error.errors(include_url=False), data, strict_schema())  # type: ignore[arg-type]
