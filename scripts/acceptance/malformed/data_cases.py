"""Texts and tasks that are missing, damaged, too small, or should not be measured on; formats that cannot hold a model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from malformed.bench import Bench, Case, Run, sentences, write_texts

RECIPE, ENVIRONMENT, GATE, EXPORT = (3,), (4,), (6,), (7,)


def _source(
    content: bytes | None, kind: str = "jsonl", name: str = "text.jsonl", **more: Any
) -> Callable[[Bench], Run]:
    """Calibrate on a file with this content; None leaves the file out."""

    def build(bench: Bench) -> Run:
        path = bench.folder / name
        if content is not None:
            path.write_bytes(content)
        source = {"kind": kind, "path": str(path), **more.get("source", {})}
        calibrate = {"source": source, **{key: value for key, value in more.items() if key != "source"}}
        return bench.run(bench.recipe({"stages": {"calibrate": calibrate}}))

    return build


def _replaced(source: dict[str, Any], *words: str, environment: dict[str, str] | None = None) -> Callable[[Bench], Run]:
    """Calibrate on another source altogether."""

    def build(bench: Bench) -> Run:
        changes = {"stages": {"calibrate": {"source": {"path": ..., "kind": ...}}}}
        recipe = bench.recipe(changes | {"stages": {"calibrate": {"source": {"path": ..., **source}}}})
        return bench.run(recipe, *words, environment=environment or {})

    return build


def _rows(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def _gzip_cut() -> bytes:
    packed = gzip.compress(_rows(sentences(5, 200)))
    return packed[: len(packed) // 2]


def _folder(bench: Bench) -> Run:
    (bench.folder / "texts").mkdir()
    return bench.run(bench.recipe({"stages": {"calibrate": {"source": {"path": str(bench.folder / "texts")}}}}))


def _wrong_column(bench: Bench) -> Run:
    import pyarrow
    import pyarrow.parquet

    path = bench.folder / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"story": sentences(1, 50)}), path)
    source = {"kind": "parquet", "path": str(path)}
    return bench.run(bench.recipe({"stages": {"calibrate": {"source": source}}}))


def _length(length: int) -> Callable[[Bench], Run]:
    return lambda bench: bench.run(bench.recipe({"stages": {"calibrate": {"length": length, "samples": 1}}}))


def _heldout(bench: Bench, path: Path, **perplexity: Any) -> dict[str, Any]:
    return {"perplexity": {"heldout": {"source": {"kind": "jsonl", "path": str(path)}, "length": 32, **perplexity}}}


def _evaluated(section: Callable[[Bench], dict[str, Any]], **settings: Any) -> Callable[[Bench], Run]:
    """Run with an evaluate stage."""
    return lambda bench: bench.run(bench.evaluate(section(bench)), **settings)


def _same_text(bench: Bench) -> dict[str, Any]:
    return _heldout(bench, bench.folder / "calibration.jsonl")


def _mostly_same(bench: Bench) -> dict[str, Any]:
    path = bench.folder / "heldout.jsonl"
    write_texts(path, sentences(2, 20) + sentences(1, 10))
    return _heldout(bench, path)


def _gone(bench: Bench) -> dict[str, Any]:
    return _heldout(bench, bench.folder / "not_here.jsonl")


def _too_short(bench: Bench) -> dict[str, Any]:
    path = bench.folder / "heldout.jsonl"
    write_texts(path, ["a"])
    return _heldout(bench, path)


def _failed_gate(bench: Bench) -> dict[str, Any]:
    section = _heldout(bench, bench.texts("heldout.jsonl", 2))
    return {**section, "gates": {"quality": {"metric": "heldout.perplexity", "max": 1.0}}}


def _tasks(*tasks: Any, **more: Any) -> Callable[[Bench], dict[str, Any]]:
    return lambda bench: {
        "tasks": list(tasks),
        **{k: v.format(folder=bench.folder) if isinstance(v, str) else v for k, v in more.items()},
    }


def _no_subject(bench: Bench) -> dict[str, Any]:
    """A folder that holds the task, but not the subject asked for."""
    folder = bench.folder / "mmlu"
    folder.mkdir()
    for split in ("test", "dev"):
        write_texts(folder / f"{split}.jsonl", ["a question"], "question")
    return {"tasks": [{"task": "mmlu", "subjects": ["alchemy"]}], "tasks_dir": str(bench.folder), "offline": True}


def _empty_tasks(bench: Bench) -> dict[str, Any]:
    (bench.folder / "tasks").mkdir()
    return {"tasks": ["piqa"], "tasks_dir": str(bench.folder / "tasks"), "offline": True}


def _task_rows(content: str) -> Callable[[Bench], dict[str, Any]]:
    """A task's local file with this content."""

    def build(bench: Bench) -> dict[str, Any]:
        folder = bench.folder / "tasks" / "arc_easy"
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(content, encoding="utf-8")
        return {"tasks": ["arc_easy"], "tasks_dir": str(folder.parent)}

    return build


_ROW = '{"question": "a", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}\n'


def _exported(formats: list[str], **rule: Any) -> Callable[[Bench], Run]:
    """Export in formats that cannot hold what the rules make."""

    def build(bench: Bench) -> Run:
        rules = {name: {"bits": 4, "symmetric": True, **rule} for name in ("attention", "experts")}
        return bench.run(bench.recipe({"stages": {"quantize": {"rules": rules}, "export": {"formats": formats}}}))

    return build


def _taken_folder(bench: Bench) -> Run:
    folder = bench.folder / "published"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me", encoding="utf-8")

    def inspect(code: int, stderr: str) -> list[str]:
        return [] if (folder / "precious.txt").exists() else ["somebody else's file was deleted"]

    return bench.run(bench.recipe({"stages": {"export": {"dir": str(folder)}}}), inspect=inspect)


def _below_a_file(bench: Bench) -> Run:
    (bench.folder / "file").write_text("not a folder", encoding="utf-8")
    return bench.run(bench.recipe({"stages": {"export": {"dir": str(bench.folder / "file" / "artifact")}}}))


_tokens = partial(Case, stage="calibrate", torch=True)
_measure = partial(Case, stage="evaluate", torch=True)
_export = partial(Case, stage="export", torch=True)

TEXTS = [
    _tokens("calibration file missing", ENVIRONMENT, r"source\.path: no such file or folder: .*text\.jsonl", _source(None)),
    _tokens("calibration file is a folder", ENVIRONMENT, r"texts: is a folder", _folder),
    _tokens("calibration file empty", ENVIRONMENT, r"no text found in 0 rows", _source(b"")),
    _tokens("calibration rows all blank", ENVIRONMENT, r"no text found", _source(_rows(["", "  ", "\n"]))),
    _tokens("calibration file is not JSON", ENVIRONMENT, r"text\.jsonl:2: not valid JSON", _source(_rows(["one"]) + b"two\n")),
    _tokens("calibration row is a list", ENVIRONMENT, r"text\.jsonl:2: expected an object, found list", _source(_rows(["one"]) + b'["a"]\n')),
    _tokens("calibration file is a list without objects", ENVIRONMENT, r"text\.jsonl: row 1: expected an object, found str", _source(b'["a"]\n')),
    _tokens("calibration field missing", ENVIRONMENT, r"field 'text' is missing", _source(_rows(["one"], "body"))),
    _tokens("calibration field is a number", ENVIRONMENT, r"field 'text' is not text", _source(b'{"text": 3}\n')),
    _tokens("calibration file of another encoding", ENVIRONMENT, r"is not UTF-8 text", _source("caf\u00e9 ".encode("latin-1") * 500, "text", "text.txt")),
    _tokens("calibration file cut short", ENVIRONMENT, r"cannot be read to its end", _source(_gzip_cut(), name="text.jsonl.gz")),
    _tokens("calibration file is not gzip", ENVIRONMENT, r"cannot be read to its end", _source(b"plain", name="text.jsonl.gz")),
    _tokens("calibration file in an unread compression", ENVIRONMENT, r"zstandard compression is not read", _source(b"x", name="text.jsonl.zst")),
    _tokens("calibration text too short", ENVIRONMENT, r"tokens make \d+ windows of 32, but samples is 8", _source(_rows(["one two three four"]))),
    _tokens("all rows skipped", ENVIRONMENT, r"no text found in 0 rows", _source(_rows(["one"]), source={"skip": 5})),
    _tokens("windows longer than the model's context", ENVIRONMENT, r"built for 128 positions", _length(256)),
    _tokens("chat rows without a chat template", ENVIRONMENT, r"no chat template", _source(b'{"prompt": "a", "response": "b"}\n', template="auto")),
    _tokens("Parquet that is not Parquet", ENVIRONMENT, r"cannot be read as Parquet", _source(b"PAR1 and then nothing", "parquet", "text.parquet")),
    _tokens("Parquet without the column", ENVIRONMENT, r"field 'text' is missing", _wrong_column),
    _tokens("hub data set without a network", ENVIRONMENT, r"hub no-one/no-data.*not in the cache of datasets", _replaced({"kind": "hub", "id": "no-one/no-data"})),
    _tokens("hub data set without a network, met in the run", ENVIRONMENT, r"hub no-one/no-data .*cannot be loaded", _replaced({"kind": "hub", "id": "no-one/no-data"}, "--no-preflight")),
    _tokens("hub streaming without a limit", ENVIRONMENT, r"streaming needs rows", _replaced({"kind": "hub", "id": "no-one/no-data", "streaming": True}, "--no-preflight")),
]  # fmt: skip

MEASURES = [
    _measure("held-out text is the calibration text", ENVIRONMENT, r"heldout.*calibration", _evaluated(_same_text)),
    _measure("held-out text holds calibration text", ENVIRONMENT, r"heldout.*calibration", _evaluated(_mostly_same)),
    _measure("held-out text missing", ENVIRONMENT, r"source\.path: no such file or folder: .*not_here\.jsonl", _evaluated(_gone)),
    _measure("held-out text too short", ENVIRONMENT, r"(tokens|too short)", _evaluated(_too_short)),
    _measure("unknown task", (3, 4), r"no_such_task", _evaluated(_tasks("no_such_task"))),
    _measure("unknown subject of a task", RECIPE, r"no subject 'alchemy'", _evaluated(_no_subject)),
    _measure("folder of tasks missing", ENVIRONMENT, r"no_tasks", _evaluated(_tasks("piqa", tasks_dir="{folder}/no_tasks", offline=True))),
    _measure("folder of tasks empty", ENVIRONMENT, r"piqa", _evaluated(_empty_tasks)),
    _measure("task rows without a field", ENVIRONMENT, r"arc_easy/test\.jsonl: 'choices' is undefined", _evaluated(_task_rows('{"question": "a"}\n'))),
    _measure("task rows that are not JSON", ENVIRONMENT, r"arc_easy/test\.jsonl: .*JSON", _evaluated(_task_rows('{"question":\n'))),
    _measure("later task row without a field", ENVIRONMENT, r"arc_easy/test\.jsonl: row 2: no 'choices'", _evaluated(_task_rows(_ROW + '{"question": "a"}\n'))),
    _measure("later task row whose answer is no choice", ENVIRONMENT, r"arc_easy/test\.jsonl: row 3: 'E' is not in list", _evaluated(_task_rows(2 * _ROW + _ROW.replace("B", "E", 2).replace("E", "B", 1)))),
    _measure("task file empty", ENVIRONMENT, r"arc_easy/test\.jsonl: no rows", _evaluated(_task_rows(""))),
    _measure("quality gate that does not hold", GATE, r"gate quality: heldout\.perplexity is .*at most 1", _evaluated(_failed_gate), finishes=True),
]  # fmt: skip

EXPORTS = [
    _export("asymmetric weights to compressed-tensors", EXPORT, r"export compressed-tensors: .*symmetric", _exported(["compressed-tensors"], symmetric=False)),
    _export("three bits to gguf", EXPORT, r"export gguf: .*3", _exported(["gguf"], bits=3)),
    _export("one refusal among two formats", EXPORT, r"export gguf: ", _exported(["native", "gguf"], bits=2)),
    _export("export folder taken", EXPORT, r"published: (already exists|exists)", _taken_folder),
    _export("export folder below a file", (4, 7), r"file", _below_a_file),
]  # fmt: skip

CASES = [*TEXTS, *MEASURES, *EXPORTS]
