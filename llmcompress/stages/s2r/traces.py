"""Stage ``s2r_traces``: calibration data out of a model's own solved and corrected problems, for any quantizer after
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmcompress.stages.base import Estimate, PlanInputs, StageConfig
from llmcompress.stages.calibrate import TOKENS, CalibrationStage
from llmcompress.stages.s2r.config import S2RConfig, SamplingConfig

if TYPE_CHECKING:
    from llmcompress.stages.state import RunContext, RunState


class S2RTracesConfig(S2RConfig):
    """Recipe section of the stage."""

    type: Literal["s2r_traces"]

    problems: Annotated[int, Field(ge=1)] | None = None
    """Training problems to sample, chosen by the run's seed; null for all."""

    responses: Annotated[int, Field(ge=1)] = 1
    """Responses for each problem."""

    sampling: SamplingConfig = SamplingConfig()
    """How they are sampled."""

    keep: Literal["right", "ended", "all"] = "right"
    """Which responses become calibration text."""

    samples: Annotated[int, Field(ge=1)] = 128
    """Windows of the calibration set."""

    length: Annotated[int, Field(ge=8)] = 256
    """Tokens of a window; texts are joined and cut."""


class S2RTraces(CalibrationStage):
    """Samples, filters, packs."""

    Config: ClassVar[type[StageConfig]] = S2RTracesConfig
    distributed = True
    config: S2RTracesConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """The windows on disk; sampling needs what measuring needs."""
        return Estimate(disk=self.config.samples * self.config.length * 8)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Sample from the model as the stages before left it; all processes of the run share the work.

        Raises:
            InputError: The kept responses do not fill the windows.
        """
        import random
        from functools import partial

        import torch

        from llmcompress.data.calibration import CalibrationSet
        from llmcompress.errors import InputError
        from llmcompress.evaluation.sampling import sample
        from llmcompress.evaluation.self_correction import choose, verdicts
        from llmcompress.stages.s2r import config as shared
        from llmcompress.stages.s2r.sampling import sample_all

        config = self.config
        reader = shared.reader_of(config, state, config.task.build())
        problems = choose(reader.problems.problems("train"), config.problems, ctx.seed)
        model = shared.open_model(state, ctx)
        found = sample_all(partial(sample, model), reader, problems, config.responses, config.sampling.settings(), ctx)
        flat = [(problem, ids) for problem, responses in zip(problems, found) for ids in responses]
        known = verdicts(ctx.world, reader, [problem for problem, _ in flat], [ids for _, ids in flat])
        texts = []
        for (problem, ids), right in zip(flat, known):
            episode = reader.judge(problem, ids, right)
            if config.keep == "all" or (episode.final if config.keep == "right" else episode.ended):
                texts.append([*reader.prompt(problem.question), *ids])
        random.Random(f"{ctx.seed}:traces").shuffle(texts)
        stream = [token for text in texts for token in text][: config.samples * config.length]
        if len(stream) < config.samples * config.length:
            raise InputError(
                f"stages.{self.name}: {len(texts)} responses make {len(stream)} tokens, but {config.samples} windows "
                f"of {config.length} need {config.samples * config.length}",
                "sample more problems or responses, or ask for fewer windows",
            )
        windows = torch.tensor(stream, dtype=torch.int64).view(config.samples, config.length)
        facts = {"source": "self-correction traces", "responses": len(texts), "kept": config.keep, "seed": ctx.seed}
        calibration = CalibrationSet.of(windows, facts)
        if ctx.world.rank == 0:
            calibration.save(ctx.stage_dir / TOKENS)
        state.calibration = calibration
