// How codes and scales come: a warp's own part of shared memory, kept full by asynchronous copies.
#pragma once

#include "shape.cuh"

namespace llmcompress::gpu {

template <class S> struct Ring {
    const TreeCall& call;
    unsigned char* stages; // of this warp
    int lane, first, groups; // groups of the slab from `first` on
    int next = 0;            // stage that is filled next
    int strip, end, node = 0, part = 0, parts = 0; // what is fetched next, and steps of the node at hand
    int to[2];         // places of this lane's piece in rows four apart
    int64_t from;      // bytes of the piece's row at one bit, and of the slab's begin
    const unsigned char* words;

    __device__ Ring(const TreeCall& c, unsigned char* memory, int warp, int l, int begin, int e) : call(c), lane(l), strip(begin), end(e) {
        stages = memory + warp * S::STAGES * S::STAGE;
        first = int(blockIdx.y) * SLAB;
        groups = call.groups - first < SLAB ? call.groups - first : SLAB;
        const int row = lane / 8;
        to[0] = row * STEP_BYTES + (lane % 8 ^ turned(row)) * 16;
        to[1] = (row + 4) * STEP_BYTES + (lane % 8 ^ turned(row + 4)) * 16;
        enter();
    }

    // Another strip.
    __device__ __forceinline__ void enter() {
        from = int64_t(strip * S::ROWS + lane / 8) * (call.columns / 8) + first * 16;
        node = 0;
        open();
    }
    // Another node.
    __device__ __forceinline__ void open() {
        const TreeNode& at = call.node[node];
        words = at.words + from * at.bits + lane % 8 * 16;
        part = 0, parts = steps_of(at.bits);
    }
    __device__ __forceinline__ int steps_of(int bits) const { return (groups * bits + 7) / 8; }

    // Start copying 128 bytes of each row, or what is left of them, and their scales, and go on. Rows beyond the matrix are
    // not filled: their sums go nowhere.
    __device__ __forceinline__ void fetch() {
        if (strip < end) {
            unsigned char* target = stages + next * S::STAGE;
            const TreeNode& at = call.node[node];
            const int bits = at.bits, row = strip * S::ROWS;
            const int64_t stride = int64_t(call.columns / 2) * bits; // of four rows
            if (lane % 8 < groups * bits - part * 8) {
                const unsigned char* piece = words + part * STEP_BYTES;
#pragma unroll
                for (int i = 0; i < S::ROWS / 4; ++i) {
                    if (row + 4 * i + lane / 8 < call.rows) copy_async(target + to[i % 2] + i / 2 * 8 * STEP_BYTES, piece);
                    piece += stride;
                }
            }
            scales(at, target + S::CODES, row, bits);
            if (++part == parts) {
                if (++node == call.nodes) {
                    strip += S::WARPS;
                    if (strip < end) enter();
                } else {
                    open();
                }
            }
        }
        commit();
        next = next == S::STAGES - 1 ? 0 : next + 1;
    }

    // Scales of a row lie at 16 bytes of its own.
    __device__ __forceinline__ void scales(const TreeNode& at, unsigned char* target, int row, int bits) const {
        const int of_step = SLAB >> bits / 2, group = part * of_step;
        const uint16_t* from = at.scale + int64_t(row) * call.groups + first + group;
        if (bits == 1 && call.groups % SLAB == 0) {
            if (lane < S::ROWS && row + lane < call.rows) copy_async(target + 16 * lane, from + lane * call.groups);
            return;
        }
        const int words_of = of_step / 2, left = (groups - group) / 2;
#pragma unroll
        for (int i = 0; i < S::ROWS * 4; i += 32) {
            const int r = (i + lane) / words_of, word = (i + lane) % words_of;
            if (r < S::ROWS && row + r < call.rows && word < left) copy_word_async(target + 16 * r + 4 * word, from + r * call.groups + 2 * word);
        }
    }
};

} // namespace llmcompress::gpu
