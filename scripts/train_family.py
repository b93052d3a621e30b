#!/usr/bin/env python3
r"""Train the reference family that the repository ships (recipes/assets/family).

One small Llama-style base and one full fine-tune of it per domain: a novelist, plays, school
mathematics, dialogues, Spanish documentation, Python code. The base starts from the reference MoE (its
attention, norms and embedding, and the most used experts of each layer side by side as one MLP) and is
trained further on a mix of all domains, which takes far fewer tokens than from scratch. Every
weight is trained in every child. The script is resumable: a killed run continues from its last
checkpoint and sees the same batches.

    python scripts/make_family_texts.py --data shared/data --out runs/family
    python scripts/train_family.py --texts runs/family --out runs/family \
        --start recipes/assets/reference_moe

A dense start is the base itself, as it is; only the members are trained then:

    python scripts/train_family.py --texts runs/family --out runs/family_smollm2 --start SmolLM2-135M-Instruct \
        --members maths code chat spanish --child-tokens 1.5e6 --child-rows 32 --child-lr 1e-4 --child-epochs 3 \
        --every 0 --device cuda --parallel

The folder ``<out>/models`` then has ``base`` and one folder per member, and
``<out>/models/training.json`` the held-out loss of each model on each domain.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training.allocator import keep_arenas
from training.data import Batches, Source, read_texts
from training.loop import save_atomic
from training.precision import autocast

MEMBERS = ("doyle", "shakespeare", "maths", "chat", "spanish", "code")
MIX = {"books": 0.57, "spanish": 0.12, "code": 0.14, "maths": 0.1, "shakespeare": 0.04, "chat": 0.03}
LENGTH = 256
KEPT_EXPERTS = 4


def build_model(start: Path, texts: Path, tokenizer: Any) -> Any:
    """A dense model from the reference MoE: 3.1 M parameters, 2.4 M of them in the linear layers of its blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

    moe = MixtralForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    source = moe.config
    config = LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        intermediate_size=KEPT_EXPERTS * source.intermediate_size,
        max_position_embeddings=source.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=source.rms_norm_eps,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    state = {k: v for k, v in moe.state_dict().items() if ".mlp." not in k}
    shares = expert_shares(moe, texts, tokenizer)
    width = source.intermediate_size
    for layer, share in enumerate(shares):
        experts = moe.model.layers[layer].mlp.experts
        kept = share.topk(KEPT_EXPERTS).indices.tolist()
        weight = share[kept] / share[kept].sum()
        name = f"model.layers.{layer}.mlp"
        state[f"{name}.gate_proj.weight"] = torch.cat([experts.gate_up_proj[e, :width] for e in kept])
        state[f"{name}.up_proj.weight"] = torch.cat([experts.gate_up_proj[e, width:] for e in kept])
        state[f"{name}.down_proj.weight"] = torch.cat([experts.down_proj[e] * w for e, w in zip(kept, weight)], dim=1)
    model.load_state_dict({k: v.detach().clone() for k, v in state.items()})
    return model


def expert_shares(moe: Any, texts: Path, tokenizer: Any) -> list[Any]:
    """How much of the routing weight each expert of each layer gets on a sample of all domains; ``[E]`` per layer."""
    import torch

    joined = "\n\n".join(next(iter(read_texts(texts / "calibration" / f"{d}.jsonl.gz")))[:3000] for d in MEMBERS)
    ids = torch.tensor(tokenizer.encode(joined)[:4096], dtype=torch.long)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.inference_mode():
        logits = moe(rows, output_router_logits=True).router_logits
    found = []
    for each in logits:
        weights, chosen = each.float().softmax(-1).topk(moe.config.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        found.append(torch.zeros(each.shape[-1]).index_add_(0, chosen.flatten(), weights.flatten()) / len(each))
    return found


def encode(texts: Path, tokenizer: Any, names: list[str], cache: Path) -> dict[str, Path]:
    """Tokenise each domain's training text once into a flat uint16 file."""
    import numpy as np

    cache.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in names:
        files[name] = cache / f"{name}.npy"
        if not files[name].exists():
            # all at once: the tokenizer then uses every core
            rows = tokenizer(list(read_texts(texts / "train" / f"{name}.jsonl.gz")), verbose=False).input_ids
            pieces = [[*row, tokenizer.eos_token_id] for row in rows]
            np.save(files[name], np.concatenate([np.array(p, dtype=np.uint16) for p in pieces]))
    return files


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, then a linear fall to zero over the last quarter."""
    warmup, decay = max(1, steps // 8), max(1, steps // 4)
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


def heldout_rows(tokenizer: Any, texts: Path, domain: str, windows: int = 48) -> Any:
    """Windows of one domain's held-out text, ``[S, LENGTH + 1]``."""
    import torch

    joined = "\n\n".join(read_texts(texts / "heldout" / f"{domain}.jsonl.gz"))
    ids = torch.tensor(tokenizer.encode(joined), dtype=torch.long)
    count = min(windows, (len(ids) - 1) // LENGTH)
    return torch.stack([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])


def heldout_loss(model: Any, rows: Any) -> float:
    """Mean negative log likelihood (nats a token) of windows."""
    import torch
    import torch.nn.functional as F

    rows = rows.to(model.device)
    model.eval()
    with torch.inference_mode(), autocast(str(model.device)):
        logits = torch.cat([model(part[:, :-1]).logits.float() for part in rows.split(8)])
    model.train()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def fit(model: Any, batches: Batches, steps: int, peak: float, folder: Path, every: int) -> None:
    """Train ``model`` in place for ``steps`` steps, keeping a checkpoint in ``folder`` every this many (0 for none)."""
    import torch
    import torch.nn.functional as F

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, cpu = time.time(), time.process_time()
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rows = batches(step)[0].to(model.device)
        with autocast(str(model.device)):
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == steps
        if last or (step + 1) % (every or 50) == 0:
            done = (step + 1 - start) * rows.shape[0] * LENGTH
            print(
                f"{folder.name}  step {step + 1}/{steps}  loss {loss.item():.3f}  "
                f"{done / (time.time() - began):.0f} tokens/s  {done / (time.process_time() - cpu):.0f} a CPU second",
                flush=True,
            )
            if every:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_atomic(state, checkpoint)


def finish(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write one model as a transformers folder in bf16; it appears whole."""
    import torch

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def train(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    began = time.time()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.start)
    models = args.out / "models"
    if args.only is not None:
        train_member(args, args.only, tokenizer)
        return
    dense = AutoConfig.from_pretrained(args.start).model_type == "llama"
    models.mkdir(parents=True, exist_ok=True)
    if dense and not (models / "base").exists():
        finish(LlamaForCausalLM.from_pretrained(args.start), tokenizer, models / "base")
    if not (models / "base").exists():
        files = encode(args.texts, tokenizer, list(MIX), args.out / "tokens")
        torch.manual_seed(args.seed)
        model = build_model(args.start, args.texts, tokenizer)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
        sources = [Source(name, files[name], share) for name, share in MIX.items()]
        batches = Batches(files, sources, args.rows, LENGTH, args.seed)
        fit(
            model.to(args.device),
            batches,
            int(args.base_tokens) // (args.rows * LENGTH),
            args.base_lr,
            args.out / "work" / "base",
            args.every,
        )
        finish(model, tokenizer, models / "base")
    missing = [name for name in args.members if not (models / name).exists()]
    if args.parallel:
        side_by_side(missing)
    else:
        for name in missing:
            train_member(args, name, tokenizer)
    report(args, tokenizer, time.time() - began)


def side_by_side(members: list[str]) -> None:
    """Train members in processes of their own, all at once; steps of a small model leave most of a GPU idle."""
    workers = {name: subprocess.Popen([sys.executable, *sys.argv, "--only", name]) for name in members}
    failed = [name for name, worker in workers.items() if worker.wait() != 0]
    if failed:
        sys.exit(f"training failed: {', '.join(failed)}")


def train_member(args: argparse.Namespace, name: str, tokenizer: Any) -> None:
    """Train one child and write it; batches depend on its place among the members, not on who else is trained."""
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    files = encode(args.texts, tokenizer, [name], args.out / "tokens")
    text = len(np.load(files[name], mmap_mode="r"))
    tokens = args.child_tokens if args.child_epochs is None else min(args.child_tokens, args.child_epochs * text)
    model = LlamaForCausalLM.from_pretrained(args.out / "models" / "base", dtype=torch.float32).to(args.device)
    seed = args.seed + 1 + args.members.index(name)
    batches = Batches(files, [Source(name, files[name], 1.0)], args.child_rows, LENGTH, seed)
    steps = max(1, int(tokens) // (args.child_rows * LENGTH))
    fit(model, batches, steps, args.child_lr, args.out / "work" / name, args.every)
    finish(model, tokenizer, args.out / "models" / name)


def report(args: argparse.Namespace, tokenizer: Any, seconds: float) -> None:
    """Measure each model on each domain's held-out text and write ``training.json``."""
    import torch
    from transformers import LlamaForCausalLM

    rows = {domain: heldout_rows(tokenizer, args.texts, domain) for domain in args.members}
    losses: dict[str, dict[str, float]] = {}
    for name in ("base", *args.members):
        model = LlamaForCausalLM.from_pretrained(args.out / "models" / name, dtype=torch.float32).to(args.device)
        losses[name] = {d: round(heldout_loss(model, rows[d]), 4) for d in args.members}
        print(name, {d: round(math.exp(v), 2) for d, v in losses[name].items()}, flush=True)
    settings = {
        key: getattr(args, key)
        for key in (
            "seed", "members", "base_tokens", "child_tokens", "child_epochs", "base_lr", "child_lr", "rows",
            "child_rows",
        )
    }  # fmt: skip
    record = {"settings": settings, "torch": torch.__version__, "mix": MIX, "heldout_nll": losses}
    record["seconds"] = round(seconds, 1)
    if args.device != "cpu":
        record["device"] = torch.cuda.get_device_name()
    (args.out / "models" / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="the reference MoE, or a dense Llama")
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=MEMBERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base-tokens", type=float, default=1.5e6)
    parser.add_argument("--child-tokens", type=float, default=0.25e6)
    parser.add_argument("--child-epochs", type=float, help="times that a child's text is seen at most")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--child-lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--child-rows", type=int, default=8)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", action="store_true", help="train the members at once, each in its process")
    parser.add_argument("--only", choices=MEMBERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_arenas()
    train(args)


if __name__ == "__main__":
    main()
