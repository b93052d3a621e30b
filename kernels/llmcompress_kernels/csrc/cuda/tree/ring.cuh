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
    int strip, end, node = -1, left = 0; // what is fetched next, and pieces of a row that are left of the node
    int to[2];             // places of this lane's piece in rows four apart
    int far = 0;           // bytes from one of the lane's rows to the next
    unsigned there;        // which of them are rows of the matrix, then which of its scales are
    int64_t from;          // bytes to the lane's first row at one bit
    int64_t scale_from;
    const unsigned char* words;

    __device__ Ring(const TreeCall& c, unsigned char* memory, int warp, int l, int begin, int e) : call(c), lane(l), strip(begin), end(e) {
        base = shared_address(memory + warp * S::RING);
        first = int(blockIdx.y) * SLAB;
        groups = call.groups - first < SLAB ? call.groups - first : SLAB;
        const int row = lane / 8;
        to[0] = anew(row * STEP_BYTES + (lane % 8 ^ turned(row)) * 16);
        to[1] = anew((row + 4) * STEP_BYTES + (lane % 8 ^ turned(row + 4)) * 16);
        if (strip < end) enter();
    }

    __device__ __forceinline__ bool whole_scales() const { return call.groups % SLAB == 0; }

    // Another strip.
    __device__ __forceinline__ void enter() {
        const int row = strip * S::ROWS;
        from = int64_t(row + lane / 8) * (call.columns / 8) + first * 16;
        there = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS / 4; ++i) there |= unsigned(row + 4 * i + lane / 8 < call.rows) << i;
        if (whole_scales()) {
            // 16 bytes of a row
            scale_from = (int64_t(row + lane) * call.groups + first) * 2;
            there |= unsigned(lane < S::ROWS && row + lane < call.rows) << 8;
        } else {
            // or 4 of every eighth
            scale_from = (int64_t(row + lane / 4) * call.groups + first + lane % 4 * 2) * 2;
#pragma unroll
            for (int i = 0; i < S::ROWS / 8; ++i)
                there |= unsigned(lane % 4 * 2 < groups && row + 8 * i + lane / 4 < call.rows) << (8 + i);
        }
    }

    // Another node.
    __device__ __forceinline__ void open() {
        const TreeNode& at = call.node[node];
        words = at.words + from * at.bits + lane % 8 * 16;
        far = anew(call.columns / 2 * at.bits);
        left = groups * at.bits;
        const auto* begin = reinterpret_cast<const unsigned char*>(at.scale) + scale_from;
        const SharedAddress target = base + S::STAGES * S::CODES + scales * S::SCALES;
        if (whole_scales()) {
            if (there >> 8 & 1) copy_async<0>(target + 16 * lane, begin);
        } else {
            word<0>(target + lane / 4 * 16 + lane % 4 * 4, begin);
        }
        scales = scales == S::STAGES - 1 ? 0 : scales + 1;
    }

    template <int I> __device__ __forceinline__ void word(SharedAddress target, const unsigned char* begin) const {
        if (there >> (8 + I) & 1) copy_word_async<I * 128>(target, begin);
        if constexpr (I + 1 < S::ROWS / 8) word<I + 1>(target, begin + 16 * call.groups);
    }

    template <int I> __device__ __forceinline__ void piece(SharedAddress target, const unsigned char* at) const {
        if (there >> I & 1) copy_async<I / 2 * 8 * STEP_BYTES>(target + to[I % 2], at);
        if constexpr (I + 1 < S::ROWS / 4) piece<I + 1>(target, at + far);
    }

    // Start copying the next step. Rows beyond the matrix are not filled: their sums go nowhere.
    __device__ __forceinline__ void fetch() {
        if (strip < end && left <= 0) next();
        if (strip < end) {
            if (lane % 8 < left) piece<0>(base + step * S::CODES, words);
            words += STEP_BYTES, left -= STEP_BYTES / 16;
        }
        commit();
        step = step == S::STAGES - 1 ? 0 : step + 1;
    }

    __device__ __forceinline__ void next() {
        if (++node == call.nodes) {
            node = 0, strip += S::WARPS;
            if (strip >= end) return;
            enter();
        }
        open();
    }
};

} // namespace llmcompress::gpu
