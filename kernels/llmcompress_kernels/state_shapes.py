"""Whether the operands of the operators on recurrent states fit each other: asked before any kernel, which would read
past them.

What is asked at every token is one chain of comparisons, and only where it fails are the operands gone through one by
one for a message: a token of a small state takes a few microseconds. Legend as in
:mod:`llmcompress_kernels.reference.state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmcompress_kernels.reference.group_gemm import LANES
from llmcompress_kernels.reference.state import SEGMENT

# name, operand, the shape that it should have
Operand = tuple[str, Tensor | None, Sequence[int]]
# S, H, G, P, N
Sizes = tuple[int, int, int, int, int]


def check_float(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Sizes:
    """Compare shapes of ``state_update``, whose arguments these are.

    Returns:
        S, H, G, P, N.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    if len(given := state.shape) == 4 and len(wide := b.shape) == 3:
        sequences, heads, channels, states = given
        groups = wide[1]
        if (
            wide == (sequences, groups, states) == c.shape
            and drive.shape == given[:3]
            and decay.shape == given[:2]
            and groups > 0
            and heads % groups == 0
        ):
            return sequences, heads, groups, channels, states
    _explain_token("state_update", "drive", drive, (("decay", decay),), ("b", b), ("c", c))
    shape = (*drive.shape, b.shape[-1])
    raise _unlike("state_update", ("state", state, shape))


def check_packed(
    codes: Tensor, channel: Tensor | None, scale: Tensor, fixed: Tensor | None, drive: Tensor, decay: Tensor, b: Tensor,
    c: Tensor, bits: int, recent: Tensor | None = None, count: Tensor | None = None, op: str = "dsq_state_update",
) -> Sizes:  # fmt: skip
    """Compare shapes of ``dsq_state_update`` and ``dsq_replay_update``, whose arguments these are.

    Returns:
        S, H, G, P, N.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    if len(given := drive.shape) == 3 and len(wide := b.shape) == 3:
        sequences, heads, channels = given
        groups, states = wide[1:]
        if (
            wide[0] == sequences
            and c.shape == wide
            and decay.shape == (sequences, heads)
            and groups > 0
            and heads % groups == 0
            and _held_fits(codes, channel, scale, fixed, recent, count, given, groups, states, bits)
        ):
            return sequences, heads, groups, channels, states
    _explain_token(op, "drive", drive, (("decay", decay),), ("b", b), ("c", c))
    raise _explain_packed(op, (codes, channel, scale, fixed, recent, count), drive.shape, b.shape, bits)


def check_delta(
    codes: Tensor, channel: Tensor | None, scale: Tensor, fixed: Tensor | None, recent: Tensor | None,
    count: Tensor | None, value: Tensor, decay: Tensor, step: Tensor, key: Tensor, query: Tensor, bits: int,
) -> Sizes:  # fmt: skip
    """Compare shapes of ``dsq_delta_update``, whose arguments these are.

    Returns:
        S, H, G, P, N.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "dsq_delta_update"
    if step.shape != decay.shape:
        raise _unlike(op, ("step", step, decay.shape))
    try:
        return check_packed(codes, channel, scale, fixed, value, decay, key, query, bits, recent, count, op)
    except ValueError:
        _explain_token(op, "value", value, (("decay", decay),), ("key", key), ("query", query))
        raise


def check_mixer(
    projected: Tensor, conv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a: Tensor,
    d: Tensor, gain: Tensor, codes: Tensor | None, channel: Tensor | None, scale: Tensor | None, fixed: Tensor | None,
    floats: Tensor | None, groups: int, states: int, bits: int, recent: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Compare shapes of ``mamba2_decode``, whose arguments these are.

    Returns:
        S, H, P and the channels of the convolution.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "mamba2_decode"
    ((heads, channels), inner, width, taps) = _check_weights(
        op, conv_weight, conv_bias, dt_bias, a, d, gain, groups, states
    )
    given = projected.shape
    if len(given) != 2 or given[1] != inner + width + heads:
        raise _unlike(op, ("projected", projected, (*given[:1], inner + width + heads)))
    sequences = given[0]
    if conv.shape != (sequences, width, taps):
        raise _unlike(op, ("conv", conv, (sequences, width, taps)))
    if codes is None:
        if floats is None or floats.shape != (sequences, heads, channels, states):
            raise _unlike(op, ("floats", floats, (sequences, heads, channels, states)))
    elif not _held_fits(
        codes, channel, scale, fixed, recent, count, (sequences, heads, channels), groups, states, bits
    ):
        held = (codes, channel, scale, fixed, recent, count)
        raise _explain_packed(op, held, (sequences, heads, channels), (sequences, groups, states), bits)
    return sequences, heads, channels, width


def check_prompt(
    projected: Tensor, dt: Tensor, conv: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor,
    a: Tensor, d: Tensor, gain: Tensor, state: Tensor, groups: int,
) -> None:  # fmt: skip
    """Compare shapes of ``mamba2_prefill``, whose arguments these are.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "mamba2_prefill"
    _dimensions(op, ("state", state, 4), ("projected", projected, 3))
    (sequences, tokens), states = projected.shape[:2], state.shape[-1]
    ((heads, channels), inner, width, taps) = _check_weights(
        op, conv_weight, conv_bias, dt_bias, a, d, gain, groups, states
    )
    _require(
        op,
        ("projected", projected, (sequences, tokens, inner + width)),
        ("dt", dt, (sequences, tokens, heads)),
        ("state", state, (sequences, heads, channels, states)),
    )
    if conv is not None:
        _require(op, ("conv", conv, (sequences, width, taps)))


def check_pack(state: Tensor, fixed: Tensor | None, bits: int) -> None:
    """Compare shapes of ``dsq_pack``, whose arguments these are.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    _dimensions("dsq_pack", ("state", state, 4))
    if bits not in (4, 8):
        raise ValueError(f"dsq_pack: {bits} bits, expected 4 or 8")
    if fixed is not None:
        _require("dsq_pack", ("fixed", fixed, state.shape[1:3]))


def check_scan(
    op: str, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor, bits: Tensor, fixed: Tensor | None
) -> tuple[int, int, int, int]:
    """Compare shapes of what ``selective_scan_q`` and its gradient have in common.

    Args:
        op: Which of them.
        drive: ``[S, T, H, P]``.
        decay: ``[S, T, H]``.
        b: ``[S, T, G, N]``.
        c: As ``b``.
        bits: ``[H]``.
        fixed: ``[H, P]`` or None.

    Returns:
        S, H, P, N: the shape of a state.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    _dimensions(op, ("drive", drive, 4), ("b", b, 4))
    sequences, tokens, heads, channels = drive.shape
    groups, states = b.shape[2:]
    _share(op, heads, groups)
    wide = (sequences, tokens, groups, states)
    _require(op, ("decay", decay, (sequences, tokens, heads)), ("b", b, wide), ("c", c, wide), ("bits", bits, (heads,)))
    if fixed is not None:
        _require(op, ("fixed", fixed, (heads, channels)))
    return sequences, heads, channels, states


def check_gradient(
    grad: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor, kept: Tensor, bits: Tensor, fixed: Tensor | None
) -> None:
    """Compare shapes of ``selective_scan_q_backward``, whose arguments these are.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "selective_scan_q_backward"
    held = check_scan(op, drive, decay, b, c, bits, fixed)
    segments = -(-drive.shape[1] // SEGMENT)
    _require(op, ("grad", grad, drive.shape), ("kept", kept, (*held[:2], segments, *held[2:])))


def check_channels(
    codes: Tensor | None, channel: Tensor | None, scale: Tensor | None, fixed: Tensor | None, floats: Tensor | None,
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, channels: int, bits: int, recent: Tensor | None,
    count: Tensor | None,
) -> None:  # fmt: skip
    """Compare shapes of :func:`llmcompress_kernels.mamba1.update`, whose arguments these are.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "mamba1.update"
    _dimensions(op, ("x", x, 2), ("a", a, 2))
    (sequences, inner), states = x.shape, a.shape[1]
    _require(op, ("dt", dt, x.shape), ("a", a, (inner, states)), ("b", b, (sequences, states)), ("c", c, b.shape))
    if codes is None:
        _require(op, ("floats", floats, (sequences, inner // LANES, states, LANES)))
    elif channels < 1 or inner % channels != 0 or bits not in (4, 8):
        raise ValueError(f"{op}: {inner} channels in heads of {channels} with {bits} bits, expected 4 or 8")
    else:
        heads = inner // channels
        _require(
            op,
            ("codes", codes, (sequences, heads, channels, states * bits // 8)),
            ("scale", scale, (sequences, heads, states)),
            ("fixed", fixed, (heads, channels))
            if fixed is not None
            else ("channel", channel, (sequences, heads, channels)),
        )
    if recent is not None:
        _dimensions(op, ("recent", recent, 3))
        row = 2 * inner + states
        _require(op, ("recent", recent, (sequences, recent.shape[1], row)), ("count", count, (sequences,)))


def check_channel_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, floats: Tensor) -> None:
    """Compare shapes of :func:`llmcompress_kernels.mamba1.scan`, whose arguments these are.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    op = "mamba1.scan"
    _dimensions(op, ("x", x, 3), ("a", a, 2))
    (sequences, tokens, inner), states = x.shape, a.shape[1]
    wide = (sequences, tokens, states)
    _require(
        op, ("dt", dt, x.shape), ("a", a, (inner, states)), ("b", b, wide), ("c", c, wide), ("d", d, (inner,)),
        ("floats", floats, (sequences, inner // LANES, states, LANES)),
    )  # fmt: skip


def require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Compare one operand's shape.

    Raises:
        ValueError: It is another one.
    """
    _require(op, (name, tensor, shape))


def _check_weights(
    op: str, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a: Tensor, d: Tensor, gain: Tensor,
    groups: int, states: int,
) -> tuple[tuple[int, int], int, int, int]:  # fmt: skip
    """Weights of a mixer; returns H and P, I, channels of the convolution and its taps."""
    one, wide = d.shape, gain.shape
    if len(one) != 1 or len(wide) != 1 or len(given := conv_weight.shape) != 2:
        raise _dimensions_differ(op, ("d", d, 1), ("gain", gain, 1), ("conv_weight", conv_weight, 2))
    (heads,), (inner,), taps = one, wide, given[1]
    width = inner + 2 * groups * states
    if heads < 1 or groups < 1 or heads % groups != 0 or inner % heads != 0:
        raise ValueError(f"{op}: {inner} channels, {heads} heads and {groups} groups do not divide each other")
    # of vectors, counting takes half the time
    if (
        dt_bias.numel() != heads
        or a.numel() != heads
        or given[0] != width
        or (conv_bias is not None and conv_bias.numel() != width)
    ):
        bias = [] if conv_bias is None else [("conv_bias", conv_bias, (width,))]
        raise _unlike(op, ("dt_bias", dt_bias, one), ("a", a, one), *bias, ("conv_weight", conv_weight, (width, taps)))
    return (heads, inner // heads), inner, width, taps


def _explain_token(
    op: str,
    first: str,
    drive: Tensor,
    rates: Sequence[tuple[str, Tensor]],
    b: tuple[str, Tensor],
    c: tuple[str, Tensor],
) -> None:
    """Raise for what comes with a token, if that is what does not fit."""
    _dimensions(op, (first, drive, 3), (*b, 3))
    sequences, heads, _ = drive.shape
    groups, states = b[1].shape[1:]
    _share(op, heads, groups)
    wide = (sequences, groups, states)
    _require(op, *((name, rate, (sequences, heads)) for name, rate in rates), (*b, wide), (*c, wide))


def _held_fits(
    codes: Tensor, channel: Tensor | None, scale: Tensor | None, fixed: Tensor | None, recent: Tensor | None,
    count: Tensor | None, drive: Sequence[int], groups: int, states: int, bits: int,
) -> bool:  # fmt: skip
    """Whether a packed state fits a token; :func:`_explain_packed` says why not."""
    sequences, heads, channels = drive
    return (
        (bits == 4 or bits == 8)  # noqa: PLR1714 - a tuple takes longer
        and codes.shape == (sequences, heads, channels, states * bits // 8)
        and scale is not None
        and scale.shape == (sequences, heads, states)
        and (fixed.shape == (heads, channels) if fixed is not None else channel is not None and channel.shape == drive)
        and (
            recent is None
            or (
                len(rows := recent.shape) == 3
                and rows[2] == heads * channels + heads + groups * states
                and rows[0] == sequences
                and count is not None
                and count.shape == (sequences,)
            )
        )
    )


def _explain_packed(
    op: str, held: Sequence[Tensor | None], drive: Sequence[int], b: Sequence[int], bits: int
) -> ValueError:
    """What of a packed state does not fit a token of these shapes."""
    codes, channel, scale, fixed, recent, count = held
    (sequences, heads, channels), (groups, states) = drive, b[1:]
    if bits not in (4, 8):
        return ValueError(f"{op}: {bits} bits, expected 4 or 8")
    operands: list[Operand] = [
        ("codes", codes, (*drive, states * bits // 8)),
        ("scale", scale, (sequences, heads, states)),
        ("channel", channel, drive) if fixed is None else ("fixed", fixed, drive[1:]),
    ]
    if recent is not None:
        rows = recent.shape[1] if recent.dim() > 1 else 0
        row = heads * channels + heads + groups * states
        operands += [("recent", recent, (sequences, rows, row)), ("count", count, (sequences,))]
    return _unlike(op, *operands)


def _share(op: str, heads: int, groups: int) -> None:
    if groups < 1 or heads % groups != 0:
        raise ValueError(f"{op}: {heads} heads do not share {groups} groups evenly")


def _dimensions(op: str, *operands: tuple[str, Tensor, int]) -> None:
    if any(tensor.dim() != count for _, tensor, count in operands):
        raise _dimensions_differ(op, *operands)


def _dimensions_differ(op: str, *operands: tuple[str, Tensor, int]) -> ValueError:
    name, tensor, count = next(each for each in operands if each[1].dim() != each[2])
    return ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {count} dimensions")


def _require(op: str, *operands: Any) -> None:
    if any(tensor is None or tensor.shape != tuple(shape) for _, tensor, shape in operands):
        raise _unlike(op, *operands)


def _unlike(op: str, *operands: Operand) -> ValueError:
    """The refusal of the first operand with another shape; of the last if all have theirs."""
    wrong = (each for each in operands if each[1] is None or each[1].shape != tuple(each[2]))
    name, tensor, shape = next(wrong, operands[-1])
    given = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
    return ValueError(f"{op}: {name} {given}, expected {list(shape)}")
