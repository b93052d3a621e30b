from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llmcompress import plugins
from llmcompress.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def _forget() -> None:
    plugins.discover.cache_clear()
    plugins.names.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, value: str, group: str = "llmcompress.families") -> None:
    point = EntryPoint("mine", value, group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])


def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "fractions:Fraction")
    assert plugins.discover("llmcompress.families")["mine"].__name__ == "Fraction"
    assert plugins.discover("other") == {}


@pytest.mark.parametrize("value", ["no_such_module:thing", "fractions:NoSuchThing"])
def test_broken_plug_ins_are_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    install(monkeypatch, value)
    with pytest.raises(EnvironmentProblem, match="mine"):
        plugins.discover("llmcompress.families")


def test_an_export_format_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from llmcompress.errors import ExportError
    from llmcompress.export.native import NativeExporter
    from llmcompress.export.registry import FORMATS, exporter, formats

    with pytest.raises(ExportError, match="unknown export format 'mine'"):
        exporter("mine")
    plugins.names.cache_clear()

    class Mine(NativeExporter):
        name = "mine"

    monkeypatch.setitem(sys.modules, "mine_package", types.SimpleNamespace(Mine=Mine, Other=NativeExporter))
    install(monkeypatch, "mine_package:Mine", "llmcompress.exporters")
    assert formats() == (*FORMATS, "mine")
    assert type(exporter("mine")) is Mine
    plugins.discover.cache_clear()
    install(monkeypatch, "mine_package:Other", "llmcompress.exporters")
    with pytest.raises(EnvironmentProblem, match="not an Exporter class of that name"):
        exporter("mine")


def test_recipes_may_name_a_format_of_another_package(tmp_path: Path) -> None:
    """In a fresh process: what may stand in a recipe is known when the stage is imported, the plug-in is not loaded."""
    import subprocess
    import sys

    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (tmp_path / "mine-1.dist-info/entry_points.txt").write_text("[llmcompress.exporters]\nmine = no_such_module:Mine\n")
    code = (
        "from llmcompress.stages.export import ExportConfig as C; import sys;"
        "print(C(type='export', formats=['mine', 'native']).formats, 'torch' in sys.modules)"
    )
    paths = [str(tmp_path), *(p for p in sys.path if p)]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(paths)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "('mine', 'native') False", done.stderr
