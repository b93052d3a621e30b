from __future__ import annotations

from textwrap import dedent

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe.load import load_recipe

GOOD = """
version: 1
name: good
model: {path: some/model}
stages:
  load: {type: load}
  calibrate: {type: calibrate, source: {kind: inline, texts: [a b c]}, samples: 4, length: 8}
  quantize:
    type: gptq
    rules:
      attention: {role: attention, bits: 4}
      experts: {role: experts, bits: 3}
  export: {type: export}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write recipe files into the current directory, which is empty."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    write("good.yaml", GOOD)
    return write


@pytest.fixture
def problems(write):
    """Lines of the error that loading a recipe raises."""

    def problems(source, overrides=(), **options):
        with pytest.raises(RecipeError) as caught:
            load_recipe(source, overrides, **options)
        assert caught.value.hint
        return caught.value.message.splitlines()

    return problems
