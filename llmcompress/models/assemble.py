"""The compressed model in memory: the same modules and the same tensors as a loaded artifact."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.alignment import align
from llmcompress.models.capture import write_expert_weight
from llmcompress.models.handle import ModelHandle, assign_all, fill_constants, generation_settings, meta_model
from llmcompress.models.layout import Block, ModelLayout
from llmcompress.models.orientation import canonical
from llmcompress.models.shared import share_modules
from llmcompress.nn.swap import swap_modules
from llmcompress.quant.codecs import codec
from llmcompress.quant.states import SCALE
from llmcompress.quant.store import BlockPatch, PackedStore

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmcompress.models.quantization_config import Policies

# policy → module of llmcompress.nn whose ``attach`` makes it active, in the order in which they attach; embeddings are
# modules of their own before weights are read
POLICIES = {"pesf": "skipping", "activations": "activations", "state_cache": "mixers", "embeddings": None}


def compressed_model(
    handle: ModelHandle,
    store: PackedStore,
    policies: Policies,
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
) -> PreTrainedModel:
    """Assemble the compressed model without writing it.

    Its logits are bit for bit those of the exported artifact, loaded in the same ``dtype``.

    Args:
        handle: The source.
        store: What the quantizing stages made of it.
        policies: Run-time policies by name (``pesf``).
        dtype: Type of dense tensors and activations; the handle's by default.
        adapter: Folder of low-rank adapters trained on the packed model.

    Returns:
        The model on the CPU in evaluation mode, packed in memory.
    """
    model = meta_model(handle.hf_config(), dtype or handle.dtype)
    share_modules(model, handle.layout)
    swap_modules(model, handle.layout, store.plan(), model.dtype)
    prepare_policies(model, handle.layout, policies)
    fill_constants(model)
    assign_all(model, outside_tensors(handle, policies))
    model.tie_weights()
    inside = (pair for block in handle.layout.blocks for pair in block_tensors(handle, store, block))
    # calibrated scales of states have a place only where states are quantized
    assign_all(model, (pair for pair in inside if "state_cache" in policies or not pair[0].endswith(f".{SCALE}")))
    align(model)
    model.generation_config = generation_settings(handle.path)
    # as from_pretrained does: some families multiply by a weight in another order then, with other last bits
    model.config._is_quantized = True
    attach_policies(model, handle.layout, policies)
    if adapter is not None:
        from llmcompress.nn import lora

        lora.load(model, adapter)
    return model.eval()


def outside_tensors(handle: ModelHandle, policies: Policies | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield embedding, final norm and untied head, by run-time name, as in the checkpoint or packed by policy."""
    policy = (policies or {}).get("embeddings")
    for view in handle.layout.outside:
        tensor = handle.checkpoint.tensor(view.name)
        if policy is None:
            yield view.name, tensor
        else:
            from llmcompress.nn import embedding

            yield from embedding.packed_tensors(view.name, tensor, handle.layout, policy)


def block_tensors(handle: ModelHandle, store: PackedStore, block: Block) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a compressed block, by its name in the packed model.

    Dense tensors come as the checkpoint holds them. A replaced tensor (a calibrated router) takes
    the checkpoint's data type: the artifact stores it so, and the model in memory must not be better.
    A dense expert projection beside a packed one comes in the canonical orientation.

    Raises:
        InputError: The store holds a tensor that the block does not have.
    """
    patch = store.read_block(block.index)
    bank = block.bank
    # experts of which one projection is packed
    partly = bank.names if bank is not None and not patch.packed.keys().isdisjoint(bank.names) else ()
    packed, replaced = dict(patch.packed), dict(patch.replaced)
    for view in block.tensors():
        weight = packed.pop(view.name.removesuffix(".weight"), None)
        if weight is not None:
            for key, tensor in sorted(weight.tensors.items()):
                yield f"{view.name.removesuffix('.weight')}.{key}", tensor
            continue
        tensor = handle.checkpoint.tensor(view.name)
        new = replaced.pop(view.name, None)
        if new is not None:
            if new.shape != tensor.shape:
                raise InputError(f"{view.name}: replaced by shape {list(new.shape)}, not {list(tensor.shape)}")
            tensor = new.to(tensor.dtype)
        if bank is not None and view.name in partly:
            tensor = canonical(bank, view.name, tensor)
        yield view.name, tensor
    for name in [name for name in replaced if name.endswith(f".{SCALE}")]:
        yield name, replaced.pop(name)
    left = sorted([*packed, *replaced])
    if left:
        raise InputError(
            f"block {block.index} of {store.root}: {', '.join(left)} is not part of this model",
            "the run belongs to another model; start a new one",
        )


def apply_patch(model: PreTrainedModel, layout: ModelLayout, patch: BlockPatch) -> None:
    """Put decoded weights and replaced tensors into a materialised block; tensors of policies are passed over."""
    banks = layout.banks
    for name, packed in patch.packed.items():
        dense = codec(packed.spec.codec).decode(packed)
        bank = banks.get(name)
        if bank is not None:
            module = model.get_submodule(bank.module)
            write_expert_weight(module, bank, name, slice(0, bank.num_experts), dense)
        else:
            place = model.get_parameter(f"{name}.weight")
            place.data.copy_(dense.to(place))
    for name, tensor in patch.replaced.items():
        owner, _, key = name.rpartition(".")
        if key in model.get_submodule(owner)._parameters:
            place = model.get_parameter(name)
            place.data.copy_(tensor.to(place))


def apply_loan(model: PreTrainedModel, layout: ModelLayout, block: Block, store: PackedStore | None) -> None:
    """Put into a materialised block what became of the weights that it borrows; their block is finished by then."""
    if block.loan is None or store is None:
        return
    names = {view.name.removesuffix(".weight") for view in block.loan.tensors}
    lent = store.read_block(block.loan.block)
    packed = {name: weight for name, weight in lent.packed.items() if name in names}
    apply_patch(model, layout, BlockPatch(packed, {}))


def attach_policies(model: PreTrainedModel, layout: ModelLayout, policies: Policies) -> None:
    """Make run-time policies active on a packed model.

    Raises:
        InputError: A policy is not known to this version.
    """
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise InputError(
            f"unknown policy {', '.join(unknown)}", "the model was saved by a newer version: upgrade llmcompress"
        )
    for name, module in POLICIES.items():
        if name in policies and module is not None:
            import_module(f"llmcompress.nn.{module}").attach(model, layout, policies[name])


def prepare_policies(model: PreTrainedModel, layout: ModelLayout, policies: Policies) -> None:
    """Make room for tensors that policies need, before weights are read."""
    if "state_cache" in policies:
        from llmcompress.nn.mixers import register_scales

        register_scales(model, layout, policies["state_cache"])
    if "embeddings" in policies:
        from llmcompress.nn import embedding

        embedding.make_room(model, layout, policies["embeddings"])
