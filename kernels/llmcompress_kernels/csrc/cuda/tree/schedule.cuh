// Which steps of a launch are whose.
#pragma once

#include "shape.cuh"

namespace llmcompress::gpu {

// A step of a slab: strip of rows, node, and which 128 bytes of its rows.
struct Position { int strip, node, part; };

// The steps of a block's strips are numbered: strips, their nodes, their parts. Its warps take equal runs of them.
struct Schedule {
    int first, count, steps, warps; // strips of the block, steps of each

    __device__ Schedule(const TreeCall& call, int block, int slab, int w) : warps(w) {
        first = int(int64_t(call.strips) * block / call.blocks);
        count = int(int64_t(call.strips) * (block + 1) / call.blocks) - first;
        steps = slab + 1 == call.slabs ? call.last_steps : call.steps;
    }

    // The host sees to it that these products stay below 2^32.
    __device__ int begin(int warp) const { return int(unsigned(count) * unsigned(steps) * unsigned(warp) / unsigned(warps)); }

    // Warps that begin within a strip, after its first step: from the first of them up to the second.
    __device__ int first_within(int strip) const {
        const unsigned all = unsigned(count) * unsigned(steps);
        return int((unsigned(strip) * unsigned(steps) * unsigned(warps) + unsigned(warps) + all - 1) / all);
    }
    __device__ int end_within(int strip) const { return ((strip + 1) * warps + count - 1) / count; }

    __device__ Position place(const TreeCall& call, int groups, int number) const {
        Position at{first + number / steps, 0, number % steps};
        for (;; ++at.node) {
            const int parts = steps_of(groups, call.node[at.node].bits);
            if (at.part < parts) return at;
            at.part -= parts;
        }
    }
};

} // namespace llmcompress::gpu
