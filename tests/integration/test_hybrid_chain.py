"""Hybrids from one recipe through the command line: experts, states, activations, evaluation, artifact, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import hf
from llmcompress.cli.app import invoke
from llmcompress.cli.inspect import look
from llmcompress.export.dense import DenseExporter
from llmcompress.models.assemble import compressed_model
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.states import cache_bytes
from llmcompress.stages.rtn import Rtn, RtnConfig

RECIPE = """
version: 1
name: hybrid
model: {{path: {model}, dtype: float32}}
run: {{dir: {folder}/run, device: cpu, threads: 1}}
stages:
  load: {{type: load}}
  calibrate: {{type: calibrate, source: {{kind: inline, texts: {texts}}}, samples: 4, length: 16}}
  quantize:
    type: {quantizer}
    rules:
      all: {{match: ".", bits: 8, group_size: 16, symmetric: true}}
  activations: {{type: activations, granularity: chunk}}
  embeddings: {{type: embeddings, bits: 8}}
  states: {{type: dsq, bits: 8, samples: 2, tokens: 16}}
  {reconstruct}
  evaluate:
    type: evaluate
    overlap: ignore
    perplexity:
      text: {{source: {{kind: inline, texts: {texts}}}, length: 16, max_tokens: 48}}
  export: {{type: export, formats: [native]}}
"""
TEXTS = json.dumps(["The cat sat on the warm stone and looked at the sea. " * 6, "Nobody had opened the door. " * 12])
# what a family adds to the recipe: its quantizer, and whether its mixers can be reconstructed
CHAINS = {
    "falcon_h1": ("gptq", True),
    "jamba": ("qesc", False),
    "nemotron_h": ("qesc", True),
    "zamba2": ("gptq", True),
}


@pytest.mark.parametrize("family", CHAINS)
def test_one_recipe(family: str, tiny: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    source, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    tiny.model(family, vocab_size=len(tiny_tokenizer)).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    quantizer, tuned = CHAINS[family]
    reconstruct = "reconstruct: {type: esr, epochs: 1, batch_size: 2}" if tuned else ""
    recipe.write_text(
        RECIPE.format(model=source, folder=tmp_path, texts=TEXTS, quantizer=quantizer, reconstruct=reconstruct)
    )
    assert invoke(["plan", str(recipe)]) == 0
    assert invoke(["run", str(recipe)]) == 0
    artifact = tmp_path / "run" / "artifact"
    capsys.readouterr()
    assert invoke(["inspect", str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layout = layout_from_config(json.loads((artifact / "config.json").read_text()))
    assert len(found["heads"]) == sum(block.scan is not None for block in layout.blocks)
    assert {"state_cache", "activations"} <= set(found["policies"])
    assert found["parameters"] == look(source).parameters

    model, tokenizer = hf.load(artifact)
    assert tokenizer is not None
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        held = cache_bytes(cache)
        values = sum(block.scan.values for block in layout.blocks if block.scan is not None)
        assert held.states < 4 * len(ids) * values, "states are packed"
        written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 13)
    plan = json.loads((artifact / "config.json").read_text())["quantization_config"]["modules"]
    assert set(plan) == {name for name, *_ in layout.quantizable()}


@pytest.mark.parametrize("family", CHAINS)
def test_decoded_weights_are_read_by_transformers_alone(family: str, tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    state = tiny.state(tmp_path / "model", family)
    rules = {"all": {"match": ".", "bits": 4, "group_size": 16}}
    Rtn("quantize", RtnConfig.model_validate({"rules": rules})).run(state, tiny.context(tmp_path))
    exporter, out = DenseExporter("float32"), tmp_path / "dense"
    exporter.write(state.model, state.packed, {}, out, {})
    exporter.read_back(out, state.model, state.packed)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        expected = compressed_model(state.model, state.packed, {}, torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert look(tmp_path / "model").parameters == state.model.parameters
