from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.recipe.overrides import apply_override, parse_override, parse_overrides

KNOWN = {
    (): ["run", "stages"], ("run",): ["dir", "seed"], ("stages", "q"): ["damp", "rules"],
    ("stages", "q", "source"): ["path", "field"], ("stages", "q", "type"): ["field"],
}  # fmt: skip


def allowed(data, path):
    return KNOWN.get(tuple(path))


def apply(data, text):
    apply_override(data, parse_override(text), allowed)
    return data


def recipe():
    return {"run": {"seed": 0}, "stages": {"q": {"type": "gptq", "bits": {"layers": {3: 4}}, "formats": ["a", "b"]}}}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("run.seed=5", ("run", "seed"), 5),
        ("run.dir=x", ("run", "dir"), "x"),  # not there yet, but known
        ("stages.q.damp=0.1", ("stages", "q", "damp"), 0.1),
        ("+stages.new={type: load}", ("stages", "new"), {"type": "load"}),
        ("+stages.new.type=load", ("stages", "new"), {"type": "load"}),
        ("stages.q.formats.1=c", ("stages", "q", "formats"), ["a", "c"]),
        ("+stages.q.formats.2=c", ("stages", "q", "formats"), ["a", "b", "c"]),
        ("stages.q.formats.0~", ("stages", "q", "formats"), ["b"]),
        ("stages.q.bits.layers.3=8", ("stages", "q", "bits", "layers"), {3: 8}),
        ("+stages.q.bits.layers.0=2", ("stages", "q", "bits", "layers"), {3: 4, 0: 2}),
    ],
)
def test_overrides_change_the_recipe(text, path, value):
    node = apply(recipe(), text)
    for key in path:
        node = node[key]
    assert node == value


def test_a_file_that_stands_for_a_section_takes_keys():
    data = recipe()
    data["stages"]["q"]["source"] = "a.jsonl"
    assert apply(data, "stages.q.source.field=body")["stages"]["q"]["source"] == {"path": "a.jsonl", "field": "body"}
    # other text stays what it is
    with pytest.raises(ValueError, match=r"stages\.q\.type is a single value"):
        apply(data, "stages.q.type.field=body")


def test_what_is_added_stands_in_front_of_the_named_neighbour():
    data = {"stages": {"load": {}, "evaluate": {}, "export": {}}}
    assert list(apply(data, "+stages.embeddings@evaluate={type: embeddings}")["stages"]) == [
        "load", "embeddings", "evaluate", "export",
    ]  # fmt: skip
    assert next(iter(apply(data, "+stages.first@load={}")["stages"])) == "first"
    assert list(apply(data, "+stages.last={}")["stages"])[-1] == "last"


def test_a_section_that_is_written_empty_takes_keys():
    data = recipe() | {"run": None}
    assert apply(data, "run.seed=5")["run"] == {"seed": 5}


def test_delete_removes_the_key():
    assert "bits" not in apply(recipe(), "stages.q.bits~")["stages"]["q"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run.sed=1", "did you mean seed?"),
        ("rum.seed=1", "did you mean run?"),
        ("stages.p.damp=1", r"no key 'p' in stages.*\+key=value adds"),
        ("+run.seed=1", "exists already"),
        ("run.dir~", "no key 'dir'"),
        ("stages.q.type.x=1", "single value"),
        ("stages.q.formats.7=c", "items 0 to 1"),
        ("stages.damp=1", r"did you mean stages\.q\.damp\?"),  # known there, not set yet
        ("stages.layers=1", r"did you mean stages\.q\.bits\.layers\?"),
        ("run.seed.deep.er=1", "no key 'deep'"),
        ("+stages.new@p={}", r"no 'p' to put it in front of \(here: .*q"),
        ("+stages.q.formats.2@0=c", "not for lists"),
    ],
)
def test_wrong_keys_are_refused_with_advice(text, words):
    data = recipe()
    with pytest.raises(ValueError, match=words):
        apply(data, text)
    assert data == recipe()


@pytest.mark.parametrize(
    "text", ["", "run.seed", "=1", "a..b=1", "+a", "a b=1", "a=[1", "++a=1", "a@b=1", "+a@=1", "a@b~"]
)
def test_malformed_overrides_are_collected_with_their_number(text):
    parsed, problems = parse_overrides(["run.seed=1", text])
    assert len(parsed) == 1 and len(problems) == 1
    assert problems[0].message.startswith("override #2: ")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_any_json_value_survives(value):
    assert parse_override("a.b=" + json.dumps(value)).value == value
