"""Which inputs of linears can be rescaled without changing what a model computes, and where the factors go. Torch-free.

An input can be divided by factors where all that reads it is a linear and all that makes it is linear in a weight: the
norm before attention, a dense MLP or a mixer; the gated norm before a Mamba-2 mixer's output projection; the up
projection of a gated MLP before its down projection.

Left alone: norms whose output a router reads too (routed experts keep float inputs anyway), norms that add one to their
weight (Gemma), outputs of attention, of Mamba-1 scans and of MLPs without a gate, and modules that several blocks run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmcompress.models.layout import Block, LinearGroup, LinearView, ModelLayout, Role, Sublayer


@dataclass(frozen=True, slots=True)
class Smoothable:
    """One set of input channels.

    Attributes:
        key: Name of the first linear that reads them.
        linears: All that read them, those that always stay dense too; their columns are multiplied.
        makers: Tensors whose first axis is these channels and which are divided: a norm's weight and bias, or the
            weight and bias of an up projection.
    """

    key: str
    linears: tuple[LinearView, ...]
    makers: tuple[str, ...]


def smoothable(layout: ModelLayout) -> Iterator[tuple[Block, Smoothable]]:
    """Everything that can be smoothed, block by block in the order of the forward pass."""
    shared = {block.loan.owner for block in layout.blocks if block.loan is not None}
    for block in layout.blocks:
        kept = {view.name for view in block.kept}
        own = [s for s in block.sublayers if not s.numbered and not any(s.module.startswith(f"{m}.") for m in shared)]
        if not layout.norm_adds_one:
            for norm in dict.fromkeys(s.pre_norm for s in own if s.pre_norm is not None):
                yield from ((block, found) for found in _after_norm(block, norm, kept))
        for sublayer in own:
            yield from ((block, found) for found in _inside(sublayer, kept))


def _after_norm(block: Block, norm: str, kept: set[str]) -> Iterator[Smoothable]:
    """The inputs that a norm makes, if linears alone read them."""
    readers = [sublayer for sublayer in block.sublayers if sublayer.pre_norm == norm]
    plain = all(s.experts is None and s.keeps is None and s.reads in ("hidden", "hidden+aside") for s in readers)
    groups = [group for s in readers for group in s.groups if group.position == "first"]
    if plain and groups and f"{norm}.weight" in kept:
        yield _of(groups, _tensors(norm, kept), tuple(linear for s in readers for linear in s.beside))


def _inside(sublayer: Sublayer, kept: set[str]) -> Iterator[Smoothable]:
    """The inputs that a module makes for its own output projection."""
    last = next((group for group in sublayer.groups if group.position == "last"), None)
    if sublayer.kind == "ssm":
        norm, scan = f"{sublayer.module}.norm", sublayer.scan
        # that of a delta rule has one weight for all heads
        if last is not None and f"{norm}.weight" in kept and scan is not None and not scan.rule:
            yield _of([last], _tensors(norm, kept))
        return
    for group in sublayer.groups:
        if group.position != "last" or group.linears[0].role not in (Role.MLP, Role.SHARED_EXPERTS):
            continue
        beside = [
            v.name for g in sublayer.groups if g.module == group.module and g.position == "first" for v in g.linears
        ]
        up = f"{group.module}.up_proj"
        # without a gate an activation stands between up and down, and it is not linear
        if up in beside and f"{group.module}.gate_proj" in beside:
            bias = f"{up}.bias"
            yield _of([group], (f"{up}.weight", *((bias,) if bias in kept else ())))


def _of(groups: list[LinearGroup], makers: tuple[str, ...], beside: tuple[LinearView, ...] = ()) -> Smoothable:
    linears = (*(linear for group in groups for linear in group.linears), *beside)
    return Smoothable(linears[0].name, linears, makers)


def _tensors(norm: str, kept: set[str]) -> tuple[str, ...]:
    return tuple(name for name in (f"{norm}.weight", f"{norm}.bias") if name in kept)
