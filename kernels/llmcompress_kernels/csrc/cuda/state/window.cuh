// What a state update within replay windows adds: which sequences are due, and the rows of a window in shared memory.
#pragma once

#include "call.h"

namespace llmcompress::gpu {

constexpr int MOST_ROWS = 15; // of a window

// Sequences whose windows are full, in order. Every warp finds them for itself, 32 at a time.
struct Due {
    int first = -32, before = 0; // the 32 that are looked at, and how many are due in front of them
    uint32_t due = 0;            // which of the 32

    // The one with `rank` others in front of it, or -1; all lanes of the warp, ranks never fall.
    __device__ int find(const ReplayCall& call, int rank) {
        const int lane = thread_again() % 32;
        while (rank - before >= count_of(due)) {
            before += count_of(due), first += 32;
            if (first >= call.sequences) return -1;
            const int sequence = first + lane;
            due = ballot(sequence < call.sequences && call.count[sequence] >= call.rows);
        }
        uint32_t left = due;
        for (int skip = rank - before; skip > 0; --skip) left &= left - 1;
        return first + first_of(left);
    }
};

// Whether one of the sequences that this thread looks at is due; the threads of a block look at all.
__device__ __forceinline__ bool any_due(const ReplayCall& call, int thread, int threads) {
    bool found = false;
#pragma unroll 8
    for (int sequence = thread; sequence < call.sequences; sequence += threads) found |= call.count[sequence] >= call.rows;
    return found;
}

// Where the drives, decay and b of a head are in a row of a window in global memory.
struct RecentRow {
    int x, decay, b;
    template <int P, int N> static __device__ RecentRow of(const ReplayCall& call, int head, int group) {
        return {head * P, call.heads * P + head, call.heads * (P + 1) + group * N};
    }
};

__device__ __forceinline__ float* recent_rows(const ReplayCall& call, int sequence) {
    return call.recent + int64_t(sequence) * call.rows * call.width;
}

// The same for one head in shared memory.
template <int P, int N> struct KeptRow {
    static constexpr int BYTES = 4 * (P + N) + 16; // what is copied begins at 16 bytes
    unsigned char* at;
    __device__ __forceinline__ float* x() const { return reinterpret_cast<float*>(at); }
    __device__ __forceinline__ float* b() const { return x() + P; }
    __device__ __forceinline__ float decay() const { return x()[P + N]; }
};

// Start copying the rows of a unit's window, a row by a warp.
template <int P, int N, int THREADS, class U>
__device__ __forceinline__ void fetch_kept(const ReplayCall& call, const U& unit, unsigned char* to, int thread) {
    constexpr int PIECES = (P + N) / 4, WARPS = THREADS / 32;
    const RecentRow place = RecentRow::of<P, N>(call, unit.head, unit.shared - unit.sequence * call.groups);
    const float* from = recent_rows(call, unit.sequence);
    const int lane = thread % 32, first = thread / 32;
    if (thread < call.rows)
        copy_word_async(to + thread * KeptRow<P, N>::BYTES + 4 * (P + N), from + thread * call.width + place.decay);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece += 32) {
        if (piece + lane >= PIECES) break;
        const int column = piece + lane < P / 4 ? place.x + 4 * (piece + lane) : place.b + 4 * (piece + lane) - P;
        const float* source = from + first * call.width + column;
        unsigned char* target = to + first * KeptRow<P, N>::BYTES + 16 * (piece + lane);
#pragma unroll 1
        for (int row = first; row < call.rows; row += WARPS) {
            copy_async(target, source);
            source += WARPS * call.width, target += WARPS * KeptRow<P, N>::BYTES;
        }
    }
}

} // namespace llmcompress::gpu
