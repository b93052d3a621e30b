#!/usr/bin/env python3
"""Q-Mamba 6: a hybrid of attention, Mamba-2 and experts goes through one recipe, loads back and generates.

QESC for the experts, 4-bit states, GPTQ for the rest, in one run; then the artifact is loaded in a fresh process, its
logits are compared with those of the model in memory (the exporter's own check) and it writes text from packed states.
The native engine has to run it, faster than transformers' modules, both in the float32 that `bench` takes on a CPU: in
bf16 a prompt takes it less time (two planes a number instead of three) and modules more. In 16 bits these round more
than it does, so its tokens are counted, not judged: the tests hold both together in fp32.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import llmcompress, llmcompress_json, verdict

RECIPE = """
version: 1
name: hybrid
model: {path: "asset:reference_hybrid"}
stages:
  load: {type: load}
  calibrate:
    type: calibrate
    source: {kind: jsonl, path: "asset:text/calibration.jsonl.gz"}
    samples: 64
    length: 512
  quantize:
    type: qesc
    rules:
      experts: {role: experts, bits: 3, group_size: 64, symmetric: false}
      rest: {role: [attention, mlp, ssm], bits: 8, group_size: -1, symmetric: true}
    router: {k: auto, solver: ridge}
  states: {type: dsq, bits: 4, rounding: dither, replay_window: 4}
  evaluate:
    type: evaluate
    perplexity:
      heldout: {source: {kind: jsonl, path: "asset:text/heldout.jsonl.gz"}, length: 512, max_tokens: 16384}
  export: {type: export, formats: [native]}
"""
CHILD = """
import json, sys, torch
from llmcompress import hf
from llmcompress.inference.generate import Generator, Sampling
from llmcompress.nn.states import PackedState, cache_bytes
model, tokenizer = hf.load(sys.argv[1])
ids = tokenizer("The old house stood at the end of the", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
cache = out.past_key_values
native = Generator(model)
(written,) = native.generate([ids[0].tolist()], Sampling(24))
theirs = out.sequences[0, ids.shape[1]:].tolist()
kinds = [type(h).__name__ for l in cache.layers for h in getattr(l, "recurrent_states", {}).values()]
config = model.config.to_dict()["quantization_config"]
print(json.dumps({
    "text": tokenizer.decode(out.sequences[0]), "states": kinds, "policies": sorted(config["policies"]),
    "bits": sorted({config["specs"][i]["bits"] for i in config["modules"].values()}),
    "engine": native.engine, "same": sum(a == b for a, b in zip(written.tokens, theirs)),
    "experts": sum("experts" in name for name in config["modules"]), "bytes": cache_bytes(cache).states,
}))
"""


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="llmcompress-hybrid-"))
    try:
        recipe = root / "hybrid.yaml"
        recipe.write_text(RECIPE)
        llmcompress("run", recipe, f"run.dir={root / 'run'}", "--quiet")
        command = [sys.executable, "-c", CHILD, str(root / "run" / "artifact")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        speed = llmcompress_json("bench", "model", root / "run" / "artifact", "--repeats", 5)["rows"]
        rows = json.loads((root / "run" / "stages" / "evaluate" / "metrics.json").read_text())
    finally:
        shutil.rmtree(root)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    own = [row for row in speed if not row["candidate"].startswith("dense")]
    by = {(row["case"], row["candidate"].rpartition(" ")[2]): row["tokens_per_second"] for row in own}
    rates = {case: (rate, rate / by[case, "transformers"]) for (case, engine), rate in by.items() if engine == "native"}
    print(json.dumps(rates), flush=True)
    text = next(row for row in rows if row["metric"] == "perplexity")
    native = found["engine"] == "native" and all(ratio > 1 for _, ratio in rates.values())
    holds = native and bool(found["states"]) and set(found["states"]) == {"PackedState"} and found["experts"] > 0
    verdict(
        holds and "state_cache" in found["policies"],
        f"{len(found['states'])} layers with packed states, {found['experts']} expert projections packed, "
        f"perplexity {text['dense']:.2f} dense, {text['compressed']:.2f} compressed, text is written, "
        f"natively {found['same']} of 24 tokens alike, "
        + ", ".join(f"{case}: {rate:.0f} tokens/s, {ratio:.1f} times" for case, (rate, ratio) in rates.items()),
    )


if __name__ == "__main__":
    main()
