"""The embeddings stage: the policy it leaves, after a run and after a restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmcompress.quant.embeddings import spec_of
from llmcompress.stages.embeddings import Embeddings, EmbeddingsConfig


def test_policy_is_plain_data_that_the_run_time_understands(tiny: Any, tmp_path: Path) -> None:
    state, restored = (tiny.state(tmp_path / "model", "mamba2") for _ in range(2))
    stage = Embeddings("embeddings", EmbeddingsConfig(bits=4, group_size=32))
    stage.run(state, tiny.context(tmp_path))
    stage.restore(restored, tiny.context(tmp_path))
    assert state.policies == restored.policies == {"embeddings": {"bits": 4, "group_size": 32}}
    spec = spec_of(state.policies["embeddings"])
    assert (spec.bits, spec.group_size, spec.symmetric) == (4, 32, True)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"group_size": -2}, {"group_size": 0}, {"rows": 1}])
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmbeddingsConfig(**fields)
