from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from llmcompress.data.sources import SourceConfig, describe, require_window
from llmcompress.errors import InputError

ADAPTER = TypeAdapter(SourceConfig)


def source(**fields):
    return ADAPTER.validate_python(fields)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", "text"), ("a.txt.gz", "text"), ("A.JSONL", "jsonl"), ("a.json.xz", "jsonl"), ("d/*.parquet", "parquet")],
)
def test_a_file_name_alone_says_its_kind(name, kind):
    assert ADAPTER.validate_python(name) == source(kind=kind, path=name)


def test_the_kind_may_be_left_out_where_the_name_says_it():
    assert source(path="a.parquet", field="body") == source(kind="parquet", path="a.parquet", field="body")
    with pytest.raises(ValidationError, match="kind"):
        source(path="data.zip", field="body")


def test_a_file_name_that_says_nothing_is_refused():
    with pytest.raises(ValidationError, match="give kind and path"):
        ADAPTER.validate_python("data.zip")


def test_unknown_kind_and_fields_are_rejected():
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        source(kind="csv", path="x")
    with pytest.raises(ValidationError, match="Extra inputs"):
        source(kind="text", path="x", colour="red")
    with pytest.raises(ValidationError):
        source(kind="inline", texts=[])


def test_describe_names_the_source():
    assert describe(source(kind="text", path="a.txt")) == "text a.txt"
    assert describe(source(kind="hub", id="a/b")) == "hub a/b"
    assert describe(source(kind="inline", texts=["x"])) == "inline source"


def test_windows_are_held_against_the_models_context():
    for length, context in ((1024, 1024), (2, 1024), (10**9, None)):
        require_window("length", length, context)
    with pytest.raises(InputError, match="length is 1025, but base was built for 1024 positions"):
        require_window("length", 1025, 1024, "base")
