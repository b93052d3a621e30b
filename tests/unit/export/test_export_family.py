"""What all members of a family have in common is stored once, and a packed tensor is never torn apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.errors import ExportError
from llmcompress.export import family as export
from llmcompress.export import family_edit
from llmcompress.export.family_edit import merge_members
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


def fake_family(**private: dict[str, torch.Tensor]) -> Any:
    """As much of a family as merging its tensors outside the trees takes."""
    return SimpleNamespace(
        require=lambda name: name, private=lambda name: private[name].items(), dtype=torch.float32,
        member_folder=Path, plan=SimpleNamespace(linears=()),
    )  # fmt: skip


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.5])
def test_shares_of_a_merge_are_numbers_of_0_or_more(share: float, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bee: a share of"):
        merge_members(fake_family(ant={}, bee={}), {"ant": 1.0, "bee": share}, tmp_path / "out")
    with pytest.raises(ExportError, match="nothing to merge"):
        merge_members(fake_family(ant={}), {"ant": 0.0}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["ant", "bee"])
def test_a_head_that_only_one_member_has_is_not_dropped(first: str, tmp_path: Path) -> None:
    norm, head = torch.ones(4), torch.ones(2, 4)
    family = fake_family(ant={"norm": norm}, bee={"norm": norm, "lm_head.weight": head})
    shares = {first: 1.0, **{name: 1.0 for name in ("ant", "bee") if name != first}}
    with pytest.raises(ExportError, match=r"lm_head\.weight: only one of"):
        merge_members(family, shares, tmp_path / "out")
    assert not list(tmp_path.iterdir())
