// Products of a few tokens with 2-, 3- and 4-bit weights in the stored order, dense and routed: y = W x.
//
// What limits them is reading W, so everything else has to fit beside that. At 3 TB/s an H100 issues 2.8 instructions
// of a thread per 2-bit weight, 4.0 per 3-bit and 5.3 per 4-bit weight; cuda/aot.py counts what the machine code needs.
//
// Work. A warp owns a strip of 32 rows and walks its columns in steps of 128 (2 bits: 256); the strips of a block's warps
// are a tile. All steps of a launch are numbered, expert by expert, tile by tile, and every block takes an equal run of
// them, whatever the routing, so that no multiprocessor waits for another one's second tile (schedule.cuh). A strip that
// several blocks share is summed by the last of them in a fixed order: results do not depend on scheduling.
//
// Memory. cp.async brings a warp's words into its own part of shared memory, several steps ahead and across the ends of
// tiles, so that no barrier of the block stands in the loop. Activations lie in shared memory in the order in which the
// matrix instruction wants them, for a slice of the columns.
//
// Arithmetic. A warp multiplies 2 x 16 rows by mma.m16n8k16: weights are the left operand, tokens the 8 columns of the
// right one. The order of the columns inside a dot product is free as long as both operands agree, so a lane owns the 8
// (2 bits: 16) neighbouring columns that the word it reads holds, and the stored stream needs no second layout. Two codes
// of a word that lie 16 bits apart become two numbers by one LOP3 and at most one shift: a code in the mantissa under the
// right exponent is the number 2^e + code, exactly, where 2^e, at most 128, depends on where in the mantissa it lies.
// Scales and zero points act on the fp32 sums of a group, scale (part - sum(2^e x) - zero sum(x)); both sums over x are
// taken once, when a slice comes, and the first begins the accumulators.
//
// For experts a block finds the slots of each itself: gate, up and activation are one launch, down projection and the
// weighted sum over slots another.
#pragma once

#include "activations.cuh"

namespace llmcompress::skinny {

// The words and scales of a warp on their way through shared memory.
template <int BITS, bool BF16, int NT> struct Pipeline {
    using S = Shape<BITS>;
    const Call& call;
    const Block<BITS, BF16, NT>& block;
    unsigned char* stages;
    int bytes; // of a stage
    int spans; // of a step
    int stage = 0; // that is filled next
    Place place;   // the step that is fetched next
    const unsigned char* from[S::COPIES];
    SharedAddress target; // where this lane's first copy goes in the first stage
    const uint16_t* scale_row; // of this lane's row
    const uint32_t* zero_row;
    // scales and zero points of this lane's row for the step fetched last, as stored
    uint16_t scale[S::UNITS];
    uint32_t zero[2];
    unsigned bit;
    int known; // spans that the row has from there on

    __device__ Pipeline(const Block<BITS, BF16, NT>& b) : call(b.call), block(b), spans(b.memory.spans) {
        bytes = b.memory.stage;
        stages = b.bytes + b.memory.stages + b.warp * call.stages * bytes;
        target = shared_address(stages + (S::CHUNKS == 3 ? b.lane * 16 : b.lane / S::CHUNKS * S::STRIDE + b.lane % S::CHUNKS * 16));
        known = -1;
    }

    __device__ __forceinline__ unsigned char* stage_of(int number) const { return stages + number * bytes; }
    static __device__ __forceinline__ Pair* scales_of(unsigned char* stage) {
        return reinterpret_cast<Pair*>(stage + LANES * S::STRIDE);
    }

    __device__ void begin(const Place& at) {
        place = at;
        enter();
    }

    // Addresses for another strip.
    __device__ __forceinline__ void enter() {
        const int lane = anew(block.lane), strip = block.strip(place.tile, anew(block.warp));
        const int64_t first = block.first_row(place.job), row = first + block.weight_row(strip, lane);
        scale_row = call.scale + row * call.groups;
        zero_row = call.zero + row * call.zero_words;
#pragma unroll
        for (int i = 0; i < S::COPIES; ++i) {
            const int chunk = lane + i * LANES;
            const int64_t j = first + block.weight_row(strip, chunk / S::CHUNKS);
            from[i] = reinterpret_cast<const unsigned char*>(call.weight + j * call.words) + chunk % S::CHUNKS * 16;
        }
    }

    // Start copying the step at `place`, and go to the next one.
    __device__ __forceinline__ void fetch() {
        // beyond the row's end nothing is copied: the codes left there multiply activations of zero
        const unsigned begin = unsigned(place.step) * S::ROW_BYTES, left = unsigned(call.columns) * BITS / 8 - begin;
        const SharedAddress to = target + stage * bytes;
        copy<0>(to, begin, left);
        copy<1>(to, begin, left);
        copy<2>(to, begin, left);
        if constexpr (S::COPIES > 3) copy<3>(to, begin, left);
        load_scales();
        stage = stage + 1 == call.stages ? 0 : stage + 1;
        if (place.next(block.schedule)) enter();
    }

    template <int I> __device__ __forceinline__ void copy(SharedAddress to, unsigned begin, unsigned left) {
        // rows of 4 chunks repeat after 8 rows, rows of 3 are copied as they come
        constexpr int BEYOND = S::CHUNKS == 3 ? I * LANES * 16 : I * LANES / S::CHUNKS * S::STRIDE;
        if ((unsigned(block.lane) + I * LANES) % S::CHUNKS * 16 < left) copy_async<BEYOND>(to, from[I] + begin);
    }

    __device__ __forceinline__ void load_scales() {
        unsigned group = unsigned(place.step) * unsigned(spans);
        if (call.group > S::COLUMNS) group = unsigned(place.step) / (unsigned(call.group) / S::COLUMNS);
        known = int(call.groups) - int(group);
#pragma unroll
        for (int i = 0; i < S::UNITS; ++i)
            if (i < spans && i < known) scale[i] = read(scale_row + group + i);
        if (call.zero == nullptr) return;
        // the zero points of a step fill at most 16 bits; only those of 3 bits may lie in two words
        const unsigned word = group * BITS / 32;
        bit = group * BITS % 32;
        if (BITS == 3 || bit == 0 || place.step == 0 || fresh) zero[0] = read(zero_row + word);
        if (BITS == 3) zero[1] = word + 1 < call.zero_words ? read(zero_row + word + 1) : 0;
        fresh = false;
    }
    bool fresh = true; // no word of zero points has been read yet

    // (scale, -scale zero) of this lane's row for the step fetched last.
    __device__ __forceinline__ void store_scales() {
        if (known < 0) return;
        Pair* to = scales_of(stage_of(stage == 0 ? call.stages - 1 : stage - 1)) + block.lane;
        const bool stored = call.zero != nullptr;
        const uint32_t codes = stored ? funnel(zero[0], BITS == 3 ? zero[1] : 0u, bit) : 0;
#pragma unroll
        for (int i = 0; i < S::UNITS; ++i) {
            if (i >= spans) break;
            const uint32_t middle = stored ? (codes >> (BITS * i)) & ((1u << BITS) - 1) : 1u << (BITS - 1);
            const float value = i < known ? widen<false>(scale[i]) : 0.0f;
            to[i * LANES] = {value, -value * float(middle)};
        }
    }
};

template <int BITS, bool BF16, int NT> struct Sums {
    using S = Shape<BITS>;
    float total[2][NT][4]; // [16-row half][8 slots]: rows g, g, g + 8, g + 8 and slots 2 t, 2 t + 1, 2 t, 2 t + 1

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[r][n][i] = 0;
    }

    // Step i of the unit's products: columns of two pairs of every lane.
    template <int I>
    static __device__ __forceinline__ void multiply(float (&part)[2][NT][4], const uint32_t (&code)[2][2], const uint32_t (&b)[NT][S::PAIRS]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t a[4] = {pair_of<BITS, BF16, 2 * I>(code[r][0]), pair_of<BITS, BF16, 2 * I>(code[r][1]),
                                   pair_of<BITS, BF16, 2 * I + 1>(code[r][0]), pair_of<BITS, BF16, 2 * I + 1>(code[r][1])};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<BF16>(part[r][n], a, b[n][2 * I], b[n][2 * I + 1]);
        }
    }

    // Add the products of one step. `PER`: units of a span, over which the scales are the same.
    // `x`: this lane's activations of the step, by 8 slots; `sums`: those of its slots.
    template <int PER>
    __device__ __forceinline__ void step(const unsigned char* stage, const unsigned char* const (&x)[NT], const Quad* sums, int g, int t) {
        const unsigned char* words = stage + g * S::STRIDE;
        const Pair* scales = Pipeline<BITS, BF16, NT>::scales_of(const_cast<unsigned char*>(stage)) + g;
#pragma unroll
        for (int span = 0; span < S::UNITS / PER; ++span) {
            float part[2][NT][4], sum[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const Quad q = sums[(span * NT + n) * (TILE / 2)];
                sum[n][0] = q.at[0], sum[n][1] = q.at[2];
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[r][n][i] = q.at[1 + i % 2 * 2];
            }
#pragma unroll
            for (int u = span * PER; u < (span + 1) * PER; ++u) {
                uint32_t b[NT][S::PAIRS], code[2][2];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int h = 0; h < S::PAIRS / 4; ++h) {
                        const Words w = *reinterpret_cast<const Words*>(x[n] + u * 2 * S::UNIT + 64 * h);
#pragma unroll
                        for (int j = 0; j < 4; ++j) b[n][4 * h + j] = w.at[j];
                    }
#pragma unroll
                for (int r = 0; r < 4; ++r) code[r / 2][r % 2] = codes_of<BITS>(words + 8 * r * S::STRIDE + u * S::UNIT_BYTES, t);
                multiply<0>(part, code, b);
                multiply<1>(part, code, b);
                if constexpr (S::PAIRS == 8) {
                    multiply<2>(part, code, b);
                    multiply<3>(part, code, b);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Pair low = scales[span * LANES + 16 * r], high = scales[span * LANES + 16 * r + 8];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const Pair s = i < 2 ? low : high;
                        total[r][n][i] = fmaf(s.y, sum[n][i % 2], fmaf(s.x, part[r][n][i], total[r][n][i]));
                    }
            }
        }
    }
};

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

// Add the pieces of a strip of one job and write its results.
template <int BITS, bool BF16, int NT> __device__ void finish(Block<BITS, BF16, NT>& block, const Place& place) {
    constexpr int MOST = NT * TILE;
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots;
    const int pieces = block.schedule.pieces(place.job, place.tile);
    if (call.mode == DENSE) {
        const int row = block.strip(place.tile, anew(block.warp)) + anew(block.lane);
        if (row >= call.rows) return;
        float sum[MOST] = {};
        for (int p = 0; p < pieces; ++p)
#pragma unroll
            for (int e = 0; e < MOST; ++e)
                if (e < block.count) sum[e] += read_written(call.parts + (p * all + block.slot(e)) * call.rows + row);
#pragma unroll
        for (int e = 0; e < MOST; ++e)
            if (e < block.count) out[block.slot(e) * call.rows + row] = narrow<BF16>(sum[e]);
        return;
    }
    // half a warp per slot
    const int lane = anew(block.lane), channel = block.strip(place.tile, anew(block.warp)) + lane % 16, half = lane / 16;
    if (channel >= call.rows) return;
    float gate[MOST / 2] = {}, up[MOST / 2] = {};
    for (int p = 0; p < pieces; ++p)
#pragma unroll
        for (int i = 0; i < MOST / 2; ++i)
            if (2 * i + half < block.count) {
                const float* part = call.parts + (p * all + block.slot(2 * i + half)) * 2 * call.rows + channel;
                gate[i] += read_written(part), up[i] += read_written(part + call.rows);
            }
    const int64_t first_row = block.first_row(place.job);
    const float gate_bias = bias_of<BF16>(call, first_row + channel), up_bias = bias_of<BF16>(call, first_row + call.rows + channel);
#pragma unroll
    for (int i = 0; i < MOST / 2; ++i)
        if (2 * i + half < block.count)
            out[block.slot(2 * i + half) * call.rows + channel] = narrow<BF16>(activated(call, gate[i] + gate_bias, up[i] + up_bias));
}

// Add the pieces of a strip of all jobs, weighted over the slots of each token.
template <int BITS, bool BF16, int NT> __device__ void combine(Block<BITS, BF16, NT>& block, int tile) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots;
    // every lane counts the pieces of some jobs
    const int warp = anew(block.warp), lane = anew(block.lane);
    uint8_t* pieces = block.bytes + block.memory.pieces + warp * block.memory.most_jobs;
    for (int job = lane; job < block.schedule.jobs; job += LANES) pieces[job] = uint8_t(block.schedule.pieces(job, tile));
    sync_warp();
    const int64_t row = block.strip(tile, warp) + lane;
    if (row < call.rows)
        for (int first = 0; first < call.tokens; first += TILE) {
            float sum[TILE] = {};
            for (int k = 0; k < call.slots; ++k) {
                float value[TILE];
                int count[TILE];
#pragma unroll
                for (int i = 0; i < TILE; ++i) {
                    const int slot = (first + i) * call.slots + k;
                    const int job = first + i < call.tokens ? block.job_of(slot) : NONE;
                    count[i] = job == NONE ? 0 : pieces[job];
                    value[i] = job == NONE ? 0.0f : bias_of<BF16>(call, block.first_row(job) + row);
                }
                for (int p = 0; p < call.pieces; ++p)
#pragma unroll
                    for (int i = 0; i < TILE; ++i)
                        if (p < count[i]) value[i] += read_written(call.parts + (p * all + (first + i) * call.slots + k) * call.rows + row);
#pragma unroll
                for (int i = 0; i < TILE; ++i)
                    if (count[i] > 0) sum[i] += call.share[(first + i) * call.slots + k] * value[i];
            }
#pragma unroll
            for (int i = 0; i < TILE; ++i)
                if (first + i < call.tokens) out[(first + i) * call.rows + row] = narrow<BF16>(sum[i]);
        }
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

template <int BITS, bool BF16, int NT>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) skinny_kernel(const __grid_constant__ Call call) {
    using S = Shape<BITS>;
    Block<BITS, BF16, NT> block(call, shared_memory());
    // routing is an activation of the launch in front of gate and up; down's is older, since gate and up waited for it
    if (call.mode == GATE_UP) previous_launch();
    block.plan();
    if (call.mode == DOWN && block.schedule.jobs == 0) {
        previous_launch();
        block.clear_out();
    }
    const Schedule& schedule = block.schedule;
    if (block.number >= schedule.blocks) return;
    unsigned now = schedule.begin(block.number);
    const unsigned end = schedule.begin(block.number + 1);

    Pipeline<BITS, BF16, NT> pipeline(block);
    Place place = schedule.place(now);
    pipeline.begin(place);
    for (int ahead = 0; ahead < call.stages - 1; ++ahead) {
        pipeline.store_scales(); // of the step fetched before
        if (now + ahead < end)
            pipeline.fetch();
        else
            pipeline.known = -1;
        commit();
    }
    if (call.mode != GATE_UP) previous_launch();
    next_launch();

    Sums<BITS, BF16, NT> sums;
    sums.clear();
    const unsigned char* x[NT];
    int stage = 0, summed = 0, loaded_job = -1, loaded_slice = -1, slice = place.step / call.slice, in_slice = place.step % call.slice;
    for (; now < end; ++now) {
        if (place.job != loaded_job || slice != loaded_slice) {
            block.load_x(place.job, slice);
            loaded_job = place.job, loaded_slice = slice;
            block.lanes_of_x(x);
        }
        if (call.stages == 3)
            wait<1>();
        else if (call.stages == 4)
            wait<2>();
        else if (call.stages == 5)
            wait<3>();
        else
            wait<4>();
        pipeline.store_scales();
        sync_warp(); // the step is there, and no lane reads the one before any more
        if (now + call.stages - 1 < end)
            pipeline.fetch();
        else
            pipeline.known = -1;
        commit();
        const unsigned char* at[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) at[n] = x[n] + in_slice * 2 * S::COLUMNS;
        const Quad* x_sums = block.sums() + in_slice * pipeline.spans * NT * (TILE / 2) + block.t;
        const unsigned char* words = pipeline.stage_of(stage);
        if (pipeline.spans == 1)
            sums.template step<S::UNITS>(words, at, x_sums, block.g, block.t);
        else if (pipeline.spans == 2)
            sums.template step<S::UNITS / 2>(words, at, x_sums, block.g, block.t);
        else
            sums.template step<1>(words, at, x_sums, block.g, block.t);
        ++summed;
        stage = stage + 1 == call.stages ? 0 : stage + 1;
        if (place.step == schedule.steps - 1 || now + 1 == end) {
            end_strip<BITS, BF16, NT>(block, sums, place, summed);
            sums.clear();
            summed = 0;
        }
        place.next(schedule);
        if (place.step == 0)
            slice = in_slice = 0;
        else if (++in_slice == call.slice)
            in_slice = 0, ++slice;
    }
}

} // namespace llmcompress::skinny
