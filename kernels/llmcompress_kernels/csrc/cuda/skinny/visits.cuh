// A block's view of a call that is cut up by whole strips: jobs, visits, and activations in shared memory.
#pragma once

#include "spans.cuh"

namespace llmcompress::skinny {

// A tile of one job: a strip per team of warps. Member m of a team takes the steps m, m + members, ... of its rows.
struct Visit { int job, tile; };

template <int BITS, bool BF16, int NT> struct Crew : Jobs<NT, Task<BITS, NT>, Places<BITS, NT>> {
    using Base = Jobs<NT, Task<BITS, NT>, Places<BITS, NT>>;
    using Base::bytes, Base::call, Base::count, Base::g, Base::job, Base::places, Base::slot, Base::t, Base::warp;
    using Base::x_stride;
    using S = Span<BITS>;
    int members, team, member;
    int x_first = 0, x_rounds = 0; // rounds of steps that are here
    int sums = 0;                  // where the sums of their spans begin
    int jobs;

    __device__ Crew(const Task<BITS, NT>& c, unsigned char* m) : Base(c, c.places, m) {
        members = call.members, team = warp / members, member = warp - team * members;
    }

    __device__ __forceinline__ int width() const { return call.mode == GATE_UP ? call.height / 2 : call.height; } // rows, or gates
    __device__ __forceinline__ int first_of(int tile, int of) const { return ((tile << call.teams_log) + of) * width(); }

    // Find the jobs.
    __device__ void plan() { jobs = call.mode == DENSE ? call.jobs : this->template find_jobs<true>(*this->template at<int>(0)); }

    // Visits of blocks up to one: whole tiles of DOWN, with all jobs, so that nobody else adds to their results.
    __device__ unsigned begin(unsigned block) const {
        const unsigned units = unsigned(call.tiles) * unsigned(call.mode == DOWN ? 1 : jobs);
        return units * block / gridDim.x * unsigned(call.mode == DOWN ? jobs : 1);
    }
    __device__ Visit visit(unsigned number) const {
        if (call.mode == DOWN) return {int(number % unsigned(jobs)), int(number / unsigned(jobs))};
        return {int(number / unsigned(call.tiles)), int(number % unsigned(call.tiles))};
    }
    __device__ __forceinline__ void next(Visit& v) const {
        if (call.mode == DOWN) {
            if (++v.job == jobs) v.job = 0, ++v.tile;
        } else if (++v.tile == call.tiles) {
            v.tile = 0, ++v.job;
        }
    }

    // Whether the activations of a round are here.
    __device__ __forceinline__ bool has_x(int wanted, int round) const {
        return wanted == job && unsigned(round - x_first) < unsigned(x_rounds);
    }

    // Bring the activations of a job, all or as many rounds from one on as fit. Every thread of the block comes here.
    __device__ __forceinline__ void load_x(int wanted, int round) {
        sync(); // nobody uses the previous ones any more
        if (wanted != job) this->enter_job(wanted);
        const int each = members * (count * S::X_BYTES + NT * SUMS_BYTES * S::SPANS), rounds = call.rounds;
        const int fit = (call.room - count * S::X_PAD) / each;
        x_first = fit >= rounds ? 0 : round, x_rounds = fit < rounds - x_first ? fit : rounds - x_first;
        x_stride = x_rounds * members * S::X_BYTES + S::X_PAD;
        sums = places.x + count * x_stride;
        prepare();
        sync();
    }

    // Bring activations into the pairs of Codes, and sum them by spans. Items are eight columns of a matrix product: slots and, where
    // these are fewer, spans. Two are read before either is waited for.
    __device__ __forceinline__ void prepare() {
        const int log = count > 8 ? 4 : count > 4 ? 3 : count > 2 ? 2 : count > 1 ? 1 : 0;
        const int spans = x_rounds * members * S::SPANS, all = spans << log, apart = TILE * call.warps;
        for (int item = TILE * warp; item < all; item += 2 * apart) {
            uint32_t one[SPAN_PAIRS], other[SPAN_PAIRS];
            gather(one, item, log, spans);
            gather(other, item + apart, log, spans);
            arrange(one, item, log, spans);
            if (item + apart < all) arrange(other, item + apart, log, spans);
        }
    }

    // The 32 columns of a lane in an item, as stored; where there is none, others that nobody uses, or zeros.
    __device__ __forceinline__ void gather(uint32_t (&flat)[SPAN_PAIRS], int item, int log, int spans) const {
        int entry = (item + g) & ((1 << log) - 1), span = (item + g) >> log;
        if (entry >= count) entry = count - 1;
        if (span >= spans) span = spans - 1;
        const int column = (x_first * members * S::SPANS + span) * SPAN + 32 * t, at_slot = slot(entry);
        const int row = call.mode == GATE_UP ? int(unsigned(at_slot) / unsigned(call.slots)) : at_slot;
        const bool within = column < call.columns;
        const auto* from = reinterpret_cast<const Words*>(static_cast<const uint16_t*>(call.x) + int64_t(row) * call.columns + (within ? column : 0));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Words w = words_written(from + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) flat[4 * i + j] = within ? w.at[j] : 0;
        }
    }

    // sum(x), and, negative, the sum of what the numbers of codes have too much: a matrix product gives both, since the first 8 rows
    // of its left operand are ones, the others the excess.
    __device__ __forceinline__ void arrange(const uint32_t (&flat)[SPAN_PAIRS], int item, int log, int spans) {
        const int entry = (item + g) & ((1 << log) - 1), span = (item + g) >> log;
        uint32_t b[SPAN_PAIRS];
#pragma unroll
        for (int p = 0; p < SPAN_PAIRS; ++p) {
            const int low = S::column_of(p), high = low + S::APART;
            b[p] = permute(flat[low / 2], flat[high / 2], p % 2 ? 0x7632 : 0x5410);
        }
        if (entry < count && span < spans) {
            auto* to = reinterpret_cast<Words*>(bytes + places.x + entry * x_stride + span * 2 * SPAN) + t;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[4 * i] = {b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]};
        }
        float sum[2][4] = {}; // two, so that products do not wait for one another
#pragma unroll
        for (int i = 0; i < SPAN_PAIRS / 2; ++i) {
            const uint32_t a[4] = {powers<BF16>(0), powers<BF16>(span_excess_of<BITS>(2 * i)), powers<BF16>(0), powers<BF16>(span_excess_of<BITS>(2 * i + 1))};
            mma<BF16>(sum[i % 2], a, b[2 * i], b[2 * i + 1]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = item + 2 * t + i, to = column & ((1 << log) - 1), at_span = column >> log;
            if (g != 0 || to >= count || at_span >= spans) continue;
            float* found = this->template at<float>(sums + (at_span * NT + to / TILE) * SUMS_BYTES) + to % TILE / 2 * 4 + to % 2;
            found[0] = sum[0][i] + sum[1][i], found[2] = -(sum[0][2 + i] + sum[1][2 + i]);
        }
    }
};

} // namespace llmcompress::skinny
