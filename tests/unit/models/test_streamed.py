from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.evaluation.perplexity import Text, perplexity
from llmcompress.evaluation.streamed import streamed_perplexity
from llmcompress.models.assemble import compressed_model
from llmcompress.models.memory_limits import Limits
from llmcompress.models.streamed import StreamedModel
from llmcompress.stages.blockwise.engine import run_blockwise
from llmcompress.stages.rtn import RtnConfig


def text(tokens: int = 75) -> Text:
    return Text(torch.randint(3, 64, (tokens,), generator=torch.Generator().manual_seed(3)), None, 4 * tokens)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "bamba"])
def test_a_streamed_model_has_the_perplexity_of_the_whole_one(family: str, tiny: Any, tmp_path: Path) -> None:
    handle = tiny.state(tmp_path / "model", family).model

    def stream(parts: Any) -> StreamedModel:
        return StreamedModel(handle, None, parts, torch.float32)

    whole = perplexity(handle.dense_model(torch.float32), text(), 16, keep_tail=True)
    streamed = streamed_perplexity(stream, text(), 16, keep_tail=True)
    assert streamed.windows == whole.windows == 5
    assert streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert streamed.window_nll == pytest.approx(whole.window_nll, rel=1e-4)


def test_packed_blocks_are_used_and_files_change_nothing(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    rules = {"all": {"match": "proj", "bits": 2, "group_size": 16}}
    config = RtnConfig.model_validate({"rules": rules, "diagnose_experts": False})
    run_blockwise(config, state, tiny.context(tmp_path))
    whole = perplexity(compressed_model(state.model, state.packed, {}, torch.float32), text(), 16)
    dense = perplexity(state.model.dense_model(torch.float32), text(), 16)
    found = []
    for limits in (Limits(), Limits(activations=0)):

        def stream(parts: Any, limits: Limits = limits) -> StreamedModel:
            return StreamedModel(
                state.model, state.packed, parts, torch.float32, limits=limits, folder=tmp_path / "spill"
            )

        found.append(streamed_perplexity(stream, text(), 16))
    assert found[0].nll == found[1].nll
    assert found[0].perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    assert abs(found[0].perplexity / dense.perplexity - 1) > 1e-3
    assert (tmp_path / "spill").is_dir()
