"""OPTs of another form are refused, with what is other about them."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.errors import InputError
from llmcompress.models.registry import layout_from_config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ({"word_embed_proj_dim": 512, "hidden_size": 1024}, "word_embed_proj_dim is 512"),
    ],
)
def test_other_forms_of_opt_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        layout_from_config({"model_type": "opt", **changes})


def test_positions_have_rows_of_their_own_in_front() -> None:
    layout = layout_from_config({"model_type": "opt", "max_position_embeddings": 100})
    rows = {view.name: view.shape for view in layout.outside}["model.decoder.embed_positions.weight"]
    assert rows == (102, 768)
