"""What a step or prompt refuses before C++ reads beyond what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from llmcompress_kernels.decode import Decoder, Mixers
    from llmcompress_kernels.decode_windows import Windows


def check_mixers(decoder: Decoder, mixers: Mixers | None) -> None:
    """Whether a decoder has the mixers that it needs, and no others.

    Raises:
        ValueError: It has not.
    """
    if decoder.mixes != (mixers is not None):
        raise ValueError("mixers belong to decoders whose layers have some, and to all of these")


def check_slots(decoder: Decoder, slots: Tensor) -> None:
    """Whether the tokens of a step are of sequences int32 ``[B]`` that may take them.

    Raises:
        ValueError: One takes several, and keeps something that stands at one token only.
    """
    chosen = slots.tolist()
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


def check_numbers(decoder: Decoder, tokens: Tensor, planes: int) -> None:
    """Whether tokens and bytes of activations are possible ones.

    Raises:
        ValueError: They are not.
    """
    if not 1 <= planes <= 3:
        raise ValueError(f"an activation takes 1, 2 or 3 bytes, not {planes}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= decoder.embedding.rows:
        raise ValueError(f"tokens {tokens.tolist()} are not all within 0..{decoder.embedding.rows - 1}")
