"""A run directory as the runner leaves it, small but complete, without running anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

LAYERS, EXPERTS, HIDDEN, INNER = 12, 16, 128, 192


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def _block(index: int, rng: random.Random) -> dict[str, Any]:
    weights = [math.exp(rng.gauss(0, 0.6 + 0.03 * index)) for _ in range(EXPERTS)]
    if index == LAYERS - 1:
        weights[3] = 0.0
    total = sum(weights)
    before = 0.11 + 0.012 * index + rng.uniform(-0.01, 0.01)
    after = before * (0.72 if index != 4 else 1.04)
    layer, grown = f"model.layers.{index}", 1 + 0.06 * index

    def rates(changed: float) -> dict[str, float]:
        return {"cr_any": changed, "cr_half": changed * 0.7, "cr_all": changed * 0.1, "overlap": 1 - changed * 0.55}

    return {
        "seconds": 2.1 + rng.uniform(-0.2, 0.4),
        "errors": {
            **{f"{layer}.self_attn.{n}_proj": 0.004 * grown * rng.uniform(0.8, 1.3) for n in "qkv"},
            f"{layer}.self_attn.o_proj": 0.009 * grown,
            f"{layer}.mlp.experts.gate_up_proj": 0.045 * grown * rng.uniform(0.9, 1.1),
            f"{layer}.mlp.experts.down_proj": 0.071 * grown * rng.uniform(0.9, 1.1),
        },
        "tokens_per_expert": [int(65536 * w / total) for w in weights],
        "router": {
            "before": rates(before),
            "after": rates(after),
            "loss_before": 0.021 * grown,
            "loss_after": 0.013 * grown,
            "k": 4,
            "kept": index != 4,
        },
    }


def _header(path: Path, entries: dict[str, tuple[str, list[int]]], packed: dict[str, Any]) -> None:
    """A safetensors file's header; reports never read the data behind it."""
    header: dict[str, Any] = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in entries.items()
    }
    header["__metadata__"] = {"packed": json.dumps(packed)}
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(data).to_bytes(8, "little") + data)


def _packed(name: str, shape: list[int], bits: int, entries: dict[str, Any], packed: dict[str, Any]) -> None:
    *outer, columns = shape
    entries[f"{name}.weight_packed"] = ("I32", [*outer, columns * bits // 32])
    entries[f"{name}.weight_scale"] = ("F16", [*outer, columns // 64])
    spec = {"bits": bits, "group_size": 64, "symmetric": True, "codec": "int_group"}
    packed[name] = {"shape": shape, "spec": spec, "tensors": ["weight_packed", "weight_scale"]}


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "eac_moe_reference",
    "model": {"path": "asset:reference-moe", "dtype": "auto"},
    "run": {"dir": "runs/reference", "seed": 0, "device": "cpu"},
    "stages": {
        "load": {"type": "load"},
        "calibrate": {"type": "calibrate", "samples": 64, "length": 512},
        "quantize": {"type": "qesc", "rules": {"experts": {"role": "experts", "bits": 2, "group_size": 64}}},
        "skip": {"type": "pesf", "alpha": 0.3},
        "evaluate": {"type": "evaluate", "tasks": ["piqa"]},
        "export": {"type": "export", "formats": ["native"]},
    },
}

METRICS = [
    ("heldout", "perplexity", 24.118, 25.961, None, 32768, False),
    ("fidelity", "kl", None, 0.0613, 0.0021, 8192, False),
    ("fidelity", "top1_agreement", None, 0.871, 0.004, 8192, True),
    ("piqa", "acc", 0.582, 0.571, 0.0115, 1838, True),
    ("arc_easy", "acc_norm", 0.371, 0.374, 0.0099, 2376, True),
]


def write_run(root: Path) -> Path:
    """Fill ``root`` with a finished run of a 12-layer MoE."""
    rng = random.Random(7)
    versions = {"llmcompress": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    inputs = {"model.path": {"path": "reference", "files": {"config.json": {"bytes": 829, "sha256": "48194c29" * 8}}}}
    _write(root / "recipe.lock.json", {"recipe": RECIPE, "versions": versions, "inputs": inputs})
    (root / "recipe.yaml").write_text("version: 1\nname: eac_moe_reference\nextends: base/books\n", encoding="utf-8")
    blocks = root / "stages" / "quantize" / "blocks"
    for index in range(LAYERS):
        _write(blocks / f"{index:05d}.json", _block(index, rng))
        entries: dict[str, Any] = {f"model.layers.{index}.mlp.gate.weight": ("BF16", [EXPERTS, HIDDEN])}
        packed: dict[str, Any] = {}
        layer = f"model.layers.{index}"
        for name in ("q", "k", "v", "o"):
            _packed(f"{layer}.self_attn.{name}_proj", [HIDDEN, HIDDEN], 4, entries, packed)
        _packed(f"{layer}.mlp.experts.gate_up_proj", [EXPERTS, 2 * INNER, HIDDEN], 2, entries, packed)
        _packed(f"{layer}.mlp.experts.down_proj", [EXPERTS, HIDDEN, INNER], 2, entries, packed)
        _header(blocks / f"{index:05d}.safetensors", entries, packed)
    costs = {"load": (0.4, 210e6), "calibrate": (1.9, 260e6), "quantize": (27.4, 612e6), "skip": (0.01, 612e6)}
    costs |= {"evaluate": (48.2, 540e6), "export": (1.2, 470e6)}
    for name, (seconds, peak) in costs.items():
        state = {"name": name, "type": RECIPE["stages"][name]["type"], "status": "finished"}
        _write(root / "stages" / name / "state.json", {**state, "seconds": seconds, "peak_rss_bytes": int(peak)})
    keys = ("task", "metric", "dense", "compressed", "stderr", "n", "higher_is_better")
    _write(root / "stages" / "evaluate" / "metrics.json", [dict(zip(keys, row)) for row in METRICS])
    gate = {"gate": "quality", "metric": "heldout.perplexity", "limit": "at most 10 % above dense", "value": 25.961}
    _write(root / "stages" / "evaluate" / "gates.json", [{**gate, "passed": True}])
    layers = [
        {
            "module": f"model.layers.{i}.mlp.experts",
            "experts_skipped": i,
            "experts_used": 32,
            "slots": 512,
            "slots_dropped": 2 * i,
        }
        for i in range(LAYERS)
    ]
    skipping = {"experts_skipped": 0.34, "slots_dropped": 0.062, "seconds_with": 7.9, "seconds_without": 8.6}
    texts = [{"text": "heldout", "perplexity_with": 25.961, "perplexity_without": 25.7}]
    skipping |= {"tokens_without_expert": 3, "texts": texts, "per_layer": layers}
    _write(root / "stages" / "evaluate" / "pesf.json", skipping)
    forced = {"dense": 24.118, "dense_shifted": 24.9, "compressed_unshifted": 25.3, "compressed": 25.961}
    forced |= {"weights_alone": 0.049, "shift_alone": 0.0324, "both": 0.0764, "tokens": 8192}
    _write(root / "stages" / "evaluate" / "forced_routing.json", forced)
    shift = [
        {"block": i, "cr_any": 0.1 + 0.01 * i, "cr_half": 0.08, "cr_all": 0.01, "overlap": 0.95 - 0.01 * i}
        for i in range(LAYERS)
    ]
    _write(root / "stages" / "evaluate" / "expert_shift.json", shift)
    _write(
        root / "stages" / "evaluate" / "samples.json",
        [
            {
                "prompt": "The old house stood at the end of the lane,",
                "dense": " and its windows looked over the fields to the river, where the boats went by at night.",
                "compressed": " and its windows were open to the river, where the men had gone down in the morning.",
            },
            {
                "prompt": "Tags <b>stay</b> text & <script>alert(1)</script>",
                "dense": " yes",
                "compressed": " <i>yes</i>",
            },
        ],
    )
    _write(
        root / "stages" / "evaluate" / "decoding.json",
        [
            {"side": "dense", "part": "samples", "written_by": "transformers: the model is on <cuda>"},
            {"side": "compressed", "part": "samples", "written_by": "the native engine"},
            {"side": "compressed", "part": "gsm8k", "written_by": "the native engine"},
        ],
    )
    events = [
        {"kind": "run_start", "stage": "", "data": {}, "time": 1.0},
        {"kind": "warning", "stage": "quantize", "data": {"text": "layer 11: expert 3 saw no token, RTN"}, "time": 2.0},
        {"kind": "run_end", "stage": "", "data": {"status": "finished"}, "time": 90.0},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (root / "events.jsonl").write_text(lines + '{"kind": "metr', encoding="utf-8")
    return root


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "run")
