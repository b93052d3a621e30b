// A block's view of the call: jobs, rows, and activations in shared memory.
#pragma once

#include "schedule.cuh"
#include "shape.cuh"

namespace llmcompress::skinny {

// A job is up to `at_once` slots of one expert (DENSE: tokens).
template <int BITS, bool BF16, int NT> struct Block {
    using S = Shape<BITS>;
    const Call& call;
    unsigned char* bytes;
    Memory<BITS, NT>& memory;
    int thread, threads, warp, lane, g, t; // g: row of a fragment, t: place in its four lanes
    int number;
    int count = 0; // slots of the job whose activations are here
    int job = 0;   // that one
    Schedule schedule;

    __device__ Block(const Call& c, unsigned char* m) : call(c), bytes(m), memory(*reinterpret_cast<Memory<BITS, NT>*>(m)) {
        thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / LANES, lane = thread % LANES;
        g = lane / 4, t = lane % 4, number = int(blockIdx.x);
        if (thread == 0) memory = Memory<BITS, NT>(call);
        sync();
    }

    template <typename T> __device__ T* at(int offset) const { return reinterpret_cast<T*>(bytes + offset); }
    __device__ const Quad* sums() const { return at<const Quad>(memory.sums); }

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

    // Bring the activations of a job for a slice of the columns, and their sums. Every thread of the block comes here.
    __device__ __forceinline__ void load_x(int wanted, int slice) {
        sync(); // nobody uses the previous ones any more
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
        const int first = slice * call.slice, left = schedule.steps - first, steps = left < call.slice ? left : call.slice;
        copy_x(first * S::COLUMNS, steps * S::COLUMNS / (2 * S::PAIRS));
        sync();
        add_x(steps);
        sync();
    }

    // `columns`: the first one; `pieces`: parts of a token's slice that lanes take at once.
    __device__ __forceinline__ void copy_x(int columns, int pieces) {
        // in 16 bytes; a thread has 128 bytes on the way where registers allow it
        constexpr int WIDE = S::PAIRS / 4, AT_ONCE = (NT == 1 && BITS != 2 ? 8 : 4) / WIDE;
        const int all = count * pieces, thread = anew(this->thread), threads = anew(this->threads);
        for (int begin = thread; begin < all; begin += AT_ONCE * threads) {
            Words held[AT_ONCE][WIDE];
            int to[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int item = begin + i * threads, entry = item / pieces, piece = item % pieces;
                to[i] = item < all ? entry * memory.x_stride + piece / 4 * 2 * S::UNIT + piece % 4 * 16 : -1;
                const int column = columns + piece * 2 * S::PAIRS;
#pragma unroll
                for (int w = 0; w < WIDE; ++w) held[i][w] = {0, 0, 0, 0};
                if (item >= all || column >= call.columns) continue;
                const int64_t row = call.mode == GATE_UP ? slot(entry) / call.slots : slot(entry);
                const auto* from = reinterpret_cast<const Words*>(static_cast<const uint16_t*>(call.x) + row * call.columns + column);
#pragma unroll
                for (int w = 0; w < WIDE; ++w) held[i][w] = from[w];
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (to[i] >= 0) store_pairs(bytes + memory.x + to[i], held[i]);
        }
    }

    // Columns j and j + PAIRS side by side, as the codes are that lie 16 bits apart.
    static __device__ __forceinline__ void store_pairs(unsigned char* to, const Words (&held)[S::PAIRS / 4]) {
        uint32_t flat[S::PAIRS];
#pragma unroll
        for (int i = 0; i < S::PAIRS; ++i) flat[i] = held[i / 4].at[i % 4];
#pragma unroll
        for (int h = 0; h < S::PAIRS / 4; ++h) {
            Words out;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int p = 4 * h + i;
                out.at[i] = permute(flat[p / 2], flat[p / 2 + S::PAIRS / 2], p % 2 ? 0x7632 : 0x5410);
            }
            *reinterpret_cast<Words*>(to + 64 * h) = out;
        }
    }

    // Sums over spans: of the activations, and of what the numbers that stand for codes have too much, negated.
    __device__ __forceinline__ void add_x(int steps) {
        const int spans = memory.spans, chunks = S::COLUMNS / 8 / spans, thread = anew(this->thread), threads = anew(this->threads);
        for (int item = thread; item < count * steps * spans; item += threads) {
            const int entry = item / (steps * spans), span = item % (steps * spans);
            const unsigned char* x = bytes + memory.x + entry * memory.x_stride + span * chunks * 16;
            float sum = 0, excess = 0;
            for (int i = 0; i < chunks; ++i) {
                const int chunk = (i + item) % chunks; // lanes begin at different banks
                const Words w = *reinterpret_cast<const Words*>(x + 16 * chunk);
                const bool upper = BITS == 2 && (chunk & 4);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float both = value_of(uint16_t(w.at[j])) + value_of(uint16_t(w.at[j] >> 16));
                    sum += both;
                    excess = fmaf(upper ? excess_of<BITS>((4 + j) % S::PAIRS) : excess_of<BITS>(j), both, excess);
                }
            }
            at<Pair>(memory.sums)[span * NT * TILE + entry] = {sum, -excess};
        }
    }

    static __device__ __forceinline__ float value_of(uint16_t v) { return widen<BF16>(v); }

    // Where this lane's activations lie, by 8 slots; columns of a product that have no slot repeat the last one's.
    __device__ __forceinline__ void lanes_of_x(const unsigned char* (&x)[NT]) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int entry = n * TILE + g < count ? n * TILE + g : count - 1;
            x[n] = bytes + memory.x + entry * memory.x_stride + 16 * t;
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
