#!/usr/bin/env python3
"""RQT 3: the family of SmolLM2-135M at 2.0 to 2.2 bits, and whether its maths member still does sums.

The table of RQT 2 (mean relative perplexity loss beside GPTQ at 3 and 4 bits and BitDelta), then held-out GSM8K
problems: greedy answers of the maths member from the tree, of the dense fine-tune and of the base, by exact match of
the number after ``####``. Needs the family of ``make family-smollm2``.

    python scripts/acceptance/rqt_3_smollm2.py [--models FOLDER] [--problems 83] [--device cuda]

On a CPU in less time: --samples 32 --length 256 --max-tokens 2048 --problems 40
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from family_runs import need_models, quality_goals
from harness import ROOT, llmcompress, verdict

HELDOUT = ROOT / "recipes" / "assets" / "text" / "family" / "heldout" / "maths.jsonl.gz"
MEMBERS = ("maths", "code", "chat", "spanish")
NEW, BATCH = 192, 16


def problems(count: int) -> list[tuple[str, str]]:
    """Question and the number that answers it."""
    found = []
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as lines:
        for line in lines:
            question, _, worked = json.loads(line)["text"].partition("\n")
            if "####" in worked:
                found.append((question, number(worked)))
    return found[:count]


def number(text: str) -> str:
    """What stands after ``####``, without separators and a trailing point; empty where there is none."""
    match = re.search(r"####\s*([-+]?[\d,.]+)", text)
    return match[1].replace(",", "").rstrip(".") if match else ""


@torch.inference_mode()
def right(model: Any, tokenizer: Any, asked: list[tuple[str, str]]) -> list[bool]:
    """Whether each greedy answer is exactly the number wanted."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        given = tokenizer([f"{question}\n" for question, _ in part], return_tensors="pt", padding=True)
        written = model.generate(
            input_ids=given["input_ids"].to(model.device), attention_mask=given["attention_mask"].to(model.device),
            max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )[:, given["input_ids"].shape[1] :]  # fmt: skip
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        found += [number(answer) == wanted for answer, (_, wanted) in zip(answers, part)]
    return found


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmcompress.models.family_artifact import FamilyArtifact, dense_member

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "family_smollm2" / "models")
    parser.add_argument("--problems", type=int, default=83)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows a member")
    parser.add_argument("--length", type=int, default=512, help="tokens in one")
    parser.add_argument("--max-tokens", type=int, default=0, help="held-out tokens a text; 0 for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    need_models(options.models, "make family-smollm2")
    asked = problems(options.problems)
    trained = json.loads((options.models / "training.json").read_text())["settings"]
    caps = [f"stages.evaluate_family.texts.{name}.max_tokens={options.max_tokens}" for name in MEMBERS]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        llmcompress(
            "run", "rqt_smollm2", f"run.dir={run}", f"run.device={options.device}", f"vars.models={options.models}",
            f"stages.rqt.calibration.samples={options.samples}", f"stages.rqt.calibration.length={options.length}",
            *(caps if options.max_tokens else []), "--quiet",
        )  # fmt: skip
        rows = json.loads((run / "stages/evaluate_family/family.json").read_text())
        stored = json.loads((run / "stages/export_family/sizes.json").read_text())["linear_bits"]
        tree = dense_member(FamilyArtifact(run / "artifact"), "maths").to(options.device)
    loaded = {"tree": tree}
    for name in ("maths", "base"):
        loaded[name] = AutoModelForCausalLM.from_pretrained(options.models / name, dtype=tree.dtype).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.models / "maths")
    solved = {name: sum(right(model, tokenizer, asked)) for name, model in loaded.items()}
    for method, row in rows["methods"].items():
        print(f"{method:12s} {row['bits']:5.2f} bits  mean loss {row['mean_relative']:.2%}")
    loss = {method: row["mean_relative"] for method, row in rows["methods"].items()}
    failed = [goal for goal, holds in quality_goals(rows["methods"], stored).items() if not holds]
    means = ", ".join(f"{method} {value:.2%}" for method, value in loss.items())
    verdict(
        not failed,
        f"{stored:.3f} bits; mean loss {means}; GSM8K exact match of {len(asked)}: maths "
        f"member {solved['maths']} dense, {solved['tree']} from the tree, base {solved['base']}; members trained on "
        f"{trained['child_tokens']:,.0f} tokens each; {options.device}; short of: {failed or 'nothing'}",
    )


if __name__ == "__main__":
    main()
