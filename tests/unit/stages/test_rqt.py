"""What the recipe section of a family says about itself."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmcompress.stages.rqt import RqtConfig

WITHOUT_TEXT = {
    "type": "rqt", "members": {"ant": "a", "bee": "b"}, "tree": {"similarity": "plain"}, "leaf_solver": "rtn",
}  # fmt: skip


def test_a_family_can_do_without_text() -> None:
    assert not RqtConfig.model_validate(WITHOUT_TEXT).needs_text


@pytest.mark.parametrize(
    "changes",
    [{"node_target": "hmean"}, {"node_target": "auto"}, {"internal_solver": "gptq"}, {"leaf_solver": "gptq"},
     {"tree": {"similarity": "hessian"}}],
)  # fmt: skip
def test_whatever_looks_at_inputs_needs_text(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="ant has no calibration text"):
        RqtConfig.model_validate({**WITHOUT_TEXT, **changes})
