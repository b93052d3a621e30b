"""``moe_group_gemm`` beside a dense twin given by the caller (transformers' experts, in the acceptance script)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import ops
from llmcompress_kernels.bench.timing import bandwidth_probes, interleave, read_bandwidth
from llmcompress_kernels.check import interleaved, random_stack
from llmcompress_kernels.ops import Stack

# hidden, intermediate, experts, slots per token: the shapes of Qwen1.5-MoE-A2.7B
HIDDEN, INTERMEDIATE, EXPERTS, SLOTS = 2048, 1408, 60, 4
# calls before a routing comes again
ROUTINGS = 64
DENSE = "dense bf16"


def skewed_routing(tokens: int, experts: int, slots: int, generator: torch.Generator) -> Tensor:
    """Expert of every slot ``[tokens, slots]``: expert i is 1/(i+1) as likely as the first, without repetition."""
    likely = 1.0 / torch.arange(1, experts + 1).float()
    return torch.multinomial(likely.expand(tokens, experts), slots, generator=generator)


def random_bank(experts: int, hidden: int, intermediate: int, bits: int, group: int, seed: int) -> tuple[Stack, Stack]:
    """Gate-up and down projections of random codes, interleaved."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    sides = [
        random_stack(shape, bits, group, False, generator, shape[-1] ** -0.5 / (1 << bits) * 3) for shape in shapes
    ]
    return interleaved(sides[0]), interleaved(sides[1])


def stack_bytes(side: Stack) -> int:
    """Bytes of one side."""
    return sum(t.nbytes for t in (side.weight, side.scale, side.zero) if t is not None)


def bench_moe(
    dense: Callable[[Tensor, Tensor, Tensor], Any],
    tokens: Sequence[int] = (1, 8, 128),
    bits: Sequence[int] = (4, 3, 2),
    group: int = 64,
    threads: int = 2,
    rounds: int = 15,
    budget: float = 15.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time one MoE block with skewed routing, bf16 activations, another routing in every call.

    Args:
        dense: The bf16 twin: called with hidden states ``[T, H]``, experts and weights ``[T, k]``.
        tokens: Numbers of tokens.
        bits: Widths of ours.
        group: Columns per scale.
        threads: Threads of PyTorch.
        rounds: Clean samples wanted.
        budget: Seconds per number of tokens.
        seed: Seed of weights and routing.

    Returns:
        One dict per candidate: milliseconds, share of the probed bandwidth by the mean bytes of the experts touched,
        GFLOP/s, speed-up over the twin.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    banks = {width: random_bank(EXPERTS, HIDDEN, INTERMEDIATE, width, group, seed) for width in bits}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        probes = bandwidth_probes(threads)
        for count in tokens:
            x = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
            weights = torch.rand(count, SLOTS, generator=generator).to(torch.bfloat16)
            routings = [skewed_routing(count, EXPERTS, SLOTS, generator) for _ in range(ROUTINGS)]
            touched = sum(len(routing.unique()) for routing in routings) / ROUTINGS
            candidates: dict[str, Callable[[], Any]] = {DENSE: _turning(routings, _twin(dense, x, weights))}
            sizes = {DENSE: 3 * HIDDEN * INTERMEDIATE * 2 * touched}
            for width, bank in banks.items():
                for int8 in (False, True):
                    name = f"W{width} int8" if int8 else f"W{width}"
                    # each begins at a routing of its own, so that none finds the experts of the one before in the cache
                    candidates[name] = _turning(routings[len(candidates) :], _block(x, weights, bank, int8))
                    sizes[name] = sum(stack_bytes(side) for side in bank) / EXPERTS * touched
            timings = interleave({**probes, **candidates}, rounds, budget)
            bandwidth = read_bandwidth(timings)
            rows += [
                {
                    "hidden": HIDDEN,
                    "intermediate": INTERMEDIATE,
                    "experts": EXPERTS,
                    "slots": SLOTS,
                    "tokens": count,
                    "candidate": name,
                    "experts_touched": round(touched, 2),
                    "milliseconds": round(timing.median * 1e3, 4),
                    "best_milliseconds": round(timing.best * 1e3, 4),
                    "gb_per_s": round(sizes[name] / timing.median / 1e9, 2),
                    "probed_gb_per_s": round(bandwidth / 1e9, 2),
                    "share_of_bandwidth": round(sizes[name] / timing.median / bandwidth, 3),
                    "gflop_per_s": round(6 * HIDDEN * INTERMEDIATE * SLOTS * count / timing.median / 1e9, 1),
                    "times_dense": round(timings[DENSE].median / timing.median, 3),
                    "clean_samples": timing.clean,
                    "samples": timing.total,
                }
                for name, timing in timings.items()
                if name in candidates
            ]
    return rows


def bench_pruning(
    bits: int, shares: Sequence[float], tokens: int, threads: int, rounds: int = 15, budget: float = 15.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Time the same routing with more and more of its slots skipped, rarest experts first, as PESF does.

    Returns:
        One dict per share of ``shares``: the share of slots really skipped, and of the time saved.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    bank = random_bank(EXPERTS, HIDDEN, INTERMEDIATE, bits, 64, seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    weights = torch.rand(tokens, SLOTS, generator=generator).to(torch.bfloat16)
    routings = [skewed_routing(tokens, EXPERTS, SLOTS, generator) for _ in range(ROUTINGS)]
    everything = {share: [prune(routing, share) for routing in routings] for share in (0.0, *shares)}
    candidates = {str(share): _turning(pruned, _block(x, weights, bank)) for share, pruned in everything.items()}
    with torch.inference_mode():
        timings = interleave(candidates, rounds, budget)
    full = timings["0.0"].median
    rows = []
    for share in shares:
        skipped = sum(float((r == EXPERTS).float().mean()) for r in everything[share]) / ROUTINGS
        timing = timings[str(share)]
        rows.append(
            {
                "bits": bits,
                "tokens": tokens,
                "slots_skipped": round(skipped, 4),
                "milliseconds": round(timing.median * 1e3, 4),
                "unpruned_milliseconds": round(full * 1e3, 4),
                "time_saved": round(1 - timing.median / full, 4),
                "saved_per_skipped": round((1 - timing.median / full) / skipped, 3),
                "clean_samples": timing.clean,
                "samples": timing.total,
            }
        )
    return rows


def prune(routing: Tensor, share: float) -> Tensor:
    """Replace the slots of the rarest experts by the index that skips, until ``share`` of all slots is skipped."""
    counts = torch.bincount(routing.flatten(), minlength=EXPERTS)
    out, left = routing.clone(), int(share * routing.numel())
    for expert in counts.argsort().tolist():
        if left <= 0:
            break
        places = (out.flatten() == expert).nonzero().flatten()[:left]
        out.view(-1)[places] = EXPERTS
        left -= len(places)
    return out


def _twin(dense: Callable[[Tensor, Tensor, Tensor], Any], x: Tensor, weights: Tensor) -> Callable[[Tensor], Any]:
    """One call of the dense twin as a function of the routing."""
    return lambda routing: dense(x, routing, weights)


def _block(x: Tensor, weights: Tensor, bank: tuple[Stack, Stack], int8: bool = False) -> Callable[[Tensor], Tensor]:
    """One call of the operator as a function of the routing."""
    return lambda routing: ops.moe_group_gemm(x, routing, weights, bank[0], bank[1], INTERMEDIATE, int8=int8)


def _turning(items: Sequence[Tensor], call: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """Call with the next item each time."""
    turn = iter(range(1 << 62))
    return lambda: call(items[next(turn) % len(items)])
