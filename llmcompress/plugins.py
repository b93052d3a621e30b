"""Third-party additions, found through Python entry points.

A package adds a model family by an entry point in the group ``llmcompress.families`` whose name
is the model type and whose value is a :class:`~llmcompress.models.families.parts.Family`, and a stage
by one in the group ``llmcompress.stages`` whose name is the stage's ``type`` and whose value is its class. An export
format is one in the group ``llmcompress.exporters`` whose name is the format's and whose value is its
:class:`~llmcompress.export.base.Exporter` class, a checker of answers one in the group ``llmcompress.checkers`` whose
value is a function (:class:`~llmcompress.data.problems.files.Checker`).
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Any

from llmcompress.errors import EnvironmentProblem

CHECKERS = "llmcompress.checkers"
GROUPS = ("llmcompress.families", "llmcompress.stages", "llmcompress.exporters", CHECKERS)


@cache
def names(group: str) -> tuple[str, ...]:
    """Names of the entry points of ``group`` in order, without loading any."""
    return tuple(sorted(point.name for point in entry_points(group=group)))


@cache
def discover(group: str) -> dict[str, Any]:
    """Load every entry point of ``group``.

    Args:
        group: One of :data:`GROUPS`.

    Returns:
        Entry point name → loaded object.

    Raises:
        EnvironmentProblem: A plug-in is installed but cannot be imported.
    """
    return {point.name: _load(point) for point in entry_points(group=group)}


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # somebody else's module may raise anything
        package = _package(point)
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        message = f"plug-in {point.name!r} of {package} cannot be loaded: {said}"
        raise EnvironmentProblem(message, f"update or remove it: pip uninstall {package}") from error


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def packages() -> dict[str, str]:
    """Packages that bring plug-ins and their versions, without loading any."""
    points = (point for group in GROUPS for point in entry_points(group=group))
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def installed() -> list[dict[str, str | None]]:
    """Every plug-in for ``doctor``: what it adds, its name, the package and its version, and why it does not load."""
    found: list[dict[str, str | None]] = []
    for group in GROUPS:
        for point in sorted(entry_points(group=group), key=lambda point: point.name):
            problem = None
            try:
                _load(point)
            except EnvironmentProblem as error:
                problem = error.message
            version = point.dist.version if point.dist is not None else None
            kind = group.rpartition(".")[2]
            found.append(
                {"kind": kind, "name": point.name, "package": _package(point), "version": version, "problem": problem}
            )
    return found


def culprit(trace: TracebackType | None) -> str | None:
    """The package of the plug-in in whose code an error arose; None where it was ours or another library's.

    Args:
        trace: Trace of the error. The innermost frame that is a plug-in's or ours decides.
    """
    owners = {
        point.module.partition(".")[0]: _package(point) for group in GROUPS for point in entry_points(group=group)
    }
    found = None
    while owners and trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if top in owners:
            found = owners[top]
        elif top == "llmcompress":
            found = None
        trace = trace.tb_next
    return found
