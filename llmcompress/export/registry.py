"""Exporters by name: the table below is the whole list of built-in formats, loaded when they are asked for."""

from __future__ import annotations

import importlib

from llmcompress.errors import EnvironmentProblem, ExportError
from llmcompress.export.base import Exporter
from llmcompress.plugins import discover, names

BUILT_IN = {
    "native": "llmcompress.export.native:NativeExporter",
    "compressed-tensors": "llmcompress.export.compressed_tensors:CompressedTensorsExporter",
    "gguf": "llmcompress.export.gguf:GGUFExporter",
    "dense": "llmcompress.export.dense:DenseExporter",
}
FORMATS = tuple(BUILT_IN)
GROUP = "llmcompress.exporters"


def formats() -> tuple[str, ...]:
    """Every format that can be written: the built-in ones, then those of other packages."""
    return (*FORMATS, *(name for name in names(GROUP) if name not in FORMATS))


def exporter(name: str, dense_dtype: str = "auto") -> Exporter:
    """Return the exporter called ``name``.

    Args:
        name: One of :func:`formats`.
        dense_dtype: Data type of the ``dense`` format, ``auto`` for the source's.

    Raises:
        ExportError: There is no such format.
        EnvironmentProblem: The package that brings it is broken.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        made = getattr(importlib.import_module(module), attribute)
        found: Exporter = made(dense_dtype)
        return found
    if name in names(GROUP):
        return _of_another_package(name)
    raise ExportError(f"unknown export format {name!r}", f"use one of {', '.join(formats())}")


def _of_another_package(name: str) -> Exporter:
    made = discover(GROUP)[name]
    if not (isinstance(made, type) and issubclass(made, Exporter) and made.name == name):
        raise EnvironmentProblem(
            f"plug-in format {name!r} is not an Exporter class of that name",
            "its author should derive it from llmcompress.export.base.Exporter",
        )
    return made()
