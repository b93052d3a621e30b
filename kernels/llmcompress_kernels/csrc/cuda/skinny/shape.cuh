// Sizes, shared memory, and how codes become numbers.
#pragma once

#include "call.h"

namespace llmcompress::skinny {

constexpr int LANES = 32, TILE = 8;
constexpr int SUMS_BYTES = 8 * TILE; // two sums of a span's activations for 8 slots
// warps of a block: 16 share the registers of a multiprocessor at 128 each, which 16 slots at once outgrow
template <int NT> constexpr int MOST_WARPS = NT == 1 ? 16 : 12;
constexpr int STRIP = 32;           // rows of a warp; GATE_UP: 16 gates, then their 16 ups
constexpr uint16_t NONE = 0xFFFF;   // job of a slot that is skipped

template <int BITS> struct Shape {
    static constexpr int PAIRS = BITS == 2 ? 8 : 4;      // pairs of codes that a lane takes at once
    static constexpr int UNIT = 8 * PAIRS;               // columns that four lanes take at once
    static constexpr int UNITS = 8;                      // of a step
    static constexpr int COLUMNS = UNITS * UNIT;
    static constexpr int UNIT_BYTES = UNIT * BITS / 8;
    static constexpr int ROW_BYTES = COLUMNS * BITS / 8; // of a step
    static constexpr int STRIDE = ROW_BYTES + 16;        // 8 rows x 4 lanes then meet 32 different banks
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int COPIES = STRIP * CHUNKS / LANES; // of a lane, for a step
    static constexpr int X_BYTES = 2 * COLUMNS;          // of a token, for a step
    static constexpr int X_PAD = BITS == 2 ? 16 : 64;    // 8 lanes, of two tokens, then meet 32 different banks
};

// Where in the mantissa, counted from its lower end or (fp16) from bit 3, code I of half a word is read, and what the
// number there exceeds the code by, as a power of two.
template <int BITS> __host__ __device__ constexpr int position_of(int i) { return i % (7 / BITS) * BITS; }
template <int BITS> __host__ __device__ constexpr int excess_of(int i) { return 7 - position_of<BITS>(i); }

// Two numbers 2^e in a 16-bit type.
template <bool BF16> __host__ __device__ constexpr uint32_t powers(int e) {
    return (BF16 ? uint32_t(127 + e) << 7 : uint32_t(15 + e) << 10) * 0x10001u;
}

// The codes at bit BIT of both halves of a word as two numbers 2^e + code in a 16-bit type, read at POSITION.
template <int BITS, bool BF16, int POSITION, int BIT> __device__ __forceinline__ uint32_t numbers(uint32_t v) {
    constexpr int AT = POSITION + (BF16 ? 0 : 3), BY = BIT - AT;
    constexpr uint32_t CODE = ((1u << BITS) - 1) << AT, EXPONENT = BF16 ? (127u + 7 - AT) << 7 : (15u + 10 - AT) << 10;
    const uint32_t moved = BY >= 0 ? v >> (BY >= 0 ? BY : 0) : v << (BY < 0 ? -BY : 0);
    return mask_set(moved, CODE * 0x10001u, EXPONENT * 0x10001u);
}

// Number I of the pairs of a lane's codes.
template <int BITS, bool BF16, int I> __device__ __forceinline__ uint32_t pair_of(uint32_t v) {
    return numbers<BITS, BF16, position_of<BITS>(I), I * BITS>(v);
}

// The codes of a lane, two in every bit position of the halves of a word. `row` points at the unit's first word.
template <int BITS> __device__ __forceinline__ uint32_t codes_of(const unsigned char* row, int t) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    if constexpr (BITS == 3) {
        // 8 codes are 24 bits, which begin at 0, 24, 16 and 8 of words 0, 0, 1 and 2
        const int bit = 24 * t, at = bit >> 5;
        const uint32_t v = funnel(words[at], words[at < 2 ? at + 1 : 2], bit & 31);
        return (v & 0xFFFu) | ((v << 4) & ~0xFFFu); // codes 4 to 7 into the upper half; bits above them stay
    } else {
        return words[t];
    }
}

} // namespace llmcompress::skinny
