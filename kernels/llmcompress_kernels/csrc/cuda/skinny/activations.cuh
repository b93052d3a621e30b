// A block's view of a call whose strips blocks share: rows, and activations in shared memory.
#pragma once

#include "jobs.cuh"
#include "schedule.cuh"

namespace llmcompress::skinny {

// Where in shared memory of a block things lie.
template <int BITS, int NT> struct Memory {
    using S = Shape<BITS>;
    int most_jobs, spans;
    int jobs; // of the launch
    int count, before, job_expert, owner, job_of, place, list, pieces, x, stages, stage, bytes;

    __host__ __device__ explicit Memory(const Call& call) : jobs(0) {
        const int slots = call.mode == DENSE ? 0 : call.tokens * call.slots, experts = call.mode == DENSE ? 0 : call.experts;
        most_jobs = experts + slots / call.at_once;
        if (most_jobs > slots) most_jobs = slots;
        spans = call.group >= S::COLUMNS ? 1 : S::COLUMNS / call.group;
        // it lies in front itself: registers are scarce
        pieces = place_jobs<NT>(*this, slots, experts, most_jobs, up_to_16(sizeof(Memory)));
        x = pieces + (call.mode == DOWN ? up_to_16(call.warps * most_jobs) : 0);
        stages = x + call.room;
        stage = STRIP * S::STRIDE + 8 * STRIP * spans;
        bytes = stages + call.warps * call.stages * stage;
    }
};

// The activations of a lane in a unit, in the pairs of pair_of: columns j and j + PAIRS.
template <int BITS> __device__ __forceinline__ void pairs_of_x(uint32_t (&b)[Shape<BITS>::PAIRS], const unsigned char* x) {
    constexpr int PAIRS = Shape<BITS>::PAIRS;
    uint32_t flat[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS / 4; ++i) {
        const Words w = reinterpret_cast<const Words*>(x)[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) flat[4 * i + j] = w.at[j];
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) b[p] = permute(flat[p / 2], flat[p / 2 + PAIRS / 2], p % 2 ? 0x7632 : 0x5410);
}

template <int BITS, bool BF16, int NT> struct Block : Jobs<NT, Call, Memory<BITS, NT>> {
    using Base = Jobs<NT, Call, Memory<BITS, NT>>;
    using Base::bytes, Base::call, Base::count, Base::g, Base::job, Base::slot, Base::t, Base::x_stride;
    using Base::thread, Base::threads, Base::warp;
    using S = Shape<BITS>;
    Memory<BITS, NT>& memory; // the same as `places`, to be written
    int number;
    int x_first = 0, x_steps = 0; // steps of columns that are here
    int sums = 0; // where the sums of their spans begin
    Schedule schedule;

    __device__ Block(const Call& c, unsigned char* m)
        : Base(c, *reinterpret_cast<Memory<BITS, NT>*>(m), m), memory(*reinterpret_cast<Memory<BITS, NT>*>(m)) {
        number = int(blockIdx.x);
        if (thread == 0) memory = Memory<BITS, NT>(call);
        sync();
    }

    // First row, or gate, of a warp's strip.
    __device__ int strip(int tile, int of) const { return (tile * call.warps + of) * (call.mode == GATE_UP ? STRIP / 2 : STRIP); }

    // Weight row of row `j` of the strip; beyond the matrix the last one, whose results are dropped.
    __device__ int64_t weight_row(int strip, int j) const {
        const int row = strip + (call.mode == GATE_UP ? j % 16 : j);
        const int within = row < call.rows ? row : call.rows - 1;
        return call.mode == GATE_UP && j >= 16 ? int64_t(call.rows) + within : within;
    }

    // Find the jobs, and what this block does of them.
    __device__ void plan() {
        int jobs = (call.tokens + call.at_once - 1) / call.at_once;
        if (call.mode != DENSE) jobs = this->template find_jobs<false>(memory.jobs);
        const int width = (call.mode == GATE_UP ? STRIP / 2 : STRIP) * call.warps;
        const int tiles = (call.rows + width - 1) / width, steps = (call.columns + S::COLUMNS - 1) / S::COLUMNS;
        schedule = Schedule(jobs, tiles, steps, call.least, gridDim.x);
    }

    // Whether the activations of a step are here.
    __device__ __forceinline__ bool has_x(const Place& place) const {
        return place.job == job && unsigned(place.step - x_first) < unsigned(x_steps);
    }

    // Bring the activations of a job from a step on: as far as they fit and are wanted, for `rest` steps at most. Every
    // thread of the block comes here.
    __device__ __forceinline__ void load_x(const Place& place, unsigned rest) {
        sync(); // nobody uses the previous ones any more
        if (place.job != job) this->enter_job(place.job);
        const int each = count * S::X_BYTES + NT * SUMS_BYTES * memory.spans;
        const int fit = (call.room - count * S::X_PAD) / each, ahead = schedule.steps - place.step;
        x_first = place.step, x_steps = ahead;
        if (rest <= unsigned(ahead))
            x_steps = int(rest);
        else if (fit >= schedule.steps) // other strips of the job follow
            x_first = 0, x_steps = schedule.steps;
        if (x_steps > fit) x_steps = fit;
        x_stride = x_steps * S::X_BYTES + S::X_PAD;
        const int begin = x_first * S::X_BYTES, end = 2 * call.columns, all = x_steps * S::X_BYTES, step = 16 * threads;
        for (int entry = 0; entry < count; ++entry) {
            const int64_t row = call.mode == GATE_UP ? slot(entry) / call.slots : slot(entry);
            const unsigned char* from = static_cast<const unsigned char*>(call.x) + row * end + begin;
            unsigned char* to = bytes + memory.x + entry * x_stride;
            for (int at = 16 * thread; at < all; at += step) {
                if (begin + at < end)
                    copy_async<0>(shared_address(to + at), from + at);
                else // beyond the row's end
                    *reinterpret_cast<Words*>(to + at) = {0, 0, 0, 0};
            }
        }
        commit();
        wait<0>();
        sync();
        prepare();
        sync();
    }

    // Bring the activations that are here into the pairs of pair_of, and sum them by spans over which scales are the same:
    // sum(x), and, negative, the sum of what the numbers of codes have too much. A matrix product gives both: the first 8 rows
    // of its left operand are ones, the others the excess.
    __device__ void prepare() {
        sums = memory.x + count * x_stride;
        const int spans = x_steps * memory.spans, units = S::UNITS / memory.spans;
        for (int item = warp; item < spans * NT; item += call.warps) {
            const int span = item / NT, n = item % NT, entry = n * TILE + g;
            if (n * TILE >= count) continue;
            unsigned char* place = bytes + memory.x + entry * x_stride + span * units * 2 * S::UNIT + 4 * S::PAIRS * t;
            float sum[4] = {};
            for (int u = 0; u < units; ++u, place += 2 * S::UNIT) {
                uint32_t b[S::PAIRS] = {};
                if (entry < count) {
                    pairs_of_x<BITS>(b, place);
#pragma unroll
                    for (int i = 0; i < S::PAIRS / 4; ++i)
                        reinterpret_cast<Words*>(place)[i] = {b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]};
                }
#pragma unroll
                for (int i = 0; i < S::PAIRS / 2; ++i) {
                    const uint32_t a[4] = {powers<BF16>(0), powers<BF16>(excess_of<BITS>(2 * i)), powers<BF16>(0), powers<BF16>(excess_of<BITS>(2 * i + 1))};
                    mma<BF16>(sum, a, b[2 * i], b[2 * i + 1]);
                }
            }
            if (g == 0) *this->template at<Four>(sums + item * SUMS_BYTES + 16 * t) = {sum[0], sum[1], -sum[2], -sum[3]};
        }
    }
};

} // namespace llmcompress::skinny
