"""EAC-MoE test 7: an expert without tokens is rounded to nearest, never zeroed, never NaN."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.quant.codecs.int_group import decode, dequantize
from llmcompress.stages.qesc import Qesc, QescConfig

RULES = {
    "attention": {"role": "attention", "bits": 4, "group_size": 16},
    "experts": {"role": "experts", "bits": 2, "group_size": 16},
}
UNSEEN = 5


@pytest.mark.parametrize("targets", ["own", "full_precision"])
def test_unseen_expert_is_rounded_to_nearest(tiny, tmp_path, targets):
    """The router of layer 0 is made to avoid one expert whatever the token."""
    model = tiny.model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[UNSEEN] = -1e4
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    state = tiny.state(tmp_path / "model", "gpt_oss", samples=8)
    events = []
    config = QescConfig.model_validate({"rules": RULES, "targets": targets})
    Qesc("quantize", config).run(state, tiny.context(tmp_path, events=events))
    patch = state.packed.read_block(0)
    bank = state.model.layout.blocks[0].bank
    assert patch.record["tokens_per_expert"][UNSEEN] == 0
    for name in (bank.gate_up, bank.down):
        assert patch.record["unseen_experts"][name] == [UNSEEN]
        packed = patch.packed[name]
        weights = decode(packed)
        assert torch.isfinite(weights).all()
        assert (weights.abs().amax((-1, -2)) > 0).all()
        source = state.model.checkpoint.tensor(name)[UNSEEN].float().T
        if name == bank.gate_up:
            source = torch.cat((source[::2], source[1::2]))
        codes, scale, zero = round_to_nearest(source[None], packed.spec, config.grid)
        assert torch.equal(weights[UNSEEN], dequantize(codes, scale, zero, packed.spec)[0])
    warned = [event.data["text"] for event in events if event.kind == "warning"]
    assert any(f"expert {UNSEEN} saw no calibration token" in text for text in warned)
