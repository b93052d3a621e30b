"""``run``, ``resume`` and everything that works on what they leave behind."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli import doctor
from llmcompress.cli.app import invoke

TEXTS = ["The cat sat on the warm stone and looked at the sea. " * 6, "Nobody had opened the green door. " * 10]


def recipe_text(model: Path, folder: Path, gate: float = 1e9) -> str:
    texts = json.dumps(TEXTS)
    return f"""
version: 1
name: tiny
model: {{path: {model}}}
run: {{dir: {folder}, device: cpu, threads: 1}}
stages:
  load: {{type: load}}
  calibrate: {{type: calibrate, source: {{kind: inline, texts: {texts}}}, samples: 4, length: 16}}
  quantize:
    type: rtn
    rules:
      attention: {{role: attention, bits: 4, group_size: 16, symmetric: true}}
      experts: {{role: experts, bits: 4, group_size: 16, symmetric: true}}
  evaluate:
    type: evaluate
    overlap: ignore
    perplexity:
      text: {{source: {{kind: inline, texts: {texts}}}, length: 16, max_tokens: 64}}
    gates:
      ppl: {{metric: text.perplexity, max: {gate}}}
  export: {{type: export, formats: [native]}}
"""


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Recipe file and run folder of a finished run."""
    folder = tmp_path_factory.mktemp("cli_run")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_text(tiny_folder, folder / "run"))
    assert invoke(["run", str(recipe), "--quiet"]) == 0
    return recipe, folder / "run"


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert invoke([*words, "--json", "--quiet"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_run_folder_holds_what_is_promised(finished: tuple[Path, Path]) -> None:
    recipe, run = finished
    names = {p.name for p in run.iterdir()}
    promised = {"recipe.yaml", "recipe.lock.json", "events.jsonl", "log.txt", "stages", "artifact", "report.html"}
    assert promised <= names
    assert (run / "recipe.yaml").read_text() == recipe.read_text()
    assert not list(run.rglob("*.part"))
    assert not (run / ".lock").exists()


def test_a_second_run_does_nothing_and_says_so(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    found = told(capsys, "run", str(recipe))
    assert found["status"] == "nothing to do"
    # a pipeline that starts twice gets the figures both times
    measured = json.loads((finished[1] / "stages" / "evaluate" / "metrics.json").read_text())
    assert [(m["name"], m["compressed"]) for m in found["metrics"]] == [
        (f"{m['task']}.{m['metric']}", m["compressed"]) for m in measured
    ]
    assert measured and found["artifacts"] == {"native": str(finished[1] / "artifact")}
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p in before} == before
    assert invoke(["resume", str(run)]) == 0
    # long folders break lines elsewhere
    said = " ".join(capsys.readouterr().out.split())
    assert "already finished" in said and "--redo STAGE" in said and "--force" not in said


def test_a_run_folder_may_move(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[1], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = told(capsys, "resume", "moved")
    assert found["status"] == "nothing to do"
    # its own artifact, not the one that lies where the run was made
    assert found["artifacts"] == {"native": "moved/artifact"}
    assert told(capsys, "resume", "moved", "--redo", "export")["artifacts"] == {"native": "moved/artifact"}
    assert (finished[1] / "artifact").is_dir()
    assert told(capsys, "compare", "moved", str(finished[1]))["recipe_changes"] == []


def test_json_of_a_run(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: tuple[Path, Path]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text(tiny_folder, tmp_path / "run"))
    found = told(capsys, "run", str(recipe), "--until", "quantize")
    assert found["status"] == "stopped"
    assert [stage["name"] for stage in found["stages"]] == ["load", "calibrate", "quantize"]
    assert invoke(["resume", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    # results on stdout, progress on stderr
    assert "text.perplexity" in captured.out
    assert "report:" in captured.out
    assert "quantize: already done" in captured.err
    assert "[4/5] evaluate" in captured.err
    assert "[4/5]" not in captured.out


def test_a_folder_that_is_no_model_leaves_no_run_folder(
    finished: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, pickled, cut = (tmp_path / name for name in ("empty", "pickled", "cut"))
    for folder in (empty, pickled, cut):
        shutil.copytree(tiny_folder, folder)
    (empty / "config.json").unlink()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    artifact = finished[1] / "artifact"
    for folder, words in (
        (empty, "config.json: missing"),
        (pickled, "pickle"),
        (cut, "damaged"),
        (artifact, "already"),
    ):
        target = tmp_path / "run"
        assert invoke(["run", str(finished[0]), f"model.path={folder}", f"run.dir={target}"]) == 4
        said = capsys.readouterr().err
        assert words in said and said.count("error:") == said.count("next:") == 1
        assert not target.exists(), folder


def test_gates_set_the_exit_code_after_export_and_report(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text(tiny_folder, tmp_path / "run", gate=1.0))
    assert invoke(["run", str(recipe)]) == 6
    assert "gate ppl" in capsys.readouterr().err
    assert (tmp_path / "run" / "artifact" / "config.json").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert invoke(["run", str(recipe), "--json"]) == 6
    objects = capsys.readouterr().out
    assert json.loads(objects)["gates"]["passed"] is False


def test_resume_of_no_run_and_a_broken_model(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["resume", str(tmp_path)]) == 4
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"
    # not a number, in 16 bits and in 32: only the load stage reads values
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff" * 4)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text(broken, tmp_path / "run"))
    assert invoke(["run", str(recipe), "--quiet"]) == 4
    error = capsys.readouterr().err
    assert "NaN" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "artifact").exists()
    # the traceback is kept for those who want it
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_what_is_not_here_is_an_error_before_any_work(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text(tiny_folder, tmp_path / "run"))
    source = "stages.evaluate.perplexity.text.source={kind: text, path: gone.txt}"
    assert invoke(["run", str(recipe), source]) == 4
    assert "stages.evaluate.perplexity.text.source.path: no such file or folder: gone.txt" in capsys.readouterr().err
    # what a shipped recipe itself names comes from somewhere, and its header says from where
    assert invoke(["run", "rqt_tiny"]) == 4
    assert "`make family` trains" in capsys.readouterr().err
    assert invoke(["run", "rqt_tiny", "model.path=org/Base-7B"]) == 4
    said = capsys.readouterr().err
    assert "hf download org/Base-7B" in said and "make family" not in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_inspect_model_and_artifact(
    finished: tuple[Path, Path], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = told(capsys, "inspect", str(tiny_folder))
    packed = told(capsys, "inspect", str(finished[1]))
    assert (dense["kind"], packed["kind"]) == ("checkpoint", "llmcompress artifact")
    assert dense["blocks"] == packed["blocks"] == 2
    assert dense["experts"] == 8
    assert dense["parameters"] == packed["parameters"]
    assert packed["bytes"] < dense["bytes"]
    experts = [group for group in packed["groups"] if group["role"] == "experts"]
    assert [group["how"] for group in experts] == ["4-bit, group 16, symmetric"]
    assert experts[0]["blocks"] == [0, 1]
    assert invoke(["inspect", str(tiny_folder)]) == 0
    said = capsys.readouterr().out
    assert "model type mixtral" in said
    assert "decodes natively on CPUs" in said
    assert invoke(["inspect", "no/where"]) == 4


def test_inspect_says_how_long_native_sequences_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, original_max_position_embeddings=24, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors},
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    assert told(capsys, "inspect", str(tmp_path))["native_tokens"] == 24
    assert invoke(["inspect", str(tmp_path)]) == 0
    assert "natively on CPUs in sequences of up to 24 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({}, None),
        ({"head_bits": {"backbone.layers.0.mixer": [4, 4, 6, 4, 6, 6]}}, "several widths"),
        ({"head_bits": {"backbone.layers.0.mixer": [6] * 6}}, "several widths"),
        ({"bits": 6}, "6 bits"),
        ({"bits": 8}, None),
        ({"codec": "dsq_als"}, "codec dsq_als"),
        ({"codec": "none"}, "codec none"),
    ],
)
def test_inspect_says_when_states_are_not_those_of_the_native_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: dict[str, Any], reason: str | None
) -> None:
    from llmcompress.hf import load
    from llmcompress.inference.native import decline
    from llmcompress.models.paths import assets_folder

    source = assets_folder() / "reference_mamba2"
    config = json.loads((source / "config.json").read_text())
    states = {"bits": 4, "codec": "dsq", "alpha": 0.5, "rounding": "rtn", **policy}
    quantization = {
        "quant_method": "llmcompress",
        "version": 1,
        "specs": {},
        "modules": {},
        "policies": {"state_cache": states},
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (tmp_path / "model.safetensors").symlink_to((source / "model.safetensors").resolve())
    found = told(capsys, "inspect", str(tmp_path))["modules_because"]
    assert found is None if reason is None else reason in found
    assert (decline(load(tmp_path)[0]) is None) == (reason is None)


def test_experts_of_model_and_artifact(
    finished: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in zip(("cat", "door"), TEXTS):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = [word for name in ("cat", "door") for word in ("--text", str(tmp_path / f"{name}.txt"))]
    for path in (tiny_folder, finished[1]):
        found = told(capsys, "experts", str(path), *texts, "--length", "8", "--samples", "4")
        assert [(row["name"], row["windows"], row["tokens"]) for row in found["texts"]] == [
            ("cat", 4, 32),
            ("door", 4, 32),
        ]
        ((one, pair), (other, two)) = found["similarity"]
        assert one == pytest.approx(1) and two == pytest.approx(1) and 0 < pair == other < 1
        assert [row["block"] for row in found["layers"]] == [0, 1]
    assert invoke(["experts", str(finished[1]), *texts, "--length", "8", "--samples", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{pair:.3f}") == 2 and "least alike in layer" in shown
    assert invoke(["experts", "asset:reference_mamba2", "--quiet"]) == 4
    assert "mamba2 has no experts" in capsys.readouterr().err


def test_inspect_refuses_pickles_and_damage(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert invoke(["inspect", str(tmp_path)]) == 4
    assert "pickle" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert invoke(["inspect", str(tmp_path)]) == 4
    (tmp_path / "config.json").write_text("{")
    assert invoke(["inspect", str(tmp_path)]) == 4
    assert "not valid JSON" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.gguf").touch()
    assert invoke(["inspect", str(tmp_path)]) == 4
    assert "llama.cpp" in capsys.readouterr().err


def test_eval_and_compare(
    finished: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    options = ["--text", str(text), "--length", "16", "--max-tokens", "64"]
    value = told(capsys, "eval", str(finished[1]), *options)["metrics"][0]
    assert (value["task"], value["metric"]) == ("text", "perplexity")
    pair = told(capsys, "compare", str(tiny_folder), str(finished[1]), *options)
    by_name = {row["metric"]: row for row in pair["metrics"]}
    assert by_name["perplexity"]["b"] == pytest.approx(value["value"])
    assert by_name["kl"]["b"] > 0 and by_name["kl"]["name"] == "fidelity.kl"
    assert pair["b"]["bits"] < pair["a"]["bits"]
    assert by_name["perplexity"]["difference_stderr"] > 0
    artifact = str(finished[1] / "artifact")
    itself = told(capsys, "compare", artifact, artifact, *options)["metrics"][0]
    assert itself["difference"] == itself["difference_stderr"] == 0 and itself["within_noise"] is False
    capsys.readouterr()
    for limit in ("text.perplexty=1", "fidelity.kl=1", "other.perplexity=1"):
        assert invoke(["compare", str(tiny_folder), artifact, *options, "--max-rel-increase", limit]) == 2
        # nothing has been loaded for a limit that could not be judged
        assert "loading" not in (said := capsys.readouterr().err) and "limit 1: no metric" in said
    assert invoke(["eval", str(finished[1]), "--text", "strange.xyz"]) == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": text.read_text()}))
    options[1] = str(rows)
    again = told(capsys, "eval", str(finished[1]), *options, "--field", "body")["metrics"][0]
    assert again["value"] == pytest.approx(value["value"])
    assert invoke(["eval", str(finished[1]), *options]) == 4
    assert invoke(["eval", "no/where", *options]) == 4


OWN_TASK = """
task: another name
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: rows.jsonl}}
output_type: multiple_choice
test_split: test
training_split: train
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_of_ones_own_with_examples_ends_in_a_table(
    finished: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import csv

    rows = [{"question": f"{n} and", "choices": [f" {n}", " x"], "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(OWN_TASK)
    words = ["--task", str(tmp_path / "mine.yaml"), "--num-fewshot", "1", "--csv", str(tmp_path / "out.csv")]
    words += ["--fewshot-seed", "7", "--system-instruction", "Be brief."]
    told(capsys, "eval", str(finished[1]), *words, "--limit", "3")
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert (row["name"], row["n"]) == ("mine.acc", "3") and 0 <= float(row["value"]) <= 1
    told(capsys, "compare", str(tiny_folder), str(finished[1]), *words)
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert row["n"] == "4" and float(row["difference"]) == float(row["b"]) - float(row["a"])
    told(capsys, "compare", str(finished[1]), str(finished[1]), "--csv", str(tmp_path / "runs.csv"))
    figures = {row["name"]: row for row in csv.DictReader((tmp_path / "runs.csv").open())}
    assert figures["text.perplexity"]["a"] == figures["text.perplexity"]["b"] != ""
    # what cannot be written or would change nothing is refused before anything is loaded
    capsys.readouterr()
    assert invoke(["eval", str(finished[1]), "--csv", str(tmp_path / "no" / "out.csv")]) == 2
    assert invoke(["eval", str(finished[1]), "--recipe", str(finished[0]), "--limit", "3"]) == 2
    assert invoke(["eval", str(finished[1]), *words, "--fewshot-as-multiturn"]) == 2
    assert invoke(["eval", str(finished[1]), "--num-fewshot", "0"]) == 2
    assert invoke(["compare", str(tiny_folder), str(finished[1]), "--tasks-dir", str(tmp_path)]) == 2
    assert invoke(["compare", str(finished[1]), str(finished[1]), *words]) == 2
    assert invoke(["eval", str(finished[1]), "--recipe", str(finished[0]), "--length", "16", "--field", "body"]) == 2
    assert invoke(["compare", str(finished[1]), str(finished[1]), "--length", "16", "--dtype", "bfloat16"]) == 2
    assert invoke(["eval", str(finished[1]), *words, "--length", "16", "--max-tokens", "64"]) == 2
    assert invoke(["eval", str(finished[1]), "--text", "book.txt", "--field", "body"]) == 2
    assert invoke(["eval", str(finished[1]), "--task", "none_such"]) == 4
    assert invoke(["compare", str(tiny_folder), str(tiny_folder), "--task", "none_such"]) == 4
    said = capsys.readouterr().err
    assert "--recipe says what is measured, so --field, --length would" in said
    assert "by what they recorded, so --length, --dtype would" in said
    assert "only tasks are named, so --length, --max-tokens would" in said
    assert "a plain text has no fields, so --field would" in said
    assert "only with --apply-chat-template" in said and said.count("task none_such: lm-eval does not know it") == 2
    assert "there is no folder" in said and "--limit would change nothing" in said and "loading" not in said
    assert "no --task is named, so --num-fewshot would" in said and "so --tasks-dir would" in said
    assert "by what they recorded, so --task, --num-fewshot, --fewshot-seed, --system-instruction would" in said


def test_compare_runs_shows_what_differs(
    finished: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    words = ["run", str(finished[0]), f"run.dir={other}", "stages.quantize.rules.experts.bits=2", "--quiet"]
    assert invoke(words) == 0
    found = told(capsys, "compare", str(finished[1]), str(other))
    figures = {row["name"]: row for row in found["figures"]}
    assert figures["text.perplexity"]["a"] != figures["text.perplexity"]["b"]
    assert figures["bits.code_average"]["b"] < figures["bits.code_average"]["a"]
    # what two runs kept of each window gives what measuring both models gives
    parts = [run / "stages" / "evaluate" / "parts" / "compressed.perplexity.text.json" for run in (finished[1], other)]
    a, b = (json.loads(part.read_text()) for part in parts)
    changes = [b["perplexity"] * y - a["perplexity"] * x for x, y in zip(a["window_nll"], b["window_nll"], strict=True)]
    expected = statistics.stdev(changes) / len(changes) ** 0.5
    assert figures["text.perplexity"]["difference_stderr"] == pytest.approx(expected)
    assert figures["bytes"]["difference_stderr"] is None and found["asked_otherwise"] == []
    assert "stages.quantize.rules.experts.bits: 4 → 2" in found["recipe_changes"]
    # random weights may as well gain by fewer bits
    low, high = sorted((a["perplexity"], b["perplexity"]))
    before, after = (finished[1], other) if a["perplexity"] == low else (other, finished[1])
    rise = high / low - 1
    for limit, code in ((rise * 0.99, 6), (rise * 1.01, 0)):
        words = ["compare", str(before), str(after), f"--max-rel-increase=text.perplexity={limit}"]
        # the figures come in either case, and what was held against them
        again = told(capsys, *words, code=code)
        assert len(again["figures"]) == len(found["figures"])
        assert [(row["metric"], row["passed"]) for row in again["limits"]] == [("text.perplexity", code == 0)]
    assert invoke(["compare", str(finished[1]), str(other), "--max-abs-drop=text.perplexty=1"]) == 2
    assert "did you mean text.perplexity" in capsys.readouterr().err
    for wrong in ("text.perplexity", "text.perplexity=1%", "=1", "text.perplexity=-1", "text.perplexity=nan"):
        assert invoke(["compare", str(finished[1]), str(other), "--max-rel-increase", wrong]) == 2, wrong
    assert invoke(["compare", str(finished[1]), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "bits.code_average" in shown
    sizes = next(line for line in shown.splitlines() if line.startswith("bytes"))
    assert sizes.rstrip().endswith(f"{figures['bytes']['b'] / figures['bytes']['a']:.3f} ×")
    # of another text there is no error, and it is said why
    texts = other / "stages" / "evaluate" / "texts.json"
    texts.write_text(texts.read_text().replace('"sha256": "', '"sha256": "0'))
    found = told(capsys, "compare", str(finished[1]), str(other))
    assert found["asked_otherwise"] == ["text.perplexity"]
    assert {row["name"]: row for row in found["figures"]}["text.perplexity"]["difference_stderr"] is None
    assert invoke(["compare", str(finished[1]), str(other)]) == 0
    assert "without ±, for texts, rows or prompts of A and B differ: text.perplexity" in capsys.readouterr().out


def test_generate_and_chat(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    run = str(finished[1])
    one = told(capsys, "generate", run, "--prompt", "The cat", "-n", "5")
    assert one["new_tokens"] <= 5
    assert one["prompt"] == "The cat"
    same = told(capsys, "generate", run, "--prompt", "The cat", "-n", "5", "-t", "0.9", "--seed", "4")
    assert same["text"] == told(capsys, "generate", run, "-p", "The cat", "-n", "5", "-t", "0.9", "--seed", "4")["text"]
    hidden = "Übung".encode().decode("ascii", "surrogateescape")  # what Python makes of it in the locale C
    both = [told(capsys, "generate", run, "-p", prompt, "-n", "5") for prompt in (hidden, "Übung")]
    assert both[0]["text"] == both[1]["text"] and both[0]["prompt"] == both[1]["prompt"] == "Übung"
    assert invoke(["generate", run, "--prompt", "x", "-n", "5000"]) == 4
    assert "--max-new-tokens" in capsys.readouterr().err
    assert invoke(["generate", run, "--prompt", "x", "--chat"]) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nagain\n/exit\nnever\n"))
    messages = told(capsys, "chat", run, "-n", "3")["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "again"
    long = "cat " * 5000
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n{long}\n/exit\n"))
    messages = told(capsys, "chat", run, "-n", "3")["messages"]
    assert [m["content"] for m in messages[:1]] == ["hello"] and len(messages) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat"))
    assert invoke(["generate", run, "-n", "3"]) == 0


def test_what_is_written_keeps_to_a_format(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    words = ["generate", str(finished[1]), "--prompt", "The cat", "-t", "1"]
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["stone", {"age": 3}]}')
    found = told(capsys, *words, "--json-schema", str(schema))
    assert json.loads(found["text"]) in ("stone", {"age": 3}) and found["complete"]
    assert told(capsys, *words, "--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    for engine in ("auto", "transformers"):
        found = told(capsys, *words, "--regex", "[ab]{40}", "-n", "3", "--engine", engine)
        assert set(found["text"]) <= {"a", "b"} and not found["complete"]
    assert invoke([*words, "--regex", "[ab]{40}", "-n", "3"]) == 0
    assert "cut short after 3 tokens" in capsys.readouterr().err
    schema.write_text("{")
    lax = tmp_path / "lax.json"
    # Python reads more than JSON
    lax.write_text('{"maximum": NaN}')
    for bad, code, said in (
        (["--json-schema", str(lax)], 4, f"{lax}: the schema is no JSON"),
        (["--regex", "[a"], 4, "--regex: "), (["--json-schema", str(schema)], 4, "schema.json: Expecting"),
        (["--regex", "a", "--choice", "b"], 2, "one format at a time"), (["--choice", ""], 2, "a text is empty"),
    ):  # fmt: skip
        assert invoke([*words, *bad]) == code
        assert said in capsys.readouterr().err


def test_a_conversation_is_saved(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import io

    file = tmp_path / "talk.json"
    # a byte of another encoding as Python hides it where the locale is not UTF-8
    lines = ["hello", f"/save {file}", f"/save {file}", "/save", "/save ~no-such-user/a", "\udce9t\udce9"]
    lines += [f"/save {tmp_path / 'more.json'}", "/exit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert invoke(["chat", str(finished[1]), "-n", "3", "--system", "Be brief"]) == 0
    shown = capsys.readouterr().err
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["system", "user", "assistant"] and saved[1]["content"] == "hello"
    assert "3 messages are in" in shown and "File exists" in shown and "give a file" in shown
    assert "/save: ~no-such-user/a: " in shown and len(shown.split("/save: ")) == 4
    assert json.loads((tmp_path / "more.json").read_text(encoding="utf-8"))[3]["content"] == "\ufffdt\ufffd"


def test_python_loads_a_run_folder_as_the_commands_do(finished: tuple[Path, Path]) -> None:
    from llmcompress.hf import load

    assert load(finished[1])[0].config.to_dict() == load(finished[1] / "artifact")[0].config.to_dict()


def test_an_export_that_will_be_refused_is_told_by_validate_and_plan(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(finished[0]), "stages.export.formats=[gguf]"]
    for name in ("validate", "plan"):
        assert invoke([name, *words]) == 7
        assert "export gguf: " in capsys.readouterr().err
    assert invoke(["validate", str(finished[0])]) == invoke(["plan", str(finished[0])]) == 0


def test_a_perplexity_is_also_told_as_a_share(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = next(m for m in told(capsys, "run", str(finished[0]))["metrics"] if m["name"] == "text.perplexity")
    assert invoke(["run", str(finished[0])]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("text.perplexity"))
    assert f"± {found['difference_stderr']:.2g} ({found['difference'] / found['dense']:+.1%})" in row


def test_export_in_another_format(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = finished
    found = told(capsys, "export", str(run / "artifact"), "--format", "dense")
    folder = Path(found["artifacts"]["dense"]["path"])
    assert (folder / "config.json").exists()
    assert told(capsys, "inspect", str(folder))["kind"] == "checkpoint"
    assert invoke(["export", str(run), "--format", "dense"]) == 7
    said = capsys.readouterr().err
    assert "exists already" in said and "leave out" not in said
    # what was stopped after its first format goes on with the others
    assert invoke(["export", str(run), "--format", "dense", "--format", "gguf"]) == 7
    assert "leave out --format dense, remove it" in capsys.readouterr().err
    assert invoke(["export", str(run), "--format", "zip"]) == 2
    capsys.readouterr()
    # no recipe asked for this format, so the next step is none of a recipe's
    assert invoke(["export", str(run), "--format", "gguf", "--out", str(run / "elsewhere")]) == 7
    said = capsys.readouterr().err
    assert "error: export gguf: " in said and "next: --format native" in said and "stages." not in said
    assert invoke(["export", str(folder.parent.parent), "--format", "dense"]) == 4


def test_bench_model(
    finished: tuple[Path, Path], tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a busy machine every case takes its whole budget, twice, for samples that keep their core
    monkeypatch.setattr("llmcompress.cli.bench.BUDGET", 0.5)
    monkeypatch.setattr("llmcompress_kernels.bench.timing.PROBE_BYTES", 1 << 20)
    words = ["--against", str(tiny_folder), "--prompt-tokens", "8", "--context", "5", "--batch", "1", "--batch", "2"]
    found = told(capsys, "bench", "model", str(finished[1]), *words, "--new-tokens", "3", "--repeats", "2")
    assert [row["path"] for row in found["models"]] == [str(finished[1]), str(tiny_folder)]
    names = {row["candidate"] for row in found["rows"]}
    assert {f"{tiny_folder} transformers", f"{finished[1]} transformers", "dense bfloat16 transformers"} <= names
    assert (f"{tiny_folder} native" in names) == (str(tiny_folder) not in found["declined"])
    assert len(found["rows"]) == 3 * len(names)
    assert all(0 < row["tokens_per_second"] <= row["best"] for row in found["rows"])
    assert found["machine"]["threads"] >= 1
    assert found["models"][0]["weight_bytes"] < found["models"][1]["weight_bytes"]
    assert invoke(["bench", "model", str(tiny_folder), "--context", "5000"]) == 2


def test_bench_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timing = "llmcompress_kernels.bench.timing"
    # heads of tables are whole there
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(f"{timing}.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("llmcompress_kernels.bench.linear.COLD_BYTES", 1 << 16)
    for name, value in (("HIDDEN", 64), ("INTERMEDIATE", 64), ("EXPERTS", 4), ("SLOTS", 2)):
        monkeypatch.setattr(f"llmcompress_kernels.bench.moe.{name}", value)
    words = ["--bits", "3", "--shape", "128x64", "--tokens", "1", "--tokens", "5", "--repeats", "1", "--budget", "1"]
    found = told(capsys, "bench", "kernels", *words, "--moe", "--threads", "1")
    assert {row["tokens"] for row in found["linear"]} == {1, 5}
    assert {"W3", "W3 int8", "torch bf16", "torch int4"} <= {row["candidate"] for row in found["linear"]}
    assert {row["candidate"] for row in found["moe"]} == {"W3", "W3 int8", "dense bf16"}
    for row in found["linear"]:
        assert row["microseconds"] > 0
        assert row["probed_gb_per_s"] > 0
        assert row["relative_error"] < (0.02 if row["candidate"].startswith(("W3", "torch bf16")) else 0.2)
    assert invoke(["bench", "kernels", *words]) == 0
    assert "of bandwidth" in capsys.readouterr().out
    assert invoke(["bench", "kernels", "--bits", "5"]) == 2
    assert invoke(["bench", "kernels", "--shape", "128"]) == 2
    assert invoke(["bench", "kernels", "--shape", "100x64"]) == 2


def test_report_again(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, run = finished
    (run / "report.html").unlink()
    found = told(capsys, "report", str(run))
    assert Path(found["report"]).stat().st_size == found["bytes"] > 1000
    assert invoke(["report", str(tmp_path)]) == 4


def test_doctor_reports_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "doctor")
    assert found["packages"]["torch"]
    assert found["cpu"]["cores"] >= 1
    assert found["problems"] == []
    assert {"memory", "compiler", "torch", "kernels", "optional"} <= set(found)
    rows = {(row["op"], row["implementation"]): row for row in found["kernels"]["gpu"]}
    assert all(row["used"] or row["reason"] for row in rows.values())
    assert {"cuda", "triton", "reference"} <= {name for op, name in rows if op == "group_gemm"}
    assert invoke(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    used = [
        row["implementation"] for row in found["kernels"]["explanation"] if row["op"] == "group_gemm" and row["used"]
    ]
    assert ["group_gemm", *used] in [line[:2] for line in lines]


def test_doctor_says_why_a_faster_kernel_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"op": "gemm", "implementation": "cuda", "devices": ["cuda"], "used": False, "reason": "runs on cuda only"},
        {"op": "gemm", "implementation": "cpu", "devices": ["cpu"], "used": False, "reason": "no C++ compiler"},
        {"op": "gemm", "implementation": "reference", "devices": ["any"], "used": True, "reason": ""},
    ]
    monkeypatch.setattr(doctor, "kernels", lambda: {"explanation": rows})
    assert invoke(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gemm")]
    assert line.split(None, 2) == ["gemm", "reference", "cpu: no C++ compiler"]


@pytest.mark.parametrize(("package", "extra"), [("math-verify", "math"), ("trl", "trl"), ("vllm", "vllm")])
def test_doctor_says_how_to_get_an_optional_package(
    package: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = told(capsys, "doctor")["optional"][package]
    try:
        assert row["version"] == metadata.version(package)
    except metadata.PackageNotFoundError:
        assert row["version"] is None
    known = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == package else known(name))
    row = told(capsys, "doctor")["optional"][package]
    assert row["version"] is None and row["install"] == f"pip install 'llmcompress[{extra}]'"
    # what is optional is no problem, and the extra that is named exists and holds the package
    assert told(capsys, "doctor")["problems"] == []
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(need.startswith(package) for need in project["optional-dependencies"][extra])
    assert invoke(["doctor"]) == 0
    assert f"llmcompress[{extra}]" in capsys.readouterr().out


def test_doctor_survives_a_broken_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.cli.doctor.package_version", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert invoke(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "the package torch is missing" in text
    assert "no C++ compiler" in text


def test_bench_tune_takes_shapes_and_needs_a_gpu(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from llmcompress.cli.tune import shapes_of

    dense, banks = shapes_of(str(tiny_folder))
    assert len(dense) == len(set(dense)) and len(banks) == 1 and banks[0][0] > banks[0][1] > 0
    assert invoke(["bench", "tune", "--bits", "5"]) == 2
    assert invoke(["bench", "tune", str(tiny_folder), "--shape", "64x64"]) == 2
    assert invoke(["bench", "tune", "--shape", "64by64"]) == 2
    if not torch.cuda.is_available():
        assert invoke(["bench", "tune", str(tiny_folder)]) == 4
        assert "launches can only be timed on a GPU" in capsys.readouterr().err


def test_an_artifact_that_was_moved_away_is_not_said_to_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmcompress.cli.output import console
    from llmcompress.cli.run import show_outcome
    from llmcompress.pipeline.run_dir import StageRecord
    from llmcompress.pipeline.runner import Outcome

    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "x").write_bytes(b"12")
    places = {"native": tmp_path / "artifact", "gguf": tmp_path / "artifact-gguf"}
    record = StageRecord("write", "export", "finished", "", {}, ["artifact"], artifacts=dict.fromkeys(places, ""))
    show_outcome(Outcome(tmp_path, "nothing to do", (record,), (), places), console(sys.stdout), "again")
    said = capsys.readouterr().out
    assert f"native: {places['native']} (2 B)" in said
    assert f"gguf: {places['gguf']} is gone; --redo write writes it again" in said


def test_names_of_metrics_are_not_broken_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.cli.output import console
    from llmcompress.cli.run import metrics_table
    from llmcompress.stages.state import Metric

    monkeypatch.setenv("COLUMNS", "80")
    name = "heldout.perplexity_without_policies"
    task, _, metric = name.partition(".")
    console(sys.stdout).print(metrics_table([Metric(task, metric, 20.879, 23.156, difference_stderr=0.27)]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{name} ") for line in lines) and max(map(len, lines)) <= 80
    assert any("+2.277 ± 0.27" in line for line in lines)
