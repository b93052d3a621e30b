"""Sampling in durable chunks: a killed stage asks the model only for what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.durable import write_durably

if TYPE_CHECKING:
    from llmcompress.data.problems.base import Problem
    from llmcompress.evaluation.sampling import Sampling
    from llmcompress.evaluation.self_correction import Reader
    from llmcompress.stages.state import RunContext
    from llmcompress.training.policy import Write

# prompts in one file
CHUNK = 256


def sample_all(
    write: Write, reader: Reader, problems: Sequence[Problem], samples: int, sampling: Sampling, ctx: RunContext
) -> list[list[list[int]]]:
    """``samples`` responses to every problem, as token ids; chunks that exist are read back. All processes of the run
    sample together; the first one keeps the chunks.

    Args:
        write: What writes; :meth:`~llmcompress.training.policy.Policy.responding` of a policy, or
            :func:`~llmcompress.evaluation.sampling.sample` with a model.
        reader: Prompts.
        problems: Which problems.
        samples: For each.
        sampling: How to sample.
        ctx: The run; files go to ``samples/`` in the stage's folder.
    """
    first = ctx.world.rank == 0
    folder = ctx.stage_dir / "samples"
    if first:
        folder.mkdir(exist_ok=True)
    found: list[list[list[int]]] = []
    count = -(-len(problems) // CHUNK)
    for number in range(count):
        path = folder / f"{number:05d}.json"
        known = ctx.world.tell(json.loads(path.read_text()) if first and path.exists() else None)
        if known is None:
            part = problems[number * CHUNK : (number + 1) * CHUNK]
            once = [reader.prompt(problem.question) for problem in part]
            prompts = [prompt for prompt in once for _ in range(samples)]
            ids = write(prompts, sampling, reader.end, reader.pad, ctx.seed * 8191 + number, ctx.world)
            known = [ids[begin : begin + samples] for begin in range(0, len(ids), samples)]
            if first:
                write_durably(path, json.dumps(known, separators=(",", ":")).encode())
            ctx.emit("note", text=f"sampled {min((number + 1) * CHUNK, len(problems))} of {len(problems)} problems")
        found += known
    return found


def note_idle(rows: int, sampling: Sampling, ctx: RunContext) -> None:
    """Say so where there are fewer batches to sample than processes: a batch is written by one of them."""
    batches = -(-rows // sampling.batch)
    if batches < ctx.world.size:
        ctx.emit(
            "note",
            text=f"{rows} responses are sampled in batches of {sampling.batch}: {ctx.world.size - batches} of "
            f"{ctx.world.size} processes wait meanwhile; sampling.batch {-(-rows // ctx.world.size)} employs all, "
            "with other random numbers",
        )
