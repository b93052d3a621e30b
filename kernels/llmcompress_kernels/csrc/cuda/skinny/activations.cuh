// A block's view of the call: jobs, rows, and activations in shared memory.
#pragma once

#include "schedule.cuh"
#include "shape.cuh"

namespace llmcompress::skinny {

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

// A job is up to `at_once` slots of one expert (DENSE: tokens).
template <int BITS, bool BF16, int NT> struct Block {
    using S = Shape<BITS>;
    const Call& call;
    unsigned char* bytes;
    Memory<BITS, NT>& memory;
    int thread, threads, warp, lane, g, t; // g: row of a fragment, t: place in its four lanes
    int number;
    int count = 0; // slots of the job whose activations are here
    int job = -1;  // that one
    int x_first = 0, x_steps = 0, x_stride = 0; // steps of columns that are here, and bytes from slot to slot
    int sums = 0; // where the sums of their spans begin
    Schedule schedule;

    __device__ Block(const Call& c, unsigned char* m) : call(c), bytes(m), memory(*reinterpret_cast<Memory<BITS, NT>*>(m)) {
        thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / LANES, lane = thread % LANES;
        g = lane / 4, t = lane % 4, number = int(blockIdx.x);
        if (thread == 0) memory = Memory<BITS, NT>(call);
        sync();
    }

    template <typename T> __device__ T* at(int offset) const { return reinterpret_cast<T*>(bytes + offset); }

    // First row of a job's expert in the bank.
    __device__ int64_t first_row(int j) const {
        if (call.mode == DENSE) return 0;
        return int64_t(at<uint16_t>(memory.job_expert)[j]) * (call.mode == GATE_UP ? 2 : 1) * call.rows;
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
        if (call.mode != DENSE) jobs = find_jobs();
        const int width = (call.mode == GATE_UP ? STRIP / 2 : STRIP) * call.warps;
        const int tiles = (call.rows + width - 1) / width, steps = (call.columns + S::COLUMNS - 1) / S::COLUMNS;
        schedule = Schedule(jobs, tiles, steps, call.least, gridDim.x);
    }

    __device__ int find_jobs() {
        int *counts = at<int>(memory.count), *before = at<int>(memory.before);
        auto *owner = at<uint16_t>(memory.owner), *place = at<uint16_t>(memory.place), *job_of = at<uint16_t>(memory.job_of);
        auto* experts = at<uint16_t>(memory.job_expert);
        const int slots = call.tokens * call.slots;
        for (int e = thread; e < call.experts; e += threads) counts[e] = 0;
        sync();
        for (int slot = thread; slot < slots; slot += threads) {
            const int64_t expert = call.index[slot];
            const bool used = expert >= 0 && expert < call.experts;
            owner[slot] = used ? uint16_t(expert) : NONE;
            if (used) add(counts + expert, 1);
        }
        sync();
        const auto jobs_of = [&](int e) { return (counts[e] + call.at_once - 1) / call.at_once; };
        for (int e = thread; e < call.experts; e += threads) {
            int first = 0;
            for (int other = 0; other < e; ++other) first += jobs_of(other);
            before[e] = first;
            for (int i = 0; i < jobs_of(e); ++i) experts[first + i] = uint16_t(e);
            if (e == call.experts - 1) memory.jobs = first + jobs_of(e);
        }
        sync();
        for (int slot = thread; slot < slots; slot += threads) {
            int rank = 0;
            for (int other = 0; other < slot; ++other) rank += owner[other] == owner[slot];
            const bool used = owner[slot] != NONE;
            job_of[slot] = used ? uint16_t(before[owner[slot]] + rank / call.at_once) : NONE;
            place[slot] = uint16_t(rank % call.at_once);
        }
        sync();
        return memory.jobs;
    }

    __device__ int job_of(int slot) const { return at<uint16_t>(memory.job_of)[slot]; }
    // Slot (DENSE: token) of entry `i` of the job that is here.
    __device__ int slot(int i) const { return call.mode == DENSE ? job * call.at_once + i : at<uint16_t>(memory.list)[i]; }

    // All slots are skipped.
    __device__ void clear_out() const {
        const int64_t all = int64_t(call.tokens) * call.rows;
        for (int64_t i = int64_t(number) * threads + thread; i < all; i += int64_t(gridDim.x) * threads)
            static_cast<uint16_t*>(call.out)[i] = 0;
    }

    // Whether the activations of a step are here.
    __device__ __forceinline__ bool has_x(const Place& place) const {
        return place.job == job && unsigned(place.step - x_first) < unsigned(x_steps);
    }

    // Bring the activations of a job from a step on: as far as they fit and are wanted, for `rest` steps at most. Every
    // thread of the block comes here.
    __device__ __forceinline__ void load_x(const Place& place, unsigned rest) {
        sync(); // nobody uses the previous ones any more
        if (place.job != job) enter_job(place.job);
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
            if (g == 0) *at<Four>(sums + item * SUMS_BYTES + 16 * t) = {sum[0], sum[1], -sum[2], -sum[3]};
        }
    }

    __device__ __forceinline__ void enter_job(int wanted) {
        job = wanted;
        if (call.mode == DENSE) {
            count = call.tokens - job * call.at_once;
        } else {
            const int expert = at<uint16_t>(memory.job_expert)[job];
            count = at<int>(memory.count)[expert] - (job - at<int>(memory.before)[expert]) * call.at_once;
            for (int slot = thread; slot < call.tokens * call.slots; slot += threads)
                if (job_of(slot) == job) at<uint16_t>(memory.list)[at<uint16_t>(memory.place)[slot]] = uint16_t(slot);
            sync();
        }
        if (count > call.at_once) count = call.at_once;
    }

    // Where this lane's activations lie, by 8 slots; columns of a product that have no slot repeat the last one's.
    __device__ __forceinline__ void lanes_of_x(const unsigned char* (&x)[NT]) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int entry = n * TILE + g < count ? n * TILE + g : count - 1;
            x[n] = bytes + memory.x + entry * x_stride + 4 * S::PAIRS * t;
        }
    }
};

__device__ inline float activated(const Call& call, float gate, float up) {
    switch (call.activation) {
    case SILU: return gate / (1 + expf(-gate)) * up;
    case GELU: return 0.5f * gate * (1 + erff(gate * 0.7071067811865476f)) * up;
    case GELU_TANH: return 0.5f * gate * (1 + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    default:
        gate = fminf(gate, call.limit), up = fminf(fmaxf(up, -call.limit), call.limit);
        return (up + 1) * gate / (1 + expf(-call.alpha * gate));
    }
}

template <bool BF16> __device__ inline float bias_of(const Call& call, int64_t row) {
    return call.bias == nullptr ? 0.0f : widen<BF16>(read(static_cast<const uint16_t*>(call.bias) + row));
}

} // namespace llmcompress::skinny
