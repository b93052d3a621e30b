"""Damaged families and wrong calls: one clear error, the right exit code, nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import ExitCode


@pytest.fixture
def copy(family_run: Path, tmp_path: Path) -> Path:
    target = tmp_path / "family"
    shutil.copytree(family_run / "run/artifact", target)
    return target


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "family.json").read_text())
        change(data)
        (folder / "family.json").write_text(json.dumps(data))

    return apply


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(keep * len(raw))])

    return apply


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(content)

    return apply


FIRST = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no family.json": (gone("family.json"), "family"),
    "no JSON": (text("family.json", "{"), "family.json"),
    "another method": (edit(lambda d: d.update(quant_method="gptq")), "quant_method"),
    "no plan": (edit(lambda d: d.pop("plan")), "family.json"),
    "a newer version": (edit(lambda d: d["plan"].update(version=99)), "version 99"),
    "unknown member": (edit(lambda d: d["plan"]["order"].append("dog")), "not over the family's members"),
    "node outside": (edit(lambda d: d["plan"]["weights"][FIRST]["bits"].update({"../x": 2})), "no node"),
    "no bits": (edit(lambda d: d["plan"]["weights"][FIRST].update(bits={})), "nothing is stored"),
    "wrong shape": (edit(lambda d: d["plan"]["weights"][FIRST].update(shape=[64, 32])), FIRST),
    "wrong tree": (edit(lambda d: d["plan"]["weights"][FIRST].update(tree="none")), "no tree"),
    "shorter node": (cut("nodes/bee.safetensors", 0.7), "bee.safetensors"),
    "empty node": (cut("nodes/bee.safetensors", 0), "bee.safetensors"),
    "no node": (gone("nodes/bee.safetensors"), "bee.safetensors"),
    "no private tensors": (gone("members/bee/private.safetensors"), "private.safetensors"),
    "no config": (gone("members/bee/config.json"), "config.json"),
    "damaged config": (text("members/bee/config.json", "[]"), "config.json"),
}


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    from llmcompress.cli.app import invoke

    capsys.readouterr()
    code = invoke(words)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGE[name]
    damage(copy)
    code, error = said(["generate", str(copy), "--member", "bee", "--prompt", "x", "-n", "1"], capsys)
    assert code == ExitCode.ENVIRONMENT, error
    assert words in error
    assert "Traceback" not in error


def calls(copy: Path, run: Path) -> list[tuple[list[str], int, str]]:
    family, ant = str(copy), str(run / "ant")
    return [
        (
            ["family", "add", family, "--member", "dog", "--model", str(run / "nowhere")],
            ExitCode.ENVIRONMENT,
            "nowhere",
        ),
        (["family", "add", family, "--member", "dog", "--model", family], ExitCode.ENVIRONMENT, "family"),
        (["family", "add", family, "--member", "../dog", "--model", ant], ExitCode.USAGE, "name of a new member"),
        (["family", "add", family, "--member", "ant", "--model", ant], ExitCode.USAGE, "name of a new member"),
        (["family", "add", family, "--member", "dog", "--model", ant, "--bits", "7"], ExitCode.USAGE, "--bits"),
        *(
            (
                ["family", "add", family, "--member", "dog", "--model", ant, "--calibration", source],
                ExitCode.USAGE,
                what,
            )
            for source, what in (
                ("notes.docx", "does not say what is in it"),
                ("{kind: jsonl", "not valid YAML"),
                ("{kind: jsonl}", "jsonl.path: Field required"),
                ("{kind: synthetic}", "random tokens"),
            )
        ),
        (["family", "remove", family, "--member", "dog"], ExitCode.ENVIRONMENT, "no member 'dog'"),
        (["family", "remove", ant, "--member", "ant"], ExitCode.ENVIRONMENT, "no family"),
        (
            ["family", "merge", family, "--member", "ant=0", "--out", str(copy.parent / "m")],
            ExitCode.EXPORT,
            "positive",
        ),
        (
            ["export", family, "--member", "ant", "-f", "compressed-tensors", "--out", str(copy.parent / "m")],
            ExitCode.EXPORT,
            "sum of",
        ),
        (
            ["export", family, "--member", "dog", "-f", "dense", "--out", str(copy.parent / "m")],
            ExitCode.ENVIRONMENT,
            "dog",
        ),
        (["export", family, "--member", "ant", "-f", "dense"], ExitCode.USAGE, "--out"),
        (["serve", family, "--name", "x", "--port", "0"], ExitCode.ENVIRONMENT, "leave out --name"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_wrong_calls_change_nothing(
    copy: Path, family_run: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected, part = calls(copy, family_run)[number]
    before = {path: path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()}
    code, error = said(words, capsys)
    assert code == expected, error
    assert part in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()} == before
    assert not (copy.parent / "m").exists()


def test_a_killed_removal_is_finished_by_another(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a removal leaves that died after its first step: family.json is new, files are still there."""
    leaf = (copy / "nodes/ant.safetensors").read_bytes()
    shutil.copytree(copy / "members/ant", copy.parent / "ant")
    assert said(["family", "remove", str(copy), "--member", "ant"], capsys)[0] == ExitCode.OK
    after = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    (copy / "nodes/ant.safetensors").write_bytes(leaf)
    shutil.copytree(copy.parent / "ant", copy / "members/ant")
    (copy / "nodes/dog.part").write_bytes(leaf[:100])
    assert said(["family", "remove", str(copy), "--member", "ant"], capsys)[0] == ExitCode.OK
    assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == after


RECIPES = {
    "no members": ("members: {}", "members"),
    "one member": ("members: {ant: {path: ANT}}", "members"),
    "a name with a slash": ("members: {a/b: {path: ANT}, c: {path: ANT}}", "a/b"),
    "no folder": ("members: {ant: {path: ANT}, bee: {path: NOWHERE}}", "NOWHERE"),
    "budget below the leaves": ("members: {ant: {path: ANT}, bee: {path: ANT}}\n    bits: {budget: 0.5}", "budget"),
    "unknown scope": ("members: {ant: {path: ANT}, bee: {path: ANT}}\n    tree: {scope: galaxy}", "scope"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes(family_run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage, part = RECIPES[name]
    filled = stage.replace("ANT", str(family_run / "ant")).replace("NOWHERE", str(tmp_path / "NOWHERE"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nname: wrong\nmodel: {{path: {family_run}/base}}\nrun: {{dir: {tmp_path}/run, device: cpu}}\n"
        "stages:\n  load: {type: load}\n  rqt:\n    type: rqt\n"
        "    calibration: {samples: 2, length: 16, general: {kind: inline, texts: ['The cat sat on the stone. ']}}\n"
        f"    {filled}\n  export_family: {{type: export_family}}\n"
    )
    code, error = said(["run", str(recipe), "--quiet"], capsys)
    assert code in (ExitCode.RECIPE, ExitCode.ENVIRONMENT, ExitCode.RESOURCES), error
    assert part in error
    assert "Traceback" not in error
    assert not (tmp_path / "run/artifact").exists()
