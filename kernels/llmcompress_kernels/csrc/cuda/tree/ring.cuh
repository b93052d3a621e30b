// How codes and scales come: a warp's own part of shared memory, kept full by asynchronous copies.
#pragma once

#include "shape.cuh"

namespace llmcompress::gpu {

// A step is 128 bytes of each row of a strip; a node's scales of the slab come with its first step. No more nodes than steps
// are on their way, so both have as many places.
template <class S> struct Ring {
    const TreeCall& call;
    SharedAddress base; // of this warp
    int lane, first, groups; // groups of the slab from `first` on
    int step = 0, scales = 0; // places that are filled next
    Position at;              // what is fetched next
    int steps;                // how many are left
    int to[2];                // places of this lane's piece in rows four apart
    int far, left;            // bytes from one of the lane's rows to the next; pieces of a row that are left of the node
    bool whole;               // all rows are there, and all pieces
    int from, scale_from;     // of 16 bytes to the lane's first row at one bit, of 4 to its first scales
    const unsigned char* words;

    __device__ Ring(const TreeCall& c, SharedAddress memory, int l, int f, int g, const Position& begin, int count)
        : call(c), base(memory), lane(l), first(f), groups(g), at(begin), steps(count) {
        const int row = lane / 8;
        to[0] = anew(row * STEP_BYTES + (lane % 8 ^ turned(row)) * 16);
        to[1] = anew((row + 4) * STEP_BYTES + (lane % 8 ^ turned(row + 4)) * 16);
        if (steps > 0) enter(), open();
    }

    // Scales of a row's slab lie at 16 bytes.
    __device__ __forceinline__ bool eights() const { return call.groups % SLAB == 0; }

    // Another strip. The host sees to it that numbers of groups stay below 2^31.
    __device__ __forceinline__ void enter() {
        const int row = at.strip * S::ROWS;
        from = (row + lane / 8) * call.groups + first;
        whole = row + S::ROWS <= call.rows && groups == SLAB;
        scale_from = eights() ? ((row + lane % S::ROWS) * call.groups + first) / 2 : ((row + lane / 4) * call.groups + first) / 2 + lane % 4;
    }

    // Another node.
    __device__ __forceinline__ void open() {
        const TreeNode& node = call.node[at.node];
        const int bits = node.bits, by = bits / 2;
        words = node.words + (int64_t(from) << (4 + by)) + (at.part * STEP_BYTES + lane % 8 * 16);
        far = call.columns / 2 << by;
        left = groups * bits - at.part * (STEP_BYTES / 16);
        const auto* begin = reinterpret_cast<const unsigned char*>(node.scale) + int64_t(scale_from) * 4;
        const SharedAddress target = base + S::STAGES * S::CODES + scales * S::SCALES;
        if (eights()) {
            if (lane < S::ROWS && (whole || at.strip * S::ROWS + lane < call.rows)) copy_async<0>(target + 16 * lane, begin);
        } else {
            word<0>(target + lane / 4 * 16 + lane % 4 * 4, begin);
        }
        scales = scales == S::STAGES - 1 ? 0 : scales + 1;
    }

    template <int I> __device__ __forceinline__ void word(SharedAddress target, const unsigned char* begin) const {
        if (whole || (lane % 4 * 2 < groups && at.strip * S::ROWS + 8 * I + lane / 4 < call.rows)) copy_word_async<I * 128>(target, begin);
        if constexpr (I + 1 < S::ROWS / 8) word<I + 1>(target, begin + 16 * call.groups);
    }

    // Rows beyond the matrix are not filled: their sums go nowhere.
    template <int I, bool ALL> __device__ __forceinline__ void piece(SharedAddress target, const unsigned char* begin) const {
        if (ALL || at.strip * S::ROWS + 4 * I + lane / 8 < call.rows) copy_async<I / 2 * 8 * STEP_BYTES>(target + to[I % 2], begin);
        if constexpr (I + 1 < S::ROWS / 4) piece<I + 1, ALL>(target, begin + far);
    }

    // Start copying the next step.
    __device__ __forceinline__ void fetch() {
        if (steps > 0) {
            if (left <= 0) next();
            const SharedAddress target = base + step * S::CODES;
            if (whole) piece<0, true>(target, words);
            else if (lane % 8 < left) piece<0, false>(target, words);
            words += STEP_BYTES, left -= STEP_BYTES / 16, --steps;
        }
        commit();
        step = step == S::STAGES - 1 ? 0 : step + 1;
    }

    __device__ __forceinline__ void next() {
        at.part = 0;
        if (++at.node == call.nodes) {
            at.node = 0, ++at.strip;
            enter();
        }
        open();
    }
};

} // namespace llmcompress::gpu
