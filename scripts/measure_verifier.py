#!/usr/bin/env python3
"""How soon SmolLM2-135M learns to verify on a CPU: the rows of the warm-up of ``s2r_smollm2``, with few of them.

    python scripts/measure_verifier.py --model FOLDER [--plain 40] [--updates 150] [--checkpoint FILE]
    python scripts/measure_verifier.py --model FOLDER --minutes 90 --rows 8 --dtype float32 --learn 1 2 4 --sizes 4

FOLDER is what scripts/smollm2_to_hf.py writes. An update has 16 rows, where the recipe's have 96, at the recipe's
rate; about 2,000 tokens, 14 seconds of a core of an AMD EPYC (Zen 4) and, in float32, 22 of one without products in 16
bit (Zen 3). The model keeps the tokens of its vocabulary that the rows have, its products are in bfloat16 or float32,
its weights in float32. ``--plain`` updates come first whose verifications have no verdict. With ``--minutes`` the rate
falls by the clock, and the number of updates is what fits. A stopped run goes on from its checkpoint.

Printed are, of verifications of held-out attempts, right and wrong, the shares that are told without a mistake and with
the right verdict, and what goes wrong by kind of token. All tokens are told what precedes them, which for verifications
without a mistake is what greedy decoding writes. ``--decode`` writes verifications of that many given attempts, and
first attempts of as many problems, greedily and prints what the gate of ``s2r_rl`` sees: how many right and how many
wrong attempts are recognised, each with the standard error of a share.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.algorithms.self_verify import verdict_of
from llmcompress.data.actions import CHECK
from llmcompress.data.problems.base import boxed
from llmcompress.data.problems.word_problems import TEMPLATES, WordProblems
from llmcompress.data.trajectories import Trajectory
from llmcompress.data.verifiers import Program
from llmcompress.evaluation.self_correction import Reader
from llmcompress.recipe.load import load_recipe
from llmcompress.training.rows import by_length
from llmcompress.training.sft import SftRow, to_row

ROWS, LONGEST = 16, 640
# the rate falls to zero over the last third
DECAY = 0.35
# what a number in a verification is: a number to be added, in front of its columns; the terms of a product or column;
# what they give; the number that the columns spell; the one from the story that it has to be
NUMBERS = {
    "header": r"(\d+\+\d+):", "terms": r"(\d+(?:[+*]\d+)+)=", "result": r"=(\d+)", "total": r", (\d+)(?=[;.])",
    "goal": r"(?:paid|had|goal|together) (\d+)", "verdict": r"the answer is (\w+)",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """A held-out verification, each token told what precedes it.

    Attributes:
        right: Whether the attempt is.
        size: Of the numbers.
        template: Of the story.
        steps, verdict: Whether all steps, and whether the verdict, are the most likely tokens.
    """

    right: bool
    size: int
    template: str
    steps: bool
    verdict: bool


def kinds(text: str) -> list[str]:
    """Kind of every character of a verification: see :data:`NUMBERS`; the rest is ``text``."""
    found = ["text"] * len(text)
    for kind, pattern in NUMBERS.items():
        for match in re.finditer(pattern, text):
            for place in range(*match.span(1)):
                if kind == "verdict" or text[place].isdigit():
                    found[place] = kind
    return found


def verification(task: WordProblems, problem: Any, rng: random.Random, plain: bool = False) -> Trajectory:
    """An attempt, right or not, with its verification alone to be learned."""
    attempt, steps = task.read_back(problem, rng)
    told = steps if plain else Program(task).write(problem, boxed(attempt) or "")
    return Trajectory(problem.key, problem.question, f"{attempt}{CHECK}{told}", 1, "verification", ends=False)


def written(
    reader: Reader, task: WordProblems, read_back: float, number: int, plain: bool, count: int = ROWS, seed: int = 0
) -> list[SftRow]:
    """``count`` rows of an update; ``read_back`` is the share of verifications."""
    rng = random.Random(f"{seed}:{number}")
    found = []
    for problem in rng.choices(task.problems("pretrain"), k=count):
        if rng.random() < read_back:
            row = verification(task, problem, rng, plain)
        else:
            row = Trajectory(problem.key, problem.question, task.solution(problem, rng), 1, "solution")
        found.append(to_row(row, reader, LONGEST))
    return [row for row in found if row is not None]


class Learner:
    """The model with the part of its vocabulary that rows have.

    Args:
        folder: Of the model.
        rows: Some of what it will see.
        lr: Peak rate.
        dtype: Of the products.
    """

    def __init__(
        self, folder: str, rows: Iterable[SftRow], end: int, lr: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        from transformers import AutoModelForCausalLM

        used = sorted({end, *(token for row in rows for token in (*row.prompt, *row.response))})
        self.used = used
        self.places = {token: place for place, token in enumerate(used)}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        kept = model.get_input_embeddings().weight.data[used].clone()
        model.resize_token_embeddings(len(used))
        model.get_input_embeddings().weight.data.copy_(kept)
        model.tie_weights()
        # updates are smaller than the steps of bfloat16
        self.weights = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        self.model = model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=lr, weight_decay=0.0)
        self.step = 0
        self.tokens = 0

    def restore(self, path: Path | None) -> None:
        """Go on where a run stopped, if it left its checkpoint."""
        if path is not None and path.exists():
            kept = torch.load(path, weights_only=True)
            for name, value in kept["weights"].items():
                self.weights[name].data.copy_(value)
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step, self.tokens = kept["step"], kept["tokens"]
        self._publish()

    def save(self, path: Path | None) -> None:
        """Leave everything that :meth:`restore` needs; the file is complete or the one before."""
        if path is None:
            return
        weights = {name: value.data for name, value in self.weights.items()}
        part = path.with_suffix(".part")
        torch.save(
            {"weights": weights, "optimizer": self.optimizer.state_dict(), "step": self.step, "tokens": self.tokens},
            part,
        )
        part.replace(path)

    def _publish(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.weights[name])

    def logits(self, rows: Sequence[SftRow]) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B, T, V]`` after each token and the tokens ``[B, T]`` of rows, padded at the right."""
        whole = [[*row.prompt, *row.response] for row in rows]
        ids = torch.zeros(len(rows), max(map(len, whole)), dtype=torch.int64)
        for place, tokens in enumerate(whole):
            # a token that no training row has stands for the first one
            ids[place, : len(tokens)] = torch.tensor([self.places.get(token, 0) for token in tokens])
        return self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1), ids

    def learn(self, rows: Sequence[SftRow], lr: float, verdict_weight: float) -> tuple[float, float]:
        """One update; cross-entropy of all targets and of verdicts, in nats."""
        weights = [[t + (verdict_weight - 1) * v for t, v in zip(row.trained, row.verdict)] for row in rows]
        total = sum(map(sum, weights))
        sums = torch.zeros(4)
        for part in by_length([len(row.prompt) + len(row.response) for row in rows], max(1, len(rows) // 2)):
            logp, ids = self.logits([rows[place] for place in part])
            weight = torch.zeros(ids.shape)
            for line, place in enumerate(part):
                begin = len(rows[place].prompt)
                weight[line, begin : begin + len(weights[place])] = torch.tensor(weights[place])
            entropy = F.nll_loss(logp[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            weight = weight[:, 1:]
            ((entropy * weight).sum() / total).backward()
            target, verdict = (weight > 0).float(), (weight > 1).float()
            entropy = entropy.detach()
            sums += torch.stack([(entropy * target).sum(), target.sum(), (entropy * verdict).sum(), verdict.sum()])
            self.tokens += sum(len(rows[place].prompt) + len(rows[place].response) for place in part)
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            self.weights[name].grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._publish()
        self.step += 1
        return float(sums[0] / sums[1]), float(sums[2] / sums[3].clamp_min(1))

    @torch.inference_mode()
    def write(
        self, prefixes: Sequence[Sequence[int]], longest: int, done: Callable[[list[int]], bool], size: int = 16
    ) -> list[list[int]]:
        """Greedy continuations of token ids, ``size`` at a time; each ends where ``done`` says so of it."""
        found: list[list[int]] = [[] for _ in prefixes]
        for part in by_length([len(prefix) for prefix in prefixes], size):
            width = max(len(prefixes[place]) for place in part)
            ids = torch.zeros(len(part), width, dtype=torch.int64)
            mask = torch.zeros(len(part), width, dtype=torch.int64)
            for line, place in enumerate(part):
                prefix = [self.places.get(token, 0) for token in prefixes[place]]
                # padded at the left, so that all continue at the same column
                ids[line, width - len(prefix) :], mask[line, width - len(prefix) :] = torch.tensor(prefix), 1
            at, cache, still = (mask.cumsum(-1) - 1).clamp_min(0), None, set(part)
            for _ in range(longest):
                out = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache, ids, at = out.past_key_values, out.logits[:, -1:].argmax(-1), at[:, -1:] + 1
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                for line, place in enumerate(part):
                    if place in still:
                        found[place].append(self.used[int(ids[line, 0])])
                        if done(found[place]):
                            still.discard(place)
                if not still:
                    break
        return found


@torch.inference_mode()
def held_out(
    learner: Learner, reader: Reader, sizes: Sequence[int], each: int
) -> tuple[list[Told], dict[str, list[float]]]:
    """Verifications of ``each`` validation problem of a size, and by kind of token: nats, mistakes, tokens."""
    rows = []
    rng = random.Random(1)
    for size in sizes:
        task = WordProblems(16000, sizes=(size,), brief=True)
        for problem in task.problems("validation")[:each]:
            given = verification(task, problem, rng)
            row = to_row(given, reader, LONGEST)
            assert row is not None
            rows.append((row, given.response, size, problem.data["template"]))
    told: list[Told] = []
    losses: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for part in by_length([len(row.prompt) + len(row.response) for row, *_ in rows], ROWS):
        logp, ids = learner.logits([rows[place][0] for place in part])
        best = logp.argmax(-1)
        for line, place in enumerate(part):
            row, text, size, template = rows[place]
            by_character, character = kinds(text), 0
            good = {"steps": True, "verdict": True}
            for offset, (piece, trained) in enumerate(zip(reader.pieces(row.response), row.trained)):
                # the last character: a piece may begin with a space
                kind, character = by_character[character + len(piece) - 1], character + len(piece)
                if not trained:
                    continue
                at = len(row.prompt) + offset
                wrong = bool(best[line, at - 1] != ids[line, at])
                losses[kind][0] -= float(logp[line, at - 1, ids[line, at]])
                losses[kind][1] += wrong
                losses[kind][2] += 1
                good["verdict" if kind == "verdict" else "steps"] &= not wrong
            told.append(Told("incorrect." not in text, size, template, **good))
    return told, dict(losses)


def decoded(learner: Learner, reader: Reader, sizes: Sequence[int], each: int) -> dict[str, list[bool]]:
    """What greedy decoding writes for ``each`` validation problem of a size: whether first attempts are right, and
    whether right and wrong attempts that are given to it are recognised as such.
    """
    rng = random.Random(2)
    found: dict[str, list[bool]] = {"first attempts right": [], "right recognised": [], "wrong recognised": []}
    for size in sizes:
        task = WordProblems(16000, sizes=(size,), brief=True)
        problems = task.problems("validation")[:each]
        attempts = learner.write([reader.prompt(p.question) for p in problems], 60, lambda ids: ids[-1] == reader.end)
        for problem, ids in zip(problems, attempts):
            found["first attempts right"].append(task.check(problem, boxed(reader.text(ids))))
        given = [verification(task, problem, rng) for problem in problems]
        rows = [to_row(row, reader, LONGEST) for row in given]
        prefixes = [[*row.prompt, *row.response[: row.trained.index(True)]] for row in rows if row is not None]
        assert len(prefixes) == len(given)
        for row, ids in zip(given, learner.write(prefixes, 130, lambda ids: verdict_of(reader.text(ids)) is not None)):
            truth = "incorrect." not in row.response
            found["right recognised" if truth else "wrong recognised"].append(verdict_of(reader.text(ids)) is truth)
    return found


def share(flags: Iterable[bool]) -> str:
    """In percent, of how many."""
    found = list(flags)
    return f"{100 * sum(found) / len(found):5.1f} % of {len(found):3d}" if found else "  –"


def with_error(flags: Sequence[bool]) -> str:
    """In percent with the standard error of a share (Agresti and Coull: two of each kind are added)."""
    count, rate = len(flags) + 4, (sum(flags) + 2) / (len(flags) + 4)
    error = math.sqrt(rate * (1 - rate) / count)
    return f"{100 * sum(flags) / max(1, len(flags)):.1f} ± {100 * error:.1f} % of {len(flags)}"


def report(learner: Learner, told: Sequence[Told], losses: dict[str, list[float]]) -> None:
    """Print recalls by size and story, and what goes wrong by kind of token."""
    print(f"after {learner.step} updates, {learner.tokens / 1e3:.0f} k tokens:")
    groups = {
        "all": list(told),
        **{f"size {size}": [t for t in told if t.size == size] for size in sorted({t.size for t in told})},
        **{t.name: [found for found in told if found.template == t.name] for t in TEMPLATES},
    }
    for name, found in groups.items():
        right, wrong = (share(t.verdict for t in found if t.right is truth) for truth in (True, False))
        print(
            f"  {name:8} steps {share(t.steps for t in found)}, verdicts given the steps: of right attempts {right}, "
            f"of wrong ones {wrong}; both {share(t.steps and t.verdict for t in found)}"
        )
    for kind, (nats, mistakes, count) in sorted(losses.items(), key=lambda item: -item[1][1]):
        print(f"  {kind:8} {nats / count:.4f} nats a token, {100 * mistakes / count:.2f} % wrong of {count:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--minutes", type=float, help="train for so long instead of so many updates")
    parser.add_argument("--rows", type=int, default=ROWS, help="of an update")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    parser.add_argument("--plain", type=int, default=0, help="of these updates, first ones without verdicts")
    parser.add_argument("--read-back", type=float, help="share of verifications; the recipe's by default")
    parser.add_argument("--lr", type=float, help="peak rate; the recipe's by default")
    parser.add_argument("--every", type=int, default=50, help="updates between two reports")
    parser.add_argument("--learn", type=int, nargs="+", help="sizes of the numbers that it learns from; the recipe's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--each", type=int, default=100, help="held-out attempts of each size")
    parser.add_argument("--decode", type=int, default=0, help="attempts of each size that are verified greedily")
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoTokenizer

    warm: Any = load_recipe("s2r_smollm2", ["model.path=unused"]).recipe.stages["warm"]
    config = warm.task.model_copy(update={"sizes": tuple(args.learn)}) if args.learn else warm.task
    task = config.build()
    reader = Reader(AutoTokenizer.from_pretrained(args.model), task)
    read_back = warm.read_back if args.read_back is None else args.read_back
    lr = args.lr or warm.lr
    some = [row for number in range(200) for row in written(reader, task, read_back, -1 - number, False)]
    learner = Learner(args.model, some, reader.end, lr, getattr(torch, args.dtype))
    learner.restore(args.checkpoint)
    began = saved = time.monotonic()
    done = 0.0
    while done < 1:
        rate = min(1.0, (learner.step + 1) / warm.warmup, (1 - done) / DECAY)
        rows = written(reader, task, read_back, learner.step, learner.step < args.plain, args.rows, args.seed)
        nats, verdict = learner.learn(rows, rate * lr, warm.verdict_weight)
        spent = (time.monotonic() - began) / 60
        done = spent / args.minutes if args.minutes else learner.step / args.updates
        if learner.step % 5 == 0:
            print(
                f"{learner.step}: cross-entropy {nats:.4f}, of verdicts {verdict:.4f}; {learner.tokens} tokens, "
                f"{spent:.1f} minutes, {time.process_time():.0f} s of a core",
                flush=True,
            )
        if learner.step % args.every == 0 or done >= 1:
            report(learner, *held_out(learner, reader, args.sizes, args.each))
            if args.decode:
                for name, flags in decoded(learner, reader, args.sizes, args.decode).items():
                    print(f"  decoded: {name} {with_error(flags)}", flush=True)
        if time.monotonic() - saved > 300 or done >= 1:
            learner.save(args.checkpoint)
            saved = time.monotonic()


if __name__ == "__main__":
    main()
