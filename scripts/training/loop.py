"""The training loop: resumable, with a learning-rate fall that may begin when asked for."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from training.data import Batches, Recall, Source, encode, read_texts, train_tokenizer
from training.models import BUILDERS, balance_loss
from training.precision import autocast

WARMUP = 200


def learning_rate(step: int, steps: int, peak: float, fall_at: int) -> float:
    """Linear warm-up, constant, then a linear fall to zero from ``fall_at`` to ``steps``."""
    return peak * min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / max(1, steps - fall_at)))


def save_atomic(payload: dict[str, Any], path: Path) -> None:
    import torch

    part = path.with_suffix(".part")
    torch.save(payload, part)
    part.replace(path)


def optimizers(model: Any, lr: float, muon: bool) -> list[Any]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    import torch

    inner, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if muon and parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            inner.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    chosen: list[Any] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if inner:
        chosen.append(torch.optim.Muon(inner, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return chosen


def evaluate(model: Any, heldout: list[int], length: int, autocast: Any, batches: int = 12) -> float:
    """Mean negative log likelihood (nats a token) over fixed held-out windows."""
    import torch
    import torch.nn.functional as F

    model.eval()
    total = 0.0
    with torch.inference_mode(), autocast():
        for index in range(batches):
            row = torch.tensor(heldout[index * length : (index + 1) * length + 1], dtype=torch.long)[None]
            logits = model(row[:, :-1], use_cache=False).logits.float()
            total += F.cross_entropy(logits[0], row[0, 1:]).item()
    model.train()
    return total / batches


def recall_accuracy(model: Any, heldout: list[int], recall: Recall, length: int, windows: int = 24) -> dict[str, float]:
    """Share of repeated values predicted first, by distance to the previous occurrence, on held-out text."""
    import numpy as np
    import torch

    bins = ((0, 64), (64, 256), (256, 10_000))
    hits: dict[str, list[float]] = {f"{low}-{high if high < 10_000 else 'up'}": [] for low, high in bins}
    model.eval()
    with torch.inference_mode():
        for index in range(windows):
            rng = np.random.default_rng((7, index))
            ids, answers, distances = recall.insert(heldout[index * length :], rng, length)
            predicted = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].argmax(-1)
            for answer, distance in zip(answers, distances, strict=True):
                for (low, high), row in zip(bins, hits.values(), strict=True):
                    if low <= distance < high:
                        row.append(float(predicted[answer - 1] == int(ids[answer])))
    model.train()
    return {key: round(sum(row) / max(1, len(row)), 4) for key, row in hits.items()}


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer in the output folder: trained on the mix, or copied from ``--tokenizer``."""
    from transformers import AutoTokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        if args.tokenizer:
            AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.out)
        else:
            train_tokenizer(args.data, args.out, args.vocab_size)
    return AutoTokenizer.from_pretrained(args.out)


class Run:
    """Everything that a run owns: model, optimisers, batches, and what its checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(args.threads)
        self.args = args
        self.tokenizer = load_tokenizer(args)
        self.recall = Recall(self.tokenizer, longest=args.length) if args.recall else None
        files = encode(args.data, args.out)
        self.batches = Batches(files, args.data, args.rows, args.length, args.seed, self.recall, args.recall)
        text = " ".join(t[20_000:120_000] for t in read_texts(args.heldout))
        self.heldout = self.tokenizer.encode(text)
        torch.manual_seed(args.seed)
        self.model = BUILDERS[args.model](args.vocab_size).train()
        if args.model in ("mamba2", "hybrid"):
            from training.scan import use_fast_mixers

            use_fast_mixers(self.model)
        self.optimizers = optimizers(self.model, args.lr, args.muon)
        self.steps = int(args.tokens) // (args.rows * args.length)
        self.fall_at = self.steps - self.steps // 4
        self.start = 0
        self.curve: list[dict[str, float]] = []
        self.restore()

    @property
    def checkpoint(self) -> Path:
        """File that a killed run continues from."""
        return Path(self.args.out) / "checkpoint.pt"

    def restore(self) -> None:
        """Read the checkpoint, if there is one."""
        import torch

        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.start, self.curve = state["step"], state["curve"]
        if state["falling"]:
            self.fall_at, self.steps = state["falling"]

    def save(self, step: int) -> None:
        """Write the checkpoint; ``step`` is the next one to run."""
        falling = [self.fall_at, self.steps] if step > self.fall_at else None
        save_atomic(
            {
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": step,
                "curve": self.curve,
                "falling": falling,
            },
            self.checkpoint,
        )

    def begin_fall_if_asked(self, step: int) -> None:
        """A file ``fall`` in the output folder holds the number of steps over which to fall from now on."""
        asked = Path(self.args.out) / "fall"
        if asked.exists() and step < self.fall_at:
            self.fall_at, self.steps = step, step + int(asked.read_text())
            asked.rename(asked.with_name(f"fall_at_{step}"))
            self.save(step + 1)

    def autocast(self) -> Any:
        """Context in which the model runs."""
        return autocast("cpu", self.args.dtype)

    def loss(self, step: int) -> tuple[Any, Any]:
        """The language-model loss of one batch, and the balance loss (0 without experts)."""
        import torch
        import torch.nn.functional as F

        rows, weights = self.batches(step)
        config = self.model.config
        experts = getattr(config, "num_local_experts", 0)
        routers = {"output_router_logits": True} if experts else {}
        with self.autocast():
            output = self.model(rows[:, :-1], use_cache=False, **routers)
            each = F.cross_entropy(output.logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
            loss = (each * weights.flatten()).sum() / weights.sum()
            balance = torch.zeros(())
            if experts:
                balance = balance_loss(output.router_logits, experts, config.num_experts_per_tok)
        return loss, balance

    def report(self, step: int, loss: float, balance: float, rate: float) -> None:
        """Evaluate, add a point to the curve, print and save."""
        nll = evaluate(self.model, self.heldout, self.args.length, self.autocast)
        tokens = (step + 1) * self.args.rows * self.args.length
        point = {"tokens": tokens, "train_loss": round(loss, 4), "heldout_nll": round(nll, 4)}
        if balance:
            point["balance"] = round(balance, 4)
        self.curve.append(point)
        print(
            f"step {step + 1}/{self.steps}  loss {loss:.3f}  balance {balance:.3f}  "
            f"held-out ppl {math.exp(nll):.2f}  {rate:.0f} tokens/s",
            flush=True,
        )
        self.save(step + 1)


def train(args: argparse.Namespace) -> None:
    """Train to the end, then write the model folder."""
    import torch

    run = Run(args)
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, steps {run.start} to {run.steps}", flush=True)
    began, step = time.time(), run.start
    while step < run.steps:
        run.begin_fall_if_asked(step)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, args.lr, run.fall_at)
        loss, balance = run.loss(step)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.every == 0 or step + 1 == run.steps:
            rate = (step + 1 - run.start) * args.rows * args.length / (time.time() - began)
            run.report(step, loss.item(), balance.item(), rate)
        step += 1
    finish(run)


def finish(run: Run) -> None:
    """Write weights, tokenizer and curve; of a model with states also its half-lives and recall accuracy."""
    import torch

    folder = Path(run.args.out) / "model"
    curve: dict[str, Any] = {"curve": run.curve}
    if run.recall is not None:
        curve["recall_accuracy"] = recall_accuracy(run.model, run.heldout, run.recall, run.args.length)
    run.model.to(torch.bfloat16).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    payload = curve if run.recall is not None else run.curve
    (folder / "training_curve.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=sorted(BUILDERS), default="moe")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--data", type=Source.parse, action="append", required=True, metavar="NAME=PATH:SHARE")
    made.add_argument("--heldout", type=Path, required=True)
    made.add_argument("--tokenizer", type=Path, help="use this folder's tokenizer instead of training one")
    made.add_argument("--recall", type=float, default=0.0, help="share of windows with repeated statements")
    made.add_argument("--tokens", type=float, default=24e6)
    made.add_argument("--vocab-size", type=int, default=4096)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--muon", action="store_true", help="Muon for the matrices inside the blocks")
    made.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of matrix products")
    made.add_argument("--balance", type=float, default=0.01)
    made.add_argument("--every", type=int, default=100)
    made.add_argument("--seed", type=int, default=0)
    return made
