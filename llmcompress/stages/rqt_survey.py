"""First pass over a family: inner products between its members, matrix by matrix, weighed by what the inputs look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.quant.store import write_durably

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.family import ModelFamily
    from llmcompress.models.layout import Block, LinearGroup
    from llmcompress.models.walker import Walker
    from llmcompress.stages.rqt import RqtConfig
    from llmcompress.stages.state import RunContext


@dataclass(frozen=True, slots=True)
class MatrixFacts:
    """What the survey knows of one weight; lists are M × M in the order of the family's members.

    Attributes:
        gram: Inner products of differences to the mean, weighed by the shared second moment.
        energy: Mean energy of the members' weights, weighed likewise.
        member_energy: The same for each member.
        plain: Inner products of differences to the mean, not weighed.
        plain_energy: Mean squared norm.
        deltas: Inner products of differences to the base, weighed.
        equal: Whether all members hold the same values.
        low_rank: Rank of each difference where it is that of an adapter, else 0.
    """

    gram: list[list[float]]
    energy: float
    member_energy: list[float]
    plain: list[list[float]]
    plain_energy: float
    deltas: list[list[float]]
    equal: bool
    low_rank: list[int]


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts of every weight.

    Attributes:
        members: Order of the matrices' rows and columns.
        matrices: Weight → facts.
    """

    members: tuple[str, ...]
    matrices: dict[str, MatrixFacts]


class MomentCollector:
    """Visitor that keeps the second moments of every group and changes nothing."""

    affinity = False

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}

    def wants(self, names: Sequence[str]) -> bool:
        """Always."""
        return True

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Keep the group's Hessian under the name of its first linear."""
        assert gram is not None
        self.moments[group.linears[0].name] = gram.hessian()[0]

    def router(self, bank: Any, router: Any, x: Any) -> None:
        """Dense families have none."""

    def routed(self, bank: Any, counts: Any) -> None:
        """Dense families have none."""

    def experts(self, bank: Any, name: str, experts: slice, gram: Any, shared: Any) -> None:
        """Dense families have none."""


class MemberStream:
    """One member's activations: hidden states on the CPU, and a skeleton whose blocks come and go.

    Args:
        family: The family.
        name: Which member.
        tokens: ``[S, L]``.
        ctx: The run.
    """

    def __init__(self, family: ModelFamily, name: str, tokens: Tensor, ctx: RunContext) -> None:
        import torch

        from llmcompress.models.walker import Walker

        self.handle, self.device = family.members[name], ctx.device
        self.model = self.handle.skeleton(getattr(torch, ctx.dtype))
        self.walker: Walker = Walker(self.model, tokens, ctx.device, ctx.seed)
        self.hidden = self.walker.embed([block.name for block in self.handle.layout.blocks])
        # embedding and head of every member together could be as large as a model
        for view in self.handle.layout.outside:
            owner, _, key = view.name.rpartition(".")
            module = self.model.get_submodule(owner)
            meta = torch.empty_like(getattr(module, key), device="meta")
            module.register_parameter(key, torch.nn.Parameter(meta, requires_grad=False))

    def load(self, block: Block) -> None:
        """Materialise a block."""
        self.handle.load_block(self.model, block.index).to(self.device)

    def free(self, block: Block) -> None:
        """Give its memory back."""
        self.handle.free_block(self.model, block.index)

    def moments(self, block: Block, advance: bool = True) -> dict[str, Tensor]:
        """Run a block in full precision; return each group's Hessian by its first linear."""
        collector = MomentCollector()
        self.load(block)
        self.walker.forward(block, self.hidden, collector, advance)
        self.free(block)
        return collector.moments


def survey_family(
    config: RqtConfig, family: ModelFamily, calibration: dict[str, CalibrationSet], ctx: RunContext
) -> Survey:
    """Survey blocks that are not surveyed yet; one block of one member in memory, beside one matrix of all."""
    folder = ctx.stage_dir / "survey"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = family.layout.blocks
    pending = [block for block in blocks if not (folder / f"{block.index:05d}.json").exists()]
    if pending and not (ctx.stage_dir / "plan.json").exists():
        _walk(config, family, calibration, ctx, pending[0].index)
    matrices: dict[str, MatrixFacts] = {}
    for block in blocks:
        path = folder / f"{block.index:05d}.json"
        if path.exists():
            matrices |= {name: MatrixFacts(**facts) for name, facts in json.loads(path.read_text()).items()}
    return Survey(tuple(family.members), matrices)


def _walk(
    config: RqtConfig, family: ModelFamily, calibration: dict[str, CalibrationSet], ctx: RunContext, first: int
) -> None:
    weighed = config.tree.similarity == "hessian"
    streams = {n: MemberStream(family, n, calibration[n].tokens, ctx) for n in family.members} if weighed else {}
    for block in family.layout.blocks:
        shared: dict[str, Tensor] = {}
        for stream in streams.values():
            for name, moment in stream.moments(block, block.index + 1 < len(family.layout.blocks)).items():
                shared[name] = shared[name] + moment if name in shared else moment
        if block.index < first:
            continue
        facts: dict[str, Any] = {}
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                moment = shared.get(group.linears[0].name)
                mean = None if moment is None else moment / len(streams)
                for linear in group.linears:
                    facts[linear.name] = matrix_facts(family, linear.name, mean)
        path = ctx.stage_dir / "survey" / f"{block.index:05d}.json"
        write_durably(path, json.dumps(facts, sort_keys=True).encode())
        ctx.emit("note", text=f"surveyed {block.name}")


def matrix_facts(family: ModelFamily, linear: str, moment: Tensor | None) -> dict[str, Any]:
    """Facts of one weight, as plain data."""
    import torch

    from llmcompress.algorithms.residual_tree import inner
    from llmcompress.algorithms.tree_topology import centred_gram

    weights = torch.stack(list(family.weights(linear).values()))
    base = family.base.checkpoint.tensor(f"{linear}.weight").to(torch.float32)
    if moment is not None:
        moment = moment.to(weights.device)
    gram, energy = centred_gram(weights, moment)
    plain, plain_energy = (gram, energy) if moment is None else centred_gram(weights, None)
    apart = weights - base
    through = apart if moment is None else apart @ moment
    deltas = torch.einsum("ink,jnk->ij", apart.double(), through.double())
    return {
        "gram": gram.tolist(),
        "energy": energy,
        "member_energy": [inner(w, w, moment) for w in weights],
        "plain": plain.tolist(),
        "plain_energy": plain_energy,
        "deltas": ((deltas + deltas.T) / 2).tolist(),
        "equal": bool((weights == weights[0]).all()),
        "low_rank": [_adapter_rank(each) for each in apart],
    }


def _adapter_rank(delta: Tensor) -> int:
    """Numerical rank of a difference where it is below an eighth of the smaller side, else 0.

    A random projection to a few columns decides, so that no decomposition of a whole matrix is needed.
    """
    import torch

    limit = min(delta.shape) // 8
    if limit < 1 or not bool(delta.any()):
        return 0
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(delta.shape[1], limit + 8, generator=generator).to(delta)
    values = torch.linalg.svdvals(delta @ probe)
    rank = int((values > values[0] * 1e-3).sum())
    return rank if rank <= limit else 0
