// What becomes of the sums of a strip: results, or parts that the last block to come adds.
#pragma once

#include "outputs.cuh"
#include "sums.cuh"

namespace llmcompress::skinny {

// Write what a warp has summed of a strip: the result if it is all of it, else its part.
template <int BITS, bool BF16, int NT>
__device__ void store(Block<BITS, BF16, NT>& block, const Sums<BITS, BF16, NT>& sums, const Place& place, bool whole, int piece) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots, first_row = block.first_row(place.job);
    const int begin = block.strip(place.tile, anew(block.warp)) + anew(block.g), first_entry = 2 * anew(block.t);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int entry = n * TILE + first_entry + i % 2, low = begin + i / 2 * 8;
            if (entry >= block.count) continue;
            const int64_t slot = block.slot(entry);
            if (call.mode == GATE_UP) {
                if (low >= call.rows) continue;
                if (whole) {
                    const float gate = sums.total[0][n][i] + bias_of<BF16>(call, first_row + low);
                    const float up = sums.total[1][n][i] + bias_of<BF16>(call, first_row + call.rows + low);
                    out[slot * call.rows + low] = narrow<BF16>(activated(call, gate, up));
                } else {
                    float* part = call.parts + (piece * all + slot) * 2 * call.rows + low;
                    part[0] = sums.total[0][n][i], part[call.rows] = sums.total[1][n][i];
                }
                continue;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = low + 16 * r;
                if (row >= call.rows) continue;
                if (whole)
                    out[slot * call.rows + row] = narrow<BF16>(sums.total[r][n][i]);
                else
                    call.parts[(piece * all + slot) * call.rows + row] = sums.total[r][n][i];
            }
        }
}

// Whether this warp brings the last of `all` steps of a strip; what the others wrote is then visible to it.
__device__ inline bool last_of(int* counter, int steps, int all, int lane) {
    fence();
    sync_warp();
    bool last = false;
    if (lane == 0) {
        last = add(counter, steps) + steps == all;
        if (last) *counter = 0; // ready for the next launch
    }
    if (!any_of_warp(last)) return false;
    fence();
    return true;
}

// Add `count` parts, `apart` numbers from each other, to each of AT sums; `from`: where they lie in a part. AHEAD parts of all
// are on their way at once: a read from L2 takes as long as hundreds of instructions. The first part has to be readable,
// whatever the count.
template <int AT, int AHEAD>
__device__ __forceinline__ void add_parts(float (&sum)[AT], const float* parts, const unsigned (&from)[AT], const int (&count)[AT], int64_t apart) {
    int most = 0;
#pragma unroll
    for (int i = 0; i < AT; ++i) most = count[i] > most ? count[i] : most;
#pragma unroll 1
    for (int first = 0; first < most; first += AHEAD) {
        float value[AHEAD][AT];
#pragma unroll
        for (int p = 0; p < AHEAD; ++p)
#pragma unroll
            for (int i = 0; i < AT; ++i) value[p][i] = read_written(parts + (first + p < count[i] ? first + p : 0) * apart + from[i]);
#pragma unroll
        for (int p = 0; p < AHEAD; ++p)
#pragma unroll
            for (int i = 0; i < AT; ++i) sum[i] += first + p < count[i] ? value[p][i] : 0.0f;
    }
}

// Add the parts of a row of a job, for all its slots, and write the results; AT is at least their number.
template <int BITS, bool BF16, int NT, int AT, int AHEAD> __device__ void finish_row(Block<BITS, BF16, NT>& block, int row, int pieces) {
    const Call& call = block.call;
    float sum[AT] = {};
    unsigned from[AT];
    int count[AT];
#pragma unroll
    for (int e = 0; e < AT; ++e) {
        from[e] = unsigned(block.slot(e < block.count ? e : block.count - 1)) * unsigned(call.rows) + unsigned(row);
        count[e] = pieces;
    }
    add_parts<AT, AHEAD>(sum, call.parts, from, count, int64_t(call.tokens) * call.slots * call.rows);
#pragma unroll
    for (int e = 0; e < AT; ++e)
        if (e < block.count) static_cast<uint16_t*>(call.out)[int64_t(block.slot(e)) * call.rows + row] = narrow<BF16>(sum[e]);
}

// The same for a channel of gate and up, for every second slot of the job from `half` on; AT is at least their number.
template <int BITS, bool BF16, int NT, int AT, int AHEAD>
__device__ void finish_channel(Block<BITS, BF16, NT>& block, const Place& place, int channel, int half, int pieces) {
    const Call& call = block.call;
    float sum[2 * AT] = {};
    unsigned from[2 * AT];
    int count[2 * AT];
#pragma unroll
    for (int i = 0; i < AT; ++i) {
        const int entry = 2 * i + half < block.count ? 2 * i + half : block.count - 1;
        from[2 * i] = unsigned(block.slot(entry)) * 2 * unsigned(call.rows) + unsigned(channel);
        from[2 * i + 1] = from[2 * i] + unsigned(call.rows);
        count[2 * i] = count[2 * i + 1] = pieces;
    }
    add_parts<2 * AT, AHEAD>(sum, call.parts, from, count, int64_t(call.tokens) * call.slots * 2 * call.rows);
    const int64_t first_row = block.first_row(place.job);
    const float gate_bias = bias_of<BF16>(call, first_row + channel), up_bias = bias_of<BF16>(call, first_row + call.rows + channel);
#pragma unroll
    for (int i = 0; i < AT; ++i)
        if (2 * i + half < block.count)
            static_cast<uint16_t*>(call.out)[int64_t(block.slot(2 * i + half)) * call.rows + channel] =
                narrow<BF16>(activated(call, sum[2 * i] + gate_bias, sum[2 * i + 1] + up_bias));
}

// Add the pieces of a strip of one job and write its results.
template <int BITS, bool BF16, int NT> __device__ void finish(Block<BITS, BF16, NT>& block, const Place& place) {
    constexpr int MOST = NT * TILE;
    const Call& call = block.call;
    const int pieces = block.schedule.pieces(place.job, place.tile);
    if (call.mode == DENSE) {
        const int row = block.strip(place.tile, anew(block.warp)) + anew(block.lane);
        if (row >= call.rows) return;
        if (block.count == 1)
            finish_row<BITS, BF16, NT, 1, 4>(block, row, pieces);
        else
            finish_row<BITS, BF16, NT, MOST, 1>(block, row, pieces);
        return;
    }
    // half a warp per slot
    const int lane = anew(block.lane), channel = block.strip(place.tile, anew(block.warp)) + lane % 16, half = lane / 16;
    if (channel >= call.rows) return;
    if (block.count <= 2)
        finish_channel<BITS, BF16, NT, 1, 2>(block, place, channel, half, pieces);
    else
        finish_channel<BITS, BF16, NT, MOST / 2, 1>(block, place, channel, half, pieces);
}

// Add the parts of a row of AT tokens from `first` on, of all their slots, weighted, and write the results.
template <int BITS, bool BF16, int NT, int AT, int AHEAD>
__device__ void combine_row(Block<BITS, BF16, NT>& block, const uint8_t* pieces, int64_t row, int first) {
    const Call& call = block.call;
    float sum[AT] = {};
    for (int k = 0; k < call.slots; ++k) {
        float value[AT];
        unsigned from[AT];
        int count[AT], slot[AT];
#pragma unroll
        for (int i = 0; i < AT; ++i) {
            slot[i] = (first + i < call.tokens ? first + i : call.tokens - 1) * call.slots + k;
            const int job = block.job_of(slot[i]);
            count[i] = job == NONE ? 0 : pieces[job];
            value[i] = job == NONE ? 0.0f : bias_of<BF16>(call, block.first_row(job) + row);
            from[i] = unsigned(slot[i]) * unsigned(call.rows) + unsigned(row);
        }
        add_parts<AT, AHEAD>(value, call.parts, from, count, int64_t(call.tokens) * call.slots * call.rows);
#pragma unroll
        for (int i = 0; i < AT; ++i)
            if (count[i] > 0) sum[i] += call.share[slot[i]] * value[i];
    }
#pragma unroll
    for (int i = 0; i < AT; ++i)
        if (first + i < call.tokens) static_cast<uint16_t*>(call.out)[int64_t(first + i) * call.rows + row] = narrow<BF16>(sum[i]);
}

// Add the pieces of a strip of all jobs, weighted over the slots of each token.
template <int BITS, bool BF16, int NT> __device__ void combine(Block<BITS, BF16, NT>& block, int tile) {
    const Call& call = block.call;
    // every lane counts the pieces of some jobs
    const int warp = anew(block.warp), lane = anew(block.lane);
    uint8_t* pieces = block.bytes + block.memory.pieces + warp * block.memory.most_jobs;
    for (int job = lane; job < block.schedule.jobs; job += LANES) pieces[job] = uint8_t(block.schedule.pieces(job, tile));
    sync_warp();
    const int64_t row = block.strip(tile, warp) + lane;
    if (row < call.rows)
        for (int first = 0; first < call.tokens; first += 4) // more at once do not fit the registers
            if (call.tokens - first == 1)
                combine_row<BITS, BF16, NT, 1, 4>(block, pieces, row, first);
            else
                combine_row<BITS, BF16, NT, 4, 1>(block, pieces, row, first);
    sync_warp(); // before the table is written again
}

// A warp has come to the end of a strip, or of its block's share of one, of which it has summed `steps` steps.
template <int BITS, bool BF16, int NT>
__device__ void end_strip(Block<BITS, BF16, NT>& block, const Sums<BITS, BF16, NT>& sums, const Place& place, int steps) {
    const Call& call = block.call;
    const Schedule& schedule = block.schedule;
    const bool whole = call.mode != DOWN && steps == schedule.steps;
    const int piece = whole ? 0 : block.number - schedule.owner(schedule.first(place.job, place.tile));
    store(block, sums, place, whole, piece);
    if (whole) return;
    const int strip = place.tile * call.warps + anew(block.warp);
    if (call.mode == DOWN) {
        if (last_of(call.arrived + strip, steps, schedule.jobs * schedule.steps, block.lane)) combine<BITS, BF16, NT>(block, place.tile);
    } else if (last_of(call.arrived + place.job * schedule.tiles * call.warps + strip, steps, schedule.steps, block.lane)) {
        finish<BITS, BF16, NT>(block, place);
    }
}

} // namespace llmcompress::skinny
