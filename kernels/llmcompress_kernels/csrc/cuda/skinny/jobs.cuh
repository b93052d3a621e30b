// Jobs, which both forms of skinny.cuh have in common: where a block keeps them, and how it finds and enters them.
#pragma once

#include "call.h"
#include "shape.cuh"

namespace llmcompress::skinny {

__host__ __device__ inline int up_to_16(int bytes) { return (bytes + 15) / 16 * 16; }

// Places what jobs are found with in shared memory, from byte `from` on, and returns where that ends.
template <int NT, class Layout> __host__ __device__ int place_jobs(Layout& at, int slots, int experts, int most_jobs, int from) {
    at.count = from;                                    // ints: slots of each expert
    at.before = at.count + up_to_16(4 * experts);       // ints: jobs of the experts before it
    at.job_expert = at.before + up_to_16(4 * experts);  // of each job; this and what follows are 16-bit numbers
    at.owner = at.job_expert + up_to_16(2 * most_jobs); // expert of each slot, or NONE
    at.job_of = at.owner + up_to_16(2 * slots);         // job of each slot, or NONE
    at.place = at.job_of + up_to_16(2 * slots);         // place of each slot in its job
    at.list = at.place + up_to_16(2 * slots);           // slots of the job that is here
    return at.list + 2 * NT * TILE;
}

// A block's view of the jobs of a call. A job is up to `at_once` slots of one expert (DENSE: tokens). Told is a Call, and
// Layout what place_jobs has filled.
template <int NT, class Told, class Layout> struct Jobs {
    const Told& call;
    const Layout& places;
    unsigned char* bytes; // shared memory
    int thread, threads, warp, lane, g, t; // g: row of a fragment, t: place in its four lanes
    int count = 0; // slots of the job whose activations are here
    int job = -1;  // that one
    int x_stride = 0; // bytes from one slot's activations to the next one's

    __device__ Jobs(const Told& c, const Layout& l, unsigned char* m) : call(c), places(l), bytes(m) {
        thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / LANES, lane = thread % LANES;
        g = lane / 4, t = lane % 4;
    }

    template <typename T> __device__ T* at(int offset) const { return reinterpret_cast<T*>(bytes + offset); }

    // First row of a job's expert in the bank.
    __device__ __forceinline__ int64_t first_row(int j) const {
        if (call.mode == DENSE) return 0;
        return int64_t(at<uint16_t>(places.job_expert)[j]) * (call.mode == GATE_UP ? 2 : 1) * call.rows;
    }

    // The jobs of no more slots than a warp has lanes, by one warp: a lane per slot.
    __device__ void find_few_jobs(int slots, int& found) {
        int *counts = at<int>(places.count), *before = at<int>(places.before);
        auto *owner = at<uint16_t>(places.owner), *place = at<uint16_t>(places.place), *job_of = at<uint16_t>(places.job_of);
        const bool mine = lane < slots;
        const int64_t expert = mine ? call.index[lane] : -1;
        const bool used = expert >= 0 && expert < call.experts;
        if (mine) owner[lane] = used ? uint16_t(expert) : NONE;
        sync_warp();
        int rank = 0, all = 0;
        for (int other = 0; other < slots; ++other) {
            const bool same = owner[other] == uint16_t(expert);
            rank += same && other < lane, all += same;
        }
        if (mine) place[lane] = uint16_t(rank);
        if (used && rank == 0) counts[expert] = all;
        sync_warp();
        int first = 0, total = 0;
        for (int other = 0; other < slots; ++other) {
            if (owner[other] == NONE || place[other] != 0) continue;
            const int jobs = (counts[owner[other]] + call.at_once - 1) / call.at_once;
            total += jobs;
            if (owner[other] < expert) first += jobs;
        }
        sync_warp();
        if (lane == 0) found = total;
        if (mine) job_of[lane] = used ? uint16_t(first + rank / call.at_once) : NONE;
        if (mine) place[lane] = uint16_t(rank % call.at_once);
        if (used && rank % call.at_once == 0) at<uint16_t>(places.job_expert)[first + rank / call.at_once] = uint16_t(expert);
        if (used && rank == 0) before[expert] = first;
    }

    // Find the jobs; `found` lies in shared memory, for their number. Every thread of the block comes here.
    template <bool FEW> __device__ int find_jobs(int& found) {
        int *counts = at<int>(places.count), *before = at<int>(places.before);
        auto *owner = at<uint16_t>(places.owner), *place = at<uint16_t>(places.place), *job_of = at<uint16_t>(places.job_of);
        auto* experts = at<uint16_t>(places.job_expert);
        const int slots = call.tokens * call.slots;
        if (FEW && slots <= LANES) {
            if (warp == 0) find_few_jobs(slots, found);
            sync();
            return found;
        }
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
            if (e == call.experts - 1) found = first + jobs_of(e);
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
        return found;
    }

    __device__ int job_of(int slot) const { return at<uint16_t>(places.job_of)[slot]; }
    // Slot (DENSE: token) of entry `i` of the job that is here.
    __device__ int slot(int i) const { return call.mode == DENSE ? job * call.at_once + i : at<uint16_t>(places.list)[i]; }

    // All slots are skipped; `block`: the number of this one.
    __device__ void clear_out(int64_t block) const {
        const int64_t all = int64_t(call.tokens) * call.rows;
        for (int64_t i = block * threads + thread; i < all; i += int64_t(gridDim.x) * threads)
            static_cast<uint16_t*>(call.out)[i] = 0;
    }

    // Count and list the slots of a job. Every thread of the block comes here.
    __device__ __forceinline__ void enter_job(int wanted) {
        job = wanted;
        if (call.mode == DENSE) {
            count = call.tokens - job * call.at_once;
        } else {
            const int expert = at<uint16_t>(places.job_expert)[job];
            count = at<int>(places.count)[expert] - (job - at<int>(places.before)[expert]) * call.at_once;
            for (int slot = thread; slot < call.tokens * call.slots; slot += threads)
                if (job_of(slot) == job) at<uint16_t>(places.list)[at<uint16_t>(places.place)[slot]] = uint16_t(slot);
            sync();
        }
        if (count > call.at_once) count = call.at_once;
    }

    // Where this lane's activations lie, by 8 slots, if each of four lanes has WIDTH bytes; columns of a product that have no
    // slot repeat the last one's.
    template <int WIDTH> __device__ __forceinline__ void lanes_of_x(const unsigned char* (&x)[NT]) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int entry = n * TILE + g < count ? n * TILE + g : count - 1;
            x[n] = bytes + places.x + entry * x_stride + WIDTH * t;
        }
    }
};

// Wait for the oldest of the `stages` - 1 steps on their way, of which there may be MOST - 1.
template <int MOST, int STAGES = 2> __device__ __forceinline__ void wait_for_step(int stages) {
    if constexpr (STAGES < MOST) {
        if (stages == STAGES)
            wait<STAGES - 2>();
        else
            wait_for_step<MOST, STAGES + 1>(stages);
    } else {
        wait<STAGES - 2>();
    }
}

} // namespace llmcompress::skinny
