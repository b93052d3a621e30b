"""What the recipe section of a family says about itself."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmcompress.stages.rqt.stage import RqtConfig

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


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ({"min_leaf_bits": 0, "budget": 0.5}, r"must exceed 0\.5625, which the root alone takes"),
        ({"min_leaf_bits": 1, "budget": 1.125}, r"must exceed 1\.125, which the leaves alone take"),
        ({"min_leaf_bits": 0, "widths": [0]}, "nothing of 1 bits or more"),
        ({"mode": "preset", "preset": "0-4-0"}, "give the root or the leaves a width"),
    ],
)
def test_bits_that_would_leave_a_member_without_a_node(bits: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RqtConfig.model_validate({**WITHOUT_TEXT, "bits": bits})


def test_a_budget_may_merge_members_away() -> None:
    bits = {"min_leaf_bits": 0, "budget": 0.57}
    assert RqtConfig.model_validate({**WITHOUT_TEXT, "bits": bits}).least_budget == pytest.approx((1 + 16 / 128) / 2)
