#!/usr/bin/env python3
"""RQT 3: the family of SmolLM2-135M at 2.0 to 2.2 bits, and whether its maths member still does sums.

The table of RQT 2 (mean relative perplexity loss beside GPTQ at 3 and 4 bits and BitDelta, headers of files counted),
and held-out GSM8K problems: greedy answers of the dense fine-tune, of the base and of the maths member from the tree,
by exact match of the number after ``####``. Needs the family of ``make family-smollm2``.

    python scripts/acceptance/rqt_3_smollm2.py [--models FOLDER] [--problems 83] [--device cuda] [--gsm8k FILE]

``--gsm8k`` names GSM8K's own test split instead of the 83 problems of it that the repository has. A second process
answers problems while the first builds the tree. What is known is in ``benchmarks/rqt_smollm2.json`` at any time;
without the family the figures there, of the run that was committed, are judged.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from family_runs import need_models, quality_goals
from harness import CLI, ROOT, verdict

HELDOUT = ROOT / "recipes" / "assets" / "text" / "family" / "heldout" / "maths.jsonl.gz"
OUT = ROOT / "benchmarks" / "rqt_smollm2.json"
MEMBERS = ("maths", "chat", "spanish", "code")
# most worked answers of GSM8K end within these
NEW_TOKENS = 256
# sequences at once; a GPU takes all there are, since a step costs it the same for few and many
CPU_ROWS, CUDA_ROWS = 16, 1344


class Figures:
    """What is known so far, always whole on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}

    def put(self, **rows: Any) -> None:
        """Add or replace figures."""
        if any(self.rows.get(key) != value for key, value in rows.items()):
            self.rows |= rows
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            part.replace(self.path)


def machine(device: str) -> dict[str, str]:
    """Hardware and versions."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def problems(path: Path, count: int) -> list[tuple[str, str]]:
    """Question and the number that answers it."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            question, worked = (row["question"], row["answer"]) if "question" in row else row["text"].split("\n", 1)
            if "####" in worked:
                found.append((question, number(worked)))
    return found[:count]


def number(text: str) -> str:
    """What stands after ``####``, without separators and a trailing point; empty where there is none."""
    match = re.search(r"####\s*([-+]?[\d,.]+)", text)
    return match[1].replace(",", "").rstrip(".") if match else ""


@torch.inference_mode()
def right(model: Any, tokenizer: Any, asked: list[tuple[str, str]]) -> int:
    """How many greedy answers are exactly the number wanted; questions of like length go together."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = CUDA_ROWS if model.device.type == "cuda" else CPU_ROWS
    ordered = sorted(asked, key=lambda each: len(each[0]))
    found = 0
    for start in range(0, len(ordered), rows):
        part = ordered[start : start + rows]
        given = tokenizer([f"{question}\n" for question, _ in part], return_tensors="pt", padding=True)
        written = model.generate(
            input_ids=given["input_ids"].to(model.device), attention_mask=given["attention_mask"].to(model.device),
            max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, given["input_ids"].shape[1] :]  # fmt: skip
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        found += sum(number(answer) == wanted for answer, (_, wanted) in zip(answers, part))
    return found


def solve(options: argparse.Namespace, run: Path) -> None:
    """Answer problems with the dense models, then with the tree once it is there; a line of JSON per model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.models.family_model import dense_member

    asked = problems(options.gsm8k, options.problems)
    tokenizer = AutoTokenizer.from_pretrained(options.models / "maths")

    def told(name: str, model: Any) -> None:
        began = time.perf_counter()
        count = right(model.to(options.device).eval(), tokenizer, asked)
        print(json.dumps({name: {"right": count, "seconds": round(time.perf_counter() - began, 1)}}), flush=True)

    for name, folder in (("dense", "maths"), ("base", "base")):
        told(name, AutoModelForCausalLM.from_pretrained(options.models / folder, dtype=torch.bfloat16))
    # the folder appears whole
    while not (run / "artifact").is_dir():
        time.sleep(0.2)
    told("tree", dense_member(FamilyArtifact(run / "artifact"), "maths", torch.bfloat16))


def read_lines(path: Path) -> dict[str, Any]:
    """The whole lines of JSON in a file, as one dictionary."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            found |= json.loads(line)
    return found


def measure(options: argparse.Namespace, folder: Path, figures: Figures) -> None:
    """The run and the answers, side by side; figures are collected while they come."""
    run, log = folder / "run", folder / "gsm8k.txt"
    caps = [f"stages.evaluate_family.texts.{name}.max_tokens={options.max_tokens}" for name in MEMBERS]
    command = [
        *CLI, "run", "rqt_smollm2", f"run.dir={run}", f"run.device={options.device}", f"vars.models={options.models}",
        f"stages.rqt.calibration.samples={options.samples}", *(caps if options.max_tokens else []),
    ]  # fmt: skip
    words = [sys.executable, *sys.argv, "--solve", str(run)]
    with log.open("w") as answers:
        solver = subprocess.Popen(words, stdout=answers)
        work = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while work.poll() is None or solver.poll() is None:
                collect(run, log, figures)
                if work.poll() not in (None, 0) or solver.poll() not in (None, 0):
                    raise SystemExit(f"the run ended with {work.poll()}, the solver with {solver.poll()}")
                time.sleep(0.5)
        finally:
            for each in (work, solver):
                each.kill()
                each.wait()
    collect(run, log, figures)


def collect(run: Path, log: Path, figures: Figures) -> None:
    """Everything that is on the disk by now."""
    found: dict[str, Any] = {"gsm8k": read_lines(log)}
    places = {
        "perplexity": "evaluate_family/figures.json", "table": "evaluate_family/family.json",
        "stored": "export_family/sizes.json", "tree": "rqt/survey.json",
    }  # fmt: skip
    for key, place in places.items():
        if (run / "stages" / place).exists():
            found[key] = json.loads((run / "stages" / place).read_text())
    states = {path.parent.name: path for path in run.glob("stages/*/state.json")}
    found["seconds"] = {stage: json.loads(path.read_text())["seconds"] for stage, path in sorted(states.items())}
    figures.put(**found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "family_smollm2" / "models")
    parser.add_argument("--problems", type=int, default=83)
    parser.add_argument("--gsm8k", type=Path, default=HELDOUT, help="gzip of JSON lines with the problems")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows a member")
    parser.add_argument("--max-tokens", type=int, default=0, help="held-out tokens a text; 0 for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--solve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solve is not None:
        solve(options, options.solve)
        return
    if not (options.models / "training.json").exists() and OUT.exists():
        print(f"{options.models} is missing: judging the figures in {OUT.relative_to(ROOT)}")
        judge(json.loads(OUT.read_text()))
    need_models(options.models, "make family-smollm2")
    figures = Figures(options.out)
    training = json.loads((options.models / "training.json").read_text())
    asked = len(problems(options.gsm8k, options.problems))
    figures.put(machine=machine(options.device), training=training, problems=asked, new_tokens=NEW_TOKENS)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder), figures)
    figures.put(wall_seconds=round(time.perf_counter() - began, 1))
    judge(figures.rows)


def table(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Method → bits and losses, also of an evaluation that was cut off: of methods known for every member."""
    if "table" in rows:
        return dict(rows["table"]["methods"])
    known = {key: value["perplexity"] for key, value in rows.get("perplexity", {}).items() if isinstance(value, dict)}
    found = {}
    for method in ("rqt", "bitdelta", "gptq-4", "gptq-3"):
        keys = {name: (f"{method}/{name}/{name}", f"dense/{name}/{name}") for name in MEMBERS}
        bits = rows["stored"]["linear_bits"] if method == "rqt" else rows["perplexity"].get(f"{method}/bits")
        if bits is not None and all(key in known for pair in keys.values() for key in pair):
            relative = {name: known[own] / known[dense] - 1 for name, (own, dense) in keys.items()}
            found[method] = {
                "bits": bits,
                "relative": relative,
                "mean_relative": sum(relative.values()) / len(relative),
            }
    return found


def judge(rows: dict[str, Any]) -> NoReturn:
    """Print the table and the verdict."""
    missing = {"stored", "gsm8k"} - set(rows) | ({"dense", "tree", "base"} - set(rows.get("gsm8k", ())))
    methods = table(rows) if "stored" in rows else {}
    missing |= {"rqt", "bitdelta", "gptq-4", "gptq-3"} - set(methods)
    if missing:
        verdict(False, f"the run was cut off before {', '.join(sorted(missing))} could be measured")
    stored = rows["stored"]["linear_bits"]
    for method, row in methods.items():
        each = ", ".join(f"{name} {value:.2%}" for name, value in row["relative"].items())
        print(f"{method:12s} {row['bits']:5.2f} bits  mean loss {row['mean_relative']:.2%}  ({each})")
    failed = [goal for goal, holds in quality_goals(methods, stored).items() if not holds]
    means = ", ".join(f"{method} {row['mean_relative']:.2%}" for method, row in methods.items())
    solved = {name: row["right"] for name, row in rows["gsm8k"].items()}
    verdict(
        not failed,
        f"{stored:.3f} bits with the files' headers; mean loss {means}; GSM8K exact match of {rows['problems']}: maths "
        f"member {solved['dense']} dense, {solved['tree']} from the tree, base {solved['base']}; "
        f"{rows['machine']['device']}; short of: {failed or 'nothing'}",
    )


if __name__ == "__main__":
    main()
