#!/usr/bin/env python3
"""Train the reasoner that the repository ships (recipes/assets/reference_reasoner).

A Llama of under a million parameters, trained from scratch on solutions of Countdown problems and on reading an
expression back step by step and comparing its value with a number, which is what a verification will consist of.
Without the comparison no verdict better than chance was ever learned. It sees no verification in words and no second
attempt: those are for S2R to teach. Its problems are the ``pretrain`` split, which no S2R stage uses.

    python scripts/train_reasoner.py --out runs/reasoner

The batch of a step depends on the seed and the step alone; a killed run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training.allocator import keep_arenas

from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY
from llmcompress.data.problems.base import BOX, boxed
from llmcompress.data.problems.countdown import Countdown
from llmcompress.data.problems.expressions import parse, steps

TASK = Countdown(high=15, limit=60, compact=True)
SPECIAL = ("<unk>", "<pad>", "</s>")
# one token each, so that actions are cut at ids
WHOLE = (CHECK, RETRY, CORRECT, INCORRECT, BOX)
NUMBERS = tuple(f"{n:02d}" for n in range(100))


def build_tokenizer(pieces=NUMBERS, pattern=r"\d{2}", whole=WHOLE):
    """One token for every printable character, each of ``pieces``, which ``pattern`` cuts out, and each marker."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIAL, "\n", *(chr(c) for c in range(32, 127)), *pieces]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        clean_up_tokenization_spaces=False
    )  # fmt: skip


def build_model(vocabulary: int, width: int, layers: int, seed: int):
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * width, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def solved(rng: random.Random, problems: list) -> tuple[str, str]:
    """A problem and a right expression."""
    problem = rng.choice(problems)
    return f"{problem.question}\n", TASK.solution(problem, rng)


def evaluated(rng: random.Random, problems: list) -> tuple[str, str]:
    """An expression and a number; the steps of its evaluation, and how its value compares with the number."""
    text = TASK.random_expression(rng)
    done = list(steps(parse(text)))
    value = int(str(done[-1]).rsplit("=", 1)[1])
    other = value if rng.random() < 0.5 else rng.randint(0, 99)
    sign = "=" if value == other else "<" if value < other else ">"
    return f"{text};{other}\n", f"{','.join(map(str, done))};{other}{sign}"


def read_back(rng: random.Random, problems: list) -> tuple[str, str]:
    """A problem with an expression of its numbers, right or not; its steps and the target follow, no judgement."""
    problem = rng.choice(problems)
    if rng.random() < 0.3:
        text = boxed(TASK.solution(problem, rng))
    else:
        reached = TASK.table[tuple(problem.data["numbers"])]
        text = rng.choice(reached[rng.choice(list(reached))])
    return f"{problem.question}\n{text}\n", TASK.check_steps(problem, text)


MIX = {solved: 0.45, evaluated: 0.3, read_back: 0.25}


def batch(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels ``[pairs, longest]`` int64 of prompts and answers; -100 on prompts and padding."""
    prompts = tokenizer([a for a, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([b for _, b in pairs], add_special_tokens=False)["input_ids"]
    length = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers))
    ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), length), -100)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        whole = [*p, *a, tokenizer.eos_token_id]
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(p) : len(whole)] = torch.tensor(whole[len(p) :])
    return ids, labels


def batches(tokenizer, problems: list, rows: int, seed: int, step: int):
    """A :func:`batch` of each kind of text in one step."""
    rng = random.Random(f"{seed}:{step}")
    for kind, share in MIX.items():
        yield batch(tokenizer, [kind(rng, problems) for _ in range(round(rows * share))])


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def build_optimizers(model, lr: float):
    """Muon for the matrices inside the blocks, AdamW for embedding and norms; name → (optimizer, peak rate)."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(inner, lr=4 * lr, weight_decay=0.01, adjust_lr_fn="original")
    adam = torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return {"muon": (muon, 4 * lr), "adam": (adam, lr)}


def learn(model, optimizers, parts, step: int, left: float) -> list[float]:
    """One step on several batches, its rate after a warm-up and with this share ``left``; mean loss of each batch."""
    for optimizer, peak in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.5 - 0.5 * math.cos(math.pi * left))
    counts = [int((labels != -100).sum()) for _, labels in parts]
    losses = []
    for (ids, labels), count in zip(parts, counts):
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (loss / sum(counts)).backward()
        losses.append(loss.item() / count)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, _ in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def restore(optimizers, model, saved: dict, step: int) -> None:
    """Put the moments of a checkpoint back."""
    for name, p in model.named_parameters():
        own = {key: saved[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in saved}
        kind = "muon" if "momentum_buffer" in own else "adam"
        optimizers[kind][0].state[p] = own if kind == "muon" else {"step": torch.tensor(float(step)), **own}


@torch.inference_mode()
def accuracy(model, tokenizer, problems: list, count: int = 300) -> float:
    """Share of validation problems solved by one greedy attempt."""
    model.eval()
    rng, right = random.Random(0), 0
    chosen = rng.sample(problems, min(count, len(problems)))
    tokenizer.padding_side = "left"
    inputs = tokenizer([f"{p.question}\n" for p in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for problem, row in zip(chosen, out[:, inputs["input_ids"].shape[1] :]):
        right += TASK.check(problem, boxed(tokenizer.decode(row, skip_special_tokens=True)))
    model.train()
    return right / len(chosen)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.width, args.layers, args.seed).train()
    optimizers = build_optimizers(model, args.lr)
    weights, progress = args.out / "checkpoint.safetensors", args.out / "checkpoint.json"
    start, curve = 0, []
    if progress.exists():
        state = json.loads(progress.read_text())
        start, curve = state["step"], state["curve"]
        saved = load_file(weights)
        model.load_state_dict({k[2:]: v for k, v in saved.items() if k.startswith("m.")}, strict=False)
        model.tie_weights()
        restore(optimizers, model, saved, start)
    pretrain, validation = TASK.problems("pretrain"), TASK.problems("validation")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pretrain)} problems, step {start}", flush=True
    )
    began = time.process_time()
    for step in range(start, args.steps):
        parts = list(batches(tokenizer, pretrain, args.rows, args.seed, step))
        losses = learn(model, optimizers, parts, step, (args.steps - step) / args.steps)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            right = accuracy(model, tokenizer, validation)
            named = {kind.__name__: round(loss, 4) for kind, loss in zip(MIX, losses)}
            curve.append({"step": step + 1, **named, "accuracy": round(right, 4)})
            print(f"{curve[-1]}  {time.process_time() - began:.0f} CPU s", flush=True)
            tensors = {f"m.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
            for name, p in model.named_parameters():
                for optimizer, _ in optimizers.values():
                    moments = {k: v for k, v in optimizer.state.get(p, {}).items() if k in MOMENTS}
                    tensors |= {f"{key}.{name}": value for key, value in moments.items()}
            save_file({k: v.contiguous() for k, v in tensors.items()}, weights.with_suffix(".part"))
            weights.with_suffix(".part").replace(weights)
            progress.write_text(json.dumps({"step": step + 1, "curve": curve}))
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    (args.out / "model" / "training_curve.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    keep_arenas()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
