#!/usr/bin/env python3
"""S2R 6: SmolLM2-135M on templated word problems on one GPU, with the table of line 2, within a number of seconds.

    python scripts/acceptance/s2r_6_gpu.py --model FOLDER [--budget 470] [--seed 0] [--scale short] [--device cpu]

FOLDER is what scripts/smollm2_to_hf.py writes. The chain: the model is shown task and format (``warm``), the size of
the numbers is chosen by validation problems so that it solves about half at its first attempt, then SFT on trajectories
beside SFT on right solutions alone, then ORL beside PRL, each a process of its own. What is measured goes into
benchmarks/s2r_gpu.json (with OUT set: $OUT/s2r.json) whenever a phase ends, so that a run that is cut off leaves it.
``--scale`` is for rehearsals, before a GPU is spent: ``tiny`` with ``--device cpu`` runs every phase on the shipped
reasoner with next to no data, in a few minutes. Without --model the stored file is judged.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT, verdict

STORED = ROOT / "benchmarks" / "s2r_gpu.json"
COLUMNS = (
    "accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_recall", "correct_precision",
    "incorrect_to_correct", "correct_to_incorrect", "trials", "tokens", "ended",
)  # fmt: skip
# RR: right attempts that are recognised, as ER of wrong ones
HEADS = ("acc", "first", "VA", "ER", "RR", "CP", "ICR", "CIR", "trials", "tokens", "ended")
POLICIES = ("base", "solutions", "sft", "orl", "prl")
# sizes of the numbers to choose from, and the share of first attempts that should be right
SIZES, AIM = (1, 2, 3, 4, 6, 8, 12, 16, 32), 0.5
# validation problems of each size
EACH = 170
# tokens of the longest verification of numbers of the largest size
VERIFICATION = 128
# seconds that a process of reinforcement needs beside its training: start, model, verdicts before, figures after
AROUND = 50.0
# for rehearsals: next to no data on the shipped reasoner, and a little on the real model
COUNTDOWN = "{kind: countdown, high: 15, limit: 60, compact: true}"
SMALL: dict[str, dict[str, tuple[str, ...]]] = {
    "full": {},
    "short": {
        "warm": ("problems=1500",),
        "init": ("problems=400", "epochs=1", "measure.problems=200"),
        "reinforce": ("steps=4", "measure.problems=200"),
    },
    "tiny": {
        # the reasoner knows Countdown and no words: one step of the warm-up's rows does not hurt it
        "warm": ("problems=64", "lr=1e-5"),
        "init": (
            "problems=300", "samples=4", "sampling.max_new_tokens=16", "epochs=8", "batch=32",
            "lr=2e-3", "measure.problems=40", "measure.max_new_tokens=80",
        ),
        "reinforce": (
            "steps=3", "prompts=8", "min_verdict_recall=null", "sampling.max_new_tokens=80", "guard.ended_below=null",
            "measure.problems=40", "measure.max_new_tokens=80",
        ),
    },
}  # fmt: skip


@dataclass
class Chain:
    """One run of everything.

    Attributes:
        model: Folder or ``asset:`` name.
        device: ``cuda`` or ``cpu``.
        seed: Of the runs.
        scale: ``full``, or one of the rehearsals.
        budget: Seconds from the start to the end of the last process.
        folder: Where the runs go.
        out: The file of results.
        steps: Steps of reinforcement, None for the recipe's.
        begun: When the chain began.
        found: What is measured.
        ready: Processes that wait for the words of a run (waiting_cli.py).
    """

    model: str
    device: str
    seed: int
    scale: str
    budget: float
    folder: Path
    out: Path
    steps: int | None
    begun: float = field(default_factory=time.monotonic)
    ready: list[subprocess.Popen[bytes]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.monotonic() - self.begun)

    def prepare(self, count: int) -> None:
        """Start the processes of the runs to come, so that they have their imports behind them then."""
        script = str(Path(__file__).with_name("waiting_cli.py"))
        for _ in range(count):
            command = [sys.executable, script, self.device]
            self.ready.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT))

    def start(self, name: str, recipe: str, *words: str, keep: tuple[str, ...]) -> subprocess.Popen[bytes]:
        """Start a run with the named stages of the recipe; its output goes to a log beside it."""
        stages = {"warm", "init"} if recipe == "s2r_smollm2_solutions" else {"warm", "init", "reinforce"}
        gone = [f"stages.{stage}~" for stage in stages - set(keep)]
        small = [f"stages.{stage}.{word}" for stage in keep for word in SMALL[self.scale].get(stage, ())]
        task = [f"vars.task={COUNTDOWN}"] if self.scale == "tiny" else []
        words = (
            "run", recipe, f"run.dir={self.folder / name}", f"run.seed={self.seed}", f"run.device={self.device}",
            *gone, *task, *small, *words, "--quiet",
        )  # fmt: skip
        if not self.ready:
            self.prepare(1)
        process = self.ready.pop(0)
        assert process.stdin is not None
        told = json.dumps({"log": str(self.folder / f"{name}.log"), "words": words})
        # one that has died of its imports is seen by its exit code
        with suppress(BrokenPipeError):
            process.stdin.write(told.encode() + b"\n")
            process.stdin.close()
        self.tell(f"start {name}")
        return process

    def wait(self, **processes: subprocess.Popen[bytes]) -> None:
        """Wait for processes until the budget is spent; what is not finished then is stopped and named."""
        for name, process in processes.items():
            try:
                code: int | None = process.wait(max(0.1, self.left()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            self.tell(f"end {name}: {'out of time' if code is None else f'exit code {code}'}")
            if code != 0:
                self.found.setdefault("unfinished", {})[name] = code
                log = self.folder / f"{name}.log"
                print(log.read_text(errors="replace")[-3000:] if log.exists() else "no log", file=sys.stderr)
            self.gather(name)
        self.keep()

    def tell(self, text: str) -> None:
        """Say what happens, with the second at which it does."""
        line = f"{time.monotonic() - self.begun:6.1f} s  {text}"
        self.found.setdefault("times", []).append(line)
        print(line, file=sys.stderr, flush=True)

    def gather(self, name: str) -> None:
        """Take over what a run has left: figures, verdicts, curves, times, notes."""
        for stage in sorted((self.folder / name / "stages").glob("*")):
            record = self.found.setdefault("runs", {}).setdefault(name, {}).setdefault(stage.name, {})
            for path in (*stage.glob("behaviour_*.json"), stage / "rows.json"):
                if path.exists():
                    record[path.stem] = json.loads(path.read_text())
            if (stage / "state.json").exists():
                state = json.loads((stage / "state.json").read_text())
                record["state"] = {key: state[key] for key in ("seconds", "peak_rss_bytes", "peak_vram_bytes")}
            for path in stage.glob("episodes_*.json"):
                told = json.loads(path.read_text())
                verdicts = {key: "".join("01"[flag] for flag in told[key]) for key in ("final", "first")}
                record[path.stem] = {**verdicts, "texts": told["texts"]}
            if (stage / "curve.json").exists():
                curve = json.loads((stage / "curve.json").read_text())
                chosen = curve if len(curve) <= 60 else curve[:: len(curve) // 30]
                record["curve"] = [{k: _short(v) for k, v in row.items()} for row in chosen]
        # the run's own log holds what libraries warned of
        for log in (self.folder / f"{name}.log", self.folder / name / "log.txt"):
            if log.exists():
                text = log.read_text(errors="replace")[-3000:]
                self.found.setdefault("detail", {})[f"{name} {log.name}"] = text
        events = self.folder / name / "events.jsonl"
        if events.exists():
            rows = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
            said = [row for row in rows if row["kind"] in ("note", "warning", "stage_start", "stage_end")]
            self.found.setdefault("detail", {})[f"{name} notes"] = said[-200:]

    def wait_for(self, model: Path, process: subprocess.Popen[bytes]) -> None:
        """Wait until a run has written its model (complete at once), has ended, or the budget is spent: the next runs
        need not wait for what it measures then.
        """
        while not model.is_dir() and process.poll() is None and self.left() > 0:
            time.sleep(0.1)

    def keep(self) -> None:
        """Write what there is; the file is complete or the one before."""
        part = self.out.with_suffix(".part")
        # what went on inside is of interest where the run is looked into, not beside the figures
        told = {key: value for key, value in self.found.items() if key != "detail" or self.out != STORED}
        text = json.dumps(told, indent=1)
        # a record to a line
        text = re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
        part.write_text(text + "\n")
        part.replace(self.out)

    def policy(self, name: str) -> dict[str, Any] | None:
        """Figures of a policy with its verdicts on each problem, None where it was not measured."""
        place = {
            "base": ("sft", "init", "before"), "sft": ("sft", "init", "after"),
            "solutions": ("solutions", "init", "after"), "orl": ("orl", "reinforce", "after"),
            "prl": ("prl", "reinforce", "after"),
        }[name]  # fmt: skip
        record = self.found.get("runs", {}).get(place[0], {}).get(place[1], {})
        figures, episodes = record.get(f"behaviour_{place[2]}"), record.get(f"episodes_{place[2]}")
        if figures is None or episodes is None:
            return None
        return {**figures, "final": [flag == "1" for flag in episodes["final"]]}


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def versions(device: str) -> dict[str, str]:
    """Hardware and versions."""
    import torch
    import transformers

    import llmcompress

    known = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "llmcompress": llmcompress.__version__, "cuda": str(torch.version.cuda), "processors": str(os.cpu_count()),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return known


def preload() -> None:
    """Import what :func:`choose_size` needs while the first process still trains."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from llmcompress.evaluation import sampling, self_correction  # noqa: F401


def choose_size(chain: Chain, model: Path) -> int:
    """The size of numbers at which the warmed-up model's first attempts are right about half the time.

    Decided by validation problems, greedily, in one batch. How many of those attempts it recognises is kept beside it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmcompress.data.problems.word_problems import WordProblems
    from llmcompress.evaluation.sampling import Sampling, sample
    from llmcompress.evaluation.self_correction import Reader, choose, verify_given

    dtype = torch.bfloat16 if chain.device == "cuda" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(chain.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    sets = {size: WordProblems(16000, sizes=(size,), brief=True) for size in SIZES}
    readers = {size: Reader(tokenizer, found) for size, found in sets.items()}
    rows = [(size, problem) for size in SIZES for problem in choose(sets[size].problems("validation"), EACH, 0)]
    prompts = [readers[size].prompt(problem.question) for size, problem in rows]
    reader = readers[SIZES[0]]
    begun = time.monotonic()
    found = sample(policy, prompts, Sampling(48, batch=2048), reader.end, reader.pad, 0)
    seconds = time.monotonic() - begun
    right: dict[int, list[bool]] = {size: [] for size in SIZES}
    for (size, problem), ids in zip(rows, found):
        right[size].append(bool(readers[size].judge(problem, ids).right[0]))
    shares = {size: sum(flags) / len(flags) for size, flags in right.items()}
    chain.found["ladder"] = {"shares": shares, "seconds_to_decode": round(seconds, 2)}
    chain.tell(f"first attempts by size: {shares}, decoded in {seconds:.1f} s")
    chosen = min(SIZES, key=lambda size: (abs(shares[size] - AIM), size))
    # what a verifier is worth that has only been taught to verify: where it is weak, trajectories come too early
    asked = [(problem, reader.text(ids)) for (size, problem), ids in zip(rows, found) if size == chosen]
    said = verify_given(policy, readers[chosen], *zip(*asked), Sampling(VERIFICATION, batch=2048))
    chain.found["ladder"]["recognised"] = recognised(right[chosen], said)
    chain.tell(f"attempts of size {chosen} recognised by the warmed-up model: {chain.found['ladder']['recognised']}")
    del policy
    gc.collect()
    if chain.device == "cuda":
        torch.cuda.empty_cache()
    return chosen


def recognised(right: list[bool], said: list[bool | None]) -> dict[str, float | None]:
    """Shares of right attempts that are accepted and of wrong ones that are rejected."""
    shares: dict[str, float | None] = {}
    for name, truth in (("right", True), ("wrong", False)):
        verdicts = [verdict for is_right, verdict in zip(right, said) if is_right is truth]
        shares[name] = sum(verdict is truth for verdict in verdicts) / len(verdicts) if verdicts else None
    return shares


def run(chain: Chain) -> None:
    """Every phase; stops where a model that the next one needs is missing."""
    warm = chain.start("warm", "s2r_smollm2", f"model.path={chain.model}", keep=("warm",))
    chain.found["versions"] = versions(chain.device)
    chain.found["seed"] = chain.seed
    chain.found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    chain.prepare(2)
    preload()
    chain.wait(warm=warm)
    base = chain.folder / "warm" / "stages" / "warm" / "model"
    if not base.is_dir():
        return
    size = SIZES[0] if chain.scale == "tiny" else choose_size(chain, base)
    chain.found["size"] = size
    chain.found["scale"] = chain.scale
    chain.keep()
    common = [f"model.path={base}", *([] if chain.scale == "tiny" else [f"vars.sizes=[{size}]"])]
    sft = chain.start("sft", "s2r_smollm2", *common, keep=("init",))
    solutions = chain.start("solutions", "s2r_smollm2_solutions", *common, keep=("init",))
    chain.prepare(2)
    taught = chain.folder / "sft" / "stages" / "init" / "model"
    chain.wait_for(taught, sft)
    if taught.is_dir() and chain.left() > AROUND:
        common[0] = f"model.path={taught}"
        limit = [f"stages.reinforce.guard.seconds={chain.left() - AROUND:.0f}"]
        if chain.steps is not None:
            limit.append(f"stages.reinforce.steps={chain.steps}")
        orl = chain.start("orl", "s2r_smollm2", *common, *limit, keep=("reinforce",))
        prl = chain.start("prl", "s2r_smollm2_prl", *common, *limit, keep=("reinforce",))
        chain.wait(solutions=solutions, sft=sft)
        chain.wait(orl=orl, prl=prl)
    else:
        chain.wait(solutions=solutions, sft=sft)


def net(figures: dict[str, Any]) -> float:
    """Problems won by correction minus those lost, as a share of all."""
    won = (figures["incorrect_to_correct"] or 0) * figures["n_first_wrong"]
    lost = (figures["correct_to_incorrect"] or 0) * figures["n_first_right"]
    return float(won - lost) / figures["n_problems"]


def judge(chain: Chain) -> None:
    """Print the table, add the claims to the results, and give the verdict."""
    from llmcompress.evaluation.self_correction import paired_test

    rows = {name: chain.policy(name) for name in POLICIES}
    print(f"{'':10}" + "".join(f"{head:>8}" for head in HEADS))
    for name, figures in rows.items():
        shown = [None if figures is None else figures[column] for column in COLUMNS]
        cells = [
            "–" if value is None else f"{value:.2f}" if head == "trials" else f"{value:.0f}" if head == "tokens" else
            f"{100 * value:.1f}" for head, value in zip(HEADS, shown)
        ]  # fmt: skip
        print(f"{name:10}" + "".join(f"{cell:>8}" for cell in cells))
    claims: dict[str, bool] = {}
    for above, below in (("sft", "base"), ("sft", "solutions"), ("orl", "sft"), ("prl", "sft")):
        one, two = rows[above], rows[below]
        if one is None or two is None:
            claims[f"{above} over {below} (not measured)"] = False
            continue
        p = paired_test(two["final"], one["final"])
        claims[f"{above} over {below} (p {p:.2g})"] = one["accuracy"] > two["accuracy"] and p < 0.05
    sft = rows["sft"]
    claims["correction gains more than it breaks"] = sft is not None and net(sft) > 0
    better = [rows[name] for name in ("orl", "prl")]
    claims["ORL or PRL corrects more than SFT"] = sft is not None and any(r and net(r) > net(sft) for r in better)
    said = {name: (rows[name] or {}).get("verification_accuracy") or 0.0 for name in ("sft", "orl", "prl")}
    claims["PRL has the highest VA"] = said["prl"] > max(said["sft"], said["orl"]) + 0.001
    chain.found["claims"] = claims
    chain.keep()
    broken = [name for name, holds in claims.items() if not holds]
    table = ", ".join(
        f"{name} {100 * r['accuracy']:.1f} (first {100 * r['first_accuracy']:.1f})" for name, r in rows.items() if r
    )
    where = chain.found.get("versions", {}).get("gpu", "CPU")
    count = next((r["n_problems"] for r in rows.values() if r), 0)
    size = chain.found.get("size")
    verdict(
        not broken if chain.scale == "full" else all(rows.values()),
        f"{'' if chain.scale == 'full' else 'rehearsal, no claim: '}SmolLM2-135M on {where}, {count} problems, "
        f"numbers of size {size}, one seed; accuracy in %: {table or 'nothing measured'}; does not hold: "
        f"{'; '.join(broken) or 'nothing'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of reinforcement instead of the recipe's")
    parser.add_argument(
        "--scale", choices=SMALL, default="full", help="short: a rehearsal; tiny: one on the shipped reasoner"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--name", default="s2r", help="of the file in $OUT")
    args = parser.parse_args()
    out = Path(os.environ["OUT"]) / f"{args.name}.json" if os.environ.get("OUT") else STORED
    if args.scale != "full" and not os.environ.get("OUT"):
        out = Path(tempfile.gettempdir()) / "s2r_rehearsal.json"
    model = "asset:reference_reasoner" if args.scale == "tiny" else args.model
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-s2r-"))
    chain = Chain(model or "", args.device, args.seed, args.scale, args.budget, folder, out, args.steps)
    # whether there is a GPU is left to the first run to say: asking torch takes seconds
    if model is None:
        if not STORED.exists():
            verdict(False, "no results are stored; with a GPU give --model FOLDER (scripts/smollm2_to_hf.py makes it)")
        chain.found = json.loads(STORED.read_text())
        chain.out = Path(tempfile.mkstemp(suffix=".json")[1])
        print(f"nothing is run without --model: {STORED.relative_to(ROOT)}, measured {chain.found.get('date')}")
        judge(chain)
    try:
        run(chain)
        chain.tell("all phases ended")
        judge(chain)
    finally:
        for process in chain.ready:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
