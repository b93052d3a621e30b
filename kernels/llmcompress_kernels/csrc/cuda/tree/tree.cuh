// Models of one residual tree in one launch: y[t] = sum over the nodes above token t of W x[t], each node read once.
//
// Almost all bytes are leaves of 1 bit, of which each serves few tokens, so 1-bit codes must cost little: an H200 issues 0.85
// instructions of a thread per 1-bit weight while 4.3 TB/s of them arrive, and 0.95 with the scales. To make numbers of them
// for mma.m16n8k16 took 0.7 and left seven of the eight columns of tokens idle. So the leaf's codes stay bits, and its token
// becomes bits: an activation, as fixed point of 16 bits with the group's largest one at the top, is 16 columns of
// mma.m16n8k128 on single bits, which counts in one instruction where 128 codes and 128 bits of 8 columns are both set. A
// group of 16 rows takes two of them, with the stored words as they are. Each lane gets four neighbouring bits' counts of two
// rows; shifted and added they are the last places of a float, times the scale they enter the lane's sum, and the lanes of a
// row meet once per node. Fixed point is off by at most 2^-16 of the group's largest activation, which against the rounding
// of bf16 results is nothing; what is no number makes the group's results none.
//
// Nodes of 2 and 4 bits, and of 1 bit with more than four tokens, multiply: codes of b bits become the numbers 2^b + code, and
// the sum begins with what that and the middle of the grid add, which depends on activations alone.
//
// Work. A slab is the columns of 8 groups, a strip 16 rows. All blocks of a slab prepare its activations once, share out
// strips evenly, and there is one block on every multiprocessor. A warp walks all nodes of a strip, 128 bytes of a row a
// step, through a ring of its own in shared memory that cp.async keeps full across strips; warps never wait for one another.
// The last slab to come to a strip adds the parts of all in a fixed order, so results do not depend on scheduling. A block
// leaves room for one of the next launch, which fills its rings while this one ends.
#pragma once

#include "products.cuh"
#include "ring.cuh"

namespace llmcompress::gpu {

template <class S> __device__ __forceinline__ void write(const TreeCall& call, const Sums<S>& sums, int strip) {
#pragma unroll
    for (int m = 0; m < S::MT; ++m)
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = strip * S::ROWS + 16 * m + sums.g + i / 2 * 8, token = n * TILE + 2 * sums.t + i % 2;
                if (row < call.rows && token < call.tokens)
                    static_cast<uint16_t*>(call.out)[int64_t(token) * call.rows + row] = narrow<S::BF16>(sums.total[m][n][i]);
            }
}

// A warp has summed a strip over its slab: the last one of all slabs adds them in their order.
template <class S> __device__ __forceinline__ void finish(const TreeCall& call, Sums<S>& sums, int strip) {
    constexpr int AHEAD = 4;
    if (call.slabs == 1) return write<S>(call, sums, strip);
    float* parts = call.parts + int64_t(strip) * call.slabs * S::PART + 4 * sums.lane;
#pragma unroll
    for (int i = 0; i < S::MT * S::NT; ++i) {
        const float(&from)[4] = sums.total[i / S::NT][i % S::NT];
        *reinterpret_cast<Four*>(parts + int(blockIdx.y) * S::PART + 128 * i) = {{from[0], from[1], from[2], from[3]}};
    }
    fence();
    sync_warp();
    bool last = false;
    if (sums.lane == 0) {
        last = count_up(call.arrived + strip) == call.slabs - 1;
        if (last) call.arrived[strip] = 0; // ready for the next launch
    }
    if (!any_of_warp(last)) return;
    fence();
#pragma unroll
    for (int i = 0; i < S::MT * S::NT; ++i) {
        float(&to)[4] = sums.total[i / S::NT][i % S::NT];
        to[0] = to[1] = to[2] = to[3] = 0;
#pragma unroll 1
        for (int first = 0; first < call.slabs; first += AHEAD) {
            Four value[AHEAD];
#pragma unroll
            for (int p = 0; p < AHEAD; ++p) value[p] = read_written_four(parts + (first + p < call.slabs ? first + p : 0) * S::PART + 128 * i);
#pragma unroll
            for (int p = 0; p < AHEAD; ++p)
#pragma unroll
                for (int k = 0; k < 4; ++k) to[k] += first + p < call.slabs ? value[p].at[k] : 0.0f;
        }
    }
    write<S>(call, sums, strip);
}

// Grid: blocks of a slab, slabs.
template <class S> __global__ void __launch_bounds__(S::THREADS, S::THREADS <= 256 ? 2 : 1) tree_kernel(const __grid_constant__ TreeCall call) {
    const Activations<S> activations(call, shared_memory());
    next_launch();
    const int first = int(int64_t(call.strips) * blockIdx.x / call.blocks), end = int(int64_t(call.strips) * (blockIdx.x + 1) / call.blocks);
    Ring<S> ring(call, activations.memory, activations.warp, activations.lane, first + activations.warp, end);
#pragma unroll 1
    for (int i = 0; i < S::STAGES - 1; ++i) ring.fetch();
    previous_launch();
    activations.prepare();
    sync();
    Sums<S> sums(activations);
    int stage = 0, place = 0;
#pragma unroll 1
    for (int strip = first + activations.warp; strip < end; strip += S::WARPS) {
#pragma unroll
        for (int i = 0; i < S::MT * S::NT * 4; ++i) sums.total[i / 4 / S::NT][i / 4 % S::NT][i % 4] = 0;
#pragma unroll 1
        for (int v = 0; v < call.nodes; ++v) {
            const TreeNode& node = call.node[v];
            const int parts = (ring.groups * node.bits + 7) / 8;
#pragma unroll 1
            for (int part = 0; part < parts; ++part) {
                wait<S::STAGES - 2>();
                sync_warp(); // this step is there, and nobody reads the one before any more
                ring.fetch();
                sums.step(stage, place, node, part);
                stage = stage == S::STAGES - 1 ? 0 : stage + 1;
            }
            sums.end(node);
            place = place == S::STAGES - 1 ? 0 : place + 1;
        }
        finish<S>(call, sums, strip);
    }
}

} // namespace llmcompress::gpu
