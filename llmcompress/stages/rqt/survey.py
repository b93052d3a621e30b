"""First pass over a family: inner products between its members, matrix by matrix, weighed by the inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.durable import write_durably
from llmcompress.models.member_stream import MemberStream

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.family import ModelFamily
    from llmcompress.stages.rqt.stage import RqtConfig
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
    streams = (
        {
            n: MemberStream(family.members[n], calibration[n].tokens, ctx.device, ctx.dtype, ctx.seed)
            for n in family.members
        }
        if weighed
        else {}
    )
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
                total = shared.get(group.linears[0].name)
                mean = None if total is None else total / len(streams)
                for linear in group.linears:
                    facts[linear.name] = matrix_facts(family, linear.name, mean, ctx.device)
        path = ctx.stage_dir / "survey" / f"{block.index:05d}.json"
        write_durably(path, json.dumps(facts, sort_keys=True).encode())
        ctx.emit("note", text=f"surveyed {block.name}")


def matrix_facts(family: ModelFamily, linear: str, moment: Tensor | None, device: str = "cpu") -> dict[str, Any]:
    """Facts of one weight, as plain data, computed on ``device``."""
    import torch

    from llmcompress.algorithms.tree_topology import centred_gram, inner_products

    weights = torch.stack([weight.to(device) for weight in family.weights(linear).values()])
    base = family.base.checkpoint.tensor(f"{linear}.weight").to(device, torch.float32)
    if moment is not None:
        moment = moment.to(weights.device)
    gram, energy = centred_gram(weights, moment)
    plain, plain_energy = (gram, energy) if moment is None else centred_gram(weights, None)
    apart = weights - base
    through = apart if moment is None else apart @ moment
    deltas = inner_products(apart, through)
    weighed = weights if moment is None else weights @ moment
    return {
        "gram": gram.tolist(),
        "energy": energy,
        "member_energy": (weighed.double() * weights.double()).sum((1, 2)).tolist(),
        "plain": plain.tolist(),
        "plain_energy": plain_energy,
        "deltas": ((deltas + deltas.T) / 2).tolist(),
        "equal": bool((weights == weights[0]).all()),
        "low_rank": _adapter_ranks(apart),
    }


def _adapter_ranks(deltas: Tensor) -> list[int]:
    """Numerical rank of each of the differences ``[M, N, K]`` where it is below an eighth of the smaller side, else 0.

    A random projection to a few columns decides, so that no decomposition of a whole matrix is needed. Singular values
    come from its products with itself: in fp64 their squares are exact to far below the threshold.
    """
    import torch

    limit = min(deltas.shape[1:]) // 8
    if limit < 1:
        return [0] * len(deltas)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(deltas.shape[2], limit + 8, generator=generator).to(deltas)
    thin = (deltas @ probe).double()
    squares = torch.linalg.eigvalsh((thin.transpose(1, 2) @ thin).cpu())
    largest = squares[:, -1:]
    ranks = ((squares > largest * 1e-6) & (largest > 0)).sum(1).tolist()
    return [rank if rank <= limit else 0 for rank in ranks]
