"""The ``compressed-tensors`` format: symmetric 4- and 8-bit weights, ``pack-quantized``; with activations rounded per
token ``int-quantized``, the W8A8 of serving runtimes.

Our packed layout is byte-identical to ``pack-quantized``, so nothing is re-packed: experts are cut
apart (rows are packed independently) and tensors renamed. Scales of experts are widened to fp32,
without changing them, because transformers decodes experts in the type of the scale and fp16 would
round the product. A fused layer of a serving runtime (q/k/v, gate/up, all experts) has one scheme,
so mixes inside one are refused instead of failing there. Of W8A8 codes are stored as int8, and runtimes round
activations as they come; a scale for 64 columns of a token is ours alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from llmcompress.errors import ExportError
from llmcompress.export.base import (
    FROM_PRETRAINED,
    Exporter,
    block_tensors,
    decoded,
    dense_config,
    hub_weights,
    outside_tensors,
    require_equal,
    require_no_other,
    some,
    write_model_folder,
)
from llmcompress.models import sizes
from llmcompress.quant.codecs.int_group import unpack_parts
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import packed_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan, QuantSpec
    from llmcompress.quant.store import PackedStore

# the oldest release whose dense packing and per-expert loading transformers accepts
FORMAT_VERSION = "0.15.0"
# families whose mixers transformers 5.23 initialises by the name of a weight, also when it comes packed
INITIALISED = ("mamba", "falcon_mamba", "mamba2")
_THROUGH = "through compressed-tensors"
ACTIVATIONS, INT_QUANTIZED = "activations", "int-quantized"
EXPERT_TARGET = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one config group says: code width and how scales are shared (0 means one per row)."""

    bits: int
    group_size: int

    def to_config(self) -> dict[str, Any]:
        """The ``weights`` entry of a config group."""
        grouped = {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **grouped}


def scheme_of(spec: QuantSpec, in_features: int) -> Scheme:
    """Scheme of a weight; a group at least as long as the row is the channel strategy."""
    if spec.group_size == -1 or spec.group_size > in_features:
        return Scheme(spec.bits, 0)
    return Scheme(spec.bits, spec.group_size)


class CompressedTensorsExporter(Exporter):
    """Checkpoints that transformers, vLLM and SGLang read without this project."""

    name = "compressed-tensors"
    loading = (
        "```python\n"
        '# pip install "compressed-tensors>=0.15"; serving runtimes that read compressed-tensors keep it packed\n'
        + FROM_PRETRAINED
    )

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Weights the format or its readers cannot hold, one line per kind of problem."""
        problems = [*_spec_problems(layout, plan), *_fusion_problems(layout, plan), *_expert_problems(layout, plan)]
        problems += _activation_problems(layout, plan, policies)
        if layout.model_type in INITIALISED and any(name.endswith(".mixer.out_proj") for name in plan):
            problems.append(
                f"transformers cannot load a packed out_proj of {layout.model_type}: it initialises that weight. "
                "Leave it dense (rule with keep: true), or use native"
            )
        if any(block.loan is not None for block in layout.blocks):
            problems.append(f"{layout.model_type} runs a module in several blocks; readers cannot tie packed weights")
        return problems

    def losses(self, policies: Policies) -> list[str]:
        """Run-time policies but activations that the format holds."""
        left = {name: policy for name, policy in policies.items() if not (name == ACTIVATIONS and per_token(policies))}
        return super().losses(left)

    def remarks(self, layout: ModelLayout, plan: QuantPlan) -> list[str]:
        """How transformers treats such checkpoints."""
        lost = []
        if any(linear.name in plan for block in layout.blocks for linear in block.linears()):
            lost.append("loaded in bfloat16, transformers rounds the scales of linear layers; fp16 and fp32 are exact")
        if any(block.bank is not None and block.bank.gate_up in plan for block in layout.blocks):
            lost.append("transformers decodes experts while loading; only serving runtimes keep them packed")
        return lost

    def source_refusals(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> list[str]:
        """The read-back needs the compressed-tensors package."""
        if find_spec("compressed_tensors") is None:
            return ["reading back needs the compressed-tensors package: pip install 'llmcompress[export]'"]
        return []

    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """Packed codes, scales (fp32 for experts) and shapes, and the dense rest."""
        total = sizes.dense_parameters(layout, plan) * weight_bytes
        for name, _, shape, _ in layout.quantizable():
            if name in plan:
                spec, rows = plan[name], prod(shape[:-1])
                words = packed_words(shape[-1], spec.bits)
                experts = len(shape) == 3
                matrices = shape[0] * (2 if name.endswith(".gate_up_proj") else 1) if experts else 1
                total += rows * (4 * words + (4 if experts else 2) * spec.groups(shape[-1])) + 16 * matrices
        return total

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write shards block by block, config with config_groups, tokenizer and provenance."""
        whole = per_token(policies)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in outside_tensors(handle):
                yield handle.layout.disk.name(name), tensor
            for block in handle.layout.blocks:
                for name, value in _weights(handle, store, block):
                    yield from _stored(name, value, whole)

        quantization = quantization_config(handle.layout, store.plan(), policies)
        config = {**dense_config(handle), "quantization_config": quantization}
        write_model_folder(out, handle, tensors(), config, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Decode every weight with the compressed-tensors library and compare in fp32, bit for bit."""
        import json

        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        from llmcompress.export.readers import SafetensorsFolder

        config = json.loads((out / "config.json").read_text())["quantization_config"]
        groups = QuantizationConfig.model_validate(config).config_groups
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        whole = config["format"] == INT_QUANTIZED
        if whole != per_token(policies or {}):
            raise ExportError(f"{out}: format {config['format']} does not say how activations are rounded")
        by_scheme = {(g.weights.num_bits, g.weights.group_size or 0): g for g in groups.values()}
        with SafetensorsFolder(out) as files:
            left = files.names()
            for block in handle.layout.blocks:
                for name, value in _weights(handle, store, block):
                    parts = {full: files.tensor(full) for full, _ in _stored(name, value, whole)}
                    left -= set(parts)
                    if not isinstance(value, PackedWeight):
                        require_equal(out, name, parts[name], value, _THROUGH)
                        continue
                    scheme = scheme_of(value.spec, value.shape[-1])
                    state = {full.rsplit(".", 1)[1]: tensor for full, tensor in parts.items()}
                    if not whole:
                        # readers cut padded words by it; the library of today does not miss one that is too large
                        shape = torch.tensor(value.shape, dtype=torch.int64)
                        require_equal(out, f"{name}.weight_shape", state["weight_shape"], shape, _THROUGH)
                    state["weight_scale"] = state["weight_scale"].float()
                    found = compressor.decompress(state, by_scheme[scheme.bits, scheme.group_size])["weight"]
                    require_equal(out, name, found, decoded(value, torch.float32), _THROUGH)
            for name, tensor in outside_tensors(handle):
                full = handle.layout.disk.name(name)
                require_equal(out, full, files.tensor(full), tensor, _THROUGH)
                left.discard(full)
        require_no_other(out, left)


def _weights(handle: ModelHandle, store: PackedStore, block: Block) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """A block's tensors under hub names, scales of experts widened."""
    tensors = block_tensors(handle, store, block).items()
    names = block.bank.names if block.bank is not None else ()
    widened = ((n, _wide_scale(v) if n in names and isinstance(v, PackedWeight) else v) for n, v in tensors)
    return hub_weights(handle.layout, block, widened)


def _wide_scale(packed: PackedWeight) -> PackedWeight:
    tensors = {**packed.tensors, "weight_scale": packed.tensors["weight_scale"].float()}
    return PackedWeight(packed.shape, packed.spec, tensors)


def _stored(name: str, value: Tensor | PackedWeight, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield what the file holds for one weight; ``whole`` stores codes as int8, around zero."""
    import torch

    if not isinstance(value, PackedWeight):
        yield name, value
        return
    if whole:
        codes, scale, _ = unpack_parts(value)
        yield f"{name}.weight", (codes.to(torch.int16) - value.spec.midpoint).to(torch.int8)
        yield f"{name}.weight_scale", scale
        return
    yield f"{name}.weight_packed", value.tensors["weight_packed"]
    yield f"{name}.weight_scale", value.tensors["weight_scale"]
    yield f"{name}.weight_shape", torch.tensor(value.shape, dtype=torch.int64)


def per_token(policies: Policies) -> bool:
    """Whether inputs of linears are rounded with one scale per token."""
    policy = policies.get(ACTIVATIONS)
    return policy is not None and policy.get("granularity", "token") == "token"


def quantization_config(layout: ModelLayout, plan: QuantPlan, policies: Policies | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    The group that covers the experts comes first and is named by a pattern with ``experts`` in it,
    which is how transformers finds it.
    """
    targets: dict[Scheme, list[str]] = {}
    experts = {scheme_of(plan[name], bank.shape(name)[-1]) for name, bank in layout.banks.items() if name in plan}
    for expert_scheme in experts:
        targets[expert_scheme] = [EXPERT_TARGET]
    linears = [(linear.name, linear.in_features) for block in layout.blocks for linear in block.linears()]
    schemes = {name: scheme_of(plan[name], width) if name in plan else None for name, width in linears}
    ignore = []
    for pattern, scheme in _patterns(layout, schemes):
        if scheme is None:
            ignore.append(pattern)
        else:
            targets.setdefault(scheme, []).append(pattern)
    # runtimes want every linear to match a target or to be ignored, and a matrix that is kept belongs to one: routers,
    # gates of shared experts, step sizes and decays of delta rules
    for block in layout.blocks:
        matrices = [view.name for view in block.kept if len(view.shape) == 2 and view.name.endswith(".weight")]
        ignore += [layout.disk.name(name).removesuffix(".weight") for name in matrices]
    whole = per_token(policies or {})
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} if whole else None
    groups = {
        f"group_{index}": {
            "targets": patterns,
            "weights": scheme.to_config(),
            "input_activations": inputs,
            "output_activations": None,
        }
        for index, (scheme, patterns) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": INT_QUANTIZED if whole else "pack-quantized",
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
        "config_groups": groups,
        "ignore": [*dict.fromkeys(ignore), "lm_head"],
    }


def _patterns(layout: ModelLayout, schemes: dict[str, Scheme | None]) -> Iterator[tuple[str, Scheme | None]]:
    """Name linears by one pattern per kind where all layers agree, one by one where they do not."""
    kinds: dict[str, list[str]] = defaultdict(list)
    prefix = {}
    for block in layout.blocks:
        for linear in block.linears():
            prefix[linear.name] = linear.name.removeprefix(block.name + ".")
    for name, kind in prefix.items():
        kinds[kind].append(name)
    for kind, names in kinds.items():
        found = {schemes[name] for name in names}
        if len(found) == 1:
            yield rf"re:.*\.layers\.\d+\.{re.escape(kind)}$", found.pop()
        else:
            for name in names:
                yield name, schemes[name]


def _spec_problems(layout: ModelLayout, plan: QuantPlan) -> Iterator[str]:
    asymmetric, narrow, ragged, other = [], [], [], []
    for name, _, shape, _ in layout.quantizable():
        spec = plan.get(name)
        if spec is None:
            continue
        if spec.codec != "int_group":
            other.append(name)
            continue
        if not spec.symmetric:
            asymmetric.append(name)
        if spec.bits not in (4, 8):
            narrow.append(name)
        if scheme_of(spec, shape[-1]).group_size and shape[-1] % spec.group_size:
            ragged.append(name)
    if other:
        yield f"{some(other)}: the codec has no counterpart in pack-quantized"
    partly = [name for name, spec in plan.items() if spec.dense_rows]
    if partly:
        yield f"{some(partly)}: the rows that make Mamba-2's time steps stay dense, and the format packs whole weights"
    if asymmetric:
        yield (
            f"{some(asymmetric)}: asymmetric; neither transformers nor vLLM's MoE kernels read packed zero points. "
            "Set symmetric: true in the rules (native keeps it; at 4 bits gguf does too)"
        )
    if narrow:
        yield (
            f"{some(narrow)}: 2 or 3 bits; serving kernels read 4 and 8 bits (transformers would decode it, and of "
            "the runtimes only vLLM's Humming kernels run it). Use native"
        )
    if ragged:
        yield f"{some(ragged)}: the row length is not a multiple of the group size, which readers do not accept"


def _activation_problems(layout: ModelLayout, plan: QuantPlan, policies: Policies) -> Iterator[str]:
    """Why rounded activations are not those of W8A8: a group of this format has inputs and weights."""
    if not per_token(policies):
        return
    roles = policies[ACTIVATIONS]["roles"]
    rounded = {linear.name for block in layout.blocks for linear in block.linears() if linear.role.value in roles}
    widths = {name: shape[-1] for name, _, shape, _ in layout.quantizable()}
    other = [name for name, spec in plan.items() if scheme_of(spec, widths[name]) != Scheme(8, 0)]
    if wrong := [*other, *sorted((rounded ^ set(plan)) - set(other))]:
        yield (
            f"{some(wrong)}: activations are rounded per token, which this format holds in linears with 8-bit weights "
            "and one scale a row. Give the same linears bits: 8 and group_size: -1, or take the stage activations out"
        )


def _fusion_problems(layout: ModelLayout, plan: QuantPlan) -> Iterator[str]:
    mixed = []
    for block in layout.blocks:
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                if len({plan.get(linear.name) for linear in group.linears}) > 1:
                    mixed.append(" + ".join(linear.name.rsplit(".", 1)[1] for linear in group.linears))
    if mixed:
        kinds = ", ".join(dict.fromkeys(mixed))
        yield f"{kinds}: runtimes fuse these layers, so they need one scheme, in {len(mixed)} places they differ"


def _expert_problems(layout: ModelLayout, plan: QuantPlan) -> Iterator[str]:
    banks = layout.banks
    quantized = {name: bank for name, bank in banks.items() if name in plan}
    if not quantized:
        if banks and plan:
            # tried with 5.23: its loader takes only packed experts from such files and drops the others
            yield "experts stay dense, and transformers loses dense experts of a compressed-tensors checkpoint"
        return
    if layout.disk.experts is None:
        yield f"{layout.model_type} stores its experts stacked, and readers expect them one by one"
    if any(bank.bias for bank in quantized.values()):
        yield "experts with biases are not read by any runtime in this format"
    if not all(bank.gated for bank in quantized.values()):
        yield "experts without a gate have not been tried with any reader of this format"
    if len(quantized) != len(banks):
        yield f"{len(banks) - len(quantized)} of {len(banks)} expert tensors stay dense; readers need all or none"
    schemes = {scheme_of(plan[name], bank.shape(name)[-1]) for name, bank in quantized.items()}
    if len(schemes) > 1:
        found = ", ".join(sorted(f"{s.bits} bit group {s.group_size or 'channel'}" for s in schemes))
        yield f"experts use several schemes ({found}); transformers reads one scheme for all experts"
