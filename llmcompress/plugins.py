"""Third-party additions, found through Python entry points.

A package adds a model family by an entry point in the group ``llmcompress.families`` whose name
is the model type and whose value is a :class:`~llmcompress.models.families.parts.Family`, and a stage
by one in the group ``llmcompress.stages`` whose name is the stage's ``type`` and whose value is its class. An export
format is one in the group ``llmcompress.exporters`` whose name is the format's and whose value is its
:class:`~llmcompress.export.base.Exporter` class.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from llmcompress.errors import EnvironmentProblem

GROUPS = ("llmcompress.families", "llmcompress.stages", "llmcompress.exporters")


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
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist is not None else point.value
        message = f"plug-in {point.name!r} of {package} cannot be loaded: {error}"
        raise EnvironmentProblem(message, f"update or remove it: pip uninstall {package}") from error
