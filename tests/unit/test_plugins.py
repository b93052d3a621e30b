from __future__ import annotations

import os
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


PLUGIN = """
from typing import Literal
from llmcompress.stages.base import Kind, Stage, StageConfig

class MineConfig(StageConfig):
    type: Literal["mine"] = "mine"
    fails: bool = False

class Mine(Stage):
    Config = MineConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.METRICS})

    def run(self, state, ctx):
        if self.config.fails:
            {}["what is not there"]

    def restore(self, state, ctx):
        pass
"""


def test_a_stage_of_another_package_runs_is_in_doctor_and_answers_for_its_errors(tmp_path: Path) -> None:
    """In processes of their own, installed as pip would."""
    import json
    import subprocess
    import sys

    (tmp_path / "mine_package.py").write_text(PLUGIN)
    (tmp_path / "broken_package.py").write_text("raise ValueError('half written')")
    for name, group, entry in (
        ("mine", "stages", "mine = mine_package:Mine"),
        ("broken", "families", "odd = broken_package:FAMILY"),
    ):
        folder = tmp_path / f"{name}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (folder / "entry_points.txt").write_text(f"[llmcompress.{group}]\n{entry}\n")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nmodel: {path: 'asset:reference_reasoner'}\nrun: {device: cpu, threads: 1}\n"
        "stages:\n  load: {type: load}\n  mine: {type: mine, fails: true}\n"
    )

    def told(*words: str) -> tuple[int, dict]:
        done = subprocess.run(
            [sys.executable, "-m", "llmcompress", *words, "--json"], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *(p for p in sys.path if p)])},
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout)

    code, found = told("doctor")
    rows = {row["name"]: row for row in found["plugins"]}
    assert (rows["mine"]["package"], rows["mine"]["version"], rows["mine"]["problem"]) == ("mine", "1.5", None)
    assert "odd" in rows["odd"]["problem"] and "half written" in rows["odd"]["problem"]
    assert rows["odd"]["problem"] in found["problems"]
    code, found = told("run", "r.yaml", "--no-preflight")
    assert code == 1
    assert "unexpected KeyError in the plug-in mine: " in found["error"]["message"]
    assert "to the authors of mine" in found["error"]["next"]
    code, found = told("run", "r.yaml", "stages.mine.fails=false", "--no-preflight")
    assert (code, found["status"]) == (0, "finished")
    code, found = told("validate", "r.yaml", "stages.mine.other=false")
    assert code == 3


def test_a_stage_that_is_half_written_is_refused_by_what_it_lacks() -> None:
    from llmcompress.stages import check_stage
    from llmcompress.stages.base import Stage

    class Half(Stage):
        def run(self, state, ctx):
            pass

    with pytest.raises(EnvironmentProblem, match="has no restore"):
        check_stage("half", Half)

    class Nameless(Half):
        def restore(self, state, ctx):
            pass

    with pytest.raises(EnvironmentProblem, match="does not declare type"):
        check_stage("nameless", Nameless)
