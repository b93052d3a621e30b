// Weights in spans of 128 columns, over which a scale is the same: sizes, shared memory, and how codes become numbers.
#pragma once

#include "jobs.cuh"

namespace llmcompress::skinny {

constexpr int SPAN = 128;     // columns
constexpr int SPAN_PAIRS = 16; // pairs of codes of a lane in a span: it owns 32 neighbouring columns
constexpr int PART = STRIP + 4; // numbers from one slot's sums to the next one's: 4 lanes of 8 rows then meet 32 banks

constexpr int STRIP_WARPS = 8; // most warps of a block that takes whole strips, for their registers

template <int BITS> struct Span {
    static constexpr int SPANS = 4; // of a step
    static constexpr int COLUMNS = SPANS * SPAN;
    static constexpr int BYTES = SPAN * BITS / 8;
    static constexpr int ROW_BYTES = SPANS * BYTES; // of a step
    static constexpr int GROUPS = ROW_BYTES / 64;   // four lanes copy 64 bytes of a row at a time
    static constexpr int PITCH = BITS == 3 ? ROW_BYTES + 16 : ROW_BYTES;
    static constexpr int X_BYTES = 2 * COLUMNS; // of a token, for a step
    static constexpr int X_PAD = 64;            // 8 lanes, of two tokens, then meet 32 different banks
    static constexpr int STAGE = STRIP * PITCH + 8 * STRIP * SPANS;

    // Where in a row of a stage the 64 bytes of a group lie, and within them a lane's 16: rows of 128 or 256 bytes begin in
    // the same bank, so that parts of every second row, or of three rows of four, change places.
    static __device__ __forceinline__ int piece_at(int row, int group, int lane) {
        if (BITS == 3) return 64 * group + 16 * lane;
        if (BITS == 4) return 64 * (group ^ (row & 1)) + 16 * lane;
        return 64 * (group ^ (row >> 1 & 1)) + 16 * (lane ^ (2 * (row & 1)));
    }

    // Columns of pair p of a lane: the codes of both lie 16 bits apart in a word, or 48 in the three words of 3 bits.
    static constexpr int APART = BITS == 4 ? 4 : BITS == 2 ? 8 : 16;
    static __host__ __device__ constexpr int column_of(int p) { return p / APART * 2 * APART + p % APART; }
};

// Where in the mantissa the code of a pair is read, as in position_of.
template <int BITS> __host__ __device__ constexpr int span_position_of(int p) {
    constexpr int OF_3[16] = {0, 3, 0, 3, 0, 3, 2, 0, 3, 0, 3, 1, 4, 0, 3, 0};
    return BITS == 4 ? 0 : BITS == 2 ? p % 8 % 3 * 2 : OF_3[p];
}
template <int BITS> __host__ __device__ constexpr int span_excess_of(int p) { return 7 - span_position_of<BITS>(p); }

// The 32 codes of a lane in a row.
template <int BITS> struct Codes {
    static constexpr int WORDS = BITS == 3 ? 5 : BITS;
    uint32_t at[WORDS];

    // `from`: the lane's words in shared memory
    __device__ __forceinline__ void load(const unsigned char* from) {
        if constexpr (BITS == 4) {
            const Words w = *reinterpret_cast<const Words*>(from);
#pragma unroll
            for (int i = 0; i < 4; ++i) at[i] = w.at[i];
        } else if constexpr (BITS == 2) {
            const Two w = *reinterpret_cast<const Two*>(from);
            at[0] = bits_of(w.x), at[1] = bits_of(w.y);
        } else {
            const auto* w = reinterpret_cast<const uint32_t*>(from);
            const uint32_t a = w[0], b = w[1], c = w[2];
            // code j of the lower halves lies 3 j bits into 48, code j + 16 in the same place of the upper halves
            at[0] = permute(a, b, 0x7610), at[1] = permute(a, c, 0x5432), at[2] = permute(b, c, 0x7610);
            // codes 4 and 5, 9 and 10, of which one begins in one half and ends in the next
            at[3] = (at[0] >> 12 & 0x000F000Fu) | (at[1] << 4 & ~0x000F000Fu);
            at[4] = (at[1] >> 11 & 0x001F001Fu) | (at[2] << 5 & ~0x001F001Fu);
        }
    }

    // Pair P, as two numbers 2^e + code in a 16-bit type.
    template <bool BF16, int P> __device__ __forceinline__ uint32_t pair() const {
        constexpr int WORD_OF_3[16] = {0, 0, 0, 0, 3, 3, 1, 1, 1, 4, 4, 2, 2, 2, 2, 2};
        constexpr int BIT_OF_3[16] = {0, 3, 6, 9, 0, 3, 2, 5, 8, 0, 3, 1, 4, 7, 10, 13};
        constexpr int WORD = BITS == 3 ? WORD_OF_3[P] : P / Span<BITS>::APART, BIT = BITS == 3 ? BIT_OF_3[P] : P % Span<BITS>::APART * BITS;
        return numbers<BITS, BF16, span_position_of<BITS>(P), BIT>(at[WORD]);
    }
};

// Where in shared memory of a block things lie; the number of jobs lies in front.
template <int BITS, int NT> struct Places {
    int count, before, job_expert, owner, job_of, place, list, x, parts, part, results, stages, bytes;

    explicit Places(const Call& call) {
        const int slots = call.mode == DENSE ? 0 : call.tokens * call.slots, experts = call.mode == DENSE ? 0 : call.experts;
        int most_jobs = experts + slots / call.at_once;
        if (most_jobs > slots) most_jobs = slots;
        parts = place_jobs<NT>(*this, slots, experts, most_jobs, 16);
        part = 4 * PART * call.at_once; // of a warp
        results = parts + call.warps * part;
        x = results + (call.mode == DOWN ? 4 * STRIP * call.teams * slots : 0);
        stages = x + call.room;
        bytes = stages + call.warps * call.stages * Span<BITS>::STAGE;
    }
};

// What a launch by whole strips is told.
template <int BITS, int NT> struct Task : Call {
    Places<BITS, NT> places;
    explicit Task(const Call& call) : Call(call), places(call) {}
};

} // namespace llmcompress::skinny
