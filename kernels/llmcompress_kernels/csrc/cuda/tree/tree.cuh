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
// Work. A slab is the columns of 8 groups, a strip 32 rows. Blocks of a slab prepare its activations once each and share out
// its strips evenly, one block on every multiprocessor; the warps of a block take equal runs of the steps of its strips, a step
// being 128 bytes of each row of one node, wherever strips and nodes end. Every warp has a ring of its own in shared memory
// that cp.async keeps full; warps never wait for one another. What a warp has of a strip goes to memory as a part, and the
// last block of all slabs adds the parts of its strips in a fixed order, so results do not depend on scheduling. The next
// launch's blocks begin to read as soon as there is room for them.
#pragma once

#include "schedule.cuh"

#include "products.cuh"
#include "ring.cuh"

namespace llmcompress::gpu {

// The end of a warp's run or of a strip: what it has summed, to where the strip's first steps' sums go, or to its own place.
template <class S> __device__ __forceinline__ void give(const TreeCall& call, const Sums<S>& sums, int strip, bool begun) {
    const int block = int(blockIdx.y * gridDim.x + blockIdx.x);
    const int64_t mains = int64_t(call.strips) * call.slabs;
    const int64_t part = begun ? int64_t(strip) * call.slabs + blockIdx.y : mains + block * S::WARPS + sums.x.warp;
    float* to = call.parts + part * S::PART + 4 * sums.lane;
#pragma unroll
    for (int i = 0; i < S::MT * S::NT; ++i) {
        const float(&from)[4] = sums.total[i / S::NT][i % S::NT];
        *reinterpret_cast<Four*>(to + 128 * i) = {{from[0], from[1], from[2], from[3]}};
    }
}

// All parts of 16 rows and 8 tokens of a strip, added slab by slab, in each in the order of its steps: the one that its first
// steps have given, then those of the warps that began within it.
template <class S> __device__ __forceinline__ Four gathered(const TreeCall& call, const Schedule& schedule, int strip, int from) {
    constexpr int AHEAD = 8;
    const float* mains = call.parts + int64_t(strip + schedule.first) * call.slabs * S::PART + from;
    const float* others = call.parts + (int64_t(call.strips) * call.slabs + int64_t(blockIdx.x) * S::WARPS) * S::PART + from;
    const Schedule last(call, int(blockIdx.x), call.slabs - 1, S::WARPS);
    const int begin = schedule.first_within(strip), end = schedule.end_within(strip), last_begin = last.first_within(strip);
    Four sum{};
    int slab = 0, warp = begin - 1; // one below the first: what the first steps have given
    if (slab == call.slabs - 1) warp = last_begin - 1;
#pragma unroll 1
    while (slab < call.slabs) {
        Four value[AHEAD];
        bool there[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int lowest = slab == call.slabs - 1 ? last_begin : begin;
            there[i] = slab < call.slabs;
            const float* at = warp < lowest ? mains + slab * S::PART : others + (int64_t(slab) * call.blocks * S::WARPS + warp) * S::PART;
            value[i] = read_written_four(there[i] ? at : mains);
            if (++warp >= end) {
                ++slab;
                warp = (slab == call.slabs - 1 ? last_begin : begin) - 1;
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum.at[k] += there[i] ? value[i].at[k] : 0.0f;
    }
    return sum;
}

// Write the results of piece `i` of the block's strips: of 16 rows and 8 tokens.
template <class S> __device__ __forceinline__ void result(const TreeCall& call, const Schedule& schedule, int i, int lane) {
    constexpr int PIECES = S::MT * S::NT;
    const int strip = i / PIECES, m = i % PIECES / S::NT, n = i % S::NT;
    const Four sum = gathered<S>(call, schedule, strip, i % PIECES * 128 + 4 * lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int row = (schedule.first + strip) * S::ROWS + 16 * m + lane / 4 + k / 2 * 8, token = n * TILE + 2 * (lane % 4) + k % 2;
        if (row < call.rows && token < call.tokens)
            static_cast<uint16_t*>(call.out)[int64_t(token) * call.rows + row] = narrow<S::BF16>(sum.at[k]);
    }
}

// The last block of all slabs to come adds the parts of its strips.
template <class S> __device__ __forceinline__ void finish(const TreeCall& call) {
    fence();
    sync();
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
    bool last = false;
    if (thread == 0) {
        last = count_up(call.arrived + blockIdx.x) == call.slabs - 1;
        if (last) call.arrived[blockIdx.x] = 0; // ready for the next launch
    }
    if (!sync_or(last)) return;
    fence();
    const Schedule schedule(call, int(blockIdx.x), 0, S::WARPS);
#pragma unroll 1
    for (int i = warp; i < schedule.count * S::MT * S::NT; i += S::WARPS) result<S>(call, schedule, i, lane);
}

// The warp whose part of a strip is the last of all slabs' adds them: the same parts in the same order.
template <class S> __device__ __forceinline__ void finish_strip(const TreeCall& call, int strip) {
    const int lane = thread_again() % 32;
    const Schedule schedule(call, int(blockIdx.x), 0, S::WARPS), last(call, int(blockIdx.x), call.slabs - 1, S::WARPS);
    const int own = strip - schedule.first, end = schedule.end_within(own);
    const int parts = (call.slabs - 1) * (1 + end - schedule.first_within(own)) + 1 + end - last.first_within(own);
    fence();
    sync_warp();
    bool all = false;
    if (lane == 0) {
        all = count_up(call.arrived + strip) == parts - 1;
        if (all) call.arrived[strip] = 0; // ready for the next launch
    }
    if (!any_of_warp(all)) return;
    fence();
#pragma unroll 1
    for (int i = 0; i < S::MT * S::NT; ++i) result<S>(call, schedule, own * S::MT * S::NT + i, lane);
}

// Blocks that registers have to leave room for. An A100 needs more of them, and its launches do not overlap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class S> constexpr int HELD = 1;
#else
template <class S> constexpr int HELD = S::HELD;
#endif

// Grid: blocks of a slab, slabs.
template <class S> __global__ void __launch_bounds__(S::THREADS, HELD<S>) tree_kernel(const __grid_constant__ TreeCall call) {
    const Activations<S> activations(call, shared_memory());
    next_launch();
    int steps;
    bool begun; // with a strip's first step
    Position now;
    {
        const Schedule schedule(call, int(blockIdx.x), int(blockIdx.y), S::WARPS);
        const int begin = schedule.begin(activations.warp);
        steps = schedule.begin(activations.warp + 1) - begin;
        now = schedule.place(call, activations.groups, begin), begun = begin % schedule.steps == 0;
    }
    const SharedAddress base = shared_address(activations.memory + activations.warp * S::RING);
    Ring<S> ring(call, base, activations.lane, activations.first, activations.groups, now, steps);
#pragma unroll 1
    for (int i = 0; i < S::STAGES - 1; ++i) ring.fetch();
    previous_launch();
    activations.prepare();
    sync();
    Sums<S> sums(activations, base);
    int stage = 0, place = 0;
    if (steps == 0 && !begun) {
        give<S>(call, sums, now.strip, false);
        if constexpr (S::SPREAD) finish_strip<S>(call, now.strip);
    }
#pragma unroll 1
    while (steps > 0) {
#pragma unroll
        for (int i = 0; i < S::MT * S::NT * 4; ++i) sums.total[i / 4 / S::NT][i / 4 % S::NT][i % 4] = 0;
#pragma unroll 1
        for (; now.node < call.nodes && steps > 0; ++now.node) {
            const TreeNode node = call.node[now.node];
            const int parts = steps_of(activations.groups, node.bits);
#pragma unroll 1
            for (; now.part < parts && steps > 0; ++now.part, --steps) {
                wait<S::STAGES - 2>();
                sync_warp(); // this step is there, and nobody reads the one before any more
                ring.fetch();
                sums.step(stage, place, node, now.part);
                stage = stage == S::STAGES - 1 ? 0 : stage + 1;
            }
            now.part = 0;
            place = place == S::STAGES - 1 ? 0 : place + 1;
        }
        give<S>(call, sums, now.strip, begun);
        if constexpr (S::SPREAD) finish_strip<S>(call, now.strip);
        now.node = 0, ++now.strip, begun = true;
    }
    if constexpr (!S::SPREAD) finish<S>(call);
}

} // namespace llmcompress::gpu
