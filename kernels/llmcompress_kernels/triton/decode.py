"""Device functions that widen packed words in registers and multiply with them.

A row is an LSB-first stream of b-bit codes. A word of 2-, 4- or 8-bit codes is halved again and again:
``join(v, v >> 16)``, ``join(v, v >> 8)``, ... appends one axis per halving, the more significant half of the
index first, so the final reshape is the order of columns and every code stays in the thread that loaded its
word, with constant shifts. 32 codes of 3 bits fill three words; four 24-bit quarters, two of which straddle words,
start the same halving. Upper bits are left dirty until the last mask.

``pair_tile`` goes further for 16-bit activations. A code shifted to the top of the mantissa under the exponent of
``2**b`` *is* the number ``2**b + code``, and one shift and one mask do that for two codes of a word at once: one
integer instruction per weight, no conversion. Two codes that share a register lie D columns apart, so the columns
come in pair order (0, D, 1, D+1, ...) and the activations are brought into the same order. The offset, zero point and
scale are applied to the sums of a group in fp32:
``scale * (dot(x, 2**b + code) - (2**b + zero) * sum(x))``. The operands of the tensor core are exact, so this is more
accurate than rounding ``scale * (code - zero)`` to 16 bits. It costs two instructions per token and group, so from 64
tokens on the weights are scaled instead.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(pointer, valid, at, words, EVEN: tl.constexpr):
    """Load words ``[BN, W]``; those of other rows or beyond the row's end read as zero."""
    if EVEN:
        return tl.load(pointer)  # int32
    else:
        return tl.load(pointer, mask=valid[:, None] & (at < words)[None, :], other=0)


@triton.jit
def codes_tile(row, valid, first, words, BITS: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Codes of ``BN`` rows and ``BK`` columns, a multiple of 32.

    Args:
        row: int32 pointers ``[BN]`` to the rows' first words.
        valid: ``[BN]`` mask of rows.
        first: First column, a multiple of 32.
        words: Words per row; those beyond read as zero.
        BITS: 1, 2, 3, 4, 6 or 8.
        EVEN: Nothing lies beyond the matrix, so nothing is masked.
        BN: Rows.
        BK: Columns.

    Returns:
        int32 ``[BN, BK]``.
    """
    if 96 % BITS == 0 and 32 % BITS != 0:
        # three words hold 32 codes of 3 bits or 16 of 6
        UNIT: tl.constexpr = 96 // BITS
        UNITS: tl.constexpr = BK // UNIT
        at = (first // UNIT + tl.arange(0, UNITS)) * 3
        pointer = row[:, None] + at[None, :]
        w0 = _words(pointer, valid, at, words, EVEN)
        w1 = _words(pointer + 1, valid, at + 1, words, EVEN)
        w2 = _words(pointer + 2, valid, at + 2, words, EVEN)
        # 24 bits hold 8 or 4 codes; >> keeps the sign, whose copies lie above the bits that are read
        q1 = ((w0 >> 24) & 0xFF) | (w1 << 8)
        q2 = ((w1 >> 16) & 0xFFFF) | (w2 << 16)
        v = tl.join(tl.join(w0, q2), tl.join(q1, w2 >> 8))
        v = tl.join(v, v >> 12)
        v = tl.join(v, v >> 6)
        if BITS == 3:
            v = tl.join(v, v >> 3)
        v = v & ((1 << BITS) - 1)
    else:
        WORDS: tl.constexpr = BK * BITS // 32
        at = first // 32 * BITS + tl.arange(0, WORDS)
        v = _words(row[:, None] + at[None, :], valid, at, words, EVEN)
        v = tl.join(v, v >> 16)
        v = tl.join(v, v >> 8)
        if BITS <= 4:
            v = tl.join(v, v >> 4)
        if BITS <= 2:
            v = tl.join(v, v >> 2)
        if BITS == 1:
            v = tl.join(v, v >> 1)
        v = v & ((1 << BITS) - 1)
    return tl.reshape(v, (BN, BK))


@triton.jit
def _shift(v, by: tl.constexpr):
    """``v * 2**by`` for either sign."""
    if by >= 0:
        return v << by
    else:
        return v >> -by


@triton.jit
def pair_order(a, BITS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Bring the columns of an activation tile ``[BM, BK]`` into the order of :func:`pair_tile`."""
    D: tl.constexpr = 8 if BITS == 2 else (2 if BITS == 8 else 4)
    return tl.reshape(tl.permute(tl.reshape(a, (BM, BK // (2 * D), 2, D)), (0, 1, 3, 2)), (BM, BK))


@triton.jit
def pair_tile(
    row,
    valid,
    first,
    words,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TYPE: tl.constexpr,
):
    """``2**BITS + code`` of ``BN`` rows and ``BK`` columns in pair order, exact in the 16-bit type.

    Args:
        row: See :func:`codes_tile`, as are the next seven.
        valid: Mask of rows.
        first: First column.
        words: Words per row.
        BITS: 2, 3, 4, or 8 in fp16.
        EVEN: Nothing is masked.
        BN: Rows.
        BK: Columns.
        TYPE: fp16 or bf16.

    Returns:
        ``[BN, BK]``; position ``2 i + h`` of every ``2 D`` is column ``i + D h``; D is 8, 4, 4, 2 for 2, 3, 4, 8 bits.
    """
    MANTISSA: tl.constexpr = 10 if TYPE == tl.float16 else 7
    BIAS: tl.constexpr = 15 if TYPE == tl.float16 else 127
    ONE: tl.constexpr = ((1 << BITS) - 1) << (MANTISSA - BITS)
    MASK: tl.constexpr = ONE | (ONE << 16)
    EXPONENT: tl.constexpr = (BIAS + BITS) << MANTISSA
    MAGIC: tl.constexpr = EXPONENT | (EXPONENT << 16)
    if BITS == 3:
        UNITS: tl.constexpr = BK // 32
        at = (first // 32 + tl.arange(0, UNITS)) * 3
        pointer = row[:, None] + at[None, :]
        w0 = _words(pointer, valid, at, words, EVEN)
        w1 = _words(pointer + 1, valid, at + 1, words, EVEN)
        w2 = _words(pointer + 2, valid, at + 2, words, EVEN)
        q1 = ((w0 >> 24) & 0xFF) | (w1 << 8)
        q2 = ((w1 >> 16) & 0xFFFF) | (w2 << 16)
        v = tl.join(tl.join(w0, q2), tl.join(q1, w2 >> 8))
        # codes 0 to 3 of a quarter into the low half, 4 to 7 into the high half
        v = (v & 0xFFF) | ((v & 0xFFF000) << 4)
    else:
        WORDS: tl.constexpr = BK * BITS // 32
        at = first // 32 * BITS + tl.arange(0, WORDS)
        v = _words(row[:, None] + at[None, :], valid, at, words, EVEN)
    # the axes that join appends hold the code within its half, most significant bit of the index first
    TOP: tl.constexpr = MANTISSA - BITS
    if BITS == 8:
        v = tl.join(_shift(v, TOP), _shift(v, TOP - 8))
    elif BITS == 2:
        even = tl.join(tl.join(_shift(v, TOP), _shift(v, TOP - 8)), tl.join(_shift(v, TOP - 4), _shift(v, TOP - 12)))
        odd = tl.join(
            tl.join(_shift(v, TOP - 2), _shift(v, TOP - 10)), tl.join(_shift(v, TOP - 6), _shift(v, TOP - 14))
        )
        v = tl.join(even, odd)
    else:
        v = tl.join(
            tl.join(_shift(v, TOP), _shift(v, TOP - 2 * BITS)),
            tl.join(_shift(v, TOP - BITS), _shift(v, TOP - 3 * BITS)),
        )
    v = (v & MASK) | MAGIC
    low = v.to(tl.int16).to(TYPE, bitcast=True)
    high = (v >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (BN, BK))


@triton.jit
def code_at(row, index, mask, words, BITS: tl.constexpr):
    """Single codes of streams: int32, the shape of ``row + index``.

    Args:
        row: int32 pointers to the streams' first words.
        index: Which code.
        mask: Where to read; zero elsewhere.
        words: Words per stream.
        BITS: Code width.
    """
    bit = index * BITS
    at = bit // 32
    shift = bit % 32
    low = tl.load(row + at, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS != 0:
        # the low word may hold the first bits only; a shift by 32 is undefined, so it goes in two steps
        straddles = mask & (shift + BITS > 32) & (at + 1 < words)
        high = tl.load(row + at + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        low = low | ((high << (31 - shift).to(tl.uint32)) << 1)
    return (low & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def weight_tile(
    weight,
    scale,
    zero,
    rows,
    valid,
    first,
    columns,
    words,
    groups,
    zero_words,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Weights ``scale * (code - zero)`` of ``BN`` rows and ``BK`` columns, rounded to the compute type: any group size.

    Args:
        weight: Base pointer, int32, or of the dense weight when ``BITS`` is 16.
        scale: Base pointer, fp16 ``[rows, groups]``.
        zero: Base pointer, int32 ``[rows, zero_words]``.
        rows: int64 ``[BN]``.
        valid: ``[BN]`` mask of rows.
        first: First column, a multiple of 32.
        columns: K.
        words: Words per row.
        groups: Groups per row.
        zero_words: Words per row of zero points.
        GROUP: Columns per group.
        BITS: 2, 3, 4, 8, or 16 for a dense weight.
        HAS_ZERO: Zero points are stored; otherwise the midpoint.
        BN: Rows.
        BK: Columns.
        COMPUTE: Type of the dot's operands.

    Returns:
        ``[BN, BK]`` in the compute type.
    """
    k = first + tl.arange(0, BK)
    if BITS == 16:
        inside = valid[:, None] & (k < columns)[None, :]
        w = tl.load(weight + rows[:, None] * columns + k[None, :], mask=inside, other=0.0).to(COMPUTE)
    else:
        codes = codes_tile(weight + rows * words, valid, first, words, BITS, False, BN, BK)
        group = k // GROUP
        known = valid[:, None] & (group < groups)[None, :]
        s = tl.load(scale + rows[:, None] * groups + group[None, :], mask=known, other=0.0)  # fp16
        if HAS_ZERO:
            centred = codes - code_at((zero + rows * zero_words)[:, None], group[None, :], known, zero_words, BITS)
        else:
            centred = codes - (1 << (BITS - 1))
        if COMPUTE == tl.float16:
            # |code - zero| <= 255 is exact in fp16, so the product is rounded once, like the definition's
            w = centred.to(tl.float16) * s
        else:
            w = (centred.to(tl.float32) * s.to(tl.float32)).to(COMPUTE)
    return w


@triton.jit
def tile_step(
    acc,
    a,
    sums,
    weight,
    scale,
    zero,
    rows,
    valid,
    first,
    columns,
    words,
    groups,
    zero_words,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PAIR_TYPE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Multiply one tile of columns and add it to fp32 sums.

    Args:
        acc: fp32 ``[BN, BM]``.
        a: Activations ``[BM, BK]``, in pair order if ``PAIR_TYPE`` is given.
        sums: fp32 ``[BM]``, sums of ``a`` over the columns.
        weight: Base pointer, int32; of the dense weight when ``BITS`` is 16.
        scale: Base pointer, fp16 ``[rows, groups]``.
        zero: Base pointer, int32 ``[rows, zero_words]``.
        rows: int64 ``[BN]``.
        valid: ``[BN]`` mask of rows.
        first: First column, a multiple of ``BK``.
        columns: K.
        words: Words per row.
        groups: Groups per row.
        zero_words: Words per row of zero points.
        GROUP: Columns per group.
        BITS: 2, 3, 4, 8, or 16 for a dense weight.
        HAS_ZERO: Zero points are stored; otherwise the midpoint.
        EVEN: Nothing lies beyond the matrix, so nothing is masked.
        ONE_GROUP: ``GROUP`` is a multiple of ``BK`` or the whole row; else :func:`weight_tile` serves.
        BN: Rows.
        BK: Columns.
        COMPUTE: Type of the dot's operands.
        PAIR_TYPE: 16-bit type of :func:`pair_tile`; None converts codes to ``COMPUTE`` in the order of columns.
        SCALED: Scale the weights, two packed instructions for two of them, instead of the sums of every token.

    Returns:
        ``acc`` with ``scale * (a . code - zero * sums)`` added.
    """
    if not ONE_GROUP:
        w = weight_tile(
            weight, scale, zero, rows, valid, first, columns, words, groups, zero_words, GROUP,
            BITS, HAS_ZERO, BN, BK, COMPUTE,
        )  # fmt: skip
        acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
    else:
        group = tl.zeros_like(rows).to(tl.int32) + first // GROUP
        known = valid & (group < groups)
        if EVEN:
            s = tl.load(scale + rows * groups + group).to(tl.float32)
        else:
            s = tl.load(scale + rows * groups + group, mask=known, other=0.0).to(tl.float32)
        if HAS_ZERO:
            offset = code_at(zero + rows * zero_words, group, known, zero_words, BITS).to(tl.float32)
        else:
            offset = tl.full((BN,), 1 << (BITS - 1), tl.float32)
        row = weight + rows * words
        if PAIR_TYPE is None:
            w = codes_tile(row, valid, first, words, BITS, EVEN, BN, BK).to(tl.float32).to(COMPUTE)
        else:
            w = pair_tile(row, valid, first, words, BITS, EVEN, BN, BK, PAIR_TYPE).to(COMPUTE)
            offset += 1 << BITS
        if SCALED:
            w = (w - offset.to(COMPUTE)[:, None]) * s.to(COMPUTE)[:, None]
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
        else:
            part = tl.dot(w, tl.trans(a), input_precision="ieee")
            acc += s[:, None] * (part - offset[:, None] * sums[None, :])
    return acc


@triton.jit
def activation_tile(
    row,
    valid,
    first,
    columns,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
    REORDER: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Load activations ``[BM, BK]`` and the sums that :func:`tile_step` needs.

    Args:
        row: Pointers ``[BM]`` to the tokens' rows.
        valid: ``[BM]`` mask of tokens.
        first: First column.
        columns: K.
        BITS: Width of the codes they meet.
        EVEN: No column lies beyond the matrix.
        ONE_GROUP: Whether sums are needed.
        BM: Tokens.
        BK: Columns.
        COMPUTE: Type of the dot's operands.
        REORDER: Bring the columns into pair order.
        SCALED: No sums are needed.
    """
    k = first + tl.arange(0, BK)
    inside = valid[:, None]
    if not EVEN:
        inside = inside & (k < columns)[None, :]
    a = tl.load(row[:, None] + k[None, :], mask=inside, other=0.0).to(COMPUTE)
    sums = tl.zeros((BM,), tl.float32)
    if ONE_GROUP:
        if not SCALED:
            sums = tl.sum(a.to(tl.float32), 1)
        if REORDER:
            a = pair_order(a, BITS, BM, BK)
    return a, sums
