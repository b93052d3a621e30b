"""What a step or prompt refuses before C++ reads beyond what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmcompress_kernels.decode import Decoder, Mixers
    from llmcompress_kernels.decode_windows import Windows


def check_sizes(decoder: Decoder, most_columns: int, most_members: int) -> None:
    """Whether C++ has room for a head, and a bit for each member of a family, and layers fit the caches.

    Raises:
        ValueError: It has not, or layers that share a cache differ in what they keep there.
    """
    heads = [layer.heads for layer in decoder.layers if layer.heads is not None]
    widths = [max(each.key_dim, each.value_dim) for each in heads]
    columns = max([*widths, 0 if decoder.latents is None else decoder.latents.width])
    if columns > most_columns:
        raise ValueError(f"heads of {columns} columns, more than {most_columns}")
    for near in (False, True):
        alike = {
            (layer.heads.shared, layer.heads.key_dim, layer.heads.value_dim)
            for layer in decoder.layers
            if layer.heads is not None and (layer.window > 0) == near
        }
        if len(alike) > 1:
            raise ValueError(f"layers that share a cache keep different heads there: {sorted(alike)}")
    if any(layer.attends != (layer.heads is not None) for layer in decoder.layers):
        raise ValueError("sizes of heads belong to layers with attention, and to all of them")
    if len(decoder.member_heads) > most_members:
        raise ValueError(f"{len(decoder.member_heads)} members, more than {most_members}")


def check_norms(decoder: Decoder) -> None:
    """Whether norms have as many weights as C++ reads, in a family for every member.

    Raises:
        ValueError: One has fewer or more.
    """
    rows, wide = max(1, len(decoder.member_heads)), decoder.hidden
    for index, layer in enumerate(decoder.layers):
        # one beside the embedding reads both
        expected = {"attention_norm": 2 * wide if layer.aside is not None else wide}
        expected |= dict.fromkeys(("attention_norm_bias", "mlp_norm", "mlp_norm_bias"), wide)
        expected |= dict.fromkeys(("attention_after", "mlp_after"), wide)
        if layer.heads is not None and decoder.latents is None:
            heads, each = layer.heads, layer.whole_norms or layer.own_norms
            for side, count in (("query", heads.count), ("key", heads.shared)):
                size = heads.key_dim * (count if each else 1)
                expected |= {f"{side}_norm": size, f"{side}_norm_bias": size}
        for name, size in expected.items():
            weights: Tensor | None = getattr(layer, name)
            if weights is not None and weights.numel() != rows * size:
                found = f"{list(weights.shape)}, expected {rows} x {size}"
                raise ValueError(f"{name} of layer {index} has shape {found}")


def check_mixers(decoder: Decoder, mixers: Mixers | None) -> None:
    """Whether a decoder has the mixers that it needs, and no others.

    Raises:
        ValueError: It has not.
    """
    if decoder.mixes != (mixers is not None):
        raise ValueError("mixers belong to decoders whose layers have some, and to all of these")


def check_slots(decoder: Decoder, slots: Tensor, count: int) -> None:
    """Whether the tokens of a step are of sequences int32 ``[B]`` that may take them.

    Args:
        decoder: Decoder whose step it is.
        slots: The sequences.
        count: Sequences that the cache has room for.

    Raises:
        ValueError: There is no such sequence, or one takes several tokens and keeps something that stands at one only.
    """
    chosen = slots.tolist()
    if min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"sequences {chosen} are not all within 0..{count - 1}")
    if (decoder.mixes or decoder.taps > 0) and len(set(chosen)) < len(chosen):
        raise ValueError(f"a recurrent state takes one token a step: sequences {chosen} repeat")


def check_windows(near: Windows, slot: int, start: int, count: int) -> None:
    """Whether layers with windows have room for some tokens of a sequence, and what these see.

    Raises:
        ValueError: They have not.
    """
    begin = int(near.begins[slot])
    if start + count - begin > near.positions or not near.holds(slot, start):
        raise ValueError(f"{count} tokens from {start} on do not fit the rows from {begin} on of layers with windows")


def check_tensors(count: int, **given: tuple[Tensor | None, torch.dtype, int | None]) -> None:
    """Whether tensors that C++ takes by their addresses hold what it reads or writes there.

    Args:
        count: Rows of each, at least.
        **given: By name, each with its type and columns, None for one number a row; no tensor is fine.

    Raises:
        ValueError: One has another type or width, is not contiguous or not on the CPU, or has too few rows.
    """
    for name, (tensor, dtype, columns) in given.items():
        if tensor is None:
            continue
        width = () if columns is None else (columns,)
        fits = tensor.shape[1:] == width and tensor.shape[0] >= count
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous() or not fits:
            found = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: {found}, expected {[count, *width]} or more rows, contiguous, of {dtype} on cpu")


def check_numbers(decoder: Decoder, tokens: Tensor, planes: int) -> None:
    """Whether tokens and bytes of activations are possible ones.

    Raises:
        ValueError: They are not.
    """
    if not 1 <= planes <= 3:
        raise ValueError(f"an activation takes 1, 2 or 3 bytes, not {planes}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= decoder.embedding.rows:
        raise ValueError(f"tokens {tokens.tolist()} are not all within 0..{decoder.embedding.rows - 1}")
