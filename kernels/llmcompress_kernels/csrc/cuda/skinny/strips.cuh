// Products of a few tokens with weights in groups of 128 columns or multiples of them: blocks take whole strips.
//
// skinny.cuh says what both forms have in common. Where it lets blocks share strips, whose parts meet in memory, here every
// strip belongs to one block, so that nothing is left to do when its last step has been added.
//
// Work. A tile is a strip for each of some teams of warps; the members of a team take turns at the steps of its rows, 512
// columns each, and their sums meet in shared memory at the end of the tile. The host chooses teams, members, and how many
// of a strip's 32 rows are used, so that all blocks take about the same: 14336 rows are 128 tiles of 4 x 28 for 132
// multiprocessors. Rows that are not used cost products, of which there are enough, and no bytes. Tiles of the down
// projection belong to a block with all their experts, whose results are weighted and added there.
//
// Steps. What a step costs besides its products is paid once for 32 x 512 weights; two spans of it are multiplied side by
// side, because a warp waits for its own operations otherwise: 8 warps with 150 registers each are faster than 16 with 128.
//
// Codes. A lane owns 32 neighbouring columns of a span, one read of 16 or 8 bytes at 4 and 2 bits. At 3 bits these are three
// words; codes 16 columns apart lie 48 bits apart, in the lower and upper halves of three permuted words, which leaves two
// pairs of 16 that begin in one half and end in the next. The sum of a span begins with what zero points take from it.
#pragma once

#include "flow.cuh"
#include "outputs.cuh"

namespace llmcompress::skinny {

// What kernels/bench/gpu_few_tokens.py leaves out to see what the rest takes: 1 products, 2 copies of weights, 3 everything.
#ifndef LLMCOMPRESS_WITHOUT
#define LLMCOMPRESS_WITHOUT 0
#endif

// Products of the steps that have come.
template <int BITS, bool BF16, int NT> struct Totals {
    using S = Span<BITS>;
    float total[2][NT][4]; // [16-row half][8 slots]: rows g, g, g + 8, g + 8 and slots 2 t, 2 t + 1, 2 t, 2 t + 1

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[r][n][i] = 0;
    }

    template <int I>
    static __device__ __forceinline__ void multiply(float (&part)[2][NT][4], const Codes<BITS> (&code)[4], const unsigned char* const (&x)[NT], int at) {
        uint32_t b[NT][4]; // two pairs of products
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const Words w = *reinterpret_cast<const Words*>(x[n] + at + 64 * I);
#pragma unroll
            for (int j = 0; j < 4; ++j) b[n][j] = w.at[j];
        }
        products<4 * I>(part, code, b, 0);
        products<4 * I + 2>(part, code, b, 2);
        if constexpr (I < 3) multiply<I + 1>(part, code, x, at);
    }

    template <int P>
    static __device__ __forceinline__ void products(float (&part)[2][NT][4], const Codes<BITS> (&code)[4], const uint32_t (&b)[NT][4], int from) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t a[4] = {code[2 * r].template pair<BF16, P>(), code[2 * r + 1].template pair<BF16, P>(),
                                   code[2 * r].template pair<BF16, P + 1>(), code[2 * r + 1].template pair<BF16, P + 1>()};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<BF16>(part[r][n], a, b[n][from], b[n][from + 1]);
        }
    }

    // Add the products of one step. `x`: this lane's activations of it, by 8 slots; `prepared`: the sums of its spans.
    __device__ __forceinline__ void step(const unsigned char* stage, const unsigned char* const (&x)[NT], const unsigned char* prepared, int g, int t) {
        const unsigned char* words = stage + g * S::PITCH + 4 * BITS * t;
        const Pair* scales = Flow<BITS, BF16, NT>::scales_of(const_cast<unsigned char*>(stage)) + g;
#pragma unroll 2
        for (int span = 0; span < S::SPANS; ++span) {
            const int at = S::BYTES * (BITS == 4 ? span ^ (g & 1) : BITS == 2 ? span ^ (g & 3) : span);
            Codes<BITS> code[4];
            Pair scale[4];
            float part[2][NT][4];
#pragma unroll
            for (int r = 0; r < 4; ++r) code[r].load(words + 8 * r * S::PITCH + at);
#pragma unroll
            for (int r = 0; r < 4; ++r) scale[r] = scales[span * LANES + 8 * r];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const Four four = *reinterpret_cast<const Four*>(prepared + (span * NT + n) * SUMS_BYTES + 16 * t);
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[r][n][i] = fmaf(scale[2 * r + i / 2].y, four.at[i % 2], four.at[2 + i % 2]);
            }
            multiply<0>(part, code, x, 2 * SPAN * span);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[r][n][i] = fmaf(scale[2 * r + i / 2].x, part[r][n][i], total[r][n][i]);
        }
    }

    // Leave the sums where all warps of the block find them: slot by slot, row by row.
    __device__ __forceinline__ void leave(float* to, int count, int g, int t) const {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int entry = n * TILE + 2 * t + i % 2;
                if (entry >= count) continue;
#pragma unroll
                for (int r = 0; r < 2; ++r) to[entry * PART + 16 * r + i / 2 * 8 + g] = total[r][n][i];
            }
    }
};

// Add the sums of a team's members and make results of them: a warp per slot and team, a lane per row.
template <int BITS, bool BF16, int NT> __device__ __forceinline__ void add_up(Crew<BITS, BF16, NT>& crew, const Visit& visit, const float* parts, int turn) {
    const auto& call = crew.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int lane = crew.lane, apart = call.at_once * PART, all = crew.count << call.teams_log;
    // whose turn it is changes, so that no warp falls behind
    int item = crew.warp - turn;
    if (item < 0) item += call.warps;
    for (; item < all; item += call.warps) {
        const int entry = item >> call.teams_log, team = item & (call.teams - 1);
        const float* from = parts + team * crew.members * apart + entry * PART + lane;
        float sum = 0;
#pragma unroll 4
        for (int m = 0; m < crew.members; ++m) sum += from[m * apart];
        const int slot = crew.slot(entry), within = call.mode == GATE_UP ? lane % 16 : lane, row = crew.first_of(visit.tile, team) + within;
        const bool used = within < crew.width() && row < call.rows;
        if (call.mode == GATE_UP) {
            if (used) sum += bias_of<BF16>(call, crew.first_row(visit.job) + row + (lane >= 16 ? call.rows : 0));
            const float up = swap(sum, 16);
            if (used && lane < 16) out[int64_t(slot) * call.rows + row] = narrow<BF16>(activated(call, sum, up));
        } else if (call.mode == DOWN) {
            float* results = crew.template at<float>(crew.places.results);
            if (used) results[((slot << call.teams_log) + team) * STRIP + lane] = sum + bias_of<BF16>(call, crew.first_row(visit.job) + row);
        } else if (used) {
            out[int64_t(slot) * call.rows + row] = narrow<BF16>(sum);
        }
    }
}

// DOWN, after the last job of a tile: the weighted sum over the slots of every token.
template <int BITS, bool BF16, int NT> __device__ __forceinline__ void combine(Crew<BITS, BF16, NT>& crew, int tile) {
    const auto& call = crew.call;
    const float* results = crew.template at<float>(crew.places.results) + crew.lane;
    for (int item = crew.warp; item < call.tokens << call.teams_log; item += call.warps) {
        const int token = item >> call.teams_log, team = item & (call.teams - 1), row = crew.first_of(tile, team) + crew.lane;
        if (crew.lane >= crew.width() || row >= call.rows) continue;
        float sum = 0;
        for (int slot = token * call.slots; slot < (token + 1) * call.slots; ++slot)
            if (crew.job_of(slot) != NONE) sum += call.share[slot] * results[((slot << call.teams_log) + team) * STRIP];
        static_cast<uint16_t*>(call.out)[int64_t(token) * call.rows + row] = narrow<BF16>(sum);
    }
}

template <int BITS, bool BF16, int NT>
__global__ void __launch_bounds__(32 * STRIP_WARPS, 1) strips_kernel(const __grid_constant__ Task<BITS, NT> call) {
    using S = Span<BITS>;
    // the launch behind may begin to read weights; behind gate and up it reads routing as well, which has to be there by then
    if (call.mode != GATE_UP) next_launch();
    Crew<BITS, BF16, NT> crew(call, shared_memory());
    // routing is an activation of the launch in front of gate and up; down's is older, since gate and up waited for it
    if (call.mode == GATE_UP) {
        previous_launch();
        next_launch();
    }
    crew.plan();
    if (call.mode == DOWN && crew.jobs == 0) {
        previous_launch();
        crew.clear_out(blockIdx.x);
    }
    const unsigned now = crew.begin(blockIdx.x), end = crew.begin(blockIdx.x + 1);
    if (now >= end) return;
    int left = int(end - now) * call.rounds; // turns that are not fetched yet
    Visit visit = crew.visit(now);

    Flow<BITS, BF16, NT> flow(crew);
    flow.begin(visit);
    const auto fetch = [&] {
        if (left > 0)
            flow.fetch(left == 1);
        else
            flow.fetched = false;
        --left;
        commit();
    };
    for (int i = 0; i < call.stages - 1; ++i) {
        flow.store_scales(); // of the step fetched before
        fetch();
    }
    if (call.mode != GATE_UP) previous_launch();

    Totals<BITS, BF16, NT> totals;
    const unsigned char* x[NT];
    int stage = 0, turn = 0;
    const int each = call.at_once * PART, steps = int(unsigned(call.columns + S::COLUMNS - 1) / S::COLUMNS);
#pragma unroll 1
    for (unsigned v = now; v < end; ++v) {
        totals.clear();
#pragma unroll 1
        for (int round = 0; round < call.rounds; ++round) {
            if (!crew.has_x(visit.job, round)) {
                crew.load_x(visit.job, round);
                crew.template lanes_of_x<16>(x);
            }
            wait_for_step<4>(call.stages);
            flow.store_scales();
            sync_warp(); // the step is there, and no lane reads the one before any more
            fetch();
            if (LLMCOMPRESS_WITHOUT != 1 && round * crew.members + crew.member < steps) {
                const int here = (round - crew.x_first) * crew.members + crew.member;
                const unsigned char* at[NT];
#pragma unroll
                for (int n = 0; n < NT; ++n) at[n] = x[n] + here * S::X_BYTES;
                totals.step(flow.stage_of(stage), at, crew.bytes + crew.sums + here * S::SPANS * NT * SUMS_BYTES, crew.g, crew.t);
            }
            stage = stage + 1 == call.stages ? 0 : stage + 1;
        }
        float* parts = crew.template at<float>(crew.places.parts);
        totals.leave(parts + crew.warp * each, crew.count, crew.g, crew.t);
        sync();
        add_up(crew, visit, parts, turn);
        if (call.mode == DOWN && visit.job + 1 == crew.jobs) {
            sync();
            combine(crew, visit.tile);
        }
        if (v + 1 < end) sync(); // before sums are left again
        turn = turn + 1 == call.warps ? 0 : turn + 1;
        crew.next(visit);
    }
}

} // namespace llmcompress::skinny
