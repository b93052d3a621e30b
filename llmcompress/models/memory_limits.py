"""How much memory the block-by-block engine may take for what it can do with less of. Torch-free.

A recipe names a budget (``host.ram``). Most of what a block needs is given: its weights, one expert's Hessian. These
three are not, and each trades memory for time without changing what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
# predictions are good to about a tenth; a budget is a promise
SHARE = 0.9
# of a mapped file: what is resident between two moments at which its pages are given up
WINDOW_BYTES = 64 * MIB
# inputs of linears that are kept for later are rounded to bf16 where they would take more than this in fp32: half the
# memory for an error of 0.2 % with random signs, where quantizing weights to 4 bits makes one of 5 to 10 %. No budget
# moves it, because results depend on it
EXACT_BYTES = 256 * MIB

# tokens from which the second moments of an expert are made that sees too few of its own; no budget moves it either
FORCED_TOKENS = 2048
# activations of one member of a family that lie on the GPU for good rather than come from the CPU batch by batch; a
# fixed figure, so that a plan knows
RESIDENT_BYTES = 512 * MIB
# tokens on which gradients are measured: hidden states before every block are held for all of them
GRADIENT_TOKENS = 4096


def total_ram() -> int:
    """Memory of the machine in bytes, or the control group's limit where that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists():
        text = limit.read_text().strip()
        if text.isdigit():
            total = min(total, int(text))
    return total


def available_ram() -> int:
    """Memory that can be had now without swapping, in bytes: of the machine, and of the control group."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(limit) - used)) if limit.isdigit() else free


def resident_bytes(tokens: int, hidden: int, widest: int, item: int) -> int:
    """Bytes on a GPU of one member's hidden states and kept inputs; 0 where they are too large and stay on the CPU.

    Args:
        tokens: Tokens of all windows.
        hidden: Width of the hidden states.
        widest: Inputs of the widest linear.
        item: Bytes of a value.
    """
    size = tokens * item * (hidden + widest)
    return size if size <= RESIDENT_BYTES else 0


def gradient_bytes(blocks: int, hidden: int, item: int, vocab: int, length: int) -> int:
    """Bytes that gradients take on their way through a model block by block, beside the block.

    Args:
        blocks: Number of them.
        hidden: Width of the hidden states.
        item: Bytes of a value.
        vocab: Size of the vocabulary.
        length: Tokens in a window.
    """
    tokens = max(length, GRADIENT_TOKENS // length * length)
    # states before each block and after the last, gradients; logits of a window, their softmax and their gradient
    return tokens * hidden * (blocks + 2) * item + 3 * 4 * length * vocab


def kept_bytes(values: int, item: int) -> int:
    """Bytes in which this many inputs of ``item`` bytes each are kept."""
    return values * item // 2 if rounds(values, item) else values * item


def rounds(values: int, item: int) -> bool:
    """Whether this many inputs of ``item`` bytes each are rounded to bf16 where they are kept."""
    return item == 4 and values * item > EXACT_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the walker, in bytes.

    Attributes:
        gram: Second moments of experts that are held at once; at least one expert's always are.
        keep: Inputs of one module's projections that are kept between statistics and product, else computed again.
        activations: Hidden states and expert inputs in memory; what comes on top lies in files. None for no limit.
    """

    gram: int = GIB
    keep: int = GIB
    activations: int | None = None

    @property
    def rounded(self) -> int:
        """Values of experts that are rounded at once where no data flows; their working set is near ``gram``."""
        return self.gram // 32

    def chunks(self, experts: int, hidden: int, intermediate: int) -> list[slice]:
        """Experts of a bank whose second moments are held, and that are solved, at once; one chunk after another."""
        one = (hidden**2 + intermediate**2) * 4
        step = min(experts, max(1, self.gram // one))
        return [slice(start, min(start + step, experts)) for start in range(0, experts, step)]


DEFAULT = Limits()


def choose(budget: int | None, need: Callable[[Limits], int], activations: int) -> Limits:
    """The loosest limits under which a stage fits its budget, or the tightest there are.

    Args:
        budget: Bytes above the empty interpreter, None for no budget.
        need: Predicts the peak under given limits.
        activations: Bytes of activations that the stage would like to hold.
    """
    if budget is None:
        return DEFAULT
    limits = DEFAULT
    for limits in _from_loose_to_tight(activations):
        if need(limits) <= SHARE * budget:
            break
    return limits


def _from_loose_to_tight(activations: int) -> Iterator[Limits]:
    """First what costs a second computation at worst, then what costs the disk."""
    sizes = [GIB >> step for step in range(7)]
    yield DEFAULT
    yield from (Limits(size, size) for size in sizes[1:])
    tightest = sizes[-1]
    for part in (2, 4, 8, 16):
        yield Limits(tightest, tightest, activations // part)
    yield Limits(tightest, tightest, 0)
