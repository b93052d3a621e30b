from __future__ import annotations

import copy
import gzip
import hashlib
import json
import lzma

import pytest
from pydantic import TypeAdapter

from llmcompress.data.documents import read
from llmcompress.data.sources import SourceConfig
from llmcompress.errors import InputError

ADAPTER = TypeAdapter(SourceConfig)


def source(**fields):
    return ADAPTER.validate_python(fields)


def write_rows(path, rows):
    data = "\n".join(json.dumps(row) for row in rows).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_jsonl_reads_every_compression_and_records_the_file(tmp_path, name):
    path = write_rows(tmp_path / name, [{"text": "one"}, {"text": "two ü"}])
    found = read(source(kind="jsonl", path=path, licence="CC0"))
    assert found.texts == ("one", "two ü")
    assert found.provenance["files"][0]["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert found.provenance["rows"] == 2 and found.provenance["licence"] == "CC0"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = {"a.txt": "one", "a.jsonl": '{"text": "one"}', "a.json": '[{"text": "one"}]'}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read(ADAPTER.validate_python(str(tmp_path / name))).texts == ("one",)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_marked_and_can_be_tokenized(tmp_path, name, tiny_tokenizer):
    row = '{"text": "half \\ud83d and whole \\ud83d\\ude00"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    (text,) = read(ADAPTER.validate_python(str(tmp_path / name))).texts
    assert text == "half \ufffd and whole \U0001f600"
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_skip_and_rows_select_a_range_across_files(tmp_path):
    write_rows(tmp_path / "1.jsonl", [{"text": str(i)} for i in range(3)])
    write_rows(tmp_path / "2.jsonl", [{"text": str(i)} for i in range(3, 6)])
    found = read(source(kind="jsonl", path=str(tmp_path / "*.jsonl"), skip=2, rows=3))
    assert found.texts == ("2", "3", "4")


def test_dotted_field_reaches_into_objects(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"meta": {"body": "deep"}}])
    assert read(source(kind="jsonl", path=path, field="meta.body")).texts == ("deep",)


def test_text_files_split_on_a_separator(tmp_path):
    (tmp_path / "a.txt").write_text("first\n===\nsecond", encoding="utf-8")
    assert read(source(kind="text", path=str(tmp_path / "a.txt"))).texts == ("first\n===\nsecond",)
    parts = read(source(kind="text", path=str(tmp_path / "a.txt"), split_on="\n===\n")).texts
    assert parts == ("first", "second")


def test_parquet_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(source(kind="parquet", path=str(tmp_path / "a.parquet"), field="body")).texts == ("a", "b")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="Parquet"):
        read(source(kind="parquet", path=str(tmp_path / "bad.parquet")))
    # a kind that was inherited with another path
    for kind in ("jsonl", "text"):
        with pytest.raises(InputError, match=f"its name says parquet, and kind is {kind}") as caught:
            read(source(kind=kind, path=str(tmp_path / "a.parquet")))
        assert caught.value.hint == "set the source's kind: parquet"


def test_inline_and_synthetic():
    assert read(source(kind="inline", texts=["x", "y"])).texts == ("x", "y")
    assert read(source(kind="synthetic", seed=3)).texts == ()


def test_chat_rows_go_through_the_template(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rows = [{"prompt": "hi", "response": "ho"}, {"messages": [{"role": "user", "content": "q"}]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert read(source(kind="jsonl", path=path), tokenizer, "auto").texts == ("[user]hi[assistant]ho", "[user]q")
    with pytest.raises(InputError, match="chat template") as refused:
        read(source(kind="jsonl", path=path), tiny_tokenizer, "auto")
    assert "chat_template.jinja" in refused.value.hint
    with pytest.raises(InputError, match="but the row is a chat") as refused:
        read(source(kind="jsonl", path=path), tokenizer, "none")
    assert "template: auto" in refused.value.hint


def test_without_a_template_a_chat_that_has_its_text_too_is_read_as_text(tmp_path, tiny_tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "add", "output": "3", "text": "add: 3"}])
    assert read(source(kind="jsonl", path=path), tiny_tokenizer, "auto").texts == ("add: 3",)


QUESTION = [{"role": "user", "content": "why"}]
ANSWER = [{"role": "assistant", "content": "so"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*QUESTION, *ANSWER]},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
        {"conversations": [*QUESTION, *ANSWER]},
        {"prompt": "why", "response": "so"},
        {"prompt": "why", "completion": "so"},
        {"prompt": QUESTION, "completion": ANSWER},
        {"instruction": "why", "input": "", "output": "so"},
        {"instruction": "why", "output": "so"},
    ],
)
def test_every_way_to_write_a_chat_is_rendered_alike(tmp_path, tiny_tokenizer, row):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    path = write_rows(tmp_path / "a.jsonl", [row])
    assert read(source(kind="jsonl", path=path), tokenizer, "auto").texts == ("[user]why[assistant]so",)


def test_an_alpaca_input_follows_its_instruction(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "add", "input": "1 2", "output": "3"}])
    assert read(source(kind="jsonl", path=path), tokenizer, "auto").texts == ("[user]add\n\n1 2[assistant]3",)


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_rows(tmp_path / "a.jsonl", [{"messages": QUESTION}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: the chat template refuses this row: roles must alternate"):
        read(source(kind="jsonl", path=path), tokenizer, "auto")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_list_of_objects_is_read_like_lines(tmp_path, name):
    text = json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read(source(kind="jsonl", path=str(tmp_path / name))).texts == ("one", "two")
    (tmp_path / "b.json").write_text('[{"text": "one"}, 2]')
    with pytest.raises(InputError, match=r"b\.json: row 2: expected an object, found int"):
        read(source(kind="jsonl", path=str(tmp_path / "b.json")))


def test_text_under_kind_jsonl_says_how_text_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("[1] Once upon a time", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        read(source(kind="jsonl", path=str(tmp_path / "a.txt")))
    assert refused.value.hint == f"plain text is read with source: {tmp_path / 'a.txt'}"


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file") as caught:
        read(source(kind="text", path=str(tmp_path / "absent.txt")))
    assert caught.value.exit_code == 4 and caught.value.hint
    with pytest.raises(InputError, match="is a folder"):
        read(source(kind="text", path=str(tmp_path)))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 500)[:-20])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: cannot be read to its end"):
        read(source(kind="jsonl", path=str(tmp_path / "cut.jsonl.gz")))
    (tmp_path / "notgz.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(InputError, match="cannot be read"):
        read(source(kind="jsonl", path=str(tmp_path / "notgz.jsonl.gz")))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(source(kind="text", path=str(tmp_path / "latin.txt")))


def test_bad_rows_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": }\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
        read(source(kind="jsonl", path=str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text('{"text": "ok"}\n["list"]\n')
    with pytest.raises(InputError, match=r"b\.jsonl:2: expected an object, found list"):
        read(source(kind="jsonl", path=str(tmp_path / "b.jsonl")))
    (tmp_path / "c.jsonl").write_text('{"body": "x", "id": 3}\n{"text": 3}\n')
    with pytest.raises(InputError, match="field 'text' is missing") as caught:
        read(source(kind="jsonl", path=str(tmp_path / "c.jsonl")))
    assert str(caught.value.hint).startswith("set the source's field to one of body;")


def test_unsupported_compression_is_refused(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match="zstandard compression is not read"):
        read(source(kind="jsonl", path=str(tmp_path / "a.jsonl.zst")))


def test_blank_text_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(InputError, match="no text found in 1 rows"):
        read(source(kind="jsonl", path=str(tmp_path / "a.jsonl")))
    with pytest.raises(InputError, match="no text found in 0 rows"):
        read(source(kind="jsonl", path=str(tmp_path / "a.jsonl"), skip=5))


def test_hub_without_network_says_what_to_do():
    from llmcompress.data.hub import offline

    with (
        offline(True),
        pytest.raises(InputError, match=r"hub nobody/nothing.*not in the cache") as caught,
    ):
        read(source(kind="hub", id="nobody/nothing", split="test"))
    assert "local copy" in str(caught.value.hint)


def test_hub_streaming_needs_rows():
    with pytest.raises(InputError, match="streaming needs rows"):
        read(source(kind="hub", id="nobody/nothing", streaming=True))
