"""Which expert projections an artifact really holds quantized, and whether they still are the model's weights.

Reads the stored tensors themselves, whatever tool wrote them: compressed-tensors ``pack-quantized``, GPTQ's layout
(GPTQModel, auto-round) and this project's. A tool that skips the stacked 3-D experts of transformers 5 leaves dense
tensors behind, or none; one that fails on an expert leaves scales that are not finite, or weights far from the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.export.readers import SafetensorsFolder
from llmcompress.models.handle import ModelHandle
from llmcompress.models.layout import ExpertBank
from llmcompress.quant.bitpack import unpack
from llmcompress.quant.codecs import int_group
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

# relative error (Frobenius) of 4-bit GPTQ is 0.1 to 0.2; of weights that are not the model's, 1 and more
SOUND = 0.5
PROJECTIONS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}
_NAME = re.compile(r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.(weight_packed|qweight|weight)$")
_BANK = re.compile(r"layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)(\.weight_packed)?$")
Key = tuple[int, int, int]


def survey(folder: Path, model: Path, bits: int, group: int) -> dict[str, Any]:
    """Count the expert projections of an artifact.

    Args:
        folder: Where its safetensors files are.
        model: The model it was made from.
        bits: Bits of a code.
        group: Columns that share a scale.

    Returns:
        ``expected``, ``quantized``, ``dense``, ``missing`` and ``unsound`` (quantized, but a scale is not finite or the
        weight is not the model's) projections, and ``error``, the mean relative error of those compared: all three of
        the first, middle and last expert of every layer.
    """
    handle = ModelHandle.open(str(model))
    banks = {index: block.bank for index, block in enumerate(handle.layout.blocks) if block.bank is not None}
    wanted = {(i, e, p) for i, bank in banks.items() for e in range(bank.num_experts) for p in range(3)}
    with SafetensorsFolder(folder) as stored:
        names = stored.names()
        packed, dense = _found(names, banks)
        errors: list[float] = []
        unsound = set()
        for layer, bank in banks.items():
            compared = {0, bank.num_experts // 2, bank.num_experts - 1}
            originals = {name: handle.checkpoint.tensor(name) for name in (bank.gate_up, bank.down)}
            for key in sorted(key for key in packed if key[0] == layer):
                scale, decode = _reader(stored, names, packed[key], key, bank, bits, group)
                error = 0.0
                if key[1] in compared:
                    original = _projection(originals, bank, key).float()
                    error = float((decode() - original).norm() / original.norm())
                    errors.append(error)
                if not bool(torch.isfinite(scale.float()).all()) or not error < SOUND:
                    unsound.add(key)
    return {
        "expected": len(wanted), "quantized": len(packed), "dense": len(dense - packed.keys()),
        "missing": len(wanted - packed.keys() - dense), "unsound": len(unsound),
        "error": round(sum(errors) / len(errors), 4) if errors else None,
    }  # fmt: skip


def _found(names: set[str], banks: dict[int, ExpertBank]) -> tuple[dict[Key, str], set[Key]]:
    """Quantized projections with the name of their codes, and dense ones."""
    packed: dict[Key, str] = {}
    dense: set[Key] = set()
    for name in names:
        if match := _NAME.search(name):
            key = (int(match[1]), int(match[2]), PROJECTIONS[match[3]])
            if match[4] == "weight":
                dense.add(key)
            else:
                packed[key] = name
        elif match := _BANK.search(name):
            layer = int(match[1])
            for key in _keys_of_bank(layer, match[2], banks[layer]):
                if match[3]:
                    packed[key] = name
                else:
                    dense.add(key)
    return packed, dense


def _keys_of_bank(layer: int, name: str, bank: ExpertBank) -> Iterator[Key]:
    for expert in range(bank.num_experts):
        for projection in (0, 1) if name == "gate_up_proj" else (2,):
            yield layer, expert, projection


def _projection(originals: dict[str, Tensor], bank: ExpertBank, key: Key) -> Tensor:
    """``[N, K]`` of one projection."""
    _, expert, projection = key
    if projection == 2:
        return originals[bank.down][expert]
    return originals[bank.gate_up][expert].chunk(2)[projection]


def _reader(
    stored: SafetensorsFolder, names: set[str], name: str, key: Key, bank: ExpertBank, bits: int, group: int
) -> tuple[Tensor, Any]:
    """Scales of a projection, and a function that gives its weight ``[N, K]`` in fp32."""
    _, _, columns = bank.shape(bank.down if key[2] == 2 else bank.gate_up)
    base = name.removesuffix(".weight_packed").removesuffix(".qweight")
    if name.endswith(".qweight"):
        scale = stored.tensor(f"{base}.scales")
        return scale, lambda: _gptq(stored, names, base, scale, bits, group)
    codes, scale = stored.tensor(name), stored.tensor(f"{base}.weight_scale")
    zero = stored.tensor(f"{base}.weight_zero_point") if f"{base}.weight_zero_point" in names else None
    if codes.dim() == 3:
        parts = [None if x is None else x[key[1]] for x in (codes, scale, zero)]
        if key[2] < 2:
            parts = [None if x is None else x.chunk(2)[key[2]] for x in parts]
        codes, scale, zero = parts[0], parts[1], parts[2]
    spec = QuantSpec(bits, group, symmetric=zero is None)
    tensors = {int_group.PACKED: codes, int_group.SCALE: scale} | ({} if zero is None else {int_group.ZERO: zero})
    return scale, lambda: int_group.decode(PackedWeight((codes.shape[0], columns), spec, tensors))


def _gptq(stored: SafetensorsFolder, names: set[str], base: str, scale: Tensor, bits: int, group: int) -> Tensor:
    """Weight ``[N, K]`` of GPTQ's layout: codes ``[K*b/32, N]``, zero points (less one) ``[G, N*b/32]``."""
    words = stored.tensor(f"{base}.qweight").t().contiguous()
    columns = words.shape[1] * 32 // bits
    codes = unpack(words, bits, columns).float()
    zero = unpack(stored.tensor(f"{base}.qzeros"), bits, scale.shape[1]).float() + 1
    index = stored.tensor(f"{base}.g_idx").long() if f"{base}.g_idx" in names else torch.arange(columns) // group
    return ((codes.t() - zero[index]) * scale.float()[index]).t()


def rounded_instead(out: Path, log: str) -> int | None:
    """Weights that a tool says it rounded, for want of tokens or of a factor of the Hessian; None where it is mute.

    GPTQModel keeps a table of all modules, llmcompressor writes a line per layer, this project events.

    Args:
        out: Output folder of the tool.
        log: What it printed.
    """
    if tables := list(out.glob("quant_log.csv")):
        return sum("fallback(" in line for line in tables[0].read_text().splitlines())
    if (events := out / "events.jsonl").exists():
        # an expert's projection for each such warning; gate and up are one weight here
        told = [line for line in events.read_text().splitlines() if "rounded to nearest" in line]
        return sum(2 if "gate_up" in line else 1 for line in told)
    if "GPTQ | METRIC" in log:
        return sum(map(int, re.findall(r"Hessian inversion failed for (\d+)/", log)))
    return None


def artifact_folder(out: Path) -> Path:
    """The folder below ``out`` that holds ``config.json`` and weights."""
    for config in sorted(out.rglob("config.json")):
        if list(config.parent.glob("*.safetensors")):
            return config.parent
    return out
