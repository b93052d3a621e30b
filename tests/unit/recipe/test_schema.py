from __future__ import annotations

import json
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import ValidationError

from llmcompress import stages
from llmcompress.errors import EnvironmentProblem
from llmcompress.recipe.schema import parse_size, recipe_model, schema, strict_schema

MINIMAL = {"version": 1, "name": "x", "model": {"path": "m"}, "stages": {"load": {"type": "load"}}}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("16 GiB", 16 * 2**30),
        ("1.5g", 1_500_000_000),
        ("512MiB", 2**29),
        ("7", 7),
        (8_000_000, 8_000_000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 bananas"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="24GB"):
        parse_size(text)


def test_recipes_are_frozen_and_name_their_run_folder():
    recipe = recipe_model().model_validate(MINIMAL)
    assert recipe.run.dir == "runs/x"
    with pytest.raises(ValidationError):
        recipe.name = "y"


def test_every_model_in_the_schema_forbids_unknown_keys():
    for name, definition in strict_schema()["$defs"].items():
        if definition.get("type") == "object" and "properties" in definition:
            assert definition["additionalProperties"] is False, name


def test_the_full_dump_of_a_recipe_validates_to_the_same_recipe():
    recipe = recipe_model().model_validate(MINIMAL)
    assert recipe_model().model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_editor_schema_requires_nothing_and_describes_fields():
    found = json.dumps(schema())
    assert '"required"' not in found
    assert "Folder with config.json and safetensors" in found
    assert schema()["properties"]["extends"]


def test_all_built_in_stages_are_in_the_union_and_import_no_torch():
    code = (
        "import sys; from llmcompress.recipe.schema import recipe_model; recipe_model();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name, stage in stages.stage_types().items():
        assert stage.Config.model_fields["type"].annotation.__args__ == (name,)


class Extra(stages.Stage):
    class Config(stages.base.StageConfig):
        type: Literal["extra"]

    def run(self, state, ctx):
        """Nothing."""

    restore = run


def test_other_packages_add_stages_by_entry_point(monkeypatch):
    monkeypatch.setattr(stages, "discover", lambda group: {"extra": Extra} if group == "llmcompress.stages" else {})
    stages.stage_types.cache_clear()
    recipe_model.cache_clear()
    try:
        recipe = recipe_model().model_validate({**MINIMAL, "stages": {"e": {"type": "extra"}}})
        assert isinstance(recipe.build_stages()[0], Extra)
    finally:
        stages.stage_types.cache_clear()
        recipe_model.cache_clear()


@pytest.mark.parametrize(("name", "stage"), [("extra", object), ("other", Extra), ("load", Extra)])
def test_plug_ins_that_are_no_stages_are_refused(monkeypatch, name, stage):
    monkeypatch.setattr(stages, "discover", lambda group: {name: stage})
    stages.stage_types.cache_clear()
    try:
        with pytest.raises(EnvironmentProblem, match=name):
            stages.stage_types()
    finally:
        stages.stage_types.cache_clear()
