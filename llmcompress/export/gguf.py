"""The ``gguf`` format: the subset of our weights that GGML block types represent without re-quantizing.

Symmetric 4-bit weights become Q4_0, symmetric 8-bit ones Q8_0, asymmetric 4-bit ones Q4_1 (whose
fp16 offset rounds ``scale·zero``). Families: llama, mistral, mixtral, qwen2, qwen3, qwen2_moe,
qwen3_moe; positions as they are, scaled linearly, or (llama, mistral, mixtral) as in Llama 3.
Everything else is refused with its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from llmcompress.errors import ExportError
from llmcompress.export.base import (
    Exporter,
    atomic_folder,
    block_tensors,
    expert_rows,
    require_no_other,
    some,
    tokenizer_folder,
    write_provenance,
)
from llmcompress.export.gguf_blocks import BLOCK, TYPE_BYTES, block_type, blocks_value, fits_blocks, to_blocks
from llmcompress.export.gguf_tokenizer import read_tokenizer, tokenizer_problems
from llmcompress.models import sizes
from llmcompress.quant import embeddings
from llmcompress.quant.packed import PackedWeight

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan, QuantSpec
    from llmcompress.quant.store import PackedStore

FILE = "model.gguf"
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
# run-time name inside a layer -> GGUF name after "blk.<i>."
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "F16": 1, "BF16": 32, "F32": 0}
DENSE_TYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16"}
# windows of configs that name none; those of Qwen's are off unless the config says otherwise
WINDOWS = {"mistral": 4096}
# llama.cpp hard-codes whether the weights of the chosen experts are divided by their sum
RENORMALIZES = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: GGUF name, value, and the GGML type it is stored in."""

    name: str
    value: Tensor | PackedWeight
    kind: str


class GGUFExporter(Exporter):
    """One file for llama.cpp and everything built on it."""

    name = "gguf"
    loading = """```bash
llama-cli -m PATH/model.gguf -p "Once upon a time"
```"""

    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Families and weights that GGML types do not represent exactly."""
        return [*_family_problems(layout), *_weight_problems(layout, plan), *_embedding_problems(layout, policies)]

    def losses(self, policies: Policies) -> list[str]:
        """Policies other than that of embeddings, whose codes are GGML blocks."""
        return super().losses({name: policy for name, policy in policies.items() if name != embeddings.EMBEDDINGS})

    def remarks(self, layout: ModelLayout, plan: QuantPlan) -> list[str]:
        """Where Q4_1 rounds."""
        if any(block_type(spec) == "Q4_1" for spec in plan.values()):
            return ["asymmetric weights become Q4_1, whose fp16 offset rounds scale times zero, by 2^-11 of it at most"]
        return []

    def source_refusals(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> list[str]:
        """Tokenizers, rotary scalings and attention windows that this exporter does not translate."""
        problems = [] if find_spec("gguf") else ["writing needs the gguf package: pip install 'llmcompress[export]'"]
        problems += tokenizer_problems(tokenizer_folder(folder, tokenizer), config.get("vocab_size"))
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        llama = ARCHITECTURES.get(str(config.get("model_type"))) == "llama"
        if kind not in ("default", "linear") and not (kind == "llama3" and llama):
            problems.append(f"rotary scaling {kind!r} is not translated")
        window = config.get("sliding_window", WINDOWS.get(str(config.get("model_type"))))
        context = config.get("max_position_embeddings")
        if window and config.get("use_sliding_window", True) and (context is None or window < context):
            problems.append(f"attention over a window of {window} tokens: llama.cpp attends to all for this family")
        act = config.get("hidden_act", "silu")
        if act != "silu":
            problems.append(f"activation {act!r}: llama.cpp computes silu for this family")
        return problems

    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """Blocks and the dense rest; the tokenizer's few megabytes are not counted."""
        total = sizes.dense_parameters(layout, plan) * weight_bytes
        for name, _, shape, _ in layout.quantizable():
            kind = block_type(plan[name]) if name in plan else None
            if kind is not None:
                total += prod(shape) // BLOCK * TYPE_BYTES[kind]
        spec = _embedding_spec(policies or {})
        if spec is not None:
            weights = embeddings.parameters(layout)
            total += weights // BLOCK * TYPE_BYTES[str(block_type(spec))] - weights * weight_bytes
        return total

    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write ``model.gguf``: header and names from the layout first, then data block by block."""
        import gguf

        layout, plan = handle.layout, store.plan()
        with atomic_folder(out) as part:
            writer = gguf.GGUFWriter(part / FILE, ARCHITECTURES[layout.model_type])
            _write_facts(writer, handle, plan, str(provenance.get("recipe", {}).get("name") or handle.path.name))
            for entry in _entries(handle, store, policies, values=False):
                shape, dtype, size = _stored(entry)
                kind = gguf.GGMLQuantizationType[entry.kind]
                writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # a second pass over the blocks keeps only one of them in memory
            for entry in _entries(handle, store, policies):
                writer.write_tensor_data(_data(entry))
            writer.close()
            write_provenance(part, provenance)

    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Decode every tensor with the gguf package's reader and compare in fp32.

        Symmetric weights must equal our decoded ones exactly; asymmetric ones must equal what the
        rounded offset gives, and lie within its rounding of our decoded ones.
        """
        import gguf
        import torch
        from gguf.quants import dequantize

        from llmcompress.export.base import decoded

        reader = gguf.GGUFReader(out / FILE)
        found = {tensor.name: tensor for tensor in reader.tensors}
        for entry in _entries(handle, store, policies or {}):
            tensor = found.pop(entry.name, None)
            if tensor is None:
                raise ExportError(f"{out}: {entry.name} is missing from what was written")
            got = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if not isinstance(entry.value, PackedWeight):
                same = tensor.tensor_type.name == entry.kind and torch.equal(got, entry.value.float())
            else:
                same = torch.equal(got, blocks_value(entry.value))
                ours = decoded(entry.value, torch.float32)
                same = same and bool(((got - ours).abs() <= _rounding(entry.value)).all())
            if not same:
                raise ExportError(f"{out}: {entry.name} reads back different through the gguf package")
        require_no_other(out, found)


def _rounding(packed: PackedWeight) -> Tensor | float:
    """Largest error that an fp16 offset may cause, per weight (0 for symmetric weights)."""
    import torch

    from llmcompress.quant.codecs.int_group import unpack_parts

    if packed.spec.symmetric:
        return 0.0
    _, scale, zero = unpack_parts(packed)
    assert zero is not None
    product = scale.float() * zero.float()
    # half a unit in the last place of a normal number, or of the subnormals near zero; the sums round in fp32
    bound = torch.maximum(product * 2.0**-11, torch.tensor(2.0**-25)) + scale.float() * 2.0**-18
    return bound[..., torch.arange(packed.shape[-1]) // packed.spec.group(packed.shape[-1])]


def _entries(handle: ModelHandle, store: PackedStore, policies: Policies, values: bool = True) -> Iterator[Entry]:
    """Every tensor of the file, in order; without ``values`` an embedding that is rounded has its shape alone."""
    layout, spec = handle.layout, _embedding_spec(policies)
    if _rope(handle).get("rope_type") == "llama3":
        yield Entry("rope_freqs.weight", rope_factors(handle), "F32")
    rounded = [f"{module}.weight" for module in embeddings.matrices(layout)]
    for view in layout.outside:
        if spec is None or view.name not in rounded:
            yield _entry(OUTSIDE[view.name], handle.checkpoint.tensor(view.name))
        elif values:
            from llmcompress.nn.embedding import pack_rows

            # llama.cpp looks rows up and multiplies by them in one form
            yield _entry(OUTSIDE[view.name], pack_rows(handle.checkpoint.tensor(view.name), spec, lanes=1))
        else:
            yield _entry(OUTSIDE[view.name], PackedWeight(tuple(view.shape), spec, {}))
    for block in layout.blocks:
        yield from _block_entries(handle, store, block)


def _block_entries(handle: ModelHandle, store: PackedStore, block: Block) -> Iterator[Entry]:
    bank = block.bank
    heads = _heads(handle) if ARCHITECTURES[handle.layout.model_type] == "llama" else {}
    for name, value in block_tensors(handle, store, block).items():
        inside = name.removeprefix(block.name + ".")
        if bank is not None and name in bank.names:
            for part, rows in bank.parts(name).items():
                cut = expert_rows(value, rows) if isinstance(value, PackedWeight) else value[:, rows].contiguous()
                yield _entry(f"blk.{block.index}.ffn_{part}_exps.weight", cut)
            continue
        module, _, kind = inside.rpartition(".")
        if NAMES.get(module) is None:
            raise ExportError(f"{name}: llama.cpp has no name for this tensor")
        turned = _rotate_rows(value, heads[module]) if module in heads else value
        yield _entry(f"blk.{block.index}.{NAMES[module]}.{kind}", turned)


def _entry(name: str, value: Tensor | PackedWeight) -> Entry:
    if isinstance(value, PackedWeight):
        return Entry(name, value, str(block_type(value.spec)))
    if "ffn_gate_inp_shexp" in name:
        value = value.reshape(-1)
    return Entry(name, value, _dense_kind(name, value))


def _dense_kind(name: str, tensor: Tensor) -> str:
    """GGML keeps vectors and routers in fp32; matrices stay in the checkpoint's type."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return "F32"
    return DENSE_TYPES.get(str(tensor.dtype), "F32")


def _stored(entry: Entry) -> tuple[tuple[int, ...], Any, int]:
    """Shape, numpy type and bytes of what :func:`_data` will return."""
    import numpy as np

    shape = tuple(entry.value.shape)
    if isinstance(entry.value, PackedWeight):
        shape = (*shape[:-1], shape[-1] // BLOCK * TYPE_BYTES[entry.kind])
        return shape, np.dtype(np.uint8), prod(shape)
    if entry.kind == "BF16":
        shape = (*shape[:-1], 2 * shape[-1])
        return shape, np.dtype(np.uint8), prod(shape)
    dtype = np.dtype(np.float16 if entry.kind == "F16" else np.float32)
    return shape, dtype, prod(shape) * dtype.itemsize


def _data(entry: Entry) -> Any:
    """Bytes of a tensor as a numpy array the writer understands."""
    import numpy as np
    import torch

    if isinstance(entry.value, PackedWeight):
        return to_blocks(entry.value)
    if entry.kind == "BF16":
        return entry.value.contiguous().view(torch.int16).numpy().view(np.uint8)
    wanted = torch.float16 if entry.kind == "F16" else torch.float32
    return entry.value.to(wanted).contiguous().numpy()


def _heads(handle: ModelHandle) -> dict[str, int]:
    """Projections whose rows llama.cpp's rotary embedding wants in another order, and their heads."""
    config = handle.hf_config()
    return {
        "self_attn.q_proj": int(config.num_attention_heads),
        "self_attn.k_proj": int(config.num_key_value_heads),
    }


def _rotate_rows(value: Tensor | PackedWeight, heads: int) -> Tensor | PackedWeight:
    """Interleave the two halves of each head's rows; rows carry their scales with them."""

    def permute(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0]
        halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()

    if isinstance(value, PackedWeight):
        return replace(value, tensors={key: permute(tensor) for key, tensor in value.tensors.items()})
    return permute(value)


def _rope(handle: ModelHandle) -> dict[str, Any]:
    return dict(getattr(handle.hf_config(), "rope_parameters", None) or {})


def rope_factors(handle: ModelHandle) -> Tensor:
    """By what llama.cpp divides each frequency of the rotary embedding, ``[head_dim / 2]`` fp32, for Llama 3's scaling.

    From the frequencies that the model itself has in transformers, so that no formula is written twice.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](handle.hf_config(), torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return 1.0 / (float(_rope(handle)["rope_theta"]) ** exponents) / scaled


def _write_facts(writer: Any, handle: ModelHandle, plan: QuantPlan, name: str) -> None:
    """Hyper-parameters and tokenizer."""
    config, layout = handle.hf_config(), handle.layout
    writer.add_name(name)
    writer.add_block_count(len(layout.blocks))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(layout.hidden)
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    head = int(getattr(config, "head_dim", None) or layout.hidden // config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(layout.vocab)
    rope = _rope(handle)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    bank = next((block.bank for block in layout.blocks if block.bank is not None), None)
    if bank is not None:
        writer.add_expert_count(bank.num_experts)
        writer.add_expert_used_count(bank.top_k)
        writer.add_expert_feed_forward_length(bank.intermediate)
        shared = getattr(config, "shared_expert_intermediate_size", None)
        if shared:
            writer.add_expert_shared_feed_forward_length(int(shared))
    kinds = Counter(block_type(spec) for spec in plan.values())
    dense = DENSE_TYPES.get(str(handle.checkpoint.dtype), "F32")
    writer.add_file_type(FILE_TYPES[str(kinds.most_common(1)[0][0]) if kinds else dense])
    writer.add_quantization_version(2)
    _write_tokenizer(writer, handle)


def _write_tokenizer(writer: Any, handle: ModelHandle) -> None:
    folder = tokenizer_folder(handle.path, handle.tokenizer_path)
    if folder is None:
        raise ExportError(f"{handle.path}: no tokenizer")
    facts = read_tokenizer(folder, handle.layout.vocab, handle.config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts.pre)
    writer.add_token_list(facts.tokens)
    writer.add_token_types(facts.types)
    writer.add_token_merges(facts.merges)
    for key, index in facts.special.items():
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(facts.add_bos)
    writer.add_add_eos_token(facts.add_eos)
    if facts.chat_template is not None:
        writer.add_chat_template(facts.chat_template)


def _family_problems(layout: ModelLayout) -> Iterator[str]:
    if layout.model_type not in ARCHITECTURES:
        yield f"{layout.model_type} is not among the model types written here ({', '.join(ARCHITECTURES)})"
        return
    banks = [block.bank for block in layout.blocks]
    if any(banks) and not all(banks):
        yield "llama.cpp expects experts in every layer of this family, and some layers are dense"
    wanted = RENORMALIZES.get(layout.model_type)
    if any(bank is not None and bank.router.renormalizes != wanted for bank in banks):
        rule = "divides" if wanted else "does not divide"
        yield f"llama.cpp {rule} the chosen experts' weights by their sum for {layout.model_type}; this model differs"
    if layout.tied and layout.model_type == "qwen2_moe":
        yield "llama.cpp wants an output head of its own in this family; this model's is its embedding"
    if ARCHITECTURES[layout.model_type] in ("qwen2", "qwen2moe"):
        queries = [linear for block in layout.blocks for linear in block.linears() if linear.name.endswith(".q_proj")]
        if any(linear.out_features != layout.hidden for linear in queries):
            yield "llama.cpp wants heads that are together as wide as the model in this family"
    if ARCHITECTURES[layout.model_type] != "llama":
        linears = [linear.name for block in layout.blocks for linear in block.linears() if linear.bias]
        if odd := [name for name in linears if not name.endswith((".q_proj", ".k_proj", ".v_proj"))]:
            yield f"{some(odd)}: llama.cpp has no bias for it in this family"
    known = re.compile(r"(^|\.)(" + "|".join(re.escape(name) for name in NAMES) + r")\.(weight|bias)$")
    strange = [view.name for block in layout.blocks for view in block.kept if not known.search(view.name)]
    strange += [view.name for view in layout.outside if view.name not in OUTSIDE]
    if strange:
        yield f"{some(strange)}: llama.cpp has no such tensor in this family"


def _embedding_spec(policies: Policies) -> QuantSpec | None:
    """How embedding and head are rounded, None where they are not."""
    return embeddings.spec_of(policies[embeddings.EMBEDDINGS]) if embeddings.EMBEDDINGS in policies else None


def _embedding_problems(layout: ModelLayout, policies: Policies) -> Iterator[str]:
    """An embedding whose groups are no whole blocks."""
    spec = _embedding_spec(policies)
    if spec is not None and not fits_blocks(spec, layout.hidden):
        size = spec.group(layout.hidden)
        yield f"embeddings in groups of {size} columns: GGML blocks have 32, set group_size to a multiple of that or -1"


def _weight_problems(layout: ModelLayout, plan: QuantPlan) -> Iterator[str]:
    typeless: dict[str, list[str]] = {}
    ragged = []
    for name, _, shape, _ in layout.quantizable():
        spec = plan.get(name)
        if spec is None:
            continue
        if block_type(spec) is None:
            grid = "symmetric" if spec.symmetric else "asymmetric"
            typeless.setdefault(f"{spec.bits}-bit {grid}", []).append(name)
        elif not fits_blocks(spec, shape[-1]):
            ragged.append(name)
    for kind, names in typeless.items():
        yield (
            f"{some(names)}: {kind} weights have no GGML type that holds them exactly (4-bit and symmetric 8-bit ones "
            "have); re-encoding would lose accuracy. Use native, or dense and llama.cpp's own quantizer"
        )
    if ragged:
        yield f"{some(ragged)}: group size and row length must be multiples of 32"
