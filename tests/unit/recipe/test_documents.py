from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmcompress.recipe.documents import parse_document, parse_value

FILE = Path("r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("0123", 123),  # YAML 1.1: 83
        ("0o17", 15),
        ("0x1F", 31),
        ("1:2", "1:2"),  # YAML 1.1: 62
        ("1e-4", 1e-4),  # YAML 1.1: text
        ("1_000", "1_000"),  # YAML 1.1: 1000
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("off", "off"),  # YAML 1.1: false
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("None", "None"),
        ("2024-01-01", "2024-01-01"),  # YAML 1.1: a date
        ("[2, a]", [2, "a"]),
        ("{first_half: 3, second_half: 2}", {"first_half": 3, "second_half": 2}),
        ("'3'", "3"),
        ("runs/${name}", "runs/${name}"),
        (r"mlp\.(a|b)[0-9]+$", r"mlp\.(a|b)[0-9]+$"),
    ],
)
def test_values_follow_the_core_schema_of_yaml_1_2(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_a_value_that_is_not_yaml_is_refused():
    with pytest.raises(ValueError, match="expected"):
        parse_value("[a")


def test_every_key_and_item_has_its_line():
    document = parse_document(FILE, "a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")
    assert not document.problems
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", "1")] == 5
    assert document.lines[("a", "c", "1", "d")] == 5


def test_duplicate_keys_are_reported_with_both_lines():
    problems = parse_document(FILE, "a: 1\nb:\n  c: 1\n  c: 2\na: 3\n").problems
    assert [(p.path, p.line) for p in problems] == [(("b", "c"), 4), (("a",), 5)]
    assert "line 3" in problems[0].message and "line 1" in problems[1].message


def test_anchors_and_merge_keys_work():
    document = parse_document(FILE, "a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n")
    assert document.data["c"] == {"b": 1, "d": 2}
    assert document.lines[("c", "b")] == 1


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("run: {dir: runs/${name}, seed: 0}\n", 1, "in quotes"),
        ("model: {path: ???}\n", 1, 'write "???" in quotes'),
        ("- a\n", 1, "must be a mapping"),
        ("", 1, "empty"),
        ("a: &x [*x]\n", 1, "contains itself"),
        ("true: 1\n", 1, "put it in quotes"),
        ("? [a]\n: 1\n", 1, "a list or mapping"),
        ("a: 1\n---\nb: 2\n", 2, "expected a single document"),
        ("a: !!python/object:os.system x\n", 1, "not valid YAML"),
    ],
)
def test_broken_files_name_line_and_reason(text, line, words):
    problems = parse_document(FILE, text).problems
    assert problems and problems[0].line == line
    assert words in problems[0].message


def test_json_is_read_by_the_rules_of_json():
    document = parse_document(Path("recipe.lock.json"), '{"recipe":\n {"a": "\\ud83d\\ude00", "b": 1e5}}')
    assert document.data == {"recipe": {"a": "\U0001f600", "b": 1e5}}
    assert document.lines[("recipe", "a")] == 2


_LAUGHS = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg"))
_MERGES = "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdef", "bcdefg")
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: x\ndescription: 'a\x07b'\n", 2, r"not valid YAML: the character U\+0007, which YAML does not allow"),
        ("name: x\n\0", 2, r"U\+0000"),
        ("vars: " + "{a: " * 3000 + "1" + "}" * 3000, 1, "too deep to read"),
        ("name: x\nn: " + "9" * 5000, 1, "4300 digits"),
        ("a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\n" + _LAUGHS, 1, "more than 100000 values: aliases of aliases"),
        ("a: &a {x: 1}\n" + _MERGES, 1, "more than 100000 values: aliases of aliases"),
    ],
    ids=["a bell", "a zero byte", "brackets", "digits", "aliases", "merged aliases"],
)
def test_what_no_recipe_holds_is_a_problem_with_its_line(text: str, line: int, message: str) -> None:
    (problem,) = parse_document(Path("r.yaml"), text).problems
    assert problem.line == line and re.search(message, problem.message)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "x: " + "{a: " * 3000, "9" * 5000, "a\x07"])
def test_overrides_that_cannot_be_read_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError):
        parse_value(text)
