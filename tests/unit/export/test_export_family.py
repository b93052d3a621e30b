"""What all members of a family have in common is stored once, and a packed tensor is never torn apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.export import family as export
from llmcompress.export import family_edit
from llmcompress.quant.spec import QuantSpec

EMBEDDING = "model.embed_tokens"
SPECS = {f"{EMBEDDING}.weight": QuantSpec(8, -1, symmetric=True)}


def common(monkeypatch: pytest.MonkeyPatch, *members: dict[str, torch.Tensor]) -> set[str]:
    monkeypatch.setattr(export, "member_tensors", lambda handle, specs: dict(handle))
    state: Any = SimpleNamespace(family=SimpleNamespace(members=dict(enumerate(members))))
    return set(export._common(state, SPECS))


def member(code: int, scale: float, norm: float) -> dict[str, torch.Tensor]:
    return {
        f"{EMBEDDING}.weight_packed": torch.full((2, 2), code, dtype=torch.int32),
        f"{EMBEDDING}.weight_scale": torch.full((2, 1), scale, dtype=torch.float16),
        "model.norm.weight": torch.full((2,), norm),
    }


def test_equal_tensors_are_common(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {f"{EMBEDDING}.weight_packed", f"{EMBEDDING}.weight_scale"}
    assert common(monkeypatch, member(1, 1, 1), member(1, 1, 1)) == {*packed, "model.norm.weight"}
    assert common(monkeypatch, member(1, 1, 1), member(1, 1, 2)) == packed


def test_scales_stay_with_codes_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    # the largest entry of each row may be the same although the rows are not
    assert common(monkeypatch, member(1, 1, 1), member(2, 1, 1)) == {"model.norm.weight"}
    assert common(monkeypatch, member(1, 1, 1), member(1, 1, 1), member(1, 2, 1)) == {"model.norm.weight"}


@pytest.mark.parametrize("changed", [member(2, 1, 1), member(1, 2, 1)], ids=["codes", "scales"])
def test_a_new_member_keeps_codes_and_scales_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, torch.Tensor]
) -> None:
    """Codes from the common file would be read with its scales, whatever the member's own are."""
    export.save_tensors(member(1, 1, 1), tmp_path / family_edit.SHARED)
    monkeypatch.setattr(family_edit, "member_tensors", lambda handle, specs: dict(handle))
    artifact: Any = SimpleNamespace(folder=tmp_path, outside=SPECS)
    handle: Any = changed
    assert family_edit._already_shared(artifact, handle) == {"model.norm.weight"}
    handle = member(1, 1, 1)
    assert family_edit._already_shared(artifact, handle) == set(handle)
