// Sizes of a launch, where things lie in a block's shared memory, and codes of 2 and 4 bits as numbers.
#pragma once

#include "call.h"

namespace llmcompress::gpu {

// A slab is the columns of 8 groups, whose codes are 128 bytes a bit in every row.
constexpr int GROUP = 128, SLAB = 8, STEP_BYTES = 128, TILE = 8;
// Of one token's activations of a group as bits: 16 of each of 128, then what a count is multiplied by and what is added.
constexpr int RECORD = 256 + 32;

// SPREAD: the warp that brings the last part of a strip adds them up, while others still multiply; else the last block adds those
// of all its strips.
template <bool BF16_, int NT_, int MT_, int WARPS_, int STAGES_, int HELD_, bool SPREAD_ = false> struct TreeShape {
    static constexpr bool BF16 = BF16_, SPREAD = SPREAD_;
    static constexpr int NT = NT_, MT = MT_, WARPS = WARPS_, STAGES = STAGES_, HELD = HELD_, THREADS = 32 * WARPS, ROWS = 16 * MT;
    static constexpr int MANTISSA = BF16 ? 7 : 10, BIAS = BF16 ? 127 : 15;
    static constexpr int CODES = ROWS * STEP_BYTES, SCALES = ROWS * 2 * SLAB;
    // a warp's ring: codes of as many steps, scales of as many nodes
    static constexpr int RING = STAGES * (CODES + SCALES), RECORDS = WARPS * RING;
    // operands of one width and group for all tokens; sums of as many
    static constexpr int OPERANDS = NT * 2048, SUMS = NT * TILE * 4;
    // floats of a strip's sums
    static constexpr int PART = MT * NT * 128;
    // Where what products of BITS take begins, behind the records of those that count.
    __host__ __device__ static constexpr int wide(int tokens, int forms, int bits) {
        const int before = (bits > 1 ? forms & 1 : 0) + (bits > 2 ? forms >> 1 & 1 : 0) + (bits > 4 ? forms >> 2 & 1 : 0);
        return RECORDS + (forms & COUNTS ? tokens * SLAB * RECORD : 0) + before * SLAB * (OPERANDS + SUMS);
    }
    __host__ __device__ static constexpr int bytes(int tokens, int forms) { return wide(tokens, forms, 8); }
};

// Number I of the pairs of codes of a word as two numbers, 2^b + code each.
template <class S, int BITS, int I> __device__ __forceinline__ uint32_t pair_of(uint32_t v) {
    constexpr int TOP = S::MANTISSA - BITS, BY = TOP - BITS * I;
    constexpr uint32_t ONE = ((1u << BITS) - 1) << TOP, BASE = uint32_t(S::BIAS + BITS) << S::MANTISSA;
    const uint32_t moved = BY >= 0 ? v << (BY >= 0 ? BY : 0) : v >> (BY < 0 ? -BY : 0);
    return mask_set(moved, ONE * 0x10001u, BASE * 0x10001u);
}

// What pair_of adds to a code, and the middle of the grid.
template <int BITS> __device__ __forceinline__ constexpr float offset_of() { return float(1 << BITS) + float((1 << BITS) - 1) / 2; }

// Steps of a node in a slab of so many groups.
__device__ __forceinline__ int steps_of(int groups, int bits) { return (groups * bits + 7) / 8; }

// Where piece p of 16 bytes of a row lies among the row's eight: p ^ turned(row). Rows one apart lie in different halves, and
// eight rows in different places.
__device__ __forceinline__ constexpr int turned(int row) { return (row & 1) << 2 | (row & 2) | (row >> 2 & 1); }

} // namespace llmcompress::gpu
