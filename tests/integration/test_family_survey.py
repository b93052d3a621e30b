"""``family survey``: what a tree over fine-tunes would be, before a run, from weights alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.cli.app import invoke
from llmcompress.errors import ExitCode
from llmcompress.models.tensor_file import TensorFile

MEMBERS = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def recipe(family_run: Path) -> str:
    return str(family_run / "recipe.yaml")


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert invoke(["family", "survey", *words, "--json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def linears(folder: Path) -> torch.Tensor:
    file = TensorFile(folder / "model.safetensors")
    names = sorted(name for name in file.entries if name.endswith("proj.weight"))
    return torch.cat([file.read(name).double().flatten() for name in names])


def test_distances_are_those_of_the_weights(recipe: str, family_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, recipe)
    weights = torch.stack([linears(family_run / name) for name in MEMBERS])
    size = weights.square().sum(1).mean().sqrt()
    assert found["members"] == MEMBERS
    for i in range(3):
        for j in range(3):
            wanted = float((weights[i] - weights[j]).norm() / size)
            assert found["distance"][i][j] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert ["ant", "bee"] in [sorted(node["members"]) for node in found["tree"]["nodes"]], "two of them are made close"


def test_more_bits_promise_less_error(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for budget in ("2.5", "4", "9") for word in ("--budget", budget)]
    rows = ask(capsys, recipe, *words)["budgets"]
    # the recipe's own budget comes first, then those that were asked for
    assert [row["budget"] for row in rows] == [3.5, 2.5, 4.0, 9.0]
    rows.sort(key=lambda row: row["budget"])
    for row in rows:
        assert row["bits"] <= row["budget"] + 1e-9
    for name in MEMBERS:
        errors = [row["error"][name] for row in rows]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]
        # beside a difference that is a part of the weights the same error is larger, by the same factor at all budgets
        factors = [row["lost"][name] / row["error"][name] for row in rows]
        assert factors == pytest.approx(factors[:1] * 4) and factors[0] > 2


def test_it_writes_nothing_and_shows_tables(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fresh = f"run.dir={tmp_path / 'new'}"
    assert invoke(["family", "survey", recipe, fresh]) == ExitCode.OK
    said = capsys.readouterr().out
    assert "cat lost" in said and "2 models" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "1"], "the leaves alone take 2 bits"),
        (["--budget", "nan"], "the leaves alone take 2 bits"),
        (["stages.rqt~", "stages.evaluate_family~", "stages.export_family~"], "no stage of type rqt"),
    ],
)
def test_refusals(words: list[str], told: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["family", "survey", recipe, *words]) == ExitCode.USAGE
    assert told in capsys.readouterr().err
